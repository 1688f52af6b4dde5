"""Which images train, validate and test: by group and by image, seeded, the same on every machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cliptune.data.pairs import MIN_PAIRS, DataSource, Pairs, load_pairs
from cliptune.data.table import NO_SPLIT, SPLITS, IntArray, Strings
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

MAX_VAL_IMAGES = 5000


def split_pairs(pairs: Pairs, *, val_split: float = 0.1, seed: int = 42) -> dict[str, Pairs]:
    """Split by group: no group is on both sides, and the same seed gives the same split on every machine.

    Splits that the index declares are honoured. If it declares no `val`, groups are drawn from what is left until they
    hold `val_split` of its images, at most 5,000.

    Returns:
        `train`, `val` and `test`; those that there are not hold no image.
    """
    train, val = SPLITS.index("train"), SPLITS.index("val")
    splits = np.where(pairs.splits == NO_SPLIT, train, pairs.splits)
    if not (splits == val).any():
        pool = np.flatnonzero(splits == train)
        splits[_choose_validation(pairs, pool, val_split=val_split, seed=seed)] = val
    return {split: pairs.select(np.flatnonzero(splits == code)) for code, split in enumerate(SPLITS)}


def training_pairs(
    source: DataSource,
    *,
    val_data: str | None,
    val_split: float,
    seed: int,
    settle: Callable[[Pairs, str], Pairs] = lambda pairs, _: pairs,
) -> dict[str, Pairs]:
    """Return a run's `train`, `val` and `test` pairs, the first two checked to be enough.

    Args:
        source: the data set to train on.
        val_data: a data set to validate on; None: split off `source`.
        val_split: fraction of the images that validate, where the data set declares no split.
        seed: of the split.
        settle: gives a data set, before it is split, the splits that it is to have; its second argument is the root
            of the data that is trained on.

    Raises:
        ValueError: fewer than 2 training images or 1 validation image.
    """
    pairs = load_pairs(source)
    pairs = settle(pairs, pairs.root)
    splits = split_pairs(pairs, val_split=val_split, seed=seed)
    if val_data is not None:
        own = pairs.select(np.flatnonzero((pairs.splits == NO_SPLIT) | (pairs.splits == SPLITS.index("train"))))
        val = separate_validation(source, val_data)
        val = settle(replace(val, splits=np.full_like(val.splits, SPLITS.index("val"))), pairs.root)
        splits |= {"train": own, "val": val}
    train, val = _without_shared_images(splits["train"], splits["val"]), splits["val"]
    if len(train) < 2 or len(val) < 1:
        found = f"{count(len(train), 'training image')} and {count(len(val), 'validation image')}"
        raise ValueError(f"{source.data_dir}: {found}; at least 2 and 1 are needed")
    num_pairs = train.num_pairs + val.num_pairs
    if num_pairs < MIN_PAIRS:
        logger.warning("only %s: at least %d are needed for more than a try-out", count(num_pairs, "pair"), MIN_PAIRS)
    return {"train": train, "val": val, "test": splits["test"]}


def separate_validation(source: DataSource, val_data: str) -> Pairs:
    """Return the pairs of a data set to validate on, which is read as `source` is.

    Raises:
        ValueError: too many of its records have issues, or it cannot be read.
    """
    return evaluation_pairs(replace(source, data_dir=val_data, may_run_commands=False), split=None)


def evaluation_pairs(source: DataSource, *, split: str | None) -> Pairs:
    """Return the pairs to evaluate on: a declared split, `all`, or (None) `val` if declared, else everything.

    Raises:
        ValueError: the data set declares no such split.
    """
    pairs = load_pairs(source)
    declared = pairs.declared()
    if split is None:
        split = "val" if "val" in declared else "all"
    if split == "all":
        return pairs
    if split not in declared:
        known = ", ".join(sorted(declared)) or "none"
        raise ValueError(f"{source.data_dir} has no split {split!r} (declared: {known}); try --split all")
    return pairs.select(np.flatnonzero(pairs.splits == SPLITS.index(split)))


def _choose_validation(pairs: Pairs, pool: IntArray, *, val_split: float, seed: int) -> IntArray:
    """Draw whole groups from the pool of images; returns the indices of their images."""
    ranks = _ranks(pairs.groups.take(pool))
    sizes = np.bincount(ranks)
    # RandomState's stream is frozen for good, the newer generators' is not
    order = np.random.RandomState(seed % 2**32).permutation(len(sizes))
    target = min(max(round(val_split * len(pool)), 1), MAX_VAL_IMAGES)
    chosen: list[int] = []
    num_images = 0
    for group in order[:-1]:  # one group at least stays for training
        if not chosen or num_images + sizes[group] <= target:
            chosen.append(group)
            num_images += sizes[group]
        if num_images >= target:
            break
    return pool[np.isin(ranks, chosen)]


def _ranks(groups: Strings) -> IntArray:
    """Return the position of each group among the different ones in sorted order, int64 `[N]`."""
    first = groups.first_equal()
    heads = np.flatnonzero(first == np.arange(len(first)))
    heads = heads[groups.take(heads).sorted_order()]
    ranks = np.empty_like(first)
    ranks[heads] = np.arange(len(heads))
    return ranks[first]


def _without_shared_images(train: Pairs, val: Pairs) -> Pairs:
    only_train = np.flatnonzero(val.paths.find(train.paths) < 0)
    num_shared = len(train) - len(only_train)
    if num_shared:
        logger.warning("%s of the validation set stay out of training", count(num_shared, "image"))
        return train.select(only_train)
    return train
