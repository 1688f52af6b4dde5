"""A run's state on disk: written atomically, read without running code.

A checkpoint is one `torch.save` file that holds tensors and plain values only, so `torch.load` opens it with
`weights_only=True`. Keys that every checkpoint has: `format_version`, `model_state_dict`, `architecture` (what
`CLIPModel` needs to be built again), `epoch`, `global_step`.
"""

from __future__ import annotations

import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a reader sees the old file or the whole new one, never a part.

    Raises:
        OSError: the file cannot be written; the one that was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this toolkit onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not a checkpoint of this toolkit, or of a newer format.
    """
    state = load_tensors(path)
    if not isinstance(state, dict) or not {"model_state_dict", "architecture"} <= state.keys():
        raise ValueError(f"{path}: not a checkpoint of this toolkit (weights of others go to --pretrained)")
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: checkpoint format {version!r}, this version reads {FORMAT_VERSION}")
    return state


def load_tensors(path: str | Path) -> Any:
    """Read a `torch.save` file that holds tensors and plain values only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or it holds objects that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot be opened safely as tensors and plain values: {reason}") from None
