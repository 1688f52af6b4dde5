"""Images to pixels: CLIP's preprocessing and training's augmentations, in two steps; the first can be cached."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from cliptune.preprocess.decode import MAX_PIXELS, DecodedImage, decode_image, size_of
from cliptune.preprocess.moments import CLIP_MEAN, CLIP_STD, Triple
from cliptune.preprocess.resize import Pixels, Span, resize
from cliptune.runtime.recording import is_recorded

CROP_AREA = (0.6, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

VERSION = 2
"""Raised whenever the same image gives other pixels or the same text other tokens: caches go by it."""

Transform = Callable[[Image.Image], Tensor]


class PixelTransform(ABC):
    """Preprocessing that ends in uint8 pixels `[3, R, R]`; `normalize` does the rest, on the model's device.

    It has two steps, so that the first one's result can be cached: `shrink` is the same each time, `finish` may vary.

    Args:
        resolution: R, in pixels.
        shrunk_side: height and width of what `shrink` gives, in pixels; smaller, `finish` would lack pixels.
        fast_decode: decode JPEGs no larger than needed, which changes the pixels a little.
        max_pixels: an image of more is refused; nor is a larger one made on the way.
    """

    is_final = False
    """Whether `shrink` gives the pixels of the result, and nothing is drawn: `finish` only puts the channels first."""

    def __init__(
        self, resolution: int, *, shrunk_side: int, fast_decode: bool = False, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.resolution = resolution
        self.shrunk_side = shrunk_side
        self.fast_decode = fast_decode
        self.max_pixels = max_pixels

    @property
    def key(self) -> str:
        """Name of the first step: images shrunk under the same key are the same."""
        return f"{type(self).__name__}-{self.shrunk_side}-v{VERSION}" + ("-fast" if self.fast_decode else "")

    @abstractmethod
    def is_one_resize(self, size: tuple[int, int]) -> bool:
        """Tell whether all that a call does to an image of that width and height is what `spans` says."""

    @abstractmethod
    def spans(self, size: tuple[int, int]) -> tuple[Span, Span]:
        """Say what becomes of columns and rows of an image; what is random about it is drawn, as a call draws it."""

    @abstractmethod
    def shrink(self, image: DecodedImage) -> Pixels:
        """Bring an image to uint8 `[shrunk_side, shrunk_side, 3]`."""

    @abstractmethod
    def finish(self, pixels: Pixels, size: tuple[int, int]) -> Tensor:
        """Turn what `shrink` gave for an image of that width and height into uint8 `[3, R, R]`."""

    def load(self, source: str | Path | bytes) -> DecodedImage:
        """Decode an image, by its path or its bytes, as this transform needs it; raises as `decode_image` does."""
        shortest_side = self.shrunk_side if self.fast_decode else None
        return decode_image(source, shortest_side=shortest_side, max_pixels=self.max_pixels)

    def __call__(self, image: DecodedImage) -> Tensor:
        """Turn an upright RGB image into uint8 `[3, R, R]`."""
        return self.finish(self.shrink(image), size_of(image))


class CenterTransform(PixelTransform):
    """CLIP's own (`clip.clip._transform`): bicubic resize of the short side, centre crop; what is cached is final."""

    is_final = True

    def __init__(self, resolution: int, *, fast_decode: bool = False, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(resolution, shrunk_side=resolution, fast_decode=fast_decode, max_pixels=max_pixels)

    def is_one_resize(self, size: tuple[int, int]) -> bool:
        """Tell whether Pillow is not needed: from twice as high as wide on it may take the columns first."""
        new_width, new_height = self._center(size)[0]
        return new_width * new_height <= self.max_pixels and size[1] < 2 * size[0]

    def spans(self, size: tuple[int, int]) -> tuple[Span, Span]:
        """Say what is resized and cropped."""
        (new_width, new_height), (left, top) = self._center(size)
        side = self.resolution
        return Span(0, size[0], new_width, left, side), Span(0, size[1], new_height, top, side)

    def shrink(self, image: DecodedImage) -> Pixels:
        """Resize and crop."""
        size, side = size_of(image), self.resolution
        if not isinstance(image, Image.Image):
            if self.is_one_resize(size):
                return resize(image, *self.spans(size))
            image = Image.fromarray(image[..., :3])
        new_size, (left, top) = self._center(size)
        if new_size[0] * new_size[1] > self.max_pixels:
            return _resize_center(image, new_size, (left, top), side)
        resized = image.resize(new_size, Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + side, top + side)))

    def _center(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the size that an image is brought to, and where its centre begins there, left and top."""
        (width, height), side = size, self.resolution
        short = min(width, height)
        # torchvision's rounding: `int` for the size, `round` for the crop
        new_width, new_height = int(side * width / short), int(side * height / short)
        return (new_width, new_height), (round((new_width - side) / 2), round((new_height - side) / 2))

    def finish(self, pixels: Pixels, size: tuple[int, int]) -> Tensor:
        """Put the channels first."""
        return _channels_first(pixels)


class CropTransform(PixelTransform):
    """A random crop of 60 to 100% of the area, resized; with `color`, brightness, contrast and colours vary as well.

    Nothing flips, because captions say left and right; colours move little, because captions name them.

    Cached images are whole, squeezed to a square of about 1.5 times the resolution. A crop of one is resized a second
    time: it is a little softer than the same crop of the file, most of all along the longer side of a long image.
    """

    def __init__(self, resolution: int, *, color: bool = False, fast_decode: bool = False) -> None:
        # the smallest crop of a square image still has the resolution's pixels: 224 -> 224 / sqrt(0.6 * 3/4) = 334
        shrunk_side = math.ceil(resolution / math.sqrt(CROP_AREA[0] * CROP_RATIO[0]))
        super().__init__(resolution, shrunk_side=shrunk_side, fast_decode=fast_decode)
        jitter = transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02)
        self.jitter = jitter if color else None

    def is_one_resize(self, size: tuple[int, int]) -> bool:
        """Tell whether colours stay as they are."""
        return self.jitter is None

    def spans(self, size: tuple[int, int]) -> tuple[Span, Span]:
        """Draw a crop."""
        return _part_spans(draw_crop(size), self.resolution)

    def shrink(self, image: DecodedImage) -> Pixels:
        """Squeeze the whole image to a square."""
        return _resize_part(image, (0, 0, *size_of(image)), self.shrunk_side)

    def finish(self, pixels: Pixels, size: tuple[int, int]) -> Tensor:
        """Crop as the whole image would be cropped, and resize."""
        left, top, right, bottom = draw_crop(size)
        across, down = self.shrunk_side / size[0], self.shrunk_side / size[1]
        padded = np.empty((self.shrunk_side, self.shrunk_side, 4), dtype=np.uint8)
        for channel in range(3):  # several times as fast as all at once
            padded[..., channel] = pixels[..., channel]
        return self._crop(padded, (left * across, top * down, right * across, bottom * down))

    def __call__(self, image: DecodedImage) -> Tensor:
        """Crop the image itself, and resize."""
        return self._crop(image, draw_crop(size_of(image)))

    def _crop(self, image: DecodedImage, box: tuple[float, float, float, float]) -> Tensor:
        pixels = _resize_part(image, box, self.resolution)
        if self.jitter is not None:
            pixels = np.asarray(self.jitter(Image.fromarray(pixels)))
        return _channels_first(pixels)


def clip_transform(resolution: int) -> PixelTransform:
    """CLIP's own preprocessing: upright RGB image to uint8 `[3, resolution, resolution]`, for `normalize`."""
    return CenterTransform(resolution)


def train_transform(resolution: int, augment: str, *, fast_decode: bool = False) -> PixelTransform:
    """Preprocessing for training: `none` is CLIP's own, `crop` takes random crops, `color` varies colours as well."""
    if augment == "none":
        return CenterTransform(resolution, fast_decode=fast_decode)
    return CropTransform(resolution, color=augment == "color", fast_decode=fast_decode)


def normalize(pixels: Tensor, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD) -> Tensor:
    """Bring pixels `[..., 3, H, W]` to a mean of 0 and a standard deviation of 1, on the device where they are.

    Args:
        pixels: uint8; or float, which is taken as normalised already and returned as it is.
        mean: of red, green and blue, as fractions of 255; CLIP's own by default.
        std: standard deviation, likewise.

    Raises:
        ValueError: pixels of another type.
    """
    if pixels.is_floating_point():
        return pixels
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, or float and normalised, got {pixels.dtype}")
    moments = _moments.__wrapped__ if is_recorded() else _moments  # a stand-in must not stay in the cache
    means, stds = moments(pixels.device, mean, std)
    return pixels.float().div_(255).sub_(means).div_(stds)


@lru_cache(maxsize=8)
def _moments(device: torch.device, mean: Triple, std: Triple) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # cached for callers that may need gradients
        means, stds = (torch.tensor(values, device=device, dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    return means, stds


def draw_crop(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Draw a crop as torchvision's `RandomResizedCrop`, but the same one for every size in which an image is decoded.

    Args:
        size: width and height.

    Returns:
        Left, top, right and bottom, not rounded: 60 to 100% of the area, 3:4 to 4:3; where ten draws do not fit, the
        largest crop of such a shape, from the centre.
    """
    width, height = size
    lowest, highest = CROP_RATIO
    for _ in range(10):
        fraction, shape, x, y = torch.rand(4).tolist()
        area = width * height * (CROP_AREA[0] + fraction * (CROP_AREA[1] - CROP_AREA[0]))
        ratio = lowest * (highest / lowest) ** shape  # 3:4 and 4:3 are as likely: evenly in the logarithm
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            break
    else:
        across, down, x, y = min(width, height * highest), min(height, width / lowest), 0.5, 0.5
    left, top = x * (width - across), y * (height - down)
    return left, top, left + across, top + down


def _resize_part(image: DecodedImage, box: tuple[float, float, float, float], side: int) -> Pixels:
    """Crop an image to whole pixels and resize it to uint8 `[side, side, 3]`."""
    columns, rows = _part_spans(box, side)
    if isinstance(image, Image.Image):
        part = image.crop((columns.start, rows.start, columns.stop, rows.stop))
        return np.asarray(part.resize((side, side), Image.Resampling.BICUBIC))
    return resize(image, columns, rows)


def _part_spans(box: tuple[float, float, float, float], side: int) -> tuple[Span, Span]:
    left, top = round(box[0]), round(box[1])
    right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
    return Span(left, right, side, 0, side), Span(top, bottom, side, 0, side)


def _resize_center(image: Image.Image, new_size: tuple[int, int], start: tuple[int, int], side: int) -> Pixels:
    """Resize only the centre of a very long image: the whole would fill the memory (1 x 5000 as 224 x 1,120,000)."""
    width, height = image.size
    across, down = width / new_size[0], height / new_size[1]
    left, top = start[0] * across, start[1] * down
    box = (left, top, min(left + side * across, width), min(top + side * down, height))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))


def _channels_first(pixels: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # [H, W, 3] -> [3, H, W]
