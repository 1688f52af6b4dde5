"""A store on disk for what is dear to compute, and the image cache on it, so that each image is decoded once."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import reduce
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cliptune.data.table import BoolArray, IntArray
from cliptune.data.workers import shared_number
from cliptune.preprocess.decode import file_stamp, read_bytes, size_of
from cliptune.preprocess.resize import Pixels
from cliptune.preprocess.transforms import PixelTransform
from cliptune.runtime.files import require_free_space
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

KEY_BYTES = 16
RECORD = np.dtype([("key", f"S{KEY_BYTES}"), ("seal", "<u8")])
"""What `.keys` holds of each row. The seal is 0 for a row that was never written, else its checksum plus 1."""

_SEEKING = nullcontext() if hasattr(os, "preadv") else threading.Lock()
"""Windows reads at a position that all threads share. Elsewhere a lock could be forked while it is held."""
BLOCK_BYTES = 1 << 23
"""How much `holds` reads at once."""

Keys = NDArray[np.bytes_]
"""`[N]` of 16 bytes each; NumPy sorts and compares them as texts that zeros fill up, all 16 bytes."""
Rows = NDArray[np.uint8]
"""`[N, row_bytes]`."""


def digest(*parts: Any) -> bytes:
    """Return a key of 128 bits for what identifies a row."""
    content = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def as_keys(digests: Iterable[bytes]) -> Keys:
    """Put digests into one array."""
    return np.frombuffer(b"".join(digests), dtype=RECORD["key"])


class _Files(NamedTuple):
    """What one process has open; another has its own, since positions in a file are shared across a fork."""

    process: int
    keys: FileIO
    rows: FileIO


class RowStore:
    """Rows of fixed size on disk under 128-bit keys, which several workers, ranks and runs share without a lock.

    `<path>.keys` says what the rows are, `<path>.rows` holds them. A key gets its row number when it is announced, and
    keeps it; then anyone may write the row, at any time. What makes it safe is a checksum over key and content, written
    after the row: whatever a kill, a power cut or two writers at once leave of a row, it does not fit, and the row
    counts as missing. So no lock is needed, nor a wait for the disk.

        announce [cat, dog]   .keys: cat 0, dog 0     .rows: (empty) (empty)
        write dog             .keys: cat 0, dog 0     .rows: (empty) ddddddd     a kill here: dog is missing
                              .keys: cat 0, dog 917   .rows: (empty) ddddddd

    Args:
        path: of both files, without their endings; the folder is made. Deleting them is safe between runs.
        row_bytes: size of a row.
    """

    def __init__(self, path: Path, row_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.row_bytes = row_bytes
        self._keys_path, self._rows_path = (path.with_name(path.name + ending) for ending in (".keys", ".rows"))
        self.failed = False
        """Whether somebody was told that the disk fails."""
        self._files: _Files | None = None

    def announce(self, keys: Keys, *, what: str, way_out: str) -> IntArray:
        """Return the row number of each key, int64 `[N]`; keys that have none get the next ones.

        Args:
            keys: `[N]`; one may come several times.
            what: what a row is, for the message of a full disk.
            way_out: what to do instead, for the same message.

        Raises:
            OSError: the disk has no room for the rows that are still to be written, or takes no files.
        """
        try:
            return self._announce(keys, what=what, way_out=way_out)
        except OSError as error:
            if error.errno is None:  # it says already what to do
                raise
            where = error.filename or self._rows_path
            raise OSError(f"{where}: {error.strerror}; {what}s cannot be cached there. {way_out}") from None

    def _announce(self, keys: Keys, *, what: str, way_out: str) -> IntArray:
        self.path.parent.mkdir(parents=True, exist_ok=True)  # a run may have gone on for hours since it was made
        indices, seals = self._find(keys)
        _, first = np.unique(keys[indices < 0], return_index=True)
        new = keys[indices < 0][np.sort(first)]  # in the order of the keys, so that neighbours stay neighbours
        num_empty = len(new) + len(np.unique(indices[(indices >= 0) & (seals == 0)]))
        require_free_space(
            self.path.parent,
            num_empty * (self.row_bytes + RECORD.itemsize),
            what=count(num_empty, f"cached {what}"),
            way_out=way_out,
        )
        if len(new):
            records = np.zeros(len(new), dtype=RECORD)
            records["key"] = new
            with self._keys_path.open("ab") as file:
                # a writer that was killed may have left a part of a record
                _write(file, b"\0" * (-file.tell() % RECORD.itemsize) + records.tobytes())
            indices, _ = self._find(keys)  # another run may have added its keys before ours, or ours
        self._make_room(1 + int(indices.max(initial=-1)))
        self.reopen()
        return indices

    def was_written(self, keys: Keys) -> BoolArray:
        """Tell of which keys a row was ever written, bool `[N]`; nothing is announced, so no room is needed.

        Raises:
            OSError: the disk fails.
        """
        written: BoolArray = self._find(keys)[1] != 0
        return written

    def read(self, indices: IntArray, keys: Keys) -> tuple[Rows, BoolArray]:
        """Return copies of rows, uint8 `[N, row_bytes]`, and which are whole, bool `[N]`.

        The others are missing, damaged, half-written or another key's. The files are read, not mapped: where one was
        cut, or the disk is full, a map would end the process.

        Raises:
            OSError: the files are gone, or the disk fails.
        """
        rows, seals = np.zeros((len(indices), self.row_bytes), dtype=np.uint8), self._read_records(indices)["seal"]
        file = self._open().rows
        for start, end in _runs(indices):
            _read(file, int(indices[start]) * self.row_bytes, rows[start:end])
        # copied first and looked at then: another process may be writing to it
        whole: BoolArray = seals == _seals(keys, rows)
        return rows, whole

    def read_into(self, indices: IntArray, keys: Keys, *parts: Rows) -> BoolArray:
        """Read rows to where they are wanted, in one copy from the system's cache of the disk; safe in threads.

        Args:
            indices, keys: `[N]` each.
            parts: what a row consists of, one after another: `[N, bytes]` each.

        Returns:
            As `read`, which are whole, bool `[N]`; what the others' parts hold is nobody's.

        Raises:
            OSError: the files are gone, or the disk fails.
        """
        seals, file = self._read_records(indices)["seal"], self._open().rows
        whole = np.zeros(len(indices), dtype=bool)
        for number, index in enumerate(indices.tolist()):
            row = [part[number : number + 1] for part in parts]
            _read(file, index * self.row_bytes, *row)
            # at once, while it is in the processor's cache
            whole[number] = seals[number] == _seals(keys[number : number + 1], *row)[0]
        return whole

    def written(self, indices: IntArray) -> BoolArray:
        """Tell which rows were ever written, bool `[N]`.

        Raises:
            OSError: as `read`.
        """
        written: BoolArray = self._read_records(indices)["seal"] != 0
        return written

    def holds(self, indices: IntArray, keys: Keys, *, valid: Callable[[Rows], BoolArray] | None = None) -> BoolArray:
        """Tell which rows are whole, bool `[N]`; reads all of those that were ever written, and warns of damaged ones.

        Args:
            indices, keys: `[N]` each.
            valid: says which rows, `[n, row_bytes]`, may be used; None: all.

        Raises:
            OSError: as `read`.
        """
        whole = self.written(indices)
        written, block = np.flatnonzero(whole), max(1, BLOCK_BYTES // self.row_bytes)
        for start in range(0, len(written), block):
            part = written[start : start + block]
            rows, whole[part] = self.read(indices[part], keys[part])
            if valid is not None:
                whole[part] &= valid(rows)
        if num_damaged := len(written) - int(whole.sum()):
            logger.warning("%s: %s damaged, computed anew", self._rows_path, count(num_damaged, "row is", "rows are"))
        return whole

    def write(self, indices: IntArray, keys: Keys, rows: Rows) -> None:
        """Write rows, uint8 `[N, row_bytes]`, of keys that were announced.

        Raises:
            OSError: the disk is full, or took a part only.
        """
        files = self._open()
        records = np.empty(len(rows), dtype=RECORD)
        records["key"], records["seal"] = keys, _seals(keys, rows)
        for start, end in _runs(indices):
            for file, content in ((files.rows, rows), (files.keys, records)):
                with _SEEKING:
                    file.seek(int(indices[start]) * content[0].nbytes)
                    _write(file, content[start:end].tobytes())

    def reopen(self) -> None:
        """Look at the files anew: a file system over the network shows only then what other machines have written."""
        self._files = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def _find(self, keys: Keys) -> tuple[IntArray, NDArray[np.uint64]]:
        """Return the row number of each key, -1 where there is none, and its seal; of equal keys the first counts."""
        data = self._keys_path.read_bytes() if self._keys_path.exists() else b""
        records = np.frombuffer(data, dtype=RECORD, count=len(data) // RECORD.itemsize)
        indices, seals = np.full(len(keys), -1, dtype=np.int64), np.zeros(len(keys), dtype=np.uint64)
        if len(records):
            order = np.argsort(records["key"], kind="stable")
            nearest = np.searchsorted(records["key"], keys, sorter=order)
            candidates = order[np.minimum(nearest, len(order) - 1)]
            hits = records["key"][candidates] == keys
            indices[hits], seals[hits] = candidates[hits], records["seal"][candidates[hits]]
        return indices, seals

    def _make_room(self, num_rows: int) -> None:
        """Lengthen `.rows`, which takes no space on most disks. Setting its length could cut what another run added."""
        with self._rows_path.open("ab"):
            pass
        with self._rows_path.open("r+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) < num_rows * self.row_bytes:
                file.seek(num_rows * self.row_bytes - 1)
                _write(file, b"\0")

    def _read_records(self, indices: IntArray) -> NDArray[Any]:
        """Return what `.keys` says of rows, `[N]`; zeros where it ends before."""
        records, file = np.zeros(len(indices), dtype=RECORD), self._open().keys
        for start, end in _runs(indices):
            _read(file, int(indices[start]) * RECORD.itemsize, records[start:end].view(np.uint8))
        return records

    def _open(self) -> _Files:
        if self._files is None or self._files.process != os.getpid():
            self._files = _Files(os.getpid(), FileIO(self._keys_path, "r+"), FileIO(self._rows_path, "r+"))
        return self._files


HEADER = np.dtype([("stamp", f"V{KEY_BYTES}"), ("file", f"V{KEY_BYTES}"), ("width", "<u4"), ("height", "<u4")])
"""What a cached image begins with: digests of its file's stamp and of all its bytes, and the image's size."""
FORMAT = 3  # part of the files' names: raise it when what a row holds changes


class ImageCache:
    """What a transform's first step gives, cached in a folder that several processes and runs may share.

    The key of an image is its path. Its row names the file's stamp and a digest of its content too: where the stamp is
    another, the file is read, and decoded again if its content is another as well, into the same row.

    A cache whose disk is full or fails, or whose folder is removed, costs a warning and time: images that it does not
    take or give are decoded.

    Args:
        folder: made if it is not there; deleting it is safe.
        paths: resolved path of every image that will be asked for.
        transform: gives `shrink`, its `key` and `shrunk_side`.

    Raises:
        OSError: the disk has no room for the images.
    """

    def __init__(self, folder: Path, paths: Iterable[str], transform: PixelTransform) -> None:
        self.transform = transform
        self._shape = (transform.shrunk_side, transform.shrunk_side, 3)
        self._store = RowStore(folder / f"images-{FORMAT}-{transform.key}", HEADER.itemsize + int(np.prod(self._shape)))
        digests = list(dict.fromkeys(map(digest, paths)))
        rows = self._store.announce(
            as_keys(digests), what="image", way_out="Try another --cache_dir, or leave --cache_images away"
        )
        self._row_of = dict(zip(digests, rows.tolist(), strict=True))
        self._failed = shared_number()  # of all workers one warns, and none goes on trying to write

    def load(self, path: str) -> tuple[Pixels, tuple[int, int]]:
        """Return an image as `shrink` gives it and its width and height, decoded if it is not cached or has changed.

        Raises:
            KeyError: a path that was not announced.
            ValueError: the file is no image, or a damaged one; names the file.
            OSError: no such file, or it cannot be read.
        """
        key = digest(path)
        index, key_array = np.array([self._row_of[key]]), as_keys([key])
        stamp = digest(path, *file_stamp(path))  # names the content without reading it
        row = self._read(index, key_array)
        header = None if row is None else row[: HEADER.itemsize].view(HEADER)[0]
        if row is not None and header is not None and header["stamp"].tobytes() == stamp:
            return row[HEADER.itemsize :].reshape(self._shape), (int(header["width"]), int(header["height"]))
        content = read_bytes(path)
        file = hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
        if row is not None and header is not None and header["file"].tobytes() == file:  # touched, or copied anew
            pixels, size = row[HEADER.itemsize :].reshape(self._shape), (int(header["width"]), int(header["height"]))
        else:
            pixels, size = self._decode(path, content)
        new_header = np.array([(stamp, file, *size)], dtype=HEADER).view(np.uint8)
        self._write(index, key_array, np.concatenate([new_header, pixels.reshape(-1)])[None])
        return pixels, size

    def load_many(self, paths: Sequence[str], pixels: Pixels) -> BoolArray:
        """Read cached images to where they are wanted; safe in threads, as `load` is not.

        Args:
            paths: of N images.
            pixels: uint8 `[N, side, side, 3]`, contiguous.

        Returns:
            Which of them are cached as their files are now, bool `[N]`; the others are `load`'s.
        """
        digests = list(map(digest, paths))
        rows, headers = np.array([self._row_of[key] for key in digests]), np.zeros(len(paths), dtype=HEADER)
        try:
            found = self._store.read_into(
                rows, as_keys(digests), headers.view(np.uint8).reshape(len(paths), -1), pixels.reshape(len(paths), -1)
            )
        except OSError as error:
            self._warn(error)
            return np.zeros(len(paths), dtype=bool)
        for number in np.flatnonzero(found).tolist():
            try:
                found[number] = headers["stamp"][number].tobytes() == digest(paths[number], *file_stamp(paths[number]))
            except OSError:  # the file is gone
                found[number] = False
        return found

    def count_missing(self) -> int:
        """Count the images that nobody has cached yet; all of them where the disk fails."""
        try:
            return len(self._row_of) - int(self._store.written(np.array(list(self._row_of.values()))).sum())
        except OSError:
            return len(self._row_of)

    def _decode(self, path: str, content: bytes) -> tuple[Pixels, tuple[int, int]]:
        try:
            image = self.transform.load(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return self.transform.shrink(image), size_of(image)

    def _read(self, index: IntArray, key: Keys) -> Rows | None:
        try:
            rows, whole = self._store.read(index, key)
        except OSError as error:
            self._warn(error)
            return None
        return rows[0] if whole[0] else None

    def _write(self, index: IntArray, key: Keys, rows: Rows) -> None:
        if self._failed:
            return
        try:
            self._store.write(index, key, rows)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            self._failed.fill_(1)
            logger.warning("the image cache fails, so images that are not in it are decoded each time: %s", error)


def _runs(indices: IntArray) -> Iterator[tuple[int, int]]:
    """Yield where neighbours begin and end, which are read or written in one piece: 4 5 6 9 are 4 5 6 and 9."""
    ends = [*(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)] if len(indices) else []
    yield from zip([0, *ends], ends, strict=False)


def _seals(keys: Keys, *parts: Rows) -> NDArray[np.uint64]:
    """Return the checksum over key and row, plus 1, of each; uint64 `[N]`. A row may come in several parts."""
    content = keys.tobytes()  # an element alone would lose the zeros at its end
    starts = range(0, len(content), KEY_BYTES)
    checksums = (
        reduce(lambda checksum, part: zlib.crc32(part, checksum), row, zlib.crc32(content[at : at + KEY_BYTES])) + 1
        for at, *row in zip(starts, *parts, strict=True)
    )
    return np.fromiter(checksums, dtype=np.uint64, count=len(keys))


def _read(file: FileIO, start: int, *into: NDArray[Any]) -> None:
    """Read from a place in a file, into one array after another; what is behind its end is left as it is."""
    if hasattr(os, "preadv"):
        os.preadv(file.fileno(), [part.data for part in into], start)
        return
    with _SEEKING:
        file.seek(start)
        for part in into:
            file.readinto(part.data)


def _write(file: Any, content: Any) -> None:
    """Write all of it; a nearly full disk may take a part."""
    try:
        written = file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from None
    if written != len(content):
        raise OSError(f"{file.name}: only {written} of {len(content)} bytes could be written; is the disk full?")
