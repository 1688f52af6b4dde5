"""Whole runs of `train.py` on a GPU, each for one question: how fast it is fed, when it begins, what else takes time.

python benchmarks/gpu_runs.py small_run --device cuda --work benchmarks/gpu_work
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_data import make_jpegs
from benchmarks.rows import FAILED, SKIPPED, Row, tell
from cliptune.recorded import WallTime

if TYPE_CHECKING:
    import torch

    from cliptune.preprocess.transforms import PixelTransform

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"epoch (\d+)/\d+, step \d+/\d+: .* ([\d.]+) pairs/s")
STOPPED = 143


def main(argv: list[str] | None = None) -> int:
    """Run and tell; returns the exit code."""
    options = parse(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    MEASUREMENTS[options.name](options)
    return 0


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("name", choices=list(MEASUREMENTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "gpu_work", help="folder for data and runs")
    parser.add_argument(
        "--step_rate", type=float, help="pairs a second of steps alone, for jpeg, decode_gpu and cached"
    )
    parser.add_argument("--quick", action="store_true", help="a small model, few and small images")
    return parser.parse_args(argv)


def jpeg(options: Namespace) -> None:
    """Train from JPEG files; beside the lower of the rates of steps and of decoding on all cores."""
    data = feeding_data(options)
    decoding, cores = decoding_rate(data)
    tell(Row(f"decoding alone, {cores} cores", decoding, "images/s"))
    rate = training_rate(options, data, "jpeg", [])
    tell(Row("whole training from JPEG files", rate, "pairs/s"))
    limit = min(decoding, options.step_rate or math.inf)
    tell(Row("the same over the lower of step rate and decoding rate", 100 * rate / limit, "%", must=85, hope=95))


def decode_gpu(options: Namespace) -> None:
    """Decode JPEG files on the device: how fast, how far from exact pixels; train so."""
    import torch  # noqa: PLC0415  (this and the next: what most measurements need not import)

    from cliptune.preprocess.jpeg_decoder import decoder_issue  # noqa: PLC0415

    device = torch.device(options.device)
    if (issue := decoder_issue(device)) is not None:
        tell(Row("--decode gpu", state=SKIPPED, note=issue))
        return
    data = feeding_data(options)
    decoding, mean, largest = decoded_on(device, paths_of(data)[: 32 if options.quick else 2048])
    tell(Row("--decode gpu: decoding and resizing alone", decoding, "images/s"))
    tell(Row("--decode gpu: mean difference from exact pixels", mean, "of 255"))
    tell(Row("--decode gpu: largest difference from exact pixels", largest, "of 255"))
    rate = training_rate(options, data, "decode_gpu", ["--decode", "gpu"])
    tell(Row("whole training from JPEG files, --decode gpu", rate, "pairs/s"))
    if options.step_rate:
        tell(Row("the same, --decode gpu, over the step rate", 100 * rate / options.step_rate, "%"))


def decoded_on(device: torch.device, paths: Sequence[str]) -> tuple[float, float, float]:
    """Return images a second that a device decodes and resizes, and how far pixels are from exact ones, of 255.

    The difference is the mean one and the largest.
    """
    import torch  # noqa: PLC0415

    from cliptune.data.loaders import PIECE_SIZE  # noqa: PLC0415
    from cliptune.preprocess.jpeg_decoder import JpegDecoder, LeavesJpegs  # noqa: PLC0415
    from cliptune.preprocess.transforms import clip_transform  # noqa: PLC0415

    leaves = LeavesJpegs(clip_transform(224))
    parts = [leaves(leaves.load(path)) for path in paths]
    pieces = [parts[start : start + PIECE_SIZE] for start in range(0, len(parts), PIECE_SIZE)]
    decoder = JpegDecoder(device)
    decoder.decode(pieces[0])  # which takes its time to begin
    begin = time.perf_counter()
    pixels = torch.cat([decoder.decode(piece)[0] for piece in pieces])
    seconds = time.perf_counter() - begin
    few = min(len(paths), 512)  # enough of them: the CPU takes its time for each
    exact = torch.stack([leaves.inner(leaves.inner.load(path)) for path in paths[:few]])
    difference = (pixels[:few].int() - exact.int()).abs()
    return len(paths) / seconds, difference.float().mean().item(), float(difference.max())


def cached(options: Namespace) -> None:
    """Train from cached images, from the second epoch on; beside the rate of steps."""
    rate = training_rate(options, feeding_data(options), "cached", ["--cache_images"])
    tell(Row("whole training with --cache_images", rate, "pairs/s"))
    if options.step_rate:
        tell(Row("the same over the step rate", 100 * rate / options.step_rate, "%", must=85, hope=95))


def small_run(options: Namespace) -> None:
    """Train on few images for 10 epochs; tell what of it is neither steps nor data, after the start."""
    number, epochs = (64, 2) if options.quick else (1400, 10)
    output = options.work / "small_run"
    train(options, output, make_images(options, number), ["--batch_size", "32", "--num_epochs", str(epochs)])
    results = json.loads((output / "results" / "training_results.json").read_text(encoding="utf-8"))
    wall = WallTime.model_validate(results["wall_time"])
    told = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in wall.phases().items())
    rest = wall.validation + wall.saving + wall.rest
    share = 100 * rest / (wall.total - wall.start)
    tell(
        Row(f"{number:,} images, {epochs} epochs: neither steps nor data", share, "%", 30, 10, higher=False, note=told)
    )


def start(options: Namespace) -> None:
    """Start a run twice, on weights that are on disk, and time the second one to the end of its first step.

    The model as loaded is evaluated before it.
    """
    weights = options.work / f"weights_{model_name(options).replace('/', '-')}.safetensors"
    if not weights.exists():
        write_weights(weights, model_name(options))
    data, seconds = make_images(options, 64 if options.quick else 1000), []
    for _ in range(1 if options.quick else 2):
        output = options.work / "start"
        flags = ["--pretrained", str(weights), "--activation", "quick_gelu", "--log_interval", "1"]
        with Run(options, output, data, flags) as run:
            seconds.append(run.wait_for(output / "logs" / "steps.jsonl"))
            run.stop()
    tell(Row("train.py to the end of its first step, warm disk", seconds[-1], "s", 15, 8, higher=False))


def write_weights(path: Path, name: str) -> None:
    """Write random weights by the names of OpenAI's model."""
    import torch  # noqa: PLC0415  (this and the next: what most measurements need not import)
    from safetensors.torch import save_file  # noqa: PLC0415

    from clip_model import CLIPModel  # noqa: PLC0415

    backbone = CLIPModel(name, pretrained="none").backbone
    tensors = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    save_file(tensors | {"logit_scale": torch.tensor(math.log(100))}, path)


def fp16(options: Namespace) -> None:
    """Train in fp16 with the scaler."""
    records = train(options, options.work / "fp16", make_images(options, 1000), ["--precision", "fp16"])
    skipped = sum(record.get("skipped", False) for record in records)
    tell(
        Row("fp16 with the scaler: steps skipped", 100 * skipped / len(records), "%", must=15, higher=False, check=True)
    )
    finite = sum(record["loss"] is not None for record in records[-5:])
    tell(Row("fp16 with the scaler: finite losses of the last five", finite, must=5, check=True))


def fp32(options: Namespace) -> None:
    """Train in fp32; the user must be told of TF32."""
    output = options.work / "fp32"
    train(options, output, make_images(options, 1000), ["--precision", "fp32", "--num_epochs", "1"])
    told = "TF32" in (output / "logs" / "train.log").read_text(encoding="utf-8")
    tell(Row("fp32: the log tells of TF32", float(told), must=1, check=True))


def torchrun(options: Namespace) -> None:
    """Train as one rank that torchrun started, over NCCL."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    output = options.work / "torchrun"
    environment = {"NCCL_DEBUG": "VERSION"}
    flags = ["--num_epochs", "1"]
    with Run(options, output, make_images(options, 1000), flags, launcher=launcher, environment=environment) as run:
        text = run.finish()
    version = re.search(r"NCCL version (\S+)", text)
    tell(Row("torchrun --nproc_per_node 1: exit code", 0, must=0, higher=False, check=True))
    note = f"NCCL {version[1]}" if version else "NCCL told no version: no collective ran on the GPU"
    tell(Row("torchrun --nproc_per_node 1: NCCL used", float(version is not None), must=1, check=True, note=note))


def sigterm(options: Namespace) -> None:
    """Stop a run while its first step compiles, nothing of which is cached."""
    output, cache = options.work / "sigterm", options.work / "sigterm_cache"
    shutil.rmtree(cache, ignore_errors=True)
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    with Run(options, output, make_images(options, 1000), ["--compile"], environment=environment) as run:
        run.wait_for(output / "results" / "training_results.json")  # the model as loaded is evaluated
        time.sleep(3)
        if has_content(output / "logs" / "steps.jsonl"):
            tell(Row("SIGTERM while the first step compiles", state=FAILED, note="the step was through within 3 s"))
            return
        begin, code = time.monotonic(), run.stop()
        tell(
            Row(
                "SIGTERM while the first step compiles: answered",
                time.monotonic() - begin,
                "s",
                10,
                higher=False,
                check=True,
            )
        )
    note = f"exit code {code}"
    tell(
        Row("SIGTERM while the first step compiles: it says so", float(code == STOPPED), must=1, check=True, note=note)
    )


class Run:
    """A run of `train.py` in a process of its own, which ends with the block.

    Args:
        options: of the measurement.
        output: folder of the run, made anew.
        data: index file.
        flags: beside those that all runs have.
        launcher: arguments of Python before `train.py`.
        environment: variables beside those that there are.
    """

    def __init__(
        self,
        options: Namespace,
        output: Path,
        data: Path,
        flags: Sequence[str],
        *,
        launcher: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        usual = {
            "--data_dir": data, "--output_dir": output, "--device": options.device, "--report": "none",
            "--num_epochs": 2, "--batch_size": 32, "--early_stopping_patience": 0, "--near_duplicates": "report",
        }  # fmt: skip
        if "--pretrained" not in flags:
            usual |= {"--model_name": model_name(options), "--pretrained": "none"}
        command = [sys.executable, *launcher, str(ROOT / "train.py")]
        command += [str(part) for pair in usual.items() for part in pair]
        self._text = (output / "output.txt").open("w+", encoding="utf-8")
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            [*command, *flags], stdout=self._text, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._text.close()

    def finish(self) -> str:
        """Wait for its end; return what it printed.

        Raises:
            RuntimeError: another exit code than 0.
        """
        code = self._process.wait()
        if code:
            raise RuntimeError(f"train.py ended with {code}: {self._last_line()}")
        self._text.seek(0)
        return self._text.read()

    def wait_for(self, path: Path) -> float:
        """Wait until it has written a file; return the seconds since its start.

        Raises:
            RuntimeError: it ended before that.
        """
        while not has_content(path):
            if self._process.poll() is not None:
                raise RuntimeError(f"train.py ended with {self._process.returncode}: {self._last_line()}")
            time.sleep(0.02)
        return time.monotonic() - self.began

    def stop(self) -> int:
        """Send SIGTERM, wait for the end, return the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def _last_line(self) -> str:
        self._text.seek(0)
        return next((line.strip() for line in reversed(self._text.readlines()) if line.strip()), "no output")


def train(options: Namespace, output: Path, data: Path, flags: Sequence[str]) -> list[dict[str, Any]]:
    """Train to the end; return what `steps.jsonl` holds."""
    with Run(options, output, data, flags) as run:
        run.finish()
    lines = (output / "logs" / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def has_content(path: Path) -> bool:
    """Tell whether a file is there and not empty."""
    return path.exists() and path.stat().st_size > 0


def model_name(options: Namespace) -> str:
    """Name the model that is trained."""
    return "ViT-Ti/32" if options.quick else "ViT-B/32"


def make_images(options: Namespace, number: int) -> Path:
    """Make JPEG files; returns their index file."""
    return make_jpegs(options.work, 64 if options.quick else number, size=(160, 120) if options.quick else (640, 480))


def feeding_data(options: Namespace) -> Path:
    """Make as many JPEG files as 40 steps of 512 pairs train on, and 256 for validation."""
    return make_images(options, 40 * 512 + 256)


def training_rate(options: Namespace, data: Path, name: str, flags: Sequence[str]) -> float:
    """Train for a few epochs; return the pairs a second after the first one, validation and saving left out."""
    output = options.work / name
    # by the lines of the log, whose clock a GPU cannot run ahead of for long: a line waits for the numbers of its steps
    sizes = ["--batch_size", "16", "--log_interval", "1"] if options.quick else ["--batch_size", "512"]
    epochs = ["--num_epochs", "2" if options.quick else "4", "--val_split", "0.1" if options.quick else "0.01235"]
    cache = ["--cache_dir", str(options.work / f"{name}_cache")]
    shutil.rmtree(cache[1], ignore_errors=True)
    # a run as short as this one would not be compiled by itself, and the steps that it is compared with are
    compiled = ["--compile"] if options.device.startswith("cuda") else []
    train(options, output, data, [*sizes, *epochs, *cache, *compiled, *flags])
    shutil.rmtree(cache[1], ignore_errors=True)  # gigabytes
    return rate_of((output / "logs" / "train.log").read_text(encoding="utf-8"))


def rate_of(log: str) -> float:
    """Return the pairs a second that a log tells of the second epoch and later ones.

    Raises:
        RuntimeError: it has no line of these.
    """
    speeds = [float(match[2]) for match in LINE.finditer(log) if int(match[1]) > 1]
    if not speeds:
        raise RuntimeError("the log has no line with the speed of a later epoch")
    return len(speeds) / sum(1 / speed for speed in speeds)  # each line is of as many pairs


def decoding_rate(data: Path) -> tuple[float, int]:
    """Return the images a second that all cores decode and bring to the model's size, and how many cores these are."""
    import torch  # noqa: PLC0415

    from cliptune.preprocess.transforms import clip_transform  # noqa: PLC0415
    from cliptune.runtime.device import num_cores  # noqa: PLC0415

    paths = paths_of(data)
    cores, load = num_cores(), partial(decode, clip_transform(224))
    with multiprocessing.get_context("fork").Pool(cores, torch.set_num_threads, [1]) as pool:
        pool.map(load, paths[: 2 * cores], chunksize=2)  # compiles
        begin = time.perf_counter()
        pool.map(load, paths, chunksize=max(len(paths) // (8 * cores), 1))
        seconds = time.perf_counter() - begin
        pool.close()  # each process ends by itself: one that a stoppable process forked heeds no SIGTERM
        pool.join()
    return len(paths) / seconds, cores


def paths_of(data: Path) -> list[str]:
    """List the images of an index file."""
    records = json.loads(data.read_text(encoding="utf-8"))
    return [str(data.parent / record["image_path"]) for record in records]


def decode(transform: PixelTransform, path: str) -> None:
    """Load an image as training does."""
    transform(transform.load(path))


MEASUREMENTS: dict[str, Callable[[Namespace], None]] = {
    each.__name__: each for each in (jpeg, decode_gpu, cached, small_run, start, fp16, fp32, torchrun, sigterm)
}


if __name__ == "__main__":
    sys.exit(main())
