import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clip_model import CLIPModel
from cliptune import results
from cliptune.data.pairs import load_pairs
from cliptune.features.encode import Encoded, Encoder
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.runtime.device import resolve_precision
from data_loader import ImageTextDataset
from evaluation import evaluate, main, validation_loss

FP32 = resolve_precision("fp32", torch.device("cpu"))


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
    assert main(["--checkpoint", str(checkpoint), "--data_dir", str(sample_dir), "--output_dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results" / "evaluation_results.json").read_text())["num_images"] == 60


@pytest.mark.parametrize(("flags", "expected"), [([], "bf16"), (["--precision", "fp32"], "fp32")])
def test_the_precision_is_the_runs_unless_told(
    flags: list[str], expected: str, trained_dir: Path, tmp_path: Path
) -> None:
    content = load_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")
    content["config"]["training"]["precision"] = "bf16"
    save_checkpoint(tmp_path / "bf16.pth", content)
    assert main(["--checkpoint", str(tmp_path / "bf16.pth"), "--output_dir", str(tmp_path), *flags]) == 0
    found = results.read(tmp_path / "results" / "evaluation_results.json")
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
    encoded = Encoded(images, texts, owners, 1.0, 1.0)
    got = validation_loss(encoded, torch.tensor(5.0).log(), batch_size=3)
    assert got == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


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
