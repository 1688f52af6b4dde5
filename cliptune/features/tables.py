"""Evaluations laid out for reading: plain values in, text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cliptune.results import RECALLS
from cliptune.runtime.messages import count


def metrics_table(evaluation: Mapping[str, Any]) -> str:
    """Lay an evaluation out for reading: recalls with their chance, ranks, cosines, encoding speed.

    Args:
        evaluation: values under the keys of `results.EvaluationResults`.
    """
    metrics, chance = evaluation["metrics"], evaluation["chance"]
    head = f"{'':22}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>9}{'median':>8}"
    size = f"{count(evaluation['num_images'], 'image')}, {count(evaluation['num_texts'], 'text')}"
    if any(evaluation["skipped"].values()):
        left_out = (count(number, kind[:-1]) for kind, number in evaluation["skipped"].items() if number)
        size += f" (without {' and '.join(left_out)} that cannot be used)"
    lines = [size, "", head]
    for direction, name in (("i2t", "image to text"), ("t2i", "text to image")):
        recalls = "".join(f"{metrics[f'{direction}_r{k}']:8.1f}" for k in RECALLS)
        ranks = f"{metrics[f'{direction}_mean_rank']:9.1f}{metrics[f'{direction}_median_rank']:8.0f}"
        lines.append(f"{name:22}{recalls}{ranks}")
        lines.append(f"{'  chance':22}" + "".join(f"{chance[f'{direction}_r{k}']:8.2f}" for k in RECALLS))
    lines += [
        "",
        f"{'RSum':22}{metrics['rsum']:8.1f}   (chance {chance['rsum']:.1f}, at most 600)",
        f"{'matched cosine':22}{metrics['positive_similarity']:8.3f}",
        f"{'unmatched cosine':22}{metrics['negative_similarity']:8.3f}",
        f"{'gap':22}{metrics['similarity_gap']:8.3f}",
        "",
        f"{'images/s':22}{evaluation['throughput']['images_per_second']:8.1f}",
        f"{'texts/s':22}{evaluation['throughput']['texts_per_second']:8.1f}",
    ]
    return "\n".join(lines)
