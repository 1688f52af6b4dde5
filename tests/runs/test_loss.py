"""Runs with each loss: what is a positive, where the bias of the sigmoid loss begins and where it stays."""

import math
from pathlib import Path

import pytest
import torch

from clip_model import CLIPModel
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.results import TrainingResults, read
from cliptune.training.checkpoint import RunFiles
from tests.helpers.datasets import make_images, make_index, make_shards
from tests.helpers.runs import SMALL
from train import main
from visualization import draw_figures


def make_data(folder: Path, *, num_captions: int) -> Path:
    """Thirty images, whose captions are so many different ones."""
    names = [f"{number}.png" for number in range(30)]
    make_images(folder, *names)
    make_index(folder, [{"image": n, "caption": f"Number {i % num_captions}"} for i, n in enumerate(names)])
    return folder


def run(data: Path, output_dir: Path, *flags: str) -> RunFiles:
    assert main([*SMALL, "--data_dir", str(data), "--output_dir", str(output_dir), "--num_epochs", "1", *flags]) == 0
    return RunFiles(output_dir)


def results_of(files: RunFiles) -> TrainingResults:
    results = read(files.results)
    assert isinstance(results, TrainingResults)
    return results


def bias_of(path: Path) -> float | None:
    bias = load_checkpoint(path)["model_state_dict"].get("logit_bias")
    return None if bias is None else float(bias)


@pytest.mark.slow
def test_repeated_captions_are_positives_unless_told_otherwise(
    tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    four, unique = (make_data(tmp_path / str(number), num_captions=number) for number in (4, 30))
    losses = {}
    for name, data, flags, expected in (
        ("auto", four, (), "caption (auto: 27 of the 27 training captions are another image's, too)"),
        ("pair", four, ("--positives", "pair"), "pair (as asked for)"),
        ("unique", unique, (), "image (auto: none of the 27 training captions are another image's, too)"),
        ("as caption", unique, ("--positives", "caption"), "caption (as asked for)"),
    ):
        capsys.readouterr()
        files = run(data, tmp_path / name, *flags)
        said = capsys.readouterr().err
        assert f"loss infonce, positives {expected}" in said
        assert ("meet their own caption with another image" in said) == (name == "pair")
        assert load_checkpoint(files.last)["positives"] == expected.split()[0]
        results = results_of(files)
        losses[name] = [(record.train_loss, record.val_loss) for record in results.history]
        assert results.chance.val_loss == pytest.approx(math.log(3))
    assert losses["as caption"] == losses["unique"]  # nothing repeats: the same bits
    assert losses["auto"] != losses["pair"]


@pytest.mark.slow
def test_shards_may_repeat_their_captions(
    tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path / "shards", 12, 8)
    val = make_data(tmp_path / "val", num_captions=30)
    flags = ["--data_dir", shards, "--val_data", str(val), "--output_dir", str(tmp_path), "--num_epochs", "1"]
    assert main([*SMALL, *flags]) == 0
    assert (
        "positives caption (auto: captions of shards are not read beforehand, and may repeat)"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_what_was_chosen_stays_when_a_run_goes_on(
    tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data", num_captions=4)
    files = run(data, tmp_path / "run")
    again = [*SMALL, "--data_dir", str(data), "--output_dir", str(files.root), "--resume", "--num_epochs", "2"]
    for flags, code in ((["--positives", "pair"], 2), (["--loss", "siglip"], 2), (["--positives", "auto"], 0)):
        capsys.readouterr()
        assert main([*again, *flags]) == code
    assert "positives caption (as the run began)" in capsys.readouterr().err
    # of a run of before there was a choice
    state = load_checkpoint(files.last)
    del state["positives"], state["config"]["training"]["positives"], state["config"]["training"]["loss"]
    save_checkpoint(files.last, state)
    assert main([*again[:-1], "3"]) == 0
    assert "positives image (as the run began)" in capsys.readouterr().err
    state = load_checkpoint(files.last)
    assert (state["positives"], state["config"]["training"]["positives"]) == ("image", "image")
    save_checkpoint(files.last, {**state, "positives": "text"})
    with pytest.raises(ValueError, match="its positives: "):
        load_checkpoint(files.last)


@pytest.mark.slow
@pytest.mark.parametrize("num_captions", [4, 30])
def test_the_sigmoid_loss_learns_a_bias_that_stays_with_the_weights(
    num_captions: int, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data", num_captions=num_captions)
    files = run(data, tmp_path / "run", "--loss", "siglip", "--num_epochs", "4")
    began, ended = bias_of(files.loaded), bias_of(files.last)
    assert began is not None
    assert ended is not None
    assert began != ended
    said = capsys.readouterr().err
    assert f"the bias of the logits begins at {began:.4g}" in said
    assert "nothing is learned" not in said  # ln(batch) is not its chance
    model = CLIPModel.from_checkpoint(files.last)
    assert model.logit_bias is not None
    assert model.logit_bias.item() == ended
    results = results_of(files)
    assert results.chance.val_loss is not None
    # three validation images, each a positive of its own text: the entropy of 1/3, three times
    assert results.chance.val_loss == pytest.approx(3 * (math.log(3) / 3 + 2 / 3 * math.log(1.5)), rel=0.5)
    assert draw_figures(files.results)


@pytest.mark.slow
def test_a_bias_of_the_weights_goes_on_with_siglip_and_is_left_out_without(
    tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data", num_captions=30)
    first = run(data, tmp_path / "run", "--loss", "siglip")
    brought = bias_of(first.last)
    capsys.readouterr()
    second = run(data, tmp_path / "second", "--loss", "siglip", "--pretrained", str(first.last))
    assert bias_of(second.loaded) == brought
    assert bias_of(second.last) != brought
    assert "begins at" not in capsys.readouterr().err
    third = run(data, tmp_path / "third", "--pretrained", str(first.last))
    assert f"the weights' logit_bias of {brought:.4g} is left out" in capsys.readouterr().err
    assert bias_of(third.last) is None


@pytest.mark.slow
def test_a_model_takes_the_bias_of_a_checkpoint_and_keeps_its_own(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path / "data", num_captions=30)
    with_bias, without = (run(data, tmp_path / loss, "--loss", loss).last for loss in ("siglip", "infonce"))
    model = CLIPModel(SMALL[1])
    model.load_checkpoint(with_bias)
    assert model.logit_bias is not None
    assert not model.logit_bias.requires_grad
    assert model.logit_bias.item() == bias_of(with_bias)
    model.load_checkpoint(without)
    assert model.logit_bias.item() == bias_of(with_bias)
    other = CLIPModel(SMALL[1])
    state, broken = load_checkpoint(with_bias), tmp_path / "broken.pth"
    state["model_state_dict"]["text_projection.weight"] = -torch.eye(64)
    save_checkpoint(broken, state)
    with pytest.raises(ValueError, match="does not give the features"):
        other.load_checkpoint(broken)
    assert other.logit_bias is None
