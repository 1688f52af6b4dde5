"""Recorded numbers to figures. As a stage it redraws any figure from a results file:

python visualization.py --results results/training_results.json
"""

from __future__ import annotations

if __name__ == "__main__":
    from cliptune.runtime.stopping import leave_at_signals

    leave_at_signals()  # the imports take seconds

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cliptune.cli import check_command_line, parse_settings, run_stage
from cliptune.settings import VisualizationSettings

if __name__ == "__main__":
    check_command_line(VisualizationSettings, str(__doc__))

import numpy as np

from cliptune import results as results_file
from cliptune.recorded import SPLIT_NAMES, VERDICTS, Verdict, shown_epoch
from cliptune.results import (
    RECALL_KEYS,
    RECALLS,
    EpochRecord,
    EvaluationResults,
    Histograms,
    Interpolation,
    Metrics,
    Results,
    SeveralEvaluations,
    TestResults,
    TrainingResults,
    selection_key,
)
from cliptune.runtime.files import atomic_writer
from cliptune.runtime.messages import count, printable, shorten, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
WATCHED_COLORS = (ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
LIGHT_BLUE, BLACK = "#A6CEE8", "#222222"
DPI = 100
MAX_MARKED = 40
"""Epochs of a curve that are marked by dots; more of them would be a thick line."""
MAX_LN = math.log(2**63)
"""Of what a chance level can be the logarithm of."""
MAX_WIDTH = 40
"""Inches of a figure of many panels."""
MAX_NAME, MAX_TITLE = 60, 200
"""Characters of a name from the file, and of a title."""
CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Sans CJK KR", "Noto Sans SC",
    "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "AR PL UMing CN", "Microsoft YaHei", "SimHei", "SimSun", "PingFang SC", "Hiragino Sans GB", "Hiragino Sans",
    "Heiti TC", "Yu Gothic", "Meiryo", "MS Gothic", "IPAGothic", "TakaoGothic", "Malgun Gothic",
    "Apple SD Gothic Neo", "NanumGothic", "Unifont", "Arial Unicode MS",
)  # fmt: skip
"""Fonts of Linux, Windows and macOS that have Chinese, Japanese or Korean letters; the first that is there is taken."""
RECALL_LABELS = [f"{direction}\nR@{k}" for direction in ("image→text", "text→image") for k in RECALLS]


def main(argv: list[str] | None = None) -> int:
    """Draw the figures of a results file; returns the exit code."""
    return run_stage(lambda: _draw(argv), name="visualization.py")


def _draw(argv: list[str] | None) -> int:
    settings, _ = parse_settings(VisualizationSettings, argv, description=str(__doc__))
    output_dir = None if settings.output_dir is None else Path(settings.output_dir)
    if settings.suspects is not None:
        print(_list_suspects(Path(settings.results)))
    for path in draw_figures(Path(settings.results), output_dir):
        print(printable(str(path)))
    return 0


def _list_suspects(results_path: Path) -> Any:
    # the only part that needs a model, and PyTorch
    from clip_model import CLIPModel  # noqa: PLC0415
    from cliptune.runs.suspects import find_suspects  # noqa: PLC0415
    from data_loader import ImageTextDataset  # noqa: PLC0415

    return find_suspects(results_path, build=CLIPModel, open_dataset=ImageTextDataset)


def draw_figures(results_path: Path, output_dir: Path | None = None) -> list[Path]:
    """Draw what a results file holds: two or three figures of a training run, one of an evaluation or of several.

    Args:
        results_path: a `training_results.json` or `evaluation_results.json`.
        output_dir: where the PNG files go; None: beside the results.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a results file; names the file and the key that is missing or wrong.
    """
    results = results_file.read(results_path)
    if isinstance(results, TrainingResults):
        curves, metrics = training_curves_figure(results), model_metrics_figure(results)
        figures = {"training_curves.png": curves, "model_metrics.png": metrics}
        if results.interpolation is not None:
            figures["interpolation.png"] = interpolation_figure(results, results.interpolation)
    elif isinstance(results, SeveralEvaluations):
        figures = {"evaluation_comparison.png": comparison_figure(results)}
    else:
        figures = {"evaluation_metrics.png": evaluation_metrics_figure(results)}
    folder = results_path.parent if output_dir is None else output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with atomic_writer(folder / name) as file:
            figure.savefig(file, format="png", dpi=DPI)
    return [folder / name for name in figures]


def training_curves_figure(results: TrainingResults) -> Figure:
    """Draw loss, accuracy, learning rates and RSum over the epochs of a run."""
    figure = _figure(16, 10.4)
    loss, accuracy, rates, rsum = figure.subplots(2, 2).flat
    _draw_loss(loss, results)
    _draw_accuracy(accuracy, results)
    _draw_rates(rates, results)
    _draw_rsum(rsum, results)
    for axes in (loss, accuracy, rates, rsum):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        _finish(axes, legend_columns=1)
    last = results.history[-1].epoch
    epochs = count(last, "epoch") if isinstance(last, int) else f"{shown_epoch(last)} epochs"
    _set_title(figure, f"{shown(results.model_name, MAX_NAME)}, {epochs}: {_verdict(results)}")
    return figure


def interpolation_figure(results: TrainingResults, interpolation: Interpolation) -> Figure:
    """Draw RSum between the model as loaded and the best one, on validation and beside it on what is watched."""
    figure, points = _figure(12, 5.4), interpolation.points
    validation, watched = figure.subplots(1, 2)
    alphas = [point.alpha for point in points]
    validation.plot(alphas, [point.rsum for point in points], "-o", color=BLUE, markersize=3.5, label="validation")
    validation.set(title="What is gained", ylabel="RSum")
    if names := list(points[0].watched):
        for name, color in zip(names, cycle(WATCHED_COLORS)):
            changes = [point.watched.get(name, math.nan) - points[0].watched[name] for point in points]
            watched.plot(alphas, changes, "-o", color=color, markersize=3.5, label=shown(name, MAX_NAME))
        limit = -len(RECALL_KEYS) * interpolation.max_loss
        watched.axhline(limit, color=GREY, linewidth=1, linestyle=":", label=f"may be lost: {limit:g}")
        watched.set(title="What is watched", ylabel="RSum, change against the model as loaded")
    else:
        for key, label, color in (("text_overlap", "generic texts", BLUE), ("image_overlap", "drawn scenes", ORANGE)):
            values = [getattr(point, key) for point in points]
            if None not in values:
                watched.plot(alphas, values, "-o", color=color, markersize=3.5, label=label)
        watched.set(title="What has not moved", ylabel="percent of the nearest neighbours as loaded")
    for axes in (validation, watched):
        axes.axvline(interpolation.chosen, color=BLACK, linewidth=1.0, label=f"chosen: {interpolation.chosen:g}")
        axes.set_xlabel("alpha: 0 is the model as loaded, 1 the best one")
        _finish(axes, legend_columns=2)
    _set_title(figure, f"{shown(results.model_name, MAX_NAME)}: averages of the weights as loaded and the best ones")
    return figure


def model_metrics_figure(results: TrainingResults) -> Figure:
    """Draw a run's retrieval and similarities, the best epoch beside the model as loaded."""
    title, of = f"{shown(results.model_name, MAX_NAME)}: {_verdict(results)}", results.test or results
    histograms = of.histograms
    if results.best_epoch == 0:  # then the two are one and the same
        return _metrics_figure(of, {"as loaded": of.baseline}, [histograms.best], title=title)
    # bars are those of the standard protocol
    verdict = None if results.verdict is None or results.verdict.merged else results.verdict
    columns = {"as loaded": of.baseline, f"final (epoch {shown_epoch(results.best_epoch)})": of.metrics}
    return _metrics_figure(of, columns, [histograms.baseline, histograms.best], title=title, verdict=verdict)


def evaluation_metrics_figure(results: EvaluationResults) -> Figure:
    """Draw an evaluation's retrieval and similarities."""
    model = "" if results.run is None else results.run.model_name
    named = {"checkpoint": Path(results.checkpoint).name, "data": Path(results.data).name, "split": results.split}
    titled = [("model", model), *named.items()] if model else named.items()
    title = ", ".join(f"{key} {shown(name, MAX_NAME)}" for key, name in titled if name).removeprefix("model ")
    return _metrics_figure(results, {"evaluated": results.metrics}, [results.histograms], title=title)


def comparison_figure(results: SeveralEvaluations) -> Figure:
    """Draw RSum of several checkpoints with its intervals, a panel for each data set."""
    sets = list(dict.fromkeys((each.data, each.split) for each in results.evaluations))
    names = list(dict.fromkeys(each.checkpoint for each in results.evaluations))[::-1]  # the first one on top
    figure = _figure(min(4 + 5 * len(sets), MAX_WIDTH), min(2.5 + 0.4 * len(names), MAX_WIDTH))
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, sets, strict=True):
        own = [each for each in results.evaluations if (each.data, each.split) == key]
        for each in own:
            row, value = names.index(each.checkpoint), each.metrics.rsum
            low, high = each.intervals.get("rsum", (value, value))
            axes.plot([low, high], [row, row], color=LIGHT_BLUE, linewidth=5, solid_capstyle="butt")
            axes.plot([value], [row], "o", color=BLUE)
            axes.annotate(f"{value:.1f}", (value, row), xytext=(0, 6), textcoords="offset points", ha="center")
        axes.axvline(own[0].chance.rsum, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("RSum, 95% interval (dotted: chance)")
        axes.spines[["top", "right"]].set_visible(False)
        title, families = _drawable(f"{shown(Path(key[0]).name, MAX_NAME)} ({shown(key[1], MAX_NAME)})")
        axes.set_title(title, parse_math=False, fontfamily=families)
    texts = [_drawable(_end_of(name)) for name in names]
    panels[0].set_yticks(range(len(names)), [text for text, _ in texts], parse_math=False)
    for tick, (_, families) in zip(panels[0].get_yticklabels(), texts, strict=True):
        tick.set_fontfamily(families)
    panels[0].set_ylim(-0.6, len(names) - 0.3)
    return figure


def _end_of(name: str) -> str:
    """Return what tells a path from others: its end."""
    name = printable(name)
    return name if len(name) <= MAX_NAME else f"...{name[-MAX_NAME:]}"


def _metrics_figure(
    results: Results | TestResults,
    columns: dict[str, Metrics],
    histograms: list[Histograms],
    *,
    title: str,
    verdict: Verdict | None = None,
) -> Figure:
    """Draw retrieval beside similarities: of the last column and the last histograms, and of one as loaded before."""
    figure = _figure(16, 6)
    bars, densities = figure.subplots(1, 2, width_ratios=(3, 2))
    *before, metrics = columns.values()
    _draw_recalls(bars, columns, results, verdict)
    loaded = "".join(f", as loaded {baseline.rsum:.1f}" for baseline in before)
    bars.set_title(f"Retrieval: RSum {metrics.rsum:.1f}{loaded}")
    _draw_similarities(densities, histograms[-1], histograms[0] if before else None)
    loaded = "".join(f", as loaded {_gap(baseline)}" for baseline in before)
    densities.set_title(f"Similarity: gap {_gap(metrics)}{loaded}")
    _set_title(figure, title)
    return figure


def _verdict(results: TrainingResults) -> str:
    best, verdict = results.best_epoch, results.verdict
    text = f"epoch {shown_epoch(best)} is the best" if best else "no epoch beat the model as loaded"
    if verdict is None:
        return text
    images = count(verdict.num_images, f"{SPLIT_NAMES[verdict.split]} image")
    return f"{text}. {VERDICTS[verdict.verdict]}: RSum {verdict.rsum} on {images}"


def _gap(metrics: Metrics) -> str:
    return f"{round(metrics.similarity_gap, 3) + 0.0:.3f}"  # + 0.0: never "-0.000"


def _set_title(figure: Figure, text: str) -> None:
    text, families = _drawable(shorten(text, MAX_TITLE))
    figure.suptitle(text, parse_math=False, fontfamily=families)  # a name with two $ is not a formula


def _drawable(text: str) -> tuple[str, list[str]]:
    """Return a text with each letter escaped that no font has, which would be a box, and the fonts to draw it with."""
    from matplotlib import font_manager, rcParams  # noqa: PLC0415  (as below)

    families = list(rcParams["font.family"])
    default = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    missing = set(map(ord, text)) - default.get_charmap().keys()
    paths = {font.name: font.fname for font in font_manager.fontManager.ttflist} if missing else {}
    for name in filter(paths.get, CJK_FONTS):
        with suppress(OSError, RuntimeError):  # matplotlib's list of fonts is cached: it may be gone since
            found = font_manager.get_font(paths[name]).get_charmap().keys()
            families += [] if missing.isdisjoint(found) else [name]
            missing -= found
    return "".join(ascii(letter)[1:-1] if ord(letter) in missing else letter for letter in text), families


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow; --help needs no figures)

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    return figure


def _finish(axes: Axes, *, legend_columns: int) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    # under the axes, where it hides no data; far enough down for the tick labels and the axis label
    anchor: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "borderaxespad": 0.0}
    axes.legend(frameon=False, fontsize=9, ncols=legend_columns, **anchor)


def _draw_curve(
    axes: Axes, history: Sequence[EpochRecord], key: str, *, label: str, color: str, style: str = "-"
) -> None:
    records = [record for record in history if getattr(record, key) is not None]
    if records:
        epochs, values = [record.epoch for record in records], [getattr(record, key) for record in records]
        marker = "o" if len(records) <= MAX_MARKED else None
        axes.plot(epochs, values, style, color=color, label=label, marker=marker, markersize=3.5, linewidth=1.6)


def _draw_chance(axes: Axes, levels: dict[str, tuple[float, str]]) -> None:
    """Draw the chance level of two curves in their colours, by `name: (value, how it is said)`, or one for both."""
    (first, first_text), (second, _) = levels.values()
    if math.isclose(first, second):
        axes.axhline(first, color=GREY, linewidth=1, linestyle=":", label=f"chance: {first_text}")
        return
    for (name, (value, text)), color in zip(levels.items(), (BLUE, ORANGE), strict=True):
        axes.axhline(value, color=color, linewidth=1, linestyle=":", label=f"chance, {name}: {text}")


def _draw_loss(axes: Axes, results: TrainingResults) -> None:
    history, batch_size = results.history, results.config.training.batch_size
    _draw_curve(axes, history, "train_loss", label="training", color=BLUE)
    _draw_curve(axes, history, "val_loss", label="validation", color=ORANGE)
    # A model that cannot tell the pairs of a batch apart has a loss of ln(its size). Validation counts full batches of
    # the training's size, but a smaller set is one batch: 6 images have ln 6 = 1.79, whatever the batch size.
    validation = results.chance.val_loss
    if validation is None:
        validation = math.log(min(batch_size, max(results.num_images, 1)))
    if results.config.training.loss == "infonce" and validation <= MAX_LN:
        levels = {"training": math.log(batch_size), "validation": validation}
        texts = {name: f"ln {math.exp(level):,.0f} = {level:.2f}" for name, level in levels.items()}
        _draw_chance(axes, {name: (level, texts[name]) for name, level in levels.items()})
    else:  # that of a training batch depends on how often its captions repeat
        axes.axhline(
            validation, color=ORANGE, linewidth=1, linestyle=":", label=f"chance, validation: {validation:.2f}"
        )
    title = "Contrastive loss" if results.config.training.loss == "infonce" else "Sigmoid loss"
    axes.set(title=title, ylabel="nats")


def _draw_accuracy(axes: Axes, results: TrainingResults) -> None:
    history, chance = results.history, results.chance
    texts, images = count(results.num_texts, "text"), count(results.num_images, "image")
    batch = f"training, in batches of {results.config.training.batch_size}"
    merged = _merged(results)  # where captions are classes, the run goes by these
    i2t, t2i = f"{merged}i2t_r1", f"{merged}t2i_r1"
    _draw_curve(axes, history, i2t, label=f"validation R@1 image→text, among {texts}", color=BLUE)
    _draw_curve(axes, history, t2i, label=f"validation R@1 text→image, among {images}", color=ORANGE)
    _draw_curve(axes, history, "train_accuracy", label=batch, color=GREY, style="--")
    _draw_intervals(axes, results, "i2t_r1", color=BLUE, label="95% intervals of the gains over the model as loaded")
    _draw_intervals(axes, results, "t2i_r1", color=ORANGE)
    recalls = {"image→text": getattr(chance, i2t), "text→image": getattr(chance, t2i)}
    _draw_chance(axes, {name: (value, f"R@1 {value:.3g}%") for name, value in recalls.items()})
    axes.set(title="Accuracy, duplicates merged" if merged else "Accuracy", ylabel="percent")
    top = 1.05 * max(axes.dataLim.y1, 1.0)
    axes.set_ylim(-0.02 * top, top)  # room for the markers at 0 and at the highest


def _draw_rsum(axes: Axes, results: TrainingResults) -> None:
    """Draw what the best epoch is chosen by."""
    key = f"{_merged(results)}rsum"
    _draw_curve(axes, results.history, key, label="validation RSum", color=BLUE)
    _draw_intervals(axes, results, "rsum", color=BLUE, label="95% interval of the gain over the model as loaded")
    value = next(getattr(record, key) for record in results.history if record.epoch == results.best_epoch)
    mark: dict[str, Any] = {"marker": "*", "markersize": 13, "linestyle": "none", "markeredgecolor": "white"}
    label = f"best epoch: {shown_epoch(results.best_epoch)}"
    axes.plot([results.best_epoch], [value], color=GREEN, label=label, **mark)
    for (name, points), color in zip(results.watched_curves().items(), cycle(WATCHED_COLORS)):
        style: dict[str, Any] = {"marker": "o" if len(points) <= MAX_MARKED else None, "markersize": 3.5}
        label = f"watched: {shown(name, MAX_NAME)}"
        axes.plot(*zip(*points, strict=True), "--", color=color, label=label, linewidth=1.6, **style)
    chance = getattr(results.chance, key)
    axes.axhline(chance, color=GREY, linewidth=1, linestyle=":", label=f"chance: {chance:.3g}")
    axes.set(title="RSum, duplicates merged" if _merged(results) else "RSum", ylabel="sum of six recalls, at most 600")


def _merged(results: TrainingResults) -> str:
    """Return what keys of the recalls begin with that a run has gone by."""
    return selection_key(results.baseline.model_dump()).removesuffix("rsum")


def _draw_intervals(axes: Axes, results: TrainingResults, key: str, *, color: str, label: str = "") -> None:
    """Draw where the curve of a metric may lie as well, as far as the model as loaded is where it is.

    A gain of 20 from +5 to +35 over an RSum of 100 is a bar from 105 to 135.
    """
    start = getattr(results.baseline, f"{_merged(results)}{key}")
    places = [gain.epoch for gain in results.gains]
    lows, highs = ([max(start + getattr(gain, key)[end], 0) for gain in results.gains] for end in (1, 2))
    if len(places) > MAX_MARKED:  # so many bars are an area
        axes.fill_between(places, lows, highs, color=color, alpha=0.15, linewidth=0, label=label)
    elif places:
        axes.vlines(places, lows, highs, color=color, alpha=0.35, linewidth=2.5, label=label)


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
    axes.plot(epochs, projection, color=BLUE, label="projection layers", **style)
    if backbone.any():
        axes.plot(epochs, backbone, "--", color=ORANGE, label="backbone", **style)
    if backbone.any() and (backbone != projection).any():
        peaks = sorted((backbone.max(), projection.max()))
        lowest = 10.0 ** math.floor(math.log10(max(peaks[0] / 100, 1e-100)))
        axes.set_yscale("symlog", linthresh=lowest, linscale=0.5)  # logarithmic, but linear from there to 0
        axes.set_ylim(0, 2 * peaks[1])
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set(title="Learning rate", ylabel="learning rate")


def _draw_recalls(
    axes: Axes, columns: dict[str, Metrics], results: Results | TestResults, verdict: Verdict | None
) -> None:
    slots, width = np.arange(len(RECALL_KEYS)), 0.8 / len(columns)
    chance = results.chance.recalls()
    colors = (LIGHT_BLUE, BLUE)[-len(columns) :]
    highest = 5.0
    at: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    for index, (label, metrics) in enumerate(columns.items()):
        centers = slots + (index - (len(columns) - 1) / 2) * width
        values = metrics.recalls()
        axes.bar(centers, values, width * 0.95, label=label, color=colors[index])
        floors = chance
        if index and verdict is not None:
            floors = _draw_gains(axes, centers, next(iter(columns.values())), verdict)
        for center, value, floor in zip(centers, values, floors, strict=True):  # never across a mark
            axes.annotate(f"{value:.1f}", (center, max(value, floor)), fontsize=9, **at)
        highest = max(highest, *values, *chance, *floors)
    axes.hlines(chance, slots - 0.42, slots + 0.42, color=BLACK, linewidth=1.3, label="chance")
    axes.set_xticks(slots, RECALL_LABELS)
    sizes = f"{count(results.num_images, 'image')}, {count(results.num_texts, 'text')}"
    axes.set_ylabel(f"percent of queries ({sizes})")
    axes.set_ylim(0, 1.1 * highest)
    _finish(axes, legend_columns=4)


def _draw_gains(axes: Axes, centers: Any, loaded: Metrics, verdict: Verdict) -> list[float]:
    """Draw where bars may end on other images, as far as the model as loaded is where it is; return the upper ends."""
    lows, highs = (
        [min(max(getattr(loaded, key) + verdict.recalls[key][end], 0.0), 100.0) for key in RECALL_KEYS]
        for end in (1, 2)
    )
    axes.vlines(centers, lows, highs, color=BLACK, linewidth=1.3, label="95% interval of the gain")
    for ends in (lows, highs):
        axes.hlines(ends, centers - 0.06, centers + 0.06, color=BLACK, linewidth=1.3)
    return highs


def _draw_similarities(axes: Axes, histograms: Histograms, baseline: Histograms | None) -> None:
    drawn = []
    for key, label, color in (("positive", "matched pairs", BLUE), ("negative", "unmatched pairs", ORANGE)):
        density, edges = _density(histograms, key)
        axes.stairs(density, edges, fill=True, alpha=0.45, color=color, label=label)
        drawn.append((density, edges))
        if baseline is not None:
            density, edges = _density(baseline, key)
            axes.stairs(density, edges, color=color, linestyle="--", linewidth=1.3, label=f"{label}, as loaded")
            drawn.append((density, edges))
    # of one image there is no unmatched pair
    spans = [_span(density, edges) for density, edges in drawn if density.any()] or [(-1.0, 1.0)]
    axes.set_xlim(min(low for low, _ in spans), max(high for _, high in spans))
    axes.set(xlabel="cosine similarity", ylabel="density")
    _finish(axes, legend_columns=2)


def _density(histograms: Histograms, key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    counts, edges = (np.asarray(getattr(histograms, name), dtype=float) for name in (key, "bin_edges"))
    return counts / (max(counts.sum(), 1.0) * np.diff(edges)), edges


def _span(density: np.ndarray[Any, Any], edges: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Find where a density can be seen, with a margin of two bins."""
    seen = np.flatnonzero(density > 0.002 * density.max())
    return float(edges[max(seen[0] - 2, 0)]), float(edges[min(seen[-1] + 3, len(edges) - 1)])


if __name__ == "__main__":
    sys.exit(main())
