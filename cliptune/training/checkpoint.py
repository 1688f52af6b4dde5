"""A run's files, and when its states are written."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.settings import seconds_of

logger = logging.getLogger(__name__)


TIMES_ITS_DURATION = 20


class RunFiles:
    """Where a run leaves what, below its output folder."""

    def __init__(self, output_dir: Path) -> None:
        self.root = output_dir
        self.best = output_dir / "model-checkpoint" / "best_model.pth"
        self.last = output_dir / "model-checkpoint" / "last_model.pth"
        self.results = output_dir / "results" / "training_results.json"
        self.bad_images = output_dir / "results" / "skipped.json"
        self.log = output_dir / "logs" / "train.log"
        self.history = output_dir / "logs" / "history.jsonl"
        self.events = output_dir / "logs" / "tensorboard"
        self.trace = output_dir / "logs" / "profile.json"
        self.cache = output_dir / "cache"

    def earlier(self, step: int) -> Path:
        """Return where the state of a step is kept once `last` is a later one's."""
        return self.last.with_name(f"step_{step:08d}.pth")

    def states(self) -> list[Path]:
        """List the files that a run can be resumed from, newest first."""
        earlier = sorted(self.last.parent.glob("step_*.pth"), reverse=True)
        return [self.last, *earlier] if self.last.exists() else earlier

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the output folder; the system frees it when the process ends, however it does.

        Raises:
            ValueError: another run is there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"another run is writing to {self.root}: wait until it ends, or choose another --output_dir"
            ) from None
        try:
            for partial in self.last.parent.glob(".*.tmp"):  # left by a run that was killed while it wrote
                partial.unlink()
            yield
        finally:
            lock.release()

    def set_aside_earlier_run(self) -> Path | None:
        """Move what an earlier run left here to `previous/<its start time>/`; return that folder, if there was any."""
        figures = ("training_curves.png", "model_metrics.png", "evaluation_metrics.png", "evaluation_results.json")
        own = [
            self.best,
            *self.states(),
            self.results,
            self.bad_images,
            self.log,
            self.history,
            self.events,
            self.trace,
        ]
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


class CheckpointWriter:
    """Writes a run's checkpoints; where most of the model never changes, no more often than is worth the time.

    With frozen towers an epoch can take less time than writing their weights once more. There, states that come sooner
    after a writing than 20 times its duration are copied, and written with the next that does not, or by `flush`.

    Args:
        files: the run's.
        fixed: names of the model's tensors that never change; none: every state is written at once.
        keep: how many states to resume from there are; those before the last as `step_<number>.pth`.
        every: steps, or a time, between two states within an epoch; None: none is due there.
        complete: adds what a state lacks, when it is written; None: nothing.

    Attributes:
        last_step: step of the state in `files.last`; None: there is none, or it is damaged.
    """

    def __init__(
        self,
        files: RunFiles,
        *,
        fixed: Collection[str] = (),
        keep: int = 1,
        every: int | str | None = None,
        complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.files, self.fixed, self.keep, self.every, self.complete = files, fixed, keep, every, complete
        self.last_step: int | None = None
        self._waiting: dict[Path, dict[str, Any]] = {}
        self._due = 0.0
        self._saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Tell whether a state should be saved after this step."""
        if isinstance(self.every, str):
            return time.monotonic() - self._saved_at >= seconds_of(self.every)
        return self.every is not None and step % self.every == 0

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
        self._saved_at = time.monotonic()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: a file cannot be written.
        """
        start = time.monotonic()
        for path in list(self._waiting):
            state = self._waiting[path]
            if self.complete is not None:
                state = self.complete(state)
            if path == self.files.last:
                self._save_last(state)
            else:
                save_checkpoint(path, state)
            del self._waiting[path]
        end = time.monotonic()
        self._due = end + TIMES_ITS_DURATION * (end - start)

    def _save_last(self, state: dict[str, Any]) -> None:
        """Write the newest state; keep the one before under its own name as well, and drop those that are too many."""
        step, last = state["global_step"], self.files.last
        if self.keep > 1 and self.last_step not in {None, step} and last.exists():
            _link(last, self.files.earlier(self.last_step))  # a rename would leave a moment without a last one
        save_checkpoint(last, state)
        self.last_step = step
        others = [path for path in self.files.states() if path != last]
        before = [path for path in others if path.name < self.files.earlier(step).name]
        for path in set(others) - set(before[: self.keep - 1]):  # later ones are of a course that was left
            path.unlink()

    def _copied(self, state: dict[str, Any]) -> dict[str, Any]:
        tensors = state["model_state_dict"]
        return copy.deepcopy(state, {id(tensors[name]): tensors[name] for name in self.fixed})


def _link(path: Path, name: Path) -> None:
    name.unlink(missing_ok=True)
    try:
        name.hardlink_to(path)
    except OSError as error:
        logger.warning("only %s is kept, this disk does not take a second name for a file: %s", path, error)


def load_newest_state(files: RunFiles) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest intact state of a run; None if there is no file of any.

    Raises:
        ValueError: every file is damaged.
    """
    issues = []
    for path in files.states():
        try:
            state = load_checkpoint(path)
        except (ValueError, OSError) as error:
            issues.append(str(error))
            continue
        for issue in issues:
            logger.warning("%s; taking the state before it", issue)
        return path, state
    if issues:
        raise ValueError(f"no state to resume from is intact: {'; '.join(issues)}")
    return None
