"""A map's axes are those of a singular value decomposition, and no modality gap is among them."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from cliptune.features.feature_map import feature_map


def test_it_is_what_a_singular_value_decomposition_gives() -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(40, 16)) + 3, rng.normal(size=(80, 16)) - 2
    found = feature_map(images, texts)
    points = np.concatenate([images - images.mean(0), texts - texts.mean(0)])
    _, values, axes = np.linalg.svd(points, full_matrices=False)
    assert np.abs(np.concatenate([found.images, found.texts])) == pytest.approx(np.abs(points @ axes[:2].T))
    assert found.explained == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())
    assert found.method == "PCA"


def test_images_and_captions_that_say_the_same_lie_together() -> None:
    meanings = np.random.default_rng(0).normal(size=(50, 8)) * np.arange(8, 0, -1)
    found = feature_map(meanings + 100, meanings - 100)
    assert found.images == pytest.approx(found.texts)


def test_of_many_a_part_is_shown_and_counted() -> None:
    values = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float16)
    values[7] = np.nan
    found = feature_map(values, values[:3], max_points=10)
    assert (found.num_images, found.num_texts, len(found.images), len(found.texts)) == (99, 3, 10, 3)
    assert found.image_rows[[0, -1]].tolist() == [0, 99]
    assert 7 not in feature_map(values, values[:3]).image_rows
    assert np.isfinite(found.images).all()


@pytest.mark.parametrize("num", [0, 1, 2])
def test_few_points_have_a_map(num: int) -> None:
    found = feature_map(np.ones((num, 5)), np.ones((num, 5)))
    assert found.images.shape == (num, 2)
    assert not found.images.any()


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match="pip install umap-learn"):
        feature_map(np.eye(4), np.eye(4), umap=True)
