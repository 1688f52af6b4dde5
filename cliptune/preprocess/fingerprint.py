"""What an image is recognised by in another size, encoding or brightness, or slightly cropped: hashes and small pixels.

The hash is the perceptual hash of pHash (C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions", 2010): which of the lowest 8 x 8 coefficients of a cosine transform of 32 x 32 grey pixels are above their
median. The constant one is left out, so there are 63 bits. A crop changes them, so the centre is hashed as well: where
one image is a crop of another, its whole resembles the other's centre.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliptune.preprocess.decode import DecodedImage, size_of
from cliptune.preprocess.resize import Pixels

SIDE = 32
"""Of the small pixels, and of the grey ones that are hashed."""
CROPS = (1.0, 0.95, 0.9)
"""Fractions of both sides that are hashed, from the centre."""
NUM_HASHES = 2 * len(CROPS)
DECODED_SIDE = 192
"""Pixels that the shorter side needs for a fingerprint."""
_THUMB = 3 * SIDE
_BORDER = 24
"""Levels that a pixel may differ from a plain border's colour."""
_OF_EDGE = 0.25
"""Fraction of the outermost pixels that may differ from it all the same."""
_LEAST_INSIDE = 12
"""Pixels of the thumbnail that must be left of a side without its border."""
_GREY = np.array([0.299, 0.587, 0.114])

FINGERPRINT = np.dtype([("hashes", "<u8", NUM_HASHES), ("pixels", "u1", (SIDE, SIDE, 3))])
"""`hashes`: of the three crops, then of those of the image without a plain border. `pixels`: of the whole image."""


def fingerprint(image: DecodedImage) -> NDArray[Any]:
    """Return an image's fingerprint, a scalar array of `FINGERPRINT`.

    Args:
        image: decoded at any size; from about `DECODED_SIDE` pixels on the size hardly matters.
    """
    small = _thumbnail(image)
    thumb = np.asarray(small)
    grey = thumb @ _GREY  # [96, 96]
    whole = (0, 0, _THUMB, _THUMB)
    inside = _without_border(thumb)
    hashes = _hashes(grey, whole)
    found = np.zeros((), dtype=FINGERPRINT)
    found["hashes"] = hashes + (hashes if inside == whole else _hashes(grey, inside))
    found["pixels"] = small.reduce(3)
    return found


def _thumbnail(image: DecodedImage) -> Image.Image:
    """Squeeze an image to 96 x 96 pixels."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.ascontiguousarray(image[..., :3]))
    kernel = Image.Resampling.BOX if min(size_of(image)) >= _THUMB else Image.Resampling.BICUBIC
    return image.resize((_THUMB, _THUMB), kernel)


def _without_border(thumb: Pixels) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what is inside a border of one colour; all of it where there is none."""
    pixels = thumb.astype(np.int16)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    color = np.median(edge, axis=0).astype(np.int16)
    if (np.abs(edge - color).max(axis=1) > _BORDER).mean() > _OF_EDGE:
        return 0, 0, _THUMB, _THUMB
    differs = np.abs(pixels - color).max(axis=2) > _BORDER
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    if len(rows) == 0 or min(np.ptp(rows), np.ptp(columns)) < _LEAST_INSIDE:
        return 0, 0, _THUMB, _THUMB
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _hashes(grey: NDArray[np.float64], box: tuple[int, int, int, int]) -> list[int]:
    left, top, right, bottom = box
    hashes = []
    for fraction in CROPS:
        across, down = _transform(left, right, fraction), _transform(top, bottom, fraction)
        coefficients = (down @ grey @ across.T).ravel()[1:]  # [63]
        # coefficients of a symmetric image are 0 up to rounding, which must not decide
        bits = np.packbits(coefficients > np.median(coefficients) + 1e-6, bitorder="little")
        hashes.append(int.from_bytes(bits.tobytes(), "little"))
    return hashes


@lru_cache(maxsize=4096)
def _transform(start: int, stop: int, fraction: float) -> NDArray[np.float64]:
    """Return what takes the centre of a span of the thumbnail to its 8 lowest coefficients, `[8, 96]`.

    It averages the span into 32 pixels, then is the cosine transform of them.
    """
    margin = (stop - start) * (1 - fraction) / 2
    edges = np.linspace(start + margin, stop - margin, SIDE + 1)
    positions = np.arange(_THUMB)
    overlap = np.minimum(edges[1:, None], positions + 1) - np.maximum(edges[:-1, None], positions)
    average = np.maximum(overlap, 0) / (edges[1] - edges[0])  # [32, 96]
    cosines = np.cos(np.pi * (2 * np.arange(SIDE) + 1) * np.arange(8)[:, None] / (2 * SIDE))  # [8, 32]
    transform: NDArray[np.float64] = cosines @ average
    return transform
