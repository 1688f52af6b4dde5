"""What a run's evaluations found, query by query, and what it says of them at its end: did it help?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cliptune import recorded
from cliptune.data.pairs import Pairs
from cliptune.features.retrieval import Retrieval
from cliptune.features.verdict import DIRECTIONS, Verdict, answered, compare, compare_best
from cliptune.model.parallel import is_sharded
from cliptune.runs.data import RunData
from cliptune.runs.other_data import Anew
from cliptune.runs.start import Resumed
from cliptune.runtime.distributed import is_main, world_size
from cliptune.runtime.messages import count
from cliptune.training.checkpoint import RunFiles
from cliptune.training.run_models import evaluate_both
from cliptune.training.state import RunState

logger = logging.getLogger("train")

MERGED = "merged_rsum"
CURVES = ("i2t_r1", "t2i_r1")
"""Recalls whose gains are recorded for every evaluation."""


def open_retrieval(
    files: RunFiles,
    pairs: Pairs,
    state: RunState,
    *,
    run_id: str,
    resumed: Resumed | None,
    anew: Anew | None = None,
    device: torch.device,
) -> Retrieval | None:
    """Begin a run's record of what its evaluations found, or go on with it; None on all ranks but the main one.

    Args:
        files: of the run.
        pairs: that validate.
        state: where the run begins.
        run_id: of the run.
        resumed: the checkpoint that the run goes on from; its folder may be another one. None: from none.
        anew: the model as loaded and the best on validation data that has changed, with which it begins again.
        device: where answers are computed.
    """
    if not is_main():
        return None
    retrieval = Retrieval(files.retrieval, pairs, run_id=run_id)
    if anew is not None:
        retrieval.begun_at = len(state.history)
        retrieval.add(_ranks_of(anew.loaded, state), epoch=0, step=0)
        retrieval.keep_answers("loaded", anew.loaded.encoded, step=0, device=device)
        if anew.epoch:  # a candidate also where it has given way
            retrieval.add(_ranks_of(anew.best, state), epoch=anew.epoch, step=anew.step)
        if state.best_epoch:
            retrieval.keep_answers("best", anew.best.encoded, step=anew.step, device=device)
        retrieval.write()
    elif resumed is not None:
        there = RunFiles(resumed.path.parent.parent).retrieval
        source = files.retrieval if files.retrieval.exists() else there
        places = [(record["epoch"], record["step"]) for record in state.history]
        retrieval.resume(source, places, best_step=state.best_step)
        retrieval.write()
    return retrieval


def add_evaluation(
    retrieval: Retrieval, evaluation: Any, state: RunState, *, improved: bool, device: torch.device
) -> None:
    """Take in the last evaluation of a run, before its state is saved."""
    record = state.history[-1]
    retrieval.add(_ranks_of(evaluation, state), epoch=record["epoch"], step=record["step"])
    if improved:
        model = "best" if record["epoch"] else "loaded"
        retrieval.keep_answers(model, evaluation.encoded, step=record["step"], device=device)
    retrieval.write()


def _ranks_of(evaluation: Any, state: RunState) -> dict[str, Any]:
    """Return what is recorded of an evaluation: where captions are classes, ranks with duplicates merged as well."""
    merged = evaluation.merged_ranks if state.selection == MERGED else {}
    return {**evaluation.ranks, **{f"merged_{direction}": ranks for direction, ranks in merged.items()}}


class Test(NamedTuple):
    """The model as loaded and the best one on the test split."""

    loaded: Any
    best: Any
    groups: Mapping[str, Any]


def run_test(
    model: Any, data: RunData[Any], files: RunFiles, state: RunState, *, open_model: Callable[[Path], Any]
) -> Test | None:
    """Evaluate the model as loaded and the best one on the test split, if the data has one; on all ranks."""
    if data.test is None:
        return None
    if not state.best_epoch:
        logger.info("the test split is not looked at: the model as loaded is the best, and no other is kept")
        return None
    if is_sharded(model):
        logger.info("the test split is not looked at with --parallel fsdp: evaluation.py --split test does")
        return None
    try:
        loaded, best = evaluate_both(files, open_model=open_model, evaluate=data.test.evaluate)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:  # what the run is for is saved already
        if world_size() > 1:  # the other ranks may be in the middle of it
            raise
        logger.warning("the test split is not looked at: %s", error)
        return None
    return Test(loaded, best, data.test.pairs.query_groups)


def judge(retrieval: Retrieval, state: RunState, test: Test | None) -> dict[str, Any]:
    """Say whether the run has helped, as the results file holds it.

    Returns:
        `verdict` or `no_verdict`, and what there is of `gains` and `test`.
    """
    values: dict[str, Any] = {}
    if retrieval.lacks:
        values["no_verdict"] = retrieval.lacks
    elif len(retrieval.ranks) > 1:
        values |= _on_validation(retrieval, state)
    if test is not None:
        values |= _on_test(test, state)
    return values


def _on_validation(retrieval: Retrieval, state: RunState) -> dict[str, Any]:
    merged = "merged_i2t" in retrieval.ranks[0]
    ranks = [_judged(each, merged=merged) for each in retrieval.ranks]
    evaluations, groups = answered(ranks, retrieval.query_groups)
    num_images = len(evaluations[0]["i2t"])
    if too_few := _too_few(groups, "validation"):
        return {"no_verdict": too_few}
    found = compare_best(evaluations, groups)
    gains = [
        {"epoch": epoch, **_gains(compare(evaluations[0], ranks, groups))}
        for (epoch, _), ranks in zip(retrieval.places[1:], evaluations[1:], strict=True)
    ]
    best = max(gains, key=lambda gain: round(gain["rsum"][0], 6))  # the first of those that are equal
    how = {"split": "val", "epoch": best["epoch"], "num_evaluations": len(gains), "num_images": num_images}
    # the others of those evaluations are not on the data at hand, so that their choice cannot be drawn again
    before = {(record["epoch"], record["step"]) for record in state.history[: retrieval.begun_at]}
    num_earlier = retrieval.begun_at - 1 if before.intersection(retrieval.places[1:]) else 0
    return {"verdict": _recorded(found, merged=merged, num_earlier=num_earlier, **how), "gains": gains}


def _judged(ranks: dict[str, Any], *, merged: bool) -> dict[str, Any]:
    return {direction: ranks[f"merged_{direction}" if merged else direction] for direction in DIRECTIONS}


def _on_test(test: Test, state: RunState) -> dict[str, Any]:
    loaded, best = test.loaded, test.best
    values = {
        "num_images": best.num_images,
        "num_texts": best.num_texts,
        "baseline": loaded.metrics,
        "metrics": best.metrics,
        "chance": best.chance,
        "histograms": {"baseline": loaded.histograms, "best": best.histograms},
    }
    merged = state.selection == MERGED
    (before, after), groups = answered(
        [_judged(_ranks_of(each, state), merged=merged) for each in test[:2]], test.groups
    )
    if too_few := _too_few(groups, "test"):
        return {"test": values, "verdict": None, "no_verdict": too_few}
    how: dict[str, Any] = {"split": "test", "merged": merged, "num_evaluations": len(state.history) - 1}
    how["epoch"] = state.best_epoch
    verdict = _recorded(compare(before, after, groups), num_images=len(before["i2t"]), **how)
    return {"test": values, "verdict": verdict, "no_verdict": ""}


def _too_few(groups: Mapping[str, Any], split: str) -> str:
    """Say why queries tell nothing of others; nothing if they do."""
    if len(np.unique(np.concatenate([groups["i2t"], groups["t2i"]]))) > 1:
        return ""
    num_images = len(groups["i2t"])
    says = "says" if num_images == 1 else "say"
    return f"{count(num_images, f'{split} image')} of one group {says} nothing of others: hold out more"


def _gains(found: Verdict) -> dict[str, Any]:
    return {**{key: found.recalls[key] for key in CURVES}, "rsum": found[:3]}


def _recorded(found: Verdict, **how: Any) -> dict[str, Any]:
    return recorded.Verdict(
        verdict=found.verdict,
        rsum=recorded.GainInterval(*found[:3]),
        recalls={key: recorded.GainInterval(*interval) for key, interval in found.recalls.items()},
        num_groups=found.num_groups,
        **how,
    ).model_dump(mode="json")
