"""Recorded numbers to figures. As a stage it redraws any figure from a results file:

python visualization.py --results results/training_results.json
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cliptune.cli import check_command_line, parse_settings, run_stage
from cliptune.runtime.files import read_json_object
from cliptune.settings import VisualizationSettings

if __name__ == "__main__":
    check_command_line(VisualizationSettings, str(__doc__))

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
LIGHT_BLUE, BLACK = "#A6CEE8", "#222222"
DPI = 100
RECALL_KEYS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
METRIC_KEYS = (*RECALL_KEYS, "rsum", "similarity_gap")
EPOCH_KEYS = ("epoch", "i2t_r1", "t2i_r1", "val_loss", "learning_rate")
EPOCH_KEYS_OR_NULL = ("train_loss", "train_accuracy", "backbone_learning_rate")  # not measured, or not trained
TRAINING_ONLY_KEYS = ("history", "baseline", "best_epoch")
RECALL_LABELS = [f"{direction}\nR@{k}" for direction in ("image→text", "text→image") for k in (1, 5, 10)]


def main(argv: list[str] | None = None) -> int:
    """Draw the figures of a results file; returns the exit code."""
    return run_stage(lambda: _draw(argv), name="visualization.py")


def _draw(argv: list[str] | None) -> int:
    settings, _ = parse_settings(VisualizationSettings, argv, description=str(__doc__))
    output_dir = None if settings.output_dir is None else Path(settings.output_dir)
    for path in draw_figures(Path(settings.results), output_dir):
        print(path)
    return 0


def draw_figures(results_path: Path, output_dir: Path | None = None) -> list[Path]:
    """Draw what a results file holds: two figures of a training run, one of an evaluation.

    Args:
        results_path: a `training_results.json` or `evaluation_results.json`.
        output_dir: where the PNG files go; None: beside the results.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a results file; names the file and the key that is missing or wrong.
    """
    if not results_path.is_file():
        raise FileNotFoundError(f"no such results file: {results_path}")
    results = read_json_object(results_path)
    try:
        if any(key in results for key in TRAINING_ONLY_KEYS):
            curves, metrics = training_curves_figure(results), model_metrics_figure(results)
            figures = {"training_curves.png": curves, "model_metrics.png": metrics}
        else:
            figures = {"evaluation_metrics.png": evaluation_metrics_figure(results)}
    except ValueError as error:
        raise ValueError(f"{results_path}: {error}") from None
    folder = results_path.parent if output_dir is None else output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name in figures]


def training_curves_figure(results: dict[str, Any]) -> Figure:
    """Draw loss, accuracy and learning rates over the epochs of a run.

    Raises:
        ValueError: names the key of `results` that is missing or wrong.
    """
    _check_training(results)
    figure = _figure(16, 5.4)
    loss, accuracy, rates = figure.subplots(1, 3)
    _draw_loss(loss, results)
    _draw_accuracy(accuracy, results)
    _draw_rates(rates, results["history"])
    for axes in (loss, accuracy, rates):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        _finish(axes, legend_columns=1)
    last = results["history"][-1]["epoch"]
    name = results["config"]["model"]["name"]
    figure.suptitle(f"{name}, {last} epoch{'' if last == 1 else 's'}: {_verdict(results)}", parse_math=False)
    return figure


def model_metrics_figure(results: dict[str, Any]) -> Figure:
    """Draw a run's retrieval and similarities, the best epoch beside the model as loaded.

    Raises:
        ValueError: names the key of `results` that is missing or wrong.
    """
    _check_training(results)
    figure = _figure(16, 6)
    bars, densities = figure.subplots(1, 2, width_ratios=(3, 2))
    best, baseline = results["metrics"], results["baseline"]
    gained = results["best_epoch"] != 0  # else the two are one and the same
    columns = {"as loaded": baseline} | ({f"final (epoch {results['best_epoch']})": best} if gained else {})
    _draw_recalls(bars, columns, results)
    bars.set_title(f"Retrieval: RSum {best['rsum']:.1f}, as loaded {baseline['rsum']:.1f}")
    histograms = results["histograms"]
    _draw_similarities(densities, histograms["best"], histograms["baseline"] if gained else None)
    densities.set_title(f"Similarity: gap {best['similarity_gap']:.3f}, as loaded {baseline['similarity_gap']:.3f}")
    figure.suptitle(f"{results['config']['model']['name']}: {_verdict(results)}", parse_math=False)
    return figure


def evaluation_metrics_figure(results: dict[str, Any]) -> Figure:
    """Draw an evaluation's retrieval and similarities.

    Raises:
        ValueError: names the key of `results` that is missing or wrong.
    """
    _check_evaluation(results)
    figure = _figure(16, 6)
    bars, densities = figure.subplots(1, 2, width_ratios=(3, 2))
    metrics = results["metrics"]
    _draw_recalls(bars, {"evaluated": metrics}, results)
    bars.set_title(f"Retrieval: RSum {metrics['rsum']:.1f}")
    _draw_similarities(densities, results["histograms"], None)
    densities.set_title(f"Similarity: gap {metrics['similarity_gap']:.3f}")
    named = {key: Path(str(results.get(key) or "")).name for key in ("checkpoint", "data", "split")}
    figure.suptitle(", ".join(f"{key} {name}" for key, name in named.items() if name), parse_math=False)
    return figure


def _check_training(results: dict[str, Any]) -> None:
    _check_numbers(results, ("best_epoch",))
    _check_counts(results)
    for group in ("metrics", "baseline"):
        _check_numbers(results, (f"{group}.{key}" for key in METRIC_KEYS))
    for which in ("baseline", "best"):
        _check_histogram(results, f"histograms.{which}")
    _value(results, "config.model.name", str)
    if _number(results, "config.training.batch_size") < 1:
        raise ValueError("config.training.batch_size: expected a positive number")
    history = _value(results, "history", list)
    for number, entry in enumerate(history):
        place = f"history[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: expected an object, found {_kind(entry)}")
        _check_numbers(entry, EPOCH_KEYS, place=place)
        known = [key for key in EPOCH_KEYS_OR_NULL if _value(entry, key, object, place=place) is not None]
        _check_numbers(entry, known, place=place)
    if results["best_epoch"] not in [entry["epoch"] for entry in history]:
        raise ValueError(f"history: has no entry of best_epoch, {results['best_epoch']}")


def _check_evaluation(results: dict[str, Any]) -> None:
    _check_counts(results)
    _check_numbers(results, (f"metrics.{key}" for key in METRIC_KEYS))
    _check_histogram(results, "histograms")


def _check_counts(results: dict[str, Any]) -> None:
    _check_numbers(results, ("num_images", "num_texts", *(f"chance.{key}" for key in RECALL_KEYS)))


def _check_histogram(results: dict[str, Any], place: str) -> None:
    edges = _value(results, f"{place}.bin_edges", list)
    for key in ("bin_edges", "positive", "negative"):
        values = _value(results, f"{place}.{key}", list)
        if not all(_is_number(value) for value in values):
            raise ValueError(f"{place}.{key}: expected a list of numbers")
        if key != "bin_edges" and (len(values) != len(edges) - 1 or any(value < 0 for value in values)):
            raise ValueError(f"{place}.{key}: expected {len(edges) - 1} counts, one fewer than bin_edges")
    if len(edges) < 2 or any(left >= right for left, right in pairwise(edges)):
        raise ValueError(f"{place}.bin_edges: expected two or more numbers, each larger than the one before")


def _check_numbers(values: dict[str, Any], keys: Iterable[str], *, place: str = "") -> None:
    for key in keys:
        _number(values, key, place=place)


def _number(values: dict[str, Any], key: str, *, place: str = "") -> float:
    value = _value(values, key, object, place=place)
    if not _is_number(value):
        found = str(value)[:12] if type(value) in (int, float) else _kind(value)
        raise ValueError(f"{place}{'.' if place else ''}{key}: expected a number, found {found}")
    return float(value)


def _is_number(value: Any) -> bool:
    # a comparison, since isfinite cannot take the integers that JSON can hold and a float cannot
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _value(values: dict[str, Any], key: str, kind: type, *, place: str = "") -> Any:
    """Read `values` at a dotted key; errors name the key as it stands in the file."""
    found: Any = values
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join([*([place] if place else []), *parts[:depth]])
        if not isinstance(found, dict):
            raise ValueError(f"{where}: expected an object, found {_kind(found)}")
        if part not in found:
            raise ValueError(f"no key {where}{'.' if where else ''}{part}, which train.py and evaluation.py write")
        found = found[part]
    if not isinstance(found, kind):
        where = f"{place}.{key}" if place else key
        raise ValueError(f"{where}: expected {'a list' if kind is list else 'a text'}, found {_kind(found)}")
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _verdict(results: dict[str, Any]) -> str:
    best = results["best_epoch"]
    return f"epoch {best} is the best" if best else "no epoch beat the model as loaded"


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


def _line(axes: Axes, history: list[dict[str, Any]], key: str, *, label: str, color: str, style: str = "-") -> None:
    points = [(entry["epoch"], entry[key]) for entry in history if entry[key] is not None]
    if points:
        epochs, values = zip(*points, strict=True)
        axes.plot(epochs, values, style, color=color, label=label, marker="o", markersize=3.5, linewidth=1.6)


def _draw_loss(axes: Axes, results: dict[str, Any]) -> None:
    history, batch_size = results["history"], results["config"]["training"]["batch_size"]
    best = results["best_epoch"]
    _line(axes, history, "train_loss", label="training", color=BLUE)
    _line(axes, history, "val_loss", label="validation", color=ORANGE)
    value = next(entry["val_loss"] for entry in history if entry["epoch"] == best)
    mark: dict[str, Any] = {"marker": "*", "markersize": 13, "linestyle": "none", "markeredgecolor": "white"}
    axes.plot([best], [value], color=GREEN, label=f"best epoch (RSum): {best}", **mark)
    chance = math.log(batch_size)
    axes.axhline(chance, color=GREY, linewidth=1, linestyle=":", label=f"chance: ln {batch_size} = {chance:.2f}")
    axes.set(title="Contrastive loss", ylabel="nats")


def _draw_accuracy(axes: Axes, results: dict[str, Any]) -> None:
    history, batch_size = results["history"], results["config"]["training"]["batch_size"]
    images, texts = results["num_images"], results["num_texts"]
    _line(axes, history, "i2t_r1", label=f"validation R@1 image→text, among {texts:,} texts", color=BLUE)
    _line(axes, history, "t2i_r1", label=f"validation R@1 text→image, among {images:,} images", color=ORANGE)
    _line(axes, history, "train_accuracy", label=f"training, in batches of {batch_size}", color=GREY, style="--")
    axes.set(title="Accuracy", ylabel="percent")
    top = 1.05 * max(axes.dataLim.y1, 1.0)
    axes.set_ylim(-0.02 * top, top)  # room for the markers at 0 and at the highest


def _draw_rates(axes: Axes, history: list[dict[str, Any]]) -> None:
    _line(axes, history, "learning_rate", label="projection layers", color=BLUE)
    _line(axes, history, "backbone_learning_rate", label="backbone", color=ORANGE, style="--")
    pairs = [(entry["learning_rate"], entry["backbone_learning_rate"]) for entry in history]
    positive = [rate for pair in pairs for rate in pair if rate]
    if positive and any(backbone and backbone != projection for projection, backbone in pairs):
        axes.set_yscale("log", nonpositive="mask")  # the last rate, 0, has no place: a drop to it would start too early
        axes.set_ylim(min(positive) / 2, max(positive) * 2)
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set(title="Learning rate", ylabel="learning rate")


def _draw_recalls(axes: Axes, columns: dict[str, dict[str, float]], results: dict[str, Any]) -> None:
    places, width = np.arange(len(RECALL_KEYS)), 0.8 / len(columns)
    chance = [results["chance"][key] for key in RECALL_KEYS]
    colors = (LIGHT_BLUE, BLUE)[-len(columns) :]
    highest = 5.0
    for number, (label, metrics) in enumerate(columns.items()):
        centers = places + (number - (len(columns) - 1) / 2) * width
        values = [metrics[key] for key in RECALL_KEYS]
        axes.bar(centers, values, width * 0.95, label=label, color=colors[number])
        for center, value, floor in zip(centers, values, chance, strict=True):  # never across the mark of chance
            at: dict[str, Any] = {
                "xytext": (0, 3),
                "textcoords": "offset points",
                "ha": "center",
                "va": "bottom",
                "fontsize": 9,
            }
            axes.annotate(f"{value:.1f}", (center, max(value, floor)), **at)
        highest = max(highest, *values, *chance)
    axes.hlines(chance, places - 0.42, places + 0.42, color=BLACK, linewidth=1.3, label="chance")
    axes.set_xticks(places, RECALL_LABELS)
    axes.set_ylabel(f"percent of queries ({results['num_images']:,} images, {results['num_texts']:,} texts)")
    axes.set_ylim(0, 1.1 * highest)
    _finish(axes, legend_columns=3)


def _draw_similarities(axes: Axes, histogram: dict[str, Any], baseline: dict[str, Any] | None) -> None:
    spans = []
    for key, label, color in (("positive", "matched pairs", BLUE), ("negative", "unmatched pairs", ORANGE)):
        density, edges = _density(histogram, key)
        axes.stairs(density, edges, fill=True, alpha=0.45, color=color, label=label)
        spans.append(_span(density, edges))
        if baseline is not None:
            density, edges = _density(baseline, key)
            axes.stairs(density, edges, color=color, linestyle="--", linewidth=1.3, label=f"{label}, as loaded")
            spans.append(_span(density, edges))
    axes.set_xlim(min(low for low, _ in spans), max(high for _, high in spans))
    axes.set(xlabel="cosine similarity", ylabel="density")
    _finish(axes, legend_columns=2)


def _density(histogram: dict[str, Any], key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    counts, edges = (np.asarray(histogram[name], dtype=float) for name in (key, "bin_edges"))
    return counts / (max(counts.sum(), 1.0) * np.diff(edges)), edges


def _span(density: np.ndarray[Any, Any], edges: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Find where a density can be seen, with a margin of two bins; all of it if it is empty."""
    seen = np.flatnonzero(density > 0.002 * density.max())
    first, last = (seen[0], seen[-1]) if len(seen) else (0, len(density) - 1)
    return float(edges[max(first - 2, 0)]), float(edges[min(last + 3, len(edges) - 1)])


if __name__ == "__main__":
    sys.exit(main())
