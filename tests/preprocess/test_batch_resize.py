import numpy as np
import pytest
import torch

from cliptune.preprocess.batch_resize import resize_batch
from cliptune.preprocess.resize import Span, resize
from cliptune.preprocess.transforms import CenterTransform, CropTransform

SIZES = [(500, 375), (375, 500), (120, 90), (33, 60), (1, 1), (640, 480), (37, 36)]


def noise(width: int, height: int, seed: int) -> np.ndarray:
    """The worst case: sums beyond 0 and 255, weights of all signs."""
    return np.random.default_rng(seed).choice(np.array([0, 255], dtype=np.uint8), (height, width, 4))


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1)))


def assert_equal(images: list[np.ndarray], columns: list[Span], rows: list[Span]) -> None:
    got = resize_batch(list(map(channels_first, images)), columns, rows)
    assert got.dtype == torch.uint8
    for image, across, down, pixels in zip(images, columns, rows, got, strict=True):
        assert torch.equal(pixels, channels_first(resize(image, across, down)))


@pytest.mark.parametrize("transform", [CenterTransform(64), CropTransform(64), CenterTransform(7)])
def test_images_of_all_sizes_at_once_are_resized_as_each_alone(transform: CenterTransform | CropTransform) -> None:
    torch.manual_seed(0)
    columns, rows = zip(*map(transform.spans, SIZES), strict=True)
    assert_equal([noise(*size, seed=seed) for seed, size in enumerate(SIZES)], list(columns), list(rows))


def test_pixels_of_the_numbers_of_a_shape_that_differ_in_each_direction() -> None:
    assert_equal([noise(90, 70, 0)], [Span(10, 80, 35, 3, 20)], [Span(5, 70, 130, 60, 41)])


@pytest.mark.slow
def test_beyond_an_eighth_it_stays_within_a_level() -> None:
    image = noise(3000, 2000, 0)
    columns, rows = Span(0, 3000, 30, 0, 20), Span(0, 2000, 20, 0, 20)
    got = resize_batch([channels_first(image)], [columns], [rows])[0]
    assert (got.int() - channels_first(resize(image, columns, rows)).int()).abs().max() <= 1
