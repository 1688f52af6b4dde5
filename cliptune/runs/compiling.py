"""Whether a run compiles its towers."""

from __future__ import annotations

import logging
from typing import Any

import torch

from cliptune.model.cost import cost_of
from cliptune.model.towers import WHOLE_ON
from cliptune.runs.data import num_views
from cliptune.runtime.device import compiler_issue
from cliptune.runtime.distributed import world_size
from cliptune.settings import Config

logger = logging.getLogger(__name__)

PAYS_FROM = 4e16
"""Operations of a run, of one rank, from which on compiling is worth its wait.

Measured on one H100: compiling a ViT-B/32 took 53 s, and made a step of 512 pairs, 1.5e13 operations, 40 ms shorter.
That is paid back after 2e16; a run of twice as many gains as much as it has waited. Slower devices gain more by each
operation, so this is late for them, not early.
"""
TEXT_TOKENS = 16
"""Of a usual caption; a longer one costs more, which makes the estimate too low."""


def chooses_to_compile(
    config: Config, model: Any, *, device: torch.device, num_samples: int, began: bool | None
) -> bool:
    """Decide whether the towers are compiled in training, and say so in one line.

    It goes by nothing that is timed: the same command computes the same thing again.

    Args:
        config: of the run.
        model: a `CLIPModel`.
        device: that it will be on.
        num_samples: of an epoch.
        began: what a run that is resumed began with; None: there is none, or nobody knows.
    """
    wish = config.training.compile
    if wish == "false" or (wish == "auto" and device.type != "cuda"):
        return False
    is_on, reason = wish == "true", "--compile true"
    if wish == "auto" and began is not None:
        is_on, reason = began, "as the run began"
    elif wish == "auto":
        operations = run_operations(config, model, num_samples=num_samples)
        is_on = operations >= PAYS_FROM
        reason = f"a run of {operations:.1g} operations, and it pays from {PAYS_FROM:.0g} on"
    if is_on and runs_no_tower(config, model):
        is_on, reason = False, "both are frozen, and their outputs cached"
    issue = compiler_issue(device) if is_on else None
    if issue is not None:
        logger.warning("--compile: no compiler works here (%s); going on without", issue)
        return False
    extent = _extent(config, model, device) if is_on else ""
    logger.info("towers are %scompiled: %s%s", "" if is_on else "not ", reason, extent)
    return is_on


def run_operations(config: Config, model: Any, *, num_samples: int) -> float:
    """Estimate the operations of a run's steps in one rank; a tower that is frozen counts as one that never runs."""
    cost = cost_of(model.architecture, text_tokens=TEXT_TOKENS)
    flops = {"image": cost.image_flops, "text": cost.text_flops}
    trained = sum(value for tower, value in flops.items() if tower not in model.frozen_towers)
    return 3 * trained * num_samples * config.training.num_epochs / world_size()


def runs_no_tower(config: Config, model: Any) -> bool:
    """Tell whether the outputs of both towers are cached, so that no step runs them."""
    return len(model.frozen_towers) == 2 and num_views(config) > 0


def _extent(config: Config, model: Any, device: torch.device) -> str:
    """Say what is compiled where it is not each tower as a whole; see `towers.set_compiled`."""
    is_sharded = config.run.parallel == "fsdp" and world_size() > 1
    is_checkpointed = config.training.gradient_checkpointing
    if device.type in WHOLE_ON and not (is_checkpointed or is_sharded):
        return "; the first step waits for it"
    only = "" if model.architecture.is_vit else " of the text tower alone"
    cause = "FSDP shards them one by one" if is_sharded else "checkpointing repeats them one by one"
    if not (is_sharded or is_checkpointed):
        cause = "a whole tower takes the compiler minutes on this device"
    return f"; block by block{only}, since {cause}"
