"""What trains in a run: adapters, last layers, averages. Their files, and that a resumed run is the unbroken one."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_model import CLIPModel
from cliptune.cli import load_config
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.runs import model as model_of_run
from cliptune.runs.model import place_model
from cliptune.training.checkpoint import RunFiles
from cliptune.training.state import RunState
from tests.helpers.models import FP32, small_architectures
from tests.helpers.runs import SMALL, assert_same_runs, lines_of, signal_at
from train import main

__all__ = ["small_architectures"]

LORA = ["--lora_rank", "2", "--lora_alpha", "4"]
EMA = ["--ema", "0.9"]


def flags_for(data_dir: Path, output_dir: Path, *more: str) -> list[str]:
    return ["--data_dir", str(data_dir), "--output_dir", str(output_dir), *SMALL, "--num_epochs", "2", *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [*LORA, *EMA, "--micro_batch_size", "4"],
        [*LORA, "--freeze_tower", "text", "--lora_layers", "mlp"],
        ["--train_layers", "1", "--layer_decay", "0.5", "--augment", "crop"],
        [*EMA, "--layer_decay", "0.7"],
        [*EMA, "--freeze_backbone"],
    ],
    ids=" ".join,
)
def test_a_run_that_is_broken_off_and_resumed_is_the_unbroken_one(
    flags: list[str], sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    assert main(flags_for(sample_dir, tmp_path / "whole", *flags)) == 0
    broken = flags_for(sample_dir, tmp_path / "broken", *flags)
    signal_at(small, {2: signal.SIGTERM, 6: signal.SIGINT})
    assert main(broken) == 143
    assert main(["--output_dir", str(tmp_path / "broken"), "--resume"]) == 130
    assert main(["--output_dir", str(tmp_path / "broken"), "--resume"]) == 0
    assert_same_runs(tmp_path / "broken", tmp_path / "whole")
    for folder in (tmp_path / "broken", tmp_path / "whole"):
        assert RunFiles(folder).adapter.exists() == (LORA[0] in flags)


@pytest.mark.slow
def test_the_best_model_is_the_average_and_last_layers_are_said(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags_for(sample_dir, tmp_path, *EMA, "--train_layers", "1", "--layer_decay", "0.5")) == 0
    said = capsys.readouterr().err
    assert "the last 1 layer of each tower" in said
    assert "towers 0.001, 0.0005 from the top layer down" in said
    assert "what lora_rank or train_layers hold of it stays random" in said
    last = load_checkpoint(RunFiles(tmp_path).last)
    weights, average = last["weights_state_dict"], last["average_state_dict"]
    assert weights.keys() == average.keys()
    assert "backbone.token_embedding.weight" not in average
    for name, value in average.items():
        assert torch.equal(last["model_state_dict"][name], value)
    assert not torch.equal(weights["image_projection.weight"], average["image_projection.weight"])
    assert {line["backbone_learning_rate"] > 0 for line in lines_of(tmp_path / "logs" / "steps.jsonl")} == {True}


@pytest.mark.slow
def test_a_run_with_adapters_tells_them_and_leaves_them_beside_the_merged_model(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunState.add_evaluation

    def better(self: RunState, evaluation: dict[str, Any], **options: Any) -> bool:
        record(self, evaluation, **options)
        self.best, self.best_epoch, self.best_step, self.epochs_since_best = evaluation, self.epoch, self.step, 0
        return True

    small.setattr(RunState, "add_evaluation", better)
    assert main(flags_for(sample_dir, tmp_path, *LORA, *EMA, "--num_epochs", "1")) == 0
    said = capsys.readouterr().err
    assert "LoRA of rank 2 beside 16 weights" in said
    assert "peak rates: projection layers 0.001; LoRA 0.002" in said
    history = json.loads((tmp_path / "results" / "training_results.json").read_text())["history"]
    assert history[0]["backbone_learning_rate"] == pytest.approx(0.001)  # the first of a warm-up of one step
    # the adapter on the model as loaded is the best model, which is one without adapters
    files = RunFiles(tmp_path)
    best = CLIPModel.from_checkpoint(files.best)
    model = CLIPModel.from_checkpoint(files.loaded)
    moved = [name for name, value in model.state_dict().items() if not value.equal(best.state_dict()[name])]
    assert any("mlp.c_fc.weight" in name for name in moved)
    assert not [name for name in moved if "embedding" in name or "ln_" in name]
    model.load_adapter(files.adapter)
    assert all(value.equal(best.state_dict()[name]) for name, value in model.state_dict().items())
    assert files.adapter.stat().st_size < files.best.stat().st_size / 10
    assert main(["--resume", str(files.last), "--output_dir", str(tmp_path / "elsewhere")]) == 0
    assert RunFiles(tmp_path / "elsewhere").adapter.read_bytes() == files.adapter.read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--freeze_backbone", *LORA], "freeze_backbone and lora_rank say different things"),
        (["--train_layers", "1", *LORA], "lora_rank and train_layers say different things"),
        (["--lora_alpha", "1"], "they need lora_rank"),
        (["--freeze_backbone", "--layer_decay", "0.7"], "freeze_backbone holds them"),
        (["--ema", "0.9", "--parallel", "fsdp"], "ema does not go with parallel fsdp"),
        (["--ema", "1"], "less than 1"),
        (["--train_layers", "9"], "train_layers 9: the towers have 2 layers at most"),
        (["--lora_rank", "99"], "lora_rank 99 is more than the 64"),
    ],
)
def test_what_makes_no_sense_is_refused(
    flags: list[str], message: str, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(flags_for(sample_dir, tmp_path, *flags)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parallel", "fsdp"], ["--parallel fsdp: there is one rank"]),
        (["--freeze_backbone", "--backbone_lr_scale", "0.5"], ["--backbone_lr_scale 0.5: both towers are frozen"]),
        (["--freeze_backbone", "--gradient_checkpointing"], ["--gradient_checkpointing: both towers are frozen"]),
        (["--freeze_backbone", "--gradient_checkpointing", "--feature_views", "0"], []),
        (["--freeze_tower", "text", "--gradient_checkpointing", "--backbone_lr_scale", "0.5"], []),
    ],
    ids=" ".join,
)
def test_settings_that_change_nothing_are_named(
    flags: list[str], told: list[str], small_architectures: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = load_config(["--model_name", "ViT-Mini", "--micro_batch_size", "4", *flags], description="").config
    settings = config.model
    model = CLIPModel(settings.name, None, settings.freeze_backbone, "none", freeze_tower=settings.freeze_tower)
    place_model(config, model, precision=FP32, device=torch.device("cpu"), num_samples=10)
    found = [record.getMessage() for record in caplog.records if record.getMessage().startswith("--")]
    assert len(found) == len(told)
    assert all(message.startswith(begins) for message, begins in zip(found, told, strict=True))


@pytest.mark.slow
def test_a_checkpoint_without_its_adapters_is_refused(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags_for(sample_dir, tmp_path, *LORA, "--num_epochs", "1")) == 0
    last = RunFiles(tmp_path).last
    state = torch.load(last)
    del state["weights_state_dict"]
    torch.save(state, last)
    assert main(["--output_dir", str(tmp_path), "--resume", "--num_epochs", "2"]) == 2
    assert "last_model.pth: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["none", "ieee"])
def test_a_run_tells_of_tf32_where_it_rounds_to_it(
    asked: str, monkeypatch: pytest.MonkeyPatch, small_architectures: None, caplog: pytest.LogCaptureFixture
) -> None:
    products: Any = torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):
        pytest.skip("this PyTorch does not tell what was asked for")
    caplog.set_level("INFO")
    config = load_config(["--micro_batch_size", "4", "--compile", "false"], description="").config
    model = CLIPModel("ViT-Mini")
    monkeypatch.setattr(model, "to", lambda _: model)  # there need be no GPU
    monkeypatch.setattr(model_of_run, "parallel_model", lambda *_: None)
    before = products.fp32_precision
    products.fp32_precision = asked
    try:
        place_model(config, model, precision=FP32, device=torch.device("cuda"), num_samples=10)
    finally:
        products.fp32_precision = before
    assert ("TF32" in caplog.text) == (asked == "none")
