"""Pillow's bicubic resize, bit for bit, at several times its speed.

A resize is two passes of weighted sums in 22-bit fixed point: along the rows, rounded to 8 bits, then down the columns.
Here only what is kept is computed, and each sum runs over many pixels at once; for the first pass 16 rows at a time are
transposed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]

SUPPORT = 2.0  # reach of the cubic, in output pixels where the picture shrinks
CURVATURE = -0.5  # Pillow's and CLIP's; OpenCV's cubic has -0.75
PRECISION_BITS = 22
BLOCK_ROWS = 16  # 64 bytes of each column: a cache line


class Span(NamedTuple):
    """What happens along an axis: pixels `start` to `stop` become `size`; `num_kept` from `first` on are kept."""

    start: int
    stop: int
    size: int
    first: int
    num_kept: int


class _Weights(NamedTuple):
    starts: NDArray[np.int64]
    """`[N]`: first source pixel of each result pixel."""
    counts: NDArray[np.int64]
    """`[N]`: number of source pixels of each."""
    values: NDArray[np.int32]
    """`[N, largest count]`, fixed point."""


def resize(pixels: Pixels, columns: Span, rows: Span) -> Pixels:
    """Crop, resize and crop again.

    Args:
        pixels: uint8 `[H, W, 4]`, contiguous; the fourth channel is padding.
        columns: what happens to the width.
        rows: what happens to the height.

    Returns:
        uint8 `[rows.num_kept, columns.num_kept, 3]`: the pixels of Pillow's `crop`, `resize` and `crop`, bit for bit,
        where Pillow takes the rows first. Pillow 13 takes the columns first in some shapes that shrink more in height,
        among them pictures more than twice as high as wide; there some pixels differ, nearly all by 1.
    """
    across, down = _weights(columns), _weights(rows)
    top, bottom = int(down.starts.min()), int((down.starts + down.counts).max())
    narrow = np.empty((bottom - top, columns.num_kept, 4), dtype=np.uint8)
    _sum_across(pixels.view(np.uint32)[..., 0], top, *across, narrow.view(np.uint32)[..., 0])
    result = np.empty((rows.num_kept, columns.num_kept, 4), dtype=np.uint8)
    _sum_down(_lines(narrow), down.starts - top, down.counts, down.values, _lines(result))
    return result[..., :3]


def _lines(pixels: Pixels) -> Pixels:
    return pixels.reshape(len(pixels), -1)


@lru_cache(maxsize=512)
def _weights(span: Span) -> _Weights:
    """Weigh the source pixels of every kept pixel, rounding as Pillow does."""
    length = span.stop - span.start
    scale = length / span.size
    stretch = max(scale, 1.0)
    centers = (np.arange(span.first, span.first + span.num_kept) + 0.5) * scale
    starts = np.maximum((centers - SUPPORT * stretch + 0.5).astype(np.int64), 0)
    counts = np.minimum((centers + SUPPORT * stretch + 0.5).astype(np.int64), length) - starts
    taps = np.arange(counts.max())[:, None]
    weights = np.where(taps < counts, _cubic((taps + starts - centers + 0.5) * (1.0 / stretch)), 0.0)
    totals = np.zeros(span.num_kept)
    for line in weights:  # one after the other: the order decides the last bit
        totals += line
    scaled = weights * (1.0 / totals) * (1 << PRECISION_BITS)
    values = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int32)
    return _Weights(starts + span.start, counts, np.ascontiguousarray(values.T))


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel (1981), in the order of operations that Pillow has."""
    x = np.abs(x)
    near = ((CURVATURE + 2.0) * x - (CURVATURE + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CURVATURE
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@njit(nogil=True, cache=True)
def _sum_across(source: Any, top: int, starts: Any, counts: Any, weights: Any, result: Any) -> None:
    """Fill `result`, uint32 `[rows, N]`, from the rows of `source`, uint32 `[H, W]`, that begin at `top`."""
    left, right = starts.min(), (starts + counts).max()
    block = np.zeros((right - left, BLOCK_ROWS), np.uint32)
    sums = np.empty((len(starts), BLOCK_ROWS), np.uint32)
    for first in range(0, len(result), BLOCK_ROWS):
        num_rows = min(BLOCK_ROWS, len(result) - first)
        for column in range(right - left):
            for row in range(num_rows):
                block[column, row] = source[top + first + row, left + column]
        _sum_down(block.view(np.uint8), starts - left, counts, weights, sums.view(np.uint8))
        for row in range(num_rows):
            for column in range(len(starts)):
                result[first + row, column] = sums[column, row]


@njit(nogil=True, cache=True)
def _sum_down(source: Any, starts: Any, counts: Any, weights: Any, result: Any) -> None:
    """Fill each line of `result` with the weighted sum of lines of `source`, rounded to 8 bits."""
    width = source.shape[1]
    sums = np.empty(width, np.int32)
    for row in range(len(starts)):
        sums[:] = 1 << (PRECISION_BITS - 1)
        for tap in range(counts[row]):
            weight = weights[row, tap]
            line = source[starts[row] + tap]
            for i in range(width):
                sums[i] += weight * np.int32(line[i])
        for i in range(width):
            result[row, i] = min(max(sums[i] >> PRECISION_BITS, 0), 255)
