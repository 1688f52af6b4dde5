import logging
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliptune.data.pairs import DataSource, Pairs, holds_only_placeholders, load_pairs
from cliptune.data.splits import (
    MAX_VAL_IMAGES,
    declared_split,
    default_split,
    nearest_groups,
    num_asked,
    split_pairs,
    training_pairs,
)
from cliptune.data.table import RowBuffer
from data_loader import ImageTextDataset
from tests.helpers.datasets import make_images, make_index

PUBLISHED = [13, 14, 18, 21, 22, 30]
"""The first images that validate, of 1,000 as `made_pairs` makes them, with the default seed."""


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


def split_plainly(images: Sequence[str], *, val_split: float, seed: int) -> list[int]:
    """The split of images without groups, which is published: the images drawn for validation."""
    names = sorted(images)
    order = np.random.RandomState(seed % 2**32).permutation(len(names))
    target = min(max(round(val_split * len(images)), 1), MAX_VAL_IMAGES, len(images) - 1)
    return sorted(images.index(names[number]) for number in order[: max(target, 0)])


def made_pairs(groups: Sequence[str]) -> Pairs:
    """Pairs without files; an image that has no group is its own."""
    buffer = RowBuffer()
    for number, group in enumerate(groups):
        buffer.append(f"/{number * 7919 % 1000:03}.png", [f"{number}"], split=None, group=group, number=number)
    rows = buffer.rows("")
    return Pairs(rows.images, rows.captions, rows.starts, rows.groups.filled(rows.images), rows.splits)


@pytest.mark.parametrize("val_split", [0.0001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("num_images", [2, 3, 50, 300])
def test_the_split_of_images_without_groups_is_that_of_the_plain_rule(num_images: int, val_split: float) -> None:
    pairs = made_pairs([""] * num_images)
    for seed in (0, 42, 2**40):
        found = split_pairs(pairs, val_split=val_split, seed=seed)["val"]
        expected = split_plainly(list(pairs.paths), val_split=val_split, seed=seed)
        assert [int(caption) for caption in found.captions] == expected


def test_the_published_split_stays() -> None:
    val = split_pairs(made_pairs([""] * 1000))["val"]
    assert len(val) == 100
    assert [int(caption) for caption in val.captions][:6] == PUBLISHED


def nearest_sum(sizes: Sequence[int], target: int) -> int:
    """Brute force: all choices but none and all of them."""
    sums = [
        sum(size for group, size in enumerate(sizes) if choice >> group & 1) for choice in range(1, 2 ** len(sizes) - 1)
    ]
    return min(sums, key=lambda total: (abs(total - target), total))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=9), st.integers(1, 400))
def test_groups_are_chosen_as_near_to_the_target_as_any_come(sizes: list[int], target: int) -> None:
    chosen = nearest_groups(np.array(sizes), target)
    assert 0 < len(set(chosen)) == len(chosen) < len(sizes)
    assert sum(sizes[group] for group in chosen) == nearest_sum(sizes, target)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["", "", "a", "b", "é", "\udc80", "\ue000", "/5", "/000.png"]), min_size=2, max_size=12),
    st.floats(0, 0.9),
    st.integers(-5, 2**40),
    st.randoms(),
)
def test_the_split_is_of_whole_groups_and_of_no_order(
    groups: list[str], val_split: float, seed: int, random: Random
) -> None:
    pairs = made_pairs(groups)
    splits = split_pairs(pairs, val_split=val_split, seed=seed)
    names = list(pairs.groups)
    sizes = [names.count(name) for name in sorted(set(names))]
    assert not set(splits["train"].groups) & set(splits["val"].groups)
    assert len(splits["train"]) + len(splits["val"]) == len(pairs)
    if len(sizes) > 1:
        assert len(splits["val"]) == nearest_sum(sizes, num_asked(len(pairs), val_split))
    order = list(range(len(pairs)))
    random.shuffle(order)
    again = split_pairs(pairs.select(order), val_split=val_split, seed=seed)
    assert set(again["val"].paths) == set(splits["val"].paths)


def test_equal_groups_are_drawn_at_random() -> None:
    pairs = made_pairs([f"g{number % 20}" for number in range(200)])
    drawn = [set(split_pairs(pairs, val_split=0.1, seed=seed)["val"].groups) for seed in range(40)]
    assert set(map(len, drawn)) == {2}
    assert len(set().union(*drawn)) >= 18


@pytest.mark.parametrize("seed", range(6))
def test_the_smaller_of_two_groups_validates(seed: int) -> None:
    splits = split_pairs(made_pairs(["a"] * 190 + ["b"] * 10), val_split=0.1, seed=seed)
    assert (len(splits["train"]), len(splits["val"])) == (190, 10)


def test_images_of_one_group_cannot_be_split(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(9)))
    make_index(tmp_path, [{"image": f"{n}.png", "caption": f"{n}", "group": "same"} for n in range(9)])
    with pytest.raises(ValueError, match=r"0 validation images; .* all images are one group"):
        training_pairs(DataSource(tmp_path), val_data=None, val_split=0.1, seed=0)


def test_declared_splits_are_honoured(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(6)))
    splits = ["train", "train", "val", "test", None, "train"]
    rows = [{"image_path": f"{n}.png", "caption": "x", "split": split} for n, split in enumerate(splits)]
    pairs = load_pairs(make_index(tmp_path, rows))
    assert {name: len(part) for name, part in split_pairs(pairs).items()} == {"train": 4, "val": 1, "test": 1}
    source = DataSource(tmp_path)
    assert default_split(pairs, source) == "val"
    assert [len(declared_split(pairs, split, source)) for split in ("train", "val", "test", "all")] == [3, 1, 1, 6]
    assert default_split(pairs.select([0, 3]), source) == "test"
    assert default_split(pairs.select([0, 4]), source) == "all"
    assert len(ImageTextDataset(tmp_path, split="test")) == 1


def test_two_names_of_one_file_are_one_image(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    names = ["a.png", "./a.png", "link.png", "b.png", str(tmp_path / "a.png")]
    pairs = load_pairs(make_index(tmp_path, [{"image": name, "caption": name} for name in names]))
    assert len(pairs) == 2
    assert pairs.captions_of(0) == ["a.png", "./a.png", "link.png", str(tmp_path / "a.png")]
    assert pairs.text_to_image.tolist() == [0, 0, 0, 0, 1]


def test_one_image_dir_serves_training_and_a_separate_validation_set(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"train2017/{number}.png" for number in range(4)), "val2017/9.png")
    train = make_index(tmp_path, [{"image": f"{number}.png", "caption": "x"} for number in range(4)], "train.json")
    val = make_index(tmp_path, [{"image": "9.png", "caption": "y"}], "val.json")
    message = "which holds them; --image_dir is that of the training data as well: if theirs lie elsewhere, name"
    with pytest.raises(ValueError, match=message):
        training_pairs(DataSource(train, tmp_path / "train2017"), val_data=str(val), val_split=0.1, seed=0)
    splits = training_pairs(DataSource(train, tmp_path), val_data=str(val), val_split=0.1, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 4, "val": 1, "test": 0}


def test_separate_validation_set_and_no_image_on_both_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(5)))
    train = make_index(tmp_path, [{"image": f"{n}.png", "caption": "x"} for n in range(4)], "train.json")
    val = make_index(tmp_path, [{"image": f"{n}.png", "caption": "x"} for n in (3, 4)], "held.json")
    with caplog.at_level(logging.WARNING):
        splits = training_pairs(DataSource(train), val_data=str(val), val_split=0.1, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 3, "val": 2, "test": 0}
    assert "1 image of the validation set stay out of training" in caplog.text
    assert "only 5 pairs" in caplog.text


@pytest.mark.parametrize("columns", [{"Phase": "train"}, {"phase": "val", "split": "train"}, {"ID": "7"}])
def test_a_column_that_may_be_the_split_is_told(
    columns: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_images(tmp_path, "0.png", "1.png")
    load_pairs(make_index(tmp_path, [{"image": f"{n}.png", "caption": f"{n}", **columns} for n in range(2)]))
    told = f"{tmp_path / 'data.json'}: the column Phase is no split: if it says which images train"
    assert (told in caplog.text) == (list(columns) == ["Phase"])
    assert ("no split" in caplog.text) == (list(columns) == ["Phase"])


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


@pytest.mark.slow
def test_real_flickr8k_and_emoji(real_data: Path) -> None:
    splits = split_pairs(load_pairs(real_data / "flickr8k"))
    assert {name: len(part) for name, part in splits.items()} == {"train": 6000, "val": 1000, "test": 0}
    emoji = split_pairs(load_pairs(DataSource(real_data / "noto_emoji", caption_key="caption_de")))
    assert not set(emoji["train"].groups) & set(emoji["val"].groups)
    assert len(emoji["train"]) + len(emoji["val"]) == 3569
    sample = ImageTextDataset(emoji["val"])[0]
    assert sample.image is not None
    assert isinstance(emoji["val"], Pairs)
