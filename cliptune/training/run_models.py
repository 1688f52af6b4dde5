"""The two models that a run reports, the best one and the one as loaded: found, brought along, verified."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from cliptune.model.checkpoint_fields import LATER_STATE_KEYS, STATE_KEYS
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.runtime.files import atomic_writer, has_link
from cliptune.runtime.messages import count, one_line
from cliptune.training.checkpoint import RunFiles, Saver
from cliptune.training.state import RunState

logger = logging.getLogger(__name__)

TRAINING_KEYS = {*STATE_KEYS, *LATER_STATE_KEYS} - {"starts_random", "holds_batchnorm"}
"""Of a checkpoint, what its model does without."""


def why_not(path: Path, *, run_id: str, epoch: int) -> str:
    """Say why a file is not the model that a run had after an epoch; nothing if it is."""
    try:
        content = load_checkpoint(path)
    except (ValueError, OSError) as error:
        return one_line(error)
    if content.get("run_id", "") != run_id:
        return f"{path} is another run's"
    return "" if content["epoch"] == epoch else f"{path} is of epoch {content['epoch']}"


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
    for path, epoch in ((files.loaded, 0), (files.best, state.best_epoch)):
        reason = why_not(path, run_id=run_id, epoch=epoch)
        if reason and path.exists():
            aside = path.with_name(f"{path.stem}.aside.pth")
            while aside.exists():  # of an earlier start
                aside = aside.with_name(f"{aside.stem}+.pth")
            path.rename(aside)
            logger.warning("%s; that file is now %s", reason, aside)
        if reason and not why_not(origin / path.name, run_id=run_id, epoch=epoch):
            _link_or_copy(origin / path.name, path)
    if not files.best.exists() and state.totals is None and state.epoch == state.best_epoch:
        content = load_checkpoint(state_path)  # whose weights are the best ones
        save_checkpoint(files.best, {key: value for key, value in content.items() if key not in TRAINING_KEYS})
    if not files.best.exists() and files.loaded.exists():
        if state.best_epoch:
            logger.warning(
                "the best model so far, of epoch %d, is not there any more: it is again the model as loaded, until an "
                "epoch is better",
                state.best_epoch,
            )
        state.best, state.best_epoch = state.baseline, 0
        _link_or_copy(files.loaded, files.best)
    for path in (files.best, files.loaded):
        if not path.exists():
            logger.warning("%s is not there, and cannot be had: it is of a run of before it was kept, or lost", path)


def verify_best(state: RunState, files: RunFiles, *, run_id: str) -> None:
    """Check that the best model that a run reports is what lies there.

    Raises:
        OSError: it is not; says why.
    """
    reason = why_not(files.best, run_id=run_id, epoch=state.best_epoch)
    if reason:
        raise OSError(
            f"the run has ended after {count(len(state.history) - 1, 'epoch')}, but its best model, of epoch "
            f"{state.best_epoch}, is not in {files.best}: {reason}. {files.last} is the last one"
        )


def _link_or_copy(source: Path, path: Path) -> None:
    if not has_link(source, path):  # another disk, or one that takes no second names
        with source.open("rb") as content, atomic_writer(path) as file:
            shutil.copyfileobj(content, file)


def evaluate_anew(model: Any, state: RunState, files: RunFiles, *, validate: Any) -> None:
    """Evaluate the models as loaded and the best on data that has changed, so that what comes can be compared.

    Args:
        model: whose weights are the same afterwards.
        state: that a run goes on from. The epoch that was under way begins anew.
        files: of the run.
        validate: evaluates the model.

    Raises:
        FileNotFoundError: one of the two is not there.
    """
    current = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for path, name in ((files.loaded, "baseline"), (files.best, "best")):
        model.load_state_dict(load_checkpoint(path)["model_state_dict"])
        setattr(state, name, validate().to_dict())
    model.load_state_dict(current)
    state.totals = None
