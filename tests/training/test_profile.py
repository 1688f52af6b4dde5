"""Which steps are recorded, and what is said of them."""

import json
import logging
from pathlib import Path

import pytest
import torch

from cliptune.training.profile import step_profiler

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_steps", "recorded"), [(2, "2 steps"), (9, "4 steps"), (1, "1 step")])
def test_a_profile_is_of_the_steps_after_the_first_two(
    num_steps: int, recorded: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "logs" / "trace.json"
    weight = torch.randn(64, 64)
    with step_profiler(num_steps, path, CPU) as profiler:
        for step in range(6):
            with torch.profiler.record_function(f"step {step}"):
                weight @ weight
            profiler.step()
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    expected = {f"step {2 + index}" for index in range(int(recorded[0]))}
    assert {f"step {step}" for step in range(6)} & names == expected
    [message] = [record.getMessage() for record in caplog.records if "profile of" in record.getMessage()]
    assert message.startswith(f"profile of {recorded}: ")
    assert "matrix products" in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("num_steps", "steps", "told"), [(2, 0, "0 steps"), (2, 1, "1 step"), (2, 2, "2 steps"), (0, 5, "")]
)
def test_too_few_steps_leave_no_profile_and_this_is_said(
    num_steps: int, steps: int, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with step_profiler(num_steps, tmp_path / "trace.json", CPU) as profiler:
        for _ in range(steps):
            profiler.step()
    assert list(tmp_path.iterdir()) == []
    said = f"--profile recorded nothing: the first 2 steps are not recorded, and this start had {told}"
    assert [record.getMessage() for record in caplog.records] == ([said] if told else [])
