"""Which steps are recorded, and what is said of them."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cliptune.training import profile
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


def test_on_a_gpu_a_kernels_time_counts_once() -> None:
    """PyTorch's list has it of the operation, of the kernel, and of the whole step that a name was given to."""
    kinds = torch.autograd.DeviceType

    def event(key: str, time: float, kind: Any) -> SimpleNamespace:
        return SimpleNamespace(key=key, device_type=kind, self_device_time_total=time, self_cpu_time_total=7.0)

    events = [
        event("aten::mm", 80.0, kinds.CPU),
        event("aten::gelu", 20.0, kinds.CPU),
        event("nvjet_tst_128x256", 80.0, kinds.CUDA),
        event("vectorized_gelu", 20.0, kinds.CUDA),
        event("ProfilerStep#2", 100.0, kinds.CUDA),
    ]
    profiler: Any = SimpleNamespace(key_averages=lambda: events)
    assert profile._fractions(profiler, on_gpu=True) == {"matrix products": 0.8, "other": 0.2}
