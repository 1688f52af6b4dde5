"""Time and memory of a JSON index: read, with its images found, split, identified, and walked by a worker.

python benchmarks/index_memory.py --json index_memory.json

Each step is measured in a process of its own, which does the steps before it too. The index's images are empty files
in folders of a thousand: they are looked up on the disk like real ones, and never opened.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import in_new_process, machine, print_table, write_json
from cliptune.data.formats import read_index
from cliptune.data.pairs import Pairs, load_pairs
from cliptune.data.snapshot import take_snapshots
from cliptune.data.splits import split_pairs

WORDS = (
    "a", "photo", "of", "two", "brown", "dogs", "that", "run", "along", "the", "beach", "near", "some", "old", "boats",
    "while", "children", "watch", "from", "a", "wall",
)  # fmt: skip
FOLDER_SIZE = 1000
NEEDED_ROWS = 10_000_000


class Cost(NamedTuple):
    """What a step took."""

    seconds: float
    peak: int
    """Bytes beyond the process with its imports."""
    kept: int
    """Bytes that are still held at the end."""


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse(argv)
    if not Path("/proc/self/smaps_rollup").exists():
        print("index_memory.py: error: only Linux tells a process's own memory", file=sys.stderr)
        return 2
    with TemporaryDirectory(dir=options.folder) as folder:
        path = make_index(Path(folder), options.num_rows, options.num_images or options.num_rows)
        file_size = path.stat().st_size
        costs = {name: in_new_process(measure, name, path) for name in STEPS}
        costs["loading process"] = in_new_process(measure_walk, path)
    report(costs, num_rows=options.num_rows, file_size=file_size)
    figures = {name: cost._asdict() for name, cost in costs.items()}
    write_json(options.json, {"machine": machine(), "options": vars(options), "file_size": file_size, "costs": figures})
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--num_rows", type=int, default=1_000_000, help="rows of the index (default: 1000000)")
    parser.add_argument("--num_images", type=int, help="different images among them (default: as many as rows)")
    parser.add_argument("--folder", metavar="PATH", help="where to make the files (default: the temporary folder)")
    parser.add_argument("--quick", action="store_true", help="100,000 rows")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    options = parser.parse_args(argv)
    if options.quick:
        options.num_rows = 100_000
    return options


def make_index(folder: Path, num_rows: int, num_images: int) -> Path:
    """Write a JSON list with a caption of twelve words and a number a row, and an empty file for each image."""
    for image in range(num_images):
        path = folder / image_name(image)
        if image % FOLDER_SIZE == 0:
            path.parent.mkdir(parents=True)
        path.touch()
    with (folder / "data.json").open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            words = [WORDS[(row * step) % len(WORDS)] for step in range(1, 13)]
            entry = {"image_path": image_name(row % num_images), "caption": f"{' '.join(words)} {row}"}
            file.write(("[\n" if row == 0 else ",\n") + json.dumps(entry))
        file.write("\n]\n")
    return folder / "data.json"


def image_name(number: int) -> str:
    """Return the path of an image in the index."""
    return f"images/{number // FOLDER_SIZE:05}/{number:08}.jpg"


STEPS: dict[str, Callable[[Path], object]] = {
    "read": read_index,
    "read, images found": load_pairs,
    "read, images found, split": lambda path: split_pairs(load_pairs(path)),
    "all that, identities taken": lambda path: take_snapshots(split_pairs(load_pairs(path)), cache_file=cache_of(path)),
    "all that, identities cached": lambda path: take_snapshots(
        split_pairs(load_pairs(path)), cache_file=cache_of(path)
    ),
}


def cache_of(path: Path) -> Path:
    """Return where the identities of an index's images are cached: one step leaves them for the next."""
    return path.with_name("identities.npz")


def measure(name: str, path: Path) -> Cost:
    """Do a step and tell its cost."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before, start = memory("status", "VmRSS"), time.perf_counter()
    result = STEPS[name](path)
    seconds = time.perf_counter() - start
    kept = memory("status", "VmRSS") - before
    del result
    return Cost(seconds, memory("status", "VmHWM") - before, kept)


def measure_walk(path: Path) -> Cost:
    """Let a forked process read every path and caption; its own memory is that which it shares with nobody."""
    pairs = load_pairs(path)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(walk(pairs)))
    process.start()
    cost: Cost = receiver.recv()
    process.join()
    return cost


def walk(pairs: Pairs) -> Cost:
    """Read every path and caption, one by one, and tell what it cost."""
    for number in range(min(len(pairs), 10)):  # loads what is loaded once
        read_image(pairs, number)
    before, start = memory("smaps_rollup", "Private_Dirty"), time.perf_counter()
    for number in range(len(pairs)):
        read_image(pairs, number)
    grown = memory("smaps_rollup", "Private_Dirty") - before
    return Cost(time.perf_counter() - start, grown, grown)


def read_image(pairs: Pairs, number: int) -> None:
    """Read an image's path and captions."""
    assert pairs.paths[number]
    assert pairs.captions_of(number)


def memory(file: str, key: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/self/{file}").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/{file} has no {key}")
    return 1024 * int(found[1])


def report(costs: dict[str, Cost], *, num_rows: int, file_size: int) -> None:
    """Print a table: seconds, memory, bytes a row, and what ten million rows would need."""
    rows = [["step", "s", "peak MiB", "kept MiB", "peak bytes a row", f"peak GiB at {NEEDED_ROWS:,} rows"]]
    for name, cost in costs.items():
        a_row = cost.peak / num_rows
        rows.append([
            name, f"{cost.seconds:.1f}", f"{cost.peak / 2**20:.0f}", f"{cost.kept / 2**20:.0f}", f"{a_row:.0f}",
            f"{a_row * NEEDED_ROWS / 2**30:.2f}",
        ])  # fmt: skip
    print_table(f"An index of {num_rows:,} rows, {file_size / 2**20:.0f} MiB, {machine()}", rows)


if __name__ == "__main__":
    sys.exit(main())
