"""The figures: what they show equals what was recorded, and a wrong file is one clear line."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import visualization
from visualization import RECALL_KEYS, evaluation_metrics_figure, model_metrics_figure, training_curves_figure

ROOT = Path(__file__).resolve().parent.parent
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TOO_LARGE = 10**400  # JSON can hold it, a float cannot


def metrics(scale: float) -> dict[str, float]:
    recalls = {key: scale * (number + 1) for number, key in enumerate(RECALL_KEYS)}
    return {**recalls, "rsum": sum(recalls.values()), "similarity_gap": scale / 100, "val_loss": 3.0 / scale}


def histogram(center: float) -> dict[str, Any]:
    edges = np.linspace(-1, 1, 101)
    middles = (edges[:-1] + edges[1:]) / 2
    matched, unmatched = (
        np.round(1000 * np.exp(-(((middles - at) / 0.05) ** 2))).astype(int) for at in (center, center - 0.2)
    )
    return {"bin_edges": edges.tolist(), "positive": matched.tolist(), "negative": unmatched.tolist()}


def entry(epoch: int) -> dict[str, Any]:
    measured = {"train_loss": 3.0 / (epoch + 1), "train_accuracy": 20.0 * epoch} if epoch else {}
    rates = {"learning_rate": 1e-4 / (epoch + 1), "backbone_learning_rate": 1e-6 / (epoch + 1) if epoch else None}
    unmeasured = {"train_loss": None, "train_accuracy": None}
    return {"epoch": epoch, "step": 10 * epoch, **metrics(epoch + 1.0), **unmeasured, **measured, **rates}


def training(epochs: int = 3, best: int = 2) -> dict[str, Any]:
    return {
        "best_epoch": best,
        "metrics": metrics(best + 1.0),
        "baseline": metrics(1.0),
        "chance": {**dict.fromkeys(RECALL_KEYS, 0.5), "rsum": 3.0},
        "num_images": 1000,
        "num_texts": 5000,
        "histograms": {"baseline": histogram(0.3), "best": histogram(0.5)},
        "config": {"model": {"name": "ViT-B/32"}, "training": {"batch_size": 32}},
        "history": [entry(epoch) for epoch in range(epochs + 1)],
    }


def evaluation() -> dict[str, Any]:
    results = {key: training()[key] for key in ("metrics", "chance", "num_images", "num_texts")}
    named = {"checkpoint": "model-checkpoint/best.pt", "data": "./data", "split": "test"}
    return {**named, **results, "histograms": histogram(0.4)}


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    found = [each for each in axes.get_lines() if str(each.get_label()).startswith(label)]
    assert len(found) == 1, label
    return list(np.asarray(found[0].get_xdata())), list(np.asarray(found[0].get_ydata()))


def title(figure: Figure) -> str:
    return figure.get_suptitle()


def write(folder: Path, results: Any) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    return path


def test_curves_are_the_recorded_numbers() -> None:
    results = training()
    loss, accuracy, rates = training_curves_figure(results).axes
    history = results["history"]
    for axes, label, key in (
        (loss, "training", "train_loss"),
        (loss, "validation", "val_loss"),
        (accuracy, "validation R@1 image→text, among 5,000 texts", "i2t_r1"),
        (accuracy, "validation R@1 text→image, among 1,000 images", "t2i_r1"),
        (accuracy, "training, in batches of 32", "train_accuracy"),
        (rates, "projection", "learning_rate"),
        (rates, "backbone", "backbone_learning_rate"),
    ):
        known = [each for each in history if each[key] is not None]
        assert line(axes, label) == ([each["epoch"] for each in known], [each[key] for each in known])
    assert line(loss, "best epoch") == ([2], [history[2]["val_loss"]])
    assert set(line(loss, "chance")[1]) == {math.log(32)}
    assert rates.get_yscale() == "log"


def test_epochs_are_whole_numbers_on_the_axis() -> None:
    for axes in training_curves_figure(training(0, 0)).axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [0]


@pytest.mark.parametrize("epochs", [0, 3])
def test_highest_accuracy_is_below_the_edge(epochs: int) -> None:
    axes = training_curves_figure(training(epochs, 0)).axes[1]
    highest = max(np.asarray(each.get_ydata()).max() for each in axes.get_lines())
    assert axes.get_ylim()[1] >= 1.03 * highest


def test_equal_rates_are_on_a_linear_scale() -> None:
    results = training()
    for each in results["history"]:
        each["backbone_learning_rate"] = each["learning_rate"]
    assert training_curves_figure(results).axes[2].get_yscale() == "linear"


def test_bars_and_densities_are_the_recorded_numbers() -> None:
    results = training()
    bars, densities = model_metrics_figure(results).axes
    heights = [patch.get_height() for patch in bars.patches]  # type: ignore[attr-defined]
    assert heights == [results[group][key] for group in ("baseline", "metrics") for key in RECALL_KEYS]
    assert [text.get_text() for text in bars.texts] == [f"{height:.1f}" for height in heights]
    assert "63.0" in bars.get_title()
    assert "21.0" in bars.get_title()
    assert "0.030" in densities.get_title()
    shown = [patch.get_data() for patch in densities.patches]  # type: ignore[attr-defined]
    assert len(shown) == 4
    for data in shown:
        assert (data.values * np.diff(data.edges)).sum() == pytest.approx(1.0)
    counts = np.asarray(results["histograms"]["best"]["positive"])
    assert shown[0].values == pytest.approx(counts / counts.sum() / 0.02)
    low, high = densities.get_xlim()
    assert -0.2 < low < 0.1
    assert 0.5 < high < 0.9


def test_the_model_as_loaded_is_drawn_once_where_it_is_the_best() -> None:
    bars, densities = model_metrics_figure(training(3, 0)).axes
    assert [each.get_label() for each in bars.containers] == ["as loaded"]
    assert len(densities.patches) == 2


def test_a_rate_of_zero_is_not_drawn_on_a_log_scale() -> None:
    results = training()
    results["history"][-1] |= {"learning_rate": 0.0, "backbone_learning_rate": 0.0}
    axes = training_curves_figure(results).axes[2]
    assert axes.get_yscale() == "log"
    shown = np.asarray(axes.transScale.transform_path(axes.get_lines()[0].get_path()).vertices)
    assert np.isfinite(shown[:-1]).all()
    assert not np.isfinite(shown[-1]).all()


def test_baseline_is_drawn_on_its_own_bins() -> None:
    results = training()
    results["histograms"]["baseline"] = {"bin_edges": [-1.0, 0.0, 1.0], "positive": [1, 3], "negative": [2, 2]}
    data = model_metrics_figure(results).axes[1].patches[1].get_data()  # type: ignore[attr-defined]
    assert list(data.edges) == [-1.0, 0.0, 1.0]
    assert list(data.values) == [0.25, 0.75]


def test_evaluation_shows_one_bar_a_recall() -> None:
    results = evaluation()
    figure = evaluation_metrics_figure(results)
    heights = [patch.get_height() for patch in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert heights == [results["metrics"][key] for key in RECALL_KEYS]
    assert "best.pt" in title(figure)


def test_titles_say_when_no_epoch_was_better() -> None:
    for draw in (training_curves_figure, model_metrics_figure):
        assert "no epoch beat the model as loaded" in title(draw(training(best=0)))
        assert "epoch 2 is the best" in title(draw(training(best=2)))


@pytest.mark.parametrize(("epochs", "best"), [(3, 2), (0, 0)])
def test_pictures_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: int, best: int, recwarn: pytest.WarningsRecorder
) -> None:
    path = write(tmp_path, training(epochs, best))
    folder = tmp_path / "new" / "figures"
    assert visualization.main(["--results", str(path), "--output_dir", str(folder)]) == 0
    written = [folder / "training_curves.png", folder / "model_metrics.png"]
    assert capsys.readouterr().out.splitlines() == [str(each) for each in written]
    for each in written:
        content = each.read_bytes()
        assert content.startswith(PNG_SIGNATURE)
        assert int.from_bytes(content[16:20], "big") == 1600
    assert not [str(each.message) for each in recwarn]


def test_redrawn_pictures_are_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, training())
    first, second = (visualization.draw_figures(path, tmp_path / name) for name in ("first", "second"))
    assert [each.read_bytes() for each in first] == [each.read_bytes() for each in second]


def test_pictures_go_beside_the_results(tmp_path: Path) -> None:
    written = visualization.draw_figures(write(tmp_path, evaluation()))
    assert written == [tmp_path / "evaluation_metrics.png"]
    assert written[0].read_bytes().startswith(PNG_SIGNATURE)


def set_at(results: dict[str, Any], place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(results)
    target = changed
    for part in place[:-1]:
        target = target[part]
    if value is KeyError:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return dict(changed)


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (("history",), KeyError, "no key history"),
        (("history",), {}, "history: expected a list"),
        (("history",), [], "history: has no entry of best_epoch"),
        (("history", 1), 7, "history[1]: expected an object"),
        (("history", 1, "val_loss"), None, "history[1].val_loss: expected a number, found null"),
        (("history", 1, "train_loss"), "low", "history[1].train_loss: expected a number"),
        (("history", 1, "learning_rate"), KeyError, "no key history[1].learning_rate"),
        (("metrics", "rsum"), math.nan, "metrics.rsum: expected a number, found nan"),
        (("chance",), 3, "chance: expected an object"),
        (("config", "model", "name"), 3, "config.model.name: expected a text"),
        (("config", "training", "batch_size"), 0, "config.training.batch_size"),
        (("histograms", "best", "positive"), [1, 2], "histograms.best.positive: expected 100 counts"),
        (("histograms", "best", "bin_edges", 3), "x", "histograms.best.bin_edges"),
        (("histograms", "best", "bin_edges", 3), 5.0, "histograms.best.bin_edges"),
        (("num_texts",), True, "num_texts: expected a number"),
        (("num_texts",), TOO_LARGE, "num_texts: expected a number, found 1000"),
        (("histograms", "best", "positive", 0), TOO_LARGE, "histograms.best.positive: expected a list of numbers"),
    ],
    ids=lambda each: "too large" if each == TOO_LARGE else None,
)
def test_a_wrong_key_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: tuple[str | int, ...], value: Any, expected: str
) -> None:
    path = write(tmp_path, set_at(training(), place, value))
    assert visualization.main(["--results", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert expected in lines[0]
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", ["", "[1]", "{", "{}", '{"metrics": 3, "num_images": 2}'])
def test_other_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    assert visualization.main(["--results", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert visualization.main(["--results", str(tmp_path / "none.json")]) == 2
    assert "no such results file" in capsys.readouterr().err


def test_importing_is_light() -> None:
    code = "import sys, visualization; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
