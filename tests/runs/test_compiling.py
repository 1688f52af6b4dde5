"""Whether a run compiles its towers."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from clip_model import CLIPModel
from cliptune.cli import load_config
from cliptune.model import programs, towers
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.runs import compiling, model
from cliptune.runs.compiling import PAYS_FROM, chooses_to_compile, run_operations
from cliptune.runtime.device import compiler_issue
from cliptune.settings import Config
from tests.helpers.models import FP32, small_architectures
from tests.helpers.runs import SMALL
from train import main

__all__ = ["small_architectures"]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LONG = 10**11
"""Samples of an epoch that make a run of even a small model long."""


def settings(*flags: str) -> Config:
    return load_config(["--model_name", "ViT-Mini", *flags], description="").config


def choose(*flags: str, device: torch.device = CUDA, num_samples: int = LONG, began: bool | None = None) -> bool:
    config = settings(*flags)
    made = CLIPModel("ViT-Mini", pretrained="none", freeze_backbone=config.model.freeze_backbone)
    return chooses_to_compile(config, made, device=device, num_samples=num_samples, began=began)


@pytest.fixture(autouse=True)
def working_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compiler_issue", lambda device: None)


@pytest.mark.parametrize(("value", "wanted"), [
    ("true", "true"), (True, "true"), ("True", "true"), (False, "false"), ("false", "false"), ("auto", "auto"),
])  # fmt: skip
def test_settings_of_before_there_was_a_third_choice_are_read(value: Any, wanted: str) -> None:
    assert Config.model_validate({"training": {"compile": value}}).training.compile == wanted


def test_the_flag_alone_means_true() -> None:
    assert settings().training.compile == "auto"
    assert settings("--compile").training.compile == "true"
    assert settings("--compile", "false").training.compile == "false"
    with pytest.raises(ValueError, match="--compile: expected 'auto', 'true' or 'false', got 'maybe'"):
        settings("--compile", "maybe")


@pytest.mark.slow
def test_it_pays_in_a_long_run_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert choose()
    assert "towers are compiled: a run of " in caplog.text
    caplog.clear()
    assert not choose(num_samples=1000)
    assert "towers are not compiled: a run of " in caplog.text
    assert "it pays from 4e+16 on" in caplog.text
    caplog.clear()
    assert not choose(device=CPU)
    assert not choose(device=torch.device("mps"))
    assert not choose("--compile", "false")
    assert not caplog.text
    assert choose("--compile", device=CPU, num_samples=10)
    assert "towers are compiled: --compile true; block by block, since a whole tower takes the compiler" in caplog.text


def test_the_estimate_grows_with_what_is_computed() -> None:
    config, small_model = settings("--num_epochs", "10"), CLIPModel("ViT-Mini", pretrained="none")
    whole = run_operations(config, small_model, num_samples=100)
    assert run_operations(config, small_model, num_samples=200) == pytest.approx(2 * whole)
    assert run_operations(settings("--num_epochs", "5"), small_model, num_samples=100) == pytest.approx(whole / 2)
    half = CLIPModel("ViT-Mini", pretrained="none", freeze_tower="image")
    assert 0 < run_operations(config, half, num_samples=100) < whole
    # 1.4 million pairs of a ViT-B/32, as the comment at the constant says
    small_model.architecture = ARCHITECTURES["ViT-B/32"]
    config = settings("--num_epochs", "1")
    assert run_operations(config, small_model, num_samples=512 * 2670) == pytest.approx(PAYS_FROM, rel=0.1)


def test_a_resumed_run_goes_on_as_it_began(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert choose(num_samples=10, began=True)
    assert "towers are compiled: as the run began" in caplog.text
    assert not choose(began=False)
    assert choose("--compile", began=False)
    assert not choose("--compile", "false", began=True)
    assert not choose(device=CPU, began=True)


def test_what_never_runs_is_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert not choose("--compile", "--freeze_backbone")
    assert "towers are not compiled: both are frozen, and their outputs cached" in caplog.text


def test_frozen_towers_that_are_sharded_run_in_every_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their outputs are not cached, so micro-batches are chosen, too, see `place_model`."""
    caplog.set_level("INFO")
    monkeypatch.setattr(compiling, "world_size", lambda: 2)
    assert choose("--compile", "--freeze_backbone", "--parallel", "fsdp")
    assert "outputs cached" not in caplog.text
    assert not choose("--compile", "--freeze_backbone")


@pytest.mark.parametrize(("flags", "said"), [
    ((), "; the first step waits for it"),
    (("--gradient_checkpointing",), "; block by block, since checkpointing repeats them one by one"),
    (("--parallel", "fsdp"), "; block by block, since FSDP shards them one by one"),
])  # fmt: skip
def test_the_line_says_what_is_compiled(
    flags: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(compiling, "world_size", lambda: 2 if flags[:1] == ("--parallel",) else 1)
    assert choose("--compile", *flags)
    assert f"towers are compiled: --compile true{said}" in caplog.text


def test_without_a_compiler_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "compiler_issue", compiler_issue)

    def broken(function: Any) -> Any:
        raise RuntimeError("no compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    made = CLIPModel("ViT-Mini", pretrained="none")
    assert not chooses_to_compile(settings("--compile"), made, device=CPU, num_samples=10, began=None)
    assert "--compile: no compiler works here (no compiler found); going on without" in caplog.text


@pytest.mark.slow
def test_a_run_says_that_it_is_compiled_and_goes_on_so(
    sample_dir: Path,
    tmp_path: Path,
    small: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    small.setattr(programs, "_program", cache(partial(torch.compile, backend=counter)))
    flags = ["--data_dir", str(sample_dir), "--output_dir", str(tmp_path), *SMALL, "--precision", "fp32"]
    assert main([*flags, "--num_epochs", "1", "--compile"]) == 0
    assert counter.frame_count >= 2  # a block of each tower; images of a smaller batch have their own
    assert "\nprecision: fp32, compiled\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "training_results.json").read_text())
    assert (results["run"]["precision"], results["config"]["training"]["compile"]) == ("fp32, compiled", "true")
    assert load_checkpoint(tmp_path / "model-checkpoint" / "last_model.pth")["compiled"] is True
    seen: list[bool | None] = []
    choose = model.chooses_to_compile

    def note(*given: Any, began: bool | None, **options: Any) -> bool:
        seen.append(began)
        return choose(*given, began=began, **options)

    small.setattr(model, "chooses_to_compile", note)
    assert main(["--output_dir", str(tmp_path), "--num_epochs", "2", "--resume", "--compile", "auto"]) == 0
    assert seen == [True]
    assert "precision" not in capsys.readouterr().out  # on a CPU `auto` never compiles


@pytest.mark.slow
@pytest.mark.parametrize("whole_on", ["cpu", "cuda"])
def test_a_run_whose_compiler_fails_does_not_say_that_it_is_compiled(
    whole_on: str, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise torch._dynamo.exc.InternalTorchDynamoError("Triton is missing")

    small.setattr(towers, "WHOLE_ON", {whole_on})
    small.setattr(programs, "_program", lambda *_, **__: broken)
    flags = ["--data_dir", str(sample_dir), "--output_dir", str(tmp_path), *SMALL, "--precision", "fp32"]
    assert main([*flags, "--num_epochs", "1", "--compile"]) == 0
    assert "compiled" not in capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "training_results.json").read_text())
    assert results["run"]["precision"] == "fp32"
    assert load_checkpoint(tmp_path / "model-checkpoint" / "last_model.pth")["compiled"] is False


def test_what_is_compiled_goes_by_what_is_done_to_the_model_after_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "WHOLE_ON", {"cpu"})
    for flags, is_whole in (((), True), (("--gradient_checkpointing",), False)):
        made = CLIPModel("ViT-Mini", pretrained="none")
        config = settings("--compile", "--micro_batch_size", "8", *flags)
        model.place_model(config, made, precision=FP32, device=CPU, num_samples=8)
        assert (made.backbone.compiled, made.backbone.transformer.compiled) == (is_whole, not is_whole)
