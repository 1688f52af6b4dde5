"""Weights for another context length or image resolution: their positions cut or interpolated."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cliptune.model.architectures import Architecture, check_sizes, name_of

logger = logging.getLogger(__name__)

KEPT_POSITIONS = 20
"""Of a text, at its beginning: nearly all that captions train."""
MIN_CONTEXT_LENGTH = 3
"""Start, one token, end."""


def resized(
    architecture: Architecture, *, context_length: int | None = None, image_resolution: int | None = None
) -> Architecture:
    """Return an architecture for another context length (tokens) or image resolution (pixels); None: as it is.

    Raises:
        ValueError: a size that it cannot have.
    """
    context_length = context_length or architecture.context_length
    image_resolution = image_resolution or architecture.image_resolution
    if context_length < MIN_CONTEXT_LENGTH:
        raise ValueError(f"context_length {context_length}: at least {MIN_CONTEXT_LENGTH} are needed for a text")
    cell = architecture.vision_patch_size or 32
    if image_resolution % cell or image_resolution < cell:
        raise ValueError(
            f"image_resolution {image_resolution}: {architecture.name} takes multiples of {cell}, such as "
            f"{max(round(image_resolution / cell), 1) * cell}"
        )
    changed = replace(architecture, context_length=context_length, image_resolution=image_resolution)
    check_sizes(changed, architecture.name)
    if image_resolution == architecture.image_resolution:
        return changed
    default = f"{architecture.name.partition('@')[0]}@{image_resolution}px"
    return replace(changed, name=name_of(changed, default=default))


def resize_weights(
    before: Architecture, tensors: dict[str, Tensor], **sizes: int | None
) -> tuple[Architecture, dict[str, Tensor]]:
    """Return architecture and weights for other sizes, as they are where nothing changes; says what is made of them.

    Args:
        before: the weights' architecture.
        tensors: in OpenAI's names.
        sizes: as `resized` takes them.

    Raises:
        ValueError: a size that the architecture cannot have.
    """
    after = resized(before, **sizes)
    if after == before:
        return before, tensors
    changed = dict(tensors)
    if after.context_length != before.context_length:
        name = "positional_embedding"
        changed[name] = resize_text_positions(tensors[name], after.context_length)
        how = "cut" if after.context_length < before.context_length else "interpolated: fine-tune them"
        message = "context length %d -> %d: text positions are %s"
        logger.warning(message, before.context_length, after.context_length, how)
    if after.image_resolution != before.image_resolution:
        name = "visual.positional_embedding" if before.is_vit else "visual.attnpool.positional_embedding"
        side = after.image_resolution // (after.vision_patch_size or 32)
        changed[name] = resize_image_positions(tensors[name], side)
        logger.warning(
            "image resolution %d -> %d: image positions are interpolated: fine-tune them",
            before.image_resolution, after.image_resolution,
        )  # fmt: skip
    return after, changed


def resize_text_positions(positions: Tensor, length: int) -> Tensor:
    """Cut text positions `[L, width]`, or stretch all but the first 20, as Long-CLIP does (Zhang et al. 2024).

    Of 77 and 248: position 20 + j of the new ones is position 20 + j / 4 of the old ones, between two of them in
    proportion; behind the last one the line through the last two goes on.

    Args:
        positions: of fewer than 22, half are kept.
        length: of the result.
    """
    old = len(positions)
    if length <= old:
        return positions[:length].clone()
    kept = KEPT_POSITIONS if old > KEPT_POSITIONS + 1 else old // 2
    rest = positions[kept:].double()
    where = torch.arange(length - kept, dtype=torch.float64) * (len(rest) / (length - kept))
    below = where.long().clamp_(max=len(rest) - 2)
    fraction = (where - below).unsqueeze(1)  # above 1 behind the last position
    stretched = torch.lerp(rest[below], rest[below + 1], fraction)
    return torch.cat([positions[:kept], stretched.to(positions.dtype)])


def resize_image_positions(positions: Tensor, side: int) -> Tensor:
    """Resize image positions `[1 + S * S, width]`, the first of which has no place, to `[1 + side * side, width]`.

    Bicubic and antialiased, as open_clip's `resize_pos_embed`.
    """
    first, grid = positions[:1], positions[1:]
    old = round(len(grid) ** 0.5)
    image = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, width, S, S]
    image = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, image.permute(0, 2, 3, 1).flatten(1, 2)[0]])
