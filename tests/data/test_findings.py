"""What a run is told about its data, and what it is not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_loader
import train
from cliptune.data import findings
from cliptune.data.findings import (
    data_findings,
    missing_values,
    repeated_captions,
    same_tokens,
    shared_images,
    uneven_split,
)
from cliptune.data.identity import file_identities
from cliptune.data.loaders import EpochBatches, caption_id
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.data.shard_loader import training_shards
from cliptune.data.shards import Shards
from cliptune.data.splits import split_pairs
from cliptune.data.table import RowBuffer, Strings
from tests.helpers.datasets import make_images, make_index, make_shards
from tests.helpers.runs import SMALL, small_runs

LONG = "word " * 100


def identities(splits: dict[str, Pairs | Shards]) -> dict[str, np.ndarray]:
    return {split: file_identities(part.paths) for split, part in splits.items() if isinstance(part, Pairs)}


def two_sides(folder: Path, copies: Callable[[Path, Path], object]) -> dict[str, Pairs | Shards]:
    """Four training images, and two for validation, of which one is a copy."""
    make_images(folder, *(f"{n}.png" for n in range(6)))
    (folder / "5.png").unlink()
    copies(folder / "1.png", folder / "5.png")
    rows = [{"image": f"{n}.png", "caption": f"{n}", "split": "train" if n < 4 else "val"} for n in range(6)]
    return {**split_pairs(load_pairs(make_index(folder, rows)))}


@pytest.mark.parametrize("copies", [shutil.copy, os.link], ids=["copy", "hard_link"])
def test_copies_on_both_sides_of_the_split_are_told(tmp_path: Path, copies: Callable[[Path, Path], object]) -> None:
    splits = two_sides(tmp_path, copies)
    found = shared_images(splits, identities(splits))
    assert found is not None
    assert "1 of the 2 validation images is byte-identical to training images" in found
    assert f"{tmp_path / '5.png'} is the same file as {tmp_path / '1.png'}" in found
    assert shared_images({"train": splits["val"], "val": splits["train"]}, identities(splits)) is not None


def test_files_that_differ_in_the_middle_are_no_copies(tmp_path: Path) -> None:
    def write(path: Path, middle: int) -> None:
        pixels = np.full((128, 128, 3), 200, dtype=np.uint8)  # without compression: the ends are plain
        pixels[64, 64] = middle
        Image.fromarray(pixels).save(path, "BMP")

    names = [f"{n}.bmp" for n in range(8)]
    for number, name in enumerate(names):
        write(tmp_path / name, number % 7)  # the last is the first
    rows = [{"image": name, "caption": name, "split": "train" if n < 4 else "val"} for n, name in enumerate(names)]
    splits: dict[str, Pairs | Shards] = {**split_pairs(load_pairs(make_index(tmp_path, rows)))}
    files = identities(splits)
    assert len(set(files["train"].tolist() + files["val"].tolist())) == 1
    found = shared_images(splits, files)
    assert found is not None
    assert "1 of the 4 validation images is" in found
    (tmp_path / "7.bmp").unlink()
    write(tmp_path / "7.bmp", 99)
    assert shared_images(splits, files) is None


def test_of_many_copies_some_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{n}.png" for n in range(40)]
    make_images(tmp_path, *names)
    (tmp_path / "copy").mkdir()
    for name in names:
        shutil.copy(tmp_path / name, tmp_path / "copy" / name)
    pairs = load_pairs(make_index(tmp_path, [{"image": name, "caption": name} for name in names]))
    copy = load_pairs(make_index(tmp_path / "copy", [{"image": name, "caption": name} for name in names]))
    monkeypatch.setattr(findings, "MAX_READ", 20 * findings.COST_OF_A_FILE)
    splits: dict[str, Pairs | Shards] = {"train": pairs, "val": copy}
    assert "40 of the 40 validation images are" in str(shared_images(splits, identities(splits)))


def test_a_validation_set_of_the_same_shards_is_told(tmp_path: Path) -> None:
    address = make_shards(tmp_path / "a", 4, 3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "00.tar").rename(tmp_path / "b" / "other.tar")
    for held, shared in ((address, "7 of the 7"), (f"{tmp_path}/b/{{other,01}}.tar", "7 of the 7")):
        splits = training_shards(DataSource(address), val_data=held)
        assert f"{shared} validation images are" in str(shared_images(splits, identities(splits)))
    other = make_shards(tmp_path / "c", 9)
    splits = training_shards(DataSource(address), val_data=other)
    assert shared_images(splits, identities(splits)) is None


def test_captions_that_are_missing_values_are_told(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(10)]
    make_images(tmp_path, *names)
    captions = ["a nan bread", "nan", "None", "N/A", "7", "banana", "none of them", "a", "b", "c"]
    rows = [{"image": name, "caption": caption} for name, caption in zip(names, captions, strict=True)]
    splits: dict[str, Pairs | Shards] = {**split_pairs(load_pairs(make_index(tmp_path, rows)))}
    found = data_findings(splits, identities(splits), val_split=0.1, batch_size=10)["missing_values"]
    assert str(found).startswith("3 captions are what programs write where a value is missing ('")
    assert str(missing_values(Strings.of(["NaN", "a"]))).startswith("1 caption is what programs write")
    assert missing_values(Strings.of(["a", "nap"])) is None
    assert missing_values(Strings.of([])) is None


def test_captions_that_differ_behind_the_last_token_are_told() -> None:
    captions = [LONG + "cat", LONG + "dog", LONG + "dog", LONG.upper() + "DOG", "a cat", "A cat", "x" + LONG]
    found = same_tokens(Strings.of(captions))
    assert found is not None
    assert found.startswith("2 different captions are the same to the model, which reads 77 tokens and no more")
    assert same_tokens(Strings.of(captions[1:])) is None
    assert same_tokens(Strings.of([])) is None
    assert same_tokens(Strings.of(["猫" * 80 + "一", "猫" * 80 + "二"])) is not None
    assert same_tokens(Strings.of(["a" * 70 + " b", "a" * 70 + " c"])) is None  # long, but read whole


def test_of_many_captions_some_are_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MAX_TOKENIZED", 10)
    assert str(same_tokens(Strings.of(f"{LONG} {n}" for n in range(50)))).startswith("50 different captions")


def captioned(captions: list[list[str]]) -> Pairs:
    buffer = RowBuffer()
    for number, of_image in enumerate(captions):
        buffer.append(f"/{number}.png", of_image, split=None, group=None, number=number)
    rows = buffer.rows("")
    return Pairs(rows.images, rows.captions, rows.starts, rows.groups.filled(rows.images), rows.splits)


def meeting(pairs: Pairs, batch_size: int, *, every_pair: bool) -> float:
    """Simulate: how many pairs of a batch meet their own caption, as the loss compares them, with another image."""
    dataset = data_loader.ImageTextDataset(pairs, captions="all" if every_pair else "random")
    kinds, found = np.array(list(map(caption_id, pairs.captions))), []
    for epoch in range(60):
        dataset.set_epoch(epoch)
        batches = EpochBatches(len(dataset), batch_size, seed=0)
        batches.epoch = epoch
        for items in batches:
            images, captions = dataset.choose(np.array(items))
            same = (kinds[captions][:, None] == kinds[captions]) & (images[:, None] != images)
            found.append(same.any(axis=1).sum())
    return float(np.mean(found))


@pytest.mark.parametrize("every_pair", [False, True])
def test_captions_that_meet_themselves_in_a_batch_are_counted(every_pair: bool) -> None:
    kinds = [f"{'kind ' if n < 100 else 'Kind'} {n % 40}" for n in range(200)]  # which are the same to the loss
    pairs = captioned([[kind] * 2 + [f"number {n}"] for n, kind in enumerate(kinds)])
    found = repeated_captions(pairs, batch_size=20, every_pair=every_pair)
    assert found is not None
    number = float(found.split()[0])
    assert number == pytest.approx(meeting(pairs, 20, every_pair=every_pair), rel=0.15)
    assert "of the 20 pairs of a batch" in found


def test_captions_of_one_image_or_none_alike_are_no_finding() -> None:
    assert repeated_captions(captioned([[f"{n}"] * 5 for n in range(50)]), batch_size=50, every_pair=True) is None
    assert repeated_captions(captioned([["a"]]), batch_size=32, every_pair=True) is None
    assert (
        repeated_captions(captioned([[f"{n}"] for n in range(998)] + [["a"]] * 2), batch_size=32, every_pair=False)
        is None
    )


@pytest.mark.parametrize(("sizes", "said"), [([190, 10], False), ([190, 110], True), ([20, 20, 160], False)])
def test_a_split_far_from_what_was_asked_is_told(sizes: list[int], said: bool, tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(sum(sizes))]
    make_images(tmp_path, *names)
    groups = [f"g{group}" for group, size in enumerate(sizes) for _ in range(size)]
    rows = [{"image": name, "caption": name, "group": group} for name, group in zip(names, groups, strict=True)]
    splits: dict[str, Pairs | Shards] = {**split_pairs(load_pairs(make_index(tmp_path, rows)))}
    found = uneven_split(splits, val_split=0.1)
    assert (found is not None) == said
    if said:
        assert "110 images validate where --val_split 0.1 asks for 30: no group is split" in str(found)
    declared = [{**row, "split": "val" if row["group"] == "g0" else "train"} for row in rows]
    splits = {**split_pairs(load_pairs(make_index(tmp_path, declared)))}
    assert uneven_split(splits, val_split=0.1) is None


def test_good_data_has_no_findings(sample_dir: Path) -> None:
    splits: dict[str, Pairs | Shards] = {**split_pairs(load_pairs(sample_dir))}
    found = data_findings(splits, identities(splits), val_split=0.1, batch_size=10)
    assert set(found.values()) == {None}


@pytest.fixture
def odd_data(tmp_path: Path) -> Path:
    """A split that is far off, and captions that are the same to the model."""
    names = [f"{number}.png" for number in range(30)]
    make_images(tmp_path, *names)
    rows = [{"image": n, "caption": LONG + n, "group": "a" if k < 16 else "b"} for k, n in enumerate(names)]
    make_index(tmp_path, rows)
    return tmp_path


TOLD = (
    "30 different captions are the same to the model",
    "14 images validate where --val_split 0.1 asks for 3",
)


@pytest.mark.slow
def test_a_run_and_the_check_tell_the_same(odd_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data_dir", str(odd_data), "--num_workers", "0"]
    assert data_loader.main([*flags, "--check", "--output_dir", str(odd_data / "checked")]) == 0
    checked = capsys.readouterr().out
    assert data_loader.main(flags[:2]) == 0
    described = capsys.readouterr().out
    with small_runs():
        assert train.main([*flags[:2], "--output_dir", str(odd_data / "out"), "--num_epochs", "1", *SMALL]) == 0
    error, log = capsys.readouterr().err, (odd_data / "out/logs/train.log").read_text()
    for text in TOLD:
        assert [output.count(text) for output in (checked, described, error, log)] == [1, 1, 1, 1], text


@pytest.mark.slow
def test_a_copy_of_the_training_data_as_validation_set_is_told(
    sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sample_dir, tmp_path / "copy")
    told = "60 of the 60 validation images are byte-identical to training images"
    flags = ["--data_dir", str(sample_dir), "--val_data", str(tmp_path / "copy")]
    assert data_loader.main([*flags, "--check", "--num_workers", "0", "--output_dir", str(tmp_path)]) == 0
    assert "60 of them in another split" in capsys.readouterr().out
    with small_runs():
        assert train.main([*flags, "--output_dir", str(tmp_path / "out"), "--num_epochs", "1", *SMALL]) == 0
    assert told in capsys.readouterr().err
