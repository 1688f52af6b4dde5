"""A run ends with a sentence: better, not distinguishable or worse than before, and what it rests on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cliptune.results import RECALL_KEYS, TrainingResults
from cliptune.training.checkpoint import RunFiles
from tests.helpers.runs import SMALL, signal_at, small_runs
from tests.helpers.verdicts import qualities
from train import main

FLAGS = [*SMALL, "--precision", "fp32", "--val_split", "0.5"]


def results_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results/training_results.json").read_text()))


def rsum(ranks: Sequence[Any]) -> float:
    return float(sum(100 * np.mean(each <= k) for each in ranks for k in (1, 5, 10)))


@pytest.fixture(scope="module")
def run(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on 30 images, evaluated on 30."""
    folder = tmp_path_factory.mktemp("run")
    with small_runs():
        assert main([*FLAGS, "--num_epochs", "2", "--data_dir", str(sample_dir), "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drawn", "begins", "word"),
    [
        ((0.0, 1.2, 1.0), "\nBetter than before: RSum +", "better"),
        ((0.8, 0.8, 0.8), "\nNot distinguishable from before: RSum ", "not distinguishable"),
        ((1.5, 0.3, 0.2), "\nWorse than before: RSum -", "worse"),
    ],
)
def test_a_run_ends_with_a_sentence_above_its_table(
    drawn: tuple[float, ...], begins: str, word: str, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    small.setattr("train.evaluate", qualities(*drawn))
    assert main([*FLAGS, "--num_epochs", "2", "--data_dir", str(sample_dir), "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    results = results_of(tmp_path)
    verdict, history = results["verdict"], results["history"]
    gain, low, high = verdict["rsum"]
    assert out.startswith(begins)
    assert f"RSum {gain:+.1f} (95% interval {low:+.1f} to {high:+.1f}) on 30 validation images" in out
    assert "the luck of being the best of 2 evaluations is taken off" in out
    assert (verdict["verdict"], verdict["split"], verdict["num_evaluations"]) == (word, "val", 2)
    assert (low > 0, high < 0) == (word == "better", word == "worse")
    trained = max(history[1:], key=lambda record: record["rsum"])
    assert verdict["epoch"] == trained["epoch"]
    row = next(line for line in out.splitlines() if line.startswith("rsum"))
    assert row.split()[1:3] == [f"{history[0]['rsum']:.1f}", f"{trained['rsum']:.1f}"]  # also where it is not kept
    assert f"epoch {trained['epoch']}" in out
    for key in RECALL_KEYS:
        gained = "{:+.1f} ({:+.1f} to {:+.1f})".format(*verdict["recalls"][key])
        assert gained in next(line for line in out.splitlines() if line.startswith(key))
    for record, each in zip(history[1:], results["gains"], strict=True):
        assert each["epoch"] == record["epoch"]
        assert each["rsum"][0] == pytest.approx(record["rsum"] - history[0]["rsum"])
        assert each["rsum"][1] < each["rsum"][0] < each["rsum"][2]
    assert ("no epoch beat the model as loaded" in out) == (results["best_epoch"] == 0)


@pytest.mark.slow
def test_ranks_and_answers_are_those_of_the_evaluations(run: Path) -> None:
    found, results = np.load(RunFiles(run).retrieval), results_of(run)
    assert found["epochs"].tolist() == [0, 1, 2]
    for ranks, record in zip(zip(found["i2t"], found["t2i"], strict=True), results["history"], strict=True):
        assert rsum(ranks) == pytest.approx(record["rsum"])
    assert str(found["run_id"]) == results["run_id"]
    for model, index in (("loaded", 0), ("best", results["best_epoch"])):
        is_first = found[f"{model}_t2i_ids"][:, 0] == found["text_to_image"]
        assert 100 * is_first.mean() == pytest.approx(results["history"][index]["t2i_r1"])
        assert found[f"{model}_image_features"].shape == (30, 64)
    checkpoint = RunFiles(run).last.read_bytes()
    assert b"ranks" not in checkpoint
    assert "ranks" not in json.dumps(results)


@pytest.mark.slow
def test_a_run_that_was_stopped_has_the_verdict_of_the_unbroken_one(
    run: Path, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    signal_at(small, {5: signal.SIGTERM})
    flags = [*FLAGS, "--num_epochs", "2", "--data_dir", str(sample_dir), "--output_dir", str(tmp_path / "a")]
    assert main(flags) == 143
    last = str(RunFiles(tmp_path / "a").last)
    assert main(["--resume", last, "--output_dir", str(tmp_path / "b")]) == 0  # in another folder
    assert results_of(tmp_path / "b")["verdict"] == results_of(run)["verdict"]
    before, after = (np.load(RunFiles(folder).retrieval) for folder in (run, tmp_path / "b"))
    for name in before.files:
        assert np.array_equal(before[name], after[name], equal_nan=before[name].dtype.kind == "f") or name == "run_id"


@pytest.mark.slow
def test_a_run_without_its_record_has_no_verdict_and_says_why(
    run: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "a")
    RunFiles(tmp_path / "a").retrieval.unlink()
    capsys.readouterr()
    assert main(["--resume", "--output_dir", str(tmp_path / "a"), "--num_epochs", "3"]) == 0
    captured = capsys.readouterr()
    reason = "what the first 3 evaluations found, query by query, is lost"
    assert f"{reason}: there is no " in captured.err
    assert captured.out.startswith(f"\nNo verdict: {reason}\n")
    assert "rsum" in captured.out
    assert results_of(tmp_path / "a")["no_verdict"] == reason
    assert "verdict" not in results_of(tmp_path / "a")


@pytest.mark.slow
def test_a_test_split_is_judged_by_once_in_the_end(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((sample_dir / "data.json").read_text())
    for number, row in enumerate(index):
        row |= {"image_path": str(sample_dir / row["image_path"]), "split": ("train", "val", "test")[number % 3]}
    (tmp_path / "data.json").write_text(json.dumps(index))
    small.setattr("train.evaluate", qualities(0.0, 1.2, 0.3, 1.0))  # two of validation, then two of the test split
    flags = [*FLAGS, "--num_epochs", "1", "--data_dir", str(tmp_path / "data.json"), "--output_dir", str(tmp_path)]
    test = {row["image_path"] for row in index if row["split"] == "test"}
    assert main(flags) == 0
    out, results = capsys.readouterr().out, results_of(tmp_path)
    assert results["best_epoch"] == 1
    verdict = results["verdict"]
    assert (verdict["split"], verdict["num_images"]) == ("test", len(test))
    assert f"on {len(test)} test images, epoch 1 against the model as loaded; nothing was chosen by these images" in out
    gain = results["test"]["metrics"]["rsum"] - results["test"]["baseline"]["rsum"]
    assert verdict["rsum"][0] == pytest.approx(gain)
    row = next(line for line in out.splitlines() if line.startswith("rsum"))
    assert row.split()[1] == f"{results['test']['baseline']['rsum']:.1f}"
    assert results["gains"]  # the curves are of validation
    assert TrainingResults.model_validate(results).test is not None


@pytest.mark.slow
def test_a_test_split_that_cannot_be_read_does_not_end_a_run_that_is_done(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((sample_dir / "data.json").read_text())
    (tmp_path / "broken.png").write_bytes(b"no image")
    for number, row in enumerate(index):
        row |= {"image_path": str(sample_dir / row["image_path"]), "split": ("train", "val")[number % 2]}
    index.append({"image_path": "broken.png", "caption": "a", "split": "test"})
    (tmp_path / "data.json").write_text(json.dumps(index))
    small.setattr("train.evaluate", qualities(0.0, 1.2, 0.0))
    flags = [*FLAGS, "--num_epochs", "1", "--data_dir", str(tmp_path / "data.json"), "--output_dir", str(tmp_path)]
    assert main(flags) == 0
    captured = capsys.readouterr()
    assert "the test split is not looked at: none of the images could be read" in captured.err
    assert results_of(tmp_path)["verdict"]["split"] == "val"


@pytest.mark.slow
def test_one_image_gives_no_verdict(
    tmp_path: Path, sample_dir: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL, "--num_epochs", "1", "--val_split", "0.001", "--data_dir", str(sample_dir)]
    assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    assert "No verdict: 1 validation image of one group says nothing of others" in capsys.readouterr().out


@pytest.mark.slow
def test_where_captions_are_classes_the_merged_numbers_decide(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((sample_dir / "data.json").read_text())
    for number, row in enumerate(index):
        row |= {"image_path": str(sample_dir / row["image_path"]), "caption": ("a dog", "a cat")[number % 2]}
    (tmp_path / "data.json").write_text(json.dumps(index))
    flags = [*FLAGS, "--num_epochs", "1", "--data_dir", str(tmp_path / "data.json"), "--output_dir", str(tmp_path)]
    assert main(flags) == 0
    captured, results = capsys.readouterr(), results_of(tmp_path)
    assert "captions are classes here" in captured.err
    assert "equal captions and images count as one" in captured.out
    history = results["history"]
    gain = history[1]["merged_rsum"] - history[0]["merged_rsum"]
    assert results["verdict"]["rsum"][0] == results["gains"][0]["rsum"][0] == pytest.approx(gain)
    assert results["verdict"]["merged"]
    row = next(line for line in captured.out.splitlines() if line.startswith("merged_rsum"))
    assert row.split()[1] == f"{history[0]['merged_rsum']:.1f}"
    assert np.load(RunFiles(tmp_path).retrieval)["merged_t2i"].shape[0] == 2
