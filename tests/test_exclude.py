"""`--exclude`: a list of suspects leaves pairs out of training, and of nothing else."""

import shutil
from pathlib import Path

import pytest

from cliptune import results
from cliptune.data.pairs import load_pairs
from cliptune.data.splits import split_pairs
from cliptune.data.suspects import Suspect, relative_name, update_suspects
from cliptune.model.checkpoint_file import load_checkpoint
from evaluation import main as evaluate
from tests.helpers.datasets import make_shards
from tests.helpers.runs import SMALL
from train import main

FLAGS = ["--data_dir", "data", "--exclude", "lists/suspects.csv", "--output_dir", "run", *SMALL, "--precision", "fp32"]
GONE = "--exclude lists/suspects.csv: "


def write_list(path: Path, rows: list[tuple[str, str]]) -> None:
    path.unlink(missing_ok=True)
    suspects = [Suspect(image, caption, "odd: a test", False) for image, caption in rows]
    update_suspects(path, [*suspects, Suspect("images/000059.png", "", "odd: kept", True)], kinds=["odd"])


@pytest.fixture
def project(sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A folder with data, and the names of the images that a run trains on."""
    folder = tmp_path / "project"
    folder.mkdir()
    small.chdir(folder)
    shutil.copytree(sample_dir, folder / "data")
    train = split_pairs(load_pairs(folder / "data"))["train"]
    return folder, sorted(relative_name(path, train.root) for path in train.paths)


def num_trained(folder: Path) -> int:
    return len(load_checkpoint(folder / "run" / "model-checkpoint" / "last_model.pth")["data"]["train"]["files"])


def test_rows_are_left_out_of_training_alone(
    project: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, train = project
    val = next(path for path in sorted((folder / "data" / "images").iterdir()) if f"images/{path.name}" not in train)
    path = folder / "lists" / "suspects.csv"
    write_list(path, [(train[0], ""), (train[3], ""), (f"images/{val.name}", ""), ("images/none.png", "a cat")])
    capsys.readouterr()
    assert main([*FLAGS, "--num_epochs", "1"]) == 0
    said = capsys.readouterr().err
    assert f"{GONE}4 pairs left out of training, and with them 2 images" in said
    assert f"{GONE}1 row names pairs of val, which is not changed" in said
    assert f"{GONE}1 row names no pair of this data: images/none.png: 'a cat'" in said
    assert num_trained(folder) == len(train) - 2


@pytest.mark.slow
def test_a_resumed_run_leaves_out_the_same(
    project: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], small: pytest.MonkeyPatch
) -> None:
    folder, train = project
    write_list(folder / "lists" / "suspects.csv", [(train[0], ""), (train[3], "")])
    assert main([*FLAGS, "--num_epochs", "1"]) == 0
    # the project moves as a whole, and the list with it
    moved = folder.rename(folder.with_name("moved"))
    small.chdir(moved)
    assert main(["--resume", "--output_dir", "run", "--num_epochs", "2"]) == 0
    assert num_trained(moved) == len(train) - 2
    write_list(moved / "lists" / "suspects.csv", [(train[0], "")])
    assert main(["--resume", "--output_dir", "run", "--num_epochs", "3"]) == 2
    assert "is not the data of the run that is resumed: 1 image new" in capsys.readouterr().err
    assert main(["--resume", "--output_dir", "run", "--num_epochs", "3", "--allow_data_change"]) == 0
    assert num_trained(moved) == len(train) - 1
    (moved / "lists" / "suspects.csv").unlink()
    assert main(["--resume", "--output_dir", "run", "--num_epochs", "4"]) == 2
    assert "suspects.csv: no such file" in capsys.readouterr().err


def test_a_list_that_cannot_be_meant_is_refused(
    project: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, train = project
    write_list(folder / "lists" / "suspects.csv", [(name, "") for name in train[1:]])
    assert main(FLAGS) == 2
    assert f"{GONE[:-2]} leaves 1 image to train on; at least 2 are needed" in capsys.readouterr().err
    shards = make_shards(folder / "shards", 4, 4)
    assert main(["--data_dir", shards, "--val_data", "data", *FLAGS[2:]]) == 2
    assert f"and {shards} is shards" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_shows_the_numbers_with_and_without(
    sample_dir: Path, trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = [Path(path) for path in load_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")["val_images"]]
    captions = load_pairs(sample_dir).captions_of(int(load_pairs(sample_dir).find([str(val[1])])[0]))
    rows = [(f"images/{val[0].name}", ""), (f"images/{val[1].name}", captions[0]), ("images/none.png", "")]
    write_list(tmp_path / "suspects.csv", rows)
    flags = ["--checkpoint", str(trained_dir), "--output_dir", str(tmp_path), "--num_workers", "0"]
    assert evaluate([*flags, "--exclude", str(tmp_path / "suspects.csv")]) == 0
    found = results.read(tmp_path / "results" / "evaluation_results.json")
    assert isinstance(found, results.SeveralEvaluations)
    with_all, without = found.evaluations
    assert (with_all.num_images, with_all.num_texts, with_all.excluded) == (6, 12, {})
    assert (without.num_images, without.num_texts, without.excluded) == (5, 9, {"images": 1, "pairs": 3})
    captured = capsys.readouterr()
    assert "suspects.csv leaves out 3 of the 12 pairs, and with them 1 image of" in captured.err
    assert "5 images, 9 texts (without 3 pairs that --exclude leaves out)" in captured.out
    assert evaluate(flags) == 0  # never unasked
    alone = results.read(tmp_path / "results" / "evaluation_results.json")
    assert alone.metrics == with_all.metrics  # type: ignore[union-attr]
    write_list(tmp_path / "suspects.csv", [(f"images/{path.name}", "") for path in val])
    assert evaluate([*flags, "--exclude", str(tmp_path / "suspects.csv")]) == 2
    assert "leaves nothing of" in capsys.readouterr().err
