"""Images that are one image: the same file, or a copy resized, re-encoded, slightly cropped or brightened.

Hashes say which images may be copies; alone they would put half of a set of icons into one lump. So each candidate is
compared in earnest, on small pixels: see `cliptune.preprocess.alignment`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliptune.data.fingerprints import Fingerprints, num_missing, take_fingerprints
from cliptune.data.hash_search import candidate_pairs, run_in_threads
from cliptune.data.identity import file_identities, same_content
from cliptune.data.table import BoolArray, IntArray, Strings
from cliptune.preprocess.alignment import distances
from cliptune.preprocess.fingerprint import CROPS, NUM_HASHES, SIDE
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

MAX_IMAGES = 20_000
"""Of a data set whose fingerprints are taken without being asked for: about a minute."""
MAX_DISTANCE = 16.0
"""Levels of 255 between copies, at most: other photos begin at about 40, other icons at about 7."""
OF_CONTRAST = 0.2
"""Nor may copies differ by more than this fraction of their contrast: fog resembles fog."""
MIN_CONTRAST = 10.0
"""Levels by which the part of an image that differs most must differ from its mean; else it resembles all such."""
_COARSE = 8
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Pairs of images that are one image.

    Attributes:
        pairs: int64 `[P, 2]`: indices of the images. Files of the same bytes stand each with the first of them, and
            only that one with its near-duplicates.
        identical: bool `[P]`: the files are the same, byte by byte.
        distances: float32 `[P]`: how far copies are apart, in levels of 255; 0 for identical files.
    """

    pairs: IntArray
    identical: BoolArray
    distances: NDArray[np.float32]

    def among(self, num_images: int) -> NearDuplicates:
        """Return the pairs of the first so many images alone."""
        inside = np.flatnonzero((self.pairs < num_images).all(axis=1))
        return NearDuplicates(self.pairs[inside], self.identical[inside], self.distances[inside])


def no_copies(paths: Strings) -> NearDuplicates:
    """Return no pairs, of whatever images."""
    return NearDuplicates(np.zeros((0, 2), np.int64), np.zeros(0, dtype=bool), np.zeros(0, np.float32))


def identical_files(paths: Strings, *, cache_file: Path | None = None) -> NearDuplicates:
    """Find files of the same bytes, and nothing else; reads 8 KB of each file, and all of those that may be the same.

    Args:
        paths: of the files.
        cache_file: see `file_identities`.
    """
    first = same_content(paths, file_identities(paths, cache_file=cache_file))
    copies = np.flatnonzero(first != np.arange(len(first)))
    pairs = np.stack([first[copies], copies], axis=1)
    return NearDuplicates(pairs, np.ones(len(copies), dtype=bool), np.zeros(len(copies), dtype=np.float32))


def look_for_near_duplicates(
    paths: Strings, *, cache_dir: Path | None, num_workers: int | None = None, max_images: int = MAX_IMAGES
) -> NearDuplicates:
    """Find near-duplicates where that takes little time; else identical files alone, and say so.

    Args:
        paths: of the images.
        cache_dir: folder of cached fingerprints; where nearly all are there, any number of images is looked at.
        num_workers: that decode; None: one a core, at most 16.
        max_images: of how many fingerprints are taken.
    """
    if len(paths) > max_images and num_missing(paths, cache_dir) > max_images:
        logger.info(
            "near-duplicate images were not looked for: that takes minutes with %s. data_loader.py --check does it, "
            "and caches what a run of the same --output_dir needs",
            count(len(paths), "image"),
        )
        return identical_files(paths, cache_file=_identities(cache_dir))
    return find_near_duplicates(paths, cache_dir=cache_dir, num_workers=num_workers)


def find_near_duplicates(paths: Strings, *, cache_dir: Path | None, num_workers: int | None = None) -> NearDuplicates:
    """Find the images that are copies of others; one that cannot be read is a copy only of the same file.

    Args:
        paths: of the images, each of which stands once.
        cache_dir: folder to cache fingerprints and identities of files in; None: nothing is cached.
        num_workers: that decode; None: one a core, at most 16.
    """
    same = identical_files(paths, cache_file=_identities(cache_dir))
    heads = np.setdiff1d(np.arange(len(paths)), same.pairs[:, 1])
    fingerprints = take_fingerprints(paths.take(heads), cache_dir=cache_dir, num_workers=num_workers)
    near, apart = near_pairs(fingerprints)
    return NearDuplicates(
        pairs=np.concatenate([same.pairs, heads[near]]),
        identical=np.concatenate([same.identical, np.zeros(len(near), dtype=bool)]),
        distances=np.concatenate([same.distances, apart]),
    )


def _identities(cache_dir: Path | None) -> Path | None:
    return None if cache_dir is None else cache_dir / "identities.npz"


def near_pairs(fingerprints: Fingerprints) -> tuple[IntArray, NDArray[np.float32]]:
    """Return the verified pairs, int64 `[P, 2]`, and their distances in levels, float32 `[P]`."""
    hashes, coarse, contrast = _summaries(fingerprints)
    usable = np.flatnonzero(contrast >= MIN_CONTRAST)
    wholes = slice(None, None, len(CROPS))  # with the border and without
    pairs = usable[candidate_pairs(hashes[usable], coarse[usable], wholes=wholes)]

    def verify(start: int) -> NDArray[np.float32]:
        ours, theirs = pairs[start : start + _BLOCK].T
        return distances(fingerprints.get(ours)[0]["pixels"], fingerprints.get(theirs)[0]["pixels"])

    found = run_in_threads(verify, range(0, len(pairs), _BLOCK), desc="copies")
    apart = np.concatenate([np.zeros(0, dtype=np.float32), *found])
    kept = apart <= np.minimum(MAX_DISTANCE, OF_CONTRAST * contrast[pairs].min(axis=1))
    return pairs[kept], apart[kept]


def _summaries(fingerprints: Fingerprints) -> tuple[NDArray[np.uint64], NDArray[np.uint8], NDArray[np.float32]]:
    """Return hashes `[N, 6]`, 8 x 8 pixels `[N, 192]` and the contrast in levels `[N]`, which is 0 of no image."""
    size = len(fingerprints)
    hashes = np.zeros((size, NUM_HASHES), dtype=np.uint64)
    coarse = np.zeros((size, 3 * _COARSE**2), dtype=np.uint8)
    contrast = np.zeros(size, dtype=np.float32)
    part = SIDE // _COARSE
    for start in range(0, size, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, size))
        rows, taken = fingerprints.get(block)
        pixels = rows["pixels"].astype(np.float32)  # [n, 32, 32, 3]
        blocks = pixels.reshape(len(block), _COARSE, part, _COARSE, part, 3).mean(axis=(2, 4))
        hashes[block], coarse[block] = rows["hashes"], blocks.round().reshape(len(block), -1)
        contrast[block] = np.abs(blocks - blocks.mean(axis=(1, 2), keepdims=True)).max(axis=(1, 2, 3)) * taken
    return hashes, coarse, contrast
