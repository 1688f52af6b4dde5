"""Optimiser and learning-rate schedule of a run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clip_model import CLIPModel


def build_optimizer(
    model: CLIPModel, *, learning_rate: float, backbone_lr_scale: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with the towers at `backbone_lr_scale` times the rate; no decay on biases, norms, the temperature.

    The groups are named `projection` and `backbone` (their `name` entry), each with and without decay.
    """
    groups: dict[tuple[str, float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "backbone" if name.startswith("backbone.") else "projection"
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            # apart, since it stays whole where the others are sharded
            groups.setdefault((part, decay, name == "logit_scale"), []).append(parameter)
    rates = {"projection": learning_rate, "backbone": learning_rate * backbone_lr_scale}
    return torch.optim.AdamW(
        [
            {"params": parameters, "name": part, "lr": rates[part], "weight_decay": decay}
            for (part, decay, _), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=model.device.type in {"cpu", "cuda"},
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_fraction: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a share of the steps, then a cosine to zero; stepped once a step."""
    warmup_steps = num_warmup_steps(total_steps, warmup_fraction)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def num_warmup_steps(total_steps: int, warmup_fraction: float) -> int:
    """Return over how many of the steps the rates rise."""
    return min(round(total_steps * warmup_fraction), total_steps - 1)
