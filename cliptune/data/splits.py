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

    Splits that the index declares are honoured. If it declares no `val`, groups are drawn from what is left that hold
    `val_split` of its images, at most 5,000, or as near to that as whole groups come.

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
        val = separate_validation(source, val_data)
        val = settle(replace(val, splits=np.full_like(val.splits, SPLITS.index("val"))), pairs.root)
        splits |= {"train": own_training(pairs), "val": val}
    train, val = _without_shared_images(splits["train"], splits["val"]), splits["val"]
    if len(train) < 2 or len(val) < 1:
        found = f"{count(len(train), 'training image')} and {count(len(val), 'validation image')}"
        why = "; all images are one group, and no group is split: try --val_data" if _is_one_group(pairs) else ""
        raise ValueError(f"{source.data_dir}: {found}; at least 2 and 1 are needed{why}")
    num_pairs = train.num_pairs + val.num_pairs
    if num_pairs < MIN_PAIRS:
        logger.warning("only %s: at least %d are needed for more than a try-out", count(num_pairs, "pair"), MIN_PAIRS)
    return {"train": train, "val": val, "test": splits["test"]}


def own_training(pairs: Pairs) -> Pairs:
    """Return what a data set has to train on if another one validates: all but its declared `val` and `test`."""
    return pairs.select(np.flatnonzero((pairs.splits == NO_SPLIT) | (pairs.splits == SPLITS.index("train"))))


def separate_validation(source: DataSource, val_data: str) -> Pairs:
    """Return the pairs of a data set to validate on, which is read as `source` is.

    Raises:
        ValueError: too many of its records have issues, or it cannot be read.
    """
    source = source.at(val_data)
    pairs = load_pairs(source)
    return declared_split(pairs, default_split(pairs, source), source)


def default_split(pairs: Pairs, source: DataSource) -> str:
    """Return what to evaluate on unless one says: `val` if it is declared, else `test`, else `all`; and say so."""
    declared = pairs.declared()
    split = next((split for split in ("val", "test") if split in declared), "all")
    if declared:
        names = ", ".join(sorted(declared))
        logger.info("%s declares %s: %s is taken", source.data_dir, names, "everything" if split == "all" else split)
    return split


def declared_split(pairs: Pairs, split: str, source: DataSource) -> Pairs:
    """Return the pairs of a split that their index declares, or of `all`.

    Raises:
        ValueError: it declares no such split.
    """
    if split == "all":
        return pairs
    declared = pairs.declared()
    if split not in declared:
        known = ", ".join(sorted(declared)) or "none"
        raise ValueError(f"{source.data_dir} has no split {split!r} (declared: {known}); try --split all")
    return pairs.select(np.flatnonzero(pairs.splits == SPLITS.index(split)))


def _choose_validation(pairs: Pairs, pool: IntArray, *, val_split: float, seed: int) -> IntArray:
    """Draw whole groups from the pool of images, as near to `val_split` of it as they come; returns their images."""
    ranks = _ranks(pairs.groups.take(pool))
    sizes = np.bincount(ranks)
    # RandomState's stream is frozen for good, the newer generators' is not
    order = np.random.RandomState(seed % 2**32).permutation(len(sizes))
    chosen = nearest_groups(sizes[order], num_asked(len(pool), val_split))
    return pool[np.isin(ranks, order[chosen])]


def num_asked(num_images: int, val_split: float) -> int:
    """Return how many of the images are to validate."""
    return min(max(round(val_split * num_images), 1), MAX_VAL_IMAGES)


def nearest_groups(sizes: IntArray, target: int) -> list[int]:
    """Choose groups whose sizes add up to the target, or as near to it as any do; of two as near, to the lower.

    Those that come first are preferred, so their order decides among equals. At least one group is chosen, and at least
    one is not.

    Args:
        sizes: of the groups, 1 or more, int64 `[G]`.
        target: wanted sum, 1 or more.

    Returns:
        The indices of the groups, none if there are fewer than two.
    """
    chosen, total = [], 0
    for group in np.flatnonzero(sizes <= target).tolist():
        if total + sizes[group] <= target:
            chosen.append(group)
            total += int(sizes[group])
        if total == target and len(chosen) < len(sizes):
            return chosen
    return _nearest_sum(sizes, target) if len(sizes) > 1 else []


def _nearest_sum(sizes: IntArray, target: int) -> list[int]:
    """Choose groups by the sums that the first 1, 2, 3, ... of them can have; bit s of a number: a sum of s."""
    # farther above the target than 0 is below it, no sum is the nearest, unless there is no smaller one
    limit = max(2 * target, int(sizes.min()))
    mask, all_images = (1 << (limit + 1)) - 1, int(sizes.sum())
    useful: list[int] = []
    sums = [1]
    num_of_size: dict[int, int] = {}
    for group in np.flatnonzero(sizes <= limit).tolist():
        size = int(sizes[group])
        num_of_size[size] = num_of_size.get(size, 0) + 1
        if num_of_size[size] * size <= limit:  # more of one size than fit are of no use
            useful.append(group)
            sums.append((sums[-1] | sums[-1] << size) & mask)
        if sums[-1] >> target & 1 and target < all_images:
            break
    reached = (total for total in range(1, min(limit, all_images - 1) + 1) if sums[-1] >> total & 1)
    total, chosen = min(reached, key=lambda total: abs(total - target)), []
    for position in range(len(useful), 0, -1):
        if not sums[position - 1] >> total & 1:  # not without this one
            chosen.append(useful[position - 1])
            total -= int(sizes[useful[position - 1]])
    return chosen


def _ranks(groups: Strings) -> IntArray:
    """Return the position of each group among the different ones in sorted order, int64 `[N]`."""
    first = groups.first_equal()
    heads = np.flatnonzero(first == np.arange(len(first)))
    heads = heads[groups.take(heads).sorted_order()]
    ranks = np.empty_like(first)
    ranks[heads] = np.arange(len(heads))
    return ranks[first]


def _is_one_group(pairs: Pairs) -> bool:
    return len(pairs) > 1 and len(np.unique(pairs.groups.first_equal())) == 1


def _without_shared_images(train: Pairs, val: Pairs) -> Pairs:
    only_train = np.flatnonzero(val.paths.find(train.paths) < 0)
    num_shared = len(train) - len(only_train)
    if num_shared:
        logger.warning("%s of the validation set stay out of training", count(num_shared, "image"))
        return train.select(only_train)
    return train
