"""Several models beside each other, of every kind, on images that none of them was trained on."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_model import CLIPModel
from cliptune import results
from cliptune.data.sample_data import create_sample_dataset
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from evaluation import main
from tests.helpers.datasets import make_index
from visualization import draw_figures


def evaluated(output: Path, *flags: object) -> tuple[int, dict[str, Any]]:
    """Evaluate; return the exit code and what the results file holds, if there is one."""
    code = main([*map(str, flags), "--output_dir", str(output), "--num_workers", "0"])
    path = output / "results" / "evaluation_results.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def trained(trained_dir: Path) -> Path:
    return trained_dir / "model-checkpoint" / "last_model.pth"  # the best one may be the model as loaded


@pytest.fixture(scope="module")
def loaded(trained_dir: Path) -> Path:
    return trained_dir / "model-checkpoint" / "loaded_model.pth"


def with_validation(checkpoint: Path, path: Path, sample_dir: Path, images: range) -> Path:
    """A copy of a checkpoint as if its run had validated on other images of its 60, and had trained on the rest."""
    content = load_checkpoint(checkpoint)
    data = content["data"]
    columns = {key: torch.cat([data["val"][key], data["train"][key]]) for key in ("paths", "files")}
    chosen = torch.zeros(60, dtype=torch.bool)
    chosen[list(images)] = True
    content["data"] = {
        split: {**data[split], **{key: column[rows] for key, column in columns.items()}}
        for split, rows in (("val", chosen), ("train", ~chosen))
    }
    save_checkpoint(path, content)
    return path


@pytest.mark.slow
def test_several_checkpoints_are_compared_on_the_same_images(
    trained: Path, loaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = evaluated(tmp_path, "--checkpoint", loaded, trained)
    assert code == 0
    out = capsys.readouterr().out
    single = [evaluated(tmp_path, "--checkpoint", path)[1] for path in (loaded, trained)]
    for both, alone in zip(found["evaluations"], single, strict=True):
        assert both["metrics"] == pytest.approx(alone["metrics"])
        assert both["intervals"] == {key: pytest.approx(value) for key, value in alone["intervals"].items()}
    (comparison,) = found["comparisons"]
    rsums = [alone["metrics"]["rsum"] for alone in single]
    assert comparison["gain"] == pytest.approx(rsums[1] - rsums[0])
    assert comparison["low"] < comparison["gain"] < comparison["high"]
    assert (comparison["before"], comparison["after"]) == (str(loaded), str(trained))
    line = next(line for line in out.splitlines() if line.startswith("2 over 1"))
    assert f"{comparison['gain']:+.1f}" in line
    assert line.endswith(comparison["verdict"])
    path = tmp_path / "several.json"
    path.write_text(json.dumps(found))
    assert isinstance(results.read(path), results.SeveralEvaluations)
    assert [figure.name for figure in draw_figures(path)] == ["evaluation_comparison.png"]


def test_the_same_checkpoint_twice_is_one(trained_dir: Path, tmp_path: Path) -> None:
    folder = trained_dir / "model-checkpoint"
    code, found = evaluated(tmp_path, "--checkpoint", folder / "best_model.pth", folder, trained_dir)
    assert (code, found["num_images"]) == (0, 6)


@pytest.mark.slow
def test_of_runs_with_other_splits_the_images_that_all_validated_on_are_taken(
    trained: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_validation(trained, tmp_path / "other.pth", sample_dir, range(3, 30))
    code, found = evaluated(tmp_path, "--checkpoint", trained, other)
    assert code == 0
    assert [each["num_images"] for each in found["evaluations"]] == [3, 3]
    error = capsys.readouterr().err
    assert "taken are the 3 that all of them had" in error
    # with a data set that is named, it is what neither was trained on
    code, found = evaluated(tmp_path, "--checkpoint", trained, other, "--data_dir", sample_dir)
    assert [(each["num_images"], each["num_left_out"]) for each in found["evaluations"]] == [(3, 57), (3, 57)]
    code, found = evaluated(tmp_path, "--checkpoint", trained, other, "--data_dir", sample_dir, "--include_trained")
    assert [(each["num_images"], each["num_trained_on"]) for each in found["evaluations"]] == [(60, 54), (60, 33)]


@pytest.mark.slow
def test_a_model_as_loaded_was_trained_on_nothing_also_without_what_is_excluded(
    trained: Path, loaded: Path, sample_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "s.csv").write_text("image,caption,reason,keep\nimages/scene_00003.png,,odd,no\n")
    flags = ["--data_dir", sample_dir, "--split", "all", "--include_trained", "--exclude", tmp_path / "s.csv"]
    code, found = evaluated(tmp_path, "--checkpoint", loaded, trained, *flags)
    assert code == 0
    counts = {(each["checkpoint"], each["num_images"]): each["num_trained_on"] for each in found["evaluations"]}
    assert counts[str(loaded), 60] == counts[str(loaded), 59] == 0
    assert counts[str(trained), 60] == 54
    assert counts[str(trained), 59] in {53, 54}


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_where_nothing_is_left_that_none_was_trained_on_it_is_refused_with_counts(
    named: bool, trained: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_validation(trained, tmp_path / "other.pth", sample_dir, range(6, 60))
    data = ["--data_dir", sample_dir] if named else []
    assert evaluated(tmp_path, "--checkpoint", trained, other, *data) == (2, {})
    error = capsys.readouterr().err.splitlines()[-1]
    if named:
        assert f"all images were trained on ({trained} 54; {other} 6 of 60)" in error
        assert "--include_trained" in error
    else:
        assert f"no image is in the val of all runs (of those of the first: {trained} 6; {other} 0)" in error
        assert "--data_dir" in error


@pytest.mark.slow
def test_copies_of_what_was_trained_on_count(trained: Path, sample_dir: Path, tmp_path: Path) -> None:
    validated = load_checkpoint(trained)["val_images"]
    images = sorted((sample_dir / "images").iterdir())
    (tmp_path / "data").mkdir()
    rows = []
    for number, image in enumerate(images):
        (tmp_path / "data" / f"copy {number}.png").write_bytes(image.read_bytes())
        rows.append({"image_path": f"copy {number}.png", "caption": f"number {number}"})
    make_index(tmp_path / "data", rows)
    code, found = evaluated(tmp_path, "--checkpoint", trained, "--data_dir", tmp_path / "data")
    assert (code, found["num_images"], found["num_left_out"]) == (0, len(validated), 54)


@pytest.mark.slow
def test_several_data_sets_have_a_table_each_and_an_overview(
    trained: Path, loaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, number in (("a", 8), ("b", 12)):
        create_sample_dataset(tmp_path / name, number, seed=number)
    sets = ["--data_dir", tmp_path / "a", tmp_path / "b"]
    code, found = evaluated(tmp_path, "--checkpoint", trained, *sets)
    assert code == 0
    assert [each["num_images"] for each in found["evaluations"]] == [8, 12]
    assert found["comparisons"] == []
    out = capsys.readouterr().out
    assert out.count("matched cosine") == 4  # matched and unmatched, twice
    assert "RSum, with its 95% interval" in out
    code, found = evaluated(tmp_path, "--checkpoint", loaded, trained, *sets)
    keys = [(each["checkpoint"], each["num_images"]) for each in found["evaluations"]]
    assert keys == [(str(path), number) for path in (loaded, trained) for number in (8, 12)]
    assert [Path(each["data"]).name for each in found["comparisons"]] == ["a", "b"]
    draw_figures(tmp_path / "results" / "evaluation_results.json")


@pytest.mark.slow
def test_where_captions_are_classes_duplicates_are_merged_in_what_is_compared(
    trained: Path, loaded: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [Path(path).name for path in load_checkpoint(trained)["val_images"]]
    rows = [
        {"image_path": str(sample_dir / "images" / name), "caption": ("a circle", "a square")[number % 2]}
        for number, name in enumerate(names)
    ]
    make_index(tmp_path, rows)
    code, found = evaluated(tmp_path, "--checkpoint", loaded, trained, "--data_dir", tmp_path / "data.json")
    assert code == 0
    (comparison,) = found["comparisons"]
    assert comparison["merged"]
    rsums = [each["metrics"]["merged_rsum"] for each in found["evaluations"]]
    assert comparison["gain"] == pytest.approx(rsums[1] - rsums[0])
    assert "captions are classes, so duplicates are merged" in capsys.readouterr().out
    for each in found["evaluations"]:
        low, high = each["intervals"]["merged_rsum"]
        assert low <= each["metrics"]["merged_rsum"] <= high


def write_openai_state(path: Path) -> None:
    """Write random weights as OpenAI names them."""
    torch.manual_seed(0)
    model = CLIPModel("ViT-Ti/32")
    torch.save({**model.backbone.state_dict(), "logit_scale": model.logit_scale.detach()}, path)


@pytest.mark.slow
def test_weights_of_others_are_evaluated_beside_checkpoints(
    trained: Path, sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pt"
    write_openai_state(weights)
    for module in ("runs.evaluation", "model.weights"):
        monkeypatch.setattr(f"cliptune.{module}.published_weights", lambda name: weights)
    assert evaluated(tmp_path, "--checkpoint", weights, "--data_dir", sample_dir) == (2, {})
    assert "does not tell its activation" in capsys.readouterr().err
    given = ["--activation", "quick_gelu"]
    code, alone = evaluated(tmp_path, "--checkpoint", weights, "--data_dir", sample_dir, *given)
    assert (code, alone["num_images"], alone["num_left_out"]) == (0, 60, 0)
    # beside a run's checkpoint its validation images are taken
    code, found = evaluated(tmp_path, "--checkpoint", "ViT-B/32", weights, trained, *given, "--precision", "fp32")
    assert code == 0
    assert [each["num_images"] for each in found["evaluations"]] == [6, 6, 6]
    assert len(found["comparisons"]) == len(list(combinations(range(3), 2)))
    named, file, _ = found["evaluations"]
    assert named["checkpoint"] == "ViT-B/32"
    assert named["metrics"] == pytest.approx(file["metrics"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "ViT-B/32"], "--data_dir is needed: ViT-B/32 holds weights alone"),
        (["--checkpoint", "ViT-B-32", "--data_dir", "x"], "no such checkpoint: ViT-B-32; did you mean ViT-B/32?"),
        (["--checkpoint", "ViT-Ti/32", "--data_dir", "x"], "no weights are published under this name"),
        (["--checkpoint", "gone.pth"], "names of published weights are RN50, RN101"),
        (["--checkpoint", "empty", "--data_dir", "x"], "empty: no weights file in this folder"),
    ],
)
def test_models_that_are_not_there(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_a_name_that_cannot_be_downloaded_is_told_with_what_evaluation_takes(
    sample_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> Path:
        raise OSError(f"no weights for {name}: x. Name a mirror, or a local file with --pretrained FILE, or start anew")

    monkeypatch.setattr("cliptune.runs.evaluation.published_weights", fail)
    assert main(["--checkpoint", "ViT-B/32", "--data_dir", str(sample_dir)]) == 2
    assert "Name a mirror, or a local file with --checkpoint\n" in capsys.readouterr().err
