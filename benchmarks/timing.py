"""Cases timed turn by turn, so that a machine whose speed drifts is the same to all of them."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from cliptune.runtime import files

T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds of one case, turn by turn."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Return the middle one."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Return (slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def take_turns(
    cases: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Run all cases once, then all once more, and so on; the first `warmup` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-warmup, repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def ratio(timings: dict[str, Timing], ours: str, peer: str) -> float:
    """Return how many times as long the peer takes, as the median over turns."""
    # a turn's two runs are neighbours in time: a slow minute of the machine slows both
    pairs = zip(timings[peer].seconds, timings[ours].seconds, strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function where nothing else has left memory behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe what the figures were measured on."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    found = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {})


def print_table(title: str, rows: list[list[str]]) -> None:
    """Print rows of cells, the first one a head, as a Markdown table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}\n")
    for index, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def write_json(path: str | None, results: dict[str, Any]) -> None:
    """Write results where `--json` says."""
    if path is not None:
        files.write_json(Path(path), results)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
