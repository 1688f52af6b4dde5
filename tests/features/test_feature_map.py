"""A map's axes are those of a singular value decomposition, and no modality gap is among them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


GROUPS = """
import numpy as np
from cliptune.features.feature_map import feature_map
meanings = np.repeat([[1.0, 0, 0, 0], [0, 0, 0, 1.0]], 8, 0)
noise = 0.05 * np.random.default_rng(0).normal(size=(2, 16, 4))
found = feature_map(meanings + noise[0], meanings + noise[1], umap=True)
assert (found.method, found.images.shape, found.texts.shape) == ("UMAP", (16, 2), (16, 2))
first, second = (np.concatenate([found.images[part], found.texts[part]]) for part in (slice(8), slice(8, 16)))
centres = first.mean(0), second.mean(0)
for points, (own, other) in ((first, centres), (second, centres[::-1])):
    assert (np.linalg.norm(points - own, axis=1) < np.linalg.norm(points - other, axis=1)).all()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="UMAP is not installed")
def test_umap_keeps_apart_what_differs() -> None:
    """In a process that does not compile: its kernels would take over half a minute."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", GROUPS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_map_by_umap_has_images_before_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for UMAP shows which points it is given."""
    options = {}

    def stand_in(**given: object) -> SimpleNamespace:
        options.update(given)
        return SimpleNamespace(fit_transform=lambda points: points[:, :2])

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=stand_in))
    images, texts = np.arange(12.0).reshape(4, 3) + 5, np.arange(6.0).reshape(2, 3) ** 2
    found = feature_map(images, texts, umap=True)
    assert found.images == pytest.approx((images - images.mean(0))[:, :2])
    assert found.texts == pytest.approx((texts - texts.mean(0))[:, :2])
    assert np.isnan(found.explained)
    assert options == {"n_neighbors": 5, "metric": "cosine", "random_state": 0, "n_jobs": 1}


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match="pip install umap-learn"):
        feature_map(np.eye(4), np.eye(4), umap=True)
