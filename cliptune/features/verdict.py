"""Did it help, and by how much? The gain of one evaluation over another on the same queries, with an interval.

Queries of one group (all captions of an image and the image itself) rise and fall together, so the unit is the group,
and the gallery is held fixed: the interval tells what other images of the same kind would give.

A recall is a ratio of two sums over groups, hits and queries. Its error is that of the sum of the groups' influences
(linearised variance of a ratio under cluster sampling: Cochran, Sampling Techniques, 3rd ed. 1977, section 6.3; it is
what a paired bootstrap over groups tends to, without drawing). Near 100% only a handful of groups differ and that error
is too small, even 0; so two made-up groups join, of which one gains and one loses a quarter of a query, as
pseudo-observations do in intervals of paired proportions (Bonett and Price, Psychometrika 77, 2012). Quantiles are
Student's. Percentiles of the bootstrap cover less, and those of a studentised one, too, which
`benchmarks/verdict_coverage.py` shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cliptune.results import RECALL_KEYS, RECALLS

DIRECTIONS = ("i2t", "t2i")
QUARTER_OF_A_QUERY = 25.0
"""Points that each of the two made-up groups gains or loses."""
NUM_FOLDS, NUM_DRAWS = 5, 10

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Ranks = Mapping[str, ArrayLike]
"""Rank of each query's best match, 1 is best, under `i2t` and `t2i`."""


class Interval(NamedTuple):
    """A gain in points (percent of the queries), and what it may be as well."""

    gain: float
    low: float
    high: float


class Verdict(NamedTuple):
    """Whether an evaluation is better than another."""

    gain: float
    """Of RSum, in points of 600."""
    low: float
    high: float
    verdict: str
    """`better`, `worse`, or `not distinguishable` where the interval holds 0."""
    recalls: dict[str, Interval]
    """Of the recalls, in points of 100, under `i2t_r1` to `t2i_r10`."""
    num_groups: int


def answered(evaluations: Sequence[Ranks], groups: Ranks) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Leave out the queries without a rank (NaN) in one of the evaluations: of images that could not be read, or alone.

    Returns:
        The evaluations, and the groups, of the queries that are left.
    """
    left = {
        direction: np.isfinite([np.asarray(ranks[direction]) for ranks in evaluations]).all(0)
        for direction in DIRECTIONS
    }
    *ranks_left, groups_left = (
        {direction: np.asarray(values[direction])[left[direction]] for direction in DIRECTIONS}
        for values in (*evaluations, groups)
    )
    return ranks_left, groups_left


def num_groups(groups: Ranks) -> int:
    """Return how many groups the queries are of; there is nothing to learn from fewer than two."""
    return len(np.unique(np.concatenate([np.asarray(groups[direction]) for direction in DIRECTIONS])))


def compare(before: Ranks, after: Ranks, groups: Ranks, *, confidence: float = 0.95, seed: int = 0) -> Verdict:
    """Return the gain of one evaluation over another of the same queries.

    Args:
        before: ranks of the one, `{"i2t": [N], "t2i": [M]}`.
        after: ranks of the other.
        groups: the group of each query, in the same shape; groups of one name in both directions are one.
        confidence: of the intervals, in (0, 1).
        seed: as in `compare_best`; nothing is drawn here.

    Raises:
        ValueError: shapes that do not fit, or fewer than two groups.
    """
    del seed
    queries = _Queries(groups, (before, after))
    gains = queries.hits(after) - queries.hits(before)
    return _verdict(gains, queries, spread=0.0, confidence=confidence)


def recall_intervals(ranks: Ranks, groups: Ranks, *, confidence: float = 0.95) -> dict[str, tuple[float, float]]:
    """Return what the recalls, and `rsum`, of one evaluation may be as well: low and high, in percent.

    Each is a mean of numbers between 0 and 1, so it is Wilson's score interval (JASA 22, 1927), which stays between 0
    and 100% and has a width at both. For the number of queries stands the effective one, p (1 - p) / variance, with the
    variance of the groups (Korn and Graubard, Survey Methodology 24, 1998); RSum is the mean of its six recalls. Where
    all hit, or none, that is 0/0: so two made-up groups join the variance, one that always hits, one that never does.

    Args:
        ranks: `{"i2t": [N], "t2i": [M]}`.
        groups: the group of each query, in the same shape.
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: shapes that do not fit, fewer than two groups, or no query in one of the directions.
    """
    queries = _Queries(groups, (ranks,))
    if not all(queries.counts.sum(0)):
        raise ValueError("no query in one of the directions")
    hits, num_groups = queries.hits(ranks) / 100, queries.num_groups
    values, influences = hits.sum(0) / np.repeat(queries.counts.sum(0), len(RECALLS)), queries.influences(hits)
    values, influences = np.append(values, values.mean()), np.column_stack([influences, influences.mean(1)])
    # with the made-up groups: the mean moves towards 1/2, and they lie 1 - mean above and mean below it
    mean = (num_groups * values + 1) / (num_groups + 2)
    squares = (influences**2).sum(0) + num_groups * (mean - values) ** 2 + (1 - mean) ** 2 + mean**2
    effective = mean * (1 - mean) * (num_groups + 1) * (num_groups + 2) / squares
    z2 = student_quantile((1 + confidence) / 2, num_groups - 1) ** 2
    center = (values + z2 / (2 * effective)) / (1 + z2 / effective)
    error = np.sqrt(z2 * (values * (1 - values) / effective + z2 / (4 * effective**2))) / (1 + z2 / effective)
    scale = np.array([100.0] * len(RECALL_KEYS) + [100.0 * len(RECALL_KEYS)])
    # at 0 and 100% rounding goes beyond by 1e-15, which a table would show as -0
    lows, highs = ((center + sign * error).clip(0, 1) * scale for sign in (-1, 1))
    return {key: (float(lows[i]), float(highs[i])) for i, key in enumerate((*RECALL_KEYS, "rsum"))}


def compare_best(
    ranks_by_evaluation: Sequence[Ranks], groups: Ranks, *, confidence: float = 0.95, seed: int = 0
) -> Verdict:
    """Return the gain, on fresh queries, of the evaluation that is best on these, over the first one.

    The best of many is the best partly by luck. So the groups are dealt into five folds, ten times: each fold is judged
    with the evaluation whose RSum is best on the other four (cross-fitting), and what it gains there is no luck of
    the choice. Folds that choose differently make the error larger: by the mean squared difference, within a group,
    between two of the chosen.

    Args:
        ranks_by_evaluation: ranks of each evaluation; the first is the model as loaded, which is no candidate.
        groups: as for `compare`.
        confidence: of the intervals, in (0, 1).
        seed: of the folds.

    Raises:
        ValueError: shapes that do not fit, fewer than two evaluations or than two groups.
    """
    if len(ranks_by_evaluation) < 2:
        raise ValueError("nothing to choose from: the model as loaded is no candidate")
    first, *candidates = ranks_by_evaluation
    queries = _Queries(groups, ranks_by_evaluation)
    start = queries.hits(first)
    gains = np.stack([queries.rsum(queries.hits(ranks) - start) for ranks in candidates])  # [E, G, 2]
    chosen = _chosen_on_other_folds(gains, queries.counts, seed=seed)  # [draws, G]
    return _of_chosen(lambda i: queries.hits(candidates[i]) - start, chosen, queries, confidence=confidence)


def compare_chosen(
    ranks_by_evaluation: Sequence[Ranks], chosen: ArrayLike, groups: Ranks, *, confidence: float = 0.95
) -> Verdict:
    """Return the gain of evaluations that were chosen group by group, over the first one.

    The error is as large as in `compare_best` where groups are judged by different evaluations.

    Args:
        ranks_by_evaluation: as for `compare_best`.
        chosen: index of the evaluation that judges each group, 1 or more, the groups ascending, int64 `[G]`; none was
            chosen by the group's own queries.
        groups: as for `compare`.
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: shapes that do not fit, or fewer than two groups.
    """
    first, *candidates = ranks_by_evaluation
    queries, indices = _Queries(groups, ranks_by_evaluation), np.asarray(chosen)
    if indices.shape != (queries.num_groups,):
        raise ValueError(f"choices of shape {indices.shape} for {queries.num_groups} groups")
    start = queries.hits(first)
    return _of_chosen(lambda i: queries.hits(candidates[i]) - start, indices[None] - 1, queries, confidence=confidence)


def compare_averages(
    averages: Sequence[Ranks],
    ranks_by_evaluation: Sequence[Ranks],
    groups: Ranks,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Verdict:
    """Return the gain, on fresh queries, of the best of several averages of two models, over the first of the two.

    The second is that of the evaluation which is best on all queries, so each average has a part of that choice's luck.
    Both choices are made on the other folds, as in `compare_best`. Where these choose another evaluation, its averages
    are not there: what its average would have gained is taken to be what this one gains, and the difference of the two
    evaluations times the slope with which the average follows that difference from group to group. At the first model
    the slope is 0, at the second it is 1, so there it is `compare_best`.

    Args:
        averages: ranks of each, all of them on the way between the first evaluation and the best one.
        ranks_by_evaluation: as for `compare_best`.
        groups: as for `compare`.
        confidence: of the intervals, in (0, 1).
        seed: of the folds.

    Raises:
        ValueError: shapes that do not fit, no average, fewer than two evaluations or than two groups.
    """
    if not averages or len(ranks_by_evaluation) < 2:
        raise ValueError("nothing to choose from: averages, and evaluations beside that of the model as loaded")
    first, *candidates = ranks_by_evaluation
    queries = _Queries(groups, [*averages, *ranks_by_evaluation])
    start = queries.hits(first)
    averaged = np.stack([queries.hits(ranks) - start for ranks in averages])  # [A, G, 6]
    gains = np.stack([queries.rsum(queries.hits(ranks) - start) for ranks in candidates])  # [E, G, 2]
    best = int((gains.sum(1) / queries.counts.sum(0)).sum(1).argmax())
    evaluations = _chosen_on_other_folds(gains, queries.counts, seed=seed)  # [draws, G]
    slopes = _slopes(averaged, start, candidates, evaluations, best=best, queries=queries)
    alone = queries.rsum(averaged)  # [A, G, 2]
    pairs = np.empty_like(evaluations)
    for draw, inside in _folds(queries.num_groups, seed=seed):
        evaluation = evaluations[draw, inside[0]]
        others = np.maximum(queries.counts.sum(0) - queries.counts[inside].sum(0), 1)
        shift, own = (
            (each.sum(-2) - each[..., inside, :].sum(-2)) for each in (gains[evaluation] - gains[best], alone)
        )
        average = int(((own + slopes[:, None] * shift) / others).sum(1).argmax())
        pairs[draw, inside] = evaluation * len(averages) + average

    def hits_of(pair: int) -> FloatArray:
        evaluation, average = divmod(pair, len(averages))
        shift = queries.hits(candidates[evaluation]) - queries.hits(candidates[best])
        hits: FloatArray = averaged[average] + slopes[average] * shift
        return hits

    return _of_chosen(hits_of, pairs, queries, confidence=confidence)


def _slopes(
    averaged: FloatArray,
    start: FloatArray,
    candidates: list[Ranks],
    chosen: IntArray,
    *,
    best: int,
    queries: _Queries,
) -> FloatArray:
    """Return by how much each average moves where the best evaluation differs from those chosen in its stead, `[A]`.

    It is the second coefficient of a regression over the groups: of the average's gain on the rivals' gain, and on
    what the best one gains more. The first takes up what all evaluations have learned alike, in which there is no luck
    of the choice.
    """
    shares = np.bincount(chosen[chosen != best], minlength=len(candidates)).astype(np.float64)
    if not shares.any():
        return np.zeros(len(averaged))  # every fold chooses it: there is no difference
    shares /= shares.sum()
    rivals = sum(shares[i] * (queries.hits(candidates[i]) - start) for i in np.flatnonzero(shares))
    known = [rivals, queries.hits(candidates[best]) - start - rivals]
    moves = np.stack([queries.influences(hits).sum(1) for hits in (*known, *averaged)], 1)  # [G, 2 + A]
    slopes: FloatArray = np.linalg.lstsq(moves[:, :2], moves[:, 2:], rcond=None)[0][1]
    return slopes


def _of_chosen(
    hits_of: Callable[[int], FloatArray], chosen: IntArray, queries: _Queries, *, confidence: float
) -> Verdict:
    """Judge each group by the candidates that were chosen for it, `[draws, G]`, with the hits that each has gained."""
    num_groups = queries.num_groups
    mean_gains, mean, square = np.zeros((num_groups, len(RECALL_KEYS))), np.zeros(num_groups), np.zeros(num_groups)
    for candidate in np.unique(chosen):
        hits, where = hits_of(int(candidate)), chosen == candidate
        mean_gains += hits * where.mean(0)[:, None]
        influence, share = queries.influences(hits).sum(1), where.mean()
        mean, square = mean + share * influence, square + share * influence**2
    spread = 2 * float((square - mean**2).sum())  # E|x - y|^2 = 2 Var(x), summed over the groups
    return _verdict(mean_gains, queries, spread=spread, confidence=confidence)


def _folds(num_groups: int, *, seed: int) -> Iterator[tuple[int, IntArray]]:
    """Deal the groups into folds, draw by draw: yields the draw, and the groups of a fold."""
    num_folds = min(NUM_FOLDS, num_groups)
    rng = np.random.default_rng(seed)
    for draw in range(NUM_DRAWS):
        folds = rng.permutation(num_groups) % num_folds
        for fold in range(num_folds):
            yield draw, np.flatnonzero(folds == fold)


def _chosen_on_other_folds(gains: FloatArray, counts: FloatArray, *, seed: int) -> IntArray:
    """Return for each draw and group which evaluation is best on the folds that the group is not in."""
    total, chosen = gains.sum(1), np.empty((NUM_DRAWS, gains.shape[1]), dtype=np.int64)
    for draw, inside in _folds(gains.shape[1], seed=seed):
        others = np.maximum(counts.sum(0) - counts[inside].sum(0), 1)  # queries of each direction
        rsums = ((total - gains[:, inside].sum(1)) / others).sum(1)
        chosen[draw, inside] = rsums.argmax()
    return chosen


class _Queries:
    """Which group each query is of, and sums over the groups."""

    def __init__(self, groups: Ranks, evaluations: Sequence[Ranks]) -> None:
        names = [np.asarray(groups[direction]) for direction in DIRECTIONS]
        for ranks in evaluations:
            sizes = [np.shape(ranks[direction]) for direction in DIRECTIONS]
            if sizes != [each.shape for each in names] or any(len(size) != 1 for size in sizes):
                raise ValueError(f"ranks of shapes {sizes} and groups of {[each.shape for each in names]}")
        _, codes = np.unique(np.concatenate(names), return_inverse=True)
        self.codes = np.split(codes.reshape(-1), [len(names[0])])
        self.num_groups = int(codes.max(initial=-1)) + 1
        if self.num_groups < 2:
            raise ValueError(f"{self.num_groups} groups tell nothing of others")
        counts = [np.bincount(codes, minlength=self.num_groups) for codes in self.codes]
        self.counts = np.stack(counts, 1).astype(np.float64)
        """Queries of each group, image to text and text to image, `[G, 2]`."""

    def hits(self, ranks: Ranks) -> FloatArray:
        """Return 100 for each query within each cut-off, summed over the groups, `[G, 6]`."""
        columns = [
            np.bincount(codes, 100.0 * (np.asarray(ranks[direction]) <= k), self.num_groups)
            for direction, codes in zip(DIRECTIONS, self.codes, strict=True)
            for k in RECALLS
        ]
        return np.stack(columns, 1)

    def rsum(self, values: Any) -> FloatArray:
        """Add the cut-offs of each direction, `[..., 6]` to `[..., 2]`."""
        total: FloatArray = values.reshape(*values.shape[:-1], 2, len(RECALLS)).sum(-1)
        return total

    def influences(self, hits: FloatArray) -> FloatArray:
        """Return how each group moves the six ratios of sums: their mean is 0, `[G, 6]`."""
        counts = np.repeat(self.counts, len(RECALLS), axis=1)
        moved: FloatArray = (hits - counts * (hits.sum(0) / counts.sum(0))) / counts.mean(0)
        return moved


def _verdict(hits: FloatArray, queries: _Queries, *, spread: float, confidence: float) -> Verdict:
    """Turn the gain of each group, `[G, 6]`, into intervals; `spread` is added to RSum's sum of squares."""
    num_groups = queries.num_groups
    if not all(queries.counts.sum(0)):
        raise ValueError("no query in one of the directions")
    gains = hits.sum(0) / np.repeat(queries.counts.sum(0), len(RECALLS))
    influences = queries.influences(hits)
    quantile = student_quantile((1 + confidence) / 2, num_groups - 1)

    def interval(gain: float, influence: FloatArray, added: float = 0.0) -> Interval:
        squares = float((influence**2).sum()) + 2 * QUARTER_OF_A_QUERY**2 + added
        error = quantile * math.sqrt(squares / (num_groups * (num_groups - 1)))
        return Interval(gain, gain - error, gain + error)

    recalls = {name: interval(float(gains[i]), influences[:, i]) for i, name in enumerate(RECALL_KEYS)}
    gain, low, high = interval(float(gains.sum()), influences.sum(1), spread)
    word = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
    return Verdict(gain, low, high, word, recalls, num_groups)


def student_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t, to 0.1% from 10 degrees on (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return math.fsum(term / degrees**power for power, term in enumerate(terms))
