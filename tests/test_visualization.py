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
from matplotlib.figure import Figure

import visualization
from tests.helpers.recorded import evaluation_values, training_values
from visualization import draw_figures

ROOT = Path(__file__).resolve().parent.parent
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def warnings_of(recwarn: pytest.WarningsRecorder) -> list[str]:
    # those that Python shows to a user; of others, what earlier tests left open is told when it is collected
    hidden = (ResourceWarning, DeprecationWarning, PendingDeprecationWarning)
    return [str(each.message) for each in recwarn if not issubclass(each.category, hidden)]


def write(folder: Path, results: Any) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    return path


@pytest.mark.slow
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
    assert not warnings_of(recwarn)


@pytest.mark.slow
def test_redrawn_figures_are_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, training_values())
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "interpolation.png").touch()  # of an average that the results do not hold any more
    first, second = (visualization.draw_figures(path, tmp_path / name) for name in ("first", "second"))
    assert [figure.read_bytes() for figure in first] == [figure.read_bytes() for figure in second]
    assert sorted((tmp_path / "first").iterdir()) == sorted(first)


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


@pytest.mark.slow
def test_importing_is_light() -> None:
    code = "import sys, visualization; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def with_bins(num_bins: int) -> dict[str, Any]:
    return {
        "bin_edges": np.linspace(-1, 1, num_bins + 1).tolist(),
        "positive": [1] * num_bins,
        "negative": [2] * num_bins,
    }


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-320, 1e-99, 1e99])
def test_extreme_numbers_are_drawn_without_a_word(
    size: float, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    values = training_values()
    for record in values["history"]:
        record |= {key: size for key in record if isinstance(record[key], float)}
    values["schedule"] = [[0, size, size / 2], [1, 0.0, 0.0]]
    assert len(draw_figures(write(tmp_path, values))) == 2
    assert not warnings_of(recwarn)


def test_figures_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: Figure, file: Any, **options: Any) -> None:
        file.write(PNG_SIGNATURE)
        raise KeyboardInterrupt

    path = write(tmp_path, training_values())
    monkeypatch.setattr(Figure, "savefig", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw_figures(path)
    assert list(tmp_path.iterdir()) == [path]
