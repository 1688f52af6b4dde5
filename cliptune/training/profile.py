"""Some steps of a run under `torch.profiler`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

NUM_BEFORE = 2
"""Steps before the first that is recorded: one without the profiler, one that warms it up."""
KINDS = (
    ("attention", ("attention", "softmax")),
    ("matrix products", ("mm", "linear", "convolution", "conv2d", "gemm", "cutlass")),
    ("optimiser", ("adam",)),
    ("copies", ("copy", "memcpy", "cat", "fill", "memset")),
)


@contextmanager
def step_profiler(num_steps: int, path: Path, device: torch.device) -> Iterator[torch.profiler.profile]:
    """Give a profiler of some steps within the block, whose `step` is called after each.

    When it has them, or when the block ends, it writes the trace and logs where the time went, or that there was no
    step to record.

    Args:
        num_steps: steps to record, after two others; 0: none.
        path: where the trace goes, for `chrome://tracing` or ui.perfetto.dev.
        device: what is recorded beside the CPU.
    """
    on_gpu = device.type == "cuda"

    def write(profiler: torch.profiler.profile) -> None:
        if profiler.step_num <= NUM_BEFORE:  # the run ended before
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        parts = ", ".join(f"{kind} {100 * part:.0f}%" for kind, part in _fractions(profiler, on_gpu=on_gpu).items())
        recorded = count(profiler.step_num - NUM_BEFORE, "step")
        logger.info("profile of %s: %s; trace: %s", recorded, parts, path)

    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    schedule = torch.profiler.schedule(wait=NUM_BEFORE - 1, warmup=1, active=max(num_steps, 1), repeat=1)
    with torch.profiler.profile(
        activities=activities,
        schedule=schedule if num_steps else lambda _: torch.profiler.ProfilerAction.NONE,
        on_trace_ready=write,
        acc_events=True,
    ) as profiler:
        yield profiler
    if num_steps and profiler.step_num <= NUM_BEFORE:
        logger.warning(
            "--profile recorded nothing: the first %d steps are not recorded, and this start had %s",
            NUM_BEFORE, count(profiler.step_num, "step"),
        )  # fmt: skip


def _fractions(profiler: torch.profiler.profile, *, on_gpu: bool) -> dict[str, float]:
    """Return which part of the time went to which kind of operation, the largest first."""
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel's time is its operation's as well
            continue
        key: Any = event.key.lower()
        kind = next((kind for kind, words in KINDS if any(word in key for word in words)), "other")
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[kind] = times.get(kind, 0.0) + time
    total = sum(times.values()) or 1.0
    return {kind: time / total for kind, time in sorted(times.items(), key=lambda item: -item[1])}
