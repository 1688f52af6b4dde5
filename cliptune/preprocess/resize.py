"""Pillow's bicubic resize, bit for bit, at several times its speed.

Why bit for bit: published CLIP models saw Pillow's pixels, and features, ranks and tests then are what CLIP's own code
gives. A resize is two passes of weighted sums in 22-bit fixed point: along the rows, rounded to 8 bits, then down the
columns. Here only what is asked for is computed, and each sum runs over many pixels at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import njit
from numba.extending import register_jitable
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]

SUPPORT = 2.0  # reach of the cubic, in output pixels where the image shrinks
CURVATURE = -0.5  # Pillow's and CLIP's; OpenCV's cubic has -0.75
PRECISION_BITS = 22  # 32 less 8 of a pixel and 2 for sums beyond 1, as in Pillow's Resample.c
BLOCK_ROWS = 16  # 64 bytes of each column: a cache line


class Span(NamedTuple):
    """What happens along an axis: pixels `start` to `stop` become `size`; `num_out` from `first` on are computed.

    The middle 224 columns of an image 500 wide that shrinks to 299: `Span(0, 500, 299, 38, 224)`.
    """

    start: int
    stop: int
    size: int
    first: int
    num_out: int


class Weights(NamedTuple):
    """What each result pixel of a span is the weighted sum of."""

    starts: NDArray[np.int64]
    """`[N]`: first source pixel of each result pixel."""
    counts: NDArray[np.int64]
    """`[N]`: number of source pixels of each."""
    values: NDArray[np.int32]
    """`[N, largest count]`, fixed point of `PRECISION_BITS`; 0 from each count on."""


def resize(pixels: Pixels, columns: Span, rows: Span) -> Pixels:
    """Crop, resize and crop again.

    Args:
        pixels: uint8 `[H, W, 4]`, contiguous; the fourth channel is padding.
        columns: what happens to the width.
        rows: what happens to the height.

    Returns:
        uint8 `[rows.num_out, columns.num_out, 3]`: the pixels of Pillow's `crop`, `resize` and `crop`, bit for bit,
        where Pillow takes the rows first. Pillow 13 takes the columns first in some shapes that shrink more in height,
        among them images more than twice as high as wide; there some pixels differ, nearly all by 1.
    """
    across, down = weights_of(columns), weights_of(rows)
    # along the rows first, as Pillow: rounding between the passes makes the order visible in the pixels
    top, bottom = int(down.starts.min()), int((down.starts + down.counts).max())
    narrow = np.empty((bottom - top, columns.num_out, 4), dtype=np.uint8)  # [rows used, new width, 4]
    compiled(_sum_across)(pixels.view(np.uint32)[..., 0], top, *across, narrow.view(np.uint32)[..., 0])
    result = np.empty((rows.num_out, columns.num_out, 4), dtype=np.uint8)
    compiled(_sum_down)(_lines(narrow), down.starts - top, down.counts, down.values, _lines(result))
    return result[..., :3]  # [new height, new width, 3]


def _lines(pixels: Pixels) -> Pixels:
    """View `[H, W, 4]` as `[H, 4 W]`: down the columns a channel is a number like any other."""
    return pixels.reshape(len(pixels), -1)


@lru_cache(maxsize=512)
def weights_of(span: Span) -> Weights:
    """Weigh the source pixels of each result pixel of a span."""
    starts, counts, values = compiled(_weigh)(span.stop - span.start, span.size, span.first, span.num_out)
    return Weights(starts + span.start, counts, values)


@lru_cache(maxsize=8)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile where a function is first called, not at import; numba caches the machine code for the next process."""
    compile_with = partial(njit, function, nogil=True)
    try:
        fast: Callable[..., Any] = compile_with(cache=True)
    except RuntimeError:  # neither the code's folder nor a home can be written to
        fast = compile_with()
    return fast


def _weigh(length: int, size: int, first: int, num_out: int) -> Any:
    """Weigh the source pixels of each result pixel, in Pillow's order of operations: another has other last bits."""
    scale = length / size
    stretch = max(scale, 1.0)  # shrinking widens the kernel, so that every source pixel counts: antialiasing
    reach = SUPPORT * stretch
    starts, counts = np.empty(num_out, np.int64), np.empty(num_out, np.int64)
    values = np.zeros((num_out, 2 * math.ceil(reach) + 1), np.int32)
    weights = np.empty(values.shape[1])
    for i in range(num_out):
        center = (first + i + 0.5) * scale
        starts[i] = max(int(center - reach + 0.5), 0)
        counts[i] = min(int(center + reach + 0.5), length) - starts[i]
        total = 0.0
        for tap in range(counts[i]):
            weights[tap] = _cubic((tap + starts[i] - center + 0.5) * (1.0 / stretch))
            total += weights[tap]
        for tap in range(counts[i]):
            # halves away from zero, as C rounds there: -0.5 -> -1
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
    """Fill `result`, uint32 `[rows, N]`, from the rows of `source`, uint32 `[H, W]`, that begin at `top`.

    The sum along a row is the sum down the columns of its transpose. 16 rows at a time are transposed into `block`, so
    that the inner loop runs over neighbours in memory, which the compiler turns into vector instructions.
    """
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
    # lines are outermost and pixels innermost: 4 bytes x 16 rows or a whole line are summed at once
    width = source.shape[1]
    sums = np.empty(width, np.int32)
    for row in range(len(starts)):
        sums[:] = 1 << (PRECISION_BITS - 1)  # a half, so that the shift below rounds
        for tap in range(counts[row]):
            weight = weights[row, tap]
            line = source[starts[row] + tap]
            for i in range(width):
                sums[i] += weight * np.int32(line[i])
        for i in range(width):
            result[row, i] = min(max(sums[i] >> PRECISION_BITS, 0), 255)
