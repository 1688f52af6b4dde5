"""Shrunk pictures kept on disk, each decoded once.

Each kind of preprocessing has two files: pixels, a row a picture, read through a memory map; and entries, which say
what the rows hold. A row counts only if its entry names the picture file's path, size and time of change, and the row's
checksum: a changed file is decoded again, and a row that a killed run left half-written is never used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cliptune.preprocess.decode import file_stamp, size_of
from cliptune.preprocess.resize import Pixels
from cliptune.preprocess.transforms import PixelTransform

FORMAT = 1  # part of the files' names: raise it when what they hold changes
ENTRY = np.dtype([("path", "V16"), ("stamp", "V16"), ("width", "<u4"), ("height", "<u4"), ("checksum", "<u4")])


class _Files(NamedTuple):
    """What one process has open; another has its own, since positions in a file are shared across a fork."""

    process: int
    entries: Any
    pixels: Any
    rows: NDArray[np.uint8]


class ImageCache:
    """What a transform's first step gives, kept in a folder that several processes and runs may share.

    Args:
        folder: made if it is not there; deleting it is safe between runs.
        paths: resolved path of every picture that will be asked for.
        transform: gives `shrink`, its `key` and `shrunk_side`.

    Raises:
        ValueError: the disk has no room for the pictures.
    """

    def __init__(self, folder: Path, paths: Iterable[str], transform: PixelTransform) -> None:
        self.transform = transform
        self._shape = (transform.shrunk_side, transform.shrunk_side, 3)
        self._row_bytes = int(np.prod(self._shape))
        folder.mkdir(parents=True, exist_ok=True)
        name = f"images-{FORMAT}-{transform.key}"
        self._entries_path, self._pixels_path = folder / f"{name}.entries", folder / f"{name}.pixels"
        self._row_of = self._find_rows({_digest(path) for path in paths})
        self._files: _Files | None = None

    def load(self, path: str) -> tuple[Pixels, tuple[int, int]]:
        """Return a picture as `shrink` gives it and its width and height, decoded if it is not kept or has changed.

        Raises:
            KeyError: a path that was not announced.
            ValueError: the file is no picture, or a damaged one; names the file.
            OSError: no such file, or the disk is full.
        """
        row = self._row_of[_digest(path)]
        files = self._open()
        stamp = _stamp(path)
        entry = self._read_entry(files, row)
        size = (int(entry["width"]), int(entry["height"]))
        if entry["stamp"].tobytes() == stamp:
            pixels = np.array(files.rows[row])  # copied first: another process may be writing to the row
            if _checksum(pixels, stamp, size) == entry["checksum"]:
                return pixels, size
        picture = self.transform.load(path)
        pixels, size = np.ascontiguousarray(self.transform.shrink(picture)), size_of(picture)
        self._write(files, row, path=path, stamp=stamp, pixels=pixels, size=size)
        return pixels, size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def _find_rows(self, wanted: set[bytes]) -> dict[bytes, int]:
        """Find the row of each path; paths that have none get one at the end."""
        rows = self._read_rows()
        missing = sorted(wanted - rows.keys())
        if missing:
            needed, free = len(missing) * self._row_bytes, shutil.disk_usage(self._entries_path.parent).free
            if needed > free:
                raise ValueError(
                    f"{self._entries_path.parent}: the image cache needs {needed / 1e9:.2f} GB more, "
                    f"{free / 1e9:.2f} GB are free; choose another --output_dir, or leave --cache_images away"
                )
            new = np.zeros(len(missing), dtype=ENTRY)
            new["path"] = np.frombuffer(b"".join(missing), dtype="V16")
            with self._entries_path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % ENTRY.itemsize) + new.tobytes())
            rows = self._read_rows()  # another run may have added rows before ours
        with self._pixels_path.open("ab") as file:
            if file.tell() < (1 + max(rows.values())) * self._row_bytes:
                file.truncate((1 + max(rows.values())) * self._row_bytes)
        return {digest: rows[digest] for digest in wanted}

    def _read_rows(self) -> dict[bytes, int]:
        if not self._entries_path.exists():
            return {}
        data = self._entries_path.read_bytes()
        entries = np.frombuffer(data[: len(data) // ENTRY.itemsize * ENTRY.itemsize], dtype=ENTRY)
        rows: dict[bytes, int] = {}
        for row, digest in enumerate(entries["path"]):
            rows.setdefault(digest.tobytes(), row)
        return rows

    def _open(self) -> _Files:
        if self._files is None or self._files.process != os.getpid():
            entries, pixels = (path.open("r+b", buffering=0) for path in (self._entries_path, self._pixels_path))
            num_rows = self._pixels_path.stat().st_size // self._row_bytes
            rows = np.memmap(self._pixels_path, dtype=np.uint8, mode="r", shape=(num_rows, *self._shape))
            self._files = _Files(os.getpid(), entries, pixels, rows)
        return self._files

    def _read_entry(self, files: _Files, row: int) -> Any:
        files.entries.seek(row * ENTRY.itemsize)
        return np.frombuffer(files.entries.read(ENTRY.itemsize), dtype=ENTRY)[0]

    def _write(
        self, files: _Files, row: int, *, path: str, stamp: bytes, pixels: Pixels, size: tuple[int, int]
    ) -> None:
        files.pixels.seek(row * self._row_bytes)
        files.pixels.write(pixels.tobytes())
        files.entries.seek(row * ENTRY.itemsize)
        entry = np.array([(_digest(path), stamp, *size, _checksum(pixels, stamp, size))], dtype=ENTRY)
        files.entries.write(entry.tobytes())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _stamp(path: str) -> bytes:
    """Name a file's content without reading it."""
    size, changed = file_stamp(path)
    return _digest(f"{path}\0{size}\0{changed}")


def _checksum(pixels: Pixels, stamp: bytes, size: tuple[int, int]) -> int:
    return zlib.crc32(pixels.data, zlib.crc32(b"%s %d %d" % (stamp, *size)))
