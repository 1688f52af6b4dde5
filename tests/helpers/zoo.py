"""Every kind of odd and broken image, caption and index that a user may have, made small."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

CORNERS = {"top left": (255, 0, 0), "top right": (0, 255, 0), "bottom left": (0, 0, 255), "bottom right": (0, 0, 0)}
TURNS = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def corners(width: int = 64, height: int = 48) -> Image.Image:
    """An image whose four quarters tell whether it is upright: red, green / blue, black."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = (255, 0, 0), (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    return Image.fromarray(pixels)


class Good(NamedTuple):
    """An image that must be read: what is written, its size upright, and whether its quarters have their colours."""

    write: Callable[[Path], Any]
    size: tuple[int, int] = (64, 48)
    shows_corners: bool = True


def saved(image: Image.Image, form: str, **options: Any) -> Callable[[Path], Any]:
    return lambda path: image.save(path, form, **options)


def turned(orientation: int) -> Callable[[Path], Any]:
    """A JPEG that its EXIF orientation sets upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turn = TURNS[orientation]
    image = corners() if turn is None else corners().transpose(turn)
    return saved(image, "JPEG", exif=exif, quality=95)


def animated(form: str) -> Callable[[Path], Any]:
    """The image, then a white one."""
    options = {"lossless": True} if form == "WEBP" else {}
    white = Image.new("RGB", (64, 48), "white")
    return saved(corners(), form, save_all=True, append_images=[white], **options)


def transparent_palette(path: Path) -> None:
    """A palette image with bytes of transparency, of which Pillow warns."""
    image = corners().quantize(8)
    image.save(path, "PNG", transparency=bytes([255] * 7 + [0]))


def with_exif(content: bytes) -> Callable[[Path], Any]:
    return saved(corners(), "JPEG", exif=b"Exif\0\0" + content, quality=95)


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG of 1 bit a pixel, whatever size its head tells."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def linked(path: Path) -> None:
    target = path.with_name("target of link.bin")
    target.write_bytes(jpeg_bytes(quality=95))
    path.symlink_to(target.name)


def jpeg_bytes(image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = BytesIO()
    (image or corners()).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def huge_jpeg() -> bytes:
    """A JPEG whose head promises 65,000 x 65,000 pixels."""
    content = jpeg_bytes()
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", 65000, 65000) + content[place + 4 :]


GOOD: dict[str, Good] = {
    "plain.jpg": Good(saved(corners(), "JPEG", quality=95)),
    "wrong-ending-png.jpg": Good(saved(corners(), "PNG")),
    "wrong-ending-jpeg.png": Good(saved(corners(), "JPEG", quality=95)),
    "1x1.png": Good(saved(Image.new("RGB", (1, 1)), "PNG"), (1, 1), shows_corners=False),
    "1x5000.png": Good(saved(Image.new("RGB", (1, 5000)), "PNG"), (1, 5000), shows_corners=False),
    "5000x1.jpg": Good(saved(Image.new("RGB", (5000, 1)), "JPEG"), (5000, 1), shows_corners=False),
    "1x20000.jpg": Good(saved(Image.new("RGB", (1, 20000)), "JPEG"), (1, 20000), shows_corners=False),
    "panorama.jpg": Good(saved(corners(30000, 200), "JPEG", quality=95), (30000, 200)),
    "between-the-limits.png": Good(
        lambda path: path.write_bytes(png(10000, 9000, bytes(9000 * 1251))), (10000, 9000), shows_corners=False
    ),
    "cmyk.jpg": Good(saved(corners().convert("CMYK"), "JPEG", quality=95)),
    "cmyk.tif": Good(saved(corners().convert("CMYK"), "TIFF")),
    "16-bit.png": Good(saved(Image.new("I;16", (64, 48), 65535), "PNG"), shows_corners=False),
    "float.tif": Good(saved(Image.new("F", (64, 48), 0.5), "TIFF"), shows_corners=False),
    "1-bit.png": Good(saved(corners().convert("1"), "PNG"), shows_corners=False),
    "lab.tif": Good(saved(Image.new("LAB", (64, 48)), "TIFF"), shows_corners=False),
    "palette-transparent.png": Good(transparent_palette, shows_corners=False),
    "animated.gif": Good(animated("GIF")),
    "animated.webp": Good(animated("WEBP")),
    "broken-icc.jpg": Good(saved(corners(), "JPEG", icc_profile=b"no profile at all", quality=95)),
    "broken-icc.png": Good(saved(corners(), "PNG", icc_profile=b"\0" * 40)),
    "broken-exif.jpg": Good(with_exif(b"II*\0\x08\0\0\0\xff\xff broken")),
    "no-exif-at-all.jpg": Good(with_exif(b"no TIFF head")),
    "trailing-bytes.jpg": Good(lambda path: path.write_bytes(jpeg_bytes(quality=95) + bytes(1000))),
    "name with spaces.jpg": Good(saved(corners(), "JPEG", quality=95)),
    "emoji 🦊 名.jpg": Good(saved(corners(), "JPEG", quality=95)),
    "new\nline.jpg": Good(saved(corners(), "JPEG", quality=95)),
    "link.jpg": Good(linked),
    **{f"exif-{number}.jpg": Good(turned(number)) for number in TURNS},
}  # fmt: skip

BAD: dict[str, Callable[[Path], Any]] = {
    "zero-byte.jpg": lambda path: path.write_bytes(b""),
    "truncated.jpg": lambda path: path.write_bytes(jpeg_bytes(corners(640, 480))[:2500]),
    "cut-in-the-head.jpg": lambda path: path.write_bytes(jpeg_bytes()[:30]),
    "truncated.png": lambda path: path.write_bytes(png(4000, 3000, os.urandom(3000 * 501))[:100000]),
    "text.jpg": lambda path: path.write_text("<html>404 not found</html>"),
    "index.jpg": lambda path: path.write_text('[{"image": "x.jpg"}]'),
    "bomb.png": lambda path: path.write_bytes(png(40000, 40000, bytes(1000))),
    "bomb.jpg": lambda path: path.write_bytes(huge_jpeg()),
    "garbage.gif": lambda path: path.write_bytes(b"GIF89a\xff\xff\xff\xff\x00\x00\x00" + bytes(100)),
    "damaged-chunk.png": lambda path: path.write_bytes(png(64, 48, bytes(48 * 9)).replace(b"IDAT", b"IDAS")),
    "random.jpg": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 8),
    "garbage.tif": lambda path: path.write_bytes(b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 4),
    "garbage.webp": lambda path: path.write_bytes(b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(range(256))),
}
"""Files that are there, and are no images."""

ABSENT: dict[str, Callable[[Path], Any]] = {
    "missing.jpg": lambda path: None,
    "folder.jpg": lambda path: path.mkdir(),
    "dangling.jpg": lambda path: path.symlink_to("nowhere.jpg"),
    "looping.jpg": lambda path: path.symlink_to("looping.jpg"),
    "pipe.jpg": os.mkfifo,
    "x" * 300 + ".jpg": lambda path: None,
}
"""What reading the index finds out: no files."""

CAPTIONS: dict[str, tuple[str, bool]] = {
    "empty": ("", False),
    "blank": (" \t\n ", False),
    "NUL": ("a \0 byte", False),
    "half a character": ("half \ud83e", False),
    "10,000 words": ("word " * 10000, True),
    "a word of 100,000 letters": ("".join(map(chr, np.random.default_rng(0).integers(97, 123, 100_000))), True),
    "right to left": ("שלום עולם \u202e مرحبا", True),
    "emoji": ("🦊🦊🏽\u200d🚀", True),
    "one mark": (".", True),
    "control characters": ("bell \x07 and escape \x1b[31m", True),
    "html": ("&amp;amp; <b>", True),
}
"""A caption, and whether it can be used."""


def index_bytes(image: str = "plain.jpg") -> Iterator[tuple[str, bytes]]:
    """Index files that are wrong as a whole, by what is wrong; `image` is there."""
    row: dict[str, Any] = {"image": image, "caption": "fine"}
    good = json.dumps([row] * 3)
    yield "nothing", b""
    yield "blank lines", b"\n \n\n"
    yield "a BOM alone", b"\xef\xbb\xbf"
    yield "0 rows", b"[]"
    yield "an empty object", b"{}"
    yield "cut off", good[:-20].encode()
    yield "trailing text", (good + "]").encode()
    yield "invalid UTF-8", good.replace("fine", "caf\xe9").encode("latin-1")
    yield "UTF-16 without its mark", good.encode("utf-16-le")
    yield "100 levels of nesting", b"[" * 100 + b"]" * 100
    yield "100 levels in a caption", (f'[{{"image": "{image}", "caption": ' + "[" * 100 + "]" * 100 + "}]").encode()
    yield "100,000 levels of nesting", b"[" * 100_000
    yield "100,000 levels of objects", b'{"a":' * 100_000
    yield "a number", b"7"
    yield "a text", b'"text"'
    yield "null", b"null"
    yield "NaN", b"NaN"
    yield "a list of numbers", b"[1, 2, NaN, Infinity]"
    yield "no caption key", json.dumps([{"image": image}]).encode()
    yield "no image key", json.dumps([{"caption": "x"}]).encode()
    values: dict[str, Any] = {"null": None, "NaN": float("nan"), "number": 7, "list": [], "object": {}, "true": True}
    for kind, value in values.items():
        yield f"image is {kind}", json.dumps([{**row, "image": value}]).encode()
        if kind != "number":  # which is the text of the number
            yield f"caption is {kind}", json.dumps([{**row, "caption": value}]).encode()
        yield f"split is {kind}", json.dumps([{**row, "split": value or [value]}]).encode()
    yield "COCO without images", b'{"images": [], "annotations": []}'
    yield "COCO of wrong types", b'{"images": [1, {"id": []}, {"id": NaN}], "annotations": [null, {"image_id": {}}]}'
    yield "Karpathy of wrong types", b'{"images": [{"filename": "x.jpg", "sentences": [true, {"raw": []}]}]}'
    yield "a mapping to no text", json.dumps({image: [True, None, {}]}).encode()
    yield "CSV of a header alone", b"image,caption\n"
    yield "CSV with a backslash before a quote", f'image,caption\n{image},"fine \\"one\\""\n'.encode()
    yield "CSV with too few cells", f"image,caption\n{image}\n".encode()
    yield "CSV with a column twice", f"image,caption,caption\n{image},a,b\n".encode()
    yield "CSV with NUL bytes", b"image,caption\n\0,\0\n"
    yield "one line of 1 MB", b"x" * 1_000_000
    yield "numbers of 10,000 digits", json.dumps([{**row, "image": 0}]).replace("0", "9" * 10_000).encode()
