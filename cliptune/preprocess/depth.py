"""Images of more than 8 bits a channel to 8: how deep their values are, by the file's word or by the values themselves.

A microscope's 12 bits are stored in 16, a scanner's grey in 32, a simulation's in floats: taken by what they are stored
in, such images would be black, or white.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import sys
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION, SAMPLEFORMAT, TiffImageFile

logger = logging.getLogger(__name__)

STRIP_PIXELS = 2**22

_FULL = 65535
_DEPTHS = (8, 10, 12, 14, 16, 24, 32)
_MAX_SAMPLE_VALUE = 281
_DEEP_COLORS = re.compile(r"(RGB|RGBX|RGBA|LA);16[BLN]")
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_said = np.frombuffer(mmap.mmap(-1, len(_DEPTHS) + 1), dtype=np.uint8)
"""What has been said, shared with workers that are forked: each kind once."""


class Stored(NamedTuple):
    """What a file says of its pixels."""

    raw: str = ""
    """How Pillow calls the storage of a colour image of 16 bits, of which it decodes the upper 8; else empty."""
    top: int | None = None
    """The largest value that there can be."""
    is_unsigned: bool = False
    """Pillow's int32 stand for uint32."""
    is_planar: bool = False
    data: bytes = b""
    """The file."""


def stored_as(image: Image.Image, data: bytes) -> Stored:
    """Return what an image's file says of its depth; asked before anything decodes the pixels, which forgets it.

    Args:
        image: as Pillow has opened it.
        data: of the file; empty: what is still open is read.
    """
    tiles: Any = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    raw = str(args if isinstance(args, str) else next(iter(args or ("",))))
    raw = raw if _DEEP_COLORS.fullmatch(raw) else ""
    if not raw and image.mode[0] not in "IF":
        return Stored()
    data = data or _content(image)
    if isinstance(image, TiffImageFile):
        bits, format_, top = (
            image.tag_v2.get(tag, 0) for tag in (BITSPERSAMPLE, SAMPLEFORMAT, _MAX_SAMPLE_VALUE)
        )  # a number, or one for each channel
        bits, format_, top = (value[0] if isinstance(value, tuple) else value for value in (bits, format_ or 1, top))
        word = top or (2**bits - 1 if bits and bits % 8 else None)
        is_planar = image.tag_v2.get(PLANAR_CONFIGURATION) == 2
        return Stored(raw, word, format_ == 1 and image.mode == "I", is_planar, data)
    if image.format in {"PPM", "JPEG2000"}:  # Pillow has brought their values to 16 bits already
        return Stored(raw, _FULL, data=data)
    depth = _significant_bits(data)
    return Stored(raw, 2**depth - 1 if depth else None, data=data)


def _content(image: Image.Image) -> bytes:
    file = getattr(image, "fp", None)
    if file is None:
        return b""
    position = file.tell()
    file.seek(0)
    content: bytes = file.read()
    file.seek(position)
    return content


def _significant_bits(data: bytes) -> int:
    """Return the most bits that a PNG's sBIT names; 0 without one."""
    start = 8
    while start + 12 <= len(data) and data[start + 4 : start + 8] not in {b"IDAT", b"PLTE"}:
        size = int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == b"sBIT":
            return max(data[start + 8 : start + 8 + size], default=0)
        start += size + 12
    return 0


def grey(image: Image.Image, stored: Stored, name: str) -> Image.Image:
    """Turn an image of integers or floats into grey of 8 bits, `L`; what is transparent becomes white."""
    low, high = _extrema(image, stored)
    low, high = _float_range(low, high) if image.mode == "F" else _integer_range(low, high, stored.top)
    if (low, high) not in ({(0, 1), (0, 255)} if image.mode == "F" else {(0, _FULL), (0, stored.top)}):
        _say_once(name, low, high)
    key = image.info.get("transparency")
    result = Image.new("L", image.size)
    for top, strip in strips(image):
        values = _values(strip, stored)
        scaled = (values.astype(np.float64) - low) * (255 / ((high - low) or 1))
        pixels = np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8)
        if isinstance(key, int):
            pixels[values == key] = 255
        result.paste(Image.fromarray(pixels), (0, top))
    return result


def _extrema(image: Image.Image, stored: Stored) -> tuple[float, float]:
    """Return the smallest and the largest value that is a number."""
    low, high = np.inf, -np.inf
    for _, strip in strips(image):
        values = _values(strip, stored)
        finite = np.isfinite(values)
        low = min(low, values.min(initial=np.inf, where=finite)) if image.mode == "F" else min(low, int(values.min()))
        high = max(high, values.max(initial=-np.inf, where=finite) if image.mode == "F" else int(values.max()))
    return (float(low), float(high)) if low <= high else (0.0, 1.0)


def _values(strip: Image.Image, stored: Stored) -> Any:
    values = np.asarray(strip)  # [H, W]
    return values.view(np.uint32) if stored.is_unsigned and values.dtype == np.int32 else values


def _integer_range(low: float, high: float, word: int | None) -> tuple[float, float]:
    if low < 0:
        return low, high
    if word is not None and high <= word:
        return 0, word
    return 0, next(2**bits - 1 for bits in _DEPTHS if high < 2**bits)


def _float_range(low: float, high: float) -> tuple[float, float]:
    """Return what is black and white: of 0 to 1, 0 to 255 and the image's own range the first that fits.

    What resampling leaves beyond the range, a tenth, is cut.
    """
    tops = (top for top in (1, 255) if high <= 1.1 * top and low >= -0.1 * high)
    return next(((0, top) for top in tops), (low, high))


def colors(image: Image.Image, stored: Stored, name: str) -> Image.Image:
    """Bring an image of 16 bits a channel to 8, the upper ones unless its values need no more than 14 bits.

    Pillow has no such image in memory, but decodes either byte of each value: with the bytes swapped, the lower one.

    Raises:
        ValueError: it does not, of an image whose lower bytes matter.
    """
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    extrema: Any = image.getextrema()  # of the upper bytes; Pillow has LA of 16 bits as RGBA
    key = image.info.get("transparency")
    is_full = max(high for _, high in extrema[:3]) >= 2**6 or stored.top == _FULL
    if not stored.data or (is_full and key is None):
        return image
    if stored.is_planar:  # where Pillow decodes no other byte than the upper
        raise ValueError("planes of 16 bits whose values need fewer, which Pillow misreads: convert it to PNG")
    lower = _lower_bytes(stored)
    largest = np.max([values.max((0, 1)) for _, values in _wide_strips(image, lower, stored)], axis=0)  # [C]
    _, white = _integer_range(0, int(largest[:3].max()), stored.top)
    if not is_full and white not in {_FULL, stored.top}:
        _say_once(name, 0, white)
    # opaque may be 65535 all the same
    tops = np.array([white] * 3 + [_integer_range(0, int(alpha), None)[1] for alpha in largest[3:]])
    result = Image.new(image.mode if key is None else "RGBA", image.size)
    for top, values in _wide_strips(image, lower, stored):
        pixels = (values >> 8 if is_full else (values * (255 / tops)).round()).astype(np.uint8)
        if key is not None:
            opacity = np.where((values == key).all(-1, keepdims=True), 0, 255).astype(np.uint8)
            pixels = np.concatenate([pixels, opacity], axis=-1)
        result.paste(Image.fromarray(pixels), (0, top))
    if orientation is not None:
        result.getexif()[ExifTags.Base.Orientation] = orientation
    return result


def _wide_strips(image: Image.Image, lower: Image.Image, stored: Stored) -> Iterator[tuple[int, Any]]:
    """Yield the first row of each strip and its values of 16 bits, `[H, W, C]`, put together of both bytes."""
    for top, strip in strips(image):
        low = np.asarray(lower.crop((0, top, image.width, top + strip.height)))
        low = low[..., [1, 1, 1, 3]] if stored.raw.startswith("LA") else low
        yield top, np.asarray(strip).astype(np.uint16) << 8 | low


def _lower_bytes(stored: Stored) -> Image.Image:
    image: Any = Image.open(BytesIO(stored.data))
    raw = stored.raw[:-1] + _SWAPPED[stored.raw[-1]]
    if stored.raw.startswith("LA"):  # which Pillow swaps not: four bytes a pixel as they are
        image._mode = raw = "RGBA"
    for number, tile in enumerate(image.tile):
        args = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
        image.tile[number] = getattr(tile, "_make", tuple)((*tile[:3], args))  # a plain tuple before Pillow 11
    image.load()
    return image  # type: ignore[no-any-return]


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row and the pixels of each strip: copies of the whole would take several times its memory."""
    num_rows = max(STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, num_rows):
        yield top, image.crop((0, top, image.width, min(top + num_rows, image.height)))


def _say_once(name: str, low: float, high: float) -> None:
    """Warn of a depth for the first time: in rank 0, by whichever of its workers finds it first."""
    kind = next((kind for kind, bits in enumerate(_DEPTHS) if (low, high) == (0, 2**bits - 1)), len(_DEPTHS))
    if not _said[kind] and os.environ.get("RANK", "0") == "0":
        _said[kind] = 1
        logger.warning(
            "%s: its values are taken to be from %g, black, to %g, white, since the file does not say how deep it is "
            "(said once for each depth)", name, low, high,
        )  # fmt: skip
