import numpy as np
import pytest
from PIL import Image

from benchmarks.near_duplicates import COPIES
from cliptune.preprocess.alignment import distances
from cliptune.preprocess.fingerprint import fingerprint
from tests.helpers.photos import photo


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(distances(*(fingerprint(image)["pixels"][None] for image in (one, other)))[0])


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_near_in_either_order_and_others_far(kind: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(10):
        original = photo(seed)
        copy = COPIES[kind](original, rng)
        assert distance(original, copy) == distance(copy, original) < 12
        assert distance(original, photo(seed + 100)) > 40


def test_what_was_changed_in_one_place_or_colour_is_another_image() -> None:
    pixels = np.asarray(photo(0)).copy()
    assert distance(Image.fromarray(pixels), photo(0)) < 1e-6
    patched = pixels.copy()
    patched[60:100, 100:140] = 255 - patched[60:100, 100:140]
    tinted = pixels.copy()
    tinted[60:120, 60:180, 2] = tinted[60:120, 60:180, 2] * 0.6
    for changed in (patched, tinted):
        assert distance(Image.fromarray(changed), photo(0)) > 25


def test_a_thing_that_moved_is_no_crop() -> None:
    def scene(left: int) -> Image.Image:
        image = Image.new("RGB", (200, 200), (90, 120, 60))
        image.paste((220, 40, 30), (left, 70, left + 50, 130))
        return image

    assert distance(scene(60), scene(68)) > 200
    assert distance(scene(60), scene(60).crop((8, 8, 192, 192))) < 16
