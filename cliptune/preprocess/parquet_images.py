"""Images inside Parquet files, read by their row in any order."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cliptune.runtime.messages import one_line

CACHE_BYTES = 1 << 27
"""Of images, the last ones read, that each process holds."""

_MAX_FILES = 16
_BATCH = 16
"""Rows that are decoded at once."""


def read_image(path: str, row: int, column: str) -> bytes:
    """Return the bytes of an image.

    Args:
        path: of the Parquet file.
        row: counted from 1.
        column: see `parquet_path`.

    Raises:
        OSError: there is no such file, row or column, the row holds no bytes, or the file is damaged.
    """
    try:
        content = _reader.read(path, row - 1, column)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise OSError(f"{path}@{row}/{column}: {one_line(error)}") from None
    if not isinstance(content, bytes):
        raise OSError(f"{path}@{row}/{column}: the row holds no bytes")
    return content


def open_parquet(path: str | Path) -> Any:
    """Open a Parquet file as a stream: of a row group, which may be all of the file, some pages are in memory."""
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def bytes_of(field: pa.Field) -> str:
    """Return the name by which a column's bytes are read: the Hub has them in a field of it, beside the path."""
    return f"{field.name}.bytes" if pa.types.is_struct(field.type) else str(field.name)


class _File:
    """A Parquet file that is open."""

    def __init__(self, path: str) -> None:
        self._parquet = open_parquet(path)
        groups = (self._parquet.metadata.row_group(group).num_rows for group in range(self._parquet.num_row_groups))
        self._ends = list(accumulate(groups))

    def group(self, row: int) -> int:
        """Return the number of the group that a row is in."""
        group = bisect_right(self._ends, row)
        if group == len(self._ends) or row < 0:
            raise OSError(f"no such row: the file has {self._ends[-1] if self._ends else 0:,}")
        return group

    def rows(self, group: int, column: str) -> Iterator[tuple[int, bytes | None]]:
        """Yield number and content of a group's rows."""
        names = [bytes_of(self._parquet.schema_arrow.field(column))]
        number = self._ends[group] - self._parquet.metadata.row_group(group).num_rows
        for batch in self._parquet.iter_batches(_BATCH, row_groups=[group], columns=names, use_threads=False):
            for value in batch.column(0).to_pylist():
                yield number, value["bytes"] if isinstance(value, dict) else value
                number += 1


class _Column(NamedTuple):
    """A column of a Parquet file; the stamp tells that the file was replaced."""

    path: str
    stamp: tuple[int, int, int]
    name: str


class _Reader:
    """Reads images from Parquet files by their row, in any order; rows count from 0 here.

    A row group is compressed page by page, and only reading tells where the next page begins: rows are streamed from
    where the last read ended, or else from the start of their group. What was streamed last is cached, so groups of a
    hundred rows, as the Hub writes them, are read fast in any order, and larger ones in their own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[str, tuple[int, int, int]], _File] = OrderedDict()
        self._images: OrderedDict[tuple[_Column, int], bytes | None] = OrderedDict()
        self._num_bytes = 0
        self._stream: tuple[_Column, int, int] | None = None
        """What `_rows` gives: a column, its group, and the row that comes next."""
        self._rows: Iterator[tuple[int, bytes | None]] = iter(())

    def read(self, path: str, row: int, name: str) -> bytes | None:
        """Return the bytes of an image; raises an OSError, a KeyError for a column that is not there, or Arrow's."""
        found = os.stat(path)  # noqa: PTH116  (once an image)
        column = _Column(path, (found.st_size, found.st_mtime_ns, found.st_ino), name)
        with self._lock:
            if (column, row) not in self._images:
                self._stream_to(column, row)
            self._images.move_to_end((column, row))
            return self._images[column, row]

    def _stream_to(self, column: _Column, row: int) -> None:
        file = self._open(column)
        group = file.group(row)
        stream, self._stream = self._stream, None  # where reading fails, it is not gone on with
        if stream is None or stream[:2] != (column, group) or stream[2] > row:
            self._rows = file.rows(group, column.name)
        for number, content in self._rows:
            self._cache((column, number), content)
            if number == row:
                self._stream = column, group, row + 1
                return
        raise OSError("the row group ends before this row")

    def _open(self, column: _Column) -> _File:
        file = self._files.pop(column[:2], None) or _File(column.path)
        self._files[column[:2]] = file
        if len(self._files) > _MAX_FILES:
            self._files.popitem(last=False)
        return file

    def _cache(self, key: tuple[_Column, int], content: bytes | None) -> None:
        self._num_bytes += len(content or b"") - len(self._images.pop(key, None) or b"")
        self._images[key] = content
        while self._num_bytes > CACHE_BYTES and len(self._images) > 1:
            _, dropped = self._images.popitem(last=False)
            self._num_bytes -= len(dropped or b"")


_reader = _Reader()


def _forget() -> None:
    """Begin anew in a forked process: the lock may be held there for ever, and Arrow's readers are not for two."""
    global _reader  # noqa: PLW0603
    _reader = _Reader()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget)
