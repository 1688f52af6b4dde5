"""How similar matched and unmatched pairs are: means and histograms of cosines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cliptune.features.ranks import _check_features, _slices

NUM_BINS = 100


MAX_HISTOGRAM_IMAGES, MAX_HISTOGRAM_PAIRS = 4096, 2**24


SMALL_BLOCK = 1024  # rows that are copied at once


@torch.no_grad()
def similarity_means(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """Return the mean cosines of matched and unmatched pairs and their gap, of two images, of two texts.

    The last two near 1 when the features collapse. No matrix is built.
    """
    owners = _check_features(image_features, text_features, text_to_image)
    matched = _matched_cosines(image_features, text_features, owners).double()
    sums = _sum_of_rows(image_features), _sum_of_rows(text_features)
    total = (sums[0] @ sums[1]).item()
    positive = matched.mean().item()
    unmatched = len(image_features) * len(text_features) - len(text_features)
    negative = (total - matched.sum().item()) / unmatched if unmatched else 0.0
    of_two = {
        f"{name}_cosine": (each.square().sum().item() - len(rows)) / max(len(rows) * (len(rows) - 1), 1)
        for name, each, rows in zip(("image", "text"), sums, (image_features, text_features), strict=True)
    }
    gap = positive - negative
    return {"positive_similarity": positive, "negative_similarity": negative, "similarity_gap": gap, **of_two}


def _matched_cosines(image_features: Tensor, text_features: Tensor, owners: Tensor) -> Tensor:
    """Return each text's cosine with its own image, float32 `[M]` in main memory."""
    cosines = torch.empty(len(text_features))
    for span in _slices(len(text_features), SMALL_BLOCK):
        images = image_features[owners[span].to(image_features.device)].float()
        cosines[span] = torch.linalg.vecdot(images, text_features[span].to(images.device, torch.float32)).cpu()
    return cosines


def _sum_of_rows(features: Tensor) -> Tensor:
    """Return the sum of all rows, float64 `[D]` in main memory."""
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for span in _slices(len(features), SMALL_BLOCK):
        total += features[span].float().sum(0).cpu()
    return total


@torch.no_grad()
def similarity_histograms(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> dict[str, list[Any]]:
    """Count the cosines of matched and unmatched pairs in 100 equal bins from -1 to 1.

    All matched pairs are counted. Of the unmatched ones too, up to 2^24 pairs; in a larger gallery those of at most
    4,096 images with 4,096 texts (more texts, if there are fewer images), both taken at even distances.
    """
    owners = _check_features(image_features, text_features, text_to_image)
    rows = _evenly_spaced(len(image_features), MAX_HISTOGRAM_IMAGES)
    columns = _evenly_spaced(len(text_features), MAX_HISTOGRAM_PAIRS // len(rows))
    images = image_features[rows.to(image_features.device)].float().cpu()
    row_of_image = torch.full((len(image_features),), -1)
    row_of_image[rows] = torch.arange(len(rows))
    negative = torch.zeros(NUM_BINS, dtype=torch.int64)
    for part in columns.split(SMALL_BLOCK):
        scores = images @ text_features[part.to(text_features.device)].float().cpu().T
        own_row = row_of_image[owners[part]]
        own_column = (own_row >= 0).nonzero().squeeze(1)
        negative += _histogram(scores) - _histogram(scores[own_row[own_column], own_column])
    return {
        "bin_edges": torch.linspace(-1, 1, NUM_BINS + 1).tolist(),
        "positive": _histogram(_matched_cosines(image_features, text_features, owners)).tolist(),
        "negative": negative.tolist(),
    }


def _evenly_spaced(total: int, most: int) -> Tensor:
    number = min(total, most)
    return torch.arange(number) * total // number


def _histogram(cosines: Tensor) -> Tensor:
    return torch.histc(cosines.clamp(-1, 1), NUM_BINS, -1, 1).long()
