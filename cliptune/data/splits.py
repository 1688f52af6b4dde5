"""Which images train, validate and test: by unit, seeded, the same on every machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cliptune.data.near_duplicates import NearDuplicates, identical_files
from cliptune.data.pairs import MIN_PAIRS, DataSource, MissingImagesError, Pairs, load_pairs
from cliptune.data.table import NO_SPLIT, SPLITS, BoolArray, CodeArray, IntArray, Strings
from cliptune.data.units import Units, find_units, shared_copies
from cliptune.runtime.messages import count, printable

logger = logging.getLogger(__name__)

MAX_VAL_IMAGES = 5000


Settle = Callable[[Pairs, str], Pairs]
"""Gives a data set, before it is split, the splits it is to have, by the root of the data that is trained on."""


def split_pairs(
    pairs: Pairs, *, val_split: float = 0.1, seed: int = 42, units: Units | None = None
) -> dict[str, Pairs]:
    """Split by unit: none is on both sides, and the same seed gives the same split on every machine.

    Splits that the index declares are honoured; an image that it declares none for follows its unit. If it declares no
    `val`, units are drawn from what trains that hold `val_split` of its images, at most 5,000, or as near to that as
    whole units come. They are drawn as if nothing were known of near-duplicates, which then come along; so what a run
    knows of them changes little else.

    Args:
        pairs: the data set.
        val_split: fraction of the images that validate.
        seed: of the draw.
        units: what stays together; None: groups, and files of the same bytes.

    Returns:
        `train`, `val` and `test`; those that there are not hold no image.
    """
    if units is None:
        units = find_units(pairs.groups, identical_files(pairs.paths))
    train, val = SPLITS.index("train"), SPLITS.index("val")
    splits = follow_units(pairs.splits, units.of)
    if not (splits == val).any():
        alone = np.flatnonzero(_followed(pairs.splits, units.alone) == train)
        drawn = np.zeros(len(pairs), dtype=bool)
        drawn[_choose_validation(units.alone, alone, val_split=val_split, seed=seed)] = True
        pool = np.flatnonzero(splits == train)
        splits[pool[_with_copies(units, pool, drawn, target=num_asked(len(pool), val_split), seed=seed)]] = val
    return {split: pairs.select(np.flatnonzero(splits == code)) for code, split in enumerate(SPLITS)}


def follow_units(declared: CodeArray, units: IntArray) -> CodeArray:
    """Give images without a split that of their unit, `train` before others; `train` where it has none."""
    splits = _followed(declared, units)
    num_held = int(((declared == NO_SPLIT) & (splits > SPLITS.index("train"))).sum())
    if num_held:
        logger.info(
            "%s without a split of their own follow their group, or an image they copy, to val or test",
            count(num_held, "image"),
        )
    return splits


def _followed(declared: CodeArray, units: IntArray) -> CodeArray:
    of_unit = np.full(int(units.max(initial=-1)) + 1, SPLITS.index("train"), dtype=declared.dtype)
    for code in reversed(range(len(SPLITS))):
        of_unit[units[declared == code]] = code
    return np.where(declared == NO_SPLIT, of_unit[units], declared)


def training_pairs(
    source: DataSource,
    *,
    val_data: str | None,
    val_split: float,
    seed: int,
    settle: Settle = lambda pairs, _: pairs,
    find_copies: Callable[[Strings], NearDuplicates] = identical_files,
    join: bool = True,
) -> dict[str, Pairs]:
    """Return a run's `train`, `val` and `test` pairs, the first two checked to be enough.

    Args:
        source: the data set to train on.
        val_data: a data set to validate on; None: split off `source`.
        val_split: fraction of the images that validate, where the data set declares no split.
        seed: of the split.
        settle: see `Settle`.
        find_copies: finds the images that are one image, by their paths.
        join: near-duplicates to units as well; files of the same bytes always are.

    Raises:
        ValueError: fewer than 2 training images or 1 validation image.
    """
    pairs = load_pairs(source)
    pairs = settle(pairs, pairs.root)
    val = None
    if val_data is not None:
        val = separate_validation(source, val_data)
        val = settle(replace(val, splits=np.full_like(val.splits, SPLITS.index("val"))), pairs.root)
    paths = pairs.paths if val is None else Strings.concatenate([pairs.paths, val.paths])
    copies = find_copies(paths)
    splits, units = split_data(pairs, val, copies=copies, val_split=val_split, seed=seed, join=join)
    splits["train"] = _without_shared_images(splits["train"], splits["val"])
    _check_enough(splits, units, source)
    _tell_copies(splits, paths, copies, units=units if join and val is None else None)
    return splits


def split_data(
    pairs: Pairs, val: Pairs | None, *, copies: NearDuplicates, val_split: float, seed: int, join: bool
) -> tuple[dict[str, Pairs], Units]:
    """Split a data set as a run does; returns the splits and the units of `pairs`.

    Args:
        pairs: the data set.
        val: what validates in its place; None: what is drawn of it.
        copies: pairs of images by their indices in `pairs`; those of other images do not count.
        val_split, seed: as `split_pairs` has them.
        join: near-duplicates to units.
    """
    units = find_units(pairs.groups, copies.among(len(pairs)), join=join)
    splits = split_pairs(pairs, val_split=val_split, seed=seed, units=units)
    if val is not None:
        val = replace(val, splits=np.full_like(val.splits, SPLITS.index("val")))  # as if its index declared it
        splits |= {"train": own_training(pairs), "val": val}
    return splits, units


def _check_enough(splits: dict[str, Pairs], units: Units, source: DataSource) -> None:
    train, val = splits["train"], splits["val"]
    if len(train) < 2 or len(val) < 1:
        found = f"{count(len(train), 'training image')} and {count(len(val), 'validation image')}"
        is_one_unit = len(units.of) > 1 and not units.of.any()
        why = "; all images are one group, and no group is split: try --val_data" if is_one_unit else ""
        raise ValueError(f"{source.data_dir}: {found}; at least 2 and 1 are needed{why}")
    num_pairs = train.num_pairs + val.num_pairs
    if num_pairs < MIN_PAIRS:
        logger.warning("only %s: at least %d are needed for more than a try-out", count(num_pairs, "pair"), MIN_PAIRS)


def _tell_copies(splits: dict[str, Pairs], paths: Strings, copies: NearDuplicates, *, units: Units | None) -> None:
    """Say which near-duplicates were joined, which could not be, and which are on two sides of the split."""
    near = copies.pairs[~copies.identical]
    if not len(near):
        return
    joined = ": what is drawn to validate brings its copies along" if units is not None else ""
    logger.info("%s of near-duplicates (%s)%s", count(len(near), "pair"), _example(paths, near), joined)
    for lump in [] if units is None else units.lumps:
        logger.warning(
            "%s look alike (%s; ...), too many to be copies of one: they are split one by one, and the validation "
            "numbers may flatter. Give them a group in the index",
            count(len(lump), "image"),
            printable(paths[int(lump[0])]),
        )
    for ours, theirs, pairs in shared_copies(splits, paths, copies):
        logger.warning(
            "%s of %s of %s images (%s): what a model has seen tells nothing of new images",
            count(num_theirs := len(np.unique(pairs[:, 1])), "image"),
            f"{theirs} {'is a near-duplicate' if num_theirs == 1 else 'are near-duplicates'}",
            ours,
            _example(paths, pairs),
        )


def _example(paths: Strings, pairs: IntArray) -> str:
    return " and ".join(printable(paths[row]) for row in pairs[0].tolist())


def own_training(pairs: Pairs) -> Pairs:
    """Return what a data set has to train on if another one validates: all but its declared `val` and `test`."""
    return pairs.select(np.flatnonzero((pairs.splits == NO_SPLIT) | (pairs.splits == SPLITS.index("train"))))


def separate_validation(source: DataSource, val_data: str) -> Pairs:
    """Return the pairs of a data set to validate on, which is read as `source` is.

    Raises:
        ValueError: too many of its records have issues, or it cannot be read.
    """
    source = source.at(val_data)
    try:
        pairs = load_pairs(source)
    except MissingImagesError as error:
        if source.image_dir is None:
            raise
        raise MissingImagesError(
            f"{error}; --image_dir is that of the training data as well: if theirs lie elsewhere, name a folder that "
            "holds both"
        ) from None
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


def _choose_validation(units: IntArray, pool: IntArray, *, val_split: float, seed: int) -> IntArray:
    """Draw whole units from the pool of images, as near to `val_split` of it as they come; returns their images."""
    _, ranks = np.unique(units[pool], return_inverse=True)
    sizes = np.bincount(ranks)
    # RandomState's stream is frozen for good, the newer generators' is not
    order = np.random.RandomState(seed % 2**32).permutation(len(sizes))
    chosen = nearest_groups(sizes[order], num_asked(len(pool), val_split))
    return pool[np.isin(ranks, order[chosen])]


def _with_copies(units: Units, pool: IntArray, drawn: BoolArray, *, target: int, seed: int) -> BoolArray:
    """Let units that near-duplicates join go where their largest part was drawn to; tells what of the pool validates.

    Where that moves more to one side than to the other, other units make up for it.

    Args:
        units: of all images.
        pool: images that train or validate, int64 `[n]`.
        drawn: of all images, those that validate before near-duplicates count.
        target: images that are to validate.
        seed: of what makes up.
    """
    parts, part_of, part_sizes = np.unique(units.alone[pool], return_inverse=True, return_counts=True)
    _, first = np.unique(part_of, return_index=True)
    _, unit_of, sizes = np.unique(units.of[pool], return_inverse=True, return_counts=True)
    # the largest part of each unit, of equal ones the first: written last, it stays
    by_size = np.lexsort((-np.arange(len(parts)), part_sizes))
    validates = np.zeros(len(sizes), dtype=bool)
    validates[unit_of[first[by_size]]] = drawn[pool[first[by_size]]]
    lacking = target - int(sizes[validates].sum())
    if lacking:
        donors = np.flatnonzero(validates == (lacking < 0))
        donors = np.random.RandomState(seed % 2**32).permutation(donors)
        moved = donors[nearest_groups(sizes[donors], abs(lacking))]
        # a side that copies have emptied gets something, however large
        if abs(abs(lacking) - sizes[moved].sum()) < abs(lacking) or len(donors) == len(sizes):
            validates[moved] = lacking > 0
    found: BoolArray = validates[unit_of]
    return found


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


def _without_shared_images(train: Pairs, val: Pairs) -> Pairs:
    only_train = np.flatnonzero(val.paths.find(train.paths) < 0)
    num_shared = len(train) - len(only_train)
    if num_shared:
        logger.warning("%s of the validation set stay out of training", count(num_shared, "image"))
        return train.select(only_train)
    return train
