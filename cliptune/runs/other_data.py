"""A run that is resumed with other data: what was found on the data before is compared with nothing found later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cliptune.model.parallel import is_sharded
from cliptune.recorded import shown_epoch
from cliptune.runs.data import RunData
from cliptune.runtime.distributed import broadcast, is_main
from cliptune.runtime.messages import count
from cliptune.training.run_models import evaluate_both, give_way
from cliptune.training.saver import Saver
from cliptune.training.state import RunState

logger = logging.getLogger("train")


class Anew(NamedTuple):
    """The two models of a run on validation data that is not what they were evaluated on before."""

    loaded: Any
    best: Any
    """An `evaluation.Evaluation`, as the other one is."""
    epoch: float
    step: int
    """Where the best one stood in the run; 0: it is the model as loaded."""


def go_on_with_other_data(
    state: RunState,
    saver: Saver,
    data: RunData[Any],
    *,
    changed: Collection[str],
    open_model: Callable[[Path], Any],
) -> Anew | None:
    """Begin the epoch that was under way again, and with other validation data the record of evaluations as well.

    The models as loaded and the best are evaluated on it. Where the best is not better there it gives way to the model
    as loaded. Every rank calls this.

    Args:
        state: of the run, as its checkpoint has it.
        saver: of the run.
        data: that the run goes on with.
        changed: splits whose data is not what it was.
        open_model: builds the model that a file holds.

    Returns:
        The two models on other validation data; None: it is the same, and what was found on it stands.

    Raises:
        ValueError: the model is sharded.
        FileNotFoundError: one of the two models is not there.
    """
    again = "the epoch under way begins again" if state.totals is not None else "the next epoch is of the new data"
    state.leave_epoch()
    if "val" not in changed:
        logger.info("the validation data is the same, and what was found on it stands; %s", again)
        return None
    if is_sharded(saver.trainer.model):
        raise ValueError("--allow_data_change does not go with --parallel fsdp: resume once without it")
    logger.info("the models as loaded and the best are evaluated on the new validation data; %s", again)
    epoch, step, selection, num_before = state.best_epoch, state.best_step, state.selection, len(state.history)
    with state.wall_time.inside("validation"):
        loaded, best = evaluate_both(
            saver.files, open_model=open_model, evaluate=partial(data.validate, keep_features=True)
        )
    stays = state.begin_again(*broadcast((loaded.to_dict(), best.to_dict())))
    key = state.selection
    if key != selection:
        logger.warning("captions repeat otherwise now: the best epoch goes by %s, no longer by %s", key, selection)
    logger.info(
        "on the new validation data the model as loaded has an RSum of %.1f%s. What %s found before is compared with "
        "nothing from here on, and --early_stopping_patience begins to count again",
        loaded.metrics[key],
        f", the best one so far, of epoch {shown_epoch(epoch)}, of {best.metrics[key]:.1f}" if epoch else "",
        count(num_before, "evaluation"),
    )
    if epoch and not stays and is_main():
        give_way(saver.files, reason=f"the best model so far, of epoch {shown_epoch(epoch)}, is no better there")
    if state.epoch:  # else the file of the model as loaded would be written from what is trained already
        saver.save(state)
    return Anew(loaded, best, epoch, step)
