"""Pairs that look mislabelled: an image and a caption that score far below what their neighbours score."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUM_NEIGHBOURS = 5
MIN_PAIRS = 50
"""Of fewer nothing is listed: there is no telling what is usual."""
MAX_REFERENCE = 20_000
"""Images among whose captions, and captions among whose images, neighbours are looked for."""
FALSE_FRACTION = 0.25
"""Of the pairs that are listed, that may be correct."""
MIN_SEPARATION = 0.5
LIMIT = 6
"""Of one sign, in spreads of what is usual."""
SCORES_AT_ONCE = 2**24


class Noise(NamedTuple):
    """How much each pair looks mislabelled."""

    scores: Array
    """float64 `[M]`: higher is more suspicious, about 0 is usual; NaN where the image could not be read."""
    listed: Array
    """Rows of the pairs that stand out, the worst first."""
    expected: float
    """How many of the listed are correct, by the scores of all others."""
    separation: float
    """Fraction of captions swapped on purpose that score worse than three of four pairs: 0.25 by chance, at most 1."""

    @property
    def can_tell(self) -> bool:
        """Tell whether the model knows a swapped caption from a correct one; where it does not, nothing is listed."""
        return self.separation >= MIN_SEPARATION


class _Features(NamedTuple):
    """Unit-norm features of pairs, `[M, D]` texts and `[N, D]` images, and what their neighbours are like."""

    images: Array
    texts: Array
    owners: Array
    image_rivals: Array
    """`[N]`: what an image scores with the captions of others that are nearest to it."""
    text_rivals: Array
    """`[M]`: what a caption scores with the other images that are nearest to it."""
    image_hints: Array
    """`[N, D]`: mean caption of the images that are nearest to an image."""
    text_hints: Array
    """`[M, D]`: mean image of the captions of others that are nearest to a caption."""


def mislabelled(
    image_features: Array, text_features: Array, text_to_image: Array, *, max_reference: int = MAX_REFERENCE
) -> Noise:
    """Find captions that do not belong to their images, by the features of a model, which may have trained on them.

    A model that has learnt wrong pairs by heart scores them high. So a pair is judged by five signs, each against what
    is usual: its score beside the best that the image has with captions of others, and the caption with other images;
    how well the caption fits to those of the nearest images, and the image to those of the nearest captions, in which
    the pair itself has no say; and how well it fits to the image's other captions.

    Args:
        image_features: `[N, D]`, unit norm; NaN: could not be read.
        text_features: `[M, D]`, unit norm.
        text_to_image: `[M]`: image of each text.
        max_reference: images, and captions, that neighbours are looked for among; of more, evenly spaced ones.
    """
    readable = np.asarray(np.isfinite(image_features).all(1))
    rows = np.flatnonzero(np.isfinite(text_features).all(1) & readable[text_to_image])
    images, owners = np.unique(text_to_image[rows], return_inverse=True)
    scores = np.full(len(text_to_image), math.nan)
    if len(rows) < MIN_PAIRS or len(images) <= NUM_NEIGHBOURS:
        return Noise(scores, np.zeros(0, dtype=np.int64), 0.0, 0.0)
    features = _neighbourhoods(
        image_features[images].astype(np.float32), text_features[rows].astype(np.float32), owners, max_reference
    )
    signs = _signs(features, np.arange(len(rows)))
    # what swapped captions score is known: that of another image's, half of all places on
    swapped = _signs(features, _another(owners))
    known = np.isfinite(signs).any(axis=1)
    signs, swapped = signs[known], swapped[known]
    centers = np.nanmedian(signs, axis=1, keepdims=True)
    scales = np.nanmedian(np.abs(signs - centers), axis=1, keepdims=True) * 1.4826
    found, wrong = (_sum((centers - each) / np.maximum(scales, 1e-6)) for each in (signs, swapped))
    center = np.median(found)
    scale = max(1.4826 * float(np.median(np.abs(found - center))), 1e-6)
    found, wrong = (found - center) / scale, (wrong - center) / scale
    scores[rows] = found
    return _listed(scores, wrong)


def _listed(scores: Array, wrong: Array) -> Noise:
    """List the pairs that score as swapped captions do, and as correct ones rarely do.

    The scores of correct pairs have a longer tail than a normal distribution: it is taken to fall as an exponential
    one, which is fitted to where hardly a wrong pair is, the quarter above the median. Of this tail as many may be
    listed as Benjamini and Hochberg (1995) allow for a fraction of false ones: clean data gives hardly any.
    """
    middle, upper = np.nanquantile(scores, (0.5, 0.75)).tolist()
    slope = max(upper - middle, 1e-6) / math.log(2)
    rows = np.flatnonzero(scores >= max(upper, float(np.quantile(wrong, 0.05))))  # not NaN
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    expected = len(wrong) * 0.25 * np.exp(-(scores[rows] - upper) / slope)  # correct pairs that score as high
    separation = float((wrong > upper).mean())
    allowed = np.flatnonzero(expected <= FALSE_FRACTION * np.arange(1, len(rows) + 1))
    number = int(allowed[-1]) + 1 if len(allowed) and separation >= MIN_SEPARATION else 0
    return Noise(scores, rows[:number], float(expected[number - 1]) if number else 0.0, separation)


def _another(owners: Array) -> Array:
    """Return for each caption another image's, the same each time."""
    order = np.random.default_rng(0).permutation(len(owners))
    other = np.empty(len(owners), dtype=np.int64)
    other[order] = np.roll(order, len(order) // 2)
    return other


def _sum(signs: Array) -> Array:
    """Add up what is known of each pair, so that it varies as much however many signs there are.

    No sign counts for more than `LIMIT`: of two captions that contradict each other one is wrong, and the other signs
    say which.
    """
    limited = LIMIT * np.tanh(signs / LIMIT)
    total: Array = np.nansum(limited, axis=0) / np.sqrt(np.isfinite(signs).sum(axis=0))
    return total


def _signs(features: _Features, captions: Array) -> Array:
    """Return the five signs `[5, M]`, where pair m has the caption of row `captions[m]` in place of its own."""
    images, owners, hints = features.images[features.owners], features.owners, features.image_hints[features.owners]
    texts, text_hints = features.texts[captions], features.text_hints[captions]
    own = _dots(images, texts)
    sums = np.zeros_like(features.images)
    np.add.at(sums, owners, features.texts)
    others = sums[owners] - features.texts  # the caption's sisters
    sizes = np.linalg.norm(others, axis=1)
    alone = np.bincount(owners)[owners] == 1
    return np.stack([
        own - features.image_rivals[owners],
        own - features.text_rivals[captions],
        # relative to how well the neighbours agree among themselves
        _dots(texts, hints) - _dots(hints, hints),
        _dots(images, text_hints) - _dots(text_hints, text_hints),
        np.where(alone, math.nan, _dots(texts, others) / np.maximum(sizes, 1e-6)),
    ])  # fmt: skip


def _dots(first: Array, second: Array) -> Array:
    products: Array = np.einsum("md,md->m", first, second).astype(np.float64)
    return products


def _neighbourhoods(images: Array, texts: Array, owners: Array, max_reference: int) -> _Features:
    """Find the neighbours of every image and caption in its own modality and in the other."""
    image_rows, text_rows = (
        np.linspace(0, len(each) - 1, min(len(each), max_reference)).astype(np.int64) for each in (images, texts)
    )
    sums = np.zeros_like(images)
    np.add.at(sums, owners, texts)
    mean_texts = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-6)  # of each image
    every_image = np.arange(len(images))
    image_rivals, _ = _nearest(images, every_image, texts[text_rows], owners[text_rows])
    text_rivals, _ = _nearest(texts, owners, images[image_rows], image_rows)
    _, near_images = _nearest(images, every_image, images[image_rows], image_rows)
    _, near_texts = _nearest(texts, owners, texts[text_rows], owners[text_rows])
    return _Features(
        images, texts, owners, image_rivals.mean(1), text_rivals.mean(1),
        mean_texts[image_rows[near_images]].mean(1), images[owners[text_rows[near_texts]]].mean(1),
    )  # fmt: skip


def _nearest(queries: Array, query_owners: Array, gallery: Array, gallery_owners: Array) -> tuple[Array, Array]:
    """Return scores and rows `[Q, k]` of what is nearest in a gallery and belongs to another image."""
    scores = np.empty((len(queries), NUM_NEIGHBOURS), dtype=np.float32)
    rows = np.empty((len(queries), NUM_NEIGHBOURS), dtype=np.int64)
    step = max(SCORES_AT_ONCE // len(gallery), 1)
    for start in range(0, len(queries), step):
        block = queries[start : start + step] @ gallery.T
        block[query_owners[start : start + step, None] == gallery_owners] = -2.0  # below any cosine
        best = np.argpartition(block, -NUM_NEIGHBOURS, axis=1)[:, -NUM_NEIGHBOURS:]
        rows[start : start + step], scores[start : start + step] = best, np.take_along_axis(block, best, axis=1)
    return scores, rows
