"""CLIP's preprocessing and the augmentations of training, as steps of which the first can be cached."""

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

from cliptune.preprocess.decode import MAX_PIXELS, Picture, load_picture, size_of
from cliptune.preprocess.resize import Pixels, Span, resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


VERSION = 1
"""Raised whenever the same picture gives other pixels or the same text other tokens: kept features go by it."""


CROP_AREA = (0.6, 1.0)


CROP_RATIO = (3 / 4, 4 / 3)


Transform = Callable[[Image.Image], Tensor]


class PixelTransform(ABC):
    """Preprocessing that ends in uint8 pixels `[3, R, R]`; `normalize` does the rest, on the model's device.

    It has two steps, so that the first one's result can be kept: `shrink` is the same each time, `finish` may vary.

    Args:
        resolution: R, in pixels.
        fast_decode: decode JPEGs no larger than needed, which changes the pixels a little.
    """

    def __init__(self, resolution: int, *, fast_decode: bool = False) -> None:
        self.resolution = resolution
        self.fast_decode = fast_decode

    @property
    @abstractmethod
    def kept_side(self) -> int:
        """Height and width of what `shrink` gives, in pixels."""

    @property
    @abstractmethod
    def shortest_side(self) -> int:
        """Size below which decoding would lose what `finish` needs, in pixels."""

    @property
    def key(self) -> str:
        """Name of the first step: pictures shrunk under the same key are the same."""
        return f"{type(self).__name__}-{self.kept_side}" + ("-fast" if self.fast_decode else "")

    @abstractmethod
    def shrink(self, picture: Picture) -> Pixels:
        """Bring a picture to uint8 `[kept_side, kept_side, 3]`."""

    @abstractmethod
    def finish(self, pixels: Pixels, size: tuple[int, int]) -> Tensor:
        """Turn what `shrink` gave for a picture of that width and height into uint8 `[3, R, R]`."""

    def load(self, source: str | Path | bytes) -> Picture:
        """Open a picture, by its path or its bytes, as this transform needs it; raises as `load_picture` does."""
        return load_picture(source, shortest_side=self.shortest_side if self.fast_decode else None)

    def __call__(self, picture: Picture) -> Tensor:
        """Turn an upright RGB picture into uint8 `[3, R, R]`."""
        return self.finish(self.shrink(picture), size_of(picture))


class CenterTransform(PixelTransform):
    """CLIP's own (`clip.clip._transform`): bicubic resize of the short side, centre crop; what is kept is final."""

    @property
    def kept_side(self) -> int:
        """The resolution."""
        return self.resolution

    @property
    def shortest_side(self) -> int:
        """The resolution."""
        return self.resolution

    def shrink(self, picture: Picture) -> Pixels:
        """Resize and crop."""
        width, height = size_of(picture)
        side = self.resolution
        short = min(width, height)
        new_width, new_height = int(side * width / short), int(side * height / short)
        left, top = round((new_width - side) / 2), round((new_height - side) / 2)
        if new_width * new_height > MAX_PIXELS:
            return _resize_center(picture, (new_width, new_height), (left, top), side)
        if not isinstance(picture, Image.Image):
            if height < 2 * width:
                return resize(picture, Span(0, width, new_width, left, side), Span(0, height, new_height, top, side))
            picture = Image.fromarray(picture[..., :3])  # there Pillow may take the columns first
        resized = picture.resize((new_width, new_height), Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + side, top + side)))

    def finish(self, pixels: Pixels, size: tuple[int, int]) -> Tensor:
        """Put the channels first."""
        return _channels_first(pixels)


class CropTransform(PixelTransform):
    """A random crop of 60 to 100% of the area, resized; with `color`, brightness, contrast and colours vary as well.

    Nothing flips, because captions say left and right; colours move little, because captions name them.

    Kept pictures are whole, squeezed to a square of about 1.5 times the resolution. A crop of one is resized a second
    time: it is a little softer than the same crop of the file, most of all along the longer side of a long picture.
    """

    def __init__(self, resolution: int, *, color: bool = False, fast_decode: bool = False) -> None:
        super().__init__(resolution, fast_decode=fast_decode)
        jitter = transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02)
        self.jitter = jitter if color else None

    @property
    def kept_side(self) -> int:
        """Size at which the smallest crop of a square picture still has the resolution's pixels."""
        return self.shortest_side

    @property
    def shortest_side(self) -> int:
        """Size at which the smallest crop of a square picture still has the resolution's pixels."""
        return math.ceil(self.resolution / math.sqrt(CROP_AREA[0] * CROP_RATIO[0]))

    def shrink(self, picture: Picture) -> Pixels:
        """Squeeze the whole picture to a square."""
        return _resize_part(picture, (0, 0, *size_of(picture)), self.kept_side)

    def finish(self, pixels: Pixels, size: tuple[int, int]) -> Tensor:
        """Crop as the whole picture would be cropped, and resize."""
        left, top, right, bottom = draw_crop(size)
        across, down = self.kept_side / size[0], self.kept_side / size[1]
        padded = np.empty((self.kept_side, self.kept_side, 4), dtype=np.uint8)
        for channel in range(3):  # several times as fast as all at once
            padded[..., channel] = pixels[..., channel]
        return self._crop(padded, (left * across, top * down, right * across, bottom * down))

    def __call__(self, picture: Picture) -> Tensor:
        """Crop the picture itself, and resize."""
        return self._crop(picture, draw_crop(size_of(picture)))

    def _crop(self, picture: Picture, box: tuple[float, float, float, float]) -> Tensor:
        pixels = _resize_part(picture, box, self.resolution)
        if self.jitter is not None:
            pixels = np.asarray(self.jitter(Image.fromarray(pixels)))
        return _channels_first(pixels)


def clip_transform(resolution: int) -> PixelTransform:
    """CLIP's own preprocessing: upright RGB picture to uint8 `[3, resolution, resolution]`, for `normalize`."""
    return CenterTransform(resolution)


def train_transform(resolution: int, augment: str, *, fast_decode: bool = False) -> PixelTransform:
    """Preprocessing for training: `none` is CLIP's own, `crop` takes random crops, `color` varies colours as well."""
    if augment == "none":
        return CenterTransform(resolution, fast_decode=fast_decode)
    return CropTransform(resolution, color=augment == "color", fast_decode=fast_decode)


def normalize(pixels: Tensor) -> Tensor:
    """Bring pixels `[..., 3, H, W]` to CLIP's mean and standard deviation, on the device where they are.

    Args:
        pixels: uint8; or float, which is taken as normalised already and returned as it is.

    Raises:
        ValueError: pixels of another type.
    """
    if pixels.is_floating_point():
        return pixels
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, or float and normalised, got {pixels.dtype}")
    mean, std = _moments(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=8)
def _moments(device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return mean, std


def draw_crop(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Draw a crop as `RandomResizedCrop` does, but the same one for every size in which a picture is decoded.

    Args:
        size: width and height.

    Returns:
        Left, top, right and bottom, not rounded: 60 to 100% of the area, 3:4 to 4:3; where ten draws do not fit, the
        largest crop of such a shape, from the centre.
    """
    width, height = size
    lowest, highest = CROP_RATIO
    for _ in range(10):
        share, shape, x, y = torch.rand(4).tolist()
        area = width * height * (CROP_AREA[0] + share * (CROP_AREA[1] - CROP_AREA[0]))
        ratio = lowest * (highest / lowest) ** shape
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            break
    else:
        across, down, x, y = min(width, height * highest), min(height, width / lowest), 0.5, 0.5
    left, top = x * (width - across), y * (height - down)
    return left, top, left + across, top + down


def _resize_part(picture: Picture, box: tuple[float, float, float, float], side: int) -> Pixels:
    """Crop a picture to whole pixels and resize it to uint8 `[side, side, 3]`."""
    left, top = round(box[0]), round(box[1])
    right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
    if isinstance(picture, Image.Image):
        part = picture.crop((left, top, right, bottom))
        return np.asarray(part.resize((side, side), Image.Resampling.BICUBIC))
    return resize(picture, Span(left, right, side, 0, side), Span(top, bottom, side, 0, side))


def _resize_center(picture: Picture, new_size: tuple[int, int], start: tuple[int, int], side: int) -> Pixels:
    """Resize only the square that is kept of a picture so long that the whole would fill the memory: 1 x 5000, say."""
    width, height = size_of(picture)
    across, down = width / new_size[0], height / new_size[1]
    left, top = start[0] * across, start[1] * down
    box = (left, top, min(left + side * across, width), min(top + side * down, height))
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture[..., :3])
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))


def _channels_first(pixels: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
