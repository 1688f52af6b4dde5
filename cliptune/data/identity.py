"""What an image's file is known by without reading all of it: its size and a hash of its first and last 4 KB."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cliptune.data.table import Strings
from cliptune.preprocess.decode import file_stamp, read_ends
from cliptune.runtime.files import atomic_writer
from cliptune.runtime.logs import progress_bar

logger = logging.getLogger(__name__)

Hashes = NDArray[np.uint64]
"""`[N]`; 0 stands for a file that cannot be read."""

END_BYTES = 4096
_CHUNK = 1 << 12
_THREADS = 8
SLOW_DISK = 1e-4
"""Seconds a file from which on the time goes into waiting; without, it takes about 20 microseconds."""


def file_identities(paths: Strings, *, cache_file: Path | None = None) -> Hashes:
    """Return what tells each file's content from another's, uint64 `[N]`; 0 for a file that cannot be read.

    It is the first 64 bits of BLAKE2b over the file's size and its first and last 4 KB. Files that differ only in
    between are not told apart.

    Args:
        paths: of the files.
        cache_file: remembers the identities. One counts as long as the system says that the file was not written to:
            by its size, both times of change and its inode. The time of change of the inode is not copied by
            `cp -p` or `rsync -t`, so a file that was replaced by such means is read again.
    """
    stamps = np.fromiter(map(_stamp, paths), dtype=np.uint64, count=len(paths))
    identities = np.zeros(len(paths), dtype=np.uint64)
    known = np.zeros(len(paths), dtype=bool)
    if cache_file is not None and (cached := _read(cache_file)) is not None:
        old_paths, old_stamps, old_identities = cached
        rows = old_paths.find(paths)
        known = (rows >= 0) & (old_stamps[rows] == stamps)
        identities[known] = old_identities[rows[known]]
    unknown = np.flatnonzero(~known & (stamps != 0))
    if len(unknown):
        identities[unknown] = _identify(paths.take(unknown))
    if cache_file is not None and not known.all():
        _write(cache_file, paths, stamps, identities)
    return identities


def text_hashes(texts: Iterable[str]) -> Hashes:
    """Return a hash of each text, uint64 `[N]`."""
    return np.fromiter((_hash(text.encode("utf-8", "surrogatepass")) for text in texts), dtype=np.uint64)


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


def _identify(paths: Strings) -> Hashes:
    starts = range(0, len(paths), _CHUNK)
    identities = np.zeros(len(paths), dtype=np.uint64)

    def identify(start: int) -> float:
        begin = time.monotonic()
        found = [_identity(path) for path in paths[start : start + _CHUNK]]
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


def _read(path: Path) -> tuple[Strings, Hashes, Hashes] | None:
    """Read remembered identities; what cannot be read is computed anew."""
    try:
        table = pq.read_table(path, memory_map=True, page_checksum_verification=True)
        stamps, identities = (table[name].to_numpy().astype(np.uint64) for name in ("stamp", "identity"))
        return Strings(pa.concat_arrays(table["path"].cast(pa.large_binary()).chunks)), stamps, identities
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        logger.warning("%s cannot be read and is made anew: %s", path, error)
        return None


def _write(path: Path, paths: Strings, stamps: Hashes, identities: Hashes) -> None:
    table = pa.table({"path": paths.column(), "stamp": stamps, "identity": identities})
    try:
        with atomic_writer(path) as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    except OSError as error:  # it saves time, nothing else
        logger.warning("%s cannot be written, so files will be looked at again: %s", path, error)
