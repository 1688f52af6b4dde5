import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clip_model import CLIPModel
from cliptune import results
from cliptune.data.pairs import load_pairs
from cliptune.data.sample_data import create_sample_dataset
from cliptune.features.encode import Encoded, Encoder
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.runtime.device import resolve_precision
from cliptune.training.loss import ContrastiveLoss
from data_loader import ImageTextDataset
from data_loader import main as data_main
from evaluation import evaluate, main, validation_loss
from tests.helpers.datasets import make_images, make_index
from tests.helpers.models import SMALL_VIT, make_model
from tests.helpers.runs import SMALL, small_runs
from train import main as train_main

FP32 = resolve_precision("fp32", torch.device("cpu"))


@pytest.mark.slow
def test_the_stage_repeats_the_runs_own_numbers(
    trained_dir: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained_dir / "model-checkpoint" / "best_model.pth"
    assert main(["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "RSum" in printed
    found = json.loads((tmp_path / "results" / "evaluation_results.json").read_text())
    trained = json.loads((trained_dir / "results" / "training_results.json").read_text())
    assert found["throughput"].keys() == {"images_per_second", "texts_per_second"}
    assert all(speed > 0 for speed in found["throughput"].values())
    assert f"images/s{found['throughput']['images_per_second']:22.1f}" in printed
    assert f"texts/s{found['throughput']['texts_per_second']:23.1f}" in printed
    for key, value in found["metrics"].items():
        assert value == pytest.approx(trained["metrics"][key], abs=1e-4), key
    assert (found["num_images"], found["num_texts"]) == (6, 12)
    recorded = results.read(tmp_path / "results" / "evaluation_results.json")
    assert isinstance(recorded, results.EvaluationResults)
    assert (recorded.checkpoint, recorded.split) == (str(checkpoint), "val")
    assert recorded.run is not None
    assert recorded.run.model_name == load_checkpoint(checkpoint)["architecture"]["name"]
    assert recorded.run.command.startswith("evaluation.py --checkpoint ")
    assert recorded.finished_at is not None
    more = ["--data_dir", str(sample_dir), "--output_dir", str(tmp_path), "--include_trained"]
    assert main(["--checkpoint", str(checkpoint), *more]) == 0
    assert json.loads((tmp_path / "results" / "evaluation_results.json").read_text())["num_images"] == 60


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "expected"), [([], "bf16"), (["--precision", "fp32"], "fp32")])
def test_the_precision_is_the_runs_unless_told(
    flags: list[str], expected: str, trained_dir: Path, tmp_path: Path
) -> None:
    content = load_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")
    content["config"]["training"]["precision"] = "bf16"
    save_checkpoint(tmp_path / "bf16.pth", content)
    assert main(["--checkpoint", str(tmp_path / "bf16.pth"), "--output_dir", str(tmp_path), *flags]) == 0
    found = results.read(tmp_path / "results" / "evaluation_results.json")
    assert isinstance(found, results.EvaluationResults)
    assert found.run is not None
    assert found.run.precision == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "gone.pth"], "no such checkpoint: gone.pth"),
        (["--split", "tset"], "--split: expected 'train'"),
        (["--checkpont", "x"], "did you mean --checkpoint?"),
    ],
)
def test_errors_of_the_stage(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_split_that_is_not_there_is_an_error(
    trained_dir: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained_dir / "model-checkpoint" / "best_model.pth")
    assert main(["--checkpoint", checkpoint, "--data_dir", str(sample_dir), "--split", "test"]) == 2
    assert "has no split 'test' (declared: none)" in capsys.readouterr().err


def test_validation_loss_is_over_full_batches_of_first_texts() -> None:
    images, texts = normalize(torch.randn(7, 8), dim=-1), normalize(torch.randn(14, 8), dim=-1)
    owners = torch.arange(7).repeat_interleave(2)
    expected = []
    for start in (0, 3):
        logits = 5 * images[start : start + 3] @ texts[::2][start : start + 3].T
        rows = [logits.log_softmax(dim).diagonal().mean() for dim in (0, 1)]
        expected.append(-(rows[0] + rows[1]) / 2)
    of_images, of_texts = torch.arange(7), torch.arange(14)
    encoded = Encoded(images, texts, owners, of_images, of_texts, of_images, of_texts, 1.0, 1.0)
    model, captions = SimpleNamespace(logit_scale=torch.tensor(5.0).log(), logit_bias=None), list("abcdefghijklmn")
    loss = ContrastiveLoss(across_ranks=False)
    got, chance = validation_loss(encoded, model, loss, batch_size=3, captions=captions)
    assert chance == pytest.approx(math.log(3))
    assert got == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@pytest.mark.slow
def test_the_loss_of_a_small_set_is_of_one_batch_as_its_chance_is(sample_dir: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder(CLIPModel("ViT-Ti/32"), ImageTextDataset, precision=FP32, batch_size=64, num_workers=0)
    pairs = load_pairs(sample_dir).select(np.arange(6))
    for batch_size, expected in ((4, math.log(4)), (6, math.log(6)), (18, math.log(6))):
        got = evaluate(encoder, pairs, loss_batch_size=batch_size)
        assert got.chance["val_loss"] == pytest.approx(expected)
        assert 0 < got.metrics["val_loss"] < 2 * expected
    without = evaluate(encoder, pairs)
    assert "val_loss" not in without.metrics
    assert "val_loss" not in without.chance


@pytest.mark.slow
def test_ranks_stand_at_their_images_and_captions_whatever_cannot_be_read(sample_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder(CLIPModel("ViT-Ti/32"), ImageTextDataset, precision=FP32, batch_size=64, num_workers=0)
    shutil.copytree(sample_dir, tmp_path / "data")
    pairs = load_pairs(tmp_path / "data").select(np.arange(8))
    Path(pairs.paths[2]).write_bytes(b"broken")
    lost = pairs.text_to_image == 2
    evaluation = evaluate(encoder, pairs)
    ranks = evaluation.ranks
    assert np.isnan(ranks["i2t"]).tolist() == [index == 2 for index in range(8)]
    assert np.isnan(ranks["t2i"]).tolist() == lost.tolist()
    for direction in ("i2t", "t2i"):
        recall = 100 * np.mean(ranks[direction][~np.isnan(ranks[direction])] <= 1)
        assert recall == pytest.approx(evaluation.metrics[f"{direction}_r1"])
    # what can be read is ranked as it is by itself
    without = evaluate(encoder, pairs.select(np.delete(np.arange(8), 2)))
    assert np.array_equal(np.delete(ranks["i2t"], 2), without.ranks["i2t"])
    assert np.array_equal(ranks["t2i"][~lost], without.ranks["t2i"])
    assert "ranks" not in evaluation.to_dict()


@pytest.fixture(scope="module")
def small_run(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of one epoch on data of its own: `data`, `run`. Its 54 training images are not declared."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(sample_dir, folder / "data")
    with small_runs():
        flags = ["--data_dir", str(folder / "data"), "--output_dir", str(folder / "run"), "--num_epochs", "1"]
        assert train_main([*flags, *SMALL, "--precision", "fp32"]) == 0
        yield folder


@pytest.fixture
def moved(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the run and its data, as if both had been moved: the checkpoint names folders that are not there."""
    shutil.copytree(small_run, tmp_path / "moved", ignore=shutil.ignore_patterns("evaluated"))
    checkpoint = tmp_path / "moved" / "run" / "model-checkpoint" / "last_model.pth"
    content = load_checkpoint(checkpoint)
    content["config"]["data"]["data_dir"] = str(tmp_path / "before")
    content["val_images"] = [
        path.replace(str(small_run / "data"), str(tmp_path / "before")) for path in content["val_images"]
    ]
    save_checkpoint(checkpoint, content)
    return tmp_path / "moved"


def evaluated(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Evaluate the run's last model; return the exit code and what the results file holds, if there is one.

    The best one may be the model as loaded, which was trained on nothing.
    """
    output = folder / "evaluated"
    last = ["--checkpoint", str(folder / "run" / "model-checkpoint" / "last_model.pth")]
    named = [] if "--checkpoint" in flags else last
    code = main([*named, "--output_dir", str(output), "--num_workers", "0", *flags])
    path = output / "results" / "evaluation_results.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def damage(data: Path, number: int) -> None:
    for image in sorted((data / "images").iterdir())[:number]:
        image.write_bytes(b"broken")


def test_images_that_were_trained_on_are_left_out_unless_they_are_asked_for(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data_dir", str(small_run / "data")]
    own = evaluated(small_run)[1]
    assert "trained on" not in capsys.readouterr().err
    assert (own["num_images"], own["num_trained_on"], own["num_left_out"], own["split"]) == (6, 0, 0, "val")
    code, found = evaluated(small_run, *data)
    assert (code, found["num_images"], found["num_left_out"], found["split"]) == (0, 6, 54, "all")
    assert found["metrics"] == pytest.approx(own["metrics"])
    out, error = capsys.readouterr()
    assert "54 of the 60 images were trained on, and are left out; --include_trained" in error
    assert out.startswith("6 images, 12 texts (without 54 images that were trained on)")
    assert evaluated(small_run, *data, "--split", "val")[1]["metrics"] == pytest.approx(own["metrics"])
    code, found = evaluated(small_run, *data, "--include_trained")
    assert (code, found["num_images"], found["num_trained_on"], found["num_left_out"]) == (0, 60, 54, 0)
    out, error = capsys.readouterr()
    assert "54 of the 60 images were trained on, so these numbers do not tell" in error
    assert "trained on                  54   of these images" in out


@pytest.mark.slow
def test_an_evaluation_of_nothing_but_what_was_trained_on_is_refused_with_the_way_out(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data_dir", str(small_run / "data"), "--split", "train"]
    (tmp_path / "run").symlink_to(small_run / "run")
    assert evaluated(tmp_path, *data) == (2, {})
    error = capsys.readouterr().err
    assert "all images were trained on (54 of 54)" in error
    assert "--split val" in error
    code, found = evaluated(tmp_path, *data, "--include_trained")
    assert (code, found["num_trained_on"]) == (0, 54)


@pytest.mark.slow
def test_what_the_weights_were_trained_on_before_counts_and_the_model_as_loaded_was_trained_on_nothing(
    small_run: Path, tmp_path: Path
) -> None:
    create_sample_dataset(tmp_path / "other", 20, seed=3)
    last = small_run / "run" / "model-checkpoint" / "last_model.pth"
    flags = ["--data_dir", str(tmp_path / "other"), "--output_dir", str(tmp_path / "run"), "--pretrained", str(last)]
    with small_runs():
        assert train_main([*flags, *SMALL, "--num_epochs", "1"]) == 0
    for data, left_out in ((small_run / "data", 54), (tmp_path / "other", 18)):
        found = evaluated(
            tmp_path, "--data_dir", str(data), "--checkpoint", str(tmp_path / "run/model-checkpoint/last_model.pth")
        )[1]
        assert found["num_left_out"] == left_out
    loaded = str(small_run / "run" / "model-checkpoint" / "loaded_model.pth")
    found = evaluated(tmp_path, "--data_dir", str(small_run / "data"), "--checkpoint", loaded)[1]
    assert (found["num_images"], found["num_left_out"]) == (60, 0)


def test_intervals_stand_beside_the_recalls(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(small_run)[1]
    for key, (low, high) in found["intervals"].items():
        assert low <= found["metrics"][key] <= high
    low, high = found["intervals"]["rsum"]
    assert f"95% interval {low:.1f} to {high:.1f}" in capsys.readouterr().out
    assert len(found["intervals"]) == 7


@pytest.mark.slow
def test_images_that_were_trained_on_are_known_by_their_files(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_run / "data", tmp_path / "other")
    rows = json.loads((tmp_path / "other" / "data.json").read_text())
    for number, row in enumerate(rows):
        path = tmp_path / "other" / row["image_path"]
        row["image_path"] = f"renamed {number}.png"
        path.rename(tmp_path / "other" / row["image_path"])
    (tmp_path / "other" / "data.json").write_text(json.dumps(rows))
    code, found = evaluated(small_run, "--data_dir", str(tmp_path / "other"))
    assert (code, found["num_left_out"], found["num_images"]) == (0, 54, 6)
    shutil.rmtree(tmp_path / "other")
    create_sample_dataset(tmp_path / "other", 20, seed=7)
    code, found = evaluated(small_run, "--data_dir", str(tmp_path / "other"))
    assert (code, found["num_left_out"], found["num_images"]) == (0, 0, 20)
    capsys.readouterr()
    assert evaluated(small_run, "--data_dir", str(tmp_path / "other"), "--split", "val")[0] == 2
    error = capsys.readouterr().err
    assert "6 of the 6 images that the checkpoint's run had in val cannot be found there" in error
    assert "--split all" in error


@pytest.mark.slow
def test_shards_that_were_trained_on_are_known(small_run: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        create_sample_dataset(tmp_path / name, 20, seed=seed)
        flags = ["--data_dir", str(tmp_path / name), "--to_shards", str(tmp_path / f"{name}s"), "--split", "all"]
        assert data_main([*flags, "--shard_size", "10"]) == 0
    shards = f"{tmp_path}/as/{{00000..00001}}.tar"
    flags = ["--data_dir", shards, "--val_data", str(tmp_path / "b"), "--output_dir", str(tmp_path / "run")]
    assert train_main([*flags, "--num_epochs", "1", *SMALL]) == 0
    for data, expected in ((shards, 20), (f"{tmp_path}/as/00001.tar", 10), (f"{tmp_path}/bs/{{00000..00001}}.tar", 0)):
        code, found = evaluated(tmp_path, "--data_dir", data, "--include_trained")
        assert (code, found["num_trained_on"]) == (0, expected)


@pytest.mark.slow
def test_a_moved_folder_is_told_with_the_way_out(
    moved: Path, tmp_path: Path, small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(moved) == (2, {})
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert f"{tmp_path / 'before'} does not exist" in error[0]
    assert "--data_dir DATA --split val" in error[0]
    assert "sample data" not in error[0]
    code, found = evaluated(moved, "--data_dir", str(moved / "data"), "--split", "val")
    assert (code, found["num_images"], found["num_trained_on"]) == (0, 6, 0)
    assert found["metrics"] == pytest.approx(evaluated(small_run)[1]["metrics"])


@pytest.mark.slow
def test_images_that_moved_away_from_their_index_are_told(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(moved / "data", tmp_path / "before")
    shutil.move(tmp_path / "before" / "images", tmp_path / "elsewhere" / "images")
    assert evaluated(moved)[0] == 2
    error = capsys.readouterr().err
    assert "none of its 60 images is found" in error
    assert "--image_dir" in error
    code, found = evaluated(moved, "--image_dir", str(tmp_path / "elsewhere"))
    assert (code, found["num_images"]) == (0, 6)


def test_another_set_where_the_data_was_is_not_taken_for_it(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_sample_dataset(tmp_path / "before", 60, seed=5)  # of the same names
    assert evaluated(moved) == (2, {})
    assert "6 of the 6 images that the checkpoint's run had in val cannot be found there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("change", ["damaged", "gone"])
@pytest.mark.parametrize("flags", [[], ["--split", "val"]])
def test_of_the_runs_own_images_no_more_may_be_missing_than_of_others(
    change: str, flags: list[str], small_run: Path, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(moved / "data", tmp_path / "before")
    names = [Path(path).name for path in load_checkpoint(moved / "run/model-checkpoint/last_model.pth")["val_images"]]
    for name in names[:2]:
        image = tmp_path / "before" / "images" / name
        image.write_bytes(b"broken") if change == "damaged" else image.unlink()
    flags = ["--data_dir", str(tmp_path / "before"), *flags] if flags else flags
    assert evaluated(moved, *flags, "--max_skipped_fraction", "0.1") == (2, {})
    assert "2 of the 6 images" in capsys.readouterr().err
    code, found = evaluated(moved, *flags, "--max_skipped_fraction", "0.5")
    assert (code, found["num_images"]) == (0, 4)
    assert found["skipped"] == {"images": 2 * (change == "damaged"), "records": 2 * (change == "gone")}
    assert "2 of the 6 images that the checkpoint's run had in val cannot be found" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("declared", [True, False])
def test_an_evaluation_of_what_is_left_is_refused(
    declared: bool, moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if declared:
        rows = json.loads((moved / "data" / "data.json").read_text())
        (moved / "data" / "data.json").write_text(json.dumps([{**row, "split": "test"} for row in rows]))
    damage(moved / "data", 54)
    data = ["--data_dir", str(moved / "data"), "--include_trained"]
    assert evaluated(moved, *data) == (2, {})
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "evaluation.py: error: 1 of 60 images and records cannot be used: " in error
    assert "cannot be read as an image" in error
    assert "--max_skipped_fraction" in error
    listed = moved / "evaluated" / "results" / "evaluation_skipped.json"
    assert f"listed in {listed}" in error
    assert len(json.loads(listed.read_text())) == 1
    assert evaluated(moved, *data, "--max_skipped_fraction", "0.89")[0] == 2


@pytest.mark.slow
def test_what_is_skipped_is_counted_in_every_result(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((moved / "data" / "data.json").read_text())
    gone = {"image_path": "gone.png", "caption": "x"}
    (moved / "data" / "data.json").write_text(json.dumps([*rows, gone]))
    damage(moved / "data", 2)
    flags = ["--data_dir", str(moved / "data"), "--max_skipped_fraction", "0.1", "--include_trained"]
    code, found = evaluated(moved, *flags)
    assert (code, found["num_images"], found["skipped"]) == (0, 58, {"images": 2, "records": 1})
    out, error = capsys.readouterr()
    assert out.startswith("58 images, 116 texts (without 2 images and 1 record that cannot be used)")
    assert "skipped 2 images and 1 record, see " in error
    listed = moved / "evaluated" / "results" / "evaluation_skipped.json"
    assert len(json.loads(listed.read_text())) == 3
    (moved / "data" / "data.json").write_text(json.dumps(rows[2:]))
    assert evaluated(moved, *flags)[1]["skipped"] == {"images": 0, "records": 0}
    assert not listed.exists()


@pytest.mark.slow
def test_a_runs_results_count_what_its_validation_lacks(sample_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sample_dir, tmp_path / "data")
    shutil.copytree(sample_dir, tmp_path / "val")
    damage(tmp_path / "val", 3)
    flags = ["--data_dir", str(tmp_path / "data"), "--val_data", str(tmp_path / "val"), "--num_epochs", "1", *SMALL]
    with small_runs():
        assert train_main([*flags, "--output_dir", str(tmp_path / "run"), "--max_skipped_fraction", "0.1"]) == 0
    recorded = results.read(tmp_path / "run" / "results" / "training_results.json")
    assert isinstance(recorded, results.TrainingResults)
    assert (recorded.num_images, recorded.skipped) == (57, {"images": 3, "records": 0})
    assert [record.num_skipped for record in recorded.history] == [3, 3]


@pytest.mark.parametrize(
    ("names", "taken", "num_images"),
    [(("train", "test"), "test", 20), (("train", "test", "val"), "val", 20), (("train",), "all", 60)],
)
def test_the_split_that_is_taken_unless_one_is_named_is_said(
    names: tuple[str, ...], taken: str, num_images: int, moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((moved / "data" / "data.json").read_text())
    splits = [*["train"] * 20, *[names[1 % len(names)]] * 20, *[names[-1]] * 20]
    if len(names) == 2:
        splits[40:] = ["train"] * 20
    rows = [{**row, "split": split} for row, split in zip(rows, splits, strict=True)]
    (moved / "data" / "data.json").write_text(json.dumps(rows))
    code, found = evaluated(moved, "--data_dir", str(moved / "data"), "--include_trained")
    assert (code, found["split"], found["num_images"]) == (0, taken, num_images)
    said = "everything" if taken == "all" else taken
    assert f"declares {', '.join(sorted(names))}: {said} is taken" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_that_does_not_say_what_it_was_trained_on(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "run", tmp_path / "run")
    checkpoint = tmp_path / "run" / "model-checkpoint" / "last_model.pth"
    content = load_checkpoint(checkpoint)
    del content["data"]
    save_checkpoint(checkpoint, content)
    assert evaluated(tmp_path)[1]["num_images"] == 6
    assert evaluated(tmp_path, "--data_dir", str(small_run / "data"))[1]["num_trained_on"] == 0
    save_checkpoint(checkpoint, {**content, "val_images": [*content["val_images"], "/gone.png"]})
    assert evaluated(tmp_path)[0] == 2


def test_images_without_captions_can_be_classified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, SMALL_VIT.name, SMALL_VIT)
    photos = str(tmp_path / "photos")
    make_images(tmp_path / "photos", *(f"{kind}/{number}.png" for number in range(4) for kind in ("kite", "boat")))
    torch.save(make_model(SMALL_VIT.name).state_dict(), tmp_path / "weights.pt")
    flags = ["--checkpoint", str(tmp_path / "weights.pt"), "--num_workers", "0", "--output_dir", str(tmp_path)]
    assert main([*flags, "--data_dir", photos, "--classes", photos]) == 0
    assert "8 images, 2 classes (by folders)" in capsys.readouterr().out
    assert main([*flags, "--data_dir", photos]) == 2
    assert "8 images and no captions" in capsys.readouterr().err


def test_captions_that_are_classes_are_counted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, SMALL_VIT.name, SMALL_VIT)
    names = [f"{number}.png" for number in range(24)]
    make_images(tmp_path / "data", *names)
    (tmp_path / "data" / "9.png").write_bytes((tmp_path / "data" / "5.png").read_bytes())
    captions = ["A red thing", "a blue thing", "a  red thing"]
    make_index(tmp_path / "data", [{"image_path": name, "caption": captions[i % 3]} for i, name in enumerate(names)])
    torch.save(make_model(SMALL_VIT.name).state_dict(), tmp_path / "weights.pt")
    flags = ["--checkpoint", str(tmp_path / "weights.pt"), "--num_workers", "0", "--precision", "fp32"]
    assert main([*flags, "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "evaluation_results.json").read_text())["metrics"]
    for direction in ("i2t", "t2i"):
        number = found[f"{direction}_duplicate_misses"]
        recalls = "".join(f"{found[f'merged_{direction}_r{k}']:8.1f}" for k in (1, 5, 10))
        assert f"  duplicates merged   {recalls}   {number} of the R@1 misses were duplicates" in printed
    assert f"a perfect model has {found['ceiling_rsum']:.1f}, since captions repeat" in printed
    assert found["merged_i2t_r5"] == 100  # of two texts
    assert results.selection_key(found) == "merged_rsum"
    assert results.selection_key({**found, "ceiling_rsum": 590.0}) == "rsum"
    assert results.selection_key({"rsum": 300.0}) == "rsum"  # of before they were taken


def test_merged_ranks_stand_at_the_first_of_what_is_equal(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(6)]
    make_images(tmp_path, *names)
    (tmp_path / "3.png").write_bytes((tmp_path / "1.png").read_bytes())
    texts = ["x", "a cat", "A cat", "y", "z", "x"]
    make_index(tmp_path, [{"image_path": name, "caption": text} for name, text in zip(names, texts, strict=True)])
    encoder = Encoder(CLIPModel("ViT-Ti/32"), ImageTextDataset, precision=FP32, batch_size=64, num_workers=0)
    found = evaluate(encoder, load_pairs(tmp_path))
    assert np.isnan(found.merged_ranks["i2t"]).tolist() == [False, False, False, True, False, False]
    assert np.isnan(found.merged_ranks["t2i"]).tolist() == [False, False, True, False, False, True]
    for direction in ("i2t", "t2i"):
        merged = found.merged_ranks[direction]
        assert 100 * np.nanmean(merged[~np.isnan(merged)] <= 1) == pytest.approx(
            found.metrics[f"merged_{direction}_r1"]
        )
        assert not np.isnan(found.ranks[direction]).any()
    assert not {"ranks", "merged_ranks"} & found.to_dict().keys()


@pytest.mark.slow
def test_a_model_and_a_data_set_are_enough_and_the_result_shows_as_a_table(trained_dir: Path, sample_dir: Path) -> None:
    model = CLIPModel.from_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")
    dataset = ImageTextDataset(sample_dir, split="val")
    found = evaluate(model, dataset)
    auto = resolve_precision("auto", torch.device("cpu"))
    wanted = evaluate(Encoder(model, ImageTextDataset, precision=auto, batch_size=64, num_workers=0), dataset.pairs)
    assert found.metrics == wanted.metrics
    assert f"{found.metrics['i2t_r1']:.1f}" in str(found)
    assert f"RSum{found.metrics['rsum']:26.1f}" in str(found)
    table = found._repr_html_()
    assert table.count("<tr>") == 5
    for key in ("i2t_r1", "t2i_r10", "t2i_mean_rank"):
        assert f"<td>{found.metrics[key]:.1f}</td>" in table
    assert "6 images, 12 texts: RSum" in table
