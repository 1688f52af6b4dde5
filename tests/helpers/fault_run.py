"""`train.py` on a small model, with a fault that the environment asks for.

FAULT=signal:1:4:SIGTERM python tests/helpers/fault_run.py ...

sends it in step 4 to rank 1 with its workers; `kill:5:writing` is SIGKILL in the middle of the fifth
checkpoint file, `kill:5:naming` before it gets its name; `worker:4` is SIGKILL to the loader workers in step 4,
`worker:validation` to those of the first validation after training; in `stuck:4` PyTorch's compiler takes two minutes
for the text tower of step 4, and in `slow:2` every checkpoint file takes 2 s; both say when that begins.

BACKGROUND=1 lets a thread write the checkpoints, as on a GPU.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import get_worker_info

import train
from clip_model import CLIPModel, MultimodalTrainer
from cliptune.features import encode
from cliptune.features.encode import Encoder
from cliptune.model.architectures import ARCHITECTURES
from cliptune.training import checkpoint
from data_loader import ImageTextDataset
from tests.helpers.models import SMALL_VIT
from tests.helpers.runs import work_in_background


def signal_in_step(rank: str, step: str, name: str) -> None:
    train_step = MultimodalTrainer.train_step

    def faulty(self: MultimodalTrainer, *arguments: Any) -> Any:
        if (os.environ.get("RANK", "0"), self.global_step + 1) == (rank, int(step)):
            os.killpg(0, signal.Signals[name])
        return train_step(self, *arguments)

    MultimodalTrainer.train_step = faulty  # type: ignore[method-assign, assignment]


def kill_in_file(index: str, place: str) -> None:
    """End the process in the middle of the checkpoint file of this index, from 1, or before it gets its name."""
    opened, renamed = count(1), count(1)
    open_file, replace = Path.open, Path.replace

    class Deadly(io.BufferedWriter):
        def write(self, data: Any) -> int:
            if self.tell() > 1000:
                self.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    def open_deadly(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if place == "writing" and ".pth." in self.name and mode == "wb" and next(opened) == int(index):
            return Deadly(io.FileIO(self, "wb"))
        return open_file(self, mode, *arguments, **options)

    def replace_deadly(self: Path, target: Path) -> Path:
        if place == "naming" and target.suffix == ".pth" and next(renamed) == int(index):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.open = open_deadly  # type: ignore[method-assign]
    Path.replace = replace_deadly  # type: ignore[assignment]


def kill_worker(moment: str) -> None:
    """Kill the workers of an epoch's loader in the middle of a step, or let those of its validation kill themselves."""
    train_step, run_images, get = MultimodalTrainer.train_step, Encoder.run_images, ImageTextDataset.__getitem__
    num_steps = 0

    def faulty_step(self: MultimodalTrainer, *arguments: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if moment == str(num_steps):
            for worker in psutil.Process().children():
                worker.kill()
        return train_step(self, *arguments)

    def faulty_run(self: Encoder, *arguments: Any, **options: Any) -> Any:
        if moment == "validation" and num_steps:
            ImageTextDataset.__getitem__ = die  # type: ignore[method-assign]
            Encoder.images_at_once = 2  # type: ignore[assignment, method-assign]  # several batches need workers
            encode.IMAGES_PER_KEPT_WORKER = 1
        return run_images(self, *arguments, **options)

    def die(self: ImageTextDataset, index: int) -> Any:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, index)

    MultimodalTrainer.train_step = faulty_step  # type: ignore[method-assign, assignment]
    Encoder.run_images = faulty_run  # type: ignore[method-assign]


def stick_in_step(step: str) -> None:
    train_step, run_text_tower = MultimodalTrainer.train_step, CLIPModel.run_text_tower
    steps_done = 0

    def compile_slowly(graph: Any, _: Any) -> Any:
        print("begun", file=sys.stderr, flush=True)
        time.sleep(120)
        return graph.forward

    def note_step(self: MultimodalTrainer, *arguments: Any) -> Any:
        nonlocal steps_done
        steps_done = self.global_step
        return train_step(self, *arguments)

    def stick(self: CLIPModel, *arguments: Any, **options: Any) -> Any:
        if self.training and steps_done + 1 == int(step):
            torch.compile(torch.neg, backend=compile_slowly)(torch.ones(3))
        return run_text_tower(self, *arguments, **options)

    MultimodalTrainer.train_step = note_step  # type: ignore[method-assign, assignment]
    CLIPModel.run_text_tower = stick  # type: ignore[method-assign]


def write_slowly(seconds: str) -> None:
    save = checkpoint.save_checkpoint

    def save_slowly(path: Path, state: dict[str, Any]) -> None:
        if state["global_step"] >= 2:
            print("begun", file=sys.stderr, flush=True)
            time.sleep(float(seconds))
        save(path, state)

    checkpoint.save_checkpoint = save_slowly


if __name__ == "__main__":
    ARCHITECTURES[SMALL_VIT.name] = SMALL_VIT
    if "BACKGROUND" in os.environ:
        work_in_background(pytest.MonkeyPatch())
    if "FAULT" in os.environ:
        kind, *arguments = os.environ["FAULT"].split(":")
        faults: dict[str, Any] = {
            "signal": signal_in_step, "kill": kill_in_file, "worker": kill_worker, "stuck": stick_in_step,
            "slow": write_slowly,
        }  # fmt: skip
        faults[kind](*arguments)
    sys.exit(train.main())
