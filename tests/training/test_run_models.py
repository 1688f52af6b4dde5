"""What a run reports is what lies in its folder, wherever it is resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.runtime.files import read_json_object
from cliptune.training.journal import Journal
from tests.helpers.runs import SMALL, assert_same, small_runs
from train import main

FLAGS = [*SMALL, "--precision", "fp32"]


@pytest.fixture(scope="session")
def finished_run(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with small_runs():
        flags = [
            "--data_dir",
            str(sample_dir),
            "--num_epochs",
            "2",
            "--checkpoint_every",
            "2",
            "--keep_checkpoints",
            "9",
        ]
        assert main([*FLAGS, *flags, "--output_dir", str(folder / "A")]) == 0
    return folder / "A"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path, small: pytest.MonkeyPatch) -> Path:
    """A run of two epochs, in a folder of its own."""
    small.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path / "A")
    return tmp_path / "A"


def model(folder: Path, name: str) -> dict[str, Any]:
    return load_checkpoint(folder / "model-checkpoint" / f"{name}_model.pth")


def results(folder: Path) -> dict[str, Any]:
    return read_json_object(folder / "results" / "training_results.json")


def assert_whole(folder: Path) -> None:
    """Hold what a run reports against what lies there."""
    reported = results(folder)
    ids = {model(folder, name)["run_id"] for name in ("loaded", "best", "last")}
    assert ids == {reported["run_id"]}
    assert model(folder, "loaded")["epoch"] == 0
    assert model(folder, "best")["epoch"] == reported["best_epoch"]
    assert model(folder, "best")["metrics"]["rsum"] == reported["metrics"]["rsum"]


@pytest.mark.slow
def test_the_model_as_loaded_stays(run: Path) -> None:
    assert_whole(run)
    states = [model(run, name)["model_state_dict"] for name in ("loaded", "last")]
    assert not all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
def test_the_best_model_is_a_link_while_it_is_the_one_as_loaded(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    flags = ["--num_epochs", "1", "--learning_rate", "1e-12"]
    assert main([*FLAGS, "--data_dir", str(sample_dir), *flags, "--output_dir", str(tmp_path)]) == 0
    loaded, best = (tmp_path / "model-checkpoint" / f"{name}_model.pth" for name in ("loaded", "best"))
    assert model(tmp_path, "best")["epoch"] == 0
    assert loaded.samefile(best)


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_brings_its_models_along(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "model-checkpoint").iterdir()}
    last = str(run / "model-checkpoint" / "last_model.pth")
    assert main(["--resume", last, "--output_dir", "new", "--num_epochs", "3"]) == 0
    assert_whole(tmp_path / "new")
    assert {path: path.read_bytes() for path in (run / "model-checkpoint").iterdir()} == before


@pytest.mark.slow
def test_another_runs_files_are_set_aside(run: Path, sample_dir: Path, tmp_path: Path) -> None:
    assert main([*FLAGS, "--data_dir", str(sample_dir), "--num_epochs", "1", "--output_dir", "B"]) == 0
    other = model(tmp_path / "B", "last")["run_id"]
    last = str(run / "model-checkpoint" / "last_model.pth")
    assert main(["--resume", last, "--output_dir", "B", "--num_epochs", "3"]) == 0
    assert_whole(tmp_path / "B")
    assert results(tmp_path / "B")["run_id"] != other
    (aside,) = (tmp_path / "B" / "previous").iterdir()
    assert {model(aside, name)["run_id"] for name in ("loaded", "best", "last")} == {other}


@pytest.mark.slow
def test_where_a_run_goes_on_is_told_by_where_its_file_lies(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = model(run, "last")
    for key in ("output_dir", "cache_dir"):
        (tmp_path / key).mkdir()
        (tmp_path / key / "precious.txt").touch()
        state["config"]["run"][key] = str(tmp_path / key)
    path = run / "model-checkpoint" / "last_model.pth"
    save_checkpoint(path, state)
    assert main(["--resume", str(path), "--num_epochs", "3"]) == 0
    assert_whole(run)
    assert results(run)["history"][-1]["epoch"] == 3
    for key in ("output_dir", "cache_dir"):
        assert [entry.name for entry in (tmp_path / key).iterdir()] == ["precious.txt"]
    shutil.copy(path, tmp_path / "copy.pth")
    capsys.readouterr()
    assert main(["--resume", "copy.pth"]) == 2
    assert "lies in no run's model-checkpoint folder: name the folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["deleted", "cut", "later epoch", "another run"])
@pytest.mark.parametrize("num_epochs", ["2", "3"])
def test_a_best_model_that_is_not_there_is_told_and_repaired(
    run: Path, damage: str, num_epochs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "model-checkpoint" / "best_model.pth"
    content = model(run, "best")
    if damage == "deleted":
        best.unlink()
    elif damage == "cut":
        best.write_bytes(best.read_bytes()[:-100])
    else:
        save_checkpoint(best, {**content, **({"epoch": 9} if damage == "later epoch" else {"run_id": "other"})})
    assert main(["--resume", "--output_dir", str(run), "--num_epochs", num_epochs]) == 0
    assert_whole(run)
    told = capsys.readouterr().err
    was_last = content["epoch"] == 2
    assert ("is not there any more: it is again the model as loaded" in told) != was_last
    assert ("best_model.aside.pth" in told) == (damage != "deleted")


@pytest.mark.slow
def test_an_earlier_state_goes_on_without_the_later_best(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = sorted((run / "model-checkpoint").glob("step_*.pth"))
    early = next(path for path in states if load_checkpoint(path)["epoch"] == 1)
    best = run / "model-checkpoint" / "best_model.pth"
    save_checkpoint(best, {**model(run, "best"), "epoch": 2})
    assert main(["--resume", str(early), "--num_epochs", "2"]) == 0
    assert "is of epoch 2; that file is now" in capsys.readouterr().err
    assert_whole(run)


@pytest.mark.slow
def test_a_best_model_that_is_lost_at_the_end_is_an_error(
    run: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results = Journal.write_results

    def lose(self: Journal, *arguments: Any, **options: Any) -> None:
        write_results(self, *arguments, **options)
        (run / "model-checkpoint" / "best_model.pth").unlink(missing_ok=True)

    small.setattr(Journal, "write_results", lose)
    assert main(["--resume", "--output_dir", str(run), "--num_epochs", "3"]) == 2
    assert "but its best model, of epoch" in capsys.readouterr().err


@pytest.mark.slow
def test_files_of_the_user_stay(run: Path) -> None:
    folder = run / "model-checkpoint"
    theirs = ["step_best_so_far.pth", "step_00000006_good.pth", "step_00000001.pth", "notes.txt"]
    for name in theirs:
        shutil.copy(folder / "last_model.pth", folder / name)
    save_checkpoint(folder / "step_00000001.pth", {**model(run, "last"), "run_id": "other"})
    assert main(["--resume", "--output_dir", str(run), "--num_epochs", "3", "--keep_checkpoints", "1"]) == 0
    left = {path.name for path in folder.iterdir()}
    assert left == {"loaded_model.pth", "best_model.pth", "last_model.pth", *theirs}


@pytest.mark.slow
def test_on_other_data_the_models_are_evaluated_anew(
    run: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sample_dir, tmp_path / "data")
    records = json.loads((tmp_path / "data" / "data.json").read_text())
    (tmp_path / "data" / "data.json").write_text(json.dumps(records[:30]))
    trained_before = set(map(str, model(run, "last")["val_images"]))
    flags = ["--resume", "--output_dir", str(run), "--num_epochs", "3", "--data_dir", "data"]
    before = results(run)
    assert main(flags) == 2
    assert "30 images gone" in capsys.readouterr().err
    assert main([*flags, "--allow_data_change"]) == 0
    after = results(run)
    assert after["num_images"] == len(model(run, "last")["val_images"]) < before["num_images"]
    assert {Path(path).name for path in model(run, "last")["val_images"]} < {Path(path).name for path in trained_before}
    assert after["baseline"] != before["baseline"]
    assert_same(model(run, "loaded")["run_id"], after["run_id"])
    assert model(run, "best")["epoch"] == after["best_epoch"]
    # what one start allowed is asked for again
    (tmp_path / "data" / "data.json").write_text(json.dumps(records[:20]))
    assert main([*flags[:-4], "--num_epochs", "4"]) == 2


@pytest.mark.slow
def test_what_was_trained_on_does_not_validate(
    run: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sample_dir, tmp_path / "data")
    records = json.loads((tmp_path / "data" / "data.json").read_text())
    validated = {Path(path).name for path in model(run, "last")["val_images"]}
    left = [record for record in records if Path(record["image_path"]).name not in validated]
    (tmp_path / "data" / "data.json").write_text(json.dumps(left))
    flags = ["--resume", "--output_dir", str(run), "--num_epochs", "3", "--data_dir", "data", "--allow_data_change"]
    assert main(flags) == 2
    assert "name a validation set with --val_data" in capsys.readouterr().err
