"""What each way of fine-tuning gains and forgets, on drawn worlds that fit two cores.

python benchmarks/fine_tuning.py --work_dir /tmp/fine_tuning

A small model is trained on many scenes of one world, and stands for a published one. Then 50, 200 and 1,000 images of a
second world, which has other words, another style and another layout, are learnt by each method with three seeds, each
with a tenth of its images for validation, as people have them. What is reported is measured on 1,000 other images:
the gain of the run's best model over the model as loaded in the second world, and what it loses in the first.

Runs are kept in --work_dir row by row: called again, it goes on with those that are missing. What holds for this model
need not hold for a published one, which is larger and has seen more: rates above all.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from pydantic import Field

from benchmarks.drawn_worlds import write_world
from benchmarks.timing import machine, print_table, write_json
from clip_model import CLIPModel
from cliptune import settings as config
from cliptune.cli import parse_settings, run_stage
from cliptune.data.pairs import Pairs, load_pairs
from cliptune.features.encode import Encoder
from cliptune.features.verdict import compare
from cliptune.runtime import files
from cliptune.runtime.device import resolve_precision
from cliptune.settings import PositiveInt, Settings
from data_loader import ImageTextDataset
from evaluation import Evaluation, evaluate
from train import main as train

FIRST_SEED, FIRST_TEST_SEED, SECOND_SEED, SECOND_TEST_SEED = range(4)
FULL = "--learning_rate 1e-4 --backbone_lr_scale 1"
METHODS = {
    "defaults of train.py": "",
    "full at 1e-5": "--learning_rate 1e-5 --backbone_lr_scale 1",
    "full at 1e-4": FULL,
    "full at 1e-3": "--learning_rate 1e-3 --backbone_lr_scale 1",
    "projection layers": "--freeze_backbone --learning_rate 1e-3",
    "last 2 layers": f"{FULL} --train_layers 2",
    "layer decay 0.7": f"{FULL} --layer_decay 0.7",
    "average (EMA)": f"{FULL} --ema 0.999",
    "LoRA of rank 8": "--lora_rank 8 --learning_rate 1e-3 --backbone_lr_scale 1",
    "interpolated": f"{FULL} --interpolate",
    "recipe auto": "--recipe auto",
}
"""Flags of `train.py`; the first model was trained at a rate of 1e-3."""
EPOCHS = {50: 30, 200: 20, 1000: 10}
"""Epochs for a number of images; others are trained as the nearest is."""


class BenchmarkSettings(Settings):
    """Settings of the benchmark."""

    work_dir: str = Field("fine_tuning", description="folder for the worlds, the first model and the rows")
    sizes: str = Field("50,200,1000", description="images of the second world that are learnt, with commas")
    methods: str = Field(",".join(METHODS), description="which of the methods, with commas")
    seeds: PositiveInt = Field(3, description="runs of each method")
    first_images: PositiveInt = Field(20_000, description="scenes that the first model is trained on")
    first_epochs: PositiveInt = Field(4, description="passes over them")
    test_images: PositiveInt = Field(1000, description="images of each world that judge")
    device: config.Device = "auto"
    json_path: str | None = Field(None, description="write the figures there", json_schema_extra={"flag": "json"})


class Worlds:
    """The two worlds' images, and the model that has learnt the first."""

    def __init__(self, settings: BenchmarkSettings) -> None:
        self.settings, self.folder = settings, Path(settings.work_dir)
        first, second = self.folder / "first", self.folder / "second"
        num_test, self.num_second = settings.test_images, max(EPOCHS)
        write_world(first / "train", settings.first_images, seed=FIRST_SEED, shifted=False)
        self.second = write_world(second / "train", self.num_second, seed=SECOND_SEED, shifted=True)
        self.tests = {
            "second": load_pairs(write_world(second / "test", num_test, seed=SECOND_TEST_SEED, shifted=True)),
            "first": load_pairs(write_world(first / "test", num_test, seed=FIRST_TEST_SEED, shifted=False)),
        }
        self.model = self.folder / "first_model" / "model-checkpoint" / "best_model.pth"
        results = self.folder / "first_model" / "results" / "training_results.json"
        if not results.exists() or json.loads(results.read_text())["finished_at"] is None:
            _train(
                f"--model_name ViT-Ti/32 --pretrained none --batch_size 128 --learning_rate 1e-3 --weight_decay 0.1 "
                f"--cache_images --num_epochs {settings.first_epochs} --resume",
                data_dir=first / "train", output_dir=self.folder / "first_model", val_data=first / "test",
            )  # fmt: skip
        self.before = self.judge(self.model)

    def index_of(self, size: int, seed: int) -> Path:
        """Write which images of the second world a run learns, the same for each method; returns the index."""
        path = self.second / f"{size}-{seed}.json"
        records = json.loads((self.second / "data.json").read_text())
        chosen = np.random.default_rng(seed).permutation(self.num_second)[:size]
        files.write_json(path, [records[index] for index in sorted(chosen.tolist())])
        return path

    def judge(self, checkpoint: Path) -> dict[str, Evaluation]:
        """Evaluate a model on both worlds' tests."""
        model = CLIPModel.from_checkpoint(checkpoint)
        encoder = Encoder(
            model,
            ImageTextDataset,
            precision=resolve_precision("fp32", model.device),
            batch_size=100,
            image_cache_dir=self.folder / "cache",
        )
        return {world: evaluate(encoder, pairs) for world, pairs in self.tests.items()}


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table."""
    return run_stage(lambda: _run(argv), name="fine_tuning.py")


def _run(argv: list[str] | None) -> int:
    settings, _ = parse_settings(BenchmarkSettings, argv, description=str(__doc__))
    methods, sizes = settings.methods.split(","), [int(size) for size in settings.sizes.split(",")]
    if unknown := set(methods) - METHODS.keys():
        raise ValueError(f"no such method: {unknown.pop()}; there are: {', '.join(METHODS)}")
    worlds = Worlds(settings)
    rows = []
    for size in sizes:
        for method in methods:
            rows += [_row(worlds, size=size, method=method, seed=seed) for seed in range(settings.seeds)]
            print(_summary(rows[-settings.seeds :])[0], flush=True)
    start = {world: before.metrics["rsum"] for world, before in worlds.before.items()}
    print(f"\nmodel as loaded: RSum {start['second']:.1f} in the second world, {start['first']:.1f} in the first")
    head = ["images", "method", "gain", "interval", "by seed", "forgotten", "best epoch", "seconds"]
    groups = [rows[at : at + settings.seeds] for at in range(0, len(rows), settings.seeds)]
    print_table("RSum of 1,000 other images, mean of the seeds", [head, *(_summary(group)[1] for group in groups)])
    write_json(settings.json_path, {"machine": machine(), "model_as_loaded": start, "rows": rows})
    return 0


def _row(worlds: Worlds, *, size: int, method: str, seed: int) -> dict[str, Any]:
    """Return one run's row, from the disk if it has been measured."""
    name = f"{size}-{method.replace(' ', '_')}-{seed}"
    path = worlds.folder / "rows" / f"{name}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    epochs = EPOCHS[min(EPOCHS, key=lambda known: abs(known - size))]
    run = worlds.folder / "runs" / name
    start, length = time.perf_counter(), "" if "--recipe" in METHODS[method] else f"--num_epochs {epochs}"
    watched = {"watch_data": worlds.folder / "first" / "test"} if "--interpolate" in METHODS[method] else {}
    _train(
        f"--early_stopping_patience 0 --seed {seed} {length} {METHODS[method]}",
        data_dir=worlds.index_of(size, seed), output_dir=run, pretrained=worlds.model, **watched,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    results = json.loads((run / "results" / "training_results.json").read_text())
    models = run / "model-checkpoint"
    interpolated = models / "interpolated_model.pth"
    after = worlds.judge(interpolated if interpolated.exists() else models / "best_model.pth")
    row: dict[str, Any] = {"size": size, "method": method, "seed": seed, "seconds": seconds}
    row["best_epoch"] = results["best_epoch"]
    for world, pairs in worlds.tests.items():
        verdict = compare(worlds.before[world].ranks, after[world].ranks, _groups(pairs))
        row[world] = {"gain": verdict.gain, "low": verdict.low, "high": verdict.high, "verdict": verdict.verdict}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, row)
    shutil.rmtree(run)
    return row


def _groups(pairs: Pairs) -> dict[str, Any]:
    images = np.arange(len(pairs))
    return {"i2t": images, "t2i": images[pairs.text_to_image]}


def _summary(rows: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """Join the seeds of a method: a line to read while it goes on, and a row of the table."""

    def mean(value: Callable[[dict[str, Any]], float]) -> float:
        return fmean(map(value, rows))

    gains = [row["second"]["gain"] for row in rows]
    half_width = mean(lambda row: (row["second"]["high"] - row["second"]["low"]) / 2)
    cells = [
        f"{rows[0]['size']:,}",
        rows[0]["method"],
        f"{fmean(gains):+.1f}",
        f"± {half_width:.1f}",
        " ".join(f"{gain:+.0f}" for gain in gains),
        f"{mean(lambda row: -row['first']['gain']):.1f}",
        f"{mean(lambda row: row['best_epoch']):.0f}",
        f"{mean(lambda row: row['seconds']):.0f}",
    ]
    return "  ".join(cells), cells


def _train(flags: str, *, data_dir: Path, output_dir: Path, **paths: Path) -> None:
    """Run `train.py` in this process, without its figures on the screen.

    Raises:
        RuntimeError: it failed.
    """
    argv = ["--data_dir", str(data_dir), "--output_dir", str(output_dir), "--log_level", "warning", *flags.split()]
    for name, path in paths.items():
        argv += [f"--{name}", str(path)]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train(argv)
    if code:
        raise RuntimeError(f"train.py {' '.join(argv)}: exit code {code}")


if __name__ == "__main__":
    sys.exit(main())
