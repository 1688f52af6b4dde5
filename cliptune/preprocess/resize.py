"""Pillow's bicubic resize, bit for bit, at several times its speed.

A resize is two passes of weighted sums in 22-bit fixed point: along the rows, rounded to 8 bits, then down the columns.
Here only what is kept is computed, and each sum runs over many pixels at once; for the first pass 16 rows at a time are
transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import njit
from numba.extending import register_jitable
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
    _compiled(_sum_across)(pixels.view(np.uint32)[..., 0], top, *across, narrow.view(np.uint32)[..., 0])
    result = np.empty((rows.num_kept, columns.num_kept, 4), dtype=np.uint8)
    _compiled(_sum_down)(_lines(narrow), down.starts - top, down.counts, down.values, _lines(result))
    return result[..., :3]


def _lines(pixels: Pixels) -> Pixels:
    return pixels.reshape(len(pixels), -1)


@lru_cache(maxsize=512)
def _weights(span: Span) -> _Weights:
    starts, counts, values = _compiled(_weigh)(span.stop - span.start, span.size, span.first, span.num_kept)
    return _Weights(starts + span.start, counts, values)


@lru_cache(maxsize=8)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile where a function is first called, not at import; the machine code is kept for the next process."""
    compiled: Callable[..., Any] = njit(function, nogil=True, cache=True)
    return compiled


def _weigh(length: int, size: int, first: int, num_kept: int) -> Any:
    """Weigh the source pixels of every kept pixel, in the order of operations that decides Pillow's last bits."""
    scale = length / size
    stretch = max(scale, 1.0)
    reach = SUPPORT * stretch
    starts, counts = np.empty(num_kept, np.int64), np.empty(num_kept, np.int64)
    values = np.zeros((num_kept, 2 * math.ceil(reach) + 1), np.int32)
    weights = np.empty(values.shape[1])
    for i in range(num_kept):
        center = (first + i + 0.5) * scale
        starts[i] = max(int(center - reach + 0.5), 0)
        counts[i] = min(int(center + reach + 0.5), length) - starts[i]
        total = 0.0
        for tap in range(counts[i]):
            weights[tap] = _cubic((tap + starts[i] - center + 0.5) * (1.0 / stretch))
            total += weights[tap]
        for tap in range(counts[i]):
            fixed = weights[tap] * (1.0 / total) * (1 << PRECISION_BITS)
            values[i, tap] = int(fixed - 0.5 if fixed < 0 else fixed + 0.5)
    return starts, counts, values


@register_jitable
def _cubic(x: float) -> float:
    """Keys' cubic convolution kernel (1981)."""
    x = abs(x)
    if x < 1.0:
        return ((CURVATURE + 2.0) * x - (CURVATURE + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * CURVATURE if x < 2.0 else 0.0


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


@register_jitable
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
