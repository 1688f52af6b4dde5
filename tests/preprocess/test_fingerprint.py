import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.near_duplicates import COPIES
from cliptune.preprocess.decode import decode_image
from cliptune.preprocess.fingerprint import CROPS, fingerprint
from tests.helpers.photos import photo


def bits_between(one: Image.Image, other: Image.Image) -> int:
    """The fewest bits in which the whole of one differs from any hash of the other."""
    ours, theirs = (fingerprint(image)["hashes"] for image in (one, other))
    wholes = slice(None, None, len(CROPS))
    pairs = [(a, b) for a in ours[wholes] for b in theirs] + [(a, b) for a in theirs[wholes] for b in ours]
    return min(int(a ^ b).bit_count() for a, b in pairs)


@pytest.mark.parametrize("kind", COPIES)
def test_copies_have_similar_hashes_and_others_have_not(kind: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(10):
        original = photo(seed)
        assert bits_between(original, COPIES[kind](original, rng)) <= 14
        assert bits_between(original, photo(seed + 100)) > 14


def test_a_plain_border_does_not_hide_an_image() -> None:
    framed = ImageOps.expand(photo(1), border=60, fill="white")
    assert bits_between(photo(1), framed) <= 14 < bits_between(photo(2), framed)


def test_an_image_without_structure_has_no_bits() -> None:
    for color in ("black", "white", (200, 30, 90)):
        found = fingerprint(Image.new("RGB", (50, 40), color))
        assert not found["hashes"].any()
        assert (found["pixels"] == np.asarray(Image.new("RGB", (32, 32), color))).all()


@pytest.mark.slow
def test_the_decoder_and_the_size_it_decodes_at_hardly_matter(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("images") / "a.jpg"
    photo(3, (1600, 1200)).save(path, quality=95)
    small, full = (fingerprint(decode_image(path, shortest_side=side)) for side in (192, None))
    assert np.abs(small["pixels"].astype(int) - full["pixels"]).max() <= 6
    assert all(int(a ^ b).bit_count() <= 4 for a, b in zip(small["hashes"], full["hashes"], strict=True))
