"""Some steps of a run under `torch.profiler`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records some steps of training with `torch.profiler`.

    Args:
        num_steps: steps to record, after two that warm up.
        path: where the trace goes, for `chrome://tracing` or ui.perfetto.dev.
        device: what is recorded beside the CPU.
    """

    WARMUP = 2
    KINDS = (
        ("attention", ("attention", "softmax")),
        ("matrix products", ("mm", "linear", "convolution", "conv2d", "gemm", "cutlass")),
        ("optimiser", ("adam",)),
        ("copies", ("copy", "memcpy", "cat", "fill", "memset")),
    )

    def __init__(self, num_steps: int, path: Path, device: torch.device) -> None:
        self.num_steps = num_steps
        self.path = path
        self.on_gpu = device.type == "cuda"
        self.steps = 0
        self.recording = False
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities, acc_events=True)

    def step(self) -> None:
        """Note that a step begins."""
        if self.steps == self.WARMUP:
            self.profiler.start()
            self.recording = True
        if self.steps == self.WARMUP + self.num_steps:
            self.close()
        self.steps += 1

    def close(self) -> None:
        """End the recording, if it is on: write the trace and say where the time went."""
        if not self.recording:
            return
        self.recording = False
        self.profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.path))
        shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in self._shares().items())
        recorded = self.steps - self.WARMUP
        logger.info("profile of %d step(s): %s; trace: %s", recorded, shares, self.path)

    def _shares(self) -> dict[str, float]:
        times: dict[str, float] = {}
        for event in self.profiler.key_averages():
            time = event.self_device_time_total if self.on_gpu else event.self_cpu_time_total
            kinds = (kind for kind, words in self.KINDS if any(word in event.key.lower() for word in words))
            kind = next(kinds, "other")
            times[kind] = times.get(kind, 0.0) + time
        total = sum(times.values()) or 1.0
        return {kind: time / total for kind, time in sorted(times.items(), key=lambda item: -item[1])}
