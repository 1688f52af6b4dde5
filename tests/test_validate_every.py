"""Runs that are evaluated within an epoch: where, and that one which is stopped anywhere goes on to the same end."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.training.checkpoint import RunFiles
from cliptune.training.intervals import Interval
from evaluation import Evaluation, evaluate
from tests.helpers.runs import SMALL, assert_same_runs, lines_of, signal_at, small_runs
from train import main

FLAGS = [*SMALL, "--num_epochs", "2", "--validate_every", "4", "--precision", "fp32"]
"""Epochs of 6 steps, evaluated after steps 4, 6, 8 and 12."""


@pytest.fixture(scope="module")
def whole(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with small_runs():
        assert main([*FLAGS, "--data_dir", str(sample_dir), "--output_dir", str(folder)]) == 0
    return folder


def rsums(*values: float) -> Callable[..., Evaluation]:
    """An evaluation whose RSum is the next of these, as if no other number had changed."""
    left = iter(values)

    def made_up(*arguments: Any, **options: Any) -> Evaluation:
        found = evaluate(*arguments, **options)
        return found._replace(metrics={**found.metrics, "rsum": next(left)})

    return made_up


def test_evaluations_within_an_epoch_are_records_of_their_own(whole: Path) -> None:
    results = json.loads((whole / "results/training_results.json").read_text())
    places = [(record["epoch"], record["step"]) for record in results["history"]]
    assert places == [(0, 0), (4 / 6, 4), (1, 6), (1 + 2 / 6, 8), (2, 12)]
    assert [type(epoch) for epoch, _ in places] == [int, float, int, float, int]
    steps, sizes = lines_of(whole / "logs/steps.jsonl"), [10, 10, 10, 10, 10, 4]
    loss = [sum(line["loss"] * size for line, size in zip(steps[:n], sizes[:n], strict=True)) for n in (4, 6)]
    means = [record["train_loss"] for record in results["history"][1:3]]
    assert means == pytest.approx([loss[0] / 40, loss[1] / 54])  # that of an epoch is of all its batches
    log = (whole / "logs/train.log").read_text()
    assert "epoch 0.67: loss " in log
    assert "epoch 1.33: loss " in log


@pytest.mark.slow
def test_the_best_model_may_be_one_within_an_epoch(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files, flags = RunFiles(tmp_path), [*FLAGS, "--data_dir", str(sample_dir), "--output_dir", str(tmp_path)]
    small.setattr("train.evaluate", rsums(100, 200, 150, 150, 150))
    assert main([*flags, "--early_stopping_patience", "2"]) == 0
    error = capsys.readouterr().err
    assert error.count("early stop: no better RSum for 2 evaluations") == 1
    best = load_checkpoint(files.best)
    assert (best["epoch"], best["global_step"]) == (1, 4)
    assert json.loads(files.results.read_text())["best_epoch"] == 4 / 6
    assert load_checkpoint(files.last)["global_step"] == 8  # within epoch 2
    assert main(["--output_dir", str(tmp_path), "--resume"]) == 0
    error = capsys.readouterr().err
    assert "nothing is left to train: no better RSum for 2 evaluations" in error
    assert "early stop" not in error
    assert main(["--output_dir", str(tmp_path), "--resume", "--early_stopping_patience", "3"]) == 0
    assert load_checkpoint(files.last)["global_step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 8])
def test_a_run_that_is_stopped_between_evaluations_goes_on_to_the_same_end(
    step: int, whole: Path, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    signal_at(small, {step: signal.SIGTERM})
    assert main([*FLAGS, "--data_dir", str(sample_dir), "--output_dir", str(tmp_path)]) == 143
    assert load_checkpoint(RunFiles(tmp_path).last)["global_step"] == step
    assert main(["--output_dir", str(tmp_path), "--resume"]) == 0
    assert_same_runs(tmp_path, whole)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_an_evaluation_within_an_epoch_does_it_again(
    whole: Path, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    calls = iter(range(9))

    def interrupted(*arguments: Any, **options: Any) -> Evaluation:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("went on")
        return evaluate(*arguments, **options)

    small.setattr("train.evaluate", interrupted)
    assert main([*FLAGS, "--data_dir", str(sample_dir), "--output_dir", str(tmp_path)]) == 143
    assert load_checkpoint(RunFiles(tmp_path).last)["global_step"] == 4
    assert main(["--output_dir", str(tmp_path), "--resume"]) == 0
    assert_same_runs(tmp_path, whole)


@pytest.mark.slow
def test_evaluations_by_time(sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))  # a second passes whenever somebody looks: at the start, and before each step
    small.setattr("train.Interval", partial(Interval, clock=lambda: float(next(now))))
    flags = [*SMALL, "--num_epochs", "1", "--validate_every", "4s", "--data_dir", str(sample_dir)]
    assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    history = lines_of(tmp_path / "logs/history.jsonl")
    assert [(record["epoch"], record["step"]) for record in history] == [(0, 0), (4 / 6, 4), (1, 6)]
