"""Stages beside training that are stopped, whose workers are killed, or whose images turn into pipes."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info

import data_loader
import evaluation
import train
import visualization
from cliptune.data.sample_data import create_sample_dataset
from cliptune.features.encode import Encoder
from cliptune.preprocess.decode import read_bytes
from tests.helpers.runs import SMALL, small_runs

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def output(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one epoch leaves."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--data_dir", str(sample_dir), "--num_epochs", "1", "--output_dir", str(folder)]
    with small_runs():
        assert train.main([*SMALL, *flags]) == 0
    return folder


def evaluation_flags(output: Path, folder: Path, *more: str) -> list[str]:
    checkpoint = str(output / "model-checkpoint" / "best_model.pth")
    return ["--checkpoint", checkpoint, "--output_dir", str(folder), *more]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_an_evaluation_that_is_stopped_leaves_no_results(
    number: signal.Signals,
    num_workers: str,
    output: Path,
    sample_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_images = Encoder.run_images

    def stopped(*arguments: Any, **options: Any) -> Any:
        for batch in run_images(*arguments, **options):
            os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(Encoder, "run_images", stopped)
    more = ["--data_dir", str(sample_dir / "data.json"), "--encode_batch_size", "16", "--num_workers", num_workers]
    assert evaluation.main(evaluation_flags(output, tmp_path, *more)) == 128 + number
    written = capsys.readouterr()
    assert written.err == f"evaluation.py: stopped by {number.name}\n"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "cache"]


def test_figures_that_are_stopped_are_whole_or_not_there(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: Any, file: Any, **options: Any) -> None:
        file.write(b"half of it")
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", stopped)
    results = output / "results" / "training_results.json"
    assert visualization.main(["--results", str(results), "--output_dir", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "visualization.py: stopped by SIGTERM\n"
    assert not list(tmp_path.iterdir())


def die_in_a_worker(path: str | Path) -> bytes:
    if get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return read_bytes(path)


@pytest.mark.parametrize("stage", ["evaluation", "check"])
def test_a_killed_worker_is_one_line(
    stage: str,
    output: Path,
    sample_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for place in ("cliptune.preprocess.decode.read_bytes", "cliptune.data.doctor.read_bytes"):
        monkeypatch.setattr(place, die_in_a_worker)
    monkeypatch.setattr("cliptune.features.encode.IMAGES_PER_WORKER", 16)
    more = ["--data_dir", str(sample_dir), "--num_workers", "2"]
    if stage == "evaluation":
        code = evaluation.main(
            evaluation_flags(output, tmp_path, *more, "--include_trained", "--encode_batch_size", "16")
        )
    else:
        code = data_loader.main([*more, "--check", "--output_dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == 1
    assert ".py: error: a loader worker was killed" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "cache"]


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_images_that_become_pipes_in_a_run_are_skipped_or_end_it(
    num_workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who opens a pipe waits until somebody writes to it."""
    create_sample_dataset(tmp_path / "data", 40)

    def to_pipes(*_: Any) -> None:
        for image in (tmp_path / "data" / "images").iterdir():
            image.unlink()
            os.mkfifo(image)

    alarm = threading.Timer(100, os._exit, [9])  # this would hang
    alarm.start()
    with small_runs() as patch:
        patch.setattr("cliptune.training.journal.Journal.begin_validation", to_pipes)
        flags = [*SMALL, "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "o"), "--num_epochs", "3"]
        assert train.main([*flags, "--num_workers", num_workers]) == 2
    alarm.cancel()
    assert "not a file" in capsys.readouterr().err.splitlines()[-1]
