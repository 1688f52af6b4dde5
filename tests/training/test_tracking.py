"""Runs told to a tracking service: stand-ins with the functions that are used, and the services' own libraries."""

import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cliptune.training.tracking import tracking
from tests.helpers.runs import SMALL, lines_of, small_runs
from train import main


class FakeWandb:
    """Runs by id, as `wandb` keeps them."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.fails = False

    def init(self, *, id: str, resume: str, dir: str) -> Any:
        assert resume == "allow"
        assert Path(dir).is_dir()
        run = self.runs.setdefault(id, {"logged": [], "config": {}, "summary": {}, "exits": []})
        return SimpleNamespace(
            log=lambda values, *, step: self._log(run, values, step),
            config=SimpleNamespace(update=lambda values, **_: run["config"].update(values)),
            summary=SimpleNamespace(update=run["summary"].update),
            finish=lambda *, exit_code: run["exits"].append(exit_code),
        )

    def _log(self, run: dict[str, Any], values: dict[str, float], step: int) -> None:
        if self.fails:
            raise RuntimeError("the service is away")
        run["logged"].append((step, values))


class FakeMlflow:
    """Runs with tags, as `mlflow` keeps them."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.active: dict[str, Any] | None = None

    def search_runs(self, *, filter_string: str, max_results: int, output_format: str) -> list[Any]:
        assert (max_results, output_format) == (1, "list")
        found = [run for run in self.runs if filter_string.endswith(f"= '{run['tags']['cliptune.run_id']}'")]
        return [SimpleNamespace(info=SimpleNamespace(run_id=run["id"])) for run in found]

    def start_run(self, *, run_id: str | None, tags: dict[str, str]) -> Any:
        assert self.active is None
        if run_id is None:
            self.runs.append({"id": str(len(self.runs)), "tags": {}, "logged": [], "params": {}, "ends": []})
            run_id = self.runs[-1]["id"]
        self.active = self.runs[int(run_id)]
        self.active["tags"].update(tags)
        return SimpleNamespace(data=SimpleNamespace(params=dict(self.active["params"])))

    def log_params(self, values: dict[str, Any]) -> None:
        assert self.active is not None
        assert len(values) <= 100
        assert not values.keys() & self.active["params"].keys()
        self.active["params"].update(values)

    def log_metrics(self, values: dict[str, float], *, step: int) -> None:
        assert self.active is not None
        self.active["logged"].append((step, values))

    def set_tags(self, tags: dict[str, Any]) -> None:
        assert self.active is not None
        self.active["tags"].update(tags)

    def end_run(self, *, status: str) -> None:
        assert self.active is not None
        self.active["ends"].append(status)
        self.active = None


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


@pytest.fixture
def runs() -> Iterator[pytest.MonkeyPatch]:
    with small_runs() as patch:
        yield patch


def flags_for(data_dir: Path, output_dir: Path, *more: str) -> list[str]:
    return ["--data_dir", str(data_dir), "--output_dir", str(output_dir), *SMALL, "--log_interval", "2", *more]


def run_id_of(folder: Path) -> str:
    run_id: str = json.loads((folder / "results" / "training_results.json").read_text())["run_id"]
    return run_id


def told_epochs(logged: list[tuple[int, dict[str, float]]]) -> list[tuple[int, float]]:
    return [(step, values["epoch/rsum"]) for step, values in logged if "epoch/rsum" in values]


def recorded_epochs(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["rsum"]) for record in lines_of(folder / "logs" / "history.jsonl")]


@pytest.mark.slow
def test_wandb_is_told_numbers_settings_and_the_verdict_and_goes_on_with_the_run(
    wandb: FakeWandb, runs: pytest.MonkeyPatch, sample_dir: Path, tmp_path: Path
) -> None:
    assert main(flags_for(sample_dir, tmp_path, "--num_epochs", "1", "--track", "wandb")) == 0
    assert main(flags_for(sample_dir, tmp_path, "--resume", "--num_epochs", "2")) == 0
    assert list(wandb.runs) == [run_id_of(tmp_path)]
    (run,) = wandb.runs.values()
    assert told_epochs(run["logged"]) == recorded_epochs(tmp_path)
    assert len(recorded_epochs(tmp_path)) == 3
    assert [step for step, values in run["logged"] if "step/train_loss" in values] == [2, 4, 6, 8, 10, 12]
    assert run["config"]["training.num_epochs"] == 2
    assert "RSum" in run["summary"]["verdict"]
    assert run["exits"] == [0, 0]


@pytest.mark.slow
def test_mlflow_is_told_the_same(
    mlflow: FakeMlflow, runs: pytest.MonkeyPatch, sample_dir: Path, tmp_path: Path
) -> None:
    assert main(flags_for(sample_dir, tmp_path, "--num_epochs", "1", "--track", "mlflow")) == 0
    assert main(flags_for(sample_dir, tmp_path, "--resume", "--num_epochs", "2")) == 0
    (run,) = mlflow.runs
    assert told_epochs(run["logged"]) == recorded_epochs(tmp_path)
    assert run["tags"]["cliptune.run_id"] == run_id_of(tmp_path)
    assert "RSum" in run["tags"]["verdict"]
    assert run["params"]["training.num_epochs"] == 1  # which MLflow lets nobody change
    assert run["ends"] == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_nobody_is_told_unless_the_flag_is_given(
    wandb: FakeWandb, mlflow: FakeMlflow, runs: pytest.MonkeyPatch, sample_dir: Path, tmp_path: Path
) -> None:
    assert main(flags_for(sample_dir, tmp_path, "--num_epochs", "1")) == 0
    assert (wandb.runs, mlflow.runs) == ({}, [])


def test_a_missing_library_is_one_line_before_anything_is_read(
    runs: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.setitem(sys.modules, "mlflow", None)
    assert main(flags_for(tmp_path / "nothing", tmp_path, "--track", "mlflow")) == 2
    said = capsys.readouterr().err
    assert said == "train.py: error: --track mlflow needs mlflow: pip install mlflow-skinny\n"


def test_a_service_that_cannot_be_begun_is_an_error_with_a_way_out(wandb: FakeWandb, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--track wandb: .*without the flag"), tracking("wandb") as tracker:
        tracker.begin(run_id="a", settings={}, folder=tmp_path / "file")


def test_a_service_that_fails_later_is_left_and_the_run_goes_on(
    wandb: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), tracking("wandb") as tracker:
        tracker.begin(run_id="a", settings={}, folder=tmp_path)
        wandb.fails = True
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 1.0}, 2)
    assert caplog.text.count("wandb is told no more of the run: the service is away") == 1


def test_a_run_that_ends_before_its_verdict_is_not_told_as_finished(mlflow: FakeMlflow, tmp_path: Path) -> None:
    with tracking("mlflow") as tracker:
        tracker.begin(run_id="a", settings={}, folder=tmp_path)
    with pytest.raises(ZeroDivisionError), tracking("mlflow") as tracker:
        tracker.begin(run_id="b", settings={}, folder=tmp_path)
        1 / 0  # noqa: B018
    assert [run["ends"] for run in mlflow.runs] == [["KILLED"], ["FAILED"]]


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.mark.slow
@needs("mlflow")
def test_mlflow_itself_keeps_a_run_in_local_files(runs: pytest.MonkeyPatch, sample_dir: Path, tmp_path: Path) -> None:
    mlflow: Any = importlib.import_module("mlflow")

    runs.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for it
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    assert main(flags_for(sample_dir, tmp_path, "--num_epochs", "1", "--track", "mlflow")) == 0
    assert main(flags_for(sample_dir, tmp_path, "--resume", "--num_epochs", "2")) == 0
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED"
    assert "RSum" in run.data.tags["verdict"]
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "epoch/rsum")
    assert sorted((each.step, each.value) for each in history) == recorded_epochs(tmp_path)


@pytest.mark.slow
@needs("wandb")
def test_wandb_itself_keeps_a_run_offline(runs: pytest.MonkeyPatch, sample_dir: Path, tmp_path: Path) -> None:
    runs.setenv("WANDB_MODE", "offline")
    runs.setenv("WANDB_SILENT", "true")
    runs.setenv("WANDB_ERROR_REPORTING", "false")
    assert main(flags_for(sample_dir, tmp_path, "--num_epochs", "1", "--track", "wandb")) == 0
    assert main(flags_for(sample_dir, tmp_path, "--resume", "--num_epochs", "2")) == 0
    files = list((tmp_path / "logs" / "wandb").glob(f"offline-run-*/run-{run_id_of(tmp_path)}.wandb"))
    assert files
    assert b"epoch/rsum" in b"".join(path.read_bytes() for path in files)
