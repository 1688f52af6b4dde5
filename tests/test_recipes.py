"""What recipes pick, from plain values, and what wins over them in a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from cliptune.model import published
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.recipes import Situation, choose, settle_recipe
from cliptune.training.checkpoint import RunFiles
from tests.helpers.models import SMALL_VIT
from tests.helpers.runs import SMALL
from train import main


def picked(recipe: str, situation: Situation, **own: Any) -> dict[str, Any]:
    meant, _ = settle_recipe(recipe, situation, own)
    return {choice.name: choice.value for choice in choose(meant, situation, own)}


@pytest.mark.parametrize(
    ("recipe", "situation", "own", "meant"),
    [
        ("auto", Situation(300, 32), {}, "lora"),
        ("auto", Situation(1999, 32), {}, "lora"),
        ("auto", Situation(2000, 32), {}, "full"),
        ("auto", Situation(300, 32, is_vit=False), {}, "full"),
        ("auto", Situation(300, 32, is_pretrained=False), {}, "full"),
        ("auto", Situation(9000, 32), {"freeze_backbone": True}, "head"),
        ("auto", Situation(9000, 32), {"lora_rank": 8}, "lora"),
        ("auto", Situation(300, 32), {"train_layers": 2}, "full"),
        ("auto", Situation(300, 32), {"freeze_tower": "text", "freeze_backbone": False}, "lora"),
        ("full", Situation(300, 32), {}, "full"),
        ("head", Situation(9000, 32), {}, "head"),
    ],
)
def test_which_recipe_is_meant(recipe: str, situation: Situation, own: dict[str, Any], meant: str) -> None:
    assert settle_recipe(recipe, situation, own)[0] == meant


@pytest.mark.parametrize(
    ("recipe", "situation", "own", "message"),
    [
        ("lora", Situation(300, 32), {"freeze_backbone": True}, "recipe lora does not go with freeze_backbone"),
        ("full", Situation(300, 32), {"lora_rank": 2}, "recipe full does not go with lora_rank"),
        ("head", Situation(300, 32), {"train_layers": 2}, "recipe head does not go with train_layers"),
        ("lora", Situation(300, 32, is_pretrained=False), {}, "starts from random ones: use full"),
    ],
)
def test_what_does_not_go_with_a_recipe(recipe: str, situation: Situation, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settle_recipe(recipe, situation, own)


@pytest.mark.parametrize(
    ("recipe", "situation", "towers", "heads", "epochs", "warmup"),
    [
        ("full", Situation(118_000, 256), 1e-5, 1e-4, 5, 0.05),
        ("full", Situation(10_000, 32), 1.25e-6, 1.25e-5, 7, 0.05),
        ("full", Situation(1_000_000, 4096), 5e-5, 5e-4, 9, 0.05),
        ("full", Situation(5000, 8), 5e-7, 5e-6, 4, 0.05),
        ("full", Situation(300, 32), 1.25e-6, 1.25e-5, 15, 0.1),
        ("full", Situation(300, 32, has_new_heads=True), 1.25e-6, 1.25e-4, 15, 0.1),
        ("full", Situation(20, 32), 20 / 32 * 1.25e-6, 20 / 32 * 1.25e-5, 15, 0.1),
        ("lora", Situation(300, 32), 2e-4, 1.25e-5, 15, 0.1),
        ("lora", Situation(9000, 256), 2e-4, 1e-4, 15, 0.1),
        ("head", Situation(9000, 256), None, 1e-3, 15, 0.1),
    ],
)
def test_rates_and_lengths(
    recipe: str, situation: Situation, towers: float | None, heads: float, epochs: int, warmup: float
) -> None:
    found = picked(recipe, situation)
    assert found["learning_rate"] == pytest.approx(heads, rel=1e-3)
    if towers is None:
        assert "backbone_lr_scale" not in found
    else:
        assert found["learning_rate"] * found["backbone_lr_scale"] == pytest.approx(towers, rel=1e-3)
    assert (found["num_epochs"], found["warmup_fraction"]) == (epochs, warmup)
    assert found.get("freeze_backbone") == (True if recipe == "head" else None)
    assert found.get("lora_rank") == (2 if recipe == "lora" else None)


def test_a_chosen_rate_leaves_the_towers_theirs() -> None:
    found = picked("full", Situation(10_000, 256), learning_rate=1e-3)
    assert found["backbone_lr_scale"] == pytest.approx(0.01)
    assert picked("lora", Situation(100, 32), lora_rank=8)["lora_alpha"] == 4


def test_every_choice_has_a_reason() -> None:
    for recipe in ("full", "lora", "head"):
        assert all(len(choice.reason) > 20 for choice in choose(recipe, Situation(300, 32), {}))
    assert choose("full", Situation(300, 32, is_pretrained=False), {}) == []


@pytest.mark.slow
def test_a_run_takes_what_a_recipe_picks_and_what_was_chosen_wins(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_dir", str(sample_dir), *SMALL[:6], "--num_epochs", "1"]
    assert main([*flags, "--output_dir", str(tmp_path / "base")]) == 0
    best = RunFiles(tmp_path / "base").best
    config = {"training": {"weight_decay": 0.3, "warmup_fraction": 0.1}, "model": {"lora_layers": "all"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    chosen = ["--config", str(tmp_path / "config.json"), "--recipe", "auto", "--pretrained", str(best)]
    capsys.readouterr()
    assert main([*flags, *chosen, "--output_dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "recipe lora for 54 samples in batches of 10: fewer than 2,000 (our bound)" in said
    assert "recipe lora: lora_rank 2: CLIP-LoRA" in said
    assert "recipe lora: num_epochs 1 stays, where it picks 15" in said
    assert "recipe lora: weight_decay 0.3 stays, where it picks 0.01" in said
    last = RunFiles(tmp_path / "run").last
    stored = load_checkpoint(last)["config"]
    assert (stored["model"]["lora_rank"], stored["model"]["lora_alpha"], stored["model"]["lora_layers"]) == (
        2, 1.0, "attention",
    )  # fmt: skip
    training = stored["training"]
    assert training["learning_rate"] * training["backbone_lr_scale"] == pytest.approx(2e-4, rel=1e-3)
    assert (training["num_epochs"], training["weight_decay"]) == (1, 0.3)
    assert main(["--output_dir", str(tmp_path / "run"), "--resume", "--num_epochs", "2"]) == 0
    said = capsys.readouterr().err
    assert "recipe lora" not in said
    assert "LoRA of rank 2" in said


@pytest.mark.slow
def test_from_random_weights_the_defaults_are_taken(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SMALL_VIT.name not in published.ARCHIVES
    flags = ["--data_dir", str(sample_dir), *SMALL, "--num_epochs", "1", "--output_dir", str(tmp_path)]
    assert main([*flags, "--recipe", "auto"]) == 0
    said = capsys.readouterr().err
    assert "recipe full for 54 samples in batches of 10: there are no weights to keep" in said
    assert "recipe full: the defaults, since the model starts from random weights" in said
    assert load_checkpoint(RunFiles(tmp_path).last)["config"]["model"]["lora_rank"] is None
    assert main([*flags, "--recipe", "lora"]) == 2
    assert "recipe lora holds pretrained weights" in capsys.readouterr().err
