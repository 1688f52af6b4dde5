"""How long a query takes among many images, and what an approximate look-up misses.

python benchmarks/search.py --json search.json

Features are drawn in groups, as those of images are: among vectors without any, no part could be left out. A query is
one of them with noise. How long a text takes to be encoded is measured with random weights, as fast as any others.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Timing, machine, print_table, take_turns, write_json
from clip_model import CLIPModel
from cliptune.features.drift import generic_texts
from cliptune.features.encode import Encoder
from cliptune.runtime.device import resolve_precision
from cliptune.search.lookup import RECALL_AT, ApproximateLookup, ExactLookup, Lookup
from cliptune.search.searcher import encode_texts
from data_loader import ImageTextDataset

BLOCK = 100_000
NUM_QUERIES = 200
IMAGES_OF_A_GROUP = 100


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse(argv)
    rows: list[dict[str, Any]] = []
    for num_images in options.images:
        features = make_features(num_images, options.size)
        queries = make_queries(features)
        exact = ExactLookup(features)
        rows.append(measure("exact", exact, exact, queries, options))
        if num_images >= options.approximate_from:
            start = time.perf_counter()
            approximate = ApproximateLookup(features, queries, cache_prefix=None)
            seconds = time.perf_counter() - start
            rows.append(measure("approximate", approximate, exact, queries, options) | {"build_seconds": seconds})
            print(approximate.note, flush=True)
    head = ["images", "look-up", "ms, median", "ms, slowest", f"recall of {RECALL_AT}", "built in s"]
    print_table(f"{options.top} of so many images, {options.size} numbers each", [head, *map(as_cells, rows)])
    texts = time_texts(options)
    print(f"\n{options.model_name}: a text takes {1000 * texts.median:.0f} ms to be encoded")
    results = {"machine": machine("cpu"), "options": vars(options), "lookups": rows, "text_seconds": texts.seconds}
    write_json(options.json, results)
    return 0


def as_cells(row: dict[str, Any]) -> list[str]:
    """Return what the table shows of a look-up."""
    times = (f"{1000 * row[key]:.1f}" for key in ("median", "slowest"))
    return [f"{row['images']:,}", row["lookup"], *times, f"{row['recall']:.3f}", f"{row.get('build_seconds', 0):.0f}"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags; `--quick` sets sizes that take some seconds."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--approximate_from", type=int, default=100_000, help="images from which on it is built, too")
    parser.add_argument("--size", type=int, default=512, help="length of a feature (default: 512)")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20, help="queries that are timed one by one (default: 20)")
    parser.add_argument("--model_name", default="ViT-B/32")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    if options.quick:
        options.images, options.approximate_from, options.repeats = [500, 3000], 3000, 3
        options.size, options.model_name = 32, "ViT-Ti/32"
    return options


def make_features(number: int, size: int) -> Tensor:
    """Draw unit-norm features `[number, size]`, block by block; those of a group have cosines of about 0.6."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(max(1, number // IMAGES_OF_A_GROUP), size, generator=generator)
    features = torch.empty(number, size)
    for start in range(0, number, BLOCK):
        part = torch.randn(min(BLOCK, number - start), size, generator=generator)
        part = 0.8 * part + centres[torch.randint(len(centres), (len(part),), generator=generator)]
        features[start : start + BLOCK] = normalize(part, dim=1)
    return features


def make_queries(features: Tensor) -> Tensor:
    """Return some of the features with noise that is about half as long."""
    some = features[:: max(1, len(features) // NUM_QUERIES)][:NUM_QUERIES]
    generator = torch.Generator().manual_seed(2)
    return normalize(some + 0.5 * torch.randn(some.shape, generator=generator) / some.shape[1] ** 0.5, dim=1)


def measure(
    name: str, lookup: Lookup, exact: ExactLookup, queries: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Time queries one by one, and compare what they find with what an exact look-up finds."""
    timed = iter(queries.repeat(1 + (options.repeats + 1) // len(queries), 1))
    timing = take_turns({name: lambda: lookup.nearest(next(timed)[None], options.top)}, repeats=options.repeats)[name]
    found = lookup.nearest(queries, RECALL_AT).indices
    wanted = exact.nearest(queries, RECALL_AT).indices
    recall = (wanted[:, :, None] == found[:, None, :]).any(2).double().mean().item()
    return {
        "images": len(lookup.features), "lookup": name, "median": timing.median, "slowest": max(timing.seconds),
        "recall": recall,
    }  # fmt: skip


def time_texts(options: argparse.Namespace) -> Timing:
    """Time texts, each alone, from its letters to its feature."""
    model = CLIPModel(options.model_name, pretrained="none").eval()
    precision = resolve_precision("fp32", model.device)
    encoder = Encoder(model, ImageTextDataset, precision=precision, batch_size=1)
    texts = iter(generic_texts())
    return take_turns({"text": lambda: encode_texts(encoder, [next(texts)])}, repeats=options.repeats)["text"]


if __name__ == "__main__":
    sys.exit(main())
