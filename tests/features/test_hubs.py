"""Planted hubs are flagged; what answers as often as chance, or a crowd, has it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cliptune.features.hubs import hubs

Array = np.ndarray[Any, Any]


def answers_of(queries: Array, gallery: Array) -> Array:
    answers: Array = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, :10]
    return answers


def unit(values: Array) -> Array:
    scaled: Array = values / np.linalg.norm(values, axis=1, keepdims=True)
    return scaled


def scene(num: int, *, planted: int, seed: int, kinds: int = 0) -> tuple[Array, Array]:
    """Queries and a gallery of pairs, of which the first few of the gallery lie in the middle of all queries."""
    rng = np.random.default_rng(seed)
    centre = unit(rng.normal(size=(1, 64)))
    meanings = (
        unit(rng.normal(size=(kinds, 64)))[rng.integers(kinds, size=num)] if kinds else rng.normal(size=(num, 64)) / 8
    )
    queries, gallery = (unit(meanings + rng.normal(size=(num, 64)) / 16 + centre / 2) for _ in range(2))
    gallery[:planted] = centre
    return queries, gallery


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num", "planted"), [(60, 1), (500, 1), (500, 3)])
def test_planted_hubs_are_flagged(num: int, planted: int, seed: int) -> None:
    answers = answers_of(*scene(num, planted=planted, seed=seed))
    found = hubs(answers, num, is_own=answers == np.arange(num)[:, None])
    assert {hub.row for hub in found.found} == set(range(planted))
    assert found.found[0].count == found.counts.max()
    assert found.found[0].expected == pytest.approx(10, abs=1)
    assert found.skewness > 3


@pytest.mark.parametrize("kinds", [0, 25])
@pytest.mark.parametrize("num", [60, 500, 1500])
def test_a_set_without_hubs_has_none(num: int, kinds: int) -> None:
    answers = answers_of(*scene(num, planted=0, seed=1, kinds=kinds))
    assert not hubs(answers, num, is_own=np.zeros_like(answers, dtype=bool)).found


def test_random_answers_have_no_hub() -> None:
    answers = np.random.default_rng(0).integers(2000, size=(10_000, 10))
    found = hubs(answers, 2000, is_own=np.zeros_like(answers, dtype=bool))
    assert not found.found
    assert abs(found.skewness) < 0.5


def test_own_queries_and_missing_answers_do_not_count() -> None:
    answers = np.array([[0, 1, -1], [0, 2, -1]])
    found = hubs(answers, 4, is_own=np.array([[True, False, False], [False, True, False]]))
    assert found.counts.tolist() == [1, 1, 0, 0]


def test_nothing_has_no_hub() -> None:
    for answers, size in ((np.zeros((0, 10), dtype=np.int64), 0), (np.full((3, 10), -1), 5)):
        assert not hubs(answers, size, is_own=np.zeros_like(answers, dtype=bool)).found
