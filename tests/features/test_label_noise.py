"""Swapped captions are found by features alone, also where a model has learnt them by heart; clean data lists few."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.label_noise import auroc
from cliptune.features.label_noise import NUM_NEIGHBOURS, mislabelled

Array = np.ndarray[Any, Any]


def unit(values: Array) -> Array:
    scaled: Array = values / np.linalg.norm(values, axis=1, keepdims=True)
    return scaled


def world(
    num_images: int, captions: int = 1, *, wrong: float = 0.0, noise: float = 0.6, seed: int = 0
) -> tuple[Array, Array, Array, Array]:
    """Images in 20 kinds; captions say what is seen, in another cone; a fraction of them are another image's."""
    rng = np.random.default_rng(seed)
    meanings = unit(rng.normal(size=(20, 32)))[rng.integers(20, size=num_images)] + 0.1 * rng.normal(
        size=(num_images, 32)
    )
    owners = np.repeat(np.arange(num_images), captions)
    said = meanings[owners]
    is_wrong = rng.permutation(len(owners)) < round(wrong * len(owners))
    rows = rng.permutation(np.flatnonzero(is_wrong))
    said[rows] = said[np.roll(rows, 1)]
    images, texts = (unit(each + noise * rng.normal(size=each.shape) / 32**0.5) for each in (meanings, said))
    gap = np.eye(32)[:2] * 0.8
    return unit(images + gap[0]), unit(texts + gap[1]), owners, is_wrong


@pytest.mark.parametrize("captions", [1, 5])
@pytest.mark.parametrize("wrong", [0.01, 0.1])
def test_swapped_captions_stand_out(captions: int, wrong: float) -> None:
    images, texts, owners, is_wrong = world(600, captions, wrong=wrong)
    found = mislabelled(images, texts, owners)
    # one swap of twenty is within a kind, and no mistake that anybody could see
    assert auroc(found.scores, is_wrong) > 0.95
    assert is_wrong[found.listed].mean() > 0.7
    assert is_wrong[found.listed].sum() > 0.5 * is_wrong.sum()
    assert (np.diff(found.scores[found.listed]) <= 0).all()
    assert found.can_tell


def test_clean_data_lists_hardly_any() -> None:
    listed = [len(mislabelled(*world(500, 2, seed=seed)[:3]).listed) for seed in range(8)]
    assert np.mean(listed) < 2


def test_pairs_that_were_learnt_by_heart_are_found_by_their_neighbours() -> None:
    """The caption's feature is half way to the wrong image's: its own score says nothing any more."""
    images, texts, owners, is_wrong = world(600, wrong=0.05)
    learnt = texts.copy()
    learnt[is_wrong] = unit(texts[is_wrong] + images[owners[is_wrong]])
    own = np.einsum("md,md->m", images[owners], learnt)
    assert auroc(-own, is_wrong) < 0.6
    assert auroc(mislabelled(images, learnt, owners).scores, is_wrong) > 0.7


def test_a_model_that_knows_nothing_lists_nothing() -> None:
    rng = np.random.default_rng(0)
    found = mislabelled(unit(rng.normal(size=(300, 16))), unit(rng.normal(size=(600, 16))), np.arange(600) // 2)
    assert not found.can_tell
    assert not len(found.listed)


def test_what_could_not_be_read_has_no_score_and_changes_none() -> None:
    images, texts, owners, _ = world(200, 2, wrong=0.05)
    more = np.concatenate([np.full((1, 32), np.nan), images]), np.concatenate([np.full((2, 32), np.nan), texts])
    found = mislabelled(*more, np.concatenate([[0, 0], owners + 1]))
    assert np.isnan(found.scores[:2]).all()
    assert np.array_equal(found.scores[2:], mislabelled(images, texts, owners).scores)


def test_many_are_judged_by_a_part_of_the_others() -> None:
    images, texts, owners, is_wrong = world(600, wrong=0.05)
    assert auroc(mislabelled(images, texts, owners, max_reference=200).scores, is_wrong) > 0.93


@pytest.mark.parametrize("num_images", [0, 1, NUM_NEIGHBOURS, 30])
def test_of_few_pairs_nothing_is_said(num_images: int) -> None:
    images, texts, owners, _ = world(max(num_images, 1))
    found = mislabelled(images[:num_images], texts[:num_images], owners[:num_images])
    assert len(found.scores) == num_images
    assert not len(found.listed)


def test_features_that_are_all_equal_list_nothing() -> None:
    same = unit(np.ones((100, 8)))
    found = mislabelled(same, same, np.arange(100))
    assert np.isfinite(found.scores).all()
    assert not len(found.listed)
