"""The losses straight from their definitions: B x B, in double precision, with PyTorch's own gradient."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Ids = Tensor | None


def reference_loss(
    kind: str,
    positives: str,
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    image_ids: Ids = None,
    caption_ids: Ids = None,
) -> Tensor:
    own = torch.eye(len(images), dtype=torch.bool)
    same_image, same_caption = (
        own if ids is None else ids[:, None] == ids[None, :] for ids in (image_ids, caption_ids)
    )
    wanted = own | same_image | same_caption if positives == "caption" else own
    left_out = same_image & ~own if positives == "image" else torch.zeros_like(own)
    logits = logit_scale.double().exp() * (images.double() @ texts.double().T)
    if kind == "siglip":
        assert logit_bias is not None
        losses = -F.logsigmoid(torch.where(wanted, 1, -1) * (logits + logit_bias.double()))
        return losses.masked_fill(left_out, 0).sum() / len(images)
    logits = logits.masked_fill(left_out, -math.inf)
    sides = [-logits.log_softmax(dim).where(wanted, 0).sum(dim) / wanted.sum(dim) for dim in (0, 1)]
    return (sides[0].mean() + sides[1].mean()) / 2


def some_ids(size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images that come twice, and captions that a few pairs have, so that chains of equal ones are long."""
    generator = torch.Generator().manual_seed(seed)
    image_ids = torch.randint(0, 3 * size // 4, (size,), generator=generator)
    return image_ids, torch.randint(0, size // 2, (size,), generator=generator)
