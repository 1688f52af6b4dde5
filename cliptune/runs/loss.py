"""The loss that a run trains with: what is a positive, and where the bias of a sigmoid loss begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cliptune.data.equal_captions import num_shared_captions
from cliptune.data.pairs import Pairs
from cliptune.data.shards import Shards
from cliptune.runtime.device import Precision
from cliptune.settings import Config
from cliptune.training.gradcache import GradCache
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.sigmoid_loss import SigmoidLoss

logger = logging.getLogger("train")

LOSSES: dict[str, type[ContrastiveLoss]] = {"infonce": ContrastiveLoss, "siglip": SigmoidLoss}


def make_losses(
    config: Config, train: Pairs | Shards, began: Mapping[str, Any]
) -> tuple[ContrastiveLoss, ContrastiveLoss]:
    """Return the loss of the training, which is over all ranks, and that of the validation, which every rank computes.

    What is a positive is as asked for, or as the data suggests; says which and why.

    Args:
        config: of the run.
        train: what it trains on.
        began: content of the checkpoint that it goes on from, whose choice stays; runs of before there was one had
            `image`.
    """
    asked = config.training.positives
    if began:
        chosen, reason = str(began.get("positives", "image")), "as the run began"
    elif asked != "auto":
        chosen, reason = asked, "as asked for"
    elif isinstance(train, Shards):
        chosen, reason = "caption", "auto: captions of shards are not read beforehand, and may repeat"
    else:
        shared = num_shared_captions(train)
        chosen = "caption" if shared else "image"
        found = f"{shared:,} of the {train.num_pairs:,}" if shared else f"none of the {train.num_pairs:,}"
        reason = f"auto: {found} training captions {'is' if shared == 1 else 'are'} another image's, too"
    logger.info("loss %s, positives %s (%s)", config.training.loss, chosen, reason)
    loss_class = LOSSES[config.training.loss]
    return loss_class(positives=chosen), loss_class(positives=chosen, across_ranks=False)


def settle_bias(config: Config, model: Any) -> None:
    """Let a model have the bias that its loss needs, and no other; before it is brought to several ranks."""
    if LOSSES[config.training.loss].needs_bias:
        model.learn_bias()
    elif model.logit_bias is not None:
        logger.info("the weights' logit_bias of %.4g is left out: InfoNCE does not depend on it", model.logit_bias)
        model.logit_bias = None


def start_bias(
    model: Any,
    loss: ContrastiveLoss,
    loader: Any,
    *,
    precision: Precision,
    micro_batch_size: int | None,
    parallel: nn.Module | None,
) -> None:
    """Set a bias that no weights brought by the training's first batch with a pair, see `SigmoidLoss.initial_bias`.

    Arguments as `MultimodalTrainer`'s; `loader` has the batches.
    """
    if not model.has_new_bias:
        return
    scaler = torch.amp.GradScaler(model.device.type, enabled=False)
    cache = GradCache(model, loss, precision=precision, size=micro_batch_size, parallel=parallel, scaler=scaler)
    for batch in loader.epoch(1):
        if cache.start_bias(batch.images, batch.tokens, batch.image_ids, batch.caption_ids):
            break
    model.has_new_bias = False
    logger.info("the bias of the logits begins at %.4g", model.logit_bias.item())


__all__ = ["make_losses", "settle_bias", "start_bias"]
