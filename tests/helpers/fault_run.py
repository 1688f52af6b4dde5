"""`train.py` on a small model, with a fault that the environment asks for.

FAULT=signal:1:4:SIGTERM python tests/helpers/fault_run.py ...

sends it in step 4 to process 1 with its loading processes; `kill:5:writing` is SIGKILL in the middle of the fifth
checkpoint file, `kill:5:naming` before it gets its name.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import train
from clip_model import MultimodalTrainer
from cliptune.model import checkpoint_file as checkpoint
from cliptune.model.architectures import ARCHITECTURES
from tests.helpers.models import SMALL_VIT


def signal_in_step(rank: str, step: str, name: str) -> None:
    train_step = MultimodalTrainer.train_step

    def faulty(self: MultimodalTrainer, *arguments: Any) -> Any:
        if (os.environ.get("RANK", "0"), self.global_step + 1) == (rank, int(step)):
            os.killpg(0, signal.Signals[name])
        return train_step(self, *arguments)

    MultimodalTrainer.train_step = faulty  # type: ignore[method-assign, assignment]


def kill_in_file(number: str, place: str) -> None:
    files = count(1)

    class Deadly(checkpoint._ErrorKeeper):
        def __init__(self, file: Any) -> None:
            super().__init__(file)
            self.is_last = next(files) == int(number)

        def write(self, data: Any) -> int:
            if self.is_last and place == "writing" and self.file.tell() > 1000:
                self.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    replace = Path.replace

    def rename(self: Path, target: Path) -> Path:
        if place == "naming" and target.suffix == ".pth" and next(names) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    names = count(1)
    checkpoint._ErrorKeeper = Deadly  # type: ignore[misc]
    Path.replace = rename  # type: ignore[assignment]


if __name__ == "__main__":
    ARCHITECTURES[SMALL_VIT.name] = SMALL_VIT
    if "FAULT" in os.environ:
        kind, *arguments = os.environ["FAULT"].split(":")
        (signal_in_step if kind == "signal" else kill_in_file)(*arguments)
    sys.exit(train.main())
