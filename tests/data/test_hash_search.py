import logging

import numpy as np
import pytest

from cliptune.data.hash_search import MAX_BITS, candidate_pairs

MASK = np.uint64((1 << 63) - 1)


def flipped(hashes: np.ndarray, num_bits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hashes with so many of their bits the other way."""
    masks = [sum(1 << int(bit) for bit in rng.permutation(63)[:number]) for number in num_bits]
    return np.asarray(hashes ^ np.array(masks, dtype=np.uint64))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(np, "bitwise_count"), reason="NumPy 2 counts bits")
def test_exactly_the_pairs_within_the_radius_are_found() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, (400, 6), dtype=np.uint64) & MASK
    for column in (0, 2, 4):  # a whole near a whole, or near a part
        hashes[200:, column] = flipped(hashes[:200, 0], rng.integers(0, 30, 200), rng)
    found = candidate_pairs(hashes, np.zeros((400, 12), dtype=np.uint8), wholes=slice(None, None, 3))
    bits = np.bitwise_count(hashes[:, None, ::3, None] ^ hashes[None, :, None, :]).min(axis=(2, 3))  # [400, 400]
    expected = np.argwhere(np.triu(np.minimum(bits, bits.T) <= MAX_BITS, k=1))
    assert len(expected) > 100
    assert found.tolist() == expected.tolist()


def test_of_many_the_nearest_are_taken() -> None:
    rng = np.random.default_rng(0)
    grey = np.sort(rng.uniform(40, 220, 200))
    # equal hashes all over; one gain apart means that brightness alone is no difference, so half the pixels are fixed
    coarse = np.concatenate([np.full((200, 50), 100), np.repeat(grey[:, None], 50, axis=1)], axis=1).astype(np.uint8)
    found = candidate_pairs(np.zeros((200, 6), dtype=np.uint64), coarse, wholes=slice(None, None, 3))
    assert 0 < len(found) <= 200 * 32
    assert (found[:, 0] < found[:, 1]).all()
    gaps = np.abs(grey[found[:, 0]] - grey[found[:, 1]])
    assert gaps.max() < 60
    neighbours = {tuple(pair) for pair in found.tolist()}
    assert {(i, i + 1) for i in range(199)} <= neighbours


@pytest.mark.slow
def test_images_of_one_layout_are_searched_in_little_time_and_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(0)
    size = 1500
    hashes = flipped(np.zeros(size * 6, dtype=np.uint64), rng.integers(0, 5, size * 6), rng).reshape(size, 6)
    coarse = rng.integers(0, 256, (size, 192)).astype(np.uint8)
    copies = np.arange(0, size, 50)
    hashes[copies + 1], coarse[copies + 1] = hashes[copies], coarse[copies]
    found = candidate_pairs(hashes, coarse, wholes=slice(None, None, 3))
    assert "1,500 images resemble more others than are compared" in caplog.text
    assert {(i, i + 1) for i in copies.tolist()} <= {tuple(pair) for pair in found.tolist()}


def test_no_images_or_one() -> None:
    for size in (0, 1):
        found = candidate_pairs(
            np.zeros((size, 6), dtype=np.uint64), np.zeros((size, 192), dtype=np.uint8), wholes=slice(None, None, 3)
        )
        assert found.shape == (0, 2)
