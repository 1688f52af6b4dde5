"""A store on disk for what is dear to compute, and the image cache on it, so that each image is decoded once."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cliptune.preprocess.decode import file_stamp, size_of
from cliptune.preprocess.resize import Pixels
from cliptune.preprocess.transforms import PixelTransform
from cliptune.runtime.files import require_free_space
from cliptune.runtime.messages import count
from cliptune.runtime.rng import IntArray

KEY_BYTES = 16
RECORD = np.dtype([("key", f"S{KEY_BYTES}"), ("seal", "<u8")])
"""What `.keys` holds of each row. The seal is 0 for a row that was never written, else its checksum plus 1."""

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
    keys_file: Any
    rows_file: Any
    records: NDArray[Any]
    """Memory map of `.keys`: shows what other processes write."""
    rows: Rows
    """Memory map of `.rows`."""


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
        self._files: _Files | None = None

    def announce(self, keys: Keys, *, what: str, way_out: str) -> IntArray:
        """Return the row number of each key, int64 `[N]`; keys that have none get the next ones.

        Args:
            keys: `[N]`; one may come several times.
            what: what a row is, for the message of a full disk.
            way_out: what to do instead, for the same message.

        Raises:
            OSError: the disk has no room for the rows that are still to be written.
        """
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

    def read(self, index: int, key: bytes) -> Rows | None:
        """Return a copy of one row, uint8 `[row_bytes]`; None if it is missing, half-written or another key's."""
        files = self._open()
        row = np.array(files.rows[index])  # copied first: another process may be writing to it
        return row if files.records["seal"][index] == _seal(key, row) else None

    def holds(self, indices: IntArray, keys: Keys) -> NDArray[np.bool_]:
        """Tell which rows are whole, bool `[N]`; reads all of those that were ever written."""
        files = self._open()
        seals = files.records["seal"][indices]
        whole = np.zeros(len(indices), dtype=bool)
        for position in np.flatnonzero(seals).tolist():
            key = keys[position : position + 1].tobytes()  # an element alone would lose the zeros at its end
            whole[position] = int(seals[position]) == _seal(key, files.rows[indices[position]])
        return whole

    def gather(self, indices: IntArray) -> Rows:
        """Copy rows into memory, uint8 `[N, row_bytes]`; they are not looked at, see `holds`."""
        gathered: Rows = np.take(self._open().rows, indices, axis=0)
        return gathered

    def write(self, indices: IntArray, keys: Keys, rows: Rows) -> None:
        """Write rows, uint8 `[N, row_bytes]`, of keys that were announced.

        Raises:
            OSError: the disk is full, or took a part only.
        """
        files = self._open()
        records = np.empty(len(rows), dtype=RECORD)
        records["key"] = keys
        records["seal"] = [_seal(keys[i : i + 1].tobytes(), rows[i]) for i in range(len(rows))]
        # neighbours go in one piece: of rows 4 5 6 9 two pieces, 4 5 6 and 9
        ends = [*(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(rows)]
        for start, end in zip([0, *ends], ends, strict=False):
            for file, content in ((files.rows_file, rows), (files.keys_file, records)):
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

    def _open(self) -> _Files:
        if self._files is None or self._files.process != os.getpid():
            keys_file, rows_file = (path.open("r+b", buffering=0) for path in (self._keys_path, self._rows_path))
            records = _map(self._keys_path, RECORD)
            rows = _map(self._rows_path, np.dtype((np.uint8, self.row_bytes)))
            self._files = _Files(os.getpid(), keys_file, rows_file, records, rows)
        return self._files


HEADER = np.dtype([("stamp", f"V{KEY_BYTES}"), ("width", "<u4"), ("height", "<u4")])
FORMAT = 2  # part of the files' names: raise it when what a row holds changes


class ImageCache:
    """What a transform's first step gives, cached in a folder that several processes and runs may share.

    The key of an image is its path. Its row names the file's size and time of change too, so a changed file is decoded
    again, into the same row.

    Args:
        folder: made if it is not there; deleting it is safe between runs.
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

    def load(self, path: str) -> tuple[Pixels, tuple[int, int]]:
        """Return an image as `shrink` gives it and its width and height, decoded if it is not cached or has changed.

        Raises:
            KeyError: a path that was not announced.
            ValueError: the file is no image, or a damaged one; names the file.
            OSError: no such file, or the disk is full.
        """
        key = digest(path)
        index = self._row_of[key]
        stamp = digest(path, *file_stamp(path))  # names the content without reading it
        row = self._store.read(index, key)
        if row is not None:
            header = row[: HEADER.itemsize].view(HEADER)[0]
            if header["stamp"].tobytes() == stamp:
                return row[HEADER.itemsize :].reshape(self._shape), (int(header["width"]), int(header["height"]))
        image = self.transform.load(path)
        pixels, size = self.transform.shrink(image), size_of(image)
        header = np.array([(stamp, *size)], dtype=HEADER).view(np.uint8)
        content = np.concatenate([header, pixels.reshape(-1)])
        self._store.write(np.array([index]), as_keys([key]), content[None])
        return pixels, size


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Map a file of whole and maybe one half record into memory."""
    num_records = path.stat().st_size // dtype.itemsize
    shape = (num_records, *dtype.shape)
    if not num_records:  # which the system does not map
        return np.empty(shape, dtype=dtype.base)
    return np.asarray(np.memmap(path, dtype=dtype.base, mode="r", shape=shape))


def _seal(key: bytes, row: Rows) -> int:
    return zlib.crc32(row.data, zlib.crc32(key)) + 1


def _write(file: Any, content: Any) -> None:
    """Write all of it; a nearly full disk may take a part."""
    written = file.write(content)
    if written != len(content):
        raise OSError(f"{file.name}: only {written} of {len(content)} bytes could be written; is the disk full?")
