"""The two models that a run reports, the best one and the one as loaded: found, brought along, verified, evaluated."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cliptune.model.checkpoint_fields import LATER_STATE_KEYS, STATE_KEYS
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.recorded import shown_epoch
from cliptune.runtime.files import atomic_writer, has_link
from cliptune.runtime.messages import count, one_line
from cliptune.training.checkpoint import RunFiles
from cliptune.training.saver import Saver
from cliptune.training.state import RunState

logger = logging.getLogger(__name__)

E = TypeVar("E")
"""`evaluation.Evaluation`."""
TRAINING_KEYS = {*STATE_KEYS, *LATER_STATE_KEYS} - {"starts_random", "holds_batchnorm"}
"""Of a checkpoint, what its model does without."""


def why_not(path: Path, *, run_id: str, epoch: float, step: int) -> str:
    """Say why a file is not the model that a run had at an evaluation; nothing if it is."""
    try:
        content = load_checkpoint(path)
    except (ValueError, OSError) as error:
        return one_line(error)
    if content.get("run_id", "") != run_id:
        return f"{path} is another run's"
    if content["epoch"] != math.ceil(epoch):  # an evaluation at 2.25 was within epoch 3
        return f"{path} is of epoch {content['epoch']}"
    return "" if content["global_step"] == step else f"{path} is of step {content['global_step']}"


def settle_models(state: RunState, saver: Saver, *, state_path: Path) -> None:
    """Let the run's folder hold the two models that a resumed state speaks of.

    They are linked or copied from the folder that the state was read from. A best model that is not to be had, since
    it was deleted, damaged or replaced by a later epoch's, gives way to the model as loaded.

    Args:
        state: that the run goes on from.
        saver: of the run.
        state_path: the file that the state was read from; often of the run's own folder.
    """
    files, run_id = saver.files, saver.about["run_id"]
    origin = state_path.parent
    for path, epoch, step in ((files.loaded, 0.0, 0), (files.best, state.best_epoch, state.best_step)):
        wanted: Any = {"run_id": run_id, "epoch": epoch, "step": step}
        reason = why_not(path, **wanted)
        if reason and path.exists():
            logger.warning("%s; that file is now %s", reason, _set_aside(path))
        if reason and not why_not(origin / path.name, **wanted):
            _link_or_copy(origin / path.name, path)
            if path == files.best and (origin / files.adapter.name).exists():
                _link_or_copy(origin / files.adapter.name, files.adapter)
    if not files.best.exists() and state.step == state.best_step:
        content = load_checkpoint(state_path)  # whose weights are the best ones
        save_checkpoint(files.best, {key: value for key, value in content.items() if key not in TRAINING_KEYS})
    if not files.best.exists() and files.loaded.exists():
        if state.best_epoch:
            logger.warning(
                "the best model so far, of epoch %s, is not there any more: it is again the model as loaded, until an "
                "epoch is better",
                shown_epoch(state.best_epoch),
            )
        state.best, state.best_epoch, state.best_step = state.baseline, 0, 0
        files.adapter.unlink(missing_ok=True)  # what it holds is not in the best model any more
        _link_or_copy(files.loaded, files.best)
    for path in (files.best, files.loaded):
        if not path.exists():
            logger.warning("%s is not there, and cannot be had: it is of a run of before it was kept, or lost", path)


def give_way(files: RunFiles, *, reason: str) -> None:
    """Set the best model aside and let the model as loaded be the best one again; says so, with the reason."""
    aside = _set_aside(files.best)
    if files.adapter.exists():
        _set_aside(files.adapter)
    _link_or_copy(files.loaded, files.best)
    logger.warning("%s: it is again the model as loaded, until an epoch is better; that file is now %s", reason, aside)


def _set_aside(path: Path) -> Path:
    """Give a file a name that no other has; return it."""
    aside = path.with_name(f"{path.stem}.aside{path.suffix}")
    while aside.exists():  # of an earlier start
        aside = aside.with_name(f"{aside.stem}+{path.suffix}")
    path.rename(aside)
    return aside


def verify_best(state: RunState, files: RunFiles, *, run_id: str) -> None:
    """Check that the best model that a run reports is what lies there.

    Raises:
        OSError: it is not; says why.
    """
    reason = why_not(files.best, run_id=run_id, epoch=state.best_epoch, step=state.best_step)
    if reason:
        raise OSError(
            f"the run has ended after {count(len(state.history) - 1, 'evaluation')}, but its best model, of epoch "
            f"{shown_epoch(state.best_epoch)}, is not in {files.best}: {reason}. {files.last} is the last one"
        )


def _link_or_copy(source: Path, path: Path) -> None:
    if not has_link(source, path):  # another disk, or one that takes no second names
        with source.open("rb") as content, atomic_writer(path) as file:
            shutil.copyfileobj(content, file)


def evaluate_both(files: RunFiles, *, open_model: Callable[[Path], Any], evaluate: Callable[[Any], E]) -> tuple[E, E]:
    """Evaluate the models as loaded and the best, one after the other.

    Args:
        files: of the run.
        open_model: builds the model that a file holds.
        evaluate: evaluates a model.

    Raises:
        FileNotFoundError: one of the two is not there.
    """
    return evaluate(open_model(files.loaded)), evaluate(open_model(files.best))
