"""Runs of `train.py` on a small model, signals in the middle of them, and what two runs must have in common."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import data_loader
from clip_model import MultimodalTrainer
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.checkpoint_file import load_checkpoint
from tests.helpers.models import SMALL_VIT

SMALL = ["--model_name", SMALL_VIT.name, "--batch_size", "10", "--num_workers", "0", "--learning_rate", "1e-3"]
DIFFER = {"run_id", "config_file", "folder", "started_at", "output_dir", "resume", "throughput", "wall_time"}
"""Between two runs of the same settings."""


@contextmanager
def small_runs() -> Iterator[pytest.MonkeyPatch]:
    """Let `train.main` know the small model and draw no figures, galleries or report: a run takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, SMALL_VIT.name, SMALL_VIT)
        patch.setattr("train.draw_figures", lambda *_, **__: [])
        patch.setattr("train.leave_report", lambda *_, **__: None)
        patch.setattr("cliptune.runs.data.LiveGallery", lambda _: None)
        yield patch


def work_in_background(patch: pytest.MonkeyPatch) -> None:
    """Let threads write checkpoints and draw images, as in a run on a GPU."""
    for module in ("cliptune.runs.journal", "cliptune.runs.saving"):
        patch.setattr(f"{module}.works_in_background", lambda _: True)


def signal_at(patch: pytest.MonkeyPatch, signals: dict[int, signal.Signals]) -> None:
    """Let signals arrive in the middle of steps."""
    train_step = MultimodalTrainer.train_step

    def step(self: MultimodalTrainer, *arguments: Any) -> Any:
        if self.global_step + 1 in signals:
            os.kill(os.getpid(), signals.pop(self.global_step + 1))
        return train_step(self, *arguments)

    patch.setattr(MultimodalTrainer, "train_step", step)


def check_data(data_dir: str | Path, output_dir: Path, *flags: str) -> int:
    """Run `--check`, without workers unless flags say so; returns the exit code."""
    where = ["--data_dir", str(data_dir), "--output_dir", str(output_dir)]
    return data_loader.main([*where, "--check", "--num_workers", "0", *flags])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(got: Any, want: Any, where: str = "state") -> None:
    """Compare states bit by bit."""
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want), where
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for key in want.keys() - DIFFER:
            assert_same(got[key], want[key], f"{where}.{key}")
    else:
        assert got == want, where


def assert_same_runs(got: Path, want: Path) -> None:
    """Compare all that two runs leave: checkpoints, histories and every step's numbers."""
    for name in ("model-checkpoint/last_model.pth", "model-checkpoint/best_model.pth"):
        assert_same(load_checkpoint(got / name), load_checkpoint(want / name), name)
    assert (got / "logs/history.jsonl").read_text() == (want / "logs/history.jsonl").read_text()
    histories = [
        json.loads((folder / "results/training_results.json").read_text())["history"] for folder in (got, want)
    ]
    assert histories[0] == histories[1]
    steps = [[{**line, "seconds": 0.0} for line in lines_of(folder / "logs/steps.jsonl")] for folder in (got, want)]
    assert steps[0] == steps[1][-len(steps[0]) :]  # from another folder's checkpoint a run has the rest alone
    assert len(steps[0]) == len(steps[1]) or got.name == "again"
