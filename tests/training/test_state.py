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
        state.add_evaluation(evaluation(rsum), means=MEANS, rates={"projection": 1e-3}, steps_per_epoch=0)
    return state


def step_of(number: int, num_pairs: int = 10, loss: float = 1.5) -> Step:
    return Step(StepResult(number, num_pairs, {}, torch.tensor([loss, 0.25, 2.0, 14.0])), (), 0.1, 0.0)


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
    state.begin_epoch(CPU)
    state.add(step_of(1))  # steps that were taken are evaluated first
    assert not state.is_stale(2)


def test_a_state_within_an_epoch_comes_back_from_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    state = after(190.0)
    state.begin_epoch(CPU)
    assert (state.epoch, state.num_batches) == (1, 0)
    values = torch.tensor([1.5, 0.25, 2.0, 14.0])
    for result in (StepResult(1, 10, {}, values), None, StepResult(2, 4, {}, values)):
        state.add(Step(result, (), 0.1, 0.0))
    restored = RunState.from_state_dict(json.loads(json.dumps(state.state_dict())), CPU)
    assert restored.state_dict() == state.state_dict()
    assert (restored.epoch, restored.step, restored.num_batches) == (1, 2, 3)
    assert restored.train_means(steps_per_epoch=3) == {"train_loss": 1.5, "train_accuracy": 25.0}
    state.begin_epoch(CPU)  # nothing: one is under way
    assert state.epoch == 1


@pytest.mark.parametrize("is_resumed", [False, True])
def test_an_evaluation_has_the_means_since_the_one_before_within_an_epoch_and_those_of_all_of_it_after(
    is_resumed: bool,
) -> None:
    state = after(190.0)
    state.begin_epoch(CPU)
    records = []
    for step, rsum in ((1, 200.0), (2, 195.0), (4, 210.0)):
        while state.step < step:
            state.add(step_of(state.step + 1, loss=float(state.step + 1)))
            if is_resumed:
                state = RunState.from_state_dict(json.loads(json.dumps(state.state_dict())), CPU)
        means = state.train_means(steps_per_epoch=4)
        improved = state.add_evaluation(evaluation(rsum), means=means, rates={}, steps_per_epoch=4)
        records.append((state.history[-1]["epoch"], state.history[-1]["train_loss"], improved, state.totals is None))
    assert records == [(0.25, 1.0, True, False), (0.5, 2.0, False, False), (1, 2.5, True, True)]
    assert (state.best_epoch, state.best_step, state.epochs_since_best, state.epochs_done) == (1, 4, 0, 1)
    state.begin_epoch(CPU)
    assert (state.epoch, state.epochs_done) == (2, 1)


def test_batches_without_a_pair_after_an_evaluation_leave_the_means_of_the_epoch() -> None:
    state = after(190.0)
    state.begin_epoch(CPU)
    state.add(step_of(1))
    state.add_evaluation(evaluation(200.0), means=MEANS, rates={}, steps_per_epoch=2)
    state.add(Step(None, (), 0.1, 0.0))
    assert state.train_means(steps_per_epoch=2) == {"train_loss": 1.5, "train_accuracy": 25.0}


def test_a_state_of_before_an_epoch_kept_its_earlier_sums_is_read() -> None:
    state = after(190.0)
    state.begin_epoch(CPU)
    state.add(step_of(1))
    values = state.state_dict()
    del values["totals"]["earlier"]
    assert RunState.from_state_dict(values, CPU).train_means(steps_per_epoch=1)["train_loss"] == 1.5


def test_a_run_may_be_stale_within_an_epoch() -> None:
    state = after(190.0)
    state.begin_epoch(CPU)
    for step in (1, 2):
        state.add(step_of(step))
        assert state.ending(9, 2) is None
        state.add_evaluation(evaluation(180.0), means=MEANS, rates={}, steps_per_epoch=4)
    assert state.ending(9, 2) == "no better RSum for 2 evaluations (--early_stopping_patience)"
    assert state.ending(9, 3) is None


def test_a_state_of_before_evaluations_within_an_epoch_is_read() -> None:
    state = after(190.0, 200.0, 195.0)
    values = state.state_dict()
    values["history"] = [{**record, "step": 3 * record["epoch"]} for record in values["history"]]
    del values["best_step"]
    assert RunState.from_state_dict(values, CPU).best_step == 3


@pytest.mark.parametrize(("on_new", "stays"), [((90.0, 95.0), True), ((90.0, 90.0), False), ((90.0, 80.0), False)])
def test_on_other_data_two_records_are_renewed_and_the_others_are_not_compared(
    on_new: tuple[float, float], stays: bool
) -> None:
    state = after(190.0, 200.0, 250.0, 240.0)
    state.begin_epoch(CPU)
    state.add(step_of(1))
    state.leave_epoch()
    assert (state.epoch, state.totals, state.epochs_done) == (3, None, 3)
    for record in state.history:
        record["step"] = 3 * record["epoch"]
    state.best_step = 6
    assert state.begin_again(*map(evaluation, on_new)) == stays
    assert [record["rsum"] for record in state.comparable] == list(on_new)
    assert [record["train_loss"] for record in state.history] == [1.0] * 4
    assert [(record["rsum"], record["earlier_data"]) for record in state.history[1::2]] == [(200, True), (240, True)]
    assert (state.best_epoch, state.best_step) == ((2, 6) if stays else (0, 0))
    assert state.best["metrics"]["rsum"] == max(on_new)
    assert not state.is_stale(1)
    best = state.best_trained()
    assert best is not None
    assert best["rsum"] == on_new[1]
    state.begin_epoch(CPU)
    assert state.epoch == 4
    assert state.add_evaluation(evaluation(99.0), means=MEANS, rates={}, steps_per_epoch=0)


def test_an_epoch_that_is_left_is_not_done() -> None:
    state = after(190.0)
    state.begin_epoch(CPU)
    state.add(step_of(1))
    state.add_evaluation(evaluation(200.0), means=MEANS, rates={}, steps_per_epoch=2)
    state.leave_epoch()
    assert state.ending(1, 0) is None
    state.begin_epoch(CPU)
    assert (state.epoch, state.num_batches) == (1, 0)
