"""What the stages write is what figures read, and a wrong file is one line that names file and key."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest

from cliptune import results
from cliptune.results import (
    RECALL_KEYS,
    EpochRecord,
    EvaluationResults,
    Metrics,
    SchedulePoint,
    TrainingResults,
)
from cliptune.runtime.environment import git_commit
from tests.helpers.recorded import evaluation_values, training_values

ROOT = Path(__file__).resolve().parent.parent
TOO_LARGE = 10**400  # JSON can hold it, a float cannot


def write(folder: Path, values: Any) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("kind", "values"), [(TrainingResults, training_values()), (EvaluationResults, evaluation_values())]
)
def test_round_trip(
    tmp_path: Path, kind: type[TrainingResults] | type[EvaluationResults], values: dict[str, Any]
) -> None:
    path = tmp_path / "new" / "results.json"
    written = kind.model_validate(values)
    results.write(path, written)
    assert json.loads(path.read_text(encoding="utf-8")) == values
    assert results.read(path) == written


def test_a_file_of_before_run_and_schedule_were_recorded_is_read(tmp_path: Path) -> None:
    values = training_values()
    for key in ("run", "schedule", "started_at", "finished_at", "peak_memory_gb"):
        del values[key]
    del values["chance"]["val_loss"]
    found = results.read(write(tmp_path, values))
    assert isinstance(found, TrainingResults)
    assert (found.run, found.schedule, found.chance.val_loss) == (None, [], None)
    assert found.model_name == values["config"]["model"]["name"]


def test_keys_of_a_later_version_are_kept(tmp_path: Path) -> None:
    values = training_values()
    values["opinion"] = {"gain": 3.0}
    values["history"][1]["ema"] = True
    path = write(tmp_path, values)
    results.write(path, results.read(path))
    assert json.loads(path.read_text(encoding="utf-8")) == values


def test_the_model_that_was_trained_is_named_not_the_settings() -> None:
    values = training_values()
    values["run"]["model_name"] = "RN50"
    assert TrainingResults.model_validate(values).model_name == "RN50"


def test_recalls_are_fields_of_the_metrics() -> None:
    assert set(RECALL_KEYS) < Metrics.model_fields.keys()
    metrics = Metrics.model_validate(evaluation_values()["metrics"])
    assert metrics.recalls() == [getattr(metrics, key) for key in RECALL_KEYS]


def test_what_cannot_be_drawn_is_not_written() -> None:
    values = training_values()["history"][1]
    with pytest.raises(ValueError, match="train_loss"):
        EpochRecord.model_validate(values | {"train_loss": math.inf})


def set_at(values: dict[str, Any], key: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(values)
    target = changed
    for part in key[:-1]:
        target = target[part]
    if value is KeyError:
        del target[key[-1]]
    else:
        target[key[-1]] = value
    return dict(changed)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (("history",), KeyError, "no key history, which training_results.json and evaluation_results.json have"),
        (("history",), {}, "history: expected a list, found an object"),
        (("history",), [], "history: has no record of best_epoch, 2"),
        (("history", 1), 7, "history[1]: expected an object, found 7"),
        (("history", 1, "val_loss"), None, "history[1].val_loss: expected a number, found null"),
        (("history", 1, "train_loss"), "low", "history[1].train_loss: expected a number, found a text"),
        (("history", 1, "learning_rate"), KeyError, "no key history[1].learning_rate"),
        (("metrics", "rsum"), math.nan, "metrics.rsum: expected a number, found nan"),
        (("metrics", "rsum"), -math.inf, "metrics.rsum: expected a number, found -inf"),
        (("chance",), 3, "chance: expected an object, found 3"),
        (("config", "model", "name"), 3, "config.model.name: expected a text, found 3"),
        (("config", "training", "batch_size"), 0, "config.training.batch_size: expected a number over 0, found 0"),
        (("histograms", "best", "positive"), [1, 2], "histograms.best.positive: expected 100 counts"),
        (("histograms", "best", "positive", 0), -1, "histograms.best.positive[0]: expected a number of 0 or more"),
        (("histograms", "best", "bin_edges", 3), "x", "histograms.best.bin_edges[3]: expected a number, found a text"),
        (("histograms", "best", "bin_edges", 3), 5.0, "histograms.best.bin_edges: expected two or more numbers, each"),
        (("num_texts",), True, "num_texts: expected a number, found true or false"),
        (("num_texts",), TOO_LARGE, "num_texts: expected a number, found 1000"),
        (("metrics", "rsum"), TOO_LARGE, "metrics.rsum: expected a number, found 1000"),
        (("metrics", "rsum"), -TOO_LARGE, "metrics.rsum: expected a number, found -1000"),
        (("schedule", 1), [1, 2, 3, 4], "schedule[1]: expected 3 values, found a list"),
        (("histograms", "best", "positive", 0), TOO_LARGE, "histograms.best.positive[0]: expected a number, found 10"),
        (("schedule", 1), [1, 2.0], "no key schedule[1][2]"),
        (("schedule", 1), 3, "schedule[1]: expected a list, found 3"),
        (("schedule", 1, 1), "x", "schedule[1][1]: expected a number, found a text"),
        (("run", "versions"), [], "run.versions: expected an object, found a list"),
        (("peak_memory_gb",), {"\x1b[31m" + "k" * 5000: "x"}, r"peak_memory_gb.\x1b[31mkkk"),
    ],
    ids=lambda each: "too large" if each == TOO_LARGE else None,
)
def test_a_wrong_key_is_named(tmp_path: Path, key: tuple[str | int, ...], value: Any, expected: str) -> None:
    path = write(tmp_path, set_at(training_values(), key, value))
    with pytest.raises(ValueError, match="results") as error:
        results.read(path)
    message = str(error.value)
    if key == ("schedule", 1) and tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 14):
        assert "schedule[1]" in message  # older ones say less well what is wrong with a point
    else:
        assert message.startswith(f"{path}: {expected}")
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize("content", ["", "[1]", "{", "{}", '{"metrics": 3, "num_images": 2}', "[" * 100_000])
def test_other_files_are_refused_with_their_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json: "):
        results.read(path)


def test_a_file_of_any_size_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(ValueError, match="not a results file: it has 1,099,512 MB"):
        results.read(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such results file: "):
        results.read(tmp_path / "none.json")


def test_the_commit_is_that_of_the_checkout() -> None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a Git checkout")
    assert str(git_commit()).removesuffix("-dirty") == done.stdout.strip()


def test_results_are_read_without_torch_or_numpy() -> None:
    code = "import sys, cliptune.results; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_schedule_is_a_list_of_points() -> None:
    assert TrainingResults.model_validate(training_values()).schedule[-1] == SchedulePoint(30, 0, 0)
