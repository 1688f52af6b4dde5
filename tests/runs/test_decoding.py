"""Training whose JPEGs workers leave to a decoder; torchvision's on the CPU stands in for the one of a GPU."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cliptune.cli import load_config
from cliptune.data.loaders import Batch, TrainLoader
from cliptune.data.shard_loader import ShardLoader
from cliptune.data.shards import open_shards
from cliptune.preprocess.jpeg_decoder import JpegDecoder, LeavesJpegs
from cliptune.preprocess.transforms import train_transform
from cliptune.runs import decoding
from data_loader import ImageTextDataset
from tests.helpers import runs
from tests.helpers.datasets import make_index, make_tar
from tests.helpers.photos import photo
from tests.helpers.runs import SMALL, assert_same_runs, lines_of
from train import main

CPU = torch.device("cpu")
NUM_IMAGES = 30
BROKEN, CUT = 4, 11
"""The header of the first one is whole: only a decoder finds out."""


def content_of(number: int) -> bytes:
    """JPEGs mostly; of each 6 images one is a PNG file, one grey, one more than twice as high as wide."""
    file = io.BytesIO()
    image = photo(number, (30, 70) if number % 6 == 2 else (60 + number, 50))
    image.convert("L" if number % 6 == 1 else "RGB").save(file, "PNG" if number % 6 == 0 else "JPEG")
    content = file.getvalue()
    if number == BROKEN:
        tables = content.index(b"\xff\xc4") + 4  # Huffman's
        content = content[:tables] + 17 * b"\xff" + content[tables + 17 :]
    return content[:-300] if number == CUT else content


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and the same as shards below it."""
    folder = tmp_path_factory.mktemp("mixed")
    members = []
    for number in range(NUM_IMAGES):
        content, name = content_of(number), f"{number:03}.{'png' if number % 6 == 0 else 'jpg'}"
        (folder / name).write_bytes(content)
        members += [(name, content), (f"{number:03}.txt", f"image {number}".encode())]
    make_index(folder, [{"image": name, "caption": f"image {name[:3]}"} for name, _ in members[::2]])
    make_tar(folder / "shards" / "0.tar", members)
    return folder


def load(mixed: Path, form: str, *, augment: str, leaves: bool, **options: Any) -> list[Batch]:
    transform = train_transform(32, augment)
    given: dict[str, Any] = {"batch_size": 12, "num_workers": 0, "device": CPU} | options
    if leaves:
        transform, given["decoder"] = LeavesJpegs(transform), JpegDecoder(CPU)
    if form == "shards":
        return list(
            ShardLoader(open_shards(str(mixed / "shards/0.tar")), transform=transform, seed=1, **given).epoch(1)
        )
    dataset = ImageTextDataset(mixed / "data.json", transform=transform, seed=1)
    return list(TrainLoader(dataset, **given).epoch(1))


@pytest.mark.parametrize("form", ["index", "shards"])
@pytest.mark.parametrize(
    ("augment", "num_workers"), [("none", 0), ("crop", 0), pytest.param("crop", 2, marks=pytest.mark.slow)]
)
def test_batches_are_those_of_workers_that_decode(mixed: Path, form: str, augment: str, num_workers: int) -> None:
    options: dict[str, Any] = {"augment": augment, "num_workers": num_workers}
    plain, left = (load(mixed, form, leaves=leaves, **options) for leaves in (False, True))
    assert sum(len(batch.images) for batch in left) == NUM_IMAGES - 2
    assert len(left) == len(plain)
    for got, want in zip(left, plain, strict=True):
        assert got.jpegs is None
        assert sorted(got.issues) == sorted(want.issues)
        for name in ("tokens", "image_ids", "caption_ids", "caption_indices"):
            assert torch.equal(getattr(got, name), getattr(want, name))
        assert (got.images.int() - want.images.int()).abs().float().mean() < 0.5
        assert (got.images.dtype, got.images.shape) == (want.images.dtype, want.images.shape)


def test_pieces_of_one_kind_or_of_nothing_are_joined(mixed: Path) -> None:
    whole, pieces = (load(mixed, "index", augment="crop", leaves=True, piece_size=piece_size) for piece_size in (64, 1))
    for got, want in zip(pieces, whole, strict=True):
        assert torch.equal(got.images, want.images)
        assert torch.equal(got.image_ids, want.image_ids)
        assert sorted(got.issues) == sorted(want.issues)


def run_of(mixed: Path, output: Path, *flags: str) -> list[str]:
    where = ["--data_dir", str(mixed / "data.json"), "--output_dir", str(output), "--max_skipped_fraction", "0.2"]
    return [*where, *SMALL, "--num_epochs", "2", "--precision", "fp32", *flags]


def log_of(output: Path) -> str:
    return (output / "logs" / "train.log").read_text()


@pytest.fixture
def with_decoder(small: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    small.setattr(decoding, "decoder_issue", lambda _: None)
    return small


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--augment", "crop"], ["--augment", "crop", "--num_workers", "2"]])
def test_a_whole_run_is_nearly_the_same_and_its_evaluations_see_exact_pixels(
    flags: list[str], mixed: Path, tmp_path: Path, with_decoder: pytest.MonkeyPatch
) -> None:
    for name, decode in (("cpu", []), ("gpu", ["--decode", "gpu"])):
        assert main(run_of(mixed, tmp_path / name, *flags, *decode)) == 0
    cpu, gpu = (lines_of(tmp_path / name / "logs" / "history.jsonl") for name in ("cpu", "gpu"))
    for key in ("val_loss", "similarity_gap", "rsum"):
        assert gpu[0][key] == cpu[0][key]  # of the model as loaded
    losses = [[step["loss"] for step in lines_of(tmp_path / name / "logs" / "steps.jsonl")] for name in ("cpu", "gpu")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    said = re.findall("--decode gpu: .*", log_of(tmp_path / "gpu"))
    assert said[0].startswith("--decode gpu: plain JPEGs of the training are decoded by cpu, and differ a little")
    assert "--decode" not in log_of(tmp_path / "cpu")
    skipped = [json.loads((tmp_path / name / "results" / "skipped.json").read_text()) for name in ("cpu", "gpu")]
    names = [sorted(Path(each["image"]).name for each in found) for found in skipped]
    assert names[0] == names[1] == ["004.jpg", "011.jpg"]


@pytest.mark.slow
def test_frozen_towers_see_the_same(mixed: Path, tmp_path: Path, with_decoder: pytest.MonkeyPatch) -> None:
    flags = ["--freeze_backbone"]
    for name, decode in (("cpu", []), ("gpu", ["--decode", "gpu"])):
        assert main(run_of(mixed, tmp_path / name, *flags, *decode)) == 0
    assert "--decode gpu: training decodes no image" in log_of(tmp_path / "gpu")
    with_decoder.setattr(runs, "DIFFER", runs.DIFFER | {"decode"})
    assert_same_runs(tmp_path / "gpu", tmp_path / "cpu")
    assert main(run_of(mixed, tmp_path / "text", "--freeze_tower", "text", "--decode", "gpu")) == 0
    assert "plain JPEGs of the training are decoded" in log_of(tmp_path / "text")


def test_a_new_run_without_a_decoder_is_refused_before_it_touches_anything(
    mixed: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_of(mixed, tmp_path / "x", "--decode", "gpu", "--device", "cpu")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "train.py: error: --decode gpu: it needs a CUDA device, not cpu; try --decode cpu"
    assert not (tmp_path / "x" / "logs").exists()


@pytest.mark.slow
def test_a_run_that_is_resumed_keeps_its_decoder_and_goes_on_without(
    mixed: Path, tmp_path: Path, with_decoder: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(run_of(mixed, output, "--decode", "gpu")) == 0
    resume = ["--resume", str(output), "--num_epochs", "3"]
    assert main([*resume, "--decode", "cpu"]) == 2
    assert "--decode cannot change when a run is resumed" in capsys.readouterr().err
    with_decoder.setattr(decoding, "decoder_issue", lambda _: "none here")
    assert main(resume) == 0
    assert "--decode gpu: none here; this run goes on with the CPU's pixels, which differ a little" in log_of(output)
    results = json.loads((output / "results" / "training_results.json").read_text())
    assert results["config"]["data"]["decode"] == "gpu"


@pytest.mark.parametrize(
    ("flags", "other"),
    [
        (["--fast_decode"], "fast_decode"),
        (["--cache_images"], "cache_images"),
        (["--augment", "color"], "augment"),
    ],
)
def test_what_a_decoder_of_the_gpu_cannot_go_with_is_refused(flags: list[str], other: str) -> None:
    with pytest.raises(ValueError, match=f"decode gpu does not go with {other}: .*; leave one of the two away"):
        load_config(["--decode", "gpu", *flags], description="")
    assert load_config(flags, description="").config.data.decode == "cpu"
