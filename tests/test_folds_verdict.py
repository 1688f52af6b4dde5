"""What folds say together: a fold is judged at the epoch that is best on the others, and their queries are one set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.folds import fold_of, with_curve
from cliptune.features.verdict import compare
from cliptune.folds_verdict import Fold, judge_folds


def with_other(fold: Fold, curve: Sequence[float], *, num_images: int = 10) -> Fold:
    """A fold whose recorded curve is this one, whatever its ranks say."""
    return fold._replace(results=with_curve(curve, num_images))


@pytest.fixture
def folds() -> list[Fold]:
    rng = np.random.default_rng(0)
    return [fold_of(np.array([-1.0, -0.5, 0.0, 0.5]), 10, rng) for _ in range(3)]


def test_a_fold_is_judged_at_the_epoch_that_is_best_on_the_others(folds: list[Fold]) -> None:
    # the first has a peak of its own at epoch 1, which chooses for the others and not for itself
    curves = [(100, 400, 120, 130), (100, 110, 130, 120), (100, 110, 130, 120)]
    found = judge_folds([with_other(*each) for each in zip(folds, curves, strict=True)])
    assert found.epochs == [2, 1, 1]
    assert found.length == 1
    assert found.curve == pytest.approx([100, 620 / 3, 380 / 3, 370 / 3])


def test_what_a_fold_finds_says_nothing_about_its_own_epoch(folds: list[Fold]) -> None:
    rng = np.random.default_rng(1)
    curves = rng.uniform(100, 200, (3, 4))
    epochs = judge_folds([with_other(fold, curve) for fold, curve in zip(folds, curves, strict=True)]).epochs
    for own in range(3):
        for _ in range(20):
            curves[own] = rng.uniform(100, 200, 4)
            again = judge_folds([with_other(fold, curve) for fold, curve in zip(folds, curves, strict=True)])
            assert again.epochs[own] == epochs[own]
        epochs = again.epochs


def test_the_mean_is_weighted_by_images(folds: list[Fold]) -> None:
    curves = [(100, 200, 100, 100), (100, 100, 190, 100), (100, 100, 190, 100)]
    few = [with_other(fold, curve) for fold, curve in zip(folds, curves, strict=True)]
    assert judge_folds(few).length == 2
    many = [with_other(few[0], curves[0], num_images=50), *few[1:]]
    assert judge_folds(many).length == 1


def test_no_epoch_is_chosen_where_none_is_better_and_of_a_tie_the_earlier(folds: list[Fold]) -> None:
    same = judge_folds([with_other(fold, (150, 140, 150, 149)) for fold in folds])
    assert (same.length, same.epochs) == (0, [2, 2, 2])
    tie = judge_folds([with_other(fold, (150, 160, 160, 149)) for fold in folds])
    assert (tie.length, tie.epochs) == (1, [1, 1, 1])


def test_groups_of_two_folds_are_two_whatever_their_numbers(folds: list[Fold]) -> None:
    found = judge_folds(folds)
    assert found.verdict is not None
    assert found.verdict.num_groups == 30
    assert all(gain is not None and gain.num_groups == 10 for gain in found.gains)
    # of folds of one size the gain is their mean, in the direction that has as many queries in each
    gains = []
    for fold, epoch in zip(folds, found.epochs, strict=True):
        before, after = (fold.at(each, merged=False) for each in (0, epoch))
        gains.append(compare(before, after, fold.groups).recalls["i2t_r1"].gain)
    assert found.verdict.recalls["i2t_r1"].gain == pytest.approx(np.mean(gains))
