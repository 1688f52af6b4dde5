"""A run's files and its state on disk: written atomically, read without running code.

A checkpoint is one `torch.save` file that holds tensors and plain values only, so `torch.load` opens it with
`weights_only=True`. Keys that every checkpoint has: `format_version`, `model_state_dict`, `architecture` (what
`CLIPModel` needs to be built again), `epoch`, `global_step`.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import time
import uuid
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1
TIMES_ITS_DURATION = 20


class RunFiles:
    """Where a run leaves what, below its output folder."""

    def __init__(self, output_dir: Path) -> None:
        self.root = output_dir
        self.best = output_dir / "model-checkpoint" / "best_model.pth"
        self.last = output_dir / "model-checkpoint" / "last_model.pth"
        self.results = output_dir / "results" / "training_results.json"
        self.bad_images = output_dir / "results" / "bad_images.json"
        self.log = output_dir / "logs" / "train.log"
        self.history = output_dir / "logs" / "history.jsonl"
        self.events = output_dir / "logs" / "tensorboard"
        self.trace = output_dir / "logs" / "profile.json"
        self.cache = output_dir / "cache"

    def set_aside_earlier_run(self) -> Path | None:
        """Move what an earlier run left here to `previous/<its start time>/`; return that folder, if there was any."""
        figures = ("training_curves.png", "model_metrics.png", "evaluation_metrics.png", "evaluation_results.json")
        own = [self.best, self.last, self.results, self.bad_images, self.log, self.history, self.events, self.trace]
        left = [path for path in [*own, *(self.results.parent / name for name in figures)] if path.exists()]
        if not left:
            return None
        folder = self.root / "previous" / self._start_of_earlier_run(left)
        while folder.exists():
            folder = folder.with_name(f"{folder.name}+")
        for path in left:
            target = folder / path.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        return folder

    def _start_of_earlier_run(self, left: list[Path]) -> str:
        try:
            started = str(json.loads(self.results.read_text(encoding="utf-8"))["started_at"])
        except (OSError, ValueError, KeyError, TypeError):
            oldest = min(path.stat().st_mtime for path in left)
            started = datetime.fromtimestamp(oldest).isoformat(timespec="seconds")
        return started.replace(":", "-")


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


class CheckpointWriter:
    """Writes a run's checkpoints; where most of the model never changes, no more often than is worth the time.

    With frozen towers an epoch can take less time than writing their weights once more. There, states that come sooner
    after a writing than 20 times its duration are copied, and written with the next that does not, or by `flush`.

    Args:
        fixed: names of the model's tensors that never change; none: every state is written at once.
    """

    def __init__(self, fixed: Collection[str] = ()) -> None:
        self.fixed = fixed
        self._waiting: dict[Path, dict[str, Any]] = {}
        self._due = 0.0

    def save(self, states: Mapping[Path, dict[str, Any]]) -> None:
        """Write states in their order, or keep copies of them in place of those that wait for the same files.

        Raises:
            OSError: a file cannot be written.
        """
        wait = bool(self.fixed) and time.monotonic() < self._due
        for path, state in states.items():
            self._waiting.pop(path, None)  # so that the order is this call's
            self._waiting[path] = self._copied(state) if wait else state
        if not wait:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: a file cannot be written.
        """
        start = time.monotonic()
        for path in list(self._waiting):
            save_checkpoint(path, self._waiting[path])
            del self._waiting[path]
        end = time.monotonic()
        self._due = end + TIMES_ITS_DURATION * (end - start)

    def _copied(self, state: dict[str, Any]) -> dict[str, Any]:
        tensors = state["model_state_dict"]
        return copy.deepcopy(state, {id(tensors[name]): tensors[name] for name in self.fixed})


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
