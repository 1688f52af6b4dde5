import json
from pathlib import Path
from typing import Any

import pytest

import evaluation
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from evaluation import main


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
    assert main(["--checkpoint", str(checkpoint), "--data_dir", str(sample_dir), "--output_dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results" / "evaluation_results.json").read_text())["num_images"] == 60


@pytest.mark.parametrize(("flags", "expected"), [([], "bf16"), (["--precision", "fp32"], "fp32")])
def test_the_precision_is_the_runs_unless_told(
    flags: list[str], expected: str, trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = load_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")
    content["config"]["training"]["precision"] = "bf16"
    save_checkpoint(tmp_path / "bf16.pth", content)
    used = []
    encode = evaluation.encode_pairs

    def note(*arguments: Any, **options: Any) -> Any:
        used.append(options["precision"].name)
        return encode(*arguments, **options)

    monkeypatch.setattr(evaluation, "encode_pairs", note)
    assert main(["--checkpoint", str(tmp_path / "bf16.pth"), "--output_dir", str(tmp_path), *flags]) == 0
    assert used == [expected]


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
