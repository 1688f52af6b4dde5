"""What a run watches beside its validation: what is evaluated, what is recorded, what is said in the end."""

import json
import shutil
from pathlib import Path

import pytest

from cliptune.data.pairs import DataSource, load_pairs
from cliptune.data.sample_data import create_sample_dataset
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.results import RECALL_KEYS
from cliptune.training.checkpoint import RunFiles
from evaluation import main as evaluate_main
from tests.helpers.runs import SMALL, assert_same, lines_of, small_runs
from train import main


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another data set of drawn scenes."""
    folder = tmp_path_factory.mktemp("watched") / "others"
    create_sample_dataset(folder, 16, seed=7)
    return folder


@pytest.fixture(scope="module")
def mixed_dir(sample_dir: Path, other_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 other scenes, and copies of 10 images of the run's own data."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for source, names in ((other_dir, range(12)), (sample_dir, range(10))):
        pairs = load_pairs(DataSource(source))
        for number in names:
            name = f"{source.name}-{number}.png"
            shutil.copy(pairs.paths[number], folder / name)
            rows.append({"image": name, "caption": pairs.captions_of(number)[0]})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def flags_for(data_dir: Path, output_dir: Path, *more: str) -> list[str]:
    return ["--data_dir", str(data_dir), "--output_dir", str(output_dir), *SMALL, "--num_epochs", "2", *more]


@pytest.fixture(scope="module")
def watching(sample_dir: Path, other_dir: Path, mixed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watching")
    watched = ["--watch_data", str(other_dir), str(mixed_dir)]
    with small_runs():
        assert main(flags_for(sample_dir, folder, *watched, "--precision", "fp32")) == 0
    return folder


@pytest.mark.slow
def test_every_evaluation_has_what_is_watched(watching: Path, mixed_dir: Path, other_dir: Path) -> None:
    results = json.loads((watching / "results/training_results.json").read_text())
    history = lines_of(watching / "logs/history.jsonl")
    assert history == results["history"]
    for record in history:
        assert set(record["watched"]) == {"others", mixed_dir.name}
        assert {*RECALL_KEYS, "rsum", "num_images", "content"} == record["watched"]["others"].keys()
    # rank as loaded and best come from the recorded evaluations
    for found in results["watched"]:
        assert found["baseline"]["rsum"] == pytest.approx(history[0]["watched"][found["name"]]["rsum"])
        assert found["best"]["rsum"] == pytest.approx(history[results["best_epoch"]]["watched"][found["name"]]["rsum"])
    assert [found["data"] for found in results["watched"]] == [str(other_dir), str(mixed_dir)]


@pytest.mark.slow
def test_images_that_are_trained_on_are_left_out_and_counted(watching: Path, mixed_dir: Path, sample_dir: Path) -> None:
    results = json.loads((watching / "results/training_results.json").read_text())
    val = load_checkpoint(watching / "model-checkpoint/best_model.pth")["val_images"]
    copied = load_pairs(DataSource(sample_dir)).paths[0:10]
    num_validating = sum(path in val for path in copied)
    found = results["watched"][1]
    assert found["num_trained_on"] == 10 - num_validating
    assert found["num_images"] == 12 + num_validating


@pytest.mark.slow
def test_the_numbers_are_those_of_evaluation(watching: Path, other_dir: Path, tmp_path: Path) -> None:
    results = json.loads((watching / "results/training_results.json").read_text())
    flags = ["--checkpoint", str(watching), "--data_dir", str(other_dir), "--output_dir", str(tmp_path)]
    assert evaluate_main([*flags, "--num_workers", "0"]) == 0
    evaluated = json.loads((tmp_path / "results/evaluation_results.json").read_text())
    assert evaluated["metrics"]["rsum"] == pytest.approx(results["watched"][0]["best"]["rsum"])


@pytest.mark.slow
def test_where_captions_are_classes_equal_ones_count_as_one(
    watching: Path, sample_dir: Path, other_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tmp_path / "classes.json"
    paths = load_pairs(DataSource(other_dir)).paths
    rows = [{"image": path, "caption": ("a cat", "a dog")[number % 2]} for number, path in enumerate(paths)]
    classes.write_text(json.dumps(rows))
    with small_runs():
        assert main(flags_for(sample_dir, tmp_path, "--watch_data", str(classes), "--precision", "fp32")) == 0
    assert "equal captions and images as one" in capsys.readouterr().out
    found = json.loads((tmp_path / "results/training_results.json").read_text())["watched"][0]
    flags = ["--checkpoint", str(tmp_path), "--data_dir", str(classes), "--output_dir", str(tmp_path / "evaluated")]
    assert evaluate_main([*flags, "--num_workers", "0"]) == 0
    evaluated = json.loads((tmp_path / "evaluated/results/evaluation_results.json").read_text())
    assert evaluated["metrics"]["merged_rsum"] == pytest.approx(found["best"]["rsum"])
    assert found["merged"]


@pytest.mark.slow
def test_watching_changes_nothing_in_the_run(watching: Path, sample_dir: Path, tmp_path: Path) -> None:
    with small_runs():
        assert main(flags_for(sample_dir, tmp_path, "--precision", "fp32")) == 0
    for name in ("best_model.pth", "last_model.pth"):
        one, other = (load_checkpoint(folder / "model-checkpoint" / name) for folder in (watching, tmp_path))
        assert_same(one["model_state_dict"], other["model_state_dict"], name)


@pytest.mark.slow
def test_a_set_that_is_trained_on_is_no_watch(
    sample_dir: Path, mixed_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((mixed_dir / "data.json").read_text())
    index = mixed_dir / "own.json"
    val = [row for row in rows if row["image"].startswith(sample_dir.name)][:1]
    index.write_text(json.dumps(val))
    with small_runs():
        assert main(flags_for(sample_dir, tmp_path / "out", "--watch_data", str(index))) == 2
    assert "at least 2 others are needed" in capsys.readouterr().err


@pytest.mark.slow
def test_other_sets_may_be_watched_when_a_run_goes_on(
    watching: Path, other_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(watching, folder)
    smaller = tmp_path / "others"
    shutil.copytree(other_dir, smaller)
    index = json.loads((smaller / "data.json").read_text())
    (smaller / "data.json").write_text(json.dumps(index[:12]))
    with small_runs():
        assert main(["--output_dir", str(folder), "--resume", "--watch_data", str(smaller), "--num_epochs", "3"]) == 0
    results = json.loads((folder / "results/training_results.json").read_text())
    assert [found["num_images"] for found in results["watched"]] == [12]
    contents = [record["watched"]["others"]["content"] for record in results["history"]]
    assert contents[0] == contents[2] != contents[3]  # so no curve is drawn over both
    assert "watched, RSum" in capsys.readouterr().out


@pytest.mark.slow
def test_a_set_that_is_gone_is_named_with_the_way_out(
    watching: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(watching, folder)
    flags = ["--output_dir", str(folder), "--resume"]
    with small_runs():
        assert main([*flags, "--watch_data", str(tmp_path / "gone")]) == 2
        assert "--watch_data: " in (told := capsys.readouterr().err)
        assert "gone does not exist; --watch_data names where it lies now, none goes on without" in told
        assert main([*flags, "--watch_data", "none"]) == 0
    assert "watched" not in json.loads((folder / "results/training_results.json").read_text())


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_missing_in_every_evaluation(
    sample_dir: Path, other_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(other_dir, damaged)
    Path(load_pairs(DataSource(damaged)).paths[3]).write_bytes(b"no image")
    flags = flags_for(sample_dir, tmp_path / "run", "--watch_data", str(damaged))
    with small_runs():
        assert main([*flags, "--max_skipped_fraction", "0.2"]) == 0
        results = json.loads((tmp_path / "run/results/training_results.json").read_text())
        assert main(flags) == 2  # one of 16 is more than a hundredth
    assert results["watched"][0]["num_images"] == 15
    assert {record["watched"]["damaged"]["num_images"] for record in results["history"]} == {15}
    assert "1 of 16 images and records cannot be used" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pretrained_model_that_watches_nothing_is_told_its_drift(
    watching: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pretrained", str(RunFiles(watching).loaded), "--backbone_lr_scale", "1"]
    with small_runs():
        assert main([*flags_for(sample_dir, tmp_path), *flags]) == 0
    results = json.loads((tmp_path / "results/training_results.json").read_text())
    assert results["best_epoch"] > 0
    drift = results["drift"]
    assert 0 <= drift["text_overlap"] <= 100
    assert drift["num_texts"] == 200
    assert "generic texts and" in capsys.readouterr().out
