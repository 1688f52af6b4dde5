"""Whether the folds' gain is the true one, and how much the best epoch of a single split flatters.

python benchmarks/folds.py

Small sets are drawn with a model as loaded and 20 epochs for each training, whose true qualities are known: a course
that all share, and a luck of each training. Queries are drawn as `verdict_coverage.py` draws them, and the true RSum of
a quality is that of very many. Beside the folds, judged as `train.py --folds` judges them, stands a single split with a
tenth of the images, told by its best epoch as it stands in the curve. Both estimates are held against what the models
that are judged really gain. The last columns are what the length that is chosen gains in truth.

With --real 10, sets of drawn scenes are trained on by `train.py`, with folds and with a single split. The truth is what
the model that is left gains on fresh scenes, in galleries of as many images as the estimate had.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.verdict_coverage import World, rsum
from clip_model import CLIPModel
from cliptune.cli import parse_settings, run_stage
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.data.sample_data import create_sample_dataset
from cliptune.features.encode import Encoder
from cliptune.features.verdict import DIRECTIONS
from cliptune.folds_verdict import Fold, judge_folds
from cliptune.results import EpochRecord, Metrics, TrainingResults
from cliptune.runtime.device import resolve_precision
from cliptune.runtime.files import read_json_object
from cliptune.settings import NonNegativeInt, PositiveInt, Seed, Settings
from cliptune.training.checkpoint import RunFiles
from data_loader import ImageTextDataset
from evaluation import evaluate
from train import main as train

FloatArray = NDArray[np.float64]
NUM_EPOCHS = 20
EPOCHS = np.arange(NUM_EPOCHS + 1)
LOADED = -1.0
"""Quality of the model as loaded: RSum of about 375."""
COURSES = {
    "none better": 0.0 * EPOCHS,
    "rises, then falls": 0.5 * (1 - np.exp(-EPOCHS / 3)) - 0.002 * EPOCHS**2,
    "falls": -0.02 * EPOCHS,
}
QUALITIES = np.linspace(-3.0, 1.0, 161)


class BenchmarkSettings(Settings):
    """Settings of the benchmark."""

    repeats: PositiveInt = Field(400, description="sets that are drawn for each row")
    many: PositiveInt = Field(20_000, description="images whose RSum is taken for the true one")
    folds: int = Field(5, ge=2, le=20, description="folds of a set")
    luck: float = Field(0.05, ge=0, allow_inf_nan=False, description="standard deviation of a training's quality")
    real: NonNegativeInt = Field(0, description="sets of drawn scenes that are really trained on; 0: the tables alone")
    images: PositiveInt = Field(60, description="images of such a set")
    epochs: PositiveInt = Field(6, description="epochs of such a training")
    seed: Seed = 0


class Truth:
    """The RSum that a quality really has."""

    def __init__(self, many: int) -> None:
        ranks, _ = World(tuple(QUALITIES)).draw(np.random.default_rng(1), many)
        values = np.array([rsum(each) for each in ranks])
        # a fourth of a point of noise in each is smoothed away
        self._curve = np.polynomial.Polynomial.fit(QUALITIES, values, 7)

    def gain(self, qualities: FloatArray, epoch: int) -> float:
        """Return what an epoch gains over the model as loaded."""
        return float(self._curve(qualities[epoch]) - self._curve(qualities[0]))


def training(course: FloatArray, *, luck: float, rng: np.random.Generator) -> FloatArray:
    """Return the qualities of a training, the model as loaded first; epochs that follow each other are alike."""
    own, noise = np.zeros(len(course)), 0.0
    for epoch in range(1, len(course)):
        noise = 0.8 * noise + 0.6 * rng.normal()
        own[epoch] = luck * noise
    return LOADED + course + own


def with_curve(curve: Sequence[float], num_images: int) -> TrainingResults:
    """Return a run's results that hold a curve, and nothing else."""
    records: list[dict[str, Any]] = [{"rsum": value} for value in curve]
    values: dict[str, Any] = {
        "baseline": Metrics.model_construct(**records[0]),
        "history": [EpochRecord.model_construct(**record) for record in records],
        "num_images": num_images,
    }
    return TrainingResults.model_construct(**values)


def fold_of(qualities: FloatArray, num_images: int, rng: np.random.Generator) -> Fold:
    """Draw the images that a training is evaluated on, as `Fold.read` would have read it."""
    drawn, groups = World(tuple(qualities)).draw(rng, num_images)
    found = with_curve([rsum(ranks) for ranks in drawn], num_images)
    ranks: dict[str, Any] = {name: np.stack([each[name] for each in drawn]) for name in DIRECTIONS}
    return Fold(found, {**ranks, "groups": groups["i2t"], "text_to_image": groups["t2i"]})


def draw_row(settings: BenchmarkSettings, course: FloatArray, num_images: int, truth: Truth) -> list[FloatArray]:
    """Return for each set: the errors of the folds and of a single split, if the interval holds, both true gains."""
    rng, rows = np.random.default_rng(settings.seed), []
    sizes = np.full(settings.folds, num_images // settings.folds)
    sizes[: num_images % settings.folds] += 1
    for _ in range(settings.repeats):
        trained = [training(course, luck=settings.luck, rng=rng) for _ in sizes]
        found = judge_folds([fold_of(each, int(size), rng) for each, size in zip(trained, sizes, strict=True)])
        assert found.verdict is not None
        gains = [truth.gain(each, epoch) for each, epoch in zip(trained, found.epochs, strict=True)]
        true = float(np.average(gains, weights=sizes))
        alone = training(course, luck=settings.luck, rng=rng)
        curve = [record.rsum for record in fold_of(alone, round(num_images / 10), rng).results.history]
        best = 1 + int(np.argmax(curve[1:]))
        kept = best if curve[best] > curve[0] else 0
        last = training(course, luck=settings.luck, rng=rng)  # on everything
        rows.append([
            found.verdict.gain - true, curve[best] - curve[0] - truth.gain(alone, best),
            found.verdict.low <= true <= found.verdict.high, found.verdict.verdict == "better",
            truth.gain(last, found.length), truth.gain(alone, kept),
        ])  # fmt: skip
    return list(np.array(rows).T)


def true_gain(output: Path, fresh: Pairs, gallery: int) -> float:
    """Return what a run's best model gains on fresh images, the mean over galleries of a size."""
    files, rsums = RunFiles(output), []
    for path in (files.loaded, files.best):
        model = CLIPModel.from_checkpoint(path)
        encoder = Encoder(
            model, ImageTextDataset, precision=resolve_precision("fp32", model.device), batch_size=64, num_workers=0
        )
        starts = range(0, len(fresh) - gallery + 1, gallery)
        found = [evaluate(encoder, fresh.select(range(start, start + gallery))).metrics["rsum"] for start in starts]
        rsums.append(np.mean(found))
    return float(rsums[1] - rsums[0])


def print_real(settings: BenchmarkSettings) -> None:
    """Train on drawn scenes, and compare what is told with what the best models gain on fresh ones."""
    rows: dict[str, list[float]] = {f"{settings.folds} folds": [], "best epoch of one split": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        create_sample_dataset(folder / "fresh", 20 * settings.images // settings.folds, seed=settings.seed + 1000)
        fresh = load_pairs(DataSource(folder / "fresh"))
        for index in range(settings.real):
            create_sample_dataset(folder / f"data{index}", settings.images, seed=settings.seed + index)
            for name, is_split in zip(rows, (False, True), strict=True):
                rows[name].append(real_error(settings, folder, index, fresh, is_split=is_split))
    print(f"\n| {settings.real} trainings on {settings.images} drawn scenes | estimate - truth | spread |")
    print("|---|---|---|")
    for name, errors in rows.items():
        print(f"| {name} | {_mean(np.array(errors))} | {np.std(errors):.1f} |", flush=True)


def real_error(settings: BenchmarkSettings, folder: Path, index: int, fresh: Pairs, *, is_split: bool) -> float:
    """Train on a set, with folds or with a single split; return what it tells without what its best model gains."""
    output = folder / f"run{index}-{is_split}"
    flags = [
        "--data_dir", str(folder / f"data{index}"), "--model_name", "ViT-Ti/32", "--num_epochs", str(settings.epochs),
        "--batch_size", "20", "--learning_rate", "1e-3", "--num_workers", "0", "--precision", "fp32",
        "--log_level", "error", "--seed", str(index), "--early_stopping_patience", "0", "--output_dir", str(output),
    ]  # fmt: skip
    with redirect_stdout(io.StringIO()):
        if train(flags if is_split else [*flags, "--folds", str(settings.folds)]):
            raise ValueError(f"the training on {folder}/data{index} failed")
    found = read_json_object(RunFiles(output).results)
    told = found["metrics"]["rsum"] - found["baseline"]["rsum"]
    gallery = found["num_images"]
    if not is_split:
        gallery //= settings.folds
        # where the model as loaded is kept, it gains nothing, and nothing is told of it
        told = read_json_object(RunFiles(output).folds)["verdict"]["rsum"][0] if found["best_epoch"] else 0.0
    error = told - true_gain(output, fresh, gallery)
    shutil.rmtree(output)  # its models take hundreds of megabytes
    return float(error)


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""

    def run() -> int:
        settings, _ = parse_settings(BenchmarkSettings, argv, description=str(__doc__))
        truth = Truth(settings.many)
        folds, single = f"{settings.folds} folds", "best epoch of one split"
        print(
            f"| images | course | {folds}: estimate - truth | spread | holds | better | {single}: estimate - truth | "
            f"spread | kept, truly: {folds} | one split |"
        )
        print("|---" * 10 + "|")
        for num_images in (60, 200, 600):
            for name, course in COURSES.items():
                errors, alone, held, better, *kept = draw_row(settings, course, num_images, truth)
                cells = [
                    _mean(errors), f"{errors.std():.1f}", f"{held.mean():.1%}", f"{better.mean():.1%}", _mean(alone),
                    f"{alone.std():.1f}", *(_mean(each) for each in kept),
                ]  # fmt: skip
                print(f"| {num_images} | {name} | {' | '.join(cells)} |", flush=True)
        if settings.real:
            print_real(settings)
        return 0

    return run_stage(run, name="folds.py")


def _mean(values: FloatArray) -> str:
    """Show a mean with its standard error."""
    return f"{values.mean():+.1f} ± {values.std() / np.sqrt(len(values)):.1f}"


if __name__ == "__main__":
    sys.exit(main())
