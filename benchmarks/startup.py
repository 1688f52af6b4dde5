"""How long the stages take to answer `--help` and a wrong flag and to import, turn by turn with others.

python benchmarks/startup.py --json startup.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Timing, machine, print_table, take_turns, write_json

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("train", "evaluation", "data_loader", "visualization")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse(argv)
    cases = {}
    for name, (arguments, expected) in commands().items():
        if options.only is None or options.only in name:
            case = starter(arguments, expected)
            try:
                case()
            except RuntimeError as error:
                if "open_clip" not in name:
                    raise
                print(f"{name} is skipped: {str(error).splitlines()[-1]}")
            else:
                cases[name] = case
    timings = take_turns(cases, repeats=options.repeats, warmup=0)
    report(timings)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    write_json(options.json, {"machine": machine(), "options": vars(options), "seconds": seconds})
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", metavar="TEXT", help="only cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="1 repeat")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    options = parser.parse_args(argv)
    if options.quick:
        options.repeats = 1
    return options


def commands() -> dict[str, tuple[list[str], int]]:
    """List what is started: arguments of Python and the exit code that is right."""
    found: dict[str, tuple[list[str], int]] = {"python: nothing": (["-c", "pass"], 0)}
    for stage in STAGES:
        found[f"{stage}.py --help"] = ([f"{stage}.py", "--help"], 0)
        found[f"{stage}.py, wrong flag"] = ([f"{stage}.py", "--no_such_flag"], 2)
        found[f"import {stage}"] = (["-c", f"import {stage}"], 0)
    found["import torch"] = (["-c", "import torch"], 0)
    found["import open_clip"] = (["-c", "import open_clip"], 0)
    found["open_clip_train.main --help"] = (["-m", "open_clip_train.main", "--help"], 0)
    found["open_clip_train.main, wrong flag"] = (["-m", "open_clip_train.main", "--no_such_flag"], 2)
    return found


def starter(arguments: list[str], expected: int) -> Callable[[], object]:
    """Return a function that runs Python with `arguments` and waits for it.

    Raises (the function):
        RuntimeError: another exit code than `expected`, with what was printed.
    """

    def start() -> None:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != expected:
            raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr}")

    return start


def report(timings: dict[str, Timing]) -> None:
    """Print a table: time, spread, time as a fraction of what importing PyTorch takes."""
    torch = timings.get("import torch")
    rows = [["command", "median s", "spread", "of import torch"]]
    for name, timing in timings.items():
        fraction = "-" if torch is None else f"{timing.median / torch.median:.2f}"
        rows.append([name, f"{timing.median:.3f}", f"{100 * timing.spread:.0f}%", fraction])
    print_table(f"Start, {machine()}", rows)


if __name__ == "__main__":
    sys.exit(main())
