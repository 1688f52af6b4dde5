"""What of a run goes on beside its steps, in threads: on a GPU, whose steps leave the CPU time."""

from __future__ import annotations

from typing import Any

import torch

from cliptune.runtime.device import product_precision
from cliptune.settings import Config, seconds_of, steps_of
from cliptune.training.checkpoint import RunFiles
from cliptune.training.saver import Saver


def works_in_background(device: torch.device) -> bool:
    """Tell whether checkpoints are written and images drawn in threads; on the CPU they would take time from steps.

    The self-test of a checkpoint then leaves settings of the process alone, so somebody who has lowered the precision
    of all products has them written in place.
    """
    return device.type == "cuda" and product_precision() == "highest"


def make_saver(
    config: Config, trainer: Any, *, files: RunFiles, about: dict[str, Any], complete: Any, self_tester: Any
) -> Saver:
    """Make what saves a run; `complete` is `clip_model.add_self_test`, `self_tester` the one of that name there."""
    return Saver(
        files,
        trainer,
        about=about,
        keep=config.run.keep_checkpoints,
        complete=complete,
        background=self_tester if works_in_background(trainer.model.device) else None,
        every_steps=steps_of(config.run.checkpoint_every),
        every_seconds=seconds_of(config.run.checkpoint_every),
    )
