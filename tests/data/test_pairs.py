import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliptune.data.pairs import DataSource, Pairs, holds_only_placeholders, load_pairs
from cliptune.data.splits import MAX_VAL_IMAGES, evaluation_pairs, split_pairs, training_pairs
from cliptune.data.table import RowBuffer
from data_loader import ImageTextDataset
from tests.helpers.datasets import make_images, make_index


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


def split_plainly(groups: Sequence[str], *, val_split: float, seed: int) -> list[int]:
    """The rule of the split, with a dictionary: the images drawn for validation."""
    members: dict[str, list[int]] = {}
    for image, group in enumerate(groups):
        members.setdefault(group, []).append(image)
    names = sorted(members)
    order = np.random.RandomState(seed % 2**32).permutation(len(names))
    target = min(max(round(val_split * len(groups)), 1), MAX_VAL_IMAGES)
    chosen: list[int] = []
    for number in order[:-1]:
        images = members[names[number]]
        if not chosen or len(chosen) + len(images) <= target:
            chosen += images
        if len(chosen) >= target:
            break
    return sorted(chosen)


def made_pairs(groups: Sequence[str]) -> Pairs:
    """Pairs without files; an image that has no group is its own."""
    buffer = RowBuffer()
    for number, group in enumerate(groups):
        buffer.append(f"/{number * 7919 % 1000:03}.png", [f"{number}"], split=None, group=group, number=number)
    rows = buffer.rows("")
    return Pairs(rows.images, rows.captions, rows.starts, rows.groups.filled(rows.images), rows.splits)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["", "", "a", "b", "é", "\udc80", "\ue000", "/5", "/000.png"]), max_size=60),
    st.floats(0, 0.9),
    st.integers(-5, 2**40),
)
def test_the_split_is_that_of_the_plain_rule(groups: list[str], val_split: float, seed: int) -> None:
    pairs = made_pairs(groups)
    expected = split_plainly(list(pairs.groups), val_split=val_split, seed=seed)
    splits = split_pairs(pairs, val_split=val_split, seed=seed)
    assert list(splits["val"].paths) == [pairs.paths[image] for image in expected]
    assert [int(caption) for caption in splits["val"].captions] == expected
    train = sorted(set(range(len(groups))) - set(expected))
    assert [int(caption) for caption in splits["train"].captions] == train
    assert list(splits["train"].groups) == [pairs.groups[image] for image in train]


def test_the_split_of_many_images_is_that_of_the_plain_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = made_pairs([""] * 1000)
    assert [int(caption) for caption in split_pairs(pairs)["val"].captions] == split_plainly(
        pairs.paths, val_split=0.1, seed=42
    )


def test_declared_splits_are_honoured(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(6)))
    splits = ["train", "train", "val", "test", None, "train"]
    rows = [{"image_path": f"{n}.png", "caption": "x", "split": split} for n, split in enumerate(splits)]
    pairs = load_pairs(make_index(tmp_path, rows))
    assert {name: len(part) for name, part in split_pairs(pairs).items()} == {"train": 4, "val": 1, "test": 1}
    assert len(evaluation_pairs(DataSource(tmp_path), split=None)) == 1
    assert len(evaluation_pairs(DataSource(tmp_path), split="all")) == 6
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
        splits = training_pairs(DataSource(train), val_data=str(val), val_split=0.1, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 3, "val": 2, "test": 0}
    assert "1 image of the validation set stay out of training" in caplog.text
    assert "only 5 pairs" in caplog.text


def test_few_missing_images_are_left_out_many_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(150)))
    rows: list[dict[str, object]] = [{"image": f"{n}.png", "caption": "x"} for n in range(151)]
    assert len(load_pairs(make_index(tmp_path, rows))) == 150
    assert "row 151: image 150.png: No such file" in caplog.text
    with pytest.raises(ValueError, match=r"10 of 160 records cannot be used: data.json: row 151"):
        load_pairs(make_index(tmp_path, [*rows, *({"image": f"x{n}.png", "caption": "x"} for n in range(9))]))


def test_an_image_of_two_splits_is_a_problem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(120)))
    make_index(tmp_path, [{"image": f"{n}.png", "caption": "x"} for n in range(110)], "train.json")
    make_index(tmp_path, [{"image": f"{n}.png", "caption": "y"} for n in range(109, 120)], "val.json")
    pairs = load_pairs(tmp_path)
    assert (len(pairs), pairs.captions_of(109), pairs.declared()) == (120, ["x"], {"train", "val"})
    assert f"val.json: row 1: {tmp_path / '109.png'} is in val here and in train at train.json: row 110" in caplog.text


def test_images_are_found_by_path(tmp_path: Path) -> None:
    pairs = made_pairs([""] * 5)
    assert pairs.find([pairs.paths[3], "/gone", pairs.paths[0]]).tolist() == [3, -1, 0]


def test_too_few_images_are_an_error(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    make_index(tmp_path, [{"image": name, "caption": "x"} for name in ("a.png", "b.png")])
    with pytest.raises(ValueError, match="at least 2 and 1 are needed"):
        training_pairs(DataSource(tmp_path), val_data=None, val_split=0.1, seed=0)


def test_placeholders(tmp_path: Path) -> None:
    assert holds_only_placeholders(tmp_path / "gone")
    (tmp_path / "images").mkdir()
    (tmp_path / ".gitkeep").touch()
    assert holds_only_placeholders(tmp_path)
    (tmp_path / "images" / "x.png").touch()
    assert not holds_only_placeholders(tmp_path)


def test_real_flickr8k_and_emoji(real_data: Path) -> None:
    splits = split_pairs(load_pairs(real_data / "flickr8k"))
    assert {name: len(part) for name, part in splits.items()} == {"train": 6000, "val": 1000, "test": 0}
    emoji = split_pairs(load_pairs(DataSource(real_data / "noto_emoji", caption_key="caption_de")))
    assert not set(emoji["train"].groups) & set(emoji["val"].groups)
    assert len(emoji["train"]) + len(emoji["val"]) == 3569
    sample = ImageTextDataset(emoji["val"])[0]
    assert sample.image is not None
    assert isinstance(emoji["val"], Pairs)
