"""How a run went, evaluation by evaluation: its curves, and those between the model as loaded and the best one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from cliptune.recorded import comparable, shown_epoch
from cliptune.report.palette import (
    BLUE,
    CHOSEN,
    GREY,
    IMAGE_TO_TEXT,
    INK,
    SERIES,
    TEXT_TO_IMAGE,
    TRAINING,
    VALIDATION,
    VERMILLION,
)
from cliptune.report.style import (
    MAX_NAME,
    add_legend,
    finish,
    headline,
    merged_prefix,
    new_figure,
    set_head,
    set_title,
)
from cliptune.results import RECALL_KEYS, Interpolation, TrainingResults
from cliptune.runtime.messages import count, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_MARKED = 40
"""Evaluations of a curve that are marked by dots; more of them would be a thick line."""
MAX_WATCHED = 8
"""Watched sets that the legend names."""
MAX_WATCHED_NAME = 28
"""Letters of a name there, which has a third of the figure for its line."""
MAX_LN = math.log(2**63)
"""Of what a chance level can be the logarithm of."""


def training_curves_figure(results: TrainingResults) -> Figure:
    """Draw RSum, R@1, loss, in-batch accuracy and learning rates over the epochs of a run."""
    figure = new_figure(16, 9)
    *panels, corner = figure.subplots(2, 3).flat
    rsum, recall, loss, accuracy, rates = panels
    _draw_rsum(rsum, results)
    _draw_recall(recall, results)
    _draw_loss(loss, results)
    _draw_accuracy(accuracy, results)
    _draw_rates(rates, results)
    is_within = any(not isinstance(record.epoch, int) for record in results.history)
    last = results.history[-1].epoch
    for axes in panels:
        if last and axes is not rsum:  # where the star is
            axes.axvline(results.best_epoch, color=CHOSEN, linewidth=1, alpha=0.6, zorder=0.5)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(nbins=8, integer=not is_within or last > 4, min_n_ticks=1)
        axes.set_xlim(-0.03 * last or -0.5, 1.03 * last or 0.5)
        finish(axes)
    corner.set_axis_off()
    add_legend(corner, panels, loc="upper left", labelspacing=0.6, borderaxespad=0)
    epochs = count(last, "epoch") if isinstance(last, int) else f"{shown_epoch(last)} epochs"
    set_title(figure, f"{shown(results.model_name, MAX_NAME)}, {epochs}: {headline(results)}")
    return figure


def interpolation_figure(results: TrainingResults, interpolation: Interpolation) -> Figure:
    """Draw RSum between the model as loaded and the best one, on validation and beside it on what is watched."""
    figure, points = new_figure(14, 6), interpolation.points
    validation, watched = figure.subplots(1, 2)
    alphas = [point.alpha for point in points]
    style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.6}
    validation.plot(alphas, [point.rsum for point in points], color=VALIDATION, label="validation", **style)
    merged = ", duplicates merged" if interpolation.merged else ""
    set_head(validation, "What is gained", f"RSum{merged}", "sum of six recalls, at most 600")
    if names := list(points[0].watched):
        for (name, look), label in zip(_looks(names), _watched_labels(names), strict=True):
            changes = [point.watched.get(name, math.nan) - points[0].watched[name] for point in points]
            watched.plot(alphas, changes, **look | style, label=label)
        limit = -len(RECALL_KEYS) * interpolation.max_loss
        watched.axhline(limit, color=GREY, linewidth=1.2, linestyle=":", label=f"may be lost: {limit:g}")
        set_head(watched, "What is watched", "RSum, change against the model as loaded")
    else:
        for key, label, color in (
            ("text_overlap", "generic texts", BLUE),
            ("image_overlap", "drawn scenes", VERMILLION),
        ):
            values = [getattr(point, key) for point in points]
            if None not in values:
                watched.plot(alphas, values, color=color, label=label, **style)
        set_head(watched, "What has not moved", "percent of the nearest neighbours as loaded")
    for axes in (validation, watched):
        axes.axvline(interpolation.chosen, color=CHOSEN, linewidth=1.5, label=f"chosen: {interpolation.chosen:g}")
        axes.set_xlabel("alpha: 0 is the model as loaded, 1 the best one")
        finish(axes)
    add_legend(figure, (validation, watched), loc="outside lower center", ncols=4)
    set_title(figure, f"{shown(results.model_name, MAX_NAME)}: averages of the weights as loaded and the best ones")
    return figure


def _draw_curve(axes: Axes, results: TrainingResults, key: str, **look: Any) -> None:
    """Draw a number of the evaluations that have it; of validation without those on data that the run had before."""
    history = results.history if key.startswith("train_") else comparable(results.history)
    records = [record for record in history if getattr(record, key) is not None]
    if records:
        epochs, values = [record.epoch for record in records], [getattr(record, key) for record in records]
        axes.plot(epochs, values, **_marked(len(records)), **look)


def _marked(number: int) -> dict[str, Any]:
    return {"marker": "o" if number <= MAX_MARKED else None, "markersize": 4, "linewidth": 1.6}


def _looks(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each name a colour, and a dash of its own where colours come again."""
    dashes = ("--", "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)))
    for index, (name, color) in enumerate(zip(names, cycle(SERIES))):
        yield name, {"color": color, "linestyle": dashes[index // len(SERIES) % len(dashes)]}


def _watched_labels(names: list[str]) -> list[str]:
    """Return what a legend says of watched sets; `_` hides a label from it."""
    labels = [f"watched: {shown(name, MAX_WATCHED_NAME)}" for name in names]
    if len(names) > MAX_WATCHED:
        rest = len(names) - MAX_WATCHED + 1
        labels[MAX_WATCHED - 1 :] = [f"watched: {rest:,} more", *["_"] * (rest - 1)]
    return labels


def _draw_chance(axes: Axes, value: float, color: str = GREY, label: str = "chance") -> str:
    """Draw a chance level that is near the curves; of one that is not, return in which direction it lies."""
    low, high = axes.dataLim.intervaly
    reach = max(0.6 * (high - low), 0.1 * abs(high))  # further away, it would flatten the curves
    if low - reach <= value <= high + reach:
        axes.axhline(value, color=color, linewidth=1.2, linestyle=":", label=label)
        return ""
    return " ↑" if value > high else " ↓"


def _draw_rsum(axes: Axes, results: TrainingResults) -> None:
    """Draw what the best epoch is chosen by."""
    merged = merged_prefix(results)
    key = f"{merged}rsum"
    _draw_curve(axes, results, key, label="validation", color=VALIDATION, zorder=3)
    _draw_intervals(axes, results, "rsum", color=VALIDATION, label="95% interval of the gain over the model as loaded")
    loaded = getattr(results.baseline, key)
    axes.axhline(loaded, color=GREY, linewidth=1.2, label=f"as loaded: RSum {loaded:.1f}", zorder=1)
    curves = results.watched_curves()
    for (name, look), label in zip(_looks(list(curves)), _watched_labels(list(curves)), strict=True):
        axes.plot(*zip(*curves[name], strict=True), **look, **_marked(len(curves[name])), label=label)
    history = comparable(results.history)
    value = max(getattr(record, key) for record in history if record.epoch == results.best_epoch)
    star: dict[str, Any] = {"marker": "*", "markersize": 16, "linestyle": "none", "markeredgecolor": "white"}
    label = f"best epoch: {shown_epoch(results.best_epoch)}, RSum {value:.1f}"
    axes.plot([results.best_epoch], [value], color=CHOSEN, label=label, zorder=4, **star)
    chance = getattr(results.chance, key)
    away = _draw_chance(axes, chance)
    title = "RSum, duplicates merged" if merged else "RSum"
    set_head(axes, title, "sum of six recalls, at most 600", f"chance {chance:.3g}{away}")


def _draw_recall(axes: Axes, results: TrainingResults) -> None:
    merged = merged_prefix(results)  # where captions are classes, the run goes by these
    sides = (
        ("i2t_r1", IMAGE_TO_TEXT, "image→text", count(results.num_texts, "text"), -1),
        ("t2i_r1", TEXT_TO_IMAGE, "text→image", count(results.num_images, "image"), 1),
    )
    for key, color, direction, among, side in sides:
        _draw_curve(axes, results, f"{merged}{key}", label=f"{direction}, among {among}", color=color, zorder=3)
        _draw_intervals(axes, results, key, color=color, side=side)
    levels = [getattr(results.chance, f"{merged}{key}") for key, *_ in sides]
    shown_levels = [f"{level:.3g}%" for level in levels]
    if len(set(shown_levels)) == 1:
        axes.axhline(levels[0], color=GREY, linewidth=1.2, linestyle=":", label="chance")
        chance = f"chance {shown_levels[0]}"
    else:
        for level, (_, color, direction, *_) in zip(levels, sides, strict=True):
            axes.axhline(level, color=color, linewidth=1.2, linestyle=":", label=f"chance, {direction}")
        chance = "chance {} image→text, {} text→image".format(*shown_levels)
    title = f"R@1 on validation{', duplicates merged' if merged else ''}"
    set_head(axes, title, "percent of queries", chance)
    _begin_at_zero(axes)


def _begin_at_zero(axes: Axes) -> None:
    top = 1.05 * max(axes.dataLim.y1, 1.0)
    axes.set_ylim(-0.02 * top, top)  # room for the markers at 0 and at the highest


def _draw_loss(axes: Axes, results: TrainingResults) -> None:
    batch_size, name = results.config.training.batch_size, results.config.training.loss
    _draw_curve(axes, results, "train_loss", label=_batches(results), color=TRAINING, linestyle="--")
    _draw_curve(axes, results, "val_loss", label="validation", color=VALIDATION)
    # A model that cannot tell the pairs of a batch apart has a loss of ln(its size). Validation counts full batches of
    # the training's size, but a smaller set is one batch: 6 images have ln 6 = 1.79, whatever the batch size.
    validation = results.chance.val_loss
    if validation is None:
        validation = math.log(min(batch_size, max(results.num_images, 1)))
    levels = {"validation": (validation, VALIDATION)}
    is_softmax = name == "infonce" and validation <= MAX_LN
    if is_softmax:  # else that of a training batch depends on how often its captions repeat
        levels = {"training": (math.log(batch_size), TRAINING)} | levels
    if is_softmax and math.isclose(math.log(batch_size), validation):
        levels = {"": (validation, GREY)}
    notes = []
    for of, (level, color) in levels.items():
        away = _draw_chance(axes, level, color, f"chance, {of}" if of else "chance")
        text = f"ln {math.exp(level):,.0f} = {level:.2f}" if is_softmax else f"{level:.2f}"
        notes.append(f"{of} {text}{away}".strip())
    title = "Contrastive loss" if name == "infonce" else "Sigmoid loss"
    set_head(axes, title, "nats", f"chance {', '.join(notes)}")


def _batches(results: TrainingResults) -> str:
    return f"training, in batches of {results.config.training.batch_size:,}"


def _draw_accuracy(axes: Axes, results: TrainingResults) -> None:
    """Draw what depends on the batch size, and has no scale in common with R@1."""
    _draw_curve(axes, results, "train_accuracy", label=_batches(results), color=TRAINING, linestyle="--")
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing was trained", transform=axes.transAxes, ha="center", color=GREY)
    set_head(axes, "In-batch accuracy", "training", "percent", "depends on the batch size: no result")
    _begin_at_zero(axes)


def _draw_intervals(
    axes: Axes, results: TrainingResults, key: str, *, color: str, label: str = "", side: int = 0
) -> None:
    """Draw where the curve of a metric may lie as well, as far as the model as loaded is where it is.

    A gain of 20 from +5 to +35 over an RSum of 100 is a bar from 105 to 135. On a `side`, -1 or 1, it leaves room for
    the bar of another curve.
    """
    from matplotlib.transforms import offset_copy  # noqa: PLC0415  (slow)

    start = getattr(results.baseline, f"{merged_prefix(results)}{key}")
    places = [gain.epoch for gain in results.gains]
    most = 600.0 if key == "rsum" else 100.0
    lows, highs = ([min(max(start + getattr(gain, key)[end], 0.0), most) for gain in results.gains] for end in (1, 2))
    if len(places) > MAX_MARKED:  # so many bars are an area
        axes.fill_between(places, lows, highs, color=color, alpha=0.15, linewidth=0, label=label)
    elif places:
        bars = axes.vlines(places, lows, highs, color=color, alpha=0.4, linewidth=3, label=label)
        figure: Any = axes.get_figure()
        bars.set_transform(offset_copy(axes.transData, fig=figure, x=2 * side, units="points"))


def _draw_rates(axes: Axes, results: TrainingResults) -> None:
    """Draw the rates of each step of the schedule, or of the end of each epoch in a file that holds no schedule."""
    history = results.history
    # where an epoch of 10 steps ends at step 10, step 15 stands at epoch 1.5
    ends = [record.step for record in history], [record.epoch for record in history]
    points = [point for point in results.schedule if point.step <= history[-1].step]
    rates = np.array(
        [(float(np.interp(step, *ends)), projection, backbone) for step, projection, backbone in points]
        or [(record.epoch, record.learning_rate, record.backbone_learning_rate or 0.0) for record in history]
    )
    epochs, projection, backbone = rates.T
    # A rate holds for the whole step: as stairs, the 0 that follows the last step is a drop at its end, where a slope
    # would start falling a step (in a short run an eighth of the figure) too early. Where only some steps are recorded
    # a slope is as good, and smooth.
    every_step = bool(points) and points[-1].step + 1 == len(points)
    style: dict[str, Any] = {"linewidth": 1.6, "drawstyle": "steps-post" if every_step else "default"}
    style["marker"] = "o" if len(epochs) == 1 else None
    differ = bool(backbone.any() and (backbone != projection).any())
    label = "projection layers and backbone" if backbone.any() and not differ else "projection layers"
    axes.plot(epochs, projection, color=INK, label=label, **style)
    if differ:
        axes.plot(epochs, backbone, color=INK, linestyle="-.", label="backbone", **style)
    highest = max(projection.max(), backbone.max())
    if differ:
        lowest = 10.0 ** math.floor(math.log10(max(min(backbone.max(), projection.max()) / 100, 1e-100)))
        axes.set_yscale("symlog", linthresh=lowest, linscale=0.5)  # logarithmic, but linear from there to 0
        axes.set_ylim(0, 2 * highest)
    else:
        axes.set_ylim(0, 1.05 * highest or 1.0)
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
    set_head(axes, "Learning rate", "of each step" if points else "at the end of each epoch")
