"""For what part of a training step a GPU is idle: eager, compiled, and with the image tower as a CUDA graph.

python benchmarks/gpu_idle.py --model ViT-B/32 --batch_sizes 32,128,512

The steps run twice: without a profiler, for their time, and with it, for the intervals of kernels and copies. What
these do not cover of the time is idle. Where that is little, CUDA graphs have nothing to gain.
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_data import drawn_captions
from benchmarks.rows import FAILED, Row, tell
from benchmarks.train_step import make_trainer
from clip_model import CLIPModel, MultimodalTrainer
from cliptune.model.architectures import ARCHITECTURES
from cliptune.preprocess.tokens import tokenize
from cliptune.runtime.device import keep_freed_memory, resolve_device
from cliptune.runtime.messages import one_line

FORMS = ("eager", "compiled", "image tower as a CUDA graph")
WARMUP = 4
"""Steps before those that count: a graph is recorded in the second one, and replayed from the third on."""
SAME_LOSS = 0.01
"""How far a form's loss may be from the eager one's, as a fraction, in bf16 after the same few steps."""
Interval = tuple[float, float]


def main(argv: list[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    options = parse(argv)
    torch.manual_seed(0)
    keep_freed_memory()
    device, sizes = resolve_device(options.device), [int(size) for size in options.batch_sizes.split(",")]
    forms = [form for form in FORMS if device.type == "cuda" or form == FORMS[0]]
    trainer = make_trainer(
        options.model, device, precision=options.precision, batch_size=max(sizes), compile=len(forms) > 1
    )
    start = {name: value.clone() for name, value in trainer.model.state_dict().items() if isinstance(value, Tensor)}
    losses: dict[int, float] = {}
    for form in forms:
        try:
            use_form(trainer.model, form)
            for size in sizes:
                trainer.model.load_state_dict(start)  # into the same memory, which a graph knows
                trainer.optimizer.state.clear()
                tell_size(trainer, form, size, options=options, losses=losses)
            if form != FORMS[0] and not trainer.model.is_compiled:
                raise RuntimeError("the compiler fails, as the log says: these figures are of eager steps")
            if form == FORMS[2] and (skips := counters["inductor"]["cudagraph_skips"]):
                raise RuntimeError(f"no graph was recorded {skips} times: these figures are of compiled steps")
        except Exception as error:  # of a compiler, in many forms; the other forms count
            tell(Row(form, state=FAILED, note=one_line(error)))
    return 0


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--batch_sizes", default="32,128,512")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, and as many that are profiled")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def use_form(model: CLIPModel, form: str) -> None:
    """Let a model that compiles its towers, or does not, run in one of `FORMS`."""
    backbone: Any = model.backbone
    vars(backbone).pop("encode_image", None)
    backbone.compiled = form != FORMS[0]
    if form == FORMS[2]:
        backbone.encode_image = replayed(backbone.visual)


def replayed(visual: Any) -> Callable[[Tensor], Tensor]:
    """Return an image tower whose forward and backward pass are each replayed as one CUDA graph, for each batch size.

    Texts are packed, so that their tower has other shapes in every batch: no graph holds for two of them.
    """
    program = torch.compile(type(visual).run_rows, mode="reduce-overhead")

    def run(pixels: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(pixels, 0)  # one program for all sizes, as the toolkit's own
        torch.compiler.cudagraph_mark_step_begin()
        # the next replay writes to the same memory
        return program(visual, pixels).clone()  # type: ignore[no-any-return]

    return run


def tell_size(
    trainer: MultimodalTrainer, form: str, size: int, *, options: Namespace, losses: dict[int, float]
) -> None:
    """Time steps of a batch size, profile as many, and tell both; `losses` has the eager ones, by size."""
    name = f"{form}, batch {size}"
    warmup = WARMUP if trainer.model.device.type == "cuda" else 1
    step = steps_of(trainer, size, num_batches=2 * options.steps + warmup)
    for _ in range(warmup):
        loss = step()
    found = float(loss)
    wall = seconds_of(step, options.steps) / options.steps
    tell(Row(f"{name}: step", 1000 * wall, "ms"))
    if trainer.model.device.type != "cuda":
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds_of(step, options.steps)
    intervals = device_intervals(profiler.events() or [])
    # a profiler slows the launches down, and not what is launched: so the time of a step is that without it
    busy = covered(intervals) / 1e6 / options.steps
    note = f"{len(intervals) / options.steps:.0f} kernels and copies a step, {1000 * busy:.3g} ms of them"
    tell(Row(f"{name}: GPU idle", 100 * (1 - busy / wall), "%", note=note))
    if form == FORMS[0]:
        losses[size] = found
    elif size in losses:
        over = abs(found / losses[size] - 1)
        tell(Row(f"{name}: loss against eager's", over, must=SAME_LOSS, higher=False, check=True))


def steps_of(trainer: MultimodalTrainer, size: int, *, num_batches: int) -> Callable[[], Tensor]:
    """Make a function that takes a step on the next batch, images on the device, and returns its loss."""
    side = ARCHITECTURES[trainer.model.architecture.name].image_resolution
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator).to(trainer.model.device)
    batches = iter(tokenize(drawn_captions(num_batches * size))[0].split(size))
    ids = torch.arange(size)

    def step() -> Tensor:
        result = trainer.train_step(images, next(batches), ids)
        assert result is not None
        return result.loss

    return step


def seconds_of(step: Callable[[], object], number: int) -> float:
    """Take steps one after another; return the seconds until the device is done with all."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    for _ in range(number):
        step()
    wait()
    return time.perf_counter() - start


def device_intervals(events: Iterable[Any]) -> list[Interval]:
    """Return when a GPU ran a kernel or a copy, in microseconds; a named range around several is none."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def covered(intervals: Iterable[Interval]) -> float:
    """Return the length of what intervals cover together: what several cover counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    sys.exit(main())
