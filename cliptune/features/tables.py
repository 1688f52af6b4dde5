"""Evaluations laid out for reading: plain values in, text out."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from cliptune.results import RECALL_KEYS, RECALLS, Comparison
from cliptune.runtime.messages import count, printable

MAX_NAME = 44
"""Characters of a checkpoint's name in a table."""
Values = Mapping[str, Any]
"""An evaluation under the keys of `results.EvaluationResults`."""

CEILING_SHOWN = 599.0
"""RSum of a perfect model below which it is shown."""


def evaluation_report(evaluations: Sequence[Values], comparisons: Sequence[Comparison]) -> str:
    """Lay out what was evaluated: a table for each data set, and an overview of several.

    Args:
        evaluations: of each checkpoint on each data set.
        comparisons: of the checkpoints, two by two.
    """
    if len(evaluations) == 1:
        return metrics_table(evaluations[0])
    names = list(dict.fromkeys(values["checkpoint"] for values in evaluations))
    sets: dict[tuple[str, str], list[Values]] = {}
    for values in evaluations:
        sets.setdefault((values["data"], values["split"]), []).append(values)
    parts = []
    for key, own in sets.items():
        found = [each for each in comparisons if (each.data, each.split) == key]
        title = f"{printable(key[0])} ({key[1]}): "
        parts.append(title + (metrics_table(own[0]) if len(own) == 1 else _paired_table(own, found, names)))
    return "\n\n".join(parts if len(sets) == 1 else [*parts, _overview(sets, names)])


def _paired_table(evaluations: Sequence[Values], comparisons: Sequence[Comparison], names: list[str]) -> str:
    """Lay out several checkpoints on the same images, a row each, and what each gains over those above it."""
    width = _width(names)
    lines = [_size(evaluations[0]), "", f"{'':{width}}{'image to text':>24}{'text to image':>24}"]
    cuts = "".join(f"{f'R@{k}':>8}" for k in RECALLS)
    repeats = any(has_repeats(values["metrics"]) for values in evaluations)
    merged = f"{'merged':>9}" if repeats else ""  # RSum with duplicates merged
    lines.append(f"{'':{width}}{cuts}{cuts}{'RSum':>9}{merged}   95% interval")
    for values in evaluations:
        recalls = "".join(f"{values['metrics'][key]:8.1f}" for key in RECALL_KEYS)
        name = _row_name(values["checkpoint"], names)
        rsums = f"{values['metrics']['rsum']:9.1f}" + (f"{values['metrics']['merged_rsum']:9.1f}" if repeats else "")
        lines.append(f"{name:{width}}{recalls}{rsums}   {_bounds(values, 'rsum')}".rstrip())
    chance = evaluations[0]["chance"]
    lines.append(
        f"{'  chance':{width}}" + "".join(f"{chance[key]:8.2f}" for key in RECALL_KEYS) + f"{chance['rsum']:9.1f}"
    )
    how = "; captions are classes, so duplicates are merged" if any(each.merged for each in comparisons) else ""
    compared = f"gain in RSum on the same images, with its 95% interval{how}"
    lines += ["", compared if comparisons else "one group of images: nothing to compare by"]
    for each in comparisons:
        pair = f"{names.index(each.after) + 1} over {names.index(each.before) + 1}"
        lines.append(f"{pair:12}{each.gain:+8.1f}   ({each.low:+.1f} to {each.high:+.1f})   {each.verdict}")
    return "\n".join(lines)


def _overview(sets: Mapping[tuple[str, str], Sequence[Values]], names: list[str]) -> str:
    """Lay out RSum of each checkpoint on each data set."""
    width = _width(names)
    lines = ["RSum, with its 95% interval"]
    lines += [f"  {chr(ord('A') + i % 26)}  {printable(data)} ({split})" for i, (data, split) in enumerate(sets)]
    lines.append(f"{'':{width}}" + "".join(f"{chr(ord('A') + i % 26):>24}" for i in range(len(sets))))
    for name in names:
        cells = [values for own in sets.values() for values in own if values["checkpoint"] == name]
        shown = [f"{values['metrics']['rsum']:.1f} ({_bounds(values, 'rsum')})" for values in cells]
        lines.append(f"{_row_name(name, names):{width}}" + "".join(f"{cell.removesuffix(' ()'):>24}" for cell in shown))
    return "\n".join(lines)


def _row_name(name: str, names: list[str]) -> str:
    """Number a checkpoint; of a long name the end tells it from others."""
    shown = printable(name)
    return f"{names.index(name) + 1}  {shown if len(shown) <= MAX_NAME else '...' + shown[3 - MAX_NAME :]}"


def _width(names: list[str]) -> int:
    return max(len(_row_name(name, names)) for name in names) + 1


def _bounds(values: Values, key: str) -> str:
    """Say the interval of a metric: `380.1 to 402.3`; nothing where there is none."""
    bounds = values["intervals"].get(key)
    return "" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def has_repeats(metrics: Mapping[str, float]) -> bool:
    """Tell whether merging duplicates changes a number."""
    return metrics.get("merged_rsum", metrics["rsum"]) != metrics["rsum"]


def _size(values: Values) -> str:
    """Say what was ranked, and what is missing from it."""
    size = f"{count(values['num_images'], 'image')}, {count(values['num_texts'], 'text')}"
    missing = [count(number, kind[:-1]) for kind, number in values["skipped"].items() if number]
    reasons = [f"{' and '.join(missing)} that cannot be used"] if missing else []
    if values["num_left_out"]:
        reasons.append(f"{count(values['num_left_out'], 'image')} that were trained on")
    if values.get("excluded"):
        reasons.append(f"{count(values['excluded']['pairs'], 'pair')} that --exclude leaves out")
    return size + (f" (without {', and '.join(reasons)})" if reasons else "")


def metrics_table(evaluation: Values) -> str:
    """Lay one evaluation out: recalls with their intervals and chance, ranks, cosines, encoding speed."""
    metrics, chance, intervals = evaluation["metrics"], evaluation["chance"], evaluation["intervals"]
    head = f"{'':22}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>9}{'median':>8}"
    lines = [_size(evaluation), "", head]
    repeats = has_repeats(metrics)
    for direction, name in (("i2t", "image to text"), ("t2i", "text to image")):
        keys = [f"{direction}_r{k}" for k in RECALLS]
        recalls = "".join(f"{metrics[key]:8.1f}" for key in keys)
        ranks = f"{metrics[f'{direction}_mean_rank']:9.1f}{metrics[f'{direction}_median_rank']:8.0f}"
        lines.append(f"{name:22}{recalls}{ranks}")
        if intervals:
            cells = (f"{intervals[key][0]:.0f}-{intervals[key][1]:.0f}" for key in keys)
            lines.append(f"{'  95% interval':22}" + "".join(f"{cell:>8}" for cell in cells))
        lines.append(f"{'  chance':22}" + "".join(f"{chance[key]:8.2f}" for key in keys))
        if repeats:
            merged = "".join(f"{metrics[f'merged_{key}']:8.1f}" for key in keys)
            num_duplicates = metrics[f"{direction}_duplicate_misses"]
            lines.append(f"{'  duplicates merged':22}{merged}   {num_duplicates:,} of the R@1 misses were duplicates")
    interval = f"95% interval {_bounds(evaluation, 'rsum')}, " if intervals else ""
    ceiling = metrics.get("ceiling_rsum", 600.0)
    at_most = f"a perfect model has {ceiling:.1f}, since captions repeat" if ceiling < CEILING_SHOWN else "at most 600"
    lines += ["", f"{'RSum':22}{metrics['rsum']:8.1f}   ({interval}chance {chance['rsum']:.1f}, {at_most})"]
    if repeats:
        interval = f"95% interval {_bounds(evaluation, 'merged_rsum')}, " if intervals else ""
        of_merged = f"{metrics['merged_rsum']:8.1f}   ({interval}chance {chance['merged_rsum']:.1f}, at most 600)"
        lines.append(f"{'  duplicates merged':22}{of_merged}")
    lines += [
        f"{'matched cosine':22}{metrics['positive_similarity']:8.3f}",
        f"{'unmatched cosine':22}{metrics['negative_similarity']:8.3f}",
        f"{'gap':22}{metrics['similarity_gap']:8.3f}",
        "",
        f"{'images/s':22}{evaluation['throughput']['images_per_second']:8.1f}",
        f"{'texts/s':22}{evaluation['throughput']['texts_per_second']:8.1f}",
    ]
    if evaluation["num_trained_on"]:
        lines.append(f"{'trained on':22}{evaluation['num_trained_on']:8,}   of these images")
    return "\n".join(lines)


def metrics_html(evaluation: Values) -> str:
    """Lay one evaluation out for a notebook: recalls in %, ranks, and the recalls that chance has."""
    metrics, chance = evaluation["metrics"], evaluation["chance"]
    rows = [("", *(f"R@{k}" for k in RECALLS), "mean rank", "median rank")]
    for direction, name in (("i2t", "image to text"), ("t2i", "text to image")):
        keys = [f"{direction}_r{k}" for k in RECALLS]
        ranks = f"{metrics[f'{direction}_mean_rank']:.1f}", f"{metrics[f'{direction}_median_rank']:.0f}"
        rows.append((name, *(f"{metrics[key]:.1f}" for key in keys), *ranks))
        rows.append(("chance", *(f"{chance[key]:.2f}" for key in keys), "", ""))
        if has_repeats(metrics):
            rows.append(("duplicates merged", *(f"{metrics[f'merged_{key}']:.1f}" for key in keys), "", ""))
    caption = (
        f"{_size(evaluation)}: RSum {metrics['rsum']:.1f} (chance {chance['rsum']:.1f}), "
        f"matched cosine {metrics['positive_similarity']:.3f}, unmatched {metrics['negative_similarity']:.3f}"
    )
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    lines[0] = lines[0].replace("td>", "th>")
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n<caption>{html.escape(caption)}</caption>\n{body}\n</table>"
