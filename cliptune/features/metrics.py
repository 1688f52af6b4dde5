"""What ranks say in percent: recalls, mean and median rank, RSum, and their chance level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cliptune.features.ranks import Ranks, retrieval_ranks
from cliptune.features.similarity import similarity_means
from cliptune.results import RECALLS


def compute_retrieval_metrics(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, *, device: torch.device | None = None
) -> dict[str, float]:
    """Compute retrieval metrics over the full gallery, in blocks.

    Args:
        image_features: unit-norm float32 `[N, D]`.
        text_features: unit-norm float32 `[M, D]`.
        text_to_image: image row of each text, int64 `[M]`; an image without text is a distractor.
        device: where the scores are computed; None: where the text features are (see `retrieval_ranks`).

    Returns:
        Recalls `i2t_r1 ... t2i_r10` in percent of the queries, `rsum` (their sum, at most 600), mean and median ranks
        (1 is best), mean cosines of matched and unmatched pairs and their difference, of two images and of two texts.
        An image's rank is that of its best caption, and its other captions do not count (Faghri et al. 2018, VSE++).

    Raises:
        ValueError: shapes that do not fit, features that are not finite, an image row that is not there.
    """
    ranks = retrieval_ranks(image_features, text_features, text_to_image, device=device)
    return {
        **rank_metrics(ranks),
        **similarity_means(image_features, text_features, text_to_image),
    }


def rank_metrics(ranks: Ranks) -> dict[str, float]:
    """Turn ranks into recalls (percent), `rsum`, mean and median ranks (1-based; ties as floor, as in VSE++)."""
    metrics: dict[str, float] = {}
    for direction, values in (("i2t", ranks.i2t), ("t2i", ranks.t2i)):
        for k in RECALLS:
            metrics[f"{direction}_r{k}"] = 100 * (values <= k).double().mean().item()
    metrics["rsum"] = sum(metrics.values())
    for direction, values in (("i2t", ranks.i2t), ("t2i", ranks.t2i)):
        metrics[f"{direction}_mean_rank"] = values.mean().item()
        middle = values.sort().values[(len(values) - 1) // 2 : len(values) // 2 + 1]
        metrics[f"{direction}_median_rank"] = math.floor((middle - 1).mean().item()) + 1
    return metrics


def chance_level(num_images: int, text_to_image: Tensor) -> dict[str, float]:
    """Return the recalls (percent) that random ranks give: for an image with c of M texts, 1 - C(M-c, K) / C(M, K).

    Args:
        num_images: N, images in the gallery, with or without a text.
        text_to_image: image of each text, int64 `[M]`.
    """
    owners = torch.as_tensor(text_to_image).cpu()
    num_texts = len(owners)
    counts = torch.bincount(owners, minlength=num_images)
    chance: dict[str, float] = {}
    for k in RECALLS:
        # K texts are drawn one by one, and each misses: 2 of 10 texts, K = 2: 8/10 * 7/9
        miss = torch.ones(num_images, dtype=torch.float64)
        for drawn in range(min(k, num_texts)):
            miss *= ((num_texts - counts - drawn).clamp(min=0) / (num_texts - drawn)).double()
        chance[f"i2t_r{k}"] = 100 * (1 - miss[counts > 0]).mean().item()
    for k in RECALLS:
        chance[f"t2i_r{k}"] = 100 * min(k / num_images, 1.0)
    chance["rsum"] = sum(chance.values())
    return chance
