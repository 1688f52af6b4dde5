"""An epoch of training with a frozen backbone: towers run anew every epoch, or once.

python benchmarks/frozen_training.py --json frozen.json

Each round measures an epoch that recomputes the towers, the first epoch that caches their outputs, the epochs after it,
and the first epoch of a later run, on the same drawn images with the same random weights, and compares their losses.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Timing, machine, print_table, write_json
from clip_model import CLIPModel, MultimodalTrainer
from cliptune import settings as config
from cliptune.cli import parse_settings, run_stage
from cliptune.data.loaders import TrainLoader
from cliptune.data.pairs import Pairs, load_pairs
from cliptune.data.sample_data import create_sample_dataset
from cliptune.features.cache import FeatureCache, FeatureLoader
from cliptune.features.encode import Encoder
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.device import Precision, default_num_workers, resolve_device, resolve_precision
from cliptune.settings import PositiveInt, Settings
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.optim import build_optimizer, build_scheduler
from data_loader import ImageTextDataset

ROWS = ("plain epoch", "first epoch, cached", "later epoch, cached", "first epoch of a later run")


class BenchmarkSettings(Settings):
    """Settings of the benchmark."""

    model_name: str = Field("ViT-B/32", description="backbone, with random weights")
    num_images: PositiveInt = Field(1000, description="drawn images, two captions each")
    batch_size: PositiveInt = Field(32, description="pairs a step")
    num_later: PositiveInt = Field(5, description="later epochs a round")
    rounds: PositiveInt = Field(3, description="how often everything is measured")
    precision: config.Precision = Field("auto", description="auto, fp32, bf16, fp16")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    quick: bool = Field(False, description="a small model, 200 images, 2 rounds")
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
        scheduler = build_scheduler(optimizer, total_steps=10_000, warmup_fraction=0.1)
        return MultimodalTrainer(self.model, ContrastiveLoss(), optimizer, scheduler, precision=self.precision)

    def plain_loader(self) -> TrainLoader:
        """Return the loader of a run that caches nothing."""
        dataset = ImageTextDataset(self.pairs, transform=clip_transform(self.model.image_resolution))
        device = self.model.device
        workers = default_num_workers(device)
        return TrainLoader(dataset, batch_size=self.settings.batch_size, num_workers=workers, device=device)

    def cached_loader(self, folder: Path) -> FeatureLoader:
        """Return the loader of a run that caches the tower outputs in `folder`; hashes the weights."""
        workers, size = default_num_workers(self.model.device), max(self.settings.batch_size, 64)
        encoder = Encoder(self.model, ImageTextDataset, precision=self.precision, batch_size=size, num_workers=workers)
        cache = FeatureCache(encoder, folder)
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
        trainer, loader = self.trainer(), self.cached_loader(folder)
        first = [self.timed(trainer, lambda: loader.epoch(1))]
        epochs = range(2, 2 + self.settings.num_later)
        later = [self.timed(trainer, lambda e=epoch: loader.epoch(e)) for epoch in epochs]  # type: ignore[misc]
        trainer = self.trainer()
        again = [self.timed(trainer, lambda: self.cached_loader(folder).epoch(1))]
        return dict(zip(ROWS, (plain, first, later, again), strict=True))


def report(measured: dict[str, list[Epoch]], title: str) -> dict[str, float]:
    """Print a table; return for each row how many of it fit into the first epoch that caches, by the medians."""
    timings = {name: Timing([epoch.seconds for epoch in epochs]) for name, epochs in measured.items()}
    first = timings[ROWS[1]].median
    ratios = {name: first / timing.median for name, timing in timings.items()}
    rows = [["", "median s", "spread", "first / this"]]
    for name, timing in timings.items():
        rows.append([name, f"{timing.median:.3f}", f"{100 * timing.spread:.0f}%", f"{ratios[name]:.1f}"])
    print_table(title, rows)
    return ratios


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table; returns the exit code."""
    return run_stage(lambda: _benchmark(argv), name="frozen_training.py")


def _benchmark(argv: list[str] | None) -> int:
    settings, given = parse_settings(BenchmarkSettings, argv, description=str(__doc__))
    if settings.quick:
        small = {"model_name": "ViT-Ti/32", "num_images": 200, "rounds": 2}
        settings = settings.model_copy(update={key: value for key, value in small.items() if key not in given})
    device = resolve_device(settings.device)
    measured: dict[str, list[Epoch]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as name:
        create_sample_dataset(Path(name) / "data", settings.num_images)
        bench = Bench(settings, load_pairs(Path(name) / "data"), device=device)
        for index in range(settings.rounds):
            for row, epochs in bench.measure(Path(name) / f"cached-{index}").items():
                measured[row] += epochs
    plain, cached, _, again = (epochs[0].loss for epochs in measured.values())
    difference = max(abs(cached - plain), abs(again - plain)) / plain
    title = (
        f"{settings.model_name}, {settings.num_images} images, batch {settings.batch_size}, {bench.precision.name}, "
        f"losses differ by {difference:.1e}, {machine(device.type)}"
    )
    ratios = report(measured, title)
    results = {
        "machine": machine(device.type),
        "settings": settings.model_dump(),
        "precision": bench.precision.name,
        "loss_difference": difference,
        "seconds": {name: [epoch.seconds for epoch in epochs] for name, epochs in measured.items()},
        "ratios": ratios,
    }
    write_json(settings.json_path, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
