"""Whether a run compiles its towers."""

from typing import Any

import pytest
import torch

from clip_model import CLIPModel
from cliptune.cli import load_config
from cliptune.runs import compiling
from cliptune.runs.compiling import PAYS_FROM, chooses_to_compile, run_operations
from cliptune.settings import Config
from tests.helpers.models import small_architectures

__all__ = ["small_architectures"]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LONG = 10**11
"""Samples of an epoch that make a run of even a small model long."""


def settings(*flags: str) -> Config:
    return load_config(["--model_name", "ViT-Mini", *flags], description="").config


def choose(*flags: str, device: torch.device = CUDA, num_samples: int = LONG, began: bool | None = None) -> bool:
    config = settings(*flags)
    model = CLIPModel("ViT-Mini", pretrained="none", freeze_backbone=config.model.freeze_backbone)
    return chooses_to_compile(config, model, device=device, num_samples=num_samples, began=began)


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


def test_the_estimate_grows_with_what_is_computed() -> None:
    config, model = settings("--num_epochs", "10"), CLIPModel("ViT-Mini", pretrained="none")
    whole = run_operations(config, model, num_samples=100)
    assert run_operations(config, model, num_samples=200) == pytest.approx(2 * whole)
    assert run_operations(settings("--num_epochs", "5"), model, num_samples=100) == pytest.approx(whole / 2)
    half = CLIPModel("ViT-Mini", pretrained="none", freeze_tower="image")
    assert 0 < run_operations(config, half, num_samples=100) < whole
    # 1.4 million pairs of a ViT-B/32, as in the comment at the constant
    model = CLIPModel("ViT-B/32", pretrained="none")
    config = settings("--num_epochs", "1")
    assert run_operations(config, model, num_samples=512 * 2670) == pytest.approx(PAYS_FROM, rel=0.1)


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
    monkeypatch.undo()

    def broken(function: Any) -> Any:
        raise RuntimeError("no compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    model = CLIPModel("ViT-Ti/32", pretrained="none")
    assert not chooses_to_compile(settings("--compile"), model, device=CPU, num_samples=10, began=None)
    assert "--compile: no compiler works here (no compiler found); going on without" in caplog.text
