"""A run's files and its state on disk: written atomically, verified, read without running code.

A checkpoint is one `torch.save` file that holds tensors and plain values only, so `torch.load` opens it with
`weights_only=True`. Behind it, where a reader of zip files does not look, stands the SHA-256 of all bytes before it:
`torch.load` compares no checksum, and a flipped bit would become a weight. Keys that every checkpoint has:
`format_version`, `model_state_dict`, `architecture` (what `CLIPModel` needs to be built again), `probe` (see
`probe.py`), `epoch`, `global_step`.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch.utils._pytree import tree_leaves

from config import seconds_of

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""2: has a checksum and a probe."""
TIMES_ITS_DURATION = 20
CHECKSUM_MARK = b"\nSHA-256\n"
CHECKSUM_BYTES = len(CHECKSUM_MARK) + hashlib.sha256().digest_size
SPARE_BYTES = 64 * 2**20
BLOCK_BYTES = 2**20


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


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a reader sees the old file or the whole new one, never a part.

    Raises:
        OSError: the disk has no room for it or cannot be written; the file that was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(path, state)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _HashedFile(io.FileIO(temporary, "wb")) as file:
            _write(file, {"format_version": FORMAT_VERSION, **state})
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}); the one before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: _HashedFile, state: dict[str, Any]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError:
        if file.error is not None:  # which PyTorch hides behind its own
            raise file.error from None
        raise
    file.write(CHECKSUM_MARK + file.digest.digest())


class _HashedFile(io.BufferedWriter):
    """A file to write to; keeps the digest of what is written, and the error if that fails."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file)
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _check_room(path: Path, state: dict[str, Any]) -> None:
    storages = [value.untyped_storage() for value in tree_leaves(state) if isinstance(value, torch.Tensor)]
    needed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + SPARE_BYTES
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(
            f"no room for {path}: it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free. The one before is "
            "untouched: make room and --resume, or --resume it with another --output_dir"
        )


def _flush_folder(folder: Path) -> None:
    """Bring a new name to the disk, where the system can."""
    if os.name == "posix":
        with suppress(OSError):  # some network file systems cannot
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


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


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this toolkit onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not a checkpoint of this toolkit, or of a newer format.
    """
    state = load_tensors(path)
    if not is_checkpoint(state):
        raise ValueError(f"{path}: not a checkpoint of this toolkit (weights of others go to --pretrained)")
    check_format(state, path)
    return state  # type: ignore[no-any-return]


def is_checkpoint(content: Any) -> bool:
    """Tell a checkpoint of this toolkit from other content of a `torch.save` file."""
    return isinstance(content, dict) and {"model_state_dict", "architecture"} <= content.keys()


def check_format(state: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint that this version does not read.

    Raises:
        ValueError: of another format, or something is missing.
    """
    version = state.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path}: checkpoint format {version!r}, this version reads {FORMAT_VERSION}")
    if state.get("probe") is None:
        raise ValueError(f"{path}: damaged, or written by other means than this toolkit: it holds no probe")


def load_newest_state(files: RunFiles) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest intact state of a run; None if there is no file of any.

    Raises:
        ValueError: every file is damaged.
    """
    problems = []
    for path in files.states():
        try:
            state = load_checkpoint(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("%s; taking the state before it", problem)
        return path, state
    if problems:
        raise ValueError(f"no state to resume from is intact: {'; '.join(problems)}")
    return None


def load_tensors(path: str | Path) -> Any:
    """Read a `torch.save` file that holds tensors and plain values only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or it holds objects that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    verified = _verify(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it refuses afterwards
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message tells how to load it all the same
        raise ValueError(
            f"{path}: cannot be opened safely: it is damaged, or holds more than tensors and plain values, which could "
            "run code"
        ) from None
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot be opened safely as tensors and plain values: {reason}") from None
    if not verified and isinstance(content, dict) and content.get("format_version") == FORMAT_VERSION:
        raise ValueError(f"{path}: damaged, or not written by checkpoint.save_checkpoint: its checksum is not there")
    return content


def _verify(path: Path) -> bool:
    """Compare a file with the checksum at its end; returns whether there is one.

    Raises:
        ValueError: they differ.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = file.seek(0, os.SEEK_END) - CHECKSUM_BYTES
        file.seek(max(left, 0))
        mark, expected = file.read(len(CHECKSUM_MARK)), file.read()
        if mark != CHECKSUM_MARK:
            return False
        file.seek(0)
        while block := file.read(min(BLOCK_BYTES, left)):
            digest.update(block)
            left -= len(block)
    if digest.digest() != expected:
        raise ValueError(f"{path}: damaged: its content is not what was written, by its SHA-256")
    return True
