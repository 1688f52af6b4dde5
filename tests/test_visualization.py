"""The figures: what they show equals what was recorded, and a wrong file is one clear line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import visualization
from cliptune.results import RECALL_KEYS, EvaluationResults, TrainingResults
from tests.helpers.recorded import STEPS_PER_EPOCH, evaluation_values, training_values
from visualization import draw_figures, evaluation_metrics_figure, model_metrics_figure, training_curves_figure

ROOT = Path(__file__).resolve().parent.parent
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def curves(values: dict[str, Any]) -> Figure:
    return training_curves_figure(TrainingResults.model_validate(values))


def bars_and_densities(values: dict[str, Any]) -> Figure:
    return model_metrics_figure(TrainingResults.model_validate(values))


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]


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
    values = training_values()
    loss, accuracy, _, rsum = curves(values).axes
    history = values["history"]
    for axes, label, key in (
        (loss, "training", "train_loss"),
        (loss, "validation", "val_loss"),
        (accuracy, "validation R@1 image→text, among 5,000 texts", "i2t_r1"),
        (accuracy, "validation R@1 text→image, among 1,000 images", "t2i_r1"),
        (accuracy, "training, in batches of 32", "train_accuracy"),
        (rsum, "validation RSum", "rsum"),
    ):
        known = [record for record in history if record[key] is not None]
        assert line(axes, label) == ([record["epoch"] for record in known], [record[key] for record in known])
    assert line(rsum, "best epoch") == ([2], [history[2]["rsum"]])


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


def bars_of(axes: Axes, label: str) -> list[tuple[float, float, float]]:
    """Where vertical bars stand, begin and end."""
    (found,) = [each for each in axes.collections if str(each.get_label()).startswith(label)]
    return [(low[0], low[1], high[1]) for low, high in found.get_segments()]  # type: ignore[attr-defined]


def test_intervals_are_bars_from_the_model_as_loaded() -> None:
    values = with_verdict(training_values())
    loaded = values["baseline"]
    _, accuracy, _, rsum = curves(values).axes
    low, high = loaded["rsum"] + 30, loaded["rsum"] + 90
    assert bars_of(rsum, "95% interval") == [(epoch, low, high) for epoch in (1, 2, 3)]
    ends = max(loaded["i2t_r1"] - 4, 0), loaded["i2t_r1"] + 15
    assert bars_of(accuracy, "95% interval") == [(epoch, *ends) for epoch in (1, 2, 3)]
    bars, _ = bars_and_densities(values).axes
    found = bars_of(bars, "95% interval of the gain")
    assert [each[1:] for each in found] == [(loaded[key] + 4, loaded[key] + 15) for key in RECALL_KEYS]
    of_last: list[Any] = bars.patches[len(RECALL_KEYS) :]
    for patch, (place, _, _) in zip(of_last, found, strict=True):
        assert patch.get_x() < place < patch.get_x() + patch.get_width()
    for draw in (curves, bars_and_densities):
        assert "Better than before: RSum +60.0 (+30.0 to +90.0) on 1,000 validation images" in title(draw(values))


def test_many_intervals_are_an_area() -> None:
    rsum = curves(with_verdict(training_values(60, 2))).axes[3]
    assert not [each for each in rsum.collections if hasattr(each, "get_segments")]
    assert len(rsum.collections) == 1


def test_a_test_split_is_what_bars_show() -> None:
    values = with_verdict(training_values())
    of_test = {key: values[key] for key in ("num_texts", "chance", "histograms", "baseline")}
    values["test"] = {**of_test, "num_images": 77, "metrics": values["history"][3]}
    values["verdict"] |= {"split": "test", "num_images": 77}
    bars, _ = bars_and_densities(values).axes
    assert "77 images" in bars.get_ylabel()
    heights = [patch.get_height() for patch in bars.patches]  # type: ignore[attr-defined]
    assert heights[len(RECALL_KEYS) :] == [values["history"][3][key] for key in RECALL_KEYS]


def test_rates_are_drawn_by_step() -> None:
    """One epoch has as many points as steps, not two."""
    for epochs in (1, 3):
        values = training_values(epochs, 1)
        axes = curves(values).axes[2]
        steps, projection, backbone = (list(column) for column in zip(*values["schedule"], strict=True))
        assert len(steps) == epochs * STEPS_PER_EPOCH + 1
        at = [step / STEPS_PER_EPOCH for step in steps]
        assert line(axes, "projection") == (pytest.approx(at), projection)
        assert line(axes, "backbone") == (pytest.approx(at), backbone)


def test_rates_of_a_stopped_run_end_where_it_ended() -> None:
    values = training_values(10, 2)
    values["history"] = values["history"][:4]
    epochs, rates = line(curves(values).axes[2], "projection")
    assert epochs[-1] == 3
    assert rates[-1] > 0


def test_the_zero_at_the_end_is_shown_and_is_no_early_drop() -> None:
    axes = curves(training_values()).axes[2]
    for drawn in axes.get_lines():
        x, y = drawn.get_xydata().T  # type: ignore[union-attr]
        assert (x[-1], y[-1]) == (3, 0)
        shown = axes.transAxes.inverted().transform(axes.transData.transform(drawn.get_xydata()))
        assert shown[:, 1] == pytest.approx(np.clip(shown[:, 1], 0, 1))  # all in sight, the 0 on the axis
        assert shown[-1, 1] == pytest.approx(0)
        assert drawn.get_drawstyle() == "steps-post"  # the last rate holds until the last step ends


def test_a_file_without_a_schedule_shows_the_epochs_rates() -> None:
    values = training_values()
    del values["schedule"]
    recorded = [record["learning_rate"] for record in values["history"]]
    assert line(curves(values).axes[2], "projection") == ([0, 1, 2, 3], recorded)


def test_rates_of_one_kind_are_on_a_linear_scale() -> None:
    equal, frozen = training_values(), training_values()
    for point in equal["schedule"]:
        point[2] = point[1]
    for point in frozen["schedule"]:
        point[2] = 0.0
    assert curves(equal).axes[2].get_yscale() == "linear"
    axes = curves(frozen).axes[2]
    assert (axes.get_yscale(), labels(axes)) == ("linear", ["projection layers"])
    assert curves(training_values()).axes[2].get_yscale() == "symlog"


def test_chance_of_a_validation_set_smaller_than_a_batch_is_its_own() -> None:
    values = training_values()
    values["config"]["training"]["batch_size"] = 18
    values["chance"]["val_loss"] = math.log(6)
    loss = curves(values).axes[0]
    assert set(line(loss, "chance, training: ln 18 = 2.89")[1]) == {math.log(18)}
    assert set(line(loss, "chance, validation: ln 6 = 1.79")[1]) == {math.log(6)}
    del values["chance"]["val_loss"]  # a file of before it was recorded
    values["num_images"] = 6
    assert labels(curves(values).axes[0]) == labels(loss)


def test_equal_chances_are_one_line() -> None:
    loss, accuracy, *_ = curves(training_values()).axes
    assert set(line(loss, "chance: ln 32 = 3.47")[1]) == {math.log(32)}
    assert set(line(accuracy, "chance: R@1 0.5%")[1]) == {0.5}
    assert len([label for label in labels(loss) + labels(accuracy) if "chance" in label]) == 2


def test_chance_of_both_directions_is_shown() -> None:
    values = training_values()
    values["chance"] |= {"i2t_r1": 0.25, "t2i_r1": 100.0}
    accuracy = curves(values).axes[1]
    assert set(line(accuracy, "chance, image→text: R@1 0.25%")[1]) == {0.25}
    assert set(line(accuracy, "chance, text→image: R@1 100%")[1]) == {100.0}
    assert accuracy.get_ylim()[1] > 100


def test_epochs_are_whole_numbers_on_the_axis() -> None:
    for axes in curves(training_values(0, 0)).axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [0]


@pytest.mark.parametrize("epochs", [0, 3])
def test_highest_accuracy_is_below_the_edge(epochs: int) -> None:
    axes = curves(training_values(epochs, 0)).axes[1]
    highest = max(np.asarray(drawn.get_ydata()).max() for drawn in axes.get_lines())
    assert axes.get_ylim()[1] >= 1.03 * highest


def test_bars_and_densities_are_the_recorded_numbers() -> None:
    values = training_values()
    bars, densities = bars_and_densities(values).axes
    heights = [patch.get_height() for patch in bars.patches]  # type: ignore[attr-defined]
    assert heights == [values[group][key] for group in ("baseline", "metrics") for key in RECALL_KEYS]
    assert [text.get_text() for text in bars.texts] == [f"{height:.1f}" for height in heights]
    assert "63.0" in bars.get_title()
    assert "21.0" in bars.get_title()
    assert "0.030" in densities.get_title()
    shown = [patch.get_data() for patch in densities.patches]  # type: ignore[attr-defined]
    assert len(shown) == 4
    for data in shown:
        assert (data.values * np.diff(data.edges)).sum() == pytest.approx(1.0)
    counts = np.asarray(values["histograms"]["best"]["positive"])
    assert shown[0].values == pytest.approx(counts / counts.sum() / 0.02)
    low, high = densities.get_xlim()
    assert -0.2 < low < 0.1
    assert 0.5 < high < 0.9


def test_the_model_as_loaded_is_drawn_once_where_it_is_the_best() -> None:
    bars, densities = bars_and_densities(training_values(3, 0)).axes
    assert [container.get_label() for container in bars.containers] == ["as loaded"]
    assert len(bars.patches) == len(RECALL_KEYS)
    assert len(densities.patches) == 2
    assert "as loaded" not in bars.get_title() + densities.get_title()


def test_one_image_has_no_unmatched_pair() -> None:
    values = training_values(3, 0)
    values |= {"num_images": 1, "num_texts": 1}
    values["histograms"]["best"] = {"bin_edges": [-1.0, 0.0, 0.5, 1.0], "positive": [0, 1, 0], "negative": [0, 0, 0]}
    bars, densities = bars_and_densities(values).axes
    assert "(1 image, 1 text)" in bars.get_ylabel()
    assert [list(patch.get_data().values) for patch in densities.patches] == [[0, 2, 0], [0, 0, 0]]  # type: ignore[attr-defined]


def test_baseline_is_drawn_on_its_own_bins() -> None:
    values = training_values()
    values["histograms"]["baseline"] = {"bin_edges": [-1.0, 0.0, 1.0], "positive": [1, 3], "negative": [2, 2]}
    data = bars_and_densities(values).axes[1].patches[1].get_data()  # type: ignore[attr-defined]
    assert list(data.edges) == [-1.0, 0.0, 1.0]
    assert list(data.values) == [0.25, 0.75]


def test_a_gap_of_nothing_has_no_sign() -> None:
    values = training_values()
    values["metrics"]["similarity_gap"] = -1e-5
    assert bars_and_densities(values).axes[1].get_title().startswith("Similarity: gap 0.000")


def test_evaluation_shows_one_bar_a_recall() -> None:
    values = evaluation_values()
    figure = evaluation_metrics_figure(EvaluationResults.model_validate(values))
    heights = [patch.get_height() for patch in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert heights == [values["metrics"][key] for key in RECALL_KEYS]
    assert title(figure) == "ViT-B/32, checkpoint best.pt, data data, split test"
    del values["run"]
    assert title(evaluation_metrics_figure(EvaluationResults.model_validate(values))).startswith("checkpoint best.pt")


def test_titles_say_when_no_epoch_was_better() -> None:
    for draw in (curves, bars_and_densities):
        assert "no epoch beat the model as loaded" in title(draw(training_values(best=0)))
        assert "epoch 2 is the best" in title(draw(training_values(best=2)))
    assert title(curves(training_values(1, 1))) == "ViT-B/32, 1 epoch: epoch 1 is the best"


def test_titles_name_the_model_that_was_trained_as_it_is() -> None:
    values = training_values()
    values["run"]["model_name"] = "my $x_1$\nmodel"  # no formula, no second line
    for draw in (curves, bars_and_densities):
        assert title(draw(values)).startswith(r"my $x_1$\nmodel")
        draw(values).canvas.draw()


@pytest.mark.parametrize(("epochs", "best"), [(3, 2), (0, 0), (200, 150)])
def test_figures_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: int, best: int, recwarn: pytest.WarningsRecorder
) -> None:
    path = write(tmp_path, training_values(epochs, best))
    folder = tmp_path / "new" / "figures"
    assert visualization.main(["--results", str(path), "--output_dir", str(folder)]) == 0
    written = [folder / "training_curves.png", folder / "model_metrics.png"]
    assert capsys.readouterr().out.splitlines() == [str(figure) for figure in written]
    for figure in written:
        content = figure.read_bytes()
        assert content.startswith(PNG_SIGNATURE)
        assert int.from_bytes(content[16:20], "big") == 1600
    assert not [str(warning.message) for warning in recwarn]


def test_redrawn_figures_are_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, training_values())
    first, second = (visualization.draw_figures(path, tmp_path / name) for name in ("first", "second"))
    assert [figure.read_bytes() for figure in first] == [figure.read_bytes() for figure in second]


def test_figures_go_beside_the_results(tmp_path: Path) -> None:
    written = visualization.draw_figures(write(tmp_path, evaluation_values()))
    assert written == [tmp_path / "evaluation_metrics.png"]
    assert written[0].read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("content", ["", "[1]", "{", "{}", '{"metrics": 3, "num_images": 2}', '{"history": 3}'])
def test_a_file_of_something_else_is_one_line_and_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    assert visualization.main(["--results", str(path)]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert str(path) in message
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visualization.main(["--results", str(tmp_path / "none.json")]) == 2
    assert "no such results file" in capsys.readouterr().err


def test_importing_is_light() -> None:
    code = "import sys, visualization; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_letters_that_no_font_has_are_escaped(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box for each letter says nothing, and matplotlib warns of each."""
    monkeypatch.setattr(visualization, "CJK_FONTS", ())
    values = evaluation_values()
    values["run"]["model_name"] = "模型 \U0001f600\U00020000 é $x_1$"
    drawn = title(evaluation_metrics_figure(EvaluationResults.model_validate(values)))
    assert drawn.startswith(r"\u6a21\u578b")
    assert r"\U00020000 é $x_1$, checkpoint best.pt" in drawn
    draw_figures(write(tmp_path, values))
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


def test_letters_of_another_font_are_drawn_with_it(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    letters = {
        name: set(font_manager.get_font(paths[name]).get_charmap()) for name in ("DejaVu Sans", "STIXNonUnicode")
    }
    letter = chr(max(letters["STIXNonUnicode"] - letters["DejaVu Sans"]))  # stands for a Chinese one
    monkeypatch.setattr(visualization, "CJK_FONTS", ("No Such Font", "STIXNonUnicode"))
    monkeypatch.setattr(visualization, "shown", lambda text, _: text)
    values = training_values()
    values["run"]["model_name"] = letter
    assert title(bars_and_densities(values)).startswith(f"{letter}: ")
    draw_figures(write(tmp_path, values))
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


@pytest.mark.parametrize("name", ["\x1b[31m\r\n\u202e\u2066\u2028\x9b", "M" * 1_000_000, "模" * 10_000])
def test_names_of_a_file_are_short_printable_and_one_line(name: str) -> None:
    values = training_values()
    values["run"]["model_name"] = name
    for figure in (curves(values), bars_and_densities(values)):
        assert title(figure).isprintable()
        assert len(title(figure)) < 1500
    values = evaluation_values()
    values |= {"checkpoint": name, "data": name, "split": name}
    drawn = title(evaluation_metrics_figure(EvaluationResults.model_validate(values)))
    assert drawn.isprintable()
    assert len(drawn) < 1500


def with_bins(num_bins: int) -> dict[str, Any]:
    return {
        "bin_edges": np.linspace(-1, 1, num_bins + 1).tolist(),
        "positive": [1] * num_bins,
        "negative": [2] * num_bins,
    }


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("histograms", "best"), with_bins(1_000_000), "histograms.best.bin_edges: expected at most 10,000 bins"),
        (("histograms", "best", "bin_edges"), [-1e99, *[0.0] * 99, 1e99], "histograms.best.bin_edges: expected"),
        (("history", 1, "val_loss"), 1e308, "history[1].val_loss: expected a number of 1e+100 or less, found 1e+308"),
        (("metrics", "rsum"), -1e308, "metrics.rsum: expected a number of -1e+100 or more, found -1e+308"),
        (("schedule", 0, 1), math.nan, "schedule[0][1]: expected a number, found nan"),
        (("history",), [], "history: has no record of best_epoch, 2"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    place: tuple[Any, ...], value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = training_values()
    target: Any = values
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    path = write(tmp_path, values)
    assert visualization.main(["--results", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"visualization.py: error: {path}: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [1e-320, 1e-99, 1e99])
def test_extreme_numbers_are_drawn_without_a_word(
    size: float, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    values = training_values()
    for record in values["history"]:
        record |= {key: size for key in record if isinstance(record[key], float)}
    values["schedule"] = [[0, size, size / 2], [1, 0.0, 0.0]]
    assert len(draw_figures(write(tmp_path, values))) == 2
    assert not list(recwarn)


def test_figures_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: Figure, file: Any, **options: Any) -> None:
        file.write(PNG_SIGNATURE)
        raise KeyboardInterrupt

    path = write(tmp_path, training_values())
    monkeypatch.setattr(Figure, "savefig", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw_figures(path)
    assert list(tmp_path.iterdir()) == [path]
