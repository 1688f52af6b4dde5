"""Captions swapped on purpose, a model trained on them, and how well its features tell which ones were.

python benchmarks/label_noise.py --work_dir label_noise
python benchmarks/label_noise.py --work_dir label_noise_own --data_dir DATA

Swapped are captions of the training and of the validation images. AUROC 1 is a ranking with every swapped pair before
every other one; "listed" are those that stand in a report.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.drawn_worlds import write_world
from benchmarks.timing import machine, print_table, write_json
from clip_model import CLIPModel
from cliptune.cli import parse_settings, run_stage
from cliptune.data.pairs import Pairs, load_pairs
from cliptune.features.encode import Encoder, encode_pairs
from cliptune.features.label_noise import mislabelled
from cliptune.runtime import files
from cliptune.runtime.device import resolve_precision
from cliptune.settings import PositiveInt, Settings
from data_loader import ImageTextDataset
from train import main as train


class BenchmarkSettings(Settings):
    """Settings of the benchmark."""

    work_dir: str = Field("label_noise", description="folder for the data, the swapped captions and the models")
    data_dir: str | None = Field(None, description="data set, whose images are taken in its order; none: drawn scenes")
    num_images: PositiveInt = Field(4000, description="images that are trained on")
    val_images: PositiveInt = Field(1000, description="images beside them that are validated on")
    rates: str = Field("1,5,10", description="percent of the captions that are swapped, with commas")
    epochs: PositiveInt = Field(4, description="passes over the images")
    seed: int = Field(0, description="of which captions are swapped")
    json_path: str | None = Field(None, description="write the figures there", json_schema_extra={"flag": "json"})


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table."""
    return run_stage(lambda: _run(argv), name="label_noise.py")


def _run(argv: list[str] | None) -> int:
    settings, _ = parse_settings(BenchmarkSettings, argv, description=str(__doc__))
    folder, number = Path(settings.work_dir), settings.num_images + settings.val_images
    data_dir = settings.data_dir or write_world(folder / "scenes", number, seed=11, shifted=False)
    pairs = load_pairs(data_dir)
    pairs = pairs.select(np.arange(min(number, len(pairs))))
    rows = [row for rate in settings.rates.split(",") for row in _rows(pairs, float(rate), folder, settings)]
    head = ["swapped", "split", "pairs", "wrong", "AUROC", "listed", "of them wrong", "expected of clean data"]
    print_table("mislabelled pairs", [head, *([str(value) for value in row.values()] for row in rows)])
    write_json(settings.json_path, {"machine": machine(), "rows": rows})
    return 0


def _rows(pairs: Pairs, rate: float, folder: Path, settings: BenchmarkSettings) -> list[dict[str, Any]]:
    """Train on a swapped set, and rank its pairs."""
    place = folder / f"{rate:g}"
    order = np.random.default_rng(settings.seed).permutation(len(pairs))
    parts = {"val": order[: settings.val_images], "train": order[settings.val_images :]}
    wrong = {
        split: write_swapped(pairs.select(np.sort(rows)), place / f"{split}.json", rate / 100, seed=settings.seed)
        for split, rows in parts.items()
    }
    output = place / "run"
    if not (output / "results" / "training_results.json").exists():
        _train(place, output, settings.epochs)
    model = CLIPModel.from_checkpoint(output / "model-checkpoint" / "best_model.pth")
    encoder = Encoder(model, ImageTextDataset, precision=resolve_precision("auto", model.device), batch_size=100)
    return [
        {
            "swapped": f"{rate:g}%",
            "split": split,
            **_measured(encoder, load_pairs(place / f"{split}.json"), wrong[split]),
        }
        for split in parts
    ]


def write_swapped(pairs: Pairs, path: Path, fraction: float, *, seed: int) -> set[tuple[str, str]]:
    """Write an index in which a fraction of the captions, at least two, have changed places.

    Returns:
        Image and caption of each pair that is wrong.
    """
    captions, owners = list(pairs.captions), pairs.text_to_image.tolist()
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(captions))[: max(round(fraction * len(captions)), 2)].tolist()
    moved = [captions[row] for row in [*rows[1:], rows[0]]]
    wrong = set()
    for row, caption in zip(rows, moved, strict=True):
        # what is said of the image by another one's caption is not wrong
        if caption not in pairs.captions_of(owners[row]):
            captions[row] = caption
            wrong.add((pairs.paths[owners[row]], caption))
    starts = pairs.starts.tolist()
    records = [
        {"image_path": image, "caption": captions[start:end]}
        for image, start, end in zip(pairs.paths, starts[:-1], starts[1:], strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, records)
    return wrong


def _train(place: Path, output: Path, epochs: int) -> None:
    argv = ["--data_dir", str(place / "train.json"), "--val_data", str(place / "val.json"), "--output_dir", str(output)]
    argv += ["--model_name", "ViT-Ti/32", "--pretrained", "none", "--batch_size", "128", "--learning_rate", "1e-3"]
    argv += ["--weight_decay", "0.1", "--cache_images", "--num_epochs", str(epochs), "--log_level", "warning"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train(argv)
    if code:
        raise RuntimeError(f"train.py {' '.join(argv)}: exit code {code}")


def _measured(encoder: Encoder, pairs: Pairs, wrong: set[tuple[str, str]]) -> dict[str, Any]:
    encoded = encode_pairs(encoder, pairs)
    features = encoded.image_features.float().cpu().numpy(), encoded.text_features.float().cpu().numpy()
    noise = mislabelled(*features, encoded.text_to_image.numpy())
    owners = encoded.image_indices[encoded.text_to_image].tolist()
    captions = pairs.captions.take(encoded.text_indices.numpy())
    is_wrong = np.array([(pairs.paths[o], text) in wrong for o, text in zip(owners, captions, strict=True)])
    return {
        "pairs": len(is_wrong),
        "wrong": int(is_wrong.sum()),
        "auroc": round(auroc(noise.scores, is_wrong), 4),
        "listed": len(noise.listed),
        "right": int(is_wrong[noise.listed].sum()),
        "expected": round(noise.expected, 1),
    }


def auroc(scores: np.ndarray[Any, Any], is_positive: np.ndarray[Any, Any]) -> float:
    """Return the probability that a positive scores higher than a negative, ties half (Mann and Whitney's U)."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num = int(is_positive.sum())
    return float((ranks[is_positive].sum() - num * (num + 1) / 2) / (num * (len(scores) - num)))


if __name__ == "__main__":
    sys.exit(main())
