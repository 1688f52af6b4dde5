import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from config import DataSettings
from data_loader import (
    EpochBatches,
    ImageTextDataset,
    Pairs,
    Strings,
    TrainLoader,
    _split_mix,
    create_sample_dataset,
    draw_bits,
    evaluation_pairs,
    holds_only_placeholders,
    load_pairs,
    main,
    split_pairs,
    training_pairs,
)
from preprocessing import CLIP_MEAN, CLIP_STD

CPU = torch.device("cpu")


def make_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(path)


def make_index(folder: Path, rows: Sequence[Mapping[str, object]], name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_strings_hold_what_they_are_given() -> None:
    given = ["a", "", "四 猫", "x" * 1000, "bad \udcff byte"]
    strings = Strings(given)
    assert list(strings) == given
    assert strings[-1] == given[-1]
    assert strings[1:3] == given[1:3]
    with pytest.raises(IndexError):
        strings[5]


def test_one_sample_has_pixels_tokens_and_identity(sample_dir: Path) -> None:
    dataset = ImageTextDataset(sample_dir)
    sample = dataset[3]
    assert len(dataset) == 60
    assert sample.image is not None
    assert (sample.image.shape, sample.image.dtype) == ((3, 224, 224), torch.uint8)
    assert (sample.tokens.shape, sample.image_id) == ((77,), 3)
    assert len(ImageTextDataset(sample_dir, captions="all")) == 120


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
        assert dataset[7].caption_id == captions[7]
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


def test_split_is_by_group_seeded_and_independent_of_the_order(tmp_path: Path) -> None:
    names = [f"{number:03}.png" for number in range(40)]
    make_images(tmp_path, *names)
    rows = [{"image_path": name, "caption": name, "group": f"g{int(name[:3]) // 4}"} for name in names]
    first = split_pairs(load_pairs(make_index(tmp_path, rows)), val_split=0.2)
    second = split_pairs(load_pairs(make_index(tmp_path, rows[::-1])), val_split=0.2)
    assert set(first["val"].paths) == set(second["val"].paths)
    assert len(first["val"]) == 8
    assert not set(first["train"].groups) & set(first["val"].groups)
    other = split_pairs(load_pairs(tmp_path), val_split=0.2, seed=1)
    assert set(other["val"].paths) != set(first["val"].paths)


def test_declared_splits_are_honoured(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(6)))
    splits = ["train", "train", "val", "test", None, "train"]
    rows = [{"image_path": f"{n}.png", "caption": "x", "split": split} for n, split in enumerate(splits)]
    pairs = load_pairs(make_index(tmp_path, rows))
    assert {name: len(part) for name, part in split_pairs(pairs).items()} == {"train": 4, "val": 1, "test": 1}
    assert len(evaluation_pairs(tmp_path, split=None)) == 1
    assert len(evaluation_pairs(tmp_path, split="all")) == 6
    assert len(ImageTextDataset(tmp_path, split="test")) == 1


def test_two_names_of_one_file_are_one_image(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    names = ["a.png", "./a.png", "link.png", "b.png", str(tmp_path / "a.png")]
    pairs = load_pairs(make_index(tmp_path, [{"image": name, "caption": name} for name in names]))
    assert len(pairs) == 2
    assert pairs.captions_of(0) == ["a.png", "./a.png", "link.png", str(tmp_path / "a.png")]
    assert pairs.text_to_image.tolist() == [0, 0, 0, 0, 1]


def test_separate_validation_set_and_no_image_on_both_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(5)))
    train = make_index(tmp_path, [{"image": f"{n}.png", "caption": "x"} for n in range(4)], "train.json")
    val = make_index(tmp_path, [{"image": f"{n}.png", "caption": "x"} for n in (3, 4)], "held.json")
    with caplog.at_level(logging.WARNING):
        splits = training_pairs(DataSettings(data_dir=str(train), val_data=str(val)), seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 3, "val": 2}
    assert "1 image(s) of the validation set were left out" in caplog.text
    assert "only 5 pairs" in caplog.text


def test_few_missing_images_are_left_out_many_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(150)))
    rows: list[dict[str, object]] = [{"image": f"{n}.png", "caption": "x"} for n in range(151)]
    assert len(load_pairs(make_index(tmp_path, rows))) == 150
    assert "row 151: image 150.png: No such file" in caplog.text
    with pytest.raises(ValueError, match=r"10 bad entries beside 150 good images: data.json: row 151"):
        load_pairs(make_index(tmp_path, [*rows, *({"image": f"x{n}.png", "caption": "x"} for n in range(9))]))


def test_too_few_images_are_an_error(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    make_index(tmp_path, [{"image": name, "caption": "x"} for name in ("a.png", "b.png")])
    with pytest.raises(ValueError, match="at least 2 and 1 are needed"):
        training_pairs(DataSettings(data_dir=str(tmp_path)), seed=0)


def test_a_picture_that_cannot_be_read_leaves_its_batch(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(4)))
    (tmp_path / "2.png").write_text("broken")
    make_index(tmp_path, [{"image": f"{n}.png", "caption": "x"} for n in range(4)])
    batch = next(TrainLoader(ImageTextDataset(tmp_path), batch_size=4, num_workers=0, device=CPU).epoch(1))
    assert sorted(batch.image_ids.tolist()) == [0, 1, 3]
    assert len(batch.errors) == 1
    assert "2.png: cannot be read" in batch.errors[0]


def test_placeholders(tmp_path: Path) -> None:
    assert holds_only_placeholders(tmp_path / "gone")
    (tmp_path / "images").mkdir()
    (tmp_path / ".gitkeep").touch()
    assert holds_only_placeholders(tmp_path)
    (tmp_path / "images" / "x.png").touch()
    assert not holds_only_placeholders(tmp_path)


def test_the_stage_makes_sample_data_then_describes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--num_samples", "20"]) == 0
    output = capsys.readouterr().out
    assert "made sample data: data/data.json" in output
    assert "images      20, 40 pairs, 2 to 2 captions an image" in output
    assert main([]) == 0
    assert "made" not in capsys.readouterr().out
    assert main(["--data_dir", "gone"]) == 2
    assert "python data_loader.py" in capsys.readouterr().err


def test_the_stage_finds_identical_pictures_across_the_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_sample_dataset(tmp_path, 4)
    rows = json.loads((tmp_path / "data.json").read_text())
    for row, split in zip(rows, ("train", "train", "val", "val"), strict=True):
        row["split"] = split
    (tmp_path / rows[3]["image_path"]).write_bytes((tmp_path / rows[0]["image_path"]).read_bytes())
    rows[1]["caption"] = rows[0]["caption"]
    make_index(tmp_path, rows)
    assert main(["--data_dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "identical   1 byte-identical" in output
    assert "repeated    50.0%" in output


def test_real_flickr8k_and_emoji(real_data: Path) -> None:
    splits = split_pairs(load_pairs(real_data / "flickr8k"))
    assert {name: len(part) for name, part in splits.items()} == {"train": 6000, "val": 1000, "test": 0}
    emoji = split_pairs(load_pairs(real_data / "noto_emoji", caption_key="caption_de"))
    assert not set(emoji["train"].groups) & set(emoji["val"].groups)
    assert len(emoji["train"]) + len(emoji["val"]) == 3569
    sample = ImageTextDataset(emoji["val"])[0]
    assert sample.image is not None
    assert isinstance(emoji["val"], Pairs)
