"""Every step of a training on captions of random lengths timed by itself: whether one waits for what others do not.

python benchmarks/step_times.py --device cuda --batch_size 512 --precision bf16
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_data import drawn_captions
from benchmarks.rows import FAILED, Row, tell
from benchmarks.train_step import make_trainer
from cliptune.model.architectures import ARCHITECTURES
from cliptune.preprocess.tokens import tokenize
from cliptune.runtime.device import keep_freed_memory, resolve_device

WARMUP = 3
EPOCH = 20
"""Steps from one smaller batch to the next, as at the end of an epoch."""


def main(argv: list[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    options = parse(argv)
    keep_freed_memory()
    seconds, graphs, is_compiled = measure(options)
    later = seconds[WARMUP:]
    name = {"true": "compiled", "false": "eager"}.get(options.compile, "default flags")
    if options.compile == "true" and not is_compiled:
        tell(Row(name, state=FAILED, note="it was not, as the log says"))
        return 0
    tell(Row(f"{name}: median step", 1000 * statistics.median(later), "ms"))
    note = f"step {WARMUP + 1 + later.index(max(later))} of {len(seconds)}"
    over = max(later) / statistics.median(later)
    tell(Row(f"{name}: slowest step after the third over the median", over, must=2, hope=1.3, higher=False, note=note))
    tell(Row(f"{name}: first step", seconds[0], "s"))
    if options.compile != "false":
        told = f"{graphs[WARMUP - 1]} in the first {WARMUP} steps"
        tell(Row(f"{name}: graphs compiled after the third step", graphs[-1] - graphs[WARMUP - 1], note=told))
    return 0


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", choices=["default", "true", "false"], default="default")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def measure(options: Namespace) -> tuple[list[float], list[int], bool]:
    """Return the seconds of each step, how many graphs have been compiled after it, and whether the model still is."""
    torch.manual_seed(0)
    device, size = resolve_device(options.device), options.batch_size
    chosen: dict[str, Any] = {} if options.compile == "default" else {"compile": options.compile == "true"}
    trainer = make_trainer(options.model, device, precision=options.precision, batch_size=size, **chosen)
    resolution = ARCHITECTURES[options.model].image_resolution
    images = torch.randint(256, (size, 3, resolution, resolution), dtype=torch.uint8, device=device)
    tokens, _ = tokenize(drawn_captions(options.steps * size))
    ids, seconds, graphs = torch.arange(size), [], []
    for step, texts in enumerate(tokens.split(size), 1):
        own = slice(0, size if step % EPOCH else 5 * size // 8)
        start = time.perf_counter()
        trainer.train_step(images[own], texts[own], ids[own])
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        graphs.append(counters["stats"]["unique_graphs"])
    return seconds, graphs, trainer.model.is_compiled


if __name__ == "__main__":
    sys.exit(main())
