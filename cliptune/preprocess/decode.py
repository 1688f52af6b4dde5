"""Image files to upright RGB, the same for training, evaluation and use."""

from __future__ import annotations

import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from cliptune.preprocess import depth
from cliptune.preprocess.encoded import container_of, read_encoded
from cliptune.preprocess.image_formats import add_format, ending_of, unread_format
from cliptune.preprocess.resize import Pixels

# Pillow warns of odd metadata in images that it reads all the same; what it cannot read is an error without this
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 178_956_970
"""Where Pillow refuses by itself: a file of a few kilobytes may promise more pixels than the memory holds."""

MAX_BYTES = 10**9
"""Of an image's file, and of its pixels as they are decoded."""

_OF_DECODER = {"WEBP": 8, "JPEG2000": 12, "AVIF": 4, "HEIF": 8}
"""Bytes of each pixel that a decoder keeps beside the result."""
_KIND_OF_PAGE, _SUB_PAGES = 254, 330
"""TIFF's NewSubfileType and SubIFDs: where the first is 1, for a smaller copy, the other leads to the image itself."""
MAX_LEFT_BYTES, MAX_LEFT_PIXELS = 2**20, 2**24
"""Of a JPEG that is left encoded: many of them wait in memory, and some are decoded at once."""
_PART = re.compile(r"(.+\.tar)@(\d+)\+(\d+)/.*", re.DOTALL)

DecodedImage: TypeAlias = Image.Image | Pixels
"""Upright RGB: a Pillow image, or uint8 `[H, W, 4]` whose fourth channel is padding."""


class EncodedJpeg(NamedTuple):
    """A JPEG that any decoder makes nearly the same upright RGB image of."""

    content: bytes
    """Of its file."""
    size: tuple[int, int]
    """Width and height."""
    name: str
    """Its path; empty if only its bytes were given."""


def part_path(archive: str, offset: int, size: int, name: str) -> str:
    """Return a path by which an image inside an uncompressed tar file is read like any other: `x.tar@512+9000/a.jpg`.

    Args:
        archive: path of the tar file.
        offset: of the image's first byte in it.
        size: of the image's file, in bytes.
        name: of the image, which ends the path.
    """
    return f"{archive}@{offset}+{size}/{name}"


def read_bytes(path: str | Path) -> bytes:
    """Read a file, or an image inside another file: what `part_path`, `parquet_path` or `base64_path` names.

    Raises:
        OSError: it cannot be read, or has more than `MAX_BYTES`.
    """
    if container_of(str(path)):
        return read_encoded(str(path))
    part = _part(path)
    with _open(path if part is None else part[1]) as file:
        size = os.fstat(file.fileno()).st_size if part is None else int(part[3])
        if size > MAX_BYTES:
            raise OSError(f"{path}: {too_large(size)}")
        if part is not None:
            file.seek(int(part[2]))
        return file.read(size)


def too_large(num_bytes: int) -> str:
    """Say of a file that it is not read, since the whole would be in memory."""
    return f"a file of {num_bytes / 1e9:.1f} GB; at most {MAX_BYTES / 1e9:.0f} GB are read"


def read_ends(path: str | Path, num_bytes: int) -> tuple[int, bytes, bytes]:
    """Return the size of a file, or image inside another one, and up to `num_bytes` of its beginning and of its end.

    Of 6 KB and 4 KB asked for, the end is the other 2. Waits for no pipe.

    Raises:
        OSError: it cannot be read.
    """
    if container_of(str(path)):
        content = read_encoded(str(path))
        first = content[:num_bytes]
        return len(content), first, content[max(len(content) - num_bytes, len(first)) :]
    part = _part(path)
    with _open(path if part is None else part[1]) as file:
        start, size = (0, os.fstat(file.fileno()).st_size) if part is None else (int(part[2]), int(part[3]))
        file.seek(start)
        first = file.read(min(num_bytes, size))
        begin = max(size - num_bytes, len(first))
        file.seek(start + begin)
        return size, first, file.read(size - begin)


def _open(path: str | Path) -> BinaryIO:
    """Open a file, but no pipe, which would wait for a writer that never comes."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115  (its callers close it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path}: not a file")
    return file


def archive_of(path: str) -> str | None:
    """Return the tar, Parquet or base64 file that an image lies in; None if it is a file of its own."""
    part = _part(path)
    return container_of(path) if part is None else part[1]


def file_stamp(path: str | Path) -> tuple[int, int, int, int]:
    """Return what changes when a file is written to or replaced: size in bytes, both times in nanoseconds, inode.

    The second time, of the inode's change, is the system's own: `cp -p` and `rsync -t` copy only the first. A part of a
    tar file has the size of the part; an image in a Parquet or base64 file has what that file has.

    Raises:
        OSError: it is not there.
    """
    part = _part(path)
    file = (container_of(str(path)) or path) if part is None else part[1]
    found = os.stat(file)  # noqa: PTH116  (pathlib is several times as slow, and this runs once an image)
    size = found.st_size if part is None else int(part[3])
    return size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _part(path: str | Path) -> re.Match[str] | None:
    return _PART.fullmatch(str(path)) if ".tar@" in str(path) else None


def load_image(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image with Pillow, as upright RGB.

    Args:
        source: path of the file, or its bytes.
        max_pixels: an image of more is refused before it is decoded.

    Raises:
        ValueError: the file is no image, or a damaged one; names the file.
        OSError: no such file, or it cannot be read.
    """
    with _opened(source, max_pixels) as (image, data, name):
        return to_rgb(image, data, name)


def decode_image(
    source: str | Path | bytes, *, shortest_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> DecodedImage:
    """Decode an image to upright RGB the fastest way: a plain JPEG without Pillow, whose pixels are the same.

    Args:
        source: path of the file, or its bytes.
        shortest_side: decode a JPEG at 1/8 to 4/8 of its size, where no side then falls below this many pixels (more
            than a half gains little, and costs much of the sharpness); None: at its full size.
        max_pixels: an image of more is refused before it is decoded.

    Raises:
        ValueError: the file is no image, or a damaged one; names the file.
        OSError: no such file, or it cannot be read.
    """
    with _opened(source, max_pixels) as (image, data, name):
        pixels = _decode_jpeg(data, image, shortest_side)
        return to_rgb(image, data, name) if pixels is None else pixels


def open_image(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> EncodedJpeg | DecodedImage:
    """Leave a plain JPEG encoded, for a decoder elsewhere; decode any other image as `decode_image` does, which see."""
    with _opened(source, max_pixels) as (image, data, name):
        if _is_plain_jpeg(image, data):
            return EncodedJpeg(data, image.size, "" if isinstance(source, bytes) else str(source))
        pixels = _decode_jpeg(data, image, None)
        return to_rgb(image, data, name) if pixels is None else pixels


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Tell whether all decoders take a file for the same image, and a whole one."""
    if image.format != "JPEG" or image.mode not in {"RGB", "L"}:
        return False
    # the end-of-image marker: a decoder may fill what is missing without a word
    is_whole = data.rstrip(b"\0").endswith(b"\xff\xd9")
    # three components are YCbCr nearly always; Adobe's marker, or the components' names, say that they are RGB
    names = [layer[0] for layer in getattr(image, "layer", [])]
    is_rgb = image.info.get("adobe_transform") == 0 or names == list(b"RGB")
    is_small = len(data) <= MAX_LEFT_BYTES and image.width * image.height <= MAX_LEFT_PIXELS
    return is_whole and is_small and not is_rgb and image.getexif().get(ExifTags.Base.Orientation) not in _UPRIGHT


def image_format(data: bytes) -> str:
    """Return the format of an image file by its content, as a file of it ends: `jpeg`, `png`, `jp2`, ...

    Raises:
        ValueError: it is no image.
    """
    with _opened(data, MAX_PIXELS) as (image, *_):
        return ending_of(str(image.format))


@contextmanager
def _opened(source: str | Path | bytes, max_pixels: int) -> Iterator[tuple[Image.Image, bytes, str]]:
    """Give an image, not decoded yet, its file's bytes and name; what fails in the block is an error that names it."""
    data, name = (source, "") if isinstance(source, bytes) else (read_bytes(source), f"{source}: ")
    try:
        with _open_image(data) as image:
            if image.width * image.height > max_pixels:  # Pillow's own check goes by a setting of the process
                raise ValueError(f"more than {max_pixels} pixels")
            if (num_bytes := _bytes_to_decode(image)) > MAX_BYTES:
                raise ValueError(f"its pixels would take {num_bytes / 1e9:.1f} GB; at most {MAX_BYTES / 1e9:.0f} GB")
            if image.format == "EPS":  # which Pillow has a program run
                raise ValueError("PostScript, which is a program: convert it to an image")
            if isinstance(image, TiffImageFile):
                _refuse_misread(image)
            yield image, data, name.removesuffix(": ") or "an image"
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may end in any exception of Pillow's decoders
        raise ValueError(f"{name}cannot be read as an image: {_reason(error)}") from None


def _refuse_misread(image: TiffImageFile) -> None:
    """Refuse what Pillow would take for another image without a word."""
    tags = image.tag_v2
    if tags.get(_KIND_OF_PAGE) == 1 and _SUB_PAGES in tags:
        raise ValueError("its first page is a thumbnail, as in a camera's raw file: convert it to PNG or JPEG")
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,))
    is_planar = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and len(bits) > 1
    if is_planar and max(bits) > 8 and any(codec == "raw" for codec, *_ in image.tile):
        raise ValueError("planes of more than 8 bits without compression, which Pillow misreads: convert it to PNG")


def _open_image(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data))
    except UnidentifiedImageError:
        if not add_format(data):
            raise ValueError(unread_format(data)) from None
    try:
        return Image.open(BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("a damaged HEIC file") from None


def _bytes_to_decode(image: Image.Image) -> int:
    """Return how many bytes a decoder will hold, as the file's header says."""
    bands, num_pixels = len(image.getbands()), image.width * image.height
    if isinstance(image, TiffImageFile):  # its tiles may be larger than the image
        tile = (image.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        num_pixels = max(num_pixels, math.prod(tile))
    if image.info.get("progressive"):  # a JPEG whose coefficients, 16 bits each, are collected before pixels are made
        return num_pixels * 2 * bands
    size = {"I": 4, "F": 4}.get(image.mode, 2 if image.mode.startswith("I;16") else 1)
    size = size if bands == 1 else 4  # Pillow stores two and three bands as four
    return num_pixels * (size + _OF_DECODER.get(str(image.format), 0))


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    return str(error) if isinstance(error, OSError | ValueError) and str(error) else f"damaged ({error!r})"


def _decode_jpeg(data: bytes, image: Image.Image, shortest_side: int | None) -> Pixels | None:
    """Decode a JPEG of 8 bits, grey or colour; None: another file, or a damaged one."""
    if image.format not in {"JPEG", "MPO"} or image.mode not in {"RGB", "L"}:
        return None
    least = shortest_side or 0
    try:
        # RGBX, not RGB: a pixel of 4 bytes is one uint32, which `resize` and the turns below move as a whole
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGBX", min_height=least, min_width=least, min_factor=2)
    except ValueError:
        return None  # Pillow reads some of these, and says what is wrong with the others
    turned = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turned is None:
        return pixels
    upright = np.ascontiguousarray(turned(pixels.view(np.uint32)[..., 0]))  # [H, W] uint32
    return upright[..., None].view(np.uint8)  # [H, W, 4]


_UPRIGHT: dict[int, Callable[[Any], Any]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}
"""What sets an image upright, by its EXIF orientation."""


def to_rgb(image: Image.Image, data: bytes = b"", name: str = "an image") -> Image.Image:
    """Turn any Pillow image into 8-bit RGB: first frame, EXIF orientation applied, transparency laid on white.

    Deeper images are brought to 8 bits by the depth that their file or their values tell, see `depth`.

    Args:
        image: as Pillow has opened it.
        data: of its file, which may tell more than Pillow does.
        name: of the image, for what is said about it.
    """
    stored = depth.stored_as(image, data)
    if stored.raw:
        image = depth.colors(image, stored, name)
    if image.getexif().get(ExifTags.Base.Orientation) in _UPRIGHT:  # without one exif_transpose would copy
        image = ImageOps.exif_transpose(image)
        if image.mode == "RGB" and "transparency" not in image.info:
            return image  # which is a copy already
    if image.mode[0] in "IF":
        return depth.grey(image, stored, name).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        return _in_strips(image, _on_white)
    return image.convert("RGB")


def size_of(image: DecodedImage) -> tuple[int, int]:
    """Return an image's width and height, in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image to RGB some rows at a time: the copies on the way take up to eight times an image's memory."""
    if image.width * image.height <= depth.STRIP_PIXELS:
        return convert(image).convert("RGB")
    result = Image.new("RGB", image.size)
    for top, strip in depth.strips(image):
        result.paste(convert(strip).convert("RGB"), (0, top))
    return result


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
