"""How similar matched and unmatched pairs are: means and histograms of cosines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cliptune.features.ranks import check_features, slices

NUM_BINS = 400
MAX_HISTOGRAM_IMAGES, MAX_HISTOGRAM_PAIRS = 4096, 2**24
SMALL_BLOCK = 1024  # rows that are copied at once


@torch.no_grad()
def similarity_means(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """Return the mean cosines of matched and unmatched pairs and their gap, of two images, of two texts.

    The last two near 1 when the features collapse. No matrix is built: a sum of products is a product of sums, as in
    a1*b1 + a1*b2 + a2*b1 + a2*b2 = (a1 + a2) * (b1 + b2), so two sums of features give the sum of all N*M cosines.

    Args:
        image_features: unit-norm `[N, D]`.
        text_features: unit-norm `[M, D]`.
        text_to_image: image of each text, int64 `[M]`.
    """
    owners, _ = check_features(image_features, text_features, text_to_image)
    matched = _matched_cosines(image_features, text_features, owners).double()
    image_sum, text_sum = _sum_of_rows(image_features), _sum_of_rows(text_features)
    num_images, num_texts = len(image_features), len(text_features)
    positive = matched.mean().item()
    num_unmatched = (num_images - 1) * num_texts  # each text has one image
    total = (image_sum @ text_sum).item()
    negative = (total - matched.sum().item()) / num_unmatched if num_unmatched else 0.0
    return {
        "positive_similarity": positive,
        "negative_similarity": negative,
        "similarity_gap": positive - negative,
        "image_cosine": _mean_cosine_of_two(image_sum, num_images),
        "text_cosine": _mean_cosine_of_two(text_sum, num_texts),
    }


def _mean_cosine_of_two(total: Tensor, num_rows: int) -> float:
    """Return the mean cosine of two different rows, from the sum of all; 0 or so where there is but one.

    |a + b|^2 = a*a + b*b + 2 a*b: without each row's product with itself, which is 1, all ordered pairs are left.
    """
    return (total.square().sum().item() - num_rows) / max(num_rows * (num_rows - 1), 1)


def _matched_cosines(image_features: Tensor, text_features: Tensor, owners: Tensor) -> Tensor:
    """Return each text's cosine with its own image, float32 `[M]` in main memory."""
    cosines = torch.empty(len(text_features))
    for span in slices(len(text_features), SMALL_BLOCK):
        images = image_features[owners[span].to(image_features.device)].float()
        cosines[span] = torch.linalg.vecdot(images, text_features[span].to(images.device, torch.float32)).cpu()
    return cosines


def _sum_of_rows(features: Tensor) -> Tensor:
    """Return the sum of all rows, float64 `[D]` in main memory."""
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for span in slices(len(features), SMALL_BLOCK):
        total += features[span].float().sum(0).cpu()
    return total


@torch.no_grad()
def similarity_histograms(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    *,
    max_images: int = MAX_HISTOGRAM_IMAGES,
    max_pairs: int = MAX_HISTOGRAM_PAIRS,
) -> dict[str, list[Any]]:
    """Count the cosines of matched and unmatched pairs in 400 equal bins from -1 to 1.

    All matched pairs are counted. Of the unmatched ones too, up to 2^24 pairs; in a larger gallery those of at most
    4,096 images with 4,096 texts (more texts, if there are fewer images), both taken at even distances.

    Args:
        image_features: unit-norm `[N, D]`.
        text_features: unit-norm `[M, D]`.
        text_to_image: image of each text, int64 `[M]`.
        max_images: images whose unmatched pairs are counted.
        max_pairs: pairs of these images with texts that are looked at.

    Returns:
        `bin_edges` (401 numbers), `positive` and `negative` (400 counts each).
    """
    owners, _ = check_features(image_features, text_features, text_to_image)
    rows = _evenly_spaced(len(image_features), max_images)
    columns = _evenly_spaced(len(text_features), max_pairs // len(rows))
    images = image_features[rows.to(image_features.device)].float().cpu()
    row_of_image = torch.full((len(image_features),), -1)
    row_of_image[rows] = torch.arange(len(rows))
    negative = torch.zeros(NUM_BINS, dtype=torch.int64)
    for part in columns.split(SMALL_BLOCK):
        scores = images @ text_features[part.to(text_features.device)].float().cpu().T  # [rows, part]
        # count everything, then take the matched pairs out: fewer than one in a row
        own_row = row_of_image[owners[part]]
        own_column = (own_row >= 0).nonzero().squeeze(1)
        negative += _histogram(scores) - _histogram(scores[own_row[own_column], own_column])
    return {
        "bin_edges": torch.linspace(-1, 1, NUM_BINS + 1).tolist(),
        "positive": _histogram(_matched_cosines(image_features, text_features, owners)).tolist(),
        "negative": negative.tolist(),
    }


def _evenly_spaced(total: int, most: int) -> Tensor:
    """Take at most `most` of `total` indices: 3 of 10 are 0, 3, 6."""
    num_taken = min(total, most)
    return torch.arange(num_taken) * total // num_taken


def _histogram(cosines: Tensor) -> Tensor:
    return torch.histc(cosines.clamp(-1, 1), NUM_BINS, -1, 1).long()
