import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data_loader
import evaluation
import train
from cliptune.data.loaders import Batch, caption_id
from cliptune.data.pairs import DataSource
from cliptune.data.shard_loader import ShardLoader, training_shards
from cliptune.data.shards import INDEX_NAME, open_shards
from cliptune.preprocess.transforms import clip_transform, train_transform
from tests.helpers.datasets import make_shards, make_tar, png_bytes
from tests.helpers.launch import run_ranks
from tests.helpers.models import SMALL_VIT
from tests.helpers.ranks import as_rank
from tests.helpers.runs import small_runs

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {
    "transform": clip_transform(8), "batch_size": 10, "num_workers": 0, "device": CPU, "seed": 1,
}  # fmt: skip
FLAGS = ["--model_name", SMALL_VIT.name, "--batch_size", "18", "--learning_rate", "1e-3", "--num_epochs", "1"]


def loader_of(data_dir: str, **options: Any) -> ShardLoader:
    return ShardLoader(open_shards(data_dir), **OPTIONS | options)


def indices_in(batch: Batch) -> list[int]:
    """Which samples the pixels of a batch are, by `png_bytes`."""
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in batch.images]


def order_of(loader: ShardLoader, epoch: int) -> list[int]:
    return [index for batch in loader.epoch(epoch) for index in indices_in(batch)]


def load_as_ranks(
    world_size: int, data_dir: str, epochs: Sequence[int] = (1,), **options: Any
) -> list[list[list[Batch]]]:
    """The batches of each epoch, rank by rank."""
    shards = open_shards(data_dir)
    found = []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            loader = ShardLoader(shards, **OPTIONS | options)
            found.append([list(loader.epoch(epoch)) for epoch in epochs])
    return [list(ranks) for ranks in zip(*found, strict=True)]


def test_captions_are_cut_to_the_models_context(tmp_path: Path) -> None:
    data_dir = make_shards(tmp_path, 25)
    for batch in loader_of(data_dir, context_length=4).epoch(1):
        assert batch.tokens.shape == (len(batch.images), 4)
        assert (batch.tokens.max(dim=1).values == 49407).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "world_size", "num_workers"),
    [
        ((7, 31, 1, 0, 12), 1, 0), ((7, 31, 1, 0, 12), 1, 2), ((7, 31, 1, 0, 12), 2, 2), ((7, 31, 1, 0, 12), 3, 0),
        ((41,), 3, 2), ((2, 1), 3, 2), ((300,), 2, 0),
    ],
)  # fmt: skip
def test_an_epoch_has_every_sample_once_in_batches_of_the_size(
    tmp_path: Path, counts: tuple[int, ...], world_size: int, num_workers: int
) -> None:
    total, size = sum(counts), 10 if sum(counts) < 100 else 290
    data_dir = make_shards(tmp_path, *counts)
    epochs = load_as_ranks(world_size, data_dir, (1, 2), num_workers=num_workers, batch_size=size)
    for ranks in epochs:
        steps = list(zip(*ranks, strict=True))  # every rank has every step
        assert sorted(n for step in steps for batch in step for n in indices_in(batch)) == list(range(total))
        for step in steps:
            for batch in step:
                assert batch.image_ids.tolist() == batch.caption_indices.tolist() == indices_in(batch)
                assert len(batch.tokens) == len(batch.images)
                expected_ids = [caption_id(f"number {n}") for n in indices_in(batch)]
                assert batch.caption_ids.tolist() == expected_ids
            parts = [len(batch.tokens) for batch in step]
            assert max(parts) - min(parts) <= 1
        sizes = [sum(len(batch.tokens) for batch in step) for step in steps]
        # a single one is never left over
        expected = [size] * (total // size) + [total % size]
        assert sizes == (expected if expected[-1] > 1 or len(expected) == 1 else [*expected[:-2], expected[-2] + 1])


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_is_the_epochs(tmp_path: Path, num_workers: int) -> None:
    data_dir = make_shards(tmp_path, 20, 20, 20)
    loader = loader_of(data_dir, num_workers=num_workers)
    first, second, again = (order_of(loader, epoch) for epoch in (1, 2, 1))
    assert first == again
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != order_of(loader_of(data_dir, num_workers=num_workers, seed=2), 1)
    steps = np.abs(np.diff(first))
    assert (steps == 1).mean() < 0.2  # neither the shards' order nor that inside them


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_goes_on_from_a_batch(tmp_path: Path, num_workers: int) -> None:
    loader = loader_of(make_shards(tmp_path, 20, 20, 15), num_workers=num_workers, batch_size=10)
    whole = [indices_in(batch) for batch in loader.epoch(1)]
    rest = [indices_in(batch) for batch in loader.epoch(1, start=3)]
    assert rest == whole[3:]
    assert len(rest) == 3
    assert [indices_in(batch) for batch in loader.epoch(1)] == whole


@pytest.mark.slow
def test_batches_joined_in_a_thread_are_the_same(tmp_path: Path) -> None:
    loader = loader_of(make_shards(tmp_path, 30, 11), num_workers=2)
    want = list(loader.epoch(1))
    loader.in_thread = True
    for got, expected in zip(loader.epoch(1), want, strict=True):
        assert torch.equal(got.images, expected.images)
        assert torch.equal(got.image_ids, expected.image_ids)
    assert [len(batch.images) for batch in loader.epoch(1, start=1)] == [len(batch.images) for batch in want[1:]]


@pytest.mark.slow
def test_what_is_random_about_a_sample_is_the_same_however_the_work_is_split(sample_dir: Path, tmp_path: Path) -> None:
    assert data_loader.main(["--data_dir", str(sample_dir), "--to_shards", str(tmp_path), "--shard_size", "20"]) == 0
    data_dir = f"{tmp_path}/{{00000..00002}}.tar"

    def choices(world_size: int, num_workers: int, epoch: int) -> dict[int, tuple[Any, ...]]:
        options = {"transform": train_transform(8, "color"), "num_workers": num_workers}
        (ranks,) = load_as_ranks(world_size, data_dir, (epoch,), **options)
        batches = [batch for rank in ranks for batch in rank]
        rows = (zip(batch.image_ids, batch.tokens, batch.images, strict=True) for batch in batches)
        return {int(n): (*tokens.tolist(), *image.ravel().tolist()) for each in rows for n, tokens, image in each}

    whole = choices(1, 0, epoch=1)
    assert len(whole) == 54
    assert whole == choices(2, 0, epoch=1) == choices(3, 2, epoch=1)
    later = choices(1, 0, epoch=2)
    assert sum(whole[n][:77] != later[n][:77] for n in whole) > 10
    assert all(whole[n][77:] != later[n][77:] for n in whole)


def test_an_unusable_sample_leaves_its_batch_and_is_told(tmp_path: Path) -> None:
    good = [(f"{number:04}.png", png_bytes(number)) for number in range(8)]
    captions = [(f"{number:04}.txt", b"a caption") for number in range(8)]
    members = [each for pair in zip(good, captions, strict=True) for each in pair]
    members.remove(captions[1])
    members.remove(good[2])
    members[members.index(good[3])] = (good[3][0], b"no image")
    members[members.index(captions[4])] = (captions[4][0], b"\xff")
    members[members.index(captions[5])] = ("0005.json", b'{"caption": {"en": "x"}}')
    members[members.index(captions[7])] = ("0007.json", b"[" * 100_000)
    members.insert(members.index(captions[6]), ("0006.jpg", good[6][1]))
    make_tar(tmp_path / "x.tar", members)
    (batch,) = loader_of(f"{tmp_path}/x.tar").epoch(1)
    assert sorted(indices_in(batch)) == [0]
    reasons = {issue.image.removeprefix("x.tar/"): issue.reason for issue in batch.issues}
    assert sorted(reasons) == ["0001", "0002", "0003", "0004", "0005", "0006", "0007"]
    assert reasons["0001"].startswith("no caption among .png; the files of a sample")
    assert reasons["0002"].startswith("no image among .txt; the files of a sample")
    assert "cannot be read as an image" in reasons["0003"]
    assert "utf-8" in reasons["0004"]
    assert reasons["0005"] == "caption is an object of en: write the text that is meant in its place"
    assert reasons["0006"].startswith("2 images among .png, .jpg, .txt: name the one")
    assert reasons["0007"] == "its JSON is nested too deeply"


def promise(folder: Path, count: int) -> None:
    """Let the index tell of another number of samples, as an index from another machine may."""
    index = json.loads((folder / INDEX_NAME).read_text())
    index["shardlist"][0]["nsamples"] = count
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_an_index_that_promises_too_much_or_too_little_is_told(tmp_path: Path) -> None:
    data_dir = make_shards(tmp_path, 12)
    open_shards(data_dir)
    promise(tmp_path, 14)
    batches = list(loader_of(data_dir).epoch(1))
    assert sorted(n for batch in batches for n in indices_in(batch)) == list(range(12))
    assert [str(error) for batch in batches for error in batch.issues] == [
        f"00.tar: sample {number}: fewer than the 14 samples of its index" for number in (12, 13)
    ]
    promise(tmp_path, 11)
    with pytest.raises(ValueError, match="holds more than the 11 samples"):
        list(loader_of(data_dir).epoch(1))


@pytest.mark.slow
def test_a_shard_that_breaks_off_in_an_epoch_costs_only_what_it_lost(tmp_path: Path) -> None:
    data_dir = make_shards(tmp_path, 20, 20)
    loader = loader_of(data_dir, num_workers=2)
    with (tmp_path / "01.tar").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)
    batches = list(loader.epoch(1))
    errors = [error for batch in batches for error in batch.issues]
    found = [n for batch in batches for n in indices_in(batch)]
    assert set(found) >= set(range(20))
    assert len(found) + len(errors) == 40
    assert 0 < len(errors) < 20
    assert all(error.image.startswith("01.tar") for error in errors)


def test_remote_shards_are_streamed(tmp_path: Path) -> None:
    make_shards(tmp_path, 9, 8)
    open_shards(f"{tmp_path}/{{00..01}}.tar")
    shards = open_shards(f"pipe:cat {tmp_path}/{{00..01}}.tar", may_run_commands=True)
    batches = list(ShardLoader(shards, **OPTIONS | {"num_workers": 2}).epoch(1))
    assert sorted(n for batch in batches for n in indices_in(batch)) == list(range(17))
    assert not [error for batch in batches for error in batch.issues]


def test_a_wrong_caption_key_is_told_before_the_first_epoch(tmp_path: Path) -> None:
    data_dir = make_shards(tmp_path, 4)
    with pytest.raises(ValueError, match=r"none of the first 4 samples is usable: .*no caption under 'prompt'"):
        training_shards(DataSource(data_dir, caption_key="prompt"), val_data=data_dir)


@pytest.fixture(scope="module")
def shard_run(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run on shards that validates on shards."""
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        flags = ["--split", split, "--shard_size", "20"]
        assert data_loader.main(["--data_dir", str(sample_dir), "--to_shards", str(folder / split), *flags]) == 0
    data = ["--data_dir", f"{folder}/train/{{00000..00002}}.tar", "--val_data", f"{folder}/val/00000.tar"]
    with small_runs():
        assert train.main([*data, *FLAGS, "--num_workers", "2", "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_a_run_on_shards(shard_run: Path, tmp_path: Path) -> None:
    results = json.loads((shard_run / "results" / "training_results.json").read_text())
    assert [record["step"] for record in results["history"]] == [0, 3]
    assert (results["num_images"], results["num_texts"]) == (6, 12)
    assert "54 training images in 3 shards" in (shard_run / "logs" / "train.log").read_text()
    best = str(shard_run / "model-checkpoint" / "best_model.pth")
    assert evaluation.main(["--checkpoint", best, "--output_dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results" / "evaluation_results.json").read_text())
    assert found["metrics"]["rsum"] == pytest.approx(results["metrics"]["rsum"], abs=1e-4)
    shards = f"{shard_run}/train/{{00000..00002}}.tar"
    assert evaluation.main(["--checkpoint", best, "--data_dir", shards, "--output_dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results" / "evaluation_results.json").read_text())["num_images"] == 54


@pytest.mark.slow
def test_two_ranks_train_on_shards_that_are_not_counted_yet(shard_run: Path, tmp_path: Path) -> None:
    shutil.copytree(shard_run / "train", tmp_path / "train", ignore=shutil.ignore_patterns(INDEX_NAME))
    data = ["--data_dir", f"{tmp_path}/train/{{00000..00002}}.tar", "--val_data", f"{shard_run}/val/00000.tar"]
    done = run_ranks(
        2, "tests/helpers/small_train.py", *data, *FLAGS, "--num_workers", "2", "--output_dir", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("counted the samples of 3 shards") == 1
    results = json.loads((tmp_path / "results" / "training_results.json").read_text())
    assert [record["step"] for record in results["history"]] == [0, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_frozen_towers_train_on_shards_without_cached_features(shard_run: Path, tmp_path: Path) -> None:
    data = ["--data_dir", f"{shard_run}/train/{{00000..00002}}.tar", "--val_data", f"{shard_run}/val/00000.tar"]
    assert train.main([*data, *FLAGS, "--freeze_backbone", "--output_dir", str(tmp_path)]) == 0
    assert "are not cached for shards" in (tmp_path / "logs" / "train.log").read_text()
    assert not (tmp_path / "cache" / "features").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("frozen", [["--freeze_backbone"], ["--cache_images"]])
def test_shards_may_be_the_validation_set_of_other_data(
    shard_run: Path, sample_dir: Path, tmp_path: Path, frozen: list[str]
) -> None:
    data = ["--data_dir", str(sample_dir), "--val_data", f"{shard_run}/val/00000.tar", "--output_dir", str(tmp_path)]
    assert train.main([*data, *FLAGS, *frozen]) == 0
    results = json.loads((tmp_path / "results" / "training_results.json").read_text())
    assert results["num_images"] == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "shards need --val_data"),
        (["--val_data", "x", "--cache_images"], "--cache_images does not go with shards"),
        (["--val_data", "x", "--captions", "all"], "--captions all does not go with shards"),
        (["--val_data", "gone"], "gone does not exist"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    data_dir = make_shards(tmp_path, 4)
    assert train.main(["--data_dir", data_dir, "--output_dir", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match=r"1 sample, at least 2"):
        training_shards(DataSource(make_shards(tmp_path / "one", 1)), val_data=data_dir)


@pytest.mark.parametrize("buffer", [1, 5, 20])
def test_the_buffer_holds_so_many_samples_and_no_more(tmp_path: Path, buffer: int) -> None:
    order = order_of(loader_of(make_shards(tmp_path, 60), shuffle_buffer=buffer), 1)
    # a sample that comes k places early was drawn when k others were still in the buffer
    lead = max(index - position for position, index in enumerate(order))
    assert sorted(order) == list(range(60))
    assert lead == 0 if buffer == 1 else buffer // 2 <= lead <= buffer
