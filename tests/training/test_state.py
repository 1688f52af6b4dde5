"""What a run remembers: which epoch is the best, when it is stale, and all of it after a checkpoint."""

import json
from typing import Any

import pytest
import torch

from cliptune.training.meters import Step, StepResult
from cliptune.training.state import RunState

CPU = torch.device("cpu")
MEANS: dict[str, float | None] = {"train_loss": 1.0, "train_accuracy": 50.0}


def evaluation(rsum: float) -> dict[str, Any]:
    return {"metrics": {"rsum": rsum}, "chance": {"rsum": 10.0}, "histograms": {}, "num_images": 6, "num_texts": 12}


def after(*rsums: float) -> RunState:
    """The state after an epoch of each RSum, the first of the model as loaded."""
    state = RunState()
    for rsum in rsums:
        state.begin_epoch(CPU)
        state.finish_epoch(evaluation(rsum), means=MEANS, rates={"projection": 1e-3})
    return state


@pytest.mark.parametrize(
    ("rsums", "best"),
    [
        ([190.0, 190.00000000000003], 0),
        ([190.00000000000003, 190.0, 190.00000000000003], 0),
        ([190.0, 190.1], 1),
        ([0.0, 0.0, 0.5], 2),
        ([190.0, 250.0, 200.0], 1),
    ],
)
def test_of_a_tie_the_earlier_epoch_stays_the_best(rsums: list[float], best: int) -> None:
    state = after(*rsums)
    assert state.best_epoch == best
    assert state.epochs_since_best == len(rsums) - 1 - best
    assert state.best["metrics"]["rsum"] == rsums[best]
    assert state.baseline["metrics"]["rsum"] == rsums[0]
    assert [record["epoch"] for record in state.history] == list(range(len(rsums)))


def test_a_run_is_stale_after_as_many_epochs_without_a_better_one() -> None:
    assert [after(*[190.0] * num).is_stale(2) for num in (1, 2, 3, 4)] == [False, False, True, True]
    assert not after(*[190.0] * 9).is_stale(0)
    state = after(190.0, 190.0, 190.0)
    state.begin_epoch(CPU)  # an epoch that was broken off is finished first
    assert not state.is_stale(2)


def test_a_state_within_an_epoch_comes_back_from_plain_values() -> None:
    state = after(190.0)
    state.begin_epoch(CPU)
    assert (state.epoch, state.num_batches) == (1, 0)
    values = torch.tensor([1.5, 0.25, 2.0, 14.0])
    for result in (StepResult(1, 10, {}, values), None, StepResult(2, 4, {}, values)):
        state.add(Step(result, (), 0.1, 0.0))
    restored = RunState.from_state_dict(json.loads(json.dumps(state.state_dict())), CPU)
    assert restored.state_dict() == state.state_dict()
    assert (restored.epoch, restored.step, restored.num_batches) == (1, 2, 3)
    assert restored.train_means() == {"train_loss": 1.5, "train_accuracy": 25.0}
    state.begin_epoch(CPU)  # nothing: one is under way
    assert state.epoch == 1
