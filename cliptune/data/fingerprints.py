"""Fingerprints of many images, taken by workers and cached, so that each image is decoded for it once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.random import fork_rng
from torch.utils.data import Dataset

from cliptune.data.row_store import RowStore, as_keys, digest
from cliptune.data.table import BoolArray, IntArray, Strings
from cliptune.data.workers import make_loader
from cliptune.preprocess.decode import decode_image, file_stamp
from cliptune.preprocess.fingerprint import DECODED_SIDE, FINGERPRINT, fingerprint
from cliptune.runtime.device import num_cores
from cliptune.runtime.logs import progress_bar

logger = logging.getLogger(__name__)

FORMAT = 1  # part of the files' names: raise it when what a fingerprint holds changes
MAX_WORKERS = 16
_BATCH = 64


def num_missing(paths: Strings, cache_dir: Path | None) -> int:
    """Count the images that no fingerprint is cached of, before anything is made room for."""
    if cache_dir is None or not _path_in(cache_dir).with_suffix(".keys").exists():
        return len(paths)
    try:
        store = RowStore(_path_in(cache_dir), FINGERPRINT.itemsize)
        return int((~store.was_written(as_keys(map(_key, paths)))).sum())
    except OSError:
        return len(paths)


def _path_in(cache_dir: Path) -> Path:
    return cache_dir / f"fingerprints-{FORMAT}"


class Fingerprints:
    """Fingerprints of a data set's images, under the path and the stamp of each image's file.

    Args:
        paths: of the images, `[N]`.
        cache_dir: folder to cache them in; None, or where it cannot be written: they stay in memory.
    """

    def __init__(self, paths: Strings, cache_dir: Path | None) -> None:
        self.paths = paths
        self._keys = as_keys(map(_key, paths))
        self._store: RowStore | None = None
        if cache_dir is not None:
            try:
                self._store = RowStore(_path_in(cache_dir), FINGERPRINT.itemsize)
                way_out = "They are taken anew each time without; try another --cache_dir"
                self._rows = self._store.announce(self._keys, what="fingerprint", way_out=way_out)
            except OSError as error:
                self._fail(error)
        if self._store is None:
            self._in_memory()

    def __len__(self) -> int:
        return len(self.paths)

    def missing(self) -> IntArray:
        """Return the indices of the images that no fingerprint is there of."""
        if self._store is not None:
            try:
                return np.flatnonzero(~self._store.holds(self._rows, self._keys))
            except OSError as error:
                self._fail(error)
        return np.flatnonzero(~self._taken)

    def put(self, indices: IntArray, fingerprints: NDArray[Any]) -> None:
        """Store fingerprints, `[n]` of `FINGERPRINT`, of the images of these indices."""
        if self._store is not None:
            try:
                content = fingerprints.view(np.uint8).reshape(len(indices), FINGERPRINT.itemsize)
                self._store.write(self._rows[indices], self._keys[indices], content)
                return
            except OSError as error:
                self._fail(error)
        self._fingerprints[indices], self._taken[indices] = fingerprints, True

    def get(self, indices: IntArray) -> tuple[NDArray[Any], BoolArray]:
        """Return fingerprints, `[n]` of `FINGERPRINT`, and which are there, bool `[n]`."""
        if self._store is not None:
            try:
                rows, whole = self._store.read(self._rows[indices], self._keys[indices])
                return rows.view(FINGERPRINT).reshape(-1), whole
            except OSError as error:
                self._fail(error)
        return self._fingerprints[indices], self._taken[indices]

    def _fail(self, error: OSError) -> None:
        logger.warning("fingerprints of images cannot be cached, so they are taken anew: %s", error)
        self._store = None
        self._in_memory()

    def _in_memory(self) -> None:
        self._fingerprints = np.zeros(len(self), dtype=FINGERPRINT)
        self._taken = np.zeros(len(self), dtype=bool)


def take_fingerprints(paths: Strings, *, cache_dir: Path | None, num_workers: int | None = None) -> Fingerprints:
    """Return the fingerprints of images, and take those that are not cached; an image that cannot be read has none.

    Args:
        paths: of the images.
        cache_dir: folder to cache them in; None: nothing is cached.
        num_workers: that decode; None: one a core, at most 16.
    """
    found = Fingerprints(paths, cache_dir)
    missing = found.missing()
    if len(missing):
        workers = min(MAX_WORKERS, num_cores()) if num_workers is None else num_workers
        workers = 0 if len(missing) < _BATCH else workers  # started, they would cost more than they gain
        images = _Images(paths.take(missing))
        loader = make_loader(images, num_workers=workers, batch_size=_BATCH, collate_fn=_collate)
        # a loader draws a seed: a run must not depend on what is cached
        with fork_rng(devices=[]), progress_bar(total=len(missing), desc="fingerprints", unit="image") as bar:
            for readable, fingerprints in loader:
                if len(readable):
                    found.put(missing[readable], fingerprints)
                bar.update(_BATCH)
    return found


class _Images(Dataset[Any]):
    """The fingerprint of each image with its index; None in its place where the image cannot be read."""

    def __init__(self, paths: Strings) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, NDArray[Any] | None]:
        try:
            return index, fingerprint(decode_image(self.paths[index], shortest_side=DECODED_SIDE))
        except (OSError, ValueError):  # `--check` and training say so
            return index, None


def _collate(samples: Sequence[tuple[int, NDArray[Any] | None]]) -> tuple[IntArray, NDArray[Any]]:
    taken = [(index, found) for index, found in samples if found is not None]
    rows = np.array([found for _, found in taken], dtype=FINGERPRINT)
    return np.array([index for index, _ in taken], dtype=np.int64), rows


def _key(path: str) -> bytes:
    try:
        return digest(path, *file_stamp(path))
    except (OSError, ValueError):
        return digest(path)
