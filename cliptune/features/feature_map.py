"""A map of features: images and captions as points of a plane."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MAX_POINTS = 2000
"""Of each modality."""


class FeatureMap(NamedTuple):
    """Points of images and of captions; of large sets evenly spaced ones."""

    method: str
    """`PCA` or `UMAP`."""
    images: Array
    """`[n, 2]`."""
    image_rows: Array
    """`[n]`: which images these are."""
    texts: Array
    """`[m, 2]`."""
    text_rows: Array
    """`[m]`: which captions these are."""
    num_images: int
    """That have features, of which the n are a part."""
    num_texts: int
    explained: float
    """Fraction of the variance that PCA's two axes show; NaN for UMAP, which has none."""


def feature_map(
    image_features: Array, text_features: Array, *, max_points: int = MAX_POINTS, umap: bool = False
) -> FeatureMap:
    """Lay images and captions out in one plane, near to each other where their features are.

    Images lie in one cone of CLIP's space and captions in another (Liang et al., "Mind the Gap", NeurIPS 2022): the
    first axis would show that alone, so each modality is centred on its own.

    Args:
        image_features: `[N, D]`; rows with NaN are left out.
        text_features: `[M, D]`.
        max_points: images, and captions, that are shown at most.
        umap: lay out with UMAP in place of PCA.

    Raises:
        ValueError: `umap` and its package is not installed.
    """
    image_rows, num_images = _evenly(image_features, max_points)
    text_rows, num_texts = _evenly(text_features, max_points)
    images, texts = _centred(image_features[image_rows]), _centred(text_features[text_rows])
    points = np.concatenate([images, texts])  # [n + m, D]
    places, explained = (_umap(points), float("nan")) if umap else _pca(points)
    at = len(images)
    return FeatureMap(
        "UMAP" if umap else "PCA", places[:at], image_rows, places[at:], text_rows, num_images, num_texts, explained
    )


def _evenly(features: Array, max_points: int) -> tuple[Array, int]:
    rows = np.flatnonzero(np.isfinite(features).all(1))
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), max_points)).astype(np.int64)
    return rows[chosen], len(rows)


def _centred(features: Array) -> Array:
    values = features.astype(np.float64)
    return values - values.mean(0) if len(values) else values


def _pca(points: Array) -> tuple[Array, float]:
    """Return coordinates `[P, 2]` on the two axes of most variance, and the fraction of it that they show."""
    # D is some hundreds: the covariance [D, D] is smaller than the points
    variances, axes = np.linalg.eigh(points.T @ points)
    axes = axes[:, ::-1][:, :2]  # the highest first
    # an axis may point either way: its largest part is positive, so that a map comes out the same each time
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    total = float(variances.sum())
    places = np.zeros((len(points), 2))
    places[:, : axes.shape[1]] = points @ axes
    return places, float(variances[-2:].sum()) / total if total > 0 else 0.0


def _umap(points: Array) -> Array:
    try:
        module = importlib.import_module("umap")
    except ImportError:
        raise ValueError("UMAP is not installed; try `pip install umap-learn`, or PCA") from None
    neighbours = min(15, len(points) - 1)
    places: Array = module.UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1).fit_transform(points)
    return places
