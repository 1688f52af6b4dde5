"""A picture to pixels, a string to tokens; augmentation. The same for training, evaluation and use."""

from __future__ import annotations

import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import transforms

from resampling import Pixels, Span, resize
from runtime import import_clip

# Pillow says of a picture that it will read that something in it is odd; what cannot be read is an error all the same
warnings.filterwarnings("ignore", module=r"PIL\.")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CONTEXT_LENGTH = 77
VERSION = 1
"""Raised whenever the same picture gives other pixels or the same text other tokens: kept features go by it."""
MAX_PIXELS = 178_956_970
"""A picture of more pixels is bad: where Pillow's own limit lies, beyond which a small file could fill the memory."""
CROP_AREA = (0.6, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

_LONG_WORD = re.compile(r"(\S{4096})\S+")
_PART = re.compile(r"(.+\.tar)@(\d+)\+(\d+)/.*", re.DOTALL)

Transform = Callable[[Image.Image], Tensor]
Picture: TypeAlias = Image.Image | Pixels
"""Upright RGB: a Pillow image, or uint8 `[H, W, 4]` whose fourth channel is padding."""


def part_path(archive: str, offset: int, size: int, name: str) -> str:
    """Return a path by which a picture inside an uncompressed tar file is read like any other: `x.tar@512+9000/a.jpg`.

    Args:
        archive: path of the tar file.
        offset: where the picture's bytes begin in it.
        size: how many they are.
        name: of the picture, which ends the path.
    """
    return f"{archive}@{offset}+{size}/{name}"


def read_bytes(path: str | Path) -> bytes:
    """Read a file, or the part of a tar file that `part_path` names.

    Raises:
        OSError: it cannot be read.
    """
    part = _part(path)
    if part is None:
        return Path(path).read_bytes()
    with Path(part[1]).open("rb") as file:
        file.seek(int(part[2]))
        return file.read(int(part[3]))


def file_stamp(path: str | Path) -> tuple[int, int]:
    """Return a file's size in bytes and its time of change in nanoseconds; those of a part of a tar file likewise.

    Raises:
        OSError: it is not there.
    """
    part = _part(path)
    status = os.stat(path if part is None else part[1])  # noqa: PTH116  (a million times faster matters)
    return status.st_size if part is None else int(part[3]), status.st_mtime_ns


def _part(path: str | Path) -> re.Match[str] | None:
    return _PART.fullmatch(str(path)) if ".tar@" in str(path) else None


def load_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open a picture as upright RGB.

    Raises:
        ValueError: the file is no picture, or a damaged one; names the file.
        FileNotFoundError: no such file.
    """
    try:
        is_part = isinstance(source, str | Path) and _part(source) is not None
        with Image.open(BytesIO(read_bytes(str(source))) if is_part else source) as image:
            _check_size(image)
            return to_rgb(image)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{source}: cannot be read as a picture: {_reason(error)}") from None


def load_picture(source: str | Path | bytes, *, shortest_side: int | None = None) -> Picture:
    """Open a picture as upright RGB the fastest way: a plain JPEG without Pillow, from which its pixels do not differ.

    Args:
        source: path of the file, or its bytes.
        shortest_side: decode a JPEG at 1/8 to 4/8 of its size, where no side then falls below this many pixels (more
            than a half gains little, and costs much of the sharpness); None: at its full size.

    Raises:
        ValueError: the file is no picture, or a damaged one; names the file.
        FileNotFoundError: no such file.
    """
    data, place = (source, "") if isinstance(source, bytes) else (read_bytes(source), f"{source}: ")
    try:
        with Image.open(BytesIO(data)) as image:
            _check_size(image)
            pixels = _decode_jpeg(data, image, shortest_side)
            return to_rgb(image) if pixels is None else pixels
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{place}cannot be read as a picture: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Say why Pillow gave up; a damaged file may end in any exception of its decoders."""
    if isinstance(error, UnidentifiedImageError):
        return "of no known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    return str(error) if isinstance(error, OSError | ValueError) and str(error) else f"damaged ({error!r})"


def _check_size(image: Image.Image) -> None:
    """Refuse a picture before it is decoded; Pillow's own check depends on a setting of the process."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS} pixels")


def _decode_jpeg(data: bytes, image: Image.Image, shortest_side: int | None) -> Pixels | None:
    """Decode a JPEG of 8 bits, grey or colour; None: it is something else, or damaged, so Pillow shall judge it."""
    if image.format not in {"JPEG", "MPO"} or image.mode not in {"RGB", "L"}:
        return None
    least = shortest_side or 0
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGBX", min_height=least, min_width=least, min_factor=2)
    except ValueError:
        return None
    turned = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turned is None:
        return pixels
    upright = np.ascontiguousarray(turned(pixels.view(np.uint32)[..., 0]))
    return upright[..., None].view(np.uint8)


_UPRIGHT: dict[int, Callable[[Any], Any]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}
"""What sets a picture upright, by its EXIF orientation."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any Pillow image into 8-bit RGB: first frame, EXIF orientation applied, transparency laid on white.

    16-bit grey keeps its range (divided by 257); float images are taken as [0, 1] if they stay within it.
    """
    if image.getexif().get(ExifTags.Base.Orientation) in _UPRIGHT:  # without one exif_transpose would copy
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


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


def size_of(picture: Picture) -> tuple[int, int]:
    """Return a picture's width and height, in pixels."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


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


def tokenize(texts: Sequence[str], context_length: int = CONTEXT_LENGTH) -> tuple[Tensor, int]:
    """Tokenise with CLIP's byte-pair encoding.

    Returns:
        Tokens, int64 `[len(texts), context_length]`, padded with 0 after the end-of-text token, which a text that is
        too long keeps as its last; and how many texts were too long.
    """
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    num_truncated = 0
    for row, text in enumerate(texts):
        ids = _encode(text)
        if len(ids) > context_length:
            ids = [*ids[: context_length - 1], ids[-1]]
            num_truncated += 1
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, num_truncated


def count_tokens(text: str) -> int:
    """Count a text's tokens, start and end included; more than 77 are truncated in training."""
    return len(_encode(text))


def _encode(text: str) -> list[int]:
    tokenizer = _tokenizer()
    encoder: dict[str, int] = tokenizer.encoder
    # the time for a word grows with the square of its length, and no tokens that count are so far behind
    text = _LONG_WORD.sub(r"\1", text)
    return [encoder["<|startoftext|>"], *tokenizer.encode(text), encoder["<|endoftext|>"]]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return import_clip().simple_tokenizer.SimpleTokenizer()


def _to_8_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    if image.mode != "F":
        pixels = pixels / 257
    elif np.nanmax(pixels, initial=0) <= 1:
        pixels = pixels * 255
    return Image.fromarray(np.nan_to_num(pixels).round().clip(0, 255).astype(np.uint8))
