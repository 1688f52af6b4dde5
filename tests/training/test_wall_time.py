"""Where a run's wall time goes: phases that have no moment in common, over all parts of the run."""

from __future__ import annotations

import json

import pytest
import torch

from cliptune.recorded import WallTime
from cliptune.training.meters import Step
from cliptune.training.state import RunState
from cliptune.training.wall_time import WallClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the clock stand at the first of these."""
    time = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    return time


def test_every_moment_belongs_to_one_phase(now: list[float]) -> None:
    clock = WallClock()
    clock.begin(90.0)  # the process is older than the clock
    now[0] = 105.0
    clock.enter("step")
    now[0] = 125.0
    clock.add_waited(12.0)
    with pytest.raises(OSError, match="disk full"), clock.inside("saving"):
        now[0] = 128.0
        raise OSError("disk full")
    now[0] = 130.0
    clock.enter("validation")
    now[0] = 137.0
    spent = {"start": 15.0, "data": 12.0, "step": 10.0, "validation": 7.0, "saving": 3.0, "rest": 0.0}
    assert clock.state_dict() == spent
    assert clock.state_dict() == spent  # looking changes nothing
    assert WallTime(**spent).total == 137.0 - 90.0


def test_a_resumed_run_adds_to_what_it_had(now: list[float]) -> None:
    state = RunState()
    state.begin_epoch(torch.device("cpu"))
    state.wall_time.enter("step")
    now[0] = 110.0
    state.add(Step(None, (), 10.0, 4.0))
    values = json.loads(json.dumps(state.state_dict()))
    now[0] = 1000.0  # nobody was there
    resumed = RunState.from_state_dict(values, torch.device("cpu"))
    now[0] = 1003.0
    spent = {"start": 3.0, "data": 4.0, "step": 6.0, "validation": 0.0, "saving": 0.0, "rest": 0.0}
    assert resumed.wall_time.state_dict() == spent
    del values["wall_time"]  # of before it was recorded
    assert sum(RunState.from_state_dict(values, torch.device("cpu")).wall_time.state_dict().values()) == 0


def test_it_is_said_in_a_line() -> None:
    spent = WallTime(start=36, data=360, step=2700, validation=360, saving=144)
    line = "wall time: 1:00:00 (start 1%, data 10%, step 75%, validation 10%, saving 4%, rest 0%)"
    assert spent.sentence() == line
    assert WallTime().sentence().startswith("wall time: 0:00:00 (start 0%")
