"""`--folds`: every image is held out once, nothing that judges was trained on or chosen by, the last run has all."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluation
from clip_model import CLIPModel
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.snapshot import Snapshot
from cliptune.features.verdict import compare
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.results import FoldsResults
from evaluation import Evaluation, evaluate
from tests.helpers.runs import SMALL, assert_same_runs, lines_of, signal_at, small_runs
from train import main

FLAGS = [*SMALL, "--precision", "fp32", "--learning_rate", "1e-3"]
DIRECTIONS = ("i2t", "t2i")


def train(data: Path, output: Path, *flags: str) -> int:
    return main([*FLAGS, "--data_dir", str(data), "--output_dir", str(output), *flags])


def folds_of(output: Path) -> FoldsResults:
    return FoldsResults.model_validate(json.loads((output / "results/folds.json").read_text()))


def results_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "results/training_results.json").read_text()))


def ranks_of(output: Path) -> dict[str, Any]:
    with np.load(output / "results/retrieval.npz") as file:
        return {name: file[name] for name in file.files}


def course(*qualities: float) -> Callable[..., Evaluation]:
    """Evaluations of which, in every fold, the RSum is moved by these one after another."""
    seen: dict[str, int] = {}

    def moved(encoder: Any, pairs: Any, **options: Any) -> Evaluation:
        key = pairs.paths[0]
        found = evaluate(encoder, pairs, **options)
        quality = qualities[seen.get(key, 0)]
        seen[key] = seen.get(key, 0) + 1
        metrics = {**found.metrics, "rsum": 200 + quality, "merged_rsum": 200 + quality}
        return found._replace(metrics=metrics)

    return moved


@pytest.fixture(scope="module")
def run(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folds of two epochs, of which the first is better than the last."""
    output = tmp_path_factory.mktemp("folds")
    with small_runs() as patch:
        patch.setattr("train.evaluate", course(0, 50, 20))
        assert train(sample_dir, output, "--folds", "3", "--num_epochs", "2") == 0
    return output


@pytest.mark.slow
def test_every_image_is_held_out_once_and_in_no_training_of_its_judge(run: Path) -> None:
    held, everything = [], set()
    for fold in ("1", "2", "3"):
        data = load_checkpoint(run / "folds" / fold / "model-checkpoint/best_model.pth")["data"]
        val, train_files = (set(Snapshot.from_dict(data[split]).files.tolist()) for split in ("val", "train"))
        assert len(val) == 20
        assert not val & train_files
        held += sorted(val)
        everything = val | train_files
    assert len(held) == 60
    assert set(held) == everything
    whole = load_checkpoint(run / "model-checkpoint/best_model.pth")["data"]
    assert set(Snapshot.from_dict(whole["train"]).files.tolist()) == everything
    assert not len(Snapshot.from_dict(whole["val"]).files)


@pytest.mark.slow
def test_the_verdict_is_that_of_all_queries_each_in_its_own_fold(run: Path) -> None:
    # all are judged at one epoch, so that this is a plain comparison
    record, before, after, groups = folds_of(run), {}, {}, {}
    assert [fold.epoch for fold in record.folds] == [1, 1, 1]
    folds = [ranks_of(run / f"folds/{fold}") for fold in (1, 2, 3)]
    for name in DIRECTIONS:
        before[name] = np.concatenate([fold[name][0] for fold in folds])
        after[name] = np.concatenate([fold[name][1] for fold in folds])
        own = [fold["groups"] if name == "i2t" else fold["groups"][fold["text_to_image"]] for fold in folds]
        groups[name] = np.concatenate([each + 1000 * index for index, each in enumerate(own)])
    found = compare(before, after, groups)
    assert record.verdict is not None
    assert tuple(record.verdict.rsum) == pytest.approx(found[:3])
    assert record.verdict.num_images == record.verdict.num_groups == 60


@pytest.mark.slow
def test_the_last_run_trains_on_everything_for_the_length_that_the_folds_chose(run: Path) -> None:
    record, results = folds_of(run), results_of(run)
    assert record.length == results["best_epoch"] == 1
    assert record.curve == pytest.approx([200, 250, 220])
    assert record.finished_at is not None
    steps = lines_of(run / "logs/steps.jsonl")
    assert len(steps) == 6  # an epoch of 60 images in batches of 10
    # the schedule is that of both epochs: cut off in its middle the rate is not down
    assert steps[-1]["learning_rate"] > 4e-4
    best = load_checkpoint(run / "model-checkpoint/best_model.pth")
    assert (best["epoch"], best["global_step"]) == (1, 6)
    assert best["config"]["data"]["folds"] == 3


@pytest.mark.slow
def test_what_the_last_run_tells_is_the_folds(run: Path) -> None:
    results, record = results_of(run), folds_of(run)
    assert record.verdict is not None
    assert results["verdict"] == json.loads(record.verdict.model_dump_json())
    assert results["num_images"] == 60
    assert [each["rsum"] for each in results["history"]] == pytest.approx([200, 250])
    folds = [results_of(run / f"folds/{fold}") for fold in (1, 2, 3)]
    for key in ("val_loss", "i2t_r1", "similarity_gap"):
        assert results["history"][1][key] == pytest.approx(np.mean([each["history"][1][key] for each in folds]))
    assert sum(results["histograms"]["baseline"]["positive"]) == sum(
        sum(each["histograms"]["baseline"]["positive"]) for each in folds
    )


@pytest.mark.slow
def test_the_screen_has_a_line_a_fold_the_table_and_the_verdict(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.setattr("train.evaluate", course(50, 0))
    assert train(sample_dir, tmp_path, "--folds", "2", "--num_epochs", "1") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("fold 1: 30 images held out, RSum 250.0 as loaded, 200.0 after 1 epoch")
    assert [line.split()[0] for line in lines[4:7]] == ["1", "2", "all"]
    # and nothing was better: the model as loaded is kept, and no gain is told of it
    assert "No verdict: no epoch is better on the folds' mean" in out
    assert "nothing was trained on everything" in out
    assert results_of(tmp_path)["best_epoch"] == folds_of(tmp_path).length == 0
    best = load_checkpoint(tmp_path / "model-checkpoint/best_model.pth")
    loaded = load_checkpoint(tmp_path / "model-checkpoint/loaded_model.pth")
    assert best["global_step"] == 0
    assert all(torch.equal(value, loaded["model_state_dict"][name]) for name, value in best["model_state_dict"].items())


@pytest.mark.slow
def test_an_evaluation_of_the_last_model_needs_other_data(
    run: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(run), "--output_dir", str(tmp_path)]
    assert evaluation.main(flags) == 2
    assert "has no validation images" in capsys.readouterr().err
    assert evaluation.main([*flags, "--data_dir", str(sample_dir)]) == 2
    assert "all images were trained on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_end(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, whole, again = ["--folds", "2", "--num_epochs", "2"], tmp_path / "whole", tmp_path / "again"
    small.setattr("train.evaluate", course(*([0, 50, 60] * 9)))
    assert train(sample_dir, whole, *flags) == 0
    small.setattr("train.evaluate", course(*([0, 50, 60] * 9)))
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, {4: signal.SIGTERM})
        assert train(sample_dir, again, *flags) == 143
    assert folds_of(again).folds == []
    with pytest.MonkeyPatch.context() as patch:  # a fold has 6 steps, so that this is in the last run
        signal_at(patch, {9: signal.SIGTERM})
        assert main(["--resume", "--output_dir", str(again)]) == 143
    assert len(folds_of(again).folds) == 2
    capsys.readouterr()
    assert main(["--resume", str(again)]) == 0
    assert "held-out images, epoch 2 against the model as loaded" in capsys.readouterr().out
    assert_same_runs(again, whole)
    ours, theirs = folds_of(again), folds_of(whole)
    assert [fold.curve for fold in ours.folds] == [fold.curve for fold in theirs.folds]
    assert (ours.verdict, ours.length) == (theirs.verdict, theirs.length)


@pytest.mark.slow
def test_frozen_towers_run_once_for_all_folds(sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    tower = CLIPModel.run_image_tower

    def counted(self: CLIPModel, images: torch.Tensor, *rest: Any, **options: Any) -> Any:
        ran.append(len(images))
        return tower(self, images, *rest, **options)

    small.setattr(CLIPModel, "run_image_tower", counted)
    flags = ["--folds", "2", "--num_epochs", "1", "--freeze_backbone"]
    assert train(sample_dir, tmp_path, *flags) == 0
    trained_and_held = sum(ran)
    ran.clear()
    assert train(sample_dir, tmp_path, *flags) == 0  # with all of it cached
    assert trained_and_held - sum(ran) == 60


@pytest.mark.slow
def test_a_fold_that_is_gone_is_trained_anew(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(sample_dir, tmp_path, "--folds", "2", "--num_epochs", "1") == 0
    before = folds_of(tmp_path)
    (tmp_path / "folds/1/results/retrieval.npz").write_bytes(b"")
    assert main(["--resume", str(tmp_path)]) == 2
    assert "folds/1 is deleted, --resume trains this fold anew" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "folds/1")
    assert main(["--resume", str(tmp_path)]) == 0
    after = folds_of(tmp_path)
    assert capsys.readouterr().out.startswith("fold 1:")
    assert [each.curve for each in after.folds] == [each.curve for each in before.folds]
    assert (after.verdict, after.length) == (before.verdict, before.length)
    assert after.folds[0].run_id != before.folds[0].run_id


@pytest.mark.slow
def test_excluded_pairs_are_in_no_training_and_stay_in_the_folds(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    image = sorted((sample_dir / "images").iterdir())[0]
    suspects = tmp_path / "suspects.csv"
    suspects.write_text(f"image,caption,keep\n{image},,no\n")
    assert train(sample_dir, tmp_path, "--folds", "2", "--num_epochs", "1", "--exclude", str(suspects)) == 0
    sizes = []
    for folder in (tmp_path / "folds/1", tmp_path / "folds/2", tmp_path):
        data = load_checkpoint(folder / "model-checkpoint/best_model.pth")["data"]
        sizes.append([len(Snapshot.from_dict(data[split]).files) for split in ("train", "val")])
    assert sorted(sizes[:2]) == [[29, 30], [30, 30]]
    assert sizes[2] == [59, 0]


@pytest.mark.slow
def test_a_fold_is_not_resumed_alone(run: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--resume", str(run / "folds/2")], ["--resume", "--output_dir", str(run / "folds/2")]):
        assert main(flags) == 2
        assert f"--resume {run} goes on" in capsys.readouterr().err


def test_several_processes_are_refused(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.setattr("cliptune.runs.folds.world_size", lambda: 2)
    assert train(sample_dir, tmp_path, "--folds", "2") == 2
    assert "--folds trains one fold after another in one process" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--val_data", "x"], "val_data does not go with folds"),
        (["--validate_every", "3"], "validate_every does not go with folds"),
        (["--interpolate"], "interpolate does not go with folds"),
        (["--data_dir", "x/{0..3}.tar"], "is shards: leave --folds away"),
        (["--folds", "1"], "--folds: expected"),
        (["--resume", "latest", "--num_epochs", "1"], "--num_epochs 1 cannot change"),
        (["--resume", "latest", "--folds", "4"], "--folds cannot change when a run is resumed"),
    ],
)
def test_what_does_not_go_with_folds_is_refused(
    flags: list[str], says: str, run: Path, sample_dir: Path, small: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train(sample_dir, run, "--folds", "3", "--num_epochs", "2", *flags) == 2
    assert says in capsys.readouterr().err
    assert (run / "results/folds.json").exists()


@pytest.mark.slow
def test_other_data_is_refused_on_resume(
    run: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create_sample_dataset(tmp_path, 40, seed=7)
    assert train(tmp_path, run, "--resume") == 2
    assert "is not the data that the folds were dealt from" in capsys.readouterr().err


@pytest.mark.slow
def test_a_new_run_moves_the_folds_of_an_earlier_one_away(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    assert train(sample_dir, tmp_path, "--folds", "2", "--num_epochs", "1") == 0
    assert train(sample_dir, tmp_path, "--num_epochs", "1") == 0
    assert not (tmp_path / "folds").exists()
    assert not (tmp_path / "results/folds.json").exists()
    assert len(list((tmp_path / "previous").glob("*/folds/2/results/retrieval.npz"))) == 1
