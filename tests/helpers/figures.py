"""What a test draws of a run's numbers, and what it reads off a figure."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from cliptune.report.bars import model_metrics_figure
from cliptune.report.curves import training_curves_figure
from cliptune.results import RECALL_KEYS, TrainingResults


def curves(values: dict[str, Any]) -> Figure:
    return training_curves_figure(TrainingResults.model_validate(values))


def bars_and_densities(values: dict[str, Any]) -> Figure:
    return model_metrics_figure(TrainingResults.model_validate(values))


def title(figure: Figure) -> str:
    return figure.get_suptitle()


def heads(axes: Axes) -> str:
    """Return a panel's title and notes."""
    return f"{axes.get_title(loc='left')}: {axes.texts[-1].get_text() if axes.texts else ''}"


def legend(figure: Figure) -> list[str]:
    """Return what the only legend of a figure says."""
    (found,) = [*figure.legends, *(each for axes in figure.axes if (each := axes.get_legend()))]
    return [text.get_text() for text in found.get_texts()]


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    found = [each for each in axes.get_lines() if str(each.get_label()).startswith(label)]
    assert len(found) == 1, label
    return list(np.asarray(found[0].get_xdata())), list(np.asarray(found[0].get_ydata()))


def vertical_bars(axes: Axes, label: str) -> list[tuple[float, float, float]]:
    """Where vertical bars stand, begin and end."""
    (found,) = [each for each in axes.collections if str(each.get_label()).startswith(label)]
    return [(low[0], low[1], high[1]) for low, high in found.get_segments()]  # type: ignore[attr-defined]


def with_verdict(values: dict[str, Any]) -> dict[str, Any]:
    """Gains of 10 points, 4 to 15, of every recall and evaluation; RSum gains 60, 30 to 90."""
    verdict = {
        "verdict": "better", "rsum": [60.0, 30.0, 90.0], "recalls": {key: [10.0, 4.0, 15.0] for key in RECALL_KEYS},
        "split": "val", "epoch": 2, "num_evaluations": 3, "num_images": 1000, "num_groups": 900,
    }  # fmt: skip
    gains = [
        {"epoch": epoch, "i2t_r1": [10.0, -4.0, 15.0], "t2i_r1": [10.0, 4.0, 15.0], "rsum": [60.0, 30.0, 90.0]}
        for epoch in range(1, len(values["history"]))
    ]
    return {**values, "verdict": verdict, "gains": gains}


def with_merged(values: dict[str, Any]) -> dict[str, Any]:
    """The same of a run whose captions are classes: merged recalls are 1 more than the others."""
    for each in (values["baseline"], values["metrics"], values["chance"], *values["history"]):
        each |= {f"merged_{key}": each[key] + 1 for key in RECALL_KEYS}
        each["merged_rsum"] = each["rsum"] + 6
    values["baseline"]["ceiling_rsum"] = 100.0
    return values


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Return which texts lie on each other, or beyond the edge, as the figure is drawn."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in _texts(figure) if text.get_text().strip()]
    inside = figure.bbox.padded(1)
    ends = [(text, end) for text, box in boxes for end in (box.min, box.max)]
    beyond = [(text, "the edge") for text, end in ends if not inside.contains(*end)]
    return beyond + [(a, b) for (a, box), (b, other) in combinations(boxes, 2) if box.padded(-1).overlaps(other)]


def _texts(figure: Figure) -> list[Text]:
    found: list[Any] = [figure._suptitle] if figure.get_suptitle() else []  # type: ignore[attr-defined]
    for axes in figure.axes:
        legend = axes.get_legend()
        found += [*axes.texts, *(legend.get_texts() if legend else ())]
        if axes.axison:
            found += [axes._left_title, axes.title]  # type: ignore[attr-defined]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
                found += [axis.label, *(tick.label1 for tick in ticks if tick.label1.get_visible())]
    return found + [text for legend in figure.legends for text in legend.get_texts()]
