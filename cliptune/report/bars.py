"""What a model retrieves and how similar it finds pairs: bars of recall beside chance, similarity distributions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cliptune.recorded import Bounds, Verdict, shown_epoch
from cliptune.report.palette import BEST, BLUE, GREY, INK, LOADED, MATCHED, UNMATCHED
from cliptune.report.style import (
    MAX_NAME,
    NAME,
    add_legend,
    drawable,
    finish,
    headline,
    merged_prefix,
    new_figure,
    set_head,
    set_title,
)
from cliptune.results import (
    RECALL_KEYS,
    RECALLS,
    EvaluationResults,
    Histograms,
    Metrics,
    Results,
    SeveralEvaluations,
    TestResults,
    TrainingResults,
)
from cliptune.runtime.messages import count, printable, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Array = np.ndarray[Any, Any]

MAX_WIDTH = 40
"""Inches of a figure of many panels."""
SLOTS = np.array([0, 1, 2, 3.35, 4.35, 5.35])
"""Where the bars of each recall stand, the two directions apart."""
AS_LOADED = "as loaded"
MIN_BINS = 5
"""Of a distribution that is more than a point."""


def model_metrics_figure(results: TrainingResults) -> Figure:
    """Draw a run's retrieval and similarities, the best epoch beside the model as loaded."""
    title, of = f"{shown(results.model_name, MAX_NAME)}: {headline(results)}", results.test or results
    histograms, prefix = of.histograms, merged_prefix(results)
    if results.best_epoch == 0:  # then the two are one and the same
        return _metrics_figure(
            of, {AS_LOADED: of.baseline}, [histograms.best], title=title, prefix=prefix, intervals={}
        )
    columns = {AS_LOADED: of.baseline, f"best epoch: {shown_epoch(results.best_epoch)}": of.metrics}
    intervals = {} if results.verdict is None else _ends(of.baseline, results.verdict, prefix)
    both = [histograms.baseline, histograms.best]
    return _metrics_figure(of, columns, both, title=title, prefix=prefix, intervals=intervals)


def evaluation_metrics_figure(results: EvaluationResults) -> Figure:
    """Draw an evaluation's retrieval and similarities."""
    model = "" if results.run is None else results.run.model_name
    named = {"checkpoint": Path(results.checkpoint).name, "data": Path(results.data).name, "split": results.split}
    titled = [("model", model), *named.items()] if model else named.items()
    title = ", ".join(f"{key} {shown(name, MAX_NAME)}" for key, name in titled if name).removeprefix("model ")
    columns, intervals = {"evaluated": results.metrics}, results.intervals
    return _metrics_figure(results, columns, [results.histograms], title=title, intervals=intervals)


def comparison_figure(results: SeveralEvaluations) -> Figure:
    """Draw RSum of several checkpoints with its intervals, a panel for each data set."""
    sets = list(dict.fromkeys((each.data, each.split) for each in results.evaluations))
    names = list(dict.fromkeys(each.checkpoint for each in results.evaluations))[::-1]  # the first one on top
    figure = new_figure(min(4 + 5 * len(sets), MAX_WIDTH), min(2.5 + 0.45 * len(names), MAX_WIDTH))
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, sets, strict=True):
        own = [each for each in results.evaluations if (each.data, each.split) == key]
        for each in own:
            row, value = names.index(each.checkpoint), each.metrics.rsum
            low, high = each.intervals.get("rsum", (value, value))
            axes.plot([low, high], [row, row], color=LOADED, linewidth=5, solid_capstyle="butt")
            axes.plot([value], [row], "o", color=BLUE)
            axes.annotate(f"{value:.1f}", (value, row), xytext=(0, 6), textcoords="offset points", ha="center")
        axes.axvline(own[0].chance.rsum, color=GREY, linewidth=1.2, linestyle=":")
        finish(axes)
        axes.grid(visible=False)
        axes.set_xlabel("RSum, 95% interval (dotted: chance)")
        title, families = drawable(f"{shown(Path(key[0]).name, MAX_NAME)} ({shown(key[1], MAX_NAME)})")
        axes.set_title(title, parse_math=False, fontfamily=families, loc="left", fontweight="bold", color=INK, gid=NAME)
    texts = [drawable(_end_of(name)) for name in names]
    panels[0].set_yticks(range(len(names)), [text for text, _ in texts], parse_math=False)
    for tick, (_, families) in zip(panels[0].get_yticklabels(), texts, strict=True):
        tick.set(fontfamily=families, gid=NAME)
    panels[0].set_ylim(-0.6, len(names) - 0.3)
    return figure


def _end_of(name: str) -> str:
    """Return what tells a path from others: its end."""
    name = printable(name)
    return name if len(name) <= MAX_NAME else f"...{name[-MAX_NAME:]}"


def _ends(loaded: Metrics, verdict: Verdict, prefix: str) -> dict[str, Bounds]:
    """Return where bars may end on other images, as far as the model as loaded is where it is."""
    if verdict.merged != bool(prefix):  # the verdict is about other numbers than the bars
        return {}
    return {
        key: tuple(min(max(getattr(loaded, prefix + key) + gain, 0.0), 100.0) for gain in verdict.recalls[key][1:])
        for key in RECALL_KEYS
    }  # fmt: skip


def _metrics_figure(
    results: Results | TestResults,
    columns: dict[str, Metrics],
    histograms: list[Histograms],
    *,
    title: str,
    prefix: str = "",
    intervals: dict[str, Bounds],
) -> Figure:
    """Draw retrieval beside similarities: of the last column and the last histograms, and of one as loaded before."""
    figure = new_figure(16, 6.4)
    bars, densities = figure.subplots(1, 2, width_ratios=(3, 2))
    *before, metrics = columns.values()
    _draw_recalls(bars, columns, results, prefix=prefix, intervals=intervals)
    rsums = f"RSum {getattr(metrics, f'{prefix}rsum'):.1f}"
    rsums += "".join(f", as loaded {getattr(baseline, f'{prefix}rsum'):.1f}" for baseline in before)
    sizes = f"{count(results.num_images, 'image')}, {count(results.num_texts, 'text')}"
    set_head(bars, f"Retrieval{', duplicates merged' if prefix else ''}: {rsums}", "percent of queries", sizes)
    _draw_similarities(densities, histograms[-1], histograms[0] if before else None)
    gaps = _gap(metrics) + "".join(f", as loaded {_gap(baseline)}" for baseline in before)
    set_head(densities, f"Similarity: gap {gaps}", "percent of the pairs, for each 0.01 of cosine")
    add_legend(figure, (bars, densities), loc="outside lower center", ncols=8)
    set_title(figure, title)
    return figure


def _gap(metrics: Metrics) -> str:
    return f"{round(metrics.similarity_gap, 3) + 0.0:.3f}"  # + 0.0: never "-0.000"


def _draw_recalls(
    axes: Axes,
    columns: dict[str, Metrics],
    results: Results | TestResults,
    *,
    prefix: str,
    intervals: dict[str, Bounds],
) -> None:
    keys, width = [f"{prefix}{key}" for key in RECALL_KEYS], 0.84 / len(columns)
    chance = [getattr(results.chance, key) for key in keys]
    values = {label: [getattr(metrics, key) for key in keys] for label, metrics in columns.items()}
    ends = [intervals[key] for key in RECALL_KEYS if key in intervals]
    top = 1.08 * max(5.0, *chance, *(max(each) for each in values.values()), *(high for _, high in ends))
    axes.set_ylim(0, top)
    centers = SLOTS
    for index, (label, heights) in enumerate(values.items()):
        centers = SLOTS + (index - (len(columns) - 1) / 2) * width
        is_last = index == len(columns) - 1
        color = LOADED if label == AS_LOADED else BEST
        axes.bar(centers, heights, width * 0.96, label=label, color=color)
        has_bar = bool(ends) and is_last  # a bar of an interval stands right of the number
        for center, height, level in zip(centers, heights, chance, strict=True):
            place = center - (0.13 * width if has_bar else 0)
            _write_value(axes, (place, height), chance=level, on_dark=color == BEST)
    if len(ends) == len(SLOTS):
        lows, highs = zip(*ends, strict=True)
        label = "95% interval" if len(columns) == 1 else "95% interval of the gain"
        halo = axes.vlines(centers + 0.35 * width, lows, highs, color="white", linewidth=4.5)
        halo.set_capstyle("round")
        axes.vlines(centers + 0.35 * width, lows, highs, color=INK, linewidth=2, label=label)
    axes.hlines(chance, SLOTS - 0.45, SLOTS + 0.45, color="white", linewidth=3)
    axes.hlines(chance, SLOTS - 0.45, SLOTS + 0.45, color=INK, linewidth=1.5, linestyle=":", label="chance")
    axes.set_xticks(SLOTS, [f"R@{k}" for k in RECALLS] * 2)
    for middle, direction in ((SLOTS[1], "image→text"), (SLOTS[4], "text→image")):
        where: dict[str, Any] = {"xy": (middle, 0), "xycoords": axes.get_xaxis_transform(), "xytext": (0, -24)}
        axes.annotate(direction, **where, textcoords="offset points", ha="center", va="top", fontsize=10, color=INK)
    finish(axes)


def _write_value(axes: Axes, end: tuple[float, float], *, chance: float, on_dark: bool) -> None:
    """Write a bar's number inside its end, or above a bar that is too low for it; and not across the chance level."""
    center, height = end
    room = 0.07 * axes.get_ylim()[1]
    place = chance if height - room < chance < height else height
    is_inside = place > room
    if not is_inside:
        place = chance if height < chance < height + room else height
    where: dict[str, Any] = {"xytext": (0, -4 if is_inside else 3), "textcoords": "offset points", "ha": "center"}
    color = "white" if is_inside and on_dark else INK
    va = "top" if is_inside else "bottom"
    axes.annotate(f"{height:.1f}", (center, place), **where, va=va, color=color, fontsize=9.5, zorder=5)


def _draw_similarities(axes: Axes, histograms: Histograms, baseline: Histograms | None) -> None:
    drawn = []
    for key, label, color in (("positive", "matched pairs", MATCHED), ("negative", "unmatched pairs", UNMATCHED)):
        density, edges = _density(histograms, key)
        axes.stairs(density, edges, fill=True, alpha=0.45, color=color, label=label)
        drawn.append((density, edges))
        if baseline is not None:
            density, edges = _density(baseline, key)
            look: dict[str, Any] = {"color": color, "linestyle": "--", "linewidth": 1.4}
            axes.stairs(density, edges, **look, label=f"{label}, as loaded")
            drawn.append((density, edges))
    # of one image there is no unmatched pair
    spans = [_span(density, edges) for density, edges in drawn if density.any()] or [(-1.0, 1.0)]
    axes.set_xlim(min(low for low, _ in spans), max(high for _, high in spans))
    axes.set_xlabel("cosine similarity")
    finish(axes)


def _density(histograms: Histograms, key: str) -> tuple[Array, Array]:
    """Return the percentage of the pairs for each 0.01 of cosine, and the edges of its bins.

    The percentage for 0.01 is the density: of 100 pairs in a bin of 0.02 all are 100% of the pairs, 50% for each 0.01.
    """
    counts, edges = (np.asarray(getattr(histograms, name), dtype=float) for name in (key, "bin_edges"))
    counts, edges = _fewer_bins(counts, edges)
    filled = np.flatnonzero(counts)
    if len(filled):  # no line along the axis where there is no pair
        counts, edges = counts[filled[0] : filled[-1] + 1], edges[filled[0] : filled[-1] + 2]
    return counts / (max(counts.sum(), 1.0) * np.diff(edges)), edges


def _fewer_bins(counts: Array, edges: Array) -> tuple[Array, Array]:
    """Join bins that are narrower than so many pairs can fill, by the rule of Freedman and Diaconis (1981).

    Bins are twice the interquartile range over the third root of the number of pairs wide: of 120 pairs, half of them
    within 0.1, that is 0.04.
    """
    total = counts.sum()
    if total < 1 or len(counts) < 2 * MIN_BINS:
        return counts, edges
    low, high = np.interp([0.25 * total, 0.75 * total], np.cumsum(counts), edges[1:])
    width = 2 * (high - low) / total ** (1 / 3)
    joined = math.ceil(width / float(np.diff(edges).mean()))
    joined = min(max(joined, 1), len(counts) // MIN_BINS)
    starts = np.arange(0, len(counts), joined)
    return np.add.reduceat(counts, starts), np.append(edges[starts], edges[-1])


def _span(density: Array, edges: Array) -> tuple[float, float]:
    """Find where a density can be seen, with a margin at each side."""
    seen = np.flatnonzero(density > 0.002 * density.max())
    low, high = float(edges[seen[0]]), float(edges[seen[-1] + 1])
    margin = max(0.05 * (high - low), 0.03)  # of a single pair, too
    return low - margin, high + margin
