"""What is noticed about a run, and what is not."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cliptune.data.loaders import EpochBatches
from cliptune.data.sample_data import create_sample_dataset
from cliptune.features.metrics import chance_level, rank_metrics
from cliptune.features.ranks import retrieval_ranks
from cliptune.features.similarity import similarity_means
from cliptune.training.advice import (
    chance_loss,
    collapse,
    is_at_chance,
    long_warmup,
    no_better_epoch,
    nothing_carries_over,
    pretrained_at_chance,
    small_validation,
    stuck_loss,
    unusual_tower_rate,
)
from cliptune.training.optim import num_warmup_steps
from tests.helpers.runs import SMALL, small_runs
from train import main


@pytest.mark.parametrize(("num_images", "half_width"), [(50, "13.9"), (200, "6.9"), (384, "5.0"), (385, None)])
def test_a_small_validation_set_is_said_with_its_interval(num_images: int, half_width: str | None) -> None:
    found = small_validation(num_images)
    if half_width is None:
        assert found is None
    else:
        assert found is not None
        assert f"to within {half_width} points" in found
        assert "385 or more" in found


def test_one_validation_image_says_nothing() -> None:
    assert "1 validation image says nothing" in str(small_validation(1))
    assert "lower --learning_rate" not in no_better_epoch(1)
    assert "lower --learning_rate" in no_better_epoch(2)
    assert "lower --learning_rate" not in no_better_epoch(20, at_chance=True)
    assert collapse(image_cosine=1.0, text_cosine=1.0, rsum=600, chance=600) is None


@pytest.mark.parametrize(("rate", "usual"), [(1e-7, False), (3e-7, True), (1e-6, True), (5e-5, True), (1e-4, False)])
def test_rates_of_pretrained_towers(rate: float, usual: bool) -> None:
    assert (unusual_tower_rate(rate) is None) == usual


def test_a_warm_up_that_outlasts_the_run() -> None:
    assert long_warmup(warmup_steps=50, total_steps=500, patience_steps=100) is None
    assert long_warmup(warmup_steps=150, total_steps=500, patience_steps=0) is None
    assert "early_stopping_patience" in str(long_warmup(warmup_steps=150, total_steps=500, patience_steps=100))
    steps = num_warmup_steps(10, 0.99)
    assert "for 9 of the 10 steps" in str(long_warmup(warmup_steps=steps, total_steps=10, patience_steps=0))


@pytest.mark.parametrize(("num_pairs", "batch_size"), [(96, 32), (100, 32), (97, 32), (20, 32), (1, 32)])
def test_chance_is_that_of_the_batches_that_there_are(num_pairs: int, batch_size: int) -> None:
    sizes = [len(items) for items in EpochBatches(num_pairs, batch_size, seed=0)]
    expected = sum(size * math.log(size) for size in sizes) / num_pairs
    assert chance_loss(num_pairs, batch_size) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("losses", "said"),
    [([3.45, 3.42], True), ([1.0, 3.47, 3.5], True), ([3.45], False), ([3.45, 3.35], False), ([3.3, 3.45], False)],
)
def test_a_loss_that_stays_at_chance_for_two_epochs(losses: list[float], said: bool) -> None:
    assert (stuck_loss(losses, math.log(32)) is not None) == said


def test_a_single_pair_has_no_chance() -> None:
    assert stuck_loss([0.0, 0.0], chance_loss(1, 32)) is None


@pytest.mark.parametrize(
    ("image_cosine", "text_cosine", "rsum", "said"),
    [
        (0.999, 0.3, 20, "the image features"),
        (0.999, 1.0, 20, "the image and text features"),
        (0.999, 1.0, 90, ""),
        (0.9, 0.9, 20, ""),
    ],
)
def test_features_that_are_all_alike(image_cosine: float, text_cosine: float, rsum: float, said: str) -> None:
    found = collapse(image_cosine=image_cosine, text_cosine=text_cosine, rsum=rsum, chance=20)
    assert (found or "").startswith(said)
    assert (found is None) == (said == "")


@pytest.mark.parametrize(("start", "what"), [((0.5, 1.0), "captions"), ((1.0, 0.5), "images"), ((0.99, 0.99), None)])
def test_features_that_were_all_the_same_before_the_first_step(start: tuple[float, float], what: str | None) -> None:
    found = str(collapse(image_cosine=1.0, text_cosine=1.0, rsum=20, chance=20, start=start))
    if what is None:
        assert "lower --learning_rate" in found
    else:
        assert found.startswith(f"the features of all {what} were the same before the first step")
        assert "learning_rate" not in found


@pytest.mark.parametrize(
    ("losses", "val_losses", "said"),
    [
        ([2.2, 2.1], [2.4, 2.35], True),
        ([2.2, 2.1], [2.35, 2.2], False),  # validates better than chance
        ([2.2], [2.4], False),
        ([2.3, 2.29], [2.4, 2.35], False),  # nothing is learned at all
        ([], [], False),
    ],
)
def test_pairs_that_are_learned_by_heart(losses: list[float], val_losses: list[float], said: bool) -> None:
    chance = math.log(10)
    found = nothing_carries_over(losses, val_losses, chance=chance, val_chance=chance)
    assert (found is not None) == said
    assert nothing_carries_over(losses, val_losses, chance=0.0, val_chance=chance) is None
    if said:
        assert "Captions may not belong to their images" in str(found)


@pytest.mark.parametrize("num_images", [20, 200, 2000])
def test_random_ranks_are_at_chance_and_better_ones_are_not(num_images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(num_images)
    chance = chance_level(num_images, owners)
    draws = []
    for _ in range(40):
        images, texts = torch.randn(2, num_images, 16, generator=generator)
        images, texts = torch.nn.functional.normalize(images, dim=1), torch.nn.functional.normalize(texts, dim=1)
        metrics = rank_metrics(retrieval_ranks(images, texts, owners))
        draws.append(is_at_chance(metrics["rsum"], chance, num_images=num_images))
    assert sum(draws) >= 34
    assert not is_at_chance(1.7 * chance["rsum"], chance, num_images=num_images)
    assert not is_at_chance(600, chance_level(1, torch.arange(1)), num_images=1)
    found = pretrained_at_chance(chance["rsum"], chance, num_images=num_images)
    assert "Captions may not belong to their images" in str(found)


def test_the_mean_cosine_of_two() -> None:
    features = torch.nn.functional.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    means = similarity_means(features, features[:1].expand(7, 5), torch.arange(7))
    cosines = features @ features.T
    assert means["image_cosine"] == pytest.approx((cosines.sum().item() - 7) / 42, abs=1e-6)
    assert means["text_cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_run_that_collapses_says_so_once(
    sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_dir", str(sample_dir), "--output_dir", str(tmp_path), *SMALL, "--batch_size", "18"]
    more = ["--learning_rate", "1", "--warmup_fraction", "0.6", "--early_stopping_patience", "2"]
    assert main([*flags, *more, "--num_epochs", "4", "--precision", "fp32"]) == 0
    error = capsys.readouterr().err
    for message in ("6 validation images tell", "the model has collapsed", "the rates rise for 7 steps, but"):
        assert error.count(message) == 1, message


def shuffled(rows: list[dict[str, Any]]) -> None:
    captions = [row["caption"] for row in rows]
    random.Random(0).shuffle(captions)
    for row, caption in zip(rows, captions, strict=True):
        row["caption"] = caption


def begun_alike(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["caption"] = ["word " * 100 + caption for caption in row["caption"]]


def unchanged(rows: list[dict[str, Any]]) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said", "never"),
    [
        (shuffled, "images with their captions: do they belong together", "lower --learning_rate\n"),
        (begun_alike, "the features of all captions were the same before the first step", "a lower --learning_rate"),
        (unchanged, "", "do they belong together"),
    ],
)
def test_data_that_no_rate_helps_is_told_within_four_epochs(
    change: Callable[[list[dict[str, Any]]], None],
    said: str,
    never: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    create_sample_dataset(tmp_path / "data", 200)
    rows = json.loads((tmp_path / "data" / "data.json").read_text())
    change(rows)
    (tmp_path / "data" / "data.json").write_text(json.dumps(rows))
    with small_runs():
        flags = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--num_epochs", "4"]
        assert main([*flags, *SMALL, "--precision", "fp32"]) == 0
    out, error = capsys.readouterr()
    assert said in error
    assert never not in out + error


@pytest.mark.slow
@pytest.mark.parametrize("change", [shuffled, unchanged])
def test_a_pretrained_model_says_at_once_that_captions_belong_elsewhere(
    change: Callable[[list[dict[str, Any]]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_sample_dataset(tmp_path / "data", 200)
    flags = ["--data_dir", str(tmp_path / "data"), "--val_split", "0.2", *SMALL, "--precision", "fp32"]
    with small_runs():
        assert main([*flags, "--output_dir", str(tmp_path / "first"), "--num_epochs", "6"]) == 0
        rows = json.loads((tmp_path / "data" / "data.json").read_text())
        change(rows)
        (tmp_path / "data" / "data.json").write_text(json.dumps(rows))
        capsys.readouterr()
        weights = str(tmp_path / "first" / "model-checkpoint" / "best_model.pth")
        more = ["--pretrained", weights, "--output_dir", str(tmp_path / "second"), "--num_epochs", "1"]
        assert main([*flags, *more]) == 0
    said = "the pretrained model finds no more than chance" in capsys.readouterr().err
    assert said == (change is shuffled)
