"""Curves, densities and bars as coordinates, which a page's template makes SVG of."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cliptune.recorded import comparable, shown_epoch
from cliptune.results import Histograms, TrainingResults, selection_key

WIDTH, HEIGHT = 400.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 392.0, 12.0, 204.0
"""Of the plotted area, in units of the SVG."""
MIN_BARS, MAX_BARS = 14, 60
"""Of a density, by the number of matched pairs; the file may have hundreds of bins."""
MAX_MARKED = 40


class Series(NamedTuple):
    """A curve."""

    name: str
    role: str
    """Its class, which the style sheet gives a colour and a dash."""
    points: Sequence[tuple[float, float]]
    is_level: bool = False
    """A line at one height, which is not read out."""


class Path(NamedTuple):
    """A curve in coordinates."""

    name: str
    role: str
    line: str
    dots: list[tuple[float, float]]


class Chart(NamedTuple):
    """All that the template needs to draw and to read out."""

    title: str
    unit: str
    x_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[Path]
    stops: str
    """JSON: the places at which it is read out, `[x, text, [y, ...]]` each."""
    first: str
    num_stops: int


def curves(results: TrainingResults) -> list[Chart]:
    """Return loss, R@1, RSum and rates over the epochs."""
    history, chance = results.history, results.chance
    span = [history[0].epoch, history[-1].epoch]
    prefix = selection_key(results.baseline.model_dump()).removesuffix("rsum")

    def of(key: str) -> list[tuple[float, float]]:
        records = history if key.startswith("train_") else comparable(history)
        found = [(record.epoch, getattr(record, key, None)) for record in records]
        return [(epoch, value) for epoch, value in found if value is not None]

    def at_chance(key: str) -> Series:
        value = getattr(chance, key, None)
        return Series("chance", "chance", [] if value is None else [(x, value) for x in span], is_level=True)

    kind = "Merged " if prefix else ""
    loss = [Series("training", "training", of("train_loss")), Series("validation", "validation", of("val_loss"))]
    r1 = [
        Series("image to text", "i2t", of(f"{prefix}i2t_r1")),
        Series("text to image", "t2i", of(f"{prefix}t2i_r1")),
    ]
    watched = [
        Series(name, f"watched-{index % 4}", points)
        for index, (name, points) in enumerate(results.watched_curves().items())
    ]
    rsum = [Series("validation", "validation", of(f"{prefix}rsum")), *watched, at_chance(f"{prefix}rsum")]
    return [
        line_chart("Loss", "nats", "epoch", [*loss, at_chance("val_loss")]),
        line_chart(f"{kind}R@1", "percent", "epoch", [*r1, at_chance(f"{prefix}i2t_r1")]),
        line_chart(f"{kind}RSum", "of 600", "epoch", rsum),
        _rates(results),
    ]


def _rates(results: TrainingResults) -> Chart:
    last = results.history[-1]
    steps_per_epoch = last.step / last.epoch if last.epoch else 0
    places: list[tuple[float, float, float | None]] = [
        (record.epoch, record.learning_rate, record.backbone_learning_rate) for record in results.history
    ]
    if results.schedule and steps_per_epoch:
        places = [
            (point.step / steps_per_epoch, point.learning_rate, point.backbone_learning_rate)
            for point in results.schedule
        ]
    return line_chart("Learning rates", "planned" if results.schedule else "as evaluated", "epoch", [
        Series("towers", "validation", [(x, rate) for x, _, rate in places if rate is not None]),
        Series("projections", "t2i", [(x, rate) for x, rate, _ in places]),
    ])  # fmt: skip


def line_chart(title: str, unit: str, x_name: str, series: Sequence[Series]) -> Chart:
    """Lay out curves; what has no points is left away."""
    series = [each for each in series if each.points]
    xs = [x for each in series for x, _ in each.points] or [0.0]
    ys = [y for each in series for _, y in each.points] or [0.0]
    low, high = min(xs), max(xs)
    lowest, highest = min(ys), max(ys)
    # zero stands on the axis unless the curve would be flat
    y_places = _ticks(min(lowest, 0.0) if lowest < 0.4 * highest else lowest, highest)
    y_low, y_high = min(y_places[0], lowest), max(y_places[-1], highest)

    def x_of(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * ((x - low) / (high - low) if high > low else 0.5), 1)

    def y_of(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (y - y_low) / (y_high - y_low), 1)

    paths = []
    for each in series:
        dots = [(x_of(x), y_of(y)) for x, y in each.points]
        line = "M" + "L".join(f"{x},{y}" for x, y in dots)
        paths.append(Path(each.name, each.role, line, [] if each.is_level or len(dots) > MAX_MARKED else dots))
    read = [each for each in series if not each.is_level]
    stops: list[tuple[float, str, list[float]]] = []
    values = [dict(each.points) for each in read]
    for x in sorted({x for each in read for x, _ in each.points}):
        here = [(each, value.get(x)) for each, value in zip(read, values, strict=True)]
        text = " · ".join(f"{each.name} {shown_number(y)}" for each, y in here if y is not None)
        place = shown_epoch(int(x) if float(x).is_integer() else x) if x_name == "epoch" else shown_number(x)
        stops.append((x_of(x), f"{x_name} {place}: {text}", [y_of(y) for _, y in here if y is not None]))
    whole = x_name == "epoch"
    x_ticks = [(x_of(x), f"{x:g}") for x in _ticks(low, high, whole=whole) if low <= x <= high] or [
        (x_of(low), f"{low:g}")
    ]
    return Chart(
        title, unit, x_name, x_ticks, [(y_of(y), f"{y:,g}") for y in y_places], paths,
        json.dumps(stops), stops[-1][1] if stops else "", len(stops),
    )  # fmt: skip


def densities(before: Histograms | None, after: Histograms, *, name: str) -> Chart:
    """Return how often each cosine is, of matched and of unmatched pairs; the area under each curve is one."""
    both = [*([] if before is None else [("as loaded", "before", before)]), (name, "after", after)]
    edges = [_occupied(each) for _, _, each in both]
    low, high = min(each[0] for each in edges), max(each[1] for each in edges)
    num_bars = int(np.clip(3 * sum(after.positive) ** (1 / 3), MIN_BARS, MAX_BARS))
    bars = np.linspace(low, high, num_bars + 1)
    series = [
        Series(f"{kind}, {model}", f"{kind}-{role}", _density(each, counts, bars))
        for model, role, each in both
        for kind, counts in (("unmatched", each.negative), ("matched", each.positive))
    ]
    return line_chart("Similarity of image and text", "density", "cosine", series)


def _occupied(histograms: Histograms) -> tuple[float, float]:
    """Return the range of the bins that have any pairs."""
    filled = [a + b > 0 for a, b in zip(histograms.positive, histograms.negative, strict=True)] or [True]
    if not any(filled):
        return histograms.bin_edges[0], histograms.bin_edges[-1]
    return histograms.bin_edges[filled.index(True)], histograms.bin_edges[len(filled) - filled[::-1].index(True)]


def _density(histograms: Histograms, counts: Sequence[int], edges: np.ndarray) -> list[tuple[float, float]]:
    """Join bins, so that a curve has few points: the cumulative counts are read at new edges."""
    cumulative = np.interp(edges, histograms.bin_edges, np.concatenate([[0], np.cumsum(counts)]))
    values = np.diff(cumulative) / max(sum(counts), 1) / np.diff(edges)
    middles = (edges[:-1] + edges[1:]) / 2
    return [(round(x, 4), y) for x, y in zip(middles.tolist(), values.tolist(), strict=True)]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return three to six round numbers from about `low` to about `high`."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
        low, high = low - 0.5 * span, high + 0.5 * span
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor * 4.5 >= span)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * index:.12g}") + 0.0 for index in range(first, last + 1)]


def shown_number(value: float) -> str:
    """Return a number with three digits that count, or one behind the point of larger ones; never `-0`."""
    if abs(value) >= 100:
        return f"{value:,.1f}"
    return (
        f"{float(f'{value:.3g}') + 0.0:g}"
        if abs(value) < 0.01
        else f"{round(value, 3) + 0.0:,.3f}".rstrip("0").rstrip(".")
    )
