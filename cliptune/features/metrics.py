"""What ranks say in percent: recalls, mean and median rank, RSum, and their chance level."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cliptune.features.ranks import Ranks, retrieval_ranks
from cliptune.results import RECALL_KEYS, RECALLS


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
    chance = _chance("i2t", torch.bincount(owners), len(owners)) | {
        f"t2i_r{k}": 100 * min(k / num_images, 1.0) for k in RECALLS
    }
    return {**chance, "rsum": sum(chance.values())}


def _chance(direction: str, num_matches: Tensor, num_candidates: int) -> dict[str, float]:
    """Return the recalls of queries that have so many matches each, `[Q]`; those without one are no queries."""
    counts = num_matches[num_matches > 0]
    chance: dict[str, float] = {}
    for k in RECALLS:
        # K candidates are drawn one by one, and each misses: 2 of 10 match, K = 2: 8/10 * 7/9
        miss = torch.ones(len(counts), dtype=torch.float64)
        for drawn in range(min(k, num_candidates)):
            miss *= ((num_candidates - counts - drawn).clamp(min=0) / (num_candidates - drawn)).double()
        chance[f"{direction}_r{k}"] = 100 * (1 - miss).mean().item()
    return chance


class Merged(NamedTuple):
    """Images and texts by the protocol that merges equal texts, and images whose files have the same bytes."""

    ranks: Ranks
    """As of the standard protocol, `[images with a text]` and `[M]`: each has that of what it is merged into."""
    is_first: tuple[Tensor, Tensor]
    """Which of these are the first of their kind, and so the queries; bool, in the same shapes."""
    metrics: dict[str, float]
    """`merged_i2t_r1` to `merged_t2i_r10`, `merged_rsum`; `i2t_duplicate_misses`, `t2i_duplicate_misses`: queries of
    the standard protocol that miss at rank 1 by it alone."""
    chance: dict[str, float]
    """Of the merged recalls and their sum."""


def merged_ranks(
    standard: Ranks,
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    *,
    image_kinds: Tensor,
    text_kinds: Tensor,
    device: torch.device | None = None,
) -> Merged:
    """Rank with each distinct text and each distinct image once in the gallery, and once as a query.

    A distinct image matches each distinct text that one of its copies has, and a text each distinct image that has it:
    the rank is that of the best match, as with an image's own captions. So of 60 images of one caption each is right.

    Args:
        standard: ranks of the same features by the standard protocol.
        image_features: float32 `[N, D]`.
        text_features: float32 `[M, D]`.
        text_to_image: image of each text, int64 `[M]`.
        image_kinds: row of the first image that equals each one, int64 `[N]`.
        text_kinds: row of the first text that equals each one, int64 `[M]`.
        device: where the scores are computed, as for `retrieval_ranks`.
    """
    images, image_rows = torch.unique(image_kinds, return_inverse=True)  # [n], [N]
    texts, text_rows = torch.unique(text_kinds, return_inverse=True)  # [m], [M]
    matches = torch.unique(image_rows[text_to_image] * len(texts) + text_rows)
    pairs = torch.stack([matches // len(texts), matches % len(texts)])  # [2, E]
    repeats = len(images) < len(image_kinds) or len(texts) < len(text_kinds)
    found = standard
    if repeats:  # else the numbers are the same
        found = retrieval_ranks(image_features[images], text_features[texts], pairs, device=device)
    with_text = torch.unique(text_to_image)
    rank_of_image = torch.full((len(images),), math.nan, dtype=torch.float64)
    rank_of_image[pairs[0].unique()] = found.i2t
    ranks = Ranks(rank_of_image[image_rows[with_text]], found.t2i[text_rows])
    metrics = _prefixed({key: value for key, value in rank_metrics(found).items() if key in _SUMMED})
    chance = _chance("i2t", pairs[0].bincount(), len(texts)) | _chance("t2i", pairs[1].bincount(), len(images))
    for direction, by_standard, merged in (("i2t", standard.i2t, ranks.i2t), ("t2i", standard.t2i, ranks.t2i)):
        metrics[f"{direction}_duplicate_misses"] = int(((by_standard > 1) & (merged <= 1)).sum())
    first_image = _is_first(image_rows[with_text])
    return Merged(
        ranks, (first_image, _is_first(text_rows)), metrics, _prefixed({**chance, "rsum": sum(chance.values())})
    )


_SUMMED = (*RECALL_KEYS, "rsum")


def _is_first(rows: Tensor) -> Tensor:
    """Tell which entries are the first of their value: 3 1 3 -> yes yes no."""
    first = torch.full((int(rows.max()) + 1,), len(rows)).scatter_reduce_(0, rows, torch.arange(len(rows)), "amin")
    return first[rows] == torch.arange(len(rows))


def _prefixed(values: dict[str, float]) -> dict[str, float]:
    return {f"merged_{key}": value for key, value in values.items()}
