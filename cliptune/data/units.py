"""What stays on one side of a split: a group, with all that is a copy of one of its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cliptune.data.near_duplicates import NearDuplicates
from cliptune.data.pairs import Pairs
from cliptune.data.table import SPLITS, CodeArray, IntArray, Strings

LARGEST = 0.01
"""Fraction of the images above which near-duplicates of one another are no copies, but a set of look-alikes."""
LARGEST_ANYWAY = 10


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a data set.

    Attributes:
        of: int64 `[N]`: unit of each image; numbers ascend with the names of the units' first groups.
        alone: the same without near-duplicates: of groups and files of the same bytes.
        lumps: images of each set of near-duplicates that was too large to be joined, largest first.
    """

    of: IntArray
    alone: IntArray
    lumps: list[IntArray] = field(default_factory=list)


def find_units(groups: Strings, copies: NearDuplicates, *, join: bool = True) -> Units:
    """Join groups that hold copies of each other's images.

    Files of the same bytes are always joined; near-duplicates only where no more than 1% of the images (or 10) hang
    together by them. Groups do not count for that: two large ones may share a copy.

    Args:
        groups: of each image, `[N]`.
        copies: pairs of images, by their indices.
        join: near-duplicates as well.
    """
    ranks = _ranks(groups)
    _, first = np.unique(ranks, return_index=True)
    same = np.concatenate([np.stack([first[ranks], np.arange(len(ranks))], axis=1), copies.pairs[copies.identical]])
    alone = components(len(ranks), same)
    near = copies.pairs[~copies.identical] if join else copies.pairs[:0]
    # an edge within a unit joins nothing, so it makes no lump either
    near = near[alone[near[:, 0]] != alone[near[:, 1]]]
    sets = components(len(ranks), near)
    sizes = np.bincount(sets, minlength=len(ranks))
    is_lump = sizes[sets] > max(LARGEST * len(ranks), LARGEST_ANYWAY)
    units = components(len(ranks), np.concatenate([same, near[~is_lump[near[:, 0]]]]))
    heads = np.unique(sets[is_lump])
    lumps = [np.flatnonzero(sets == head) for head in heads[np.argsort(-sizes[heads], kind="stable")]]
    return Units(_numbered(units, ranks), _numbered(alone, ranks), lumps)


def _numbered(units: IntArray, ranks: IntArray) -> IntArray:
    """Give each unit the number of its first group."""
    lowest = np.full(len(ranks), len(ranks))
    np.minimum.at(lowest, units, ranks)
    numbers: IntArray = lowest[units]
    return numbers


def components(size: int, edges: IntArray) -> IntArray:
    """Return the lowest node that edges lead to from each node, int64 `[size]`.

    Args:
        size: number of nodes.
        edges: int64 `[E, 2]`.
    """
    labels, before = np.arange(size), None
    while before is None or (labels != before).any():
        before = labels.copy()
        lower = labels[edges].min(axis=1, initial=size)
        # the nodes and their labels' nodes: of 3-2 and 2-1, where 3 has the label 2, the label of 2 falls to 1 as well
        for ends in (edges[:, 0], edges[:, 1], before[edges[:, 0]], before[edges[:, 1]]):
            np.minimum.at(labels, ends, lower)
        labels = labels[labels]
    return labels


def crossing(units: IntArray, splits: CodeArray) -> IntArray:
    """Return the indices of the images whose unit is in more than one split.

    Args:
        units: of each image, int64 `[N]`.
        splits: code of each image's split, int8 `[N]`.
    """
    found = np.zeros((len(SPLITS), int(units.max(initial=-1)) + 1), dtype=bool)
    for code in range(len(SPLITS)):
        found[code, units[splits == code]] = True
    return np.flatnonzero((found.sum(axis=0) > 1)[units])


def row_split_leaks(units: IntArray, num_val: int) -> float:
    """Return how many validation images would have another image of their unit in training if rows were split.

    It is the expectation over all ways to draw `num_val` of N rows: of a unit of s images each is drawn with the
    probability v / N, and then all others with the product of (v - j) / (N - j) over j from 1 to s - 1.
    """
    _, sizes = np.unique(units, return_counts=True)
    size, expected = len(units), 0.0
    for s, number in zip(*np.unique(sizes, return_counts=True), strict=True):
        others = np.arange(1, int(s))
        all_drawn = np.prod(np.maximum(num_val - others, 0) / np.maximum(size - others, 1))
        expected += number * s * num_val / size * (1 - all_drawn)
    return float(expected)


def shared_copies(
    splits: Mapping[str, Pairs], paths: Strings, copies: NearDuplicates
) -> list[tuple[str, str, IntArray]]:
    """Return the near-duplicates across splits: names of two splits, and pairs of images, the first split's first.

    Args:
        splits: by their names.
        paths: that `copies` are pairs of.
        copies: see `find_near_duplicates`.
    """
    sides = np.full(len(paths), -1)
    for code, split in enumerate(SPLITS):
        rows = paths.find(splits[split].paths)
        sides[rows[rows >= 0]] = code
    near = copies.pairs[~copies.identical]
    ordered = np.take_along_axis(near, np.argsort(sides[near], axis=1, kind="stable"), axis=1)
    lower, upper = sides[ordered].T
    return [
        (SPLITS[one], SPLITS[other], ordered[(lower == one) & (upper == other)])
        for one, other in ((0, 1), (0, 2), (1, 2))
        if ((lower == one) & (upper == other)).any()
    ]


def _ranks(groups: Strings) -> IntArray:
    """Return the position of each group among the different ones in sorted order, int64 `[N]`."""
    first = groups.first_equal()
    heads = np.flatnonzero(first == np.arange(len(first)))
    heads = heads[groups.take(heads).sorted_order()]
    ranks = np.empty_like(first)
    ranks[heads] = np.arange(len(heads))
    return ranks[first]
