import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms

from cliptune.data.loaders import Batch, EpochBatches, Sample, TrainLoader, caption_id, collate
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.table import Strings
from cliptune.preprocess.moments import CLIP_MEAN, CLIP_STD
from cliptune.preprocess.transforms import train_transform
from cliptune.runtime.rng import _split_mix, draw_bits
from data_loader import ImageTextDataset, main
from tests.helpers.datasets import make_images, make_index
from tests.helpers.ranks import as_rank

CPU = torch.device("cpu")


def test_one_sample_has_pixels_tokens_and_identity(sample_dir: Path) -> None:
    dataset = ImageTextDataset(sample_dir)
    sample = dataset[3]
    assert len(dataset) == 60
    assert sample.image is not None
    assert (sample.image.shape, sample.image.dtype) == ((3, 224, 224), torch.uint8)
    assert (sample.tokens.shape, sample.image_id) == ((77,), 3)
    assert len(ImageTextDataset(sample_dir, captions="all")) == 120


def test_captions_that_say_the_same_have_the_same_id() -> None:
    same = ["A cat, a Dog", "a cat, a dog", " A\tCAT,\u00a0a  dog\n", "\uff21 cat, a dog"]
    assert {caption_id(caption) for caption in same} == {caption_id("a cat, a dog")}
    assert caption_id("stra\u00dfe") == caption_id("STRASSE")
    others = ["a cat a dog", "a dog, a cat", "acat, a dog", "", "\u732b", "half \udc80"]
    assert len({caption_id(caption) for caption in [same[0], *others]}) == 7


def test_a_caption_id_is_the_same_in_every_run_and_fits_int64() -> None:
    assert caption_id("A photo of a cat") == 2875975664571500342
    assert all(0 <= caption_id(str(number)) < 2**63 for number in range(1000))


def test_a_batch_has_the_ids_of_its_captions(sample_dir: Path) -> None:
    dataset = ImageTextDataset(sample_dir)
    batch = next(TrainLoader(dataset, batch_size=9, num_workers=0, device=CPU).epoch(1))
    captions = [dataset.pairs.captions[index] for index in batch.caption_indices.tolist()]
    assert batch.caption_ids.tolist() == [caption_id(caption) for caption in captions]
    assert (batch.caption_ids.dtype, batch.image_ids.dtype) == (torch.int64, torch.int64)
    owners = dataset.pairs.text_to_image[batch.caption_indices]
    assert torch.equal(owners, batch.image_ids)


def test_captions_vary_by_epoch_and_repeat_by_seed(sample_dir: Path) -> None:
    dataset, again = ImageTextDataset(sample_dir, seed=1), ImageTextDataset(sample_dir, seed=1)
    first = torch.stack([dataset[i].tokens for i in range(12)])
    dataset.set_epoch(1)
    second = torch.stack([dataset[i].tokens for i in range(12)])
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.stack([again[i].tokens for i in range(12)]))


def test_draws_depend_on_nothing_but_their_arguments() -> None:
    first_outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # SplitMix64 from seed 0
    gamma = 0x9E3779B97F4A7C15
    state = np.array([number * gamma % 2**64 for number in range(3)], dtype=np.uint64)
    assert _split_mix(state).tolist() == first_outputs
    items = np.arange(10_000)
    together = draw_bits(3, 7, items)
    assert draw_bits(3, 7, items[[9, 4]]).tolist() == together[[9, 4]].tolist()
    for other in (draw_bits(4, 7, items), draw_bits(3, 8, items), draw_bits(3, 7, items, stream=1)):
        assert not (other == together).any()
        counts = np.bincount((other % np.uint64(5) * np.uint64(5) + together % np.uint64(5)).astype(np.int64))
        assert counts.min() > 300  # 400 expected of each of the 25 pairs, with a deviation of 20
        assert counts.max() < 500


def test_every_caption_is_chosen_at_some_time_by_its_own_image(sample_dir: Path) -> None:
    dataset = ImageTextDataset(sample_dir)
    chosen = []
    for epoch in range(20):
        dataset.set_epoch(epoch)
        images, captions = dataset.choose(np.arange(60))
        assert dataset.pairs.text_to_image.numpy()[captions].tolist() == images.tolist() == list(range(60))
        assert dataset[7].caption_index == captions[7]
        chosen.append(captions)
    assert set(np.concatenate(chosen).tolist()) == set(range(dataset.pairs.num_pairs))


def test_a_users_random_transform_is_reproducible_and_leaves_no_trace(sample_dir: Path) -> None:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.ColorJitter(0.2, 0.2, 0.2, 0.1),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    dataset = ImageTextDataset(sample_dir, transform=transform)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = dataset[0].image
    assert torch.equal(torch.rand(2), expected)
    assert first is not None
    assert torch.equal(first, dataset[0].image)  # type: ignore[arg-type]
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[0].image)  # type: ignore[arg-type]


def test_captions_are_cut_to_the_models_context(sample_dir: Path) -> None:
    dataset = ImageTextDataset(sample_dir, context_length=6)
    for batch in TrainLoader(dataset, batch_size=16, num_workers=0, device=CPU).epoch(1):
        assert batch.tokens.shape[1] == 6
        assert (batch.tokens.max(dim=1).values == 49407).all()
    assert collate([], 6).tokens.shape == (0, 6)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_has_every_sample_once_whatever_the_workers(sample_dir: Path, num_workers: int) -> None:
    dataset = ImageTextDataset(sample_dir)
    loader = TrainLoader(dataset, batch_size=16, num_workers=num_workers, device=CPU)
    for epoch in (1, 2):
        batches = list(loader.epoch(epoch))
        assert sorted(torch.cat([batch.image_ids for batch in batches]).tolist()) == list(range(60))
        again = list(TrainLoader(dataset, batch_size=16, num_workers=0, device=CPU).epoch(epoch))
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize(
    ("items", "size", "expected"), [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (3, 8, [3]), (8, 4, [4, 4])]
)
def test_no_pair_is_left_alone(items: int, size: int, expected: list[int]) -> None:
    batches = EpochBatches(items, size, seed=0)
    assert [len(batch) for batch in batches] == expected
    assert len(batches) == len(expected)


def test_an_image_that_cannot_be_read_leaves_its_batch(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(4)))
    (tmp_path / "2.png").write_text("broken")
    make_index(tmp_path, [{"image": f"{n}.png", "caption": "x"} for n in range(4)])
    batch = next(TrainLoader(ImageTextDataset(tmp_path), batch_size=4, num_workers=0, device=CPU).epoch(1))
    assert sorted(batch.image_ids.tolist()) == [0, 1, 3]
    assert len(batch.issues) == 1
    assert "2.png: cannot be read" in str(batch.issues[0])


def test_the_stage_makes_sample_data_then_describes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--num_samples", "20"]) == 0
    output = capsys.readouterr().out
    assert "made sample data: data/data.json" in output
    assert "images      20, 40 pairs, 2 captions an image" in output
    assert main([]) == 0
    assert "made" not in capsys.readouterr().out
    assert main(["--data_dir", "gone"]) == 2
    assert "python data_loader.py" in capsys.readouterr().err


def test_the_stage_finds_identical_images_across_the_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_sample_dataset(tmp_path, 4)
    rows = json.loads((tmp_path / "data.json").read_text())
    for row, split in zip(rows, ("train", "train", "val", "val"), strict=True):
        row["split"] = split
    (tmp_path / rows[3]["image_path"]).write_bytes((tmp_path / rows[0]["image_path"]).read_bytes())
    rows[1]["caption"] = rows[0]["caption"]
    make_index(tmp_path, rows)
    assert main(["--data_dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "note        1 of the 2 validation images is byte-identical to training images" in output
    assert "repeated    50.0%" in output


def same_batches(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.issues == b.issues
        and all(
            torch.equal(getattr(a, name), getattr(b, name)) for name in Batch._fields if name not in {"issues", "jpegs"}
        )
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_in_pieces_is_the_same_batch(sample_dir: Path, tmp_path: Path, num_workers: int) -> None:
    pairs = ImageTextDataset(sample_dir).pairs.select(range(40))
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths = [str(tmp_path / "bad.png") if number in (3, 30) else path for number, path in enumerate(pairs.paths)]
    pairs = replace(pairs, paths=Strings.of(paths))

    def load(piece_size: int) -> list[Batch]:
        dataset = ImageTextDataset(pairs)
        loader = TrainLoader(dataset, batch_size=24, num_workers=num_workers, device=CPU, piece_size=piece_size)
        return list(loader.epoch(1))

    whole = load(24)
    assert same_batches(load(5), whole)
    assert [len(batch.tokens) + len(batch.issues) for batch in whole] == [24, 16]
    assert sum(len(batch.issues) for batch in whole) == 2
    assert same_batches(load(1), whole)  # among them a piece of nothing but an issue


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_split_every_batch_in_its_order(sample_dir: Path, world_size: int) -> None:
    pairs = ImageTextDataset(sample_dir).pairs.select(range(26))
    loader = TrainLoader(ImageTextDataset(pairs), batch_size=20, num_workers=0, device=CPU)
    whole = list(loader.epoch(2))
    ranks = []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            ranks.append(list(loader.epoch(2)))
    for parts, batch in zip(zip(*ranks, strict=True), whole, strict=True):
        full = [part for part in parts if len(part.tokens)]
        assert torch.equal(torch.cat([part.images for part in full]), batch.images)
        assert torch.equal(torch.cat([part.caption_ids for part in parts]), batch.caption_ids)
        sizes = [len(part.tokens) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert world_size < 7 or 0 in [len(batches[-1].tokens) for batches in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [1, 3, 4])
def test_an_epoch_goes_on_from_a_batch_without_loading_those_before(
    sample_dir: Path, num_workers: int, start: int
) -> None:
    loaded: list[int] = []

    class Noting(ImageTextDataset):
        def __getitem__(self, index: int) -> Sample:
            loaded.append(index)
            return super().__getitem__(index)

    dataset = Noting(sample_dir, transform=train_transform(32, "color", fast_decode=False))
    whole = list(TrainLoader(dataset, batch_size=16, num_workers=0, device=CPU).epoch(2))
    loaded.clear()
    loader = TrainLoader(dataset, batch_size=16, num_workers=num_workers, device=CPU)
    assert same_batches(list(loader.epoch(2, start=start)), whole[start:])
    assert len(loaded) == (0 if num_workers else sum(len(batch.tokens) for batch in whole[start:]))
    assert same_batches(list(loader.epoch(2)), whole)


@pytest.mark.slow
def test_workers_leave_signals_to_the_main_process(sample_dir: Path) -> None:
    loader = TrainLoader(ImageTextDataset(sample_dir), batch_size=5, num_workers=2, device=CPU)
    batches = loader.epoch(1)
    for _ in range(2):  # one of each worker, which by then leaves signals alone
        next(batches)
    for process in loader.loader._iterator._workers:  # type: ignore[union-attr]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, number)
    assert len(list(batches)) == 10
    assert len(list(loader.epoch(2))) == 12
