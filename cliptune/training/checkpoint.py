"""A run's files, and how its checkpoints are written and found."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from cliptune.model.checkpoint_fields import CONFIG_KEYS, STATE_KEYS, check_fields
from cliptune.model.checkpoint_file import load_checkpoint, read_value, save_checkpoint
from cliptune.runtime.files import has_link, read_json_object, remove_partial_files, size_on_disk
from cliptune.runtime.lock import exclusive
from cliptune.runtime.messages import one_line
from cliptune.training.background import BackgroundThread, HostCopies, has_room_for_copies, no_forks
from cliptune.training.state import RunState

logger = logging.getLogger(__name__)

State = dict[str, Any]
Complete = Callable[[State], State]

TIMES_ITS_DURATION = 20
STATE_NAME = re.compile(r"step_\d{8,}\.pth")
"""Of a state before the last; a copy that somebody made has another name, and stays."""
FIGURES = ("training_curves.png", "model_metrics.png", "evaluation_metrics.png", "interpolation.png")


class RunFiles:
    """Where a run leaves what, below its output folder."""

    def __init__(self, output_dir: Path) -> None:
        self.root = output_dir
        self.best = output_dir / "model-checkpoint" / "best_model.pth"
        self.loaded = output_dir / "model-checkpoint" / "loaded_model.pth"
        self.adapter = output_dir / "model-checkpoint" / "adapter.safetensors"
        self.last = output_dir / "model-checkpoint" / "last_model.pth"
        self.interpolated = output_dir / "model-checkpoint" / "interpolated_model.pth"
        self.results = output_dir / "results" / "training_results.json"
        self.retrieval = output_dir / "results" / "retrieval.npz"
        self.skipped = output_dir / "results" / "skipped.json"
        self.folds = output_dir / "results" / "folds.json"
        self.fold_runs = output_dir / "folds"
        self.log = output_dir / "logs" / "train.log"
        self.history = output_dir / "logs" / "history.jsonl"
        self.steps = output_dir / "logs" / "steps.jsonl"
        self.events = output_dir / "logs" / "tensorboard"
        self.trace = output_dir / "logs" / "profile.json"
        self.cache = output_dir / "cache"

    def earlier(self, step: int) -> Path:
        """Return where the state of a step is once `last` is a later one's."""
        return self.last.with_name(f"step_{step:08d}.pth")

    def states(self) -> list[Path]:
        """List the files that a run can be resumed from, newest first."""
        ours = [path for path in self.last.parent.glob("step_*.pth") if STATE_NAME.fullmatch(path.name)]
        earlier = sorted(ours, reverse=True)
        return [self.last, *earlier] if self.last.exists() else earlier

    @classmethod
    def around(cls, checkpoint: Path) -> RunFiles:
        """Return the files of the run in whose `model-checkpoint` folder a checkpoint lies.

        Raises:
            ValueError: it lies in no such folder.
        """
        if checkpoint.resolve().parent.name != "model-checkpoint" and checkpoint.parent.name != "model-checkpoint":
            raise ValueError(
                f"{checkpoint} lies in no run's model-checkpoint folder: name the folder to go on in with --output_dir"
            )
        return cls(checkpoint.parent.parent)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the output folder; the system frees it when the process ends, however it does.

        Raises:
            ValueError: another run is there.
        """
        for folder in self._folders():
            if folder.is_symlink() and not folder.exists():
                raise FileNotFoundError(f"{folder} is a link to {folder.readlink()}, which is not there")
        with exclusive(self.root):
            for folder in (self.root, self.last.parent):
                remove_partial_files(folder)
            for folder in (self.results.parent, self.log.parent):  # which the other stages write to as well
                remove_partial_files(folder, older_than=60)
            yield

    def set_aside_earlier_run(self) -> Path | None:
        """Move what an earlier run left here to `previous/<its start time>/`; return that folder, if there was any.

        A folder that is a link to another disk, or mounted, keeps its files there, in a `previous` of its own, which a
        link names; nothing is copied, so that nothing is lost half way.
        """
        names = (*FIGURES, "report.html", "evaluation_results.json", "evaluation_skipped.json")
        of_results = [self.results.with_name(name) for name in names]
        of_logs = [self.log, self.history, self.steps, self.events, self.trace]
        # the results last: they say when the run began, to whoever comes after a kill half way
        models = [self.best, self.adapter, self.loaded, self.interpolated, *self.states()]
        found = [*models, self.fold_runs, self.folds, self.retrieval, self.skipped, *of_logs, *of_results, self.results]
        found = [path for path in found if path.exists()]
        if not found:
            return None
        previous = self.root / "previous"
        links = [path for path in previous.glob("*/*") if path.is_symlink()]
        size, before = size_on_disk(*found), size_on_disk(previous, *links)
        folder = previous / self._start_of_earlier_run(found)
        while any((folder / path.relative_to(self.root)).exists() for path in found):
            folder = folder.with_name(f"{folder.name}+")
        for path in found:
            _move(path, folder / path.relative_to(self.root), folder.name)
        others = f"; {previous} holds {_shown_size(size + before)} in all" if before else ""
        logger.info("the earlier run's files are now in %s (%s)%s", folder, _shown_size(size), others)
        return folder

    def _folders(self) -> tuple[Path, ...]:
        return (self.root, self.last.parent, self.results.parent, self.log.parent)

    def _start_of_earlier_run(self, found: list[Path]) -> str:
        """Return when a run began, as a folder's name: what a results file says is a time, or is not used."""
        try:
            stored = read_json_object(self.results) if self.results.is_file() else {}
            started = datetime.fromisoformat(stored["started_at"])
        except (OSError, ValueError, KeyError, TypeError):
            oldest = min(path.stat().st_mtime for path in found)
            started = datetime.fromtimestamp(min(max(oldest, 0), 4e9))  # a file's time may be any number, too
        return started.isoformat(timespec="seconds").replace(":", "-")


def _move(path: Path, target: Path, run: str) -> None:
    """Rename a file; one that lies on another disk goes to `previous/<run>` there, which a link leads to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        there = path.parent.resolve() / "previous" / run
        while there.exists():
            there = there.with_name(f"{there.name}+")
        there.mkdir(parents=True)
        target.parent.rmdir()
        target.parent.symlink_to(there)
        path.rename(target)


def _shown_size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


class CheckpointWriter:
    """Writes a run's checkpoints; where most of the model never changes, no more often than is worth the time.

    With frozen towers an epoch can take less time than writing their weights once more. There, states that come sooner
    after a write than 20 times its duration are copied, and written with the next that does not, or by `flush`.

    With a `background` states are copied to main memory, and a thread writes the copies. What comes while it works
    waits in the same way; where several states are kept, the caller waits for the thread instead, so that each is
    written. If main memory has no room for the copies they are written in place.

    Args:
        files: the run's.
        run_id: the run's, as its checkpoints have it.
        fixed: names of the model's tensors that never change; none: every state is written at once.
        keep: how many states to resume from there are; those before the last as `step_<step>.pth`.
        complete: adds to a state what it lacks and its model tells, when it is written; None: nothing.
        save_adapter: writes `files.adapter` of a state.
        background: makes, of the first state, what takes the place of `complete` in a thread; None: there is none.
        clock: tells the time, in seconds.

    Attributes:
        last_step: step of the state in `files.last`; None: there is none, or it is damaged.
        own: states before the last that are this run's, and may be deleted.
    """

    def __init__(
        self,
        files: RunFiles,
        *,
        run_id: str = "",
        fixed: Collection[str] = (),
        keep: int = 1,
        complete: Complete | None = None,
        save_adapter: Callable[[State], None] | None = None,
        background: Callable[[State], Complete] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.files, self.fixed, self.keep, self.complete, self._clock = files, fixed, keep, complete, clock
        self.last_step: int | None = None
        self.own = {path for path in files.states() if read_value(path, "run_id", "") == run_id}
        self._save_adapter, self._background, self._is_in_background = save_adapter, background, False
        self._copies, self._thread = HostCopies(fixed), BackgroundThread("checkpoints")
        self._waiting: dict[Path, State] = {}
        self._writing: dict[Path, State] = {}
        """The thread's while it works; afterwards what an error has left."""
        self._next_write = clock()

    def save(self, states: Mapping[Path, State]) -> None:
        """Write states in their order, or let copies of them wait in place of those for the same files.

        Raises:
            OSError: a file cannot be written, or could not by the thread.
        """
        self._thread.check()
        if self.keep > 1 and not self.fixed:
            self._thread.wait()
        self._begin_background(states)
        wait = self._must_wait()
        copies = self._copied(states) if wait or self._is_in_background else None
        self._waiting = _replaced(self._waiting, states if copies is None else copies)
        if copies is None:
            self.flush()
        elif not wait:
            self._start()

    def check(self) -> None:
        """Raise the error of the thread, if there is one; let it write what waits, if it has nothing to do."""
        self._thread.check()
        if self._is_in_background and self._waiting and not self._must_wait():
            self._start()

    def flush(self) -> None:
        """Write what waits, and wait for the thread.

        Raises:
            OSError: a file cannot be written.
        """
        self._thread.wait()
        self._collect()
        self._write()

    def _must_wait(self) -> bool:
        return self._thread.is_busy or (bool(self.fixed) and self._clock() < self._next_write)

    def _start(self) -> None:
        self._collect()
        self._thread.start(self._write)

    def _begin_background(self, states: Mapping[Path, State]) -> None:
        """With the first states: find out whether they fit into main memory, and make what completes them there."""
        background, self._background = self._background, None
        if background is None:
            return
        if has_room_for_copies(states):
            self.complete, self._is_in_background = background(next(iter(states.values()))), True
        else:
            logger.warning("checkpoints are written between the steps: main memory has no room for a copy of the state")

    def _copied(self, states: Mapping[Path, State]) -> dict[Path, State] | None:
        """Copy states to main memory; None if that cannot be done, and the thread has nothing to do any more."""
        try:
            return self._copies.take(states)
        except (RuntimeError, MemoryError) as error:  # pinned memory may end before all memory does
            self._is_in_background = False
            logger.warning("checkpoints are written between the steps from here on: %s", one_line(error))
            return None

    def _collect(self) -> None:
        """Put together what is to be written now: what an error has left, and what waits."""
        self._writing, self._waiting = _replaced(self._writing, self._waiting), {}

    def _write(self) -> None:
        self._copies.wait()
        start = self._clock()
        written: dict[int, Path] = {}
        completed: dict[int, State] = {}
        for path in list(self._writing):
            state = self._writing[path]
            if (same := written.get(id(state))) is not None and has_link(same, path):
                del self._writing[path]
                continue
            written[id(state)] = path
            self._write_one(path, state, completed)
            del self._writing[path]
        end = self._clock()
        self._next_write = end + TIMES_ITS_DURATION * (end - start)

    def _write_one(self, path: Path, state: State, completed: dict[int, State]) -> None:
        """Write a file; `completed`: what was added to states by their models, which are often the same."""
        if path == self.files.adapter:
            assert self._save_adapter is not None
            self._save_adapter(state)
            return
        if self.complete is not None:
            model = id(state["model_state_dict"])
            if model not in completed:
                with no_forks():
                    whole = self.complete(state)
                completed[model] = {key: value for key, value in whole.items() if value is not state.get(key)}
            state = {**state, **completed[model]}
        if path == self.files.last:
            self._save_last(state)
        else:
            save_checkpoint(path, state)

    def _save_last(self, state: dict[str, Any]) -> None:
        """Write the newest state; leave the one before under its own name, and delete those that are too many."""
        step, last = state["global_step"], self.files.last
        if self.keep > 1 and self.last_step not in {None, step} and last.exists():
            earlier = self.files.earlier(self.last_step)
            if has_link(last, earlier):  # a rename would leave a moment without a last one
                self.own.add(earlier)
            else:
                logger.warning("no state before %s is kept: this disk does not take a second name for a file", last)
        save_checkpoint(last, state)
        self.last_step = step
        others = [path for path in self.files.states() if path != last]
        before = [path for path in others if path.name < self.files.earlier(step).name]
        # later ones are of a course that was left: resumed at step 10, the old step 20 is no ancestor of the new one
        for path in self.own & (set(others) - set(before[: self.keep - 1])):
            path.unlink(missing_ok=True)


def _replaced(earlier: Mapping[Path, State], states: Mapping[Path, State]) -> dict[Path, State]:
    """Return earlier states with others in place of those for the same files; the order is that of the others."""
    return {path: state for path, state in earlier.items() if path not in states} | dict(states)


def check_state(content: dict[str, Any], path: Path) -> None:
    """Check that a run can be resumed from a checkpoint, before anything is made of it.

    Raises:
        ValueError: it holds the model alone, or keys of the run's state are missing or of another type.
    """
    if "run_state" not in content and "optimizer_state_dict" not in content:
        raise ValueError(f"{path} holds no training state to resume from; use last_model.pth")
    check_fields(content, path, needs=(*CONFIG_KEYS, *STATE_KEYS))
    RunState.check(content, path)


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
