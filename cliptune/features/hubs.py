"""Hubs: images or captions that are among the first answers to far too many queries.

In a space of many dimensions some points are near to all others (Radovanovic et al., "Hubs in Space", JMLR 2010): an
image of nothing in particular that is returned whatever one asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MIN_RATIO = 10.0
"""Times its fair part that a hub is returned at least; in a small gallery to three of four queries."""
MAX_EXPECTED = 0.01
"""Points of a gallery that chance alone may flag."""


@dataclass(frozen=True)
class Hub:
    """What is returned for too many queries."""

    row: int
    count: int
    """Queries that have it among their answers, its own left out."""
    expected: float
    """That would, if all of the gallery were returned as often."""


class Hubs(NamedTuple):
    """How often each part of a gallery is returned."""

    found: list[Hub]
    """The most frequent first."""
    counts: Array
    """`[G]`: queries that have it among their answers, its own left out (k-occurrence)."""
    skewness: float
    """Of the counts: about 0 where all are returned as often, above 1 there are hubs."""


def hubs(answers: Array, num_gallery: int, *, is_own: Array) -> Hubs:
    """Find what is returned far more often than others, and than chance would have it.

    Its own queries do not count, so an image with many captions is none. What is near to a crowd of similar queries is
    returned often with good reason: flagged is what has `MIN_RATIO` times its fair part, and more than the spread of
    the other counts explains.

    Args:
        answers: `[Q, K]`: rows of the gallery, of each query; -1: none. `i2t_ids` or `t2i_ids` of `retrieval.npz`.
        num_gallery: G.
        is_own: bool `[Q, K]`: the answer belongs to the query.
    """
    counts = np.bincount(answers[(answers >= 0) & ~is_own], minlength=num_gallery)
    expected = float(counts.mean()) if num_gallery else 0.0
    # of 60 images each is among the ten answers of every sixth query: ten times that cannot be
    many = min(MIN_RATIO * expected, max(0.75 * len(answers), 2 * expected))
    limit = max(many, _usual_limit(counts))
    rows = np.flatnonzero(counts > limit)
    rows = rows[np.argsort(-counts[rows], kind="stable")]
    return Hubs([Hub(int(row), int(counts[row]), expected) for row in rows], counts, _skewness(counts))


def _usual_limit(counts: Array) -> float:
    """Return a count that less than `MAX_EXPECTED` of a gallery's points exceed by chance.

    Counts vary more than Poisson's, since some points are nearer to the middle than others. Their tail is taken to fall
    as that of a gamma distribution, exp(-count / scale), with the mean and variance of what is no hub: 98 of 100.
    """
    if not len(counts):
        return 0.0
    usual = np.sort(counts)[: max(int(0.98 * len(counts)), 1)]
    mean, variance = float(usual.mean()), float(usual.var())
    if mean == 0:
        return 0.0
    scale = max(variance / mean, 1.0)
    return mean + scale * float(np.log(len(counts) / MAX_EXPECTED))


def _skewness(counts: Array) -> float:
    deviations = counts - counts.mean() if len(counts) else counts
    spread = float(np.sqrt(np.mean(deviations**2))) if len(counts) else 0.0
    return float(np.mean(deviations**3)) / spread**3 if spread else 0.0
