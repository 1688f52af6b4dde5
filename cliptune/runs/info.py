"""What a results file says of the run that wrote it: its command, software, machine and model."""

from __future__ import annotations

import platform
import shlex
import sys
from typing import Any

import torch

from cliptune.results import RunInfo
from cliptune.runtime.environment import device_name, git_commit, package_versions
from cliptune.runtime.messages import shorten


def command_line(stage: str, argv: list[str] | None) -> str:
    """Return the command that started a stage, as a shell takes it (`argv`: what its `main` was given)."""
    return shlex.join([stage, *(sys.argv[1:] if argv is None else argv)])


def run_info(
    *,
    command: str,
    device: torch.device,
    precision: str,
    world_size: int,
    model_name: str,
    model_settings: dict[str, Any],
) -> RunInfo:
    """Collect what a results file says of its run; takes a few hundredths of a second (Git).

    Args:
        command: from `command_line`.
        device: of this process.
        precision: as resolved, such as `bf16`, or `bf16, compiled`.
        world_size: processes of the run.
        model_name: of the model that runs, `model.architecture.name`.
        model_settings: `model.architecture.to_dict()`.
    """
    return RunInfo(
        versions=package_versions(),
        python=platform.python_version(),
        system=platform.platform(),
        commit=git_commit(),
        command=command,
        device=str(device),
        device_name=device_name(device),
        precision=precision,
        world_size=world_size,
        model_name=shorten(model_name),
        model_settings={
            key: shorten(value) if isinstance(value, str) else value for key, value in model_settings.items()
        },
    )
