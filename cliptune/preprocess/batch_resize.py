"""The resize of `resize` for many images at once, the same bits, as products of matrices on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cliptune.preprocess.resize import PRECISION_BITS, Span, weights_of

HALF_BITS = 12
"""Of a weight that its lower half has."""


class _Axis(NamedTuple):
    """What happens along the columns, or the rows, of several images."""

    firsts: list[int]
    """First source pixel that counts, of each image."""
    lengths: list[int]
    """Source pixels that count, of each image."""
    weights: Tensor
    """float32 `[B, longest, 2 N]`: upper halves of the weights of N result pixels, then the lower ones."""


def resize_batch(images: Sequence[Tensor], columns: Sequence[Span], rows: Sequence[Span]) -> Tensor:
    """Crop, resize and crop again each of several images, which need not have one size.

    Args:
        images: uint8 `[3, H, W]` each, all on one device.
        columns: what happens to the width of each; the same `num_out` for all.
        rows: what happens to the height of each; the same `num_out` for all.

    Returns:
        uint8 `[B, 3, rows.num_out, columns.num_out]`, on that device: for each what `resize` gives, bit for bit where a
        result pixel has up to 32 source pixels in a row or column, as where an image shrinks to an eighth; beyond, up
        to rare roundings.
    """
    across, down = _axis(columns, images[0].device), _axis(rows, images[0].device)
    shape = (len(images), 3, max(down.lengths), max(across.lengths))
    pixels = torch.zeros(shape, dtype=torch.uint8, device=images[0].device)  # [B, 3, H, W], only what counts
    for image, target, left, width, top, height in zip(
        images, pixels, across.firsts, across.lengths, down.firsts, down.lengths, strict=True
    ):
        target[:, :height, :width] = image[:, top : top + height, left : left + width]
    narrow = _weighted_sums(pixels, across.weights)  # [B, 3, H, N]
    return _weighted_sums(narrow.transpose(2, 3), down.weights).transpose(2, 3).to(torch.uint8).contiguous()


def _axis(spans: Sequence[Span], device: torch.device) -> _Axis:
    found = [weights_of(span) for span in spans]
    firsts = [int(each.starts.min()) for each in found]
    lengths = [int((each.starts + each.counts).max()) - first for each, first in zip(found, firsts, strict=True)]
    num_taps = max(each.values.shape[1] for each in found)
    values = np.zeros((len(found), spans[0].num_out, num_taps), dtype=np.int32)  # [B, N, taps]
    for index, each in enumerate(found):
        values[index, :, : each.values.shape[1]] = each.values
    starts = np.stack([each.starts - first for each, first in zip(found, firsts, strict=True)])  # [B, N]
    places = torch.from_numpy(starts).to(device)[..., None] + torch.arange(num_taps, device=device)
    # taps that do not count may lie beyond the end: there is room for them, which is cut off
    dense = torch.zeros(*starts.shape, max(lengths) + num_taps, dtype=torch.int32, device=device)
    dense = dense.scatter_(2, places, torch.from_numpy(values).to(device))[..., : max(lengths)]  # [B, N, longest]
    upper = (dense + (1 << (HALF_BITS - 1))) >> HALF_BITS
    halves = torch.cat([upper, dense - (upper << HALF_BITS)], dim=1)  # [B, 2 N, longest]
    return _Axis(firsts, lengths, halves.transpose(1, 2).float())


def _weighted_sums(pixels: Tensor, weights: Tensor) -> Tensor:
    """Sum along the last dimension and round to 8 bits as `resize` does: `[B, 3, M, K]` to int32 `[B, 3, M, N]`.

    GPUs have no products of integers. A weight of 22 bits times a pixel of 8 would not fit into float32's 24, so it
    goes in two halves of 12: each sum of integers is exact, in whatever order it is taken. Halves and pixels fit into
    TF32's 11 bits, too, which a run in float32 may allow.
    """
    num_images, channels, lines, length = pixels.shape
    sums = torch.bmm(pixels.reshape(num_images, channels * lines, length).float(), weights)  # [B, 3 M, 2 N]
    upper, lower = sums.int().chunk(2, dim=-1)
    rounded = ((upper << HALF_BITS) + lower + (1 << (PRECISION_BITS - 1))) >> PRECISION_BITS
    return rounded.clamp_(0, 255).view(num_images, channels, lines, -1)
