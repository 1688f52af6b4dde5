"""What a step costs in micro-batches: time and peak memory, beside what a small model of both says.

python benchmarks/large_batch.py --json large_batch.json

Each batch runs in a process of its own, in turns with a plain step of as many pairs as a micro-batch. `--predict`
prints what the model of the cost says for many GPUs instead, from assumed speeds, which are flags. Started by
`torchrun`, it measures a step of several processes. With `--device cuda` the model of the cost is left out.
"""

from __future__ import annotations

import argparse
import resource
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Timing, in_new_process, machine, print_table, take_turns, write_json
from benchmarks.train_step import make_trainer, step_flops
from clip_model import CLIPModel, MultimodalTrainer
from cliptune.data.sample_data import distinct_scenes
from cliptune.model.architectures import ARCHITECTURES
from cliptune.preprocess.tokens import tokenize
from cliptune.runtime.device import keep_freed_memory, resolve_device
from cliptune.runtime.distributed import is_main, process_group, rank_slice, world_size
from cliptune.training.loss import SLICE_LOGITS
from cliptune.training.memory import LiveTensors

GB = 1e9


class Point(NamedTuple):
    """What was measured of one batch."""

    batch: int
    seconds: list[float]
    plain_seconds: list[float]
    """Of a plain step of a micro-batch's size, a turn each."""
    peak: int
    """Bytes of the process, or of the GPU."""
    micro: int
    """Pairs of a micro-batch."""

    @property
    def times_plain(self) -> float:
        """Return the cost of a pair over that of a plain step's, both medians."""
        return Timing(self.seconds).median / self.batch / (Timing(self.plain_seconds).median / self.micro)

    @property
    def over_plain(self) -> float:
        """Return the pairs a second over a plain step's: all micro-batches but the last run forwards a second time."""
        return (1 + max(1 - self.micro / self.batch, 0) / 3) / self.times_plain


MICRO = 32
DIFFERENT = 1024
"""Images of a batch; they are repeated in a larger one."""


class Costs(NamedTuple):
    """What the model of the cost is made of, on one device."""

    fixed: float
    """Seconds a step, whatever the batch: the optimiser."""
    pair: float
    """Seconds a pair, forwards and backwards."""
    logit: float
    """Seconds for each of the batch x batch logits."""
    start: float
    """Bytes of the process before a step, model included."""
    parameters: int
    """Bytes of all parameters, float32."""
    pair_bytes: float
    """Bytes a pair of a micro-batch takes until its gradient is there."""
    pixel_bytes: int
    """Bytes of an image's pixels."""

    def seconds(self, batch: int, micro: int) -> float:
        """Time of a step: all micro-batches but the last run forwards twice, a third of forwards and backwards."""
        again = max(1 - micro / batch, 0)
        return self.fixed + batch * self.pair * (1 + again / 3) + batch * batch * self.logit

    def peak(self, batch: int, micro: int) -> float:
        """Memory of a step: gradient and AdamW's two moments, a micro-batch, the batch's pixels, slices of logits."""
        slices = 3 * 4 * min(batch * batch, SLICE_LOGITS["cpu"])
        return self.start + 3 * self.parameters + micro * self.pair_bytes + batch * self.pixel_bytes + slices


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse(argv)
    if options.predict:
        print_predictions(options)
        return 0
    device = resolve_device(options.device)
    with process_group(device):
        if world_size() > 1:
            measure_processes(options)
            return 0
    results: dict[str, Any] = {"machine": machine(options.device), "options": vars(options), "models": {}}
    for name in options.models.split(","):
        model, *batches = name.split(":")
        sizes = [int(batch) for batch in batches] or [256, 1024]
        costs = None if device.type == "cuda" else in_new_process(measure_costs, model, options)
        points = [in_new_process(measure, model, batch, options) for batch in sizes]
        report(model, costs, points, options)
        results["models"][model] = {
            "costs": None if costs is None else costs._asdict(),
            "points": [{**point._asdict(), "over_plain": point.over_plain} for point in points],
        }
    write_json(options.json, results)
    return 0


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", default="ViT-B/32:256:1024,ViT-Ti/32:256:1024:4096", help="MODEL:BATCH:BATCH,...")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--micro_batch_size", type=lambda text: text if text == "auto" else int(text), default=MICRO,
        help="of the large batches: pairs, or auto",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--quick", action="store_true", help="ViT-Ti/32 alone, batches of 64 and 128")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    parser.add_argument("--parallel", default="ddp", help="under torchrun: ddp or fsdp")
    parser.add_argument("--predict", action="store_true", help="print what the model of the cost says for many GPUs")
    parser.add_argument("--gpu_tflops", type=float, default=150, help="assumed: of a GPU, in training")
    parser.add_argument("--gpu_gb_s", type=float, default=25, help="assumed: that a GPU sends and receives")
    parser.add_argument("--text_tokens", type=int, default=20, help="assumed: tokens of a caption, on average")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.repeats = "ViT-Ti/32:64:128", 1
    return options


def build_trainer(name: str, batch: int, options: Namespace, micro: int | str) -> MultimodalTrainer:
    """Make what `train.py` trains with."""
    keep_freed_memory()
    torch.manual_seed(0)
    return make_trainer(
        name, resolve_device(options.device), parallel=options.parallel, precision=options.precision,
        batch_size=batch, micro_batch_size=micro, gradient_checkpointing=options.gradient_checkpointing,
        texts=make_texts(64),
    )  # fmt: skip


def make_batch(name: str, size: int, *, pin_memory: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Make images of noise, and the sample data's captions."""
    resolution = ARCHITECTURES[name].image_resolution
    images = torch.empty(size, 3, resolution, resolution, dtype=torch.uint8, pin_memory=pin_memory)
    different = images[:DIFFERENT].random_()
    for start in range(DIFFERENT, size, DIFFERENT):  # a tenth of the time that noise takes
        images[start : start + DIFFERENT] = different[: size - start]
    return images, make_texts(size), torch.arange(size)


def make_texts(size: int) -> Tensor:
    """Tokenise the sample data's captions, 64 of them, again and again."""
    captions = [texts[0] for _, texts in distinct_scenes(64)]
    tokens, _ = tokenize(captions)
    return tokens[torch.arange(size) % len(captions)]


def measure(name: str, batch: int, options: Namespace) -> Point:
    """Take steps of a batch in turns with plain ones."""
    trainer = build_trainer(name, batch, options, options.micro_batch_size)
    is_gpu = trainer.model.device.type == "cuda"
    large = make_batch(name, batch, pin_memory=is_gpu)
    if is_gpu:  # so that no turn chooses kernels; where memory runs out, micro-batches are smaller from here on
        trainer.train_step(*large)
    micro = min(trainer.grad_cache.size or batch, batch)
    small = make_batch(name, micro, pin_memory=is_gpu)
    trainer.train_step(*small)
    cases = {"plain": lambda: trainer.train_step(*small), "batch": lambda: trainer.train_step(*large)}
    timings = take_turns(cases, repeats=options.repeats, warmup=0, device=options.device)
    most = torch.cuda.max_memory_reserved() if is_gpu else peak()
    if min(trainer.grad_cache.size or batch, batch) != micro:
        raise RuntimeError(
            f"memory ran out in a step that was timed, of micro-batches of {micro}: close other programs"
        )
    return Point(batch, timings["batch"].seconds, timings["plain"].seconds, most, micro)


def measure_costs(name: str, options: Namespace) -> Costs:
    """Measure what the model of the cost is made of, from plain steps and the loss alone."""
    trainer = build_trainer(name, MICRO, options, MICRO)
    model, start = trainer.model, peak()
    half, full = make_batch(name, MICRO // 2), make_batch(name, MICRO)
    cases: dict[str, Callable[[], object]] = {"step": lambda: trainer.train_step(*full)}
    cases["update"] = trainer.optimizer.step
    timings = take_turns(cases, repeats=2 * options.repeats + 1)
    fixed = timings["update"].median
    few, more = (live_bytes(trainer, batch) for batch in (half, full))
    features = [F.normalize(torch.randn(2048, model.projection_dim), dim=-1).requires_grad_() for _ in range(2)]
    loss = take_turns({"loss": lambda: trainer.grad_cache.loss(*features).backward()}, repeats=3)["loss"].median
    return Costs(
        fixed=fixed,
        pair=(timings["step"].median - fixed) / MICRO,
        logit=loss / 2048**2,
        start=start,
        parameters=sum(parameter.nbytes for parameter in model.parameters()),
        pair_bytes=(more - few) / (MICRO - MICRO // 2),
        pixel_bytes=half[0][0].nbytes,
    )


def live_bytes(trainer: MultimodalTrainer, batch: tuple[Tensor, Tensor, Tensor]) -> int:
    """Return the most bytes that a forward pass makes and keeps."""
    with LiveTensors() as live:
        trainer.model(*batch[:2])
    held: int = live.peak
    return held


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    kilobytes: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * kilobytes


def report(name: str, costs: Costs | None, points: list[Point], options: Namespace) -> None:
    """Print one model's table."""
    rows = [["batch", "s/step", "model says", "a pair, times plain", "peak GB", "less pixels", "model says"]]
    if costs is not None:
        plain = Timing([seconds for point in points for seconds in point.plain_seconds])
        says = f"{costs.seconds(MICRO, MICRO):.2f}"
        rows.append([f"{MICRO}, plain", f"{plain.median:.2f}", says, "1", "", "", ""])
    for point in points:
        resolution = ARCHITECTURES[name].image_resolution
        rows.append(
            [
                f"{point.batch}",
                f"{Timing(point.seconds).median:.2f}",
                "" if costs is None else f"{costs.seconds(point.batch, point.micro):.2f}",
                f"{point.times_plain:.2f}",
                f"{point.peak / GB:.2f}",
                f"{(point.peak - 3 * point.batch * resolution**2) / GB:.2f}",
                "" if costs is None else f"{costs.peak(point.batch, point.micro) / GB:.2f}",
            ]
        )
    ways = ", checkpointed" if options.gradient_checkpointing else ""
    title = f"{name}, {options.precision}{ways}, micro-batches of {points[0].micro}"
    if costs is not None:
        measured = f"{costs.pair:.3f} s and {costs.pair_bytes / 1e6:.1f} MB a pair, {costs.fixed:.2f} s a step"
        title += f": {measured}, {1e9 * costs.logit:.1f} ns a logit"
    print_table(title, rows)


def measure_processes(options: Namespace) -> None:
    """Time a step of all processes together."""
    name, *batches = options.models.split(",")[0].split(":")
    trainer = build_trainer(name, int(batches[0]), options, MICRO)
    images, tokens, ids = make_batch(name, int(batches[0]))
    own = rank_slice(len(ids))
    steps = {"step": lambda: trainer.train_step(images[own], tokens[own], ids[own])}
    timing = take_turns(steps, repeats=options.repeats, device=options.device)
    if is_main():
        seconds, number = timing["step"].median, world_size()
        print(f"{name}, batch {batches[0]}, {number} processes ({options.parallel}): {seconds:.2f} s a step")


def print_predictions(options: Namespace) -> None:
    """Print what the model of the cost says for a batch of 32,768 on 8 and on 256 GPUs."""
    rows = [["model", "GPUs", "micro-batch", "towers s", "loss s", "exchange s", "GB a GPU, ddp", "GB a GPU, fsdp"]]
    for name, micro in (("ViT-B/32", 512), ("ViT-L/14", 64)):
        for gpus in (8, 256):
            rows.append(predict(name, gpus, micro, options))
    speeds = f"{options.gpu_tflops:g} TFLOP/s and {options.gpu_gb_s:g} GB/s a GPU"
    print_table(f"Batch {BATCH:,}, bf16, assumed: {speeds}, {options.text_tokens} tokens a caption", rows)


BATCH = 32768


def predict(name: str, gpus: int, micro: int, options: Namespace) -> list[str]:
    """Return a row of the predictions."""
    shape = ARCHITECTURES[name]
    parameters = num_parameters(name)
    own = BATCH // gpus
    micro = min(micro, own)
    again = 1 - micro / own
    towers = (
        own * step_flops(shape, torch.tensor([options.text_tokens])) * (1 + again / 3) / (options.gpu_tflops * 1e12)
    )
    # three products and one more to have the logits again; float32 runs at an eighth of that rate
    loss = 8 * own * BATCH * shape.embed_dim / (options.gpu_tflops * 1e12 / 8)
    # texts are gathered and their gradients added up; so are the parameters' gradients
    exchanged = 4 * (3 * BATCH * shape.embed_dim + 2 * parameters)
    activations = micro * activation_bytes(name, options.text_tokens) + 4 * 3 * min(own * BATCH, SLICE_LOGITS["cuda"])
    pixels = 4 * micro * 3 * shape.image_resolution**2  # as float32
    state = 16 * parameters
    return [
        name, f"{gpus}", f"{micro}", f"{towers:.2f}", f"{loss:.2f}", f"{exchanged / options.gpu_gb_s / 1e9:.2f}",
        f"{(state + activations + pixels) / GB:.0f}", f"{(state / gpus + activations + pixels) / GB:.0f}",
    ]  # fmt: skip


@cache
def num_parameters(name: str) -> int:
    """Count a model's parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CLIPModel(name, pretrained="none").parameters())


def activation_bytes(name: str, text_tokens: int) -> float:
    """Estimate what a pair keeps in bf16 until its gradient is there: about 34 bytes a position, width and layer."""
    shape = ARCHITECTURES[name]
    positions = (shape.image_resolution // (shape.vision_patch_size or 1)) ** 2 + 1
    layers = shape.vision_layers
    assert isinstance(layers, int)
    image = positions * shape.vision_width * layers
    return 34.0 * (image + text_tokens * shape.transformer_width * shape.transformer_layers)


if __name__ == "__main__":
    sys.exit(main())
