"""Small data sets: the images that train and validate, dealt into folds of whole units, each to be held out once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cliptune.data.near_duplicates import NearDuplicates
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.data.splits import follow_units
from cliptune.data.table import SPLITS, IntArray, Strings
from cliptune.data.units import find_units
from cliptune.runtime.messages import count, printable

logger = logging.getLogger(__name__)

TEST = SPLITS.index("test")


class Folds(NamedTuple):
    """A data set in folds."""

    pairs: Pairs
    """All but the declared `test`; a declared `val` is dealt out like the rest."""
    of: IntArray
    """Fold of each image, from 0 on, int64 `[N]`."""
    test: Pairs
    num_declared: int
    """Images that the data set declares to be `val`."""

    def splits(self, fold: int | None) -> dict[str, Pairs]:
        """Return what trains, and a fold that validates; None: everything trains and nothing validates."""
        is_held = self.of == fold if fold is not None else np.zeros(len(self.of), dtype=bool)
        train, val = (self.pairs.select(np.flatnonzero(rows)) for rows in (~is_held, is_held))
        return {"train": train, "val": val, "test": self.test}


def read_folds(
    source: DataSource,
    *,
    num_folds: int,
    seed: int,
    find_copies: Callable[[Strings], NearDuplicates],
    join: bool,
) -> Folds:
    """Read a data set and deal its units, see `units.find_units`, into folds: no unit is on two sides.

    Args:
        source: the data set.
        num_folds: 2 or more.
        seed: of the deal, which is the same on every machine.
        find_copies: finds the images that are one image, by their paths.
        join: near-duplicates to units as well.

    Raises:
        ValueError: fewer units than folds, or fewer than 2 images to train on beside a fold.
    """
    pairs = load_pairs(source)
    copies = find_copies(pairs.paths)
    units = find_units(pairs.groups, copies, join=join).of
    splits = follow_units(pairs.splits, units)
    pool = np.flatnonzero(splits != TEST)
    num_units = len(np.unique(units[pool]))
    if num_units < num_folds:
        raise ValueError(
            f"{source.data_dir}: {count(num_units, 'group')} cannot be dealt into {num_folds} folds: try --folds "
            f"{num_units}"
            if num_units > 1
            else f"{source.data_dir}: all images are one group, and no group is in two folds"
        )
    of = deal(units[pool], num_folds=num_folds, seed=seed)
    if (num_left := len(pool) - int(np.bincount(of).max())) < 2:
        raise ValueError(f"{source.data_dir}: beside its largest fold {count(num_left, 'image')} would train, too few")
    fold_of = np.full(len(pairs), -1)
    fold_of[pool] = of
    _tell_torn(pairs, copies, fold_of)
    num_declared = int((splits == SPLITS.index("val")).sum())
    return Folds(pairs.select(pool), of, pairs.select(np.flatnonzero(splits == TEST)), num_declared)


def _tell_torn(pairs: Pairs, copies: NearDuplicates, fold_of: IntArray) -> None:
    """Say how many near-duplicates are in two folds: they were not to be joined, or too many look alike."""
    folds = fold_of[copies.pairs]
    torn = copies.pairs[(folds[:, 0] != folds[:, 1]) & (folds >= 0).all(1)]
    if len(torn):
        first, second = (printable(pairs.paths[row]) for row in torn[0].tolist())
        logger.warning(
            "%s in two folds (%s and %s), so the gain may flatter: --near_duplicates join, or a group in the index, "
            "keeps copies together",
            count(len(torn), "pair of near-duplicates is", "pairs of near-duplicates are"), first, second,
        )  # fmt: skip


def deal(units: IntArray, *, num_folds: int, seed: int) -> IntArray:
    """Return a fold for each image: in an order that is drawn, large units first, each to the smallest fold.

    Args:
        units: of each image, int64 `[N]`.
        num_folds: how many; no fold is empty if there are as many units.
        seed: of the draw.
    """
    _, ranks = np.unique(units, return_inverse=True)
    sizes = np.bincount(ranks)
    # RandomState's stream is frozen for good, the newer generators' is not
    order = np.random.RandomState(seed % 2**32).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled, fold_of = np.zeros(num_folds, dtype=np.int64), np.empty(len(sizes), dtype=np.int64)
    for unit in order.tolist():
        fold_of[unit] = filled.argmin()
        filled[fold_of[unit]] += sizes[unit]
    return fold_of[ranks]
