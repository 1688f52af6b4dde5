"""python -m benchmarks.frozen_training --quick

Time an epoch of training with a frozen backbone: recomputing the towers every epoch, the first epoch that keeps their
outputs, the epochs after it, and the first epoch of a later run. Each round measures all of them, on the same drawn
pictures, with the same random weights; the losses of all of them are compared too.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field

import config
from clip_model import CLIPModel, ContrastiveLoss, MultimodalTrainer, build_optimizer, build_scheduler
from config import PositiveInt, Settings, parse_settings, run_stage
from data_loader import ImageTextDataset, Pairs, TrainLoader, load_pairs
from feature_cache import FeatureCache, FeatureLoader
from preprocessing import clip_transform
from runtime import Precision, default_num_workers, resolve_device, resolve_precision
from sample_data import create_sample_dataset

ROWS = ("plain epoch", "first epoch, kept", "later epoch, kept", "first epoch of a later run")


class BenchmarkSettings(Settings):
    """Settings of the benchmark."""

    model_name: str = Field("ViT-B/32", description="backbone, with random weights")
    num_images: PositiveInt = Field(1000, description="drawn pictures, two captions each")
    batch_size: PositiveInt = Field(32, description="pairs a step")
    num_later: PositiveInt = Field(5, description="later epochs a round")
    rounds: PositiveInt = Field(3, description="how often everything is measured")
    precision: config.Precision = Field("auto", description="auto, fp32, bf16, fp16")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    quick: bool = Field(False, description="a small model, 200 pictures, 2 rounds")
    json_path: str | None = Field(None, description="write the figures there", json_schema_extra={"flag": "json"})


class Epoch(NamedTuple):
    """One measured epoch."""

    seconds: float
    loss: float


class Bench:
    """The parts that all measured epochs share."""

    def __init__(self, settings: BenchmarkSettings, pairs: Pairs, *, device: torch.device) -> None:
        self.settings = settings
        self.pairs = pairs
        self.precision: Precision = resolve_precision(settings.precision, device)
        torch.manual_seed(0)
        self.model = CLIPModel(settings.model_name, freeze_backbone=True, pretrained="none").to(device)
        self.start = {name: value.clone() for name, value in self.model.state_dict().items() if "projection" in name}

    def trainer(self) -> MultimodalTrainer:
        """Return a trainer at the start of a run."""
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if name in self.start:
                    value.copy_(self.start[name])
            self.model.logit_scale.fill_(2.6593)
        optimizer = build_optimizer(self.model, learning_rate=1e-4, backbone_lr_scale=0.01, weight_decay=0.01)
        scheduler = build_scheduler(optimizer, total_steps=10_000, warmup_share=0.1)
        return MultimodalTrainer(self.model, ContrastiveLoss(), optimizer, scheduler, precision=self.precision)

    def plain_loader(self) -> TrainLoader:
        """Return the loader of a run that keeps nothing."""
        dataset = ImageTextDataset(self.pairs, transform=clip_transform(self.model.image_resolution))
        device = self.model.device
        workers = default_num_workers(device)
        return TrainLoader(dataset, batch_size=self.settings.batch_size, num_workers=workers, device=device)

    def kept_loader(self, folder: Path) -> FeatureLoader:
        """Return the loader of a run that keeps what the towers give in `folder`; hashes the weights."""
        workers, size = default_num_workers(self.model.device), max(self.settings.batch_size, 64)
        cache = FeatureCache(self.model, folder, precision=self.precision, batch_size=size, num_workers=workers)
        return FeatureLoader(self.plain_loader(), cache, augment="none", num_epochs=1 + self.settings.num_later)

    def timed(self, trainer: MultimodalTrainer, batches: Callable[[], Iterable[Any]]) -> Epoch:
        """Train one epoch; what makes the batches is timed as well."""
        self._wait()
        start = time.perf_counter()
        result = trainer.train_epoch(batches())
        self._wait()
        return Epoch(time.perf_counter() - start, result.loss)

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def measure(self, folder: Path) -> dict[str, list[Epoch]]:
        """Measure one round; `folder` is empty."""
        trainer = self.trainer()
        plain_loader = self.plain_loader()
        plain = [self.timed(trainer, lambda: plain_loader.epoch(1))]
        trainer, loader = self.trainer(), self.kept_loader(folder)
        first = [self.timed(trainer, lambda: loader.epoch(1))]
        epochs = range(2, 2 + self.settings.num_later)
        later = [self.timed(trainer, lambda e=epoch: loader.epoch(e)) for epoch in epochs]  # type: ignore[misc]
        trainer = self.trainer()
        again = [self.timed(trainer, lambda: self.kept_loader(folder).epoch(1))]
        return dict(zip(ROWS, (plain, first, later, again), strict=True))


def summarise(measured: dict[str, list[Epoch]]) -> list[dict[str, Any]]:
    """Return for each row its median, smallest and largest time in seconds, and how many fit into a first epoch."""
    reference = statistics.median(epoch.seconds for epoch in measured[ROWS[1]])
    rows = []
    for name, epochs in measured.items():
        seconds = [epoch.seconds for epoch in epochs]
        median = statistics.median(seconds)
        spread = {"min_s": min(seconds), "max_s": max(seconds)}
        rows.append({"name": name, "median_s": median, **spread, "ratio": reference / median})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out for reading."""
    lines = [f"{'':28}{'median s':>10}{'min':>10}{'max':>10}{'first / this':>14}"]
    for row in rows:
        times = "".join(f"{row[key]:10.3f}" for key in ("median_s", "min_s", "max_s"))
        lines.append(f"{row['name']:28}{times}{row['ratio']:14.1f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table; returns the exit code."""
    return run_stage(lambda: _benchmark(argv), name="benchmarks.frozen_training")


def _benchmark(argv: list[str] | None) -> int:
    settings, given = parse_settings(BenchmarkSettings, argv, description=str(__doc__).splitlines()[2])
    if settings.quick:
        small = {"model_name": "ViT-Ti/32", "num_images": 200, "rounds": 2}
        settings = settings.model_copy(update={key: value for key, value in small.items() if key not in given})
    device = resolve_device(settings.device)
    measured: dict[str, list[Epoch]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as name:
        create_sample_dataset(Path(name) / "data", settings.num_images)
        bench = Bench(settings, load_pairs(Path(name) / "data"), device=device)
        for number in range(settings.rounds):
            for row, epochs in bench.measure(Path(name) / f"kept-{number}").items():
                measured[row] += epochs
    rows = summarise(measured)
    plain, kept, _, again = (epochs[0].loss for epochs in measured.values())
    facts = {
        "model": settings.model_name,
        "num_images": settings.num_images,
        "batch_size": settings.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": bench.precision.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "loss_difference": max(abs(kept - plain), abs(again - plain)) / plain,
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(table(rows))
    if settings.json_path is not None:
        Path(settings.json_path).write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
