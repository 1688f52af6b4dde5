"""How far one small image is from being another in a slightly other cut and brightness.

Scale and shift of each axis and one gain are fitted by Gauss-Newton, as B. Lucas and T. Kanade, "An Iterative Image
Registration Technique" (1981), do for a shift. Then the pixels are compared by the block that differs most: copies
differ a little everywhere, other images much somewhere. Differences are smoothed first, so that edges between two
pixels count little. One gain for all channels: a brighter copy is the same image, another colour is another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from cliptune.preprocess.resize import Pixels, compiled

FAR = np.float32(255.0)
"""The distance of images that no crop and gain brings together."""
MAX_SCALE = 0.13
"""Of a side that one image may have more than the other: a crop of a tenth, and some room."""
SLACK = 0.03
"""Half sides by which a crop may reach beyond the image: half a pixel, which rounding costs."""
MIN_GAIN, MAX_GAIN = 0.6, 1.7
MAX_MEAN = 20.0
"""Levels that grey pixels may differ by on average once they are nearly aligned; the steps end where it is more."""
_STEPS = 6
_BLOCK = 4
_UNKNOWNS = 5
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def distances(pixels: Pixels, others: Pixels) -> NDArray[np.float32]:
    """Return how far each pair of images is apart, float32 `[P]`, in levels of 255: the smaller of both directions.

    Args:
        pixels: uint8 `[P, S, S, 3]`, S a multiple of 4.
        others: the same shape.
    """
    found = np.empty(len(pixels), dtype=np.float32)
    ours, theirs = pixels.astype(np.float32), others.astype(np.float32)
    compiled(_fill_distances)(ours, theirs, ours @ _GREY, theirs @ _GREY, found)
    return found


def _fill_distances(pixels: Any, others: Any, greys: Any, other_greys: Any, found: Any) -> None:
    for i in range(len(pixels)):
        # of an image and its crop only the whole shows all of the other; and what is white may have been darker
        one = _distance(pixels[i], others[i], greys[i], other_greys[i])
        found[i] = min(one, _distance(others[i], pixels[i], other_greys[i], greys[i]))


@register_jitable
def _distance(source: Any, target: Any, source_grey: Any, target_grey: Any) -> Any:
    """Bring `source` to `target`, `[S, S, 3]`, with their grey pixels, `[S, S]`, and compare."""
    # x and y of the source: (1 + p0) x + p1 and (1 + p2) y + p3, where sides are at -1 and 1; then the gain
    fitted = np.zeros(_UNKNOWNS)
    fitted[4] = 1.0
    for step in range(_STEPS):
        error = _step(source_grey, target_grey, fitted, 2 if step < _STEPS - 3 else 1)
        if step >= 2 and error > MAX_MEAN:
            return FAR
    for axis in (0, 2):  # of two cuts of one image, one lies within the other; else things only look alike
        if abs(fitted[axis + 1]) > abs(fitted[axis]) + SLACK:
            return FAR
    return _largest_difference(source, target, fitted)


@register_jitable
def _step(source: Any, target: Any, fitted: Any, stride: Any) -> Any:
    """Improve what was fitted, `[5]`: a Gauss-Newton step, with a weak pull back, on every n-th row and column.

    Returns:
        The mean difference before, in levels.
    """
    side = len(source)
    half = (side - 1) / 2
    matrix, right = np.zeros((_UNKNOWNS, _UNKNOWNS)), np.zeros(_UNKNOWNS)
    matrix[0, 0] = matrix[1, 1] = matrix[2, 2] = matrix[3, 3] = 30.0
    matrix[4, 4] = 1000.0
    slopes = np.zeros(_UNKNOWNS)
    total, num_pixels = 0.0, 0
    for row in range(0, side, stride):
        y = row / half - 1
        at_y = _place(y, fitted, 2, half)
        if at_y < 0 or at_y > side - 1:
            continue
        top, down = _cell(at_y, side)
        for column in range(0, side, stride):
            x = column / half - 1
            at_x = _place(x, fitted, 0, half)
            if at_x < 0 or at_x > side - 1:
                continue
            left, across = _cell(at_x, side)
            a, b = source[top, left], source[top, left + 1]
            c, d = source[top + 1, left], source[top + 1, left + 1]
            value = (1 - down) * (a + (b - a) * across) + down * (c + (d - c) * across)
            num_pixels += 1
            error = target[row, column] - min(fitted[4] * value, 255.0)
            total += abs(error)
            if fitted[4] * value > 255:
                continue  # white is white in a brighter image, too, and moves with nothing
            slope_x = fitted[4] * half * ((1 - down) * (b - a) + down * (d - c))
            slope_y = fitted[4] * half * ((1 - across) * (c - a) + across * (d - b))
            slopes[0], slopes[1], slopes[2], slopes[3], slopes[4] = slope_x * x, slope_x, slope_y * y, slope_y, value
            for i in range(_UNKNOWNS):
                right[i] += slopes[i] * error
                for j in range(i + 1):
                    matrix[i, j] += slopes[i] * slopes[j]
    _solve(matrix, right)
    for i in range(4):
        fitted[i] = min(max(fitted[i] + min(max(right[i], -0.06), 0.06), -MAX_SCALE), MAX_SCALE)
    fitted[4] = min(max(fitted[4] + right[4], MIN_GAIN), MAX_GAIN)
    return total / max(num_pixels, 1)


@register_jitable
def _place(at: Any, fitted: Any, axis: Any, half: Any) -> Any:
    """Return the pixel of the source that shows what the target has at a place between -1 and 1 of one axis."""
    return ((1 + fitted[axis]) * at + fitted[axis + 1] + 1) * half


@register_jitable
def _cell(at: Any, side: Any) -> Any:
    """Return the pixel before a position, and how far it lies towards the next one."""
    before = min(max(int(at), 0), side - 2)
    return before, at - before


@register_jitable
def _solve(matrix: Any, right: Any) -> None:
    """Put the solution into `right`; of the symmetric positive `matrix` the lower half is read, and overwritten."""
    for i in range(_UNKNOWNS):  # Cholesky: matrix = L L^T
        for j in range(i + 1):
            total = matrix[i, j]
            for k in range(j):
                total -= matrix[i, k] * matrix[j, k]
            if i > j:
                matrix[i, j] = total / matrix[j, j]
            else:
                matrix[i, i] = np.sqrt(total)
    for i in range(_UNKNOWNS):
        for k in range(i):
            right[i] -= matrix[i, k] * right[k]
        right[i] /= matrix[i, i]
    for i in range(_UNKNOWNS - 1, -1, -1):
        for k in range(i + 1, _UNKNOWNS):
            right[i] -= matrix[k, i] * right[k]
        right[i] /= matrix[i, i]


@register_jitable
def _warped(source: Any, fitted: Any, warped: Any, seen: Any) -> None:
    """Fill `warped`, `[S, S, 3]`, with the source where it is `seen`, bool `[S, S]`."""
    side = len(source)
    half = (side - 1) / 2
    for row in range(side):
        at_y = _place(row / half - 1, fitted, 2, half)
        for column in range(side):
            at_x = _place(column / half - 1, fitted, 0, half)
            seen[row, column] = -0.01 <= at_y <= side - 0.99 and -0.01 <= at_x <= side - 0.99
            if seen[row, column]:
                (top, down), (left, across) = _cell(at_y, side), _cell(at_x, side)
                for channel in range(3):
                    above = source[top, left, channel] * (1 - across) + source[top, left + 1, channel] * across
                    below = source[top + 1, left, channel] * (1 - across) + source[top + 1, left + 1, channel] * across
                    warped[row, column, channel] = above * (1 - down) + below * down


@register_jitable
def _largest_difference(source: Any, target: Any, fitted: Any) -> Any:
    """Return the mean difference within the block where it is largest, of the channel that differs most there."""
    side = len(source)
    warped, seen = np.zeros((side, side, 3), np.float32), np.zeros((side, side), np.bool_)
    _warped(source, fitted, warped, seen)
    _subtract(warped, target, seen)
    largest = 0.0
    for top in range(0, side, _BLOCK):
        for left in range(0, side, _BLOCK):
            total, num_seen = 0.0, 0
            for row in range(top, top + _BLOCK):
                for column in range(left, left + _BLOCK):
                    num_seen += seen[row, column]
                    total += _smoothed(warped, row, column)
            if 2 * num_seen > _BLOCK * _BLOCK:
                largest = max(largest, total / num_seen)
    return np.float32(largest)


@register_jitable
def _subtract(warped: Any, target: Any, seen: Any) -> None:
    """Take the target from what is seen, brought to its brightness anew: by all channels, where neither is white."""
    product, square = 1e4, 1e4
    for i, j, channel in np.ndindex(warped.shape):
        if seen[i, j] and warped[i, j, channel] < 245 and target[i, j, channel] < 245:
            product += warped[i, j, channel] * target[i, j, channel]
            square += warped[i, j, channel] * warped[i, j, channel]
    gain = min(max(product / square, MIN_GAIN), MAX_GAIN)
    for i, j, channel in np.ndindex(warped.shape):
        if seen[i, j]:
            warped[i, j, channel] = min(gain * warped[i, j, channel], 255.0) - target[i, j, channel]


@register_jitable
def _smoothed(differences: Any, row: Any, column: Any) -> float:
    """Return the mean over 3 x 3 pixels of the channel where it is largest; what is outside or not seen is 0."""
    side, largest = len(differences), 0.0
    for channel in range(3):
        total = 0.0
        for y in range(max(row - 1, 0), min(row + 2, side)):
            for x in range(max(column - 1, 0), min(column + 2, side)):
                total += differences[y, x, channel]
        largest = max(largest, abs(total) / 9)
    return largest
