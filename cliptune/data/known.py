"""Which images of a data set a run had, by what its checkpoint knows of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cliptune.data.identity import Hashes, file_identities, text_hashes
from cliptune.data.pairs import DataSource, Pairs
from cliptune.data.shards import is_shards, open_shards
from cliptune.data.snapshot import EMPTY, Snapshot, of_shards
from cliptune.data.table import BoolArray
from cliptune.preprocess.decode import archive_of
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)


class KnownImages:
    """What a run trained, validated and tested on, wherever it lies now.

    Args:
        data: the checkpoint's `data`; empty in one of before it was stored.
        earlier: the checkpoint's `earlier_data`: what its weights had been trained on before, by other runs.
        was_trained: the checkpoint's weights were trained in the run; False: they are those as loaded.
    """

    def __init__(
        self, data: dict[str, Any], *, earlier: Sequence[dict[str, Any]] = (), was_trained: bool = True
    ) -> None:
        self.splits = {split: Snapshot.from_dict(values) for split, values in data.items()}
        self.trained = [Snapshot.from_dict(values) for values in earlier]
        self.trained += [self.splits["train"]] if was_trained and "train" in self.splits else []

    def holds(self, split: str) -> bool:
        """Tell whether the run had images, and no shards, in a split."""
        return split in self.splits and self.splits[split].what == "image" and len(self.splits[split].files) > 0

    def are_in(self, pairs: Pairs, split: str, data_dir: str, *, files: Hashes | None = None) -> BoolArray:
        """Tell which images the run had in a split, bool `[N]`: those of the same file.

        Args:
            pairs: images of a data set.
            split: `train`, `val` or `test`.
            data_dir: where they were read from.
            files: `file_identities` of the images, where they are known already.
        """
        files = file_identities(pairs.paths) if files is None else files
        return _are_of(pairs, self.splits.get(split, EMPTY), data_dir, files)

    def trained_on(self, pairs: Pairs, data_dir: str, *, files: Hashes) -> BoolArray:
        """Tell which images the weights were trained on, in this run or before, bool `[N]`; arguments of `are_in`."""
        found = np.zeros(len(pairs), dtype=bool)
        for snapshot in self.trained:
            found |= _are_of(pairs, snapshot, data_dir, files)
        return found

    def select(self, pairs: Pairs, split: str, source: DataSource) -> Pairs:
        """Return the images that the run had in a split: of the same file, or where it had them.

        Args:
            pairs: a whole data set.
            split: `train`, `val` or `test`.
            source: of the data set; what its `max_skipped_fraction` allows may be missing or changed.

        Raises:
            ValueError: more is missing or changed; says how much.
        """
        wanted, train = self.splits[split], self.splits.get("train", EMPTY)
        files = file_identities(pairs.paths)
        # the paths of a validation set of its own are hashed with another seed
        paths, of_own_set = (text_hashes(pairs.paths, prefix=f"{pairs.root}/", seed=seed) for seed in (0, 1))
        found = np.isin(files, wanted.files) & (files != 0)
        if split != "train":  # of a copy in the training data, not the one that was trained on
            found &= ~(np.isin(paths, train.paths) & np.isin(files, train.files))
        # what is damaged is the run's all the same
        found |= np.isin(paths, wanted.paths) | np.isin(of_own_set, wanted.paths)
        num_missing = int((~np.isin(wanted.files, files[found])).sum())
        of_all = f"{num_missing:,} of the {count(len(wanted.files), 'image')} that the checkpoint's run had in {split}"
        if num_missing > source.max_skipped_fraction * len(wanted.files):
            raise ValueError(
                f"{source.data_dir}: {of_all} cannot be found there, or were changed since: --data_dir names where "
                "they lie now, --split all takes another data set, and --max_skipped_fraction allows some to be missing"
            )
        if num_missing:
            logger.warning("%s: %s cannot be found, or were changed since", source.data_dir, of_all)
        return pairs.select(np.flatnonzero(found))


def _are_of(pairs: Pairs, snapshot: Snapshot, data_dir: str, files: Hashes) -> BoolArray:
    if snapshot.what == "shard":
        return _in_shards(pairs, snapshot, data_dir)
    found: BoolArray = np.isin(files, snapshot.files) & (files != 0)
    return found


def _in_shards(pairs: Pairs, snapshot: Snapshot, data_dir: str) -> BoolArray:
    """Tell which images lie in shards that the run was trained on, by the shards' names and contents."""
    found = np.zeros(len(pairs), dtype=bool)
    if not is_shards(data_dir):
        return found
    shards = open_shards(data_dir)
    now = of_shards(shards)
    known = set(zip(snapshot.paths.tolist(), snapshot.files.tolist(), strict=True))
    had = {
        os.path.realpath(shard.url)
        for shard, name, content in zip(shards.shards, now.paths.tolist(), now.files.tolist(), strict=True)
        if (name, content) in known
    }
    return np.array([archive_of(path) in had for path in pairs.paths], dtype=bool)
