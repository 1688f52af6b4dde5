"""How often the verdict's intervals hold the true gain, and how often it says "better" where nothing is.

python benchmarks/verdict_coverage.py

Queries are drawn whose ranks fall with an ability of their image, some luck of their own, and the quality of each
evaluation; the true gain is that of very many of them. Beside the verdict's interval stand those of a plain and of a
studentised bootstrap over the same groups. A model as loaded and 30 evaluations make the second table. In the third
the model as loaded is averaged with the best of 20, and the best average is chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cliptune.cli import parse_settings, run_stage
from cliptune.features.verdict import DIRECTIONS, Verdict, compare, compare_averages, compare_best
from cliptune.results import RECALLS
from cliptune.settings import PositiveInt, Seed, Settings

FloatArray = NDArray[np.float64]
Ranks = dict[str, FloatArray]
QUALITIES = (-3.0, -1.0, 1.0, 1.75)
"""Of the model as loaded: RSum of about 105, 375, 565 and 590."""
NUM_EVALUATIONS = 30
NUM_AVERAGED = 20
"""Evaluations of which the best is averaged with the model as loaded."""
ALPHAS = [step / 10 for step in range(11)]
NUM_RESAMPLES = 400


class BenchmarkSettings(Settings):
    """Settings of the benchmark."""

    repeats: PositiveInt = Field(400, description="sets of queries that are drawn for each row")
    many: PositiveInt = Field(100_000, description="images whose gain is taken for the true one")
    seed: Seed = 0


@dataclass(frozen=True)
class World:
    """Where queries come from.

    Attributes:
        qualities: of each evaluation; its ranks are lower the higher that is.
        max_captions: an image has one to this many.
        tied: fraction of the queries whose match ties with another.
    """

    qualities: Sequence[float]
    max_captions: int = 5
    tied: float = 0.0

    def draw(self, rng: np.random.Generator, num_groups: int) -> tuple[list[Ranks], dict[str, NDArray[np.int64]]]:
        """Return ranks of every evaluation, and the group of each query."""
        drawn = Drawn(self, rng, num_groups)
        return [drawn.ranks(evaluation) for evaluation in range(len(self.qualities))], drawn.groups


class Drawn:
    """Queries of a world."""

    def __init__(self, world: World, rng: np.random.Generator, num_groups: int) -> None:
        captions = rng.integers(1, world.max_captions + 1, num_groups)
        self.groups = {"i2t": np.arange(num_groups), "t2i": np.repeat(np.arange(num_groups), captions)}
        self._qualities, ability = world.qualities, rng.normal(size=num_groups)
        self._own: Ranks = {}
        self._lucks: dict[str, list[FloatArray]] = {}
        self._ties: dict[str, list[FloatArray]] = {}
        for direction in DIRECTIONS:
            group = self.groups[direction]
            own, luck = rng.normal(size=(2, len(group)))
            self._own[direction] = ability[group] + 0.7 * own
            self._lucks[direction], self._ties[direction] = [], []
            for _ in world.qualities:
                # epochs that follow each other are alike
                luck = 0.8 * luck + 0.6 * rng.normal(size=len(group))
                self._lucks[direction].append(luck)
                self._ties[direction].append(np.float64(0.5) * (rng.random(len(group)) < world.tied))

    def ranks(self, evaluation: int, alpha: float = 1.0) -> Ranks:
        """Return the ranks of an evaluation, or of its average with the model as loaded.

        An average's quality and luck lie between the two; its luck is as large as theirs, so that where both are
        equally good it is no better.
        """
        quality = (1 - alpha) * self._qualities[0] + alpha * self._qualities[evaluation]
        alike = 0.8**evaluation  # correlation of the two lucks
        size = np.sqrt((1 - alpha) ** 2 + alpha**2 + 2 * alpha * (1 - alpha) * alike)
        found: Ranks = {}
        for direction, own in self._own.items():
            lucks = self._lucks[direction]
            luck = ((1 - alpha) * lucks[0] + alpha * lucks[evaluation]) / size
            hardness = own + 0.7 * luck - quality
            found[direction] = np.maximum(1, np.floor(np.exp(hardness))) + self._ties[direction][evaluation]
        return found


def rsum(ranks: Ranks) -> float:
    """Return the sum of the six recalls, in percent."""
    return float(sum(100 * np.mean(ranks[direction] <= k) for direction in DIRECTIONS for k in RECALLS))


def bootstrap(before: Ranks, after: Ranks, groups: dict[str, NDArray[np.int64]], *, studentised: bool) -> Verdict:
    """Return percentiles of a paired bootstrap over groups, of the gain or of the gain over its error."""
    size = int(groups["i2t"].max()) + 1
    moved, counts = np.zeros((size, 2)), np.zeros((size, 2))
    for column, direction in enumerate(DIRECTIONS):
        hits = sum(100.0 * ((after[direction] <= k) * 1.0 - (before[direction] <= k)) for k in RECALLS)
        moved[:, column] = np.bincount(groups[direction], hits, size)
        counts[:, column] = np.bincount(groups[direction], minlength=size)
    weights = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), NUM_RESAMPLES).astype(np.float64)
    ratios = (weights @ moved) / (weights @ counts)  # [resamples, 2]
    gain = float((moved.sum(0) / counts.sum(0)).sum())
    if not studentised:
        low, high = np.quantile(ratios.sum(1), (0.025, 0.975))
    else:

        def error(weight: FloatArray, ratio: FloatArray) -> float:
            influence = ((moved - ratio * counts) / (weight @ counts / size)).sum(1)
            return float(np.sqrt((weight * influence**2).sum())) / size

        own = error(np.ones(size), moved.sum(0) / counts.sum(0))
        errors = np.array([error(weight, ratio) for weight, ratio in zip(weights, ratios, strict=True)])
        scores = np.divide(ratios.sum(1) - gain, errors, out=np.zeros_like(errors), where=errors > 0)
        below, above = np.quantile(scores, (0.025, 0.975))
        low, high = gain - above * own, gain - below * own
    word = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
    return Verdict(gain, float(low), float(high), word, {}, size)


Method = Callable[[Ranks, Ranks, dict[str, NDArray[np.int64]]], Verdict]
METHODS: dict[str, Method] = {
    "verdict": compare,
    "percentiles": lambda *values: bootstrap(*values, studentised=False),
    "studentised": lambda *values: bootstrap(*values, studentised=True),
}


def print_pairs(repeats: int, many: int, seed: int) -> None:
    """Compare two evaluations whose true gain is known."""
    print("| images | RSum before | after | " + " | ".join(f"{name}: holds, better" for name in METHODS) + " |")
    print("|---|---|---|" + "---|" * len(METHODS))
    for num_groups in (50, 200, 1000):
        for quality in QUALITIES:
            for gained in (0.0, 0.3):
                world = World((quality, quality + gained))
                (before, after), _ = world.draw(np.random.default_rng(1), many)
                true = rsum(after) - rsum(before) if gained else 0.0
                rng = np.random.default_rng(seed)
                held, better = dict.fromkeys(METHODS, 0), dict.fromkeys(METHODS, 0)
                for _ in range(repeats):
                    drawn, groups = world.draw(rng, num_groups)
                    for name, method in METHODS.items():
                        found = method(drawn[0], drawn[1], groups)
                        held[name] += found.low <= true <= found.high
                        better[name] += found.verdict == "better"
                cells = (f"{held[name] / repeats:.1%}, {better[name] / repeats:.1%}" for name in METHODS)
                row = f"| {num_groups:,} | {rsum(before):.0f} | {rsum(after):.0f} | {' | '.join(cells)} |"
                print(row, flush=True)


def print_best(repeats: int, many: int, seed: int) -> None:
    """Choose among 30 evaluations: the gain on fresh queries, with the choice's luck and without."""
    print("| images | RSum as loaded | course | bias | holds | better | plain: bias | holds | better |")
    print("|---|---|---|---|---|---|---|---|---|")
    steps = np.arange(1, NUM_EVALUATIONS + 1)
    courses = {
        "none better": np.zeros(NUM_EVALUATIONS),
        "rises, then falls": 0.3 * (1 - np.exp(-steps / 6)) - 0.0006 * steps**2,
    }
    for num_groups in (50, 200):
        for quality in QUALITIES:
            for name, course in courses.items():
                world = World((quality, *(quality + course)))
                large, _ = world.draw(np.random.default_rng(1), many)
                true = np.array([rsum(ranks) - rsum(large[0]) for ranks in large]) * bool(course.any())
                rng, sums = np.random.default_rng(seed), np.zeros((2, 3))
                for _ in range(repeats):
                    drawn, groups = world.draw(rng, num_groups)
                    best = 1 + int(np.argmax([rsum(ranks) for ranks in drawn[1:]]))
                    both = compare_best(drawn, groups), compare(drawn[0], drawn[best], groups)
                    for i, found in enumerate(both):
                        held = found.low <= true[best] <= found.high
                        sums[i] += found.gain - true[best], held, found.verdict == "better"
                means = sums / repeats
                cells = (f"{bias:+.1f} | {held:.1%} | {better:.1%}" for bias, held, better in means)
                print(f"| {num_groups:,} | {rsum(large[0]):.0f} | {name} | {' | '.join(cells)} |", flush=True)


def print_averages(repeats: int, many: int, seed: int) -> None:
    """Average the best of 20 evaluations with the model as loaded: the gain of the best average on fresh queries."""
    print("| images | RSum as loaded | course | chosen alpha | bias | holds | better | plain: bias | holds | better |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    steps = np.arange(1, NUM_AVERAGED + 1)
    courses = {"none better": np.zeros(NUM_AVERAGED), "rises": 0.3 * (1 - np.exp(-steps / 6))}
    for num_groups in (50, 200):
        for quality in QUALITIES:
            for name, course in courses.items():
                world = World((quality, *(quality + course)))
                large = Drawn(world, np.random.default_rng(1), many)
                loaded = rsum(large.ranks(0))
                rng, sums = np.random.default_rng(seed), np.zeros((2, 3))
                alphas = []
                for _ in range(repeats):
                    drawn = Drawn(world, rng, num_groups)
                    evaluations = [drawn.ranks(evaluation) for evaluation in range(NUM_AVERAGED + 1)]
                    best = 1 + int(np.argmax([rsum(ranks) for ranks in evaluations[1:]]))
                    averages = [drawn.ranks(best, alpha) for alpha in ALPHAS]
                    chosen = int(np.argmax([rsum(ranks) for ranks in averages]))
                    true = rsum(large.ranks(best, ALPHAS[chosen])) - loaded if course.any() else 0.0
                    alphas.append(ALPHAS[chosen])
                    both = (
                        compare_averages(averages, evaluations, drawn.groups),
                        compare(evaluations[0], averages[chosen], drawn.groups),
                    )
                    for i, found in enumerate(both):
                        held = found.low <= true <= found.high
                        sums[i] += found.gain - true, held, found.verdict == "better"
                means = sums / repeats
                cells = (f"{bias:+.1f} | {held:.1%} | {better:.1%}" for bias, held, better in means)
                row = f"| {num_groups:,} | {loaded:.0f} | {name} | {np.mean(alphas):.2f} | {' | '.join(cells)} |"
                print(row, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print the tables; returns the exit code."""

    def run() -> int:
        settings, _ = parse_settings(BenchmarkSettings, argv, description=str(__doc__))
        print_pairs(settings.repeats, settings.many, settings.seed)
        print()
        print_best(settings.repeats, settings.many, settings.seed)
        print()
        print_averages(settings.repeats, settings.many, settings.seed)
        return 0

    return run_stage(run, name="verdict_coverage.py")


if __name__ == "__main__":
    sys.exit(main())
