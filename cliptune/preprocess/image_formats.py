"""Which files are images, by their endings; and what a file is that cannot be read as one, by its first bytes."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib import import_module

from PIL import Image, features

Image.preinit()  # the usual formats first: Pillow tries its formats in this order
Image.init()

COMMON_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
"""Of several images for one caption, as a.jpg and a.psd are, the one of such an ending is meant."""

_NOT_DECODED = frozenset(("BUFR", "GRIB", "HDF5", "MPEG"))
"""Formats that Pillow knows by their beginning, and that are no images."""
_READ = frozenset(
    ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN and name not in _NOT_DECODED
)
_OTHERS = (
    ".ai .arw .avif .cr2 .cr3 .dcm .djvu .dng .eps .exr .hdr .heic .heif .hif .jxl .jxr .mpo .nef .orf .pdf .pef .psb "
    ".raf .raw .rw2 .srw .svg .svgz .xcf"
)
IMAGE_ENDINGS = COMMON_ENDINGS | _READ | frozenset(_OTHERS.split())
"""Of all image files: those that Pillow reads, and those of which reading says what they are."""

_CONVERT = "convert it to PNG or JPEG"
_HAS_AVIF = ".avif" in _READ and features.check("avif")
_AVIF = "a damaged AVIF file" if _HAS_AVIF else "AVIF, which this Pillow does not read: pip install -U pillow"
_HEIC = "HEIC, which Pillow reads with: pip install pillow-heif"
_RAW = f"a camera's raw file: {_CONVERT}"
_BEGINNINGS = (
    (rb"$", "an empty file"),
    (rb"(?s).{4}ftyp(avi[fs]|m[is]f1.{0,40}avif)", _AVIF),
    (rb"(?s).{4}ftyp(he[im][cvxms]|hev[cxms]|m[is]f1)", _HEIC),
    (rb"(?s).{4}ftypcrx |II.{6}CR|FUJIFILM|IIR[OS]|MMOR|II\x55\0", _RAW),
    (rb"(?s).{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI ", "a video: save its frames as images"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", f"JPEG XL: {_CONVERT}"),
    (rb"II\xbc", f"JPEG XR: {_CONVERT}"),
    (rb"v/1\x01|#\?RADIANCE|#\?RGBE", f"an image of high dynamic range: {_CONVERT}"),
    (rb"(?s)\s*<!doctype html|\s*<html", "a web page, as a download that failed leaves it"),
    (rb"(?s).{0,900}<svg", f"SVG, a drawing and no raster image: {_CONVERT}"),
    (rb"%PDF|%!PS|\xc5\xd0\xd3\xc6", f"a document: {_CONVERT}"),
    (rb"gimp xcf|8BPS\x00\x02|AT&TFORM", f"a format that Pillow does not read: {_CONVERT}"),
    (rb"(?s).{128}DICM", f"DICOM: {_CONVERT}"),
    (rb"version https://git-lfs", "a pointer of Git LFS: fetch the image with `git lfs pull`"),
    (rb"\x1f\x8b|PK\x03\x04", "a compressed file: unpack it"),
)  # fmt: skip


def ending_of(name: str) -> str:
    """Return an ending of files of one of Pillow's formats, without the dot: `jpeg`, `png`; `jp2` for JPEG2000."""
    if f".{name.lower()}" in IMAGE_ENDINGS:
        return name.lower()
    return next((ending[1:] for ending, other in Image.registered_extensions().items() if other == name), "img")


def unread_format(data: bytes) -> str:
    """Say what a file is that is no image for Pillow, and what to do; "of no known format" for any other."""
    head = data[:1024]
    found = (what for beginning, what in _BEGINNINGS if re.match(beginning, head, re.IGNORECASE))
    return next(found, "of no known format")


def add_format(data: bytes) -> bool:
    """Have Pillow read HEIC files with `pillow-heif`, if this is one and the package is there; tell whether it is."""
    if unread_format(data) == _HEIC:
        with suppress(ImportError):
            import_module("pillow_heif").register_heif_opener()
            return True
    return False
