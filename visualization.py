"""Recorded numbers to figures. As a stage it redraws any figure from a results file:

python visualization.py --results results/training_results.json
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from config import Settings, parse_settings, read_json_object, run_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"
RECALL_KEYS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
RECALL_LABELS = [f"{direction}\nR@{k}" for direction in ("image→text", "text→image") for k in (1, 5, 10)]


class VisualizationSettings(Settings):
    """Settings of the figure stage."""

    results: str = Field(
        "results/training_results.json", description="training_results.json or evaluation_results.json"
    )
    output_dir: str | None = Field(None, description="folder for the figures; none: beside the results file")


def main(argv: list[str] | None = None) -> int:
    """Draw the figures of a results file; returns the exit code."""
    return run_stage(lambda: _draw(argv), name="visualization.py")


def _draw(argv: list[str] | None) -> int:
    settings, _ = parse_settings(VisualizationSettings, argv, description=str(__doc__).splitlines()[0])
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
        ValueError: not a results file; names the key that is missing or wrong.
    """
    if not results_path.is_file():
        raise FileNotFoundError(f"no such results file: {results_path}")
    results = read_json_object(results_path)
    folder = results_path.parent if output_dir is None else output_dir
    try:
        if "history" in results:
            figures = {
                "training_curves.png": training_curves_figure(results),
                "model_metrics.png": model_metrics_figure(results),
            }
        else:
            figures = {"evaluation_metrics.png": evaluation_metrics_figure(results)}
    except KeyError as error:
        raise ValueError(f"{results_path}: not a results file of train.py or evaluation.py: no key {error}") from None
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{results_path}: a value is not what train.py or evaluation.py write: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in figures]


def training_curves_figure(results: dict[str, Any]) -> Figure:
    """Draw loss, accuracy and learning rates over the epochs of a run."""
    history = results["history"]
    if not history:
        raise IndexError("the history is empty")
    figure = _figure(15, 4.6)
    loss, accuracy, rates = figure.subplots(1, 3)
    _draw_loss(loss, results)
    _draw_accuracy(accuracy, results)
    _draw_rates(rates, history)
    for axes in (loss, accuracy, rates):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axes)
        axes.legend(frameon=False, fontsize=9)
    name, best = results["config"]["model"]["name"], results["best_epoch"]
    figure.suptitle(f"{name}: {history[-1]['epoch']} epochs, the best is {best}")
    return figure


def model_metrics_figure(results: dict[str, Any]) -> Figure:
    """Draw a run's retrieval and similarities, the best epoch beside the model as loaded."""
    figure = _figure(15, 5)
    bars, densities = figure.subplots(1, 2, width_ratios=(3, 2))
    best, baseline = results["metrics"], results["baseline"]
    label = f"epoch {results['best_epoch']}"
    _draw_recalls(bars, {"as loaded": baseline, label: best}, results)
    bars.set_title(f"Retrieval: RSum {baseline['rsum']:.1f} as loaded, {best['rsum']:.1f} best")
    _draw_similarities(densities, results["histograms"]["best"], results["histograms"]["baseline"])
    densities.set_title(
        f"Similarity: gap {baseline['similarity_gap']:.3f} as loaded, {best['similarity_gap']:.3f} best"
    )
    if results["best_epoch"] == 0:
        figure.suptitle("No epoch beat the model as loaded")
    return figure


def evaluation_metrics_figure(results: dict[str, Any]) -> Figure:
    """Draw an evaluation's retrieval and similarities."""
    figure = _figure(15, 5)
    bars, densities = figure.subplots(1, 2, width_ratios=(3, 2))
    metrics = results["metrics"]
    _draw_recalls(bars, {"evaluated": metrics}, results)
    bars.set_title(f"Retrieval: RSum {metrics['rsum']:.1f}")
    _draw_similarities(densities, results["histograms"], None)
    densities.set_title(f"Similarity: gap {metrics['similarity_gap']:.3f}")
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow; --help needs no figures)

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _series(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["epoch"], entry[key]) for entry in history if entry[key] is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _line(axes: Axes, history: list[dict[str, Any]], key: str, *, label: str, color: str, style: str = "-") -> None:
    epochs, values = _series(history, key)
    axes.plot(epochs, values, style, color=color, label=label, marker="o", markersize=3, linewidth=1.6)


def _draw_loss(axes: Axes, results: dict[str, Any]) -> None:
    history, batch_size = results["history"], results["config"]["training"]["batch_size"]
    _line(axes, history, "train_loss", label="training", color=BLUE)
    _line(axes, history, "val_loss", label="validation", color=ORANGE)
    chance = math.log(batch_size)
    axes.axhline(chance, color=GREY, linewidth=1, linestyle=":", label=f"chance, ln {batch_size} = {chance:.2f}")
    axes.axvline(results["best_epoch"], color=GREEN, linewidth=1, linestyle="--", label="best epoch")
    axes.set(title="Contrastive loss", ylabel="nats")


def _draw_accuracy(axes: Axes, results: dict[str, Any]) -> None:
    history, batch_size = results["history"], results["config"]["training"]["batch_size"]
    images, texts = results["num_images"], results["num_texts"]
    _line(axes, history, "i2t_r1", label=f"validation R@1 image→text, of {texts} texts", color=BLUE)
    _line(axes, history, "t2i_r1", label=f"validation R@1 text→image, of {images} images", color=ORANGE)
    _line(axes, history, "train_accuracy", label=f"training, in batches of {batch_size}", color=GREY, style="--")
    axes.set(title="Accuracy", ylabel="percent")
    axes.set_ylim(bottom=0)


def _draw_rates(axes: Axes, history: list[dict[str, Any]]) -> None:
    _line(axes, history, "learning_rate", label="projection layers", color=BLUE)
    _line(axes, history, "backbone_learning_rate", label="towers", color=ORANGE, style="--")
    rates = [_series(history, key)[1] for key in ("learning_rate", "backbone_learning_rate")]
    if rates[0] != rates[1] and min(max(rate, default=0) for rate in rates) > 0:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set(title="Learning rate", ylabel="rate at the end of the epoch")


def _draw_recalls(axes: Axes, columns: dict[str, dict[str, float]], results: dict[str, Any]) -> None:
    places = np.arange(len(RECALL_KEYS))
    width = 0.8 / len(columns)
    colors = ("#9ecae1", BLUE) if len(columns) == 2 else (BLUE,)
    for number, (label, metrics) in enumerate(columns.items()):
        offset = (number - (len(columns) - 1) / 2) * width
        bars = axes.bar(
            places + offset, [metrics[key] for key in RECALL_KEYS], width * 0.95, label=label, color=colors[number]
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    chance = [results["chance"][key] for key in RECALL_KEYS]
    axes.hlines(chance, places - 0.42, places + 0.42, color=ORANGE, linewidth=1.5, label="chance")
    axes.set_xticks(places, RECALL_LABELS)
    axes.set(ylabel=f"percent of queries ({results['num_images']} images, {results['num_texts']} texts)")
    axes.set_ylim(0, min(1.15 * max(5.0, *(metrics[key] for metrics in columns.values() for key in RECALL_KEYS)), 112))
    _tidy(axes)
    axes.legend(frameon=False, fontsize=9)


def _draw_similarities(axes: Axes, histogram: dict[str, Any], baseline: dict[str, Any] | None) -> None:
    edges = np.asarray(histogram["bin_edges"], dtype=float)
    used = np.zeros(len(edges) - 1, dtype=bool)
    for key, label, color in (("positive", "matched pairs", BLUE), ("negative", "unmatched pairs", ORANGE)):
        density = _density(histogram[key], edges)
        axes.stairs(density, edges, fill=True, alpha=0.45, color=color, label=label)
        used |= density > 0.002 * density.max(initial=0)
        if baseline is not None:
            before = _density(baseline[key], edges)
            axes.stairs(before, edges, color=color, linestyle="--", linewidth=1.2, label=f"{label}, as loaded")
            used |= before > 0.002 * before.max(initial=0)
    if used.any():
        inside = np.flatnonzero(used)
        axes.set_xlim(edges[max(inside[0] - 2, 0)], edges[min(inside[-1] + 3, len(edges) - 1)])
    axes.set(xlabel="cosine similarity", ylabel="density")
    _tidy(axes)
    axes.legend(frameon=False, fontsize=9)


def _density(counts: list[int], edges: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values = np.asarray(counts, dtype=float)
    return values / max(float((values * np.diff(edges)).sum()), 1e-12)


if __name__ == "__main__":
    sys.exit(main())
