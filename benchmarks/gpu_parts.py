"""The parts of `gpu.py`: which measurements each runs, and what its figures must reach."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.rows import FAILED, Row

if TYPE_CHECKING:
    from benchmarks.gpu import Runner

COUNTINGS = ["flags", "compiled"]
"""Ways to count ranks on a GPU, see `retrieval`."""
Bounds = tuple[float, float]
"""What a figure must reach, and what would be good."""
SMALL, LARGE = "ViT-Ti/32", "ViT-B/32"
H100 = (9000, 13000)
"""Pairs a second of a ViT-B/32 on that card: must, hope."""
DEFAULT, COMPILED = (2.0, 2.5), (1.3, 1.6)
"""Of a ViT-B/32: times open_clip by default, and with its compiler: must, hope."""
OTHERS = (1.3, 1.6)
"""Of the other models."""


def correctness(run: Runner) -> None:
    """Features and gradients against the CPU; compiled, in micro-batches, in every precision against plain ones."""
    quick = ["--quick"] if run.quick else []
    run.rows("agreement.py", "--checks", "plain", *quick, seconds=90, name="plain")
    if run.is_gpu:
        run.rows("agreement.py", "--checks", "compiled", *quick, name="compiled")
    else:
        run.skip("compiled against eager")


def stall(run: Runner) -> None:
    """The slowest step over the median one, captions of random lengths."""
    model = ["--model", SMALL, "--batch_size", "4", "--steps", "6"] if run.quick else ["--model", LARGE]
    for name in ("false", "true") if run.is_gpu else ("default",):
        limit = 80 if name == "false" else math.inf
        run.rows("step_times.py", *model, "--compile", name, seconds=limit, name=f"compile {name}")


def launches(run: Runner) -> None:
    """A ViT-B/32's step, and for what part of it the GPU is idle: eager, compiled, with a CUDA graph; three sizes."""
    quick: list[object] = ["--model", SMALL, "--batch_sizes", 4, "--steps", 1] if run.quick else ["--model", LARGE]
    run.rows("gpu_idle.py", *quick, name="launches")
    if not run.is_gpu:
        run.skip("GPU idle; compiled; image tower as a CUDA graph")


def vit_b32(run: Runner) -> None:
    """A ViT-B/32's step, batch 512, beside open_clip's."""
    compare_with_open_clip(run, LARGE, 512, [], bounds=(DEFAULT, COMPILED))


def peers(run: Runner) -> None:
    """The same beside transformers and the usual loop on clip."""
    step(run, LARGE, 512, ["ours", "transformers", "clip"], {"transformers": None, "clip": None})


def vit_l14(run: Runner) -> None:
    """A ViT-L/14's step with gradient checkpointing, batch 256, beside open_clip's."""
    compare_with_open_clip(run, "ViT-L/14", 256, ["--gradient_checkpointing"])


def resnet50(run: Runner) -> None:
    """A ResNet-50's step, batch 512, beside open_clip's."""
    compare_with_open_clip(run, "RN50", 512, [])


def jpeg(run: Runner) -> None:
    """Whole training from 640 x 480 JPEG files over the lower of step rate and decoding rate."""
    run.run("jpeg", *known_step_rate(run))


def decode_gpu(run: Runner) -> None:
    """The device's decoder of JPEGs: its rate, its difference from exact pixels, whole training with it."""
    if not run.is_gpu:
        run.skip("--decode gpu")
        return
    run.run("decode_gpu", *known_step_rate(run))


def cached(run: Runner) -> None:
    """Whole training with `--cache_images` over the step rate."""
    run.run("cached", *known_step_rate(run))


def large_batch(run: Runner) -> None:
    """A batch of 32,768 pairs: pairs a second over a plain step's, recomputation counted."""
    model, batch = (SMALL, 64) if run.quick else (LARGE, 32768)
    flags = ["--models", f"{model}:{batch}", "--repeats", 1 if run.quick else 3, "--precision", precision_of(run)]
    flags += ["--micro_batch_size", "auto"] if run.is_gpu else []
    found = run.figures("large_batch.py", *flags, name=f"{model}, batch {batch:,}")
    if found is not None:
        point = found["models"][model]["points"][0]
        rate = batch / statistics.median(point["seconds"])
        note = f"micro-batches of {point['micro']}, peak {point['peak'] / 1e9:.0f} GB"
        run.tell(Row(f"{model}, batch {batch:,}", rate, "pairs/s", note=note))
        run.tell(Row("the same over a plain step's, recomputation counted", 100 * point["over_plain"], "%", 90, 97))


def memory(run: Runner) -> None:
    """How much of the card micro-batches use by themselves; steps that ran out of memory, repeated."""
    if not run.is_gpu:
        run.skip("micro-batches by themselves; out of memory, repeated")
        return
    small = ["--model", SMALL] if run.quick else []
    run.rows("gpu_memory.py", *small, name="memory")


def small_run(run: Runner) -> None:
    """What of a small run is neither steps nor data."""
    run.run("small_run")


def start(run: Runner) -> None:
    """From the start of `train.py` to the end of its first step."""
    run.run("start")


def ranks(run: Runner) -> None:
    """Ranks over the bare product."""
    sizes = [(500, 2500)] if run.quick else [(5000, 25000), (200_000, 1_000_000)]
    for images, texts in sizes:
        name = f"ranks, {images:,} x {texts:,}"
        flags = ["--images", images, "--texts", texts, "--repeats", 5 if images < 10_000 else 2]
        flags += ["--cases", *(COUNTINGS if run.is_gpu else [])]
        found = run.figures("retrieval.py", *flags, seconds=60 if images < 10_000 else math.inf, name=name)
        if found is not None:
            ours, product = found["seconds"]["ours"], found["seconds"]["product in blocks"]
            over = statistics.median(a / b for a, b in zip(ours, product, strict=True))
            run.tell(Row(name, 1000 * statistics.median(ours), "ms", note=f"spread {spread(ours):.0%}"))
            run.tell(Row(f"{name}: over the bare product", over, "times", 1.3, 1.1, higher=False))
            for counting in COUNTINGS:
                if counting in found["seconds"]:
                    median = statistics.median(found["seconds"][counting])
                    run.tell(Row(f"{name}: counted by {counting}", 1000 * median, "ms"))


def losses(run: Runner) -> None:
    """The loss with its gradient, ours in slices, PyTorch's whole, slices computed again, tiles."""
    sizes = "256,512" if run.quick else "4096,16384,32768,65536"
    run.rows("loss_speed.py", "--sizes", sizes, name="losses")


def kinds(run: Runner) -> None:
    """fp16, fp32, NCCL, SIGTERM: runs that must end well."""
    for name in ("fp16", "fp32", "torchrun", "sigterm"):
        if run.is_gpu:
            run.run(name, seconds=80)
        else:
            run.skip(name)


PARTS: dict[str, Callable[[Runner], None]] = {
    each.__name__: each
    for each in (
        correctness, stall, vit_b32, peers, launches, vit_l14, resnet50, jpeg, decode_gpu, cached, large_batch, memory,
        small_run, start, ranks, losses, kinds,
    )
}  # fmt: skip


def compare_with_open_clip(
    run: Runner, model: str, batch: int, flags: list[str], *, bounds: tuple[Bounds, Bounds] = (OTHERS, OTHERS)
) -> None:
    """Measure a model's step beside open_clip's, eager and compiled."""
    bound: dict[str, Bounds | None] = {"open_clip": bounds[0], "open_clip+compile": bounds[1]}
    # both in one process, whose start, models and compiler take longer than what is timed
    later = ["--later", "open_clip+compile"] if run.is_gpu else []
    step(run, model, batch, ["ours", "open_clip"], bound, [*later, *flags])


def step(
    run: Runner,
    model: str,
    batch: int,
    cases: list[str],
    bounds: dict[str, Bounds | None],
    flags: list[str] | None = None,
) -> float | None:
    """Measure a step of ours, by `train.py`'s default flags, in turns with peers'; returns our pairs a second."""
    sizes: list[object] = ["--batches", 8, "--repeats", 6, "--steps", 4 if batch >= 512 else 2, "--warmup", 2]
    if run.quick:  # a model that only `clip` knows besides
        model, batch, cases = SMALL, 8, ["ours", "clip"] if "clip" in cases else ["ours"]
        sizes = ["--batches", 2, "--repeats", 1, "--largest_side", 256]
    name = step_name(run, model, batch)
    found = run.figures(
        "train_step.py", "--model", model, "--batch_size", batch, "--precisions", precision_of(run),
        "--cases", ",".join(cases), "--captions", run.captions(), *sizes, *(flags or []),
        name=f"{name}: {', '.join(cases)}",
    )  # fmt: skip
    if found is None:
        return None
    figures = found["precisions"][precision_of(run)]
    rate = tell_steps(run, f"{name}{BY_DEFAULT}", batch, figures, model=model)
    if figures["floor_seconds"] is not None:
        share = 100 * figures["floor_seconds"] / statistics.median(figures["seconds"]["ours"])
        run.tell(Row(f"{name}: share of the floor", share, "%"))
    for seconds in (figures["seconds"], *figures["later_seconds"].values()):
        for peer in filter(seconds.__contains__, bounds):
            over = statistics.median(theirs / own for theirs, own in zip(seconds[peer], seconds["ours"], strict=True))
            rates = f"{batch / statistics.median(seconds[peer]):,.0f} pairs/s, spread {spread(seconds[peer]):.0%}"
            must, hope = bounds[peer] or (None, None)
            run.tell(Row(f"{name}: ours over {peer}", over, "times", must, hope, note=rates))
    return rate


BY_DEFAULT = ", default flags"


def step_name(run: Runner, model: str, batch: int) -> str:
    """Name a step in rows."""
    return f"{model}, batch {batch}, {precision_of(run)}"


def precision_of(run: Runner) -> str:
    """Return bf16, but in a try on the CPU fp32: a CPU without bf16 takes minutes for a second's work in it."""
    return "fp32" if run.quick and not run.is_gpu else "bf16"


def tell_steps(run: Runner, name: str, batch: int, figures: dict[str, Any], *, model: str) -> float:
    """Tell our pairs a second; returns them."""
    seconds: list[float] = figures["seconds"]["ours"]
    rate = batch / statistics.median(seconds)
    must, hope = H100 if model == LARGE and run.is_gpu else (None, None)
    note = f"{'' if figures['ours_compiled'] else 'not '}compiled, spread {spread(seconds):.0%}"
    run.tell(Row(name, rate, "pairs/s", must, hope, note=note))
    if run.is_gpu and not figures["ours_compiled"]:
        run.tell(Row(f"{name}: compiled", state=FAILED, note="it was not, as a long run is; the log says why"))
    return rate


def known_step_rate(run: Runner) -> list[object]:
    """Return the flag of the rate that runs are compared with; measured now, if it was not before."""
    model, batch = (SMALL, 8) if run.quick else (LARGE, 512)
    rate = run.latest(step_name(run, model, batch) + BY_DEFAULT) or step(run, model, batch, ["ours"], {})
    return [] if rate is None else ["--step_rate", rate]


def spread(seconds: list[float]) -> float:
    """Return (slowest - fastest) / median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)
