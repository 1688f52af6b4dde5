"""Everything that is said of this toolkit on a GPU, measured in parts, each measurement in a process of its own.

benchmarks/gpu.sh                       all parts
benchmarks/gpu.sh stall vit_b32         some
benchmarks/gpu.sh --device cpu --quick  a try of the script itself, on tiny sizes
benchmarks/gpu.sh --table benchmarks/gpu_work/results.jsonl

A line for each figure as it comes, and a line of JSON in `--json`, whose tables `--table` prints. A part takes three
minutes at most. After a failure it goes on; the exit code is 1 if anything has failed or is wrong, and 0 where a figure
is merely lower than it must be. A signal ends it with the measurement that runs. Everything is written below
`benchmarks/gpu_work`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_data import make_captions
from benchmarks.gpu_parts import PARTS
from benchmarks.rows import FAILED, SKIPPED, Row, rows_of, table, told, write_line
from cliptune.runtime.stopping import Stopped, stoppable

ROOT = Path(__file__).resolve().parent.parent
PART_SECONDS = 178
"""Of a part, all its measurements together."""
GRACE_SECONDS = 3
"""That what is ended has to clean up."""
PATIENCE = 10
"""Times as long a try with `--quick` may take, since it measures nothing and may run on a busy machine."""
WORK = ROOT / "benchmarks" / "gpu_work"
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda",
    "NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib", "XDG_CACHE_HOME": "cache",
}  # fmt: skip
"""Folders that libraries write to, which would otherwise be outside of the checkout."""
PEERS = ("torch", "torchvision", "triton", "open_clip_torch", "transformers")
ABOUT = """
import json, os, platform
from importlib.metadata import PackageNotFoundError, version
import torch
import clip_model, data_loader, simplejpeg  # what all measurements need
found = {"machine": platform.machine() + ", " + str(len(os.sched_getaffinity(0))) + " cores"}
if DEVICE.startswith("cuda"):
    card = torch.cuda.get_device_properties(DEVICE)
    found = {"card": card.name + f", {card.total_memory / 1e9:.0f} GB", **found, "CUDA": torch.version.cuda}
for name in PEERS:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print("ABOUT " + json.dumps({**found, "Python": platform.python_version()}))
"""


def main(argv: list[str] | None = None) -> int:
    """Measure the parts, or print a table of what was measured; returns the exit code."""
    options = parse(argv)
    if options.table is not None:
        try:
            print("\n".join(table(options.table)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return refuse(f"--table {options.table}: not a file of this benchmark's results ({error})")
        return 0
    runner = Runner(options)
    try:
        with stoppable("gpu.py"):
            if not runner.look():
                return 1
            for name in options.parts or PARTS:
                runner.measure(name)
    except Stopped as stopped:  # the measurement, which has a session of its own, is ended by now
        print(f"gpu.py: {stopped}; results so far: {options.json}", file=sys.stderr)
        return stopped.exit_code
    print(f"{runner.failures} failed; results: {options.json}; a table: benchmarks/gpu.sh --table {options.json}")
    return 1 if runner.failures else 0


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags; an unknown part ends the program with exit code 2 and the names of all."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0], epilog=f"parts, in this order: {' '.join(PARTS)}", allow_abbrev=False
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="see the end of this; default: all")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the script, measures nothing")
    parser.add_argument(
        "--json", type=Path,
        help="file that results are added to (default: results.jsonl, or with --quick quick.jsonl, in --work)",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, default=WORK,
        help="folder for images, runs and compilers' caches (default: benchmarks/gpu_work)",
    )  # fmt: skip
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a table of such a file, and measure nothing")
    options = parser.parse_args(argv)
    if options.json is None:
        options.json = options.work / ("quick.jsonl" if options.quick else "results.jsonl")
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"no part is called {name}; there are {', '.join(PARTS)}")
    return options


def refuse(reason: str) -> int:
    """Say in one line what is wrong; returns the exit code."""
    print(f"gpu.py: error: {reason}", file=sys.stderr)
    return 2


class Runner:
    """Runs measurements, tells what they find as they find it, and writes it down.

    Args:
        options: of the command line.

    Attributes:
        device, quick: as the command line says.
        failures: so many measurements have failed, or found something wrong.
    """

    def __init__(self, options: Namespace) -> None:
        self.device, self.quick = options.device, options.quick
        self.failures = 0
        self._patience = PATIENCE if options.quick else 1
        self._options = options
        self._about: dict[str, str] = {}
        self._part, self._ends = "", 0.0
        self._work = options.work.resolve()
        self._work.mkdir(parents=True, exist_ok=True)

    @property
    def is_gpu(self) -> bool:
        """Tell whether the device is a GPU."""
        return str(self.device).startswith("cuda")

    def look(self) -> bool:
        """Say what the device and the versions are; tell whether the device is there."""
        code = f"DEVICE, PEERS = {self.device!r}, {PEERS!r}\n{ABOUT}"
        lines, reason = self._run("about", ["-c", code], seconds=120)
        found = next((line for line in lines if line.startswith("ABOUT ")), None)
        if found is None:
            print(f"{FAILED}: --device {self.device} cannot be used: {reason or lines[-1:]}", flush=True)
            return False
        self._about = {**json.loads(found.removeprefix("ABOUT ")), "code": code_digest()}
        print(", ".join(f"{name} {value}" for name, value in self._about.items()), flush=True)
        return True

    def measure(self, part: str) -> None:
        """Run all measurements of a part."""
        self._part, self._ends = part, time.monotonic() + PART_SECONDS * self._patience
        PARTS[part](self)

    def tell(self, row: Row) -> None:
        """Print a row, write it down, count what has failed."""
        self.failures += row.is_failure
        print(row.line(self._part), flush=True)
        write_line(self._options.json, self._part, row, self._about)

    def skip(self, name: str, reason: str = "needs CUDA") -> None:
        """Tell why something is not measured."""
        self.tell(Row(name, state=SKIPPED, note=reason))

    def rows(self, script: str, *flags: object, seconds: float = math.inf, name: str = "") -> None:
        """Run a benchmark that tells rows by itself, for so long at most, or for what is left to its part."""
        _, reason = self._script(script, flags, seconds=seconds, log=name)
        if reason is not None:
            self.tell(Row(name or script, state=FAILED, note=reason))

    def figures(self, script: str, *flags: object, seconds: float = math.inf, name: str) -> dict[str, Any] | None:
        """Run a benchmark that writes figures with `--json`; None: there are none. A failure is told.

        What it had written before it failed counts.
        """
        path = self._work / "figures.json"
        path.unlink(missing_ok=True)
        lines, reason = self._script(script, [*flags, "--json", path], seconds=seconds, log=name)
        for line in lines:
            if " is skipped: " in line:  # a peer that is not installed
                self.skip(f"{name}: {line.split(' is skipped')[0]}", line.split(" is skipped: ")[1])
        if reason is not None or not path.exists():
            self.tell(Row(name, state=FAILED, note=reason or "it wrote no figures"))
        if not path.exists():
            return None
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return figures

    def run(self, name: str, *flags: object, seconds: float = math.inf) -> None:
        """Run a whole run of `train.py`, see `gpu_runs`."""
        quick = ["--quick"] if self.quick else []
        self.rows("gpu_runs.py", name, "--work", self._work, *quick, *flags, seconds=seconds, name=name)

    def latest(self, name: str) -> float | None:
        """Return the last figure of this name that `--json` has of this machine and code, from any call."""
        path = self._options.json
        rows = [row for _, row, about in rows_of(path) if about == self._about] if path.exists() else []
        return next((row.value for row in reversed(rows) if row.name == name and row.value is not None), None)

    def captions(self) -> Path:
        """Return an index of captions with real lengths."""
        path = self._work / "captions_8192.json"
        return path if path.exists() else make_captions(self._work, 8192)

    def _script(
        self, script: str, flags: Sequence[object], *, seconds: float, log: str
    ) -> tuple[list[str], str | None]:
        command = [str(ROOT / "benchmarks" / script), *map(str, flags), "--device", self.device]
        left = self._ends - time.monotonic()
        if left < 5:
            return [], "no time is left of the part's three minutes"
        return self._run(f"{self._part}_{log or script}", command, seconds=min(seconds * self._patience, left))

    def _run(self, log: str, arguments: Sequence[str], *, seconds: float) -> tuple[list[str], str | None]:
        """Run Python; tell the rows that it prints as they come.

        Returns:
            All lines that it printed, and why it failed, if it did.
        """
        folder = self._work / "logs"
        folder.mkdir(exist_ok=True)
        environment = os.environ | {name: str(self._work / place) for name, place in CACHES.items()}
        environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        lines: list[str] = []
        late = threading.Event()

        def end_late() -> None:
            late.set()
            end(process)

        timer = threading.Timer(seconds, end_late)
        try:
            timer.start()
            assert process.stdout is not None
            with (folder / f"{log.replace('/', '-').replace(' ', '_')}.txt").open("w", encoding="utf-8") as file:
                for line in process.stdout:
                    file.write(line)
                    lines.append(line.rstrip())
                    if (row := told(line)) is not None:
                        self.tell(row)
            code = process.wait()
        finally:
            timer.cancel()
            end(process)
        if code == 0:
            return lines, None
        last = next((line.strip() for line in reversed(lines) if line.strip() and told(line) is None), "")
        return lines, f"not done after {seconds:.0f} s" if late.is_set() else last or f"exit code {code}"


def code_digest() -> str:
    """Return some digits that tell the toolkit's code from any other."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("cliptune/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def end(process: subprocess.Popen[str]) -> None:
    """End a process with all that it has started, which have its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks, which have sessions of their own
        ends = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < ends:
            process.poll()  # what has ended and nobody has asked for counts as there
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
