"""A picture to pixels, a string to tokens; augmentation. The same for training, evaluation and use."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cliptune.preprocess.resize import Pixels

# Pillow says of a picture that it will read that something in it is odd; what cannot be read is an error all the same
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 178_956_970
"""A picture of more pixels is bad: where Pillow's own limit lies, beyond which a small file could fill the memory."""

_PART = re.compile(r"(.+\.tar)@(\d+)\+(\d+)/.*", re.DOTALL)

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


def size_of(picture: Picture) -> tuple[int, int]:
    """Return a picture's width and height, in pixels."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


def _to_8_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    if image.mode != "F":
        pixels = pixels / 257
    elif np.nanmax(pixels, initial=0) <= 1:
        pixels = pixels * 255
    return Image.fromarray(np.nan_to_num(pixels).round().clip(0, 255).astype(np.uint8))
