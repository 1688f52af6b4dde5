"""The verdict holds what it promises: a plain computation, coverage, no luck of the choice."""

import math

import numpy as np
import pytest

from benchmarks.verdict_coverage import Drawn, World, rsum
from cliptune.features.verdict import (
    DIRECTIONS,
    answered,
    compare,
    compare_averages,
    compare_best,
    compare_chosen,
    recall_intervals,
    student_quantile,
)
from cliptune.results import RECALL_KEYS, RECALLS


def test_the_gain_is_the_difference_of_the_metrics() -> None:
    (before, after), groups = World((0.0, 0.3), tied=0.1).draw(np.random.default_rng(0), 80)
    found = compare(before, after, groups)
    assert found.gain == pytest.approx(rsum(after) - rsum(before))
    for direction in DIRECTIONS:
        for k in RECALLS:
            share = 100 * (np.mean(after[direction] <= k) - np.mean(before[direction] <= k))
            assert found.recalls[f"{direction}_r{k}"].gain == pytest.approx(share)
    assert found.num_groups == 80


def test_the_error_is_that_of_a_mean_where_groups_are_alike() -> None:
    """With one caption an image the gain is a mean over images, whose error every textbook has."""
    (before, after), groups = World((0.0, 0.3), max_captions=1).draw(np.random.default_rng(1), 5000)
    per_image = sum(
        100.0 * ((after[direction] <= k) * 1.0 - (before[direction] <= k)) for direction in DIRECTIONS for k in RECALLS
    )
    found = compare(before, after, groups)
    error = np.std(per_image, ddof=1) / math.sqrt(5000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=1e-3)


def test_a_group_is_no_more_than_one_observation() -> None:
    """The same queries ten times over in the same groups tell no more: intervals stay as they are."""
    (before, after), groups = World((0.0, 0.3), max_captions=1).draw(np.random.default_rng(2), 300)
    repeated = [{key: np.repeat(values[key], 10) for key in DIRECTIONS} for values in (before, after, groups)]
    once, ten_times = compare(before, after, groups), compare(repeated[0], repeated[1], repeated[2])
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high), rel=1e-9)


def test_the_three_words_and_their_mirror() -> None:
    worlds = World((0.0, 1.0)).draw(np.random.default_rng(3), 200)
    (before, after), groups = worlds
    better, worse, same = (compare(*pair, groups) for pair in ((before, after), (after, before), (after, after)))
    assert (better.verdict, worse.verdict, same.verdict) == ("better", "worse", "not distinguishable")
    assert (worse.gain, worse.low, worse.high) == pytest.approx((-better.gain, -better.high, -better.low))
    assert same.low < 0 == same.gain < same.high  # a width is never 0


def test_names_and_the_order_of_groups_do_not_matter() -> None:
    (before, after), groups = World((0.0, 0.3)).draw(np.random.default_rng(4), 60)
    named = {key: np.array([f"image {60 - group}" for group in values]) for key, values in groups.items()}
    order = {key: np.random.default_rng(5).permutation(len(values)) for key, values in groups.items()}
    shuffled = [{key: values[key][order[key]] for key in DIRECTIONS} for values in (before, after, named)]
    assert compare(shuffled[0], shuffled[1], shuffled[2])[:4] == pytest.approx(compare(before, after, groups)[:4])


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [50, 300])
@pytest.mark.parametrize("quality", [-3.0, 1.0, 1.75])
@pytest.mark.parametrize("gained", [0.0, 0.3])
def test_intervals_hold_the_true_gain(num_groups: int, quality: float, gained: float) -> None:
    """Of 400 intervals at 95%, 360 to 394 hold it (RSum 110 to 590, several captions an image, ties)."""
    world = World((quality, quality + gained), tied=0.01)
    (before, after), _ = world.draw(np.random.default_rng(6), 100_000)
    true = rsum(after) - rsum(before) if gained else 0.0
    rng, held = np.random.default_rng(7), 0
    for _ in range(400):
        (before, after), groups = world.draw(rng, num_groups)
        found = compare(before, after, groups)
        held += found.low <= true <= found.high
    assert 360 <= held <= 394


@pytest.mark.slow
@pytest.mark.parametrize("quality", [-1.0, 1.0])
def test_the_best_of_many_that_are_alike_is_not_called_better(quality: float) -> None:
    """At most one in twenty; and the mean gain is 0, where the best one's own is far above."""
    world = World([quality] * 31)
    rng = np.random.default_rng(8)
    found, naive = [], []
    for _ in range(100):
        drawn, groups = world.draw(rng, 60)
        found.append(compare_best(drawn, groups))
        naive.append(max(map(rsum, drawn[1:])) - rsum(drawn[0]))
    assert sum(each.verdict == "better" for each in found) <= 8  # 5 of 100, and two standard errors of that count
    gains = np.array([each.gain for each in found])
    assert abs(gains.mean()) < 3 * gains.std() / 10
    assert np.mean(naive) > 5 * abs(gains.mean())


def test_of_one_candidate_the_best_is_the_comparison() -> None:
    drawn, groups = World((0.0, 0.3)).draw(np.random.default_rng(9), 70)
    chosen, compared = compare_best(drawn, groups), compare(drawn[0], drawn[1], groups)
    assert chosen[:3] == pytest.approx(compared[:3])
    assert chosen.verdict == compared.verdict


def test_one_choice_for_all_groups_is_the_comparison() -> None:
    drawn, groups = World((0.0, 0.1, 0.3), tied=0.1).draw(np.random.default_rng(5), 60)
    assert compare_chosen(drawn, np.full(60, 2), groups) == compare(drawn[0], drawn[2], groups)


def test_chosen_evaluations_gain_what_each_group_gains_by_its_own() -> None:
    drawn, groups = World((0.0, 0.1, 0.3)).draw(np.random.default_rng(6), 60)
    chosen = np.where(np.arange(60) < 25, 1, 2)
    mixed = {name: np.where(chosen[groups[name]] == 1, drawn[1][name], drawn[2][name]) for name in DIRECTIONS}
    found, plain = compare_chosen(drawn, chosen, groups), compare(drawn[0], mixed, groups)
    assert found.gain == pytest.approx(plain.gain)
    # what is judged by several evaluations has a larger error
    assert found.high - found.low > plain.high - plain.low
    assert found.recalls["t2i_r5"] == pytest.approx(plain.recalls["t2i_r5"])
    with pytest.raises(ValueError, match="choices of shape"):
        compare_chosen(drawn, chosen[1:], groups)


def test_of_the_two_models_themselves_the_best_average_is_the_best_evaluation() -> None:
    evaluations, groups = World((0.0, 0.3, 0.3, 0.3)).draw(np.random.default_rng(7), 60)
    best = max(evaluations[1:], key=rsum)
    wanted = compare_best(evaluations, groups)
    assert compare_averages([best], evaluations, groups)[:4] == pytest.approx(wanted[:4])
    assert compare_averages(evaluations[:1], evaluations, groups).gain == pytest.approx(0, abs=1e-9)
    # what is chosen among one evaluation is a choice among averages alone
    averages = evaluations[2:]
    alone = compare_averages(averages, evaluations[:2], groups)
    assert alone[:4] == pytest.approx(compare_best([evaluations[0], *averages], groups)[:4])
    with pytest.raises(ValueError, match="nothing to choose from"):
        compare_averages([], evaluations, groups)


@pytest.mark.slow
@pytest.mark.parametrize("gained", [0.0, 0.3])
def test_the_best_average_with_the_best_of_many_gains_no_luck(gained: float) -> None:
    world, rng = World((1.0, *[1.0 + gained] * 20)), np.random.default_rng(8)
    large = Drawn(world, np.random.default_rng(1), 20_000)
    errors, plain, better = [], [], 0
    for _ in range(60):
        drawn = Drawn(world, rng, 100)
        evaluations = [drawn.ranks(i) for i in range(21)]
        best = max(range(1, 21), key=lambda i: rsum(evaluations[i]))
        averages = {alpha: drawn.ranks(best, alpha) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)}
        alpha = max(averages, key=lambda alpha: rsum(averages[alpha]))
        true = rsum(large.ranks(best, alpha)) - rsum(large.ranks(0)) if gained else 0.0
        found = compare_averages(list(averages.values()), evaluations, drawn.groups)
        errors.append(found.gain - true)
        plain.append(rsum(averages[alpha]) - rsum(evaluations[0]) - true)
        better += found.verdict == "better"
    assert np.mean(plain) > 4
    assert abs(np.mean(errors)) < 3 * np.std(errors) / math.sqrt(60) < 3
    assert gained or better <= 5


def test_a_seed_gives_the_same_folds() -> None:
    drawn, groups = World([0.0] * 6).draw(np.random.default_rng(10), 70)
    assert compare_best(drawn, groups, seed=3) == compare_best(drawn, groups, seed=3)
    assert compare_best(drawn, groups, seed=3).gain != compare_best(drawn, groups, seed=4).gain


def test_what_does_not_fit_is_refused() -> None:
    drawn, groups = World((0.0, 0.3)).draw(np.random.default_rng(11), 20)
    with pytest.raises(ValueError, match="nothing to choose from"):
        compare_best(drawn[:1], groups)
    with pytest.raises(ValueError, match="ranks of shapes"):
        compare(drawn[0], {**drawn[1], "i2t": drawn[1]["i2t"][:-1]}, groups)
    one = {key: np.zeros_like(value) for key, value in groups.items()}
    with pytest.raises(ValueError, match="1 groups tell nothing"):
        compare(drawn[0], drawn[1], one)


def test_quantiles_of_students_t() -> None:
    """From the tables of Abramowitz and Stegun, 26.10."""
    for degrees, expected in ((10, 2.228), (30, 2.042), (60, 2.000), (10**6, 1.960)):
        assert student_quantile(0.975, degrees) == pytest.approx(expected, abs=6e-4)


def recalls(ranks: dict[str, np.ndarray]) -> np.ndarray:
    found = [100 * np.mean(ranks[direction] <= k) for direction in DIRECTIONS for k in RECALLS]
    return np.array([*found, sum(found)])


@pytest.mark.slow
@pytest.mark.parametrize(("num_groups", "least"), [(10, 340), (50, 350), (300, 360)])
@pytest.mark.parametrize("quality", [-5.0, -3.0, 1.0, 2.5])
def test_intervals_of_recalls_hold_the_true_ones(num_groups: int, least: int, quality: float) -> None:
    """Of 400 intervals at 95%, for each recall and RSum (9 to 597), 88% or more hold it; they are never empty."""
    world = World((quality,), tied=0.01)
    (many,), _ = world.draw(np.random.default_rng(6), 100_000)
    true, rng, held = recalls(many), np.random.default_rng(7), np.zeros(7)
    for _ in range(400):
        (ranks,), groups = world.draw(rng, num_groups)
        found = recall_intervals(ranks, groups)
        low, high = np.array([found[key] for key in (*RECALL_KEYS, "rsum")]).T
        assert (low < high).all()
        assert (low >= 0).all()
        assert (high <= 100 * np.array([1] * 6 + [6]) + 1e-9).all()
        held += (low <= true) & (true <= high)
    assert (held >= least).all(), held


def test_the_interval_of_a_recall_is_wilsons_where_every_query_is_its_own_group() -> None:
    ranks = {direction: np.repeat([1.0, 20.0], [3000, 7000]) for direction in DIRECTIONS}
    groups = {"i2t": np.arange(10_000), "t2i": np.arange(10_000, 20_000)}
    z, n, p = 1.96, 10_000, 0.3
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low, high = recall_intervals(ranks, groups)["i2t_r1"]
    assert (high - low) / 200 == pytest.approx(half, rel=2e-3)


@pytest.mark.parametrize(("rank", "bound", "limit"), [(20.0, 0, 0.0), (1.0, 1, 100.0)])
def test_an_interval_ends_at_0_and_at_100(rank: float, bound: int, limit: float) -> None:
    """Not 1e-15 beyond, which a table shows as -0."""
    for num_images in range(2, 40):
        ranks = {direction: np.full(num_images, rank) for direction in DIRECTIONS}
        found = recall_intervals(ranks, dict.fromkeys(DIRECTIONS, np.arange(num_images)))
        for key in RECALL_KEYS:
            low, high = found[key]
            assert low >= 0.0
            assert not np.signbit(low)
            assert high <= 100.0
            assert found[key][bound] == pytest.approx(limit, abs=1e-9)


def test_queries_without_a_rank_are_left_out() -> None:
    nan = math.nan
    first = {"i2t": np.array([1.0, nan, 3.0]), "t2i": np.array([1.0, nan])}
    second = {"i2t": np.array([nan, nan, 2.0]), "t2i": np.array([5.0, 2.0])}
    ranks, groups = answered([first, second], {"i2t": np.array([7, 8, 9]), "t2i": np.array([7, 8])})
    assert [each["i2t"].tolist() for each in ranks] == [[3.0], [2.0]]
    assert [each["t2i"].tolist() for each in ranks] == [[1.0], [5.0]]
    assert {key: values.tolist() for key, values in groups.items()} == {"i2t": [9], "t2i": [7]}
