"""Captions that several images have."""

from pathlib import Path

from cliptune.data.equal_captions import num_shared_captions
from cliptune.data.pairs import load_pairs
from tests.helpers.datasets import make_images, make_index


def shared(folder: Path, *captions: list[str]) -> int:
    names = [f"{number}.png" for number in range(len(captions))]
    make_images(folder, *names)
    make_index(folder, [{"image": name, "captions": own} for name, own in zip(names, captions, strict=True)])
    return num_shared_captions(load_pairs(folder))


def test_captions_of_other_images_are_counted(tmp_path: Path) -> None:
    assert shared(tmp_path, ["a dog", "a cat"], ["a  Dog", "a bird"], ["a fish"], ["Ａ　ＤＯＧ"]) == 3


def test_an_images_own_captions_may_be_equal(tmp_path: Path) -> None:
    assert shared(tmp_path, ["a dog", "A dog"], ["a cat", "a bird"]) == 0
