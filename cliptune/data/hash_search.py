"""Images of similar hashes, found without comparing all with all: banded look-up.

As in M. Norouzi, A. Punjani, D. Fleet, "Fast Search in Hamming Space with Multi-Index Hashing" (2012): 63 bits are 3
bands of 21. Two hashes that differ in 14 bits or fewer differ in 4 or fewer of some band, so a table for each band is
asked for the 7,547 values that near a hash's own, and finds all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from cliptune.data.table import IntArray
from cliptune.preprocess.resize import compiled
from cliptune.runtime.device import num_cores
from cliptune.runtime.logs import progress_bar
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

Hashes = NDArray[np.uint64]

MAX_BITS = 14
MAX_CANDIDATES = 32
MAX_COARSE = 25.0
"""Levels that 8 x 8 pixels differ by on average, one gain apart, at most; of planted copies they had up to 24."""
_BANDS, _BAND_BITS, _BAND_RADIUS = 3, 21, 4  # 3 * (4 + 1) - 1 = 14
_BLOCK = 512
_MAX_MET = 512
"""Images that one band of a hash finds within the radius; of images of one layout there are as many as there are."""
_MAX_ENTRIES = 16_384
"""Entries that one band of a hash is compared with, beside four times as many as evenly spread hashes would give."""


def candidate_pairs(hashes: Hashes, coarse: NDArray[np.uint8], *, wholes: slice) -> IntArray:
    """Return the pairs of images that may be copies, int64 `[C, 2]`, the lower index first, sorted.

    Those are the pairs where a hash of one's whole differs from any hash of the other in 14 bits or fewer, and whose
    coarse pixels are alike; of each image the 32 with the nearest coarse pixels, and those that have it among theirs.
    Where an image resembles too many others to compare it with all, those of the nearest bands count; that is said.

    Args:
        hashes: of 63 bits, `[N, H]`: of each image's whole, and of parts of it.
        coarse: small pixels of each image, uint8 `[N, K]`.
        wholes: which of the H hashes are of the whole.
    """
    size = len(hashes)
    queries = np.ascontiguousarray(hashes[:, wholes])
    tables, masks = _tables(hashes), _masks()
    nearest = np.full((size, MAX_CANDIDATES), -1, dtype=np.int32)
    crowded = np.zeros(size, dtype=bool)
    limit = _MAX_ENTRIES + 4 * (tables[1].shape[1] * len(masks) >> _BAND_BITS)

    def search(start: int) -> None:
        images = np.arange(start, min(start + _BLOCK, size))
        compiled(_search)(queries, images, tables, masks, coarse, nearest, crowded, limit)

    run_in_threads(search, range(0, size, _BLOCK), desc="candidates")
    if num_crowded := int(crowded.sum()):
        logger.info(
            "%s more others than are compared, as drawings of one layout do: copies among them may be missed",
            count(num_crowded, "image resembles", "images resemble"),
        )
    theirs = nearest.ravel().astype(np.int64)
    ours = np.repeat(np.arange(size), MAX_CANDIDATES)[theirs >= 0]
    theirs = theirs[theirs >= 0]
    codes = np.unique(np.minimum(ours, theirs) * size + np.maximum(ours, theirs))
    return np.stack(np.divmod(codes, max(size, 1)), axis=1)


def run_in_threads(function: Callable[[int], Any], starts: range, *, desc: str) -> list[Any]:
    """Call compiled code, which runs side by side, for each start, and show how far it is."""
    with ThreadPoolExecutor(num_cores()) as threads:
        return list(progress_bar(threads.map(function, starts), total=len(starts), desc=desc))


def _tables(hashes: Hashes) -> tuple[NDArray[np.int32], NDArray[np.uint64], NDArray[np.int32]]:
    """Return for each band where the entries of each value begin, and all entries by value: hash and image."""
    repeats = np.zeros(hashes.shape, dtype=bool)
    for column in range(1, hashes.shape[1]):  # the same hash of an image is one entry
        repeats[:, column] = (hashes[:, :column] == hashes[:, column, None]).any(axis=1)
    owners, columns = np.nonzero(~repeats)
    entries = hashes[owners, columns]
    starts = np.zeros((_BANDS, (1 << _BAND_BITS) + 1), dtype=np.int32)
    by_value = np.empty((_BANDS, len(entries)), dtype=np.uint64)
    owner_of = np.empty((_BANDS, len(entries)), dtype=np.int32)
    for band in range(_BANDS):
        values = (entries >> np.uint64(band * _BAND_BITS)) & np.uint64((1 << _BAND_BITS) - 1)
        order = np.argsort(values, kind="stable")
        starts[band, 1:] = np.cumsum(np.bincount(values.astype(np.int64), minlength=1 << _BAND_BITS))
        by_value[band], owner_of[band] = entries[order], owners[order]
    return starts, by_value, owner_of


@lru_cache(maxsize=1)
def _masks() -> NDArray[np.int64]:
    """Return all ways in which a band can differ in 4 bits or fewer."""
    positions = range(_BAND_BITS)
    masks = [sum(1 << bit for bit in bits) for r in range(_BAND_RADIUS + 1) for bits in combinations(positions, r)]
    return np.array(masks, dtype=np.int64)


def _search(
    queries: Any, images: Any, tables: Any, masks: Any, coarse: Any, nearest: Any, crowded: Any, limit: Any
) -> None:
    """Fill the rows of some images in `nearest`, int32 `[N, C]`, the nearest candidate first; mark the `crowded`."""
    starts, entries, owners = tables
    met_by = np.full(len(queries), -1, np.int32)
    scores = np.empty(nearest.shape[1], np.float32)
    band_mask = np.uint64((1 << _BAND_BITS) - 1)
    for image in images:
        scores[:] = np.inf
        met_by[image] = image
        for number, query in enumerate(queries[image]):
            for band in range(0 if number and query == queries[image, 0] else len(starts)):  # without a border: once
                value = np.int64((query >> np.uint64(band * _BAND_BITS)) & band_mask)
                num_met, num_entries = 0, 0
                for mask in masks:  # by the number of bits: what is left out is farther away in this band
                    if num_met > _MAX_MET or num_entries > limit:
                        crowded[image] = True
                        break
                    near = value ^ mask
                    for at in range(starts[band, near], starts[band, near + 1]):
                        num_entries += 1
                        if num_met > _MAX_MET or num_entries > limit:
                            break
                        other = owners[band, at]
                        # an image is met in several bands and by several of its hashes, and looked at once
                        if met_by[other] != image and _num_bits(query ^ entries[band, at]) <= MAX_BITS:
                            met_by[other] = image
                            num_met += 1
                            score = _coarse_difference(coarse[image], coarse[other])
                            if score <= MAX_COARSE:
                                _insert(scores, nearest[image], score, other)


@register_jitable
def _num_bits(value: Any) -> Any:
    """Count the bits that are set, in pairs, fours and bytes; the product adds the bytes up into the highest."""
    value = value - ((value >> np.uint64(1)) & np.uint64(0x5555555555555555))
    value = (value & np.uint64(0x3333333333333333)) + ((value >> np.uint64(2)) & np.uint64(0x3333333333333333))
    value = (value + (value >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (value * np.uint64(0x0101010101010101)) >> np.uint64(56)


@register_jitable
def _insert(scores: Any, ids: Any, score: Any, new: Any) -> None:
    """Put a candidate where it belongs among the nearest; the farthest falls out."""
    at = len(scores) - 1
    if score >= scores[at]:
        return
    while at > 0 and scores[at - 1] > score:
        scores[at], ids[at] = scores[at - 1], ids[at - 1]
        at -= 1
    scores[at], ids[at] = score, new


@register_jitable
def _coarse_difference(one: Any, other: Any) -> Any:
    """Return by how many levels small pixels differ on average once the darker image is made as bright as the other."""
    ours, theirs = 0, 0
    for i in range(len(one)):
        ours += one[i]
        theirs += other[i]
    dark, bright = (one, other) if ours <= theirs else (other, one)
    product, square = 1e3, 1e3
    for i in range(len(dark)):
        if dark[i] < 240 and bright[i] < 240:  # white is white in a brighter image, too
            product += np.float64(dark[i]) * bright[i]
            square += np.float64(dark[i]) * dark[i]
    total = 0.0
    for i in range(len(dark)):
        total += abs(min(product / square * dark[i], 255.0) - bright[i])
    return np.float32(total / len(dark))
