"""A run that is resumed with other data compares nothing of the new with anything of the old, and says so."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.training.checkpoint import RunFiles
from tests.helpers.runs import SMALL, lines_of, signal_at, small_runs
from tests.helpers.verdicts import qualities
from train import main

FLAGS = [*SMALL, "--precision", "fp32", "--val_split", "0.5"]
BEFORE = "the best model of before the validation data changed is among them: its luck on images that both have is not"


def results_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results/training_results.json").read_text()))


@pytest.fixture(scope="module")
def finished(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, of which the second is the best."""
    folder = tmp_path_factory.mktemp("finished")
    with small_runs() as patch:
        patch.setattr("train.evaluate", qualities(0.0, 0.8, 1.6, 1.0))
        assert main([*FLAGS, "--num_epochs", "3", "--data_dir", str(sample_dir), "--output_dir", str(folder)]) == 0
    assert results_of(folder)["best_epoch"] == 2
    return folder


@pytest.fixture
def run(finished: Path, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch) -> Path:
    """It in a folder of its own, beside data of which some is gone."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(sample_dir, tmp_path / "data")
    index = json.loads((tmp_path / "data/data.json").read_text())
    (tmp_path / "data/data.json").write_text(json.dumps(index[:40]))
    return tmp_path / "run"


def resume(run: Path, *flags: str) -> int:
    data = ["--data_dir", str(run.parent / "data"), "--allow_data_change"]
    return main(["--resume", "--output_dir", str(run), *data, *flags])


def row(out: str, name: str) -> list[str]:
    return next(line for line in out.splitlines() if line.startswith(name)).split()


@pytest.mark.slow
def test_a_best_model_that_stays_has_the_numbers_of_the_new_data(
    run: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results_of(run)["history"]
    small.setattr("train.evaluate", qualities(0.2, 1.0))
    assert resume(run) == 0
    captured, results = capsys.readouterr(), results_of(run)
    history, metrics = results["history"], results["metrics"]
    assert (results["best_epoch"], len(history)) == (2, 4)
    assert row(captured.out, "rsum")[1:3] == [f"{results['baseline']['rsum']:.1f}", f"{metrics['rsum']:.1f}"]
    assert "epoch 2" in captured.out
    assert {key: history[2][key] for key in metrics} == metrics != {key: before[2][key] for key in metrics}
    assert {key: history[0][key] for key in metrics} == results["baseline"]
    for index in (1, 3):
        assert history[index] == {**before[index], "earlier_data": True}
    verdict = results["verdict"]
    assert (verdict["num_evaluations"], verdict["num_earlier"]) == (1, 3)
    assert BEFORE in captured.out
    assert "What 4 evaluations found before is compared with nothing" in captured.err
    found = np.load(RunFiles(run).retrieval)
    assert found["epochs"].tolist() == [0, 2]
    assert found["i2t"].shape[1] == results["num_images"] == verdict["num_images"]
    assert found["best_image_features"].shape[0] == found["loaded_image_features"].shape[0] == results["num_images"]


@pytest.mark.slow
def test_a_best_model_that_is_not_better_there_gives_way(
    run: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = RunFiles(run)
    before = files.best.read_bytes()
    small.setattr("train.evaluate", qualities(1.2, 0.4))
    assert resume(run) == 0
    captured, results = capsys.readouterr(), results_of(run)
    assert (results["best_epoch"], load_checkpoint(files.best)["epoch"]) == (0, 0)
    assert files.best.with_name("best_model.aside.pth").read_bytes() == before
    assert "the best model so far, of epoch 2, is no better there" in captured.err
    assert captured.out.startswith("\nWorse than before: RSum -")
    assert row(captured.out, "rsum")[2] == f"{results['history'][2]['rsum']:.1f}"
    assert BEFORE in captured.out
    assert "best_image_features" not in np.load(files.retrieval).files
    assert main(["--resume", "--output_dir", str(run)]) == 0  # the state is of this data now
    assert results_of(run)["best_epoch"] == 0
    assert results_of(run)["verdict"] == results["verdict"]


@pytest.mark.slow
def test_later_epochs_are_compared_with_the_two_alone(
    run: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.setattr("train.evaluate", qualities(0.2, 0.6, 1.0))  # epoch 3 had more, on the earlier data
    assert resume(run, "--num_epochs", "4", "--early_stopping_patience", "1") == 0
    out, results = capsys.readouterr().out, results_of(run)
    assert results["best_epoch"] == results["verdict"]["epoch"] == 4
    assert np.load(RunFiles(run).retrieval)["epochs"].tolist() == [0, 2, 4]
    assert "the luck of being the best of 2 evaluations is taken off; " + BEFORE in out
    assert [record.get("earlier_data", False) for record in results["history"]] == [False, True, False, True, False]


@pytest.mark.slow
def test_with_the_same_validation_data_what_was_found_stands(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((sample_dir / "data.json").read_text())
    for number, each in enumerate(index):
        split = ("train", "val")[number % 2]
        each |= {"image_path": str(sample_dir / each["image_path"]), "split": split}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.json").write_text(json.dumps(index))
    run = tmp_path / "run"
    small.setattr("train.evaluate", qualities(0.0, 0.8, 0.6, 1.0))
    assert main([*FLAGS, "--num_epochs", "2", "--data_dir", str(tmp_path / "data"), "--output_dir", str(run)]) == 0
    before = results_of(run)
    (tmp_path / "data/data.json").write_text(json.dumps(index[10:11] + index[:10:2] + index[1::2]))
    capsys.readouterr()
    assert resume(run, "--num_epochs", "3") == 0  # a single evaluation
    captured, results = capsys.readouterr(), results_of(run)
    assert "the validation data is the same, and what was found on it stands" in captured.err
    assert results["history"][:3] == before["history"]
    assert (results["verdict"]["num_evaluations"], results["verdict"].get("num_earlier", 0)) == (3, 0)
    assert BEFORE not in captured.out


@pytest.mark.slow
def test_the_last_epoch_begins_again_when_it_was_under_way(
    run: Path, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    signal_at(small, {5: signal.SIGTERM})
    flags = [*FLAGS, "--num_epochs", "2", "--data_dir", str(sample_dir), "--output_dir", str(tmp_path / "cut")]
    assert main(flags) == 143
    assert resume(tmp_path / "cut") == 0
    assert [record["epoch"] for record in results_of(tmp_path / "cut")["history"]] == [0, 1, 2]
    assert [line["epoch"] for line in lines_of(RunFiles(tmp_path / "cut").steps)] == [1] * 3 + [2] * 4
