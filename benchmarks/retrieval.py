"""Full-gallery ranks of ours against the usual ways, turn by turn on the same features.

python benchmarks/retrieval.py --json retrieval.json

The usual ways hold the whole score matrix: open_clip and VSE++ sort every row and every column of it, CLIP_benchmark
takes the ten best of each. The floor is the product itself, in blocks or whole.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Timing, machine, print_table, ratio, take_turns, write_json
from cliptune.features.metrics import rank_metrics
from cliptune.features.ranks import Ranks, retrieval_ranks
from cliptune.results import RECALLS
from cliptune.runtime.device import resolve_device

FLOOR_BLOCKS = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of a block: small enough for a processor's cache, large enough to keep a GPU busy."""
FLOORS = ["ours", "product in blocks"]
CASES = ["whole product", "argsort", "topk"]
COUNTINGS = ["flags", "compiled"]
"""Ways of ours to count on a GPU, of which it takes one by itself."""


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse(argv)
    device = resolve_device(options.device)
    cases = make_cases(make_features(options.images, options.texts, options.size), device)
    cases = {name: cases[name] for name in dict.fromkeys([*FLOORS, *options.cases])}
    timings = take_turns(cases, repeats=options.repeats, device=device.type)
    memory = {name: peak_in_new_process(name, options) for name in cases} if options.memory else {}
    report(options, timings, memory)
    results: dict[str, Any] = {"machine": machine(device.type), "options": vars(options), "peak_mib": memory}
    results["seconds"] = {name: timing.seconds for name, timing in timings.items()}
    if "argsort" in cases:
        results["equal_ranks"] = fraction_of_equal_ranks(cases["ours"](), cases["argsort"]())
        print(f"\nranks equal to argsort's: {100 * results['equal_ranks']:.3f}%")
    write_json(options.json, results)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags; `--quick` sets sizes that take well under a minute."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25000)
    parser.add_argument("--size", type=int, default=512, help="length of a feature (default: 512)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cases", nargs="*", choices=[*CASES, *COUNTINGS], default=CASES, help="besides ours and the product in blocks"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each way in a process of its own")
    parser.add_argument("--quick", action="store_true", help="1,000 images, 5,000 texts, 3 repeats")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    options = parser.parse_args(argv)
    if options.quick:
        options.images, options.texts, options.repeats = 1000, 5000, 3
    return options


def make_features(num_images: int, num_texts: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw unit features whose ranks look like a trained model's: `[N, D]`, `[M, D]` and the texts' images `[M]`."""
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(num_images, size, generator=generator), dim=-1)
    owners = torch.arange(num_texts) * num_images // num_texts
    noise = normalize(torch.randn(num_texts, size, generator=generator), dim=-1)
    return images, normalize(images[owners] + 5 * noise, dim=-1), owners


def make_cases(features: tuple[Tensor, Tensor, Tensor], device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return every way as a function of no arguments."""
    images, texts, owners = (tensor.to(device) for tensor in features)
    return {
        "ours": lambda: retrieval_ranks(images, texts, owners),
        "product in blocks": lambda: product_in_blocks(images, texts),
        "whole product": lambda: images @ texts.T,
        "argsort": lambda: ranks_by_argsort(images, texts, owners),
        "topk": lambda: recalls_by_topk(images, texts, owners),
        "flags": lambda: retrieval_ranks(images, texts, owners, counting="flags"),
        "compiled": lambda: retrieval_ranks(images, texts, owners, counting="compiled"),
    }


def product_in_blocks(images: Tensor, texts: Tensor) -> None:
    """Multiply all, a block at a time into the same memory."""
    block = FLOOR_BLOCKS.get(images.device.type, FLOOR_BLOCKS["cuda"])
    scores = images.new_empty(block, block)
    for rows in images.split(block):
        for columns in texts.split(block):
            torch.mm(rows, columns.T, out=scores[: len(rows), : len(columns)])


def ranks_by_argsort(images: Tensor, texts: Tensor, owners: Tensor) -> Ranks:
    """Rank as open_clip's `get_clip_metrics` does, for several texts an image: the index of the first own one."""
    scores = (images @ texts.T).cpu()
    owners = owners.cpu()
    rows = torch.arange(len(scores))
    i2t = (owners[scores.argsort(dim=1, descending=True)] == rows[:, None]).int().argmax(1)
    t2i = (scores.T.argsort(dim=1, descending=True) == owners[:, None]).int().argmax(1)
    return Ranks(i2t.double() + 1, t2i.double() + 1)


def recalls_by_topk(images: Tensor, texts: Tensor, owners: Tensor) -> list[float]:
    """Give recalls alone, as CLIP_benchmark does: whether a match is among the K best, K by K."""
    scores = images @ texts.T
    rows = torch.arange(len(scores), device=scores.device)
    found = [(owners[scores.topk(k, dim=1).indices] == rows[:, None]).any(1).float().mean().item() for k in RECALLS]
    found += [(scores.T.topk(k, dim=1).indices == owners[:, None]).any(1).float().mean().item() for k in RECALLS]
    return [100 * recall for recall in found]


def fraction_of_equal_ranks(ours: Ranks, theirs: Ranks) -> float:
    """Compare ranks query by query; they differ where two scores differ in the last bit or tie."""
    assert abs(rank_metrics(ours)["rsum"] - rank_metrics(theirs)["rsum"]) < 6
    equal = torch.cat([ours.i2t == theirs.i2t, ours.t2i == theirs.t2i])
    return equal.float().mean().item()


def peak_in_new_process(name: str, options: argparse.Namespace) -> float | None:
    """Measure `peak_mib` where nothing else has left memory behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_mib, name, (options.images, options.texts, options.size), options.device).result()


def peak_mib(name: str, sizes: tuple[int, int, int], device_name: str) -> float | None:
    """Return the memory that a way needs beyond the features, in MiB; None where the system does not tell."""
    device = resolve_device(device_name)
    make_cases(make_features(20, 100, sizes[2]), device)[name]()  # loads what is loaded once
    case = make_cases(make_features(*sizes), device)[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts anew
        before = _status_kib("VmRSS")
        case()
        return (_status_kib("VmHWM") - before) / 2**10
    except OSError:
        return None


def _status_kib(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1])


def report(options: argparse.Namespace, timings: dict[str, Timing], memory: dict[str, float | None]) -> None:
    """Print a table: time, spread, times ours, times the product's, peak memory."""
    rows = [["way", "median s", "spread", "times ours", "times the product", "peak MiB"]]
    for name, timing in timings.items():
        peak = memory.get(name)
        rows.append([
            name, f"{timing.median:.3f}", f"{100 * timing.spread:.0f}%", f"{ratio(timings, 'ours', name):.2f}",
            f"{ratio(timings, 'product in blocks', name):.2f}", "-" if peak is None else f"{peak:.0f}",
        ])  # fmt: skip
    title = f"{options.images} images x {options.texts} texts x {options.size}, {machine(options.device)}"
    print_table(title, rows)


if __name__ == "__main__":
    sys.exit(main())
