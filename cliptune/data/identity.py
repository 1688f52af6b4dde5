"""What an image's file is known by without reading all of it: its size and a hash of its first and last 4 KB."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cliptune.data.table import Strings
from cliptune.preprocess.decode import file_stamp, read_bytes, read_ends
from cliptune.preprocess.resize import compiled
from cliptune.runtime.files import atomic_writer
from cliptune.runtime.logs import progress_bar

logger = logging.getLogger(__name__)

Hashes = NDArray[np.uint64]
"""`[N]`; 0 stands for a file that cannot be read."""

END_BYTES = 4096
_CHUNK = 1 << 12
_BLOCK = 1 << 16
_THREADS = 8
SLOW_DISK = 1e-4
"""Seconds a file from which on the time goes into waiting; without, it takes about 20 microseconds."""


def file_identities(paths: Strings, *, cache_file: Path | None = None, whole: bool = False) -> Hashes:
    """Return what tells each file's content from another's, uint64 `[N]`; 0 for a file that cannot be read.

    It is the first 64 bits of BLAKE2b over the file's size and its first and last 4 KB. Files that differ only in
    between are not told apart.

    Args:
        paths: of the files.
        cache_file: remembers the identities. One counts as long as the system says that the file was not written to:
            by its size, both times of change and its inode. The time of change of the inode is not copied by
            `cp -p` or `rsync -t`, so a file that was replaced by such means is read again.
        whole: hash all of each file instead, so that no change is missed; such identities need a `cache_file` of their
            own.
    """
    stamps = np.fromiter(map(_stamp, paths), dtype=np.uint64, count=len(paths))
    keys = text_hashes(paths)
    identities, known = np.zeros_like(stamps), stamps == 0
    if cache_file is not None and (cached := _read(cache_file)) is not None:
        old_keys, old_stamps, old_identities = cached
        rows = np.minimum(np.searchsorted(old_keys, keys), len(old_keys) - 1)
        hits = (old_keys[rows] == keys) & (old_stamps[rows] == stamps)
        identities[hits] = old_identities[rows[hits]]
        known |= hits
    unknown = np.flatnonzero(~known)
    if len(unknown):
        identities[unknown] = _identify(paths.take(unknown), _whole_identity if whole else _identity)
        if cache_file is not None:
            _write(cache_file, np.stack([keys, stamps, identities])[:, np.argsort(keys)])
    return identities


def same_content(paths: Strings, identities: Hashes) -> NDArray[np.int64]:
    """Return the index of the first file of the same bytes as each one, int64 `[N]`; its own where none is before it.

    Args:
        paths: of the files.
        identities: see `file_identities`; files of one are compared byte by byte, by a hash, where it does not say all.
    """
    first = np.arange(len(paths))
    _, kinds, num_of_kind = np.unique(identities, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero((num_of_kind[kinds] > 1) & (identities != 0))
    heads: dict[tuple[int, bytes], int] = {}
    for index in progress_bar(suspects.tolist(), desc="equal files"):
        content = _content(paths[index])
        if content:  # else it cannot be read any more
            first[index] = heads.setdefault((int(identities[index]), content), index)
    return first


def _content(path: str) -> bytes:
    """Return a hash of all of a file; nothing if it cannot be read."""
    try:
        return hashlib.blake2b(read_bytes(path), digest_size=16).digest()
    except (OSError, ValueError):
        return b""


def text_hashes(texts: Strings, *, prefix: str = "", seed: int = 0) -> Hashes:
    """Return a hash of each text without a prefix that it may have, uint64 `[N]`: FNV-1a over the UTF-8, then mixed.

    Args:
        texts: `[N]`.
        prefix: what is not looked at.
        seed: another one gives other hashes.
    """
    start = np.frombuffer(prefix.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    hashes = np.empty(len(texts), dtype=np.uint64)
    for begin in range(0, len(texts), _BLOCK):
        column = texts.column(slice(begin, begin + _BLOCK))
        _, ends, content = column.buffers()
        compiled(_hash_texts)(
            np.frombuffer(content or b"", dtype=np.uint8),
            np.frombuffer(ends, dtype=np.int64),
            start,
            np.uint64(seed),
            hashes[begin : begin + len(column)],
        )
    return hashes


def _hash_texts(text: Any, ends: Any, prefix: Any, seed: Any, hashes: Any) -> None:
    for row in range(len(hashes)):
        begin, end = ends[row], ends[row + 1]
        if end - begin >= len(prefix) and (text[begin : begin + len(prefix)] == prefix).all():
            begin += len(prefix)
        # spread over all bits: a seed of 1 would make of "0.png" what seed 0 makes of "1.png"
        value = np.uint64(0xCBF29CE484222325) ^ (seed * np.uint64(0x9E3779B97F4A7C15))
        for at in range(begin, end):
            value = (value ^ np.uint64(text[at])) * np.uint64(0x100000001B3)
        # FNV hardly spreads the last bytes over the upper bits
        value = (value ^ (value >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        hashes[row] = value ^ (value >> np.uint64(29))


def _hash(*parts: bytes) -> int:
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return int.from_bytes(state.digest(), "little") or 1


def _stamp(path: str) -> int:
    """Return a hash of what the system says of a file; 0 where there is none."""
    try:
        stamp = file_stamp(path)
    except (OSError, ValueError):
        return 0
    # a hash of integers is the same in every process; were it another in a later Python, the file would be read again
    return hash(stamp) & 0xFFFFFFFFFFFFFFFF or 1


def _identify(paths: Strings, identity: Callable[[str], int]) -> Hashes:
    starts = range(0, len(paths), _CHUNK)
    identities = np.zeros(len(paths), dtype=np.uint64)

    def identify(start: int) -> float:
        begin = time.monotonic()
        found = [identity(path) for path in paths[start : start + _CHUNK]]
        identities[start : start + len(found)] = found
        return (time.monotonic() - begin) / len(found)

    # threads wait for a disk side by side; but files that are in memory already they read only half as fast
    num_threads = _THREADS if identify(0) > SLOW_DISK else 1
    with ThreadPoolExecutor(num_threads) as threads:
        for _ in progress_bar(threads.map(identify, starts[1:]), total=len(starts) - 1, desc="identities"):
            pass
    return identities


def _identity(path: str) -> int:
    try:
        size, first, last = read_ends(path, END_BYTES)
    except (OSError, ValueError):
        return 0
    return _hash(size.to_bytes(8, "little"), first, last)


def _whole_identity(path: str) -> int:
    return int.from_bytes(_content(path)[:8], "little")


def _read(path: Path) -> Hashes | None:
    """Read what was remembered, `[3, N]`; what cannot be read is computed anew."""
    try:
        with np.load(path, allow_pickle=False) as file:
            columns: Hashes = file["identities"]  # with its CRC
        if columns.dtype != np.uint64 or columns.ndim != 2 or len(columns) != 3 or not columns.size:
            raise ValueError("it holds something else")
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged archives fail in many ways
        logger.warning("%s cannot be read and is made anew: %s", path, error)
        return None
    return columns


def _write(path: Path, columns: Hashes) -> None:
    try:
        with atomic_writer(path) as file:
            np.savez(file, identities=columns)
    except OSError as error:  # it saves time, nothing else
        logger.warning("%s cannot be written, so files will be looked at again: %s", path, error)
