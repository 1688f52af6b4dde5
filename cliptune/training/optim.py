"""Optimiser and learning-rate schedule of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cliptune.model.depth import layers_above
from cliptune.model.lora import is_adapter

logger = logging.getLogger(__name__)

MAX_POINTS = 500
BACKBONE_LR_SCALE = 0.01
"""Rate of pretrained towers over that of the projection layers, unless chosen."""
LORA_LR_SCALE = 2.0
"""The same of adapters: 2e-4 beside 1e-4, as in CLIP-LoRA (Zanella and Ben Ayed 2024)."""


GROUP_WORDS = {"projection": "projection layers", "backbone": "towers", "lora": "LoRA"}


class Trainable(Protocol):
    """What an optimiser needs of a model, such as `clip_model.CLIPModel`."""

    starts_random: bool
    lora: Any

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each parameter with its name; the towers' begin with `backbone.`."""


def build_optimizer(
    model: Trainable,
    *,
    learning_rate: float,
    backbone_lr_scale: float | None,
    weight_decay: float,
    layer_decay: float | None = None,
) -> torch.optim.AdamW:
    """AdamW with the towers at a rate of their own, see `peak_rates`; no decay on biases, norms, temperature.

    The groups are named `projection`, and `backbone` or, of adapters, `lora` (their `name` entry), each with and
    without decay. With `layer_decay` a tower's rate is that of its top; each layer has that factor of the rate of the
    layer above it, see `depth.layers_above`, and groups of its own.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    above = layers_above(name.removeprefix("backbone.") for name, _ in model.named_parameters() if _of_tower(name))
    groups: dict[tuple[str, float, bool, int], list[Tensor]] = {}
    for name, parameter in parameters.items():
        part = "projection" if not _of_tower(name) else "lora" if is_adapter(name) else "backbone"
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        depth = 0 if part == "projection" or layer_decay is None else above[name.removeprefix("backbone.")]
        # scalars apart, since FSDP leaves them whole where the others are sharded
        groups.setdefault((part, decay, parameter.ndim == 0, depth), []).append(parameter)
    projection, towers = peak_rates(model, learning_rate=learning_rate, backbone_lr_scale=backbone_lr_scale)
    rates = {"projection": projection, "backbone": towers, "lora": towers}
    return torch.optim.AdamW(
        [
            {"params": members, "name": part, "lr": rates[part] * (layer_decay or 1.0) ** depth, "weight_decay": decay}
            for (part, decay, _, depth), members in groups.items()
        ],
        betas=(0.9, 0.98),  # CLIP's, section 2.5 of Radford et al. 2021
        eps=1e-6,
        fused=model.device.type in {"cpu", "cuda"},
    )


def _of_tower(name: str) -> bool:
    return name.startswith("backbone.")


def peak_rates(model: Trainable, *, learning_rate: float, backbone_lr_scale: float | None) -> tuple[float, float]:
    """Return the rates of the projection layers and of the towers or their adapters, at their top.

    A scale of None: 0.01, or 1 for a random start; 2 for adapters.
    """
    default = LORA_LR_SCALE if model.lora is not None else 1.0 if model.starts_random else BACKBONE_LR_SCALE
    return learning_rate, learning_rate * (default if backbone_lr_scale is None else backbone_lr_scale)


def describe_rates(optimizer: torch.optim.Optimizer) -> str:
    """Say at which peak rate each named group trains, by layer if its layers have rates of their own."""
    peaks: dict[str, list[float]] = {}
    for group in optimizer.param_groups:
        peaks.setdefault(GROUP_WORDS.get(group["name"], group["name"]), []).append(group.get("initial_lr", group["lr"]))
    by_layer = {name: sorted(set(rates), reverse=True) for name, rates in peaks.items()}
    return "; ".join(
        f"{name} {', '.join(f'{rate:.3g}' for rate in rates)}{' from the top layer down' if len(rates) > 1 else ''}"
        for name, rates in by_layer.items()
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_fraction: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a fraction of the steps, then a cosine to zero; stepped once a step."""
    warmup_steps = num_warmup_steps(total_steps, warmup_fraction)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _factor(step, total_steps=total_steps, warmup_steps=warmup_steps)
    )


def load_scheduler_state(scheduler: torch.optim.lr_scheduler.LRScheduler, state: dict[str, Any], *, step: int) -> None:
    """Let a schedule go on from a stored state, at the rates that its own course has there.

    The optimiser holds the rates of the stored course: of a run that now has more epochs those would be the rates of
    one step more.

    Raises:
        KeyError, TypeError: a part of it is missing, or no number.
        ValueError: rates that there cannot be, or of another step.
    """
    own = scheduler.state_dict()
    # PyTorch makes an attribute of whatever stands there
    known = {key: value for key, value in state.items() if key in own and type(value) is type(own[key])}
    if known["last_epoch"] != step:
        raise ValueError(f"the rates are those of step {known['last_epoch']:.6g}, the model's of step {step}")
    for key in ("base_lrs", "_last_lr"):
        if len(known[key]) != len(own[key]) or not all(0 <= rate < math.inf for rate in known[key]):
            raise ValueError(f"rates of {known[key]!r:.100}")
    scheduler.load_state_dict(known)
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        _set_rates(scheduler, step)


def _set_rates(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Give the optimiser the rates of a step, and say where they are others than it has."""
    before = rates_of(scheduler.optimizer)
    factors = [factor(step) for factor in scheduler.lr_lambdas]
    for group, peak, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, factors, strict=True):
        group["lr"] = peak * factor
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
    now = rates_of(scheduler.optimizer)
    changed = [f"{name} {before[name]:.3g} to {rate:.3g}" for name, rate in now.items() if rate != before[name]]
    if changed:
        logger.info("the run has another length now, so the next step's rates change: %s", ", ".join(changed))


def load_scaler_state(scaler: torch.amp.GradScaler, state: dict[str, Any]) -> None:
    """Let a loss scale go on from a stored state; one of a run without begins anew.

    Raises:
        ValueError: a scale that there cannot be.
    """
    if not state:  # the run was in bf16 or fp32 so far
        return
    if scaler.is_enabled() and not all(
        type(value) in {int, float} and 0 <= value < math.inf for value in state.values()
    ):
        raise ValueError("a loss scale that is no number")
    scaler.load_state_dict(state)


def schedule_points(*, total_steps: int, warmup_fraction: float, peaks: Sequence[float]) -> list[tuple[float, ...]]:
    """Return the course of the rates, so that it can be drawn.

    Returns:
        `(step, *rates)` at up to about 500 steps: the rates of the update that follows `step` updates. The first step,
        the peak and the last step are among them.
    """
    warmup_steps = num_warmup_steps(total_steps, warmup_fraction)
    stride = -(-total_steps // MAX_POINTS)
    steps = sorted({*range(0, total_steps, stride), warmup_steps, total_steps})
    factors = [_factor(step, total_steps=total_steps, warmup_steps=warmup_steps) for step in steps]
    return [(step, *(factor * peak for peak in peaks)) for step, factor in zip(steps, factors, strict=True)]


def _factor(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Return the rate over its peak."""
    if step < warmup_steps:  # 1/4, 2/4, 3/4 of the peak over three steps: the first one is not lost at zero
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def num_warmup_steps(total_steps: int, warmup_fraction: float) -> int:
    """Return over how many of the steps the rates rise."""
    return min(round(total_steps * warmup_fraction), total_steps - 1)


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the rates of the next step by the names of the parameter groups; of several of a name the highest."""
    rates: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        name = str(group.get("name", index))
        rates[name] = max(group["lr"], rates.get(name, 0.0))
    return rates
