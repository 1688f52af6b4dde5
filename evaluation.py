"""Features to similarities to ranks to metrics. As a stage it evaluates a checkpoint:

python evaluation.py --checkpoint model-checkpoint/best_model.pth

Started by `torchrun`, several processes encode and rank a part each.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cliptune.cli import check_command_line, parse_settings, run_stage
from cliptune.settings import DataSettings, EvaluationSettings

if __name__ == "__main__":
    check_command_line(EvaluationSettings, str(__doc__))

import torch

from clip_model import CLIPModel
from cliptune.data.issues import Issue
from cliptune.data.pairs import Pairs, load_pairs
from cliptune.data.splits import evaluation_pairs
from cliptune.features.cache import PairFeatures
from cliptune.features.encode import encode_pairs, log_problem
from cliptune.features.metrics import RECALLS, chance_level, compute_retrieval_metrics
from cliptune.features.ranks import validation_loss
from cliptune.features.similarity import similarity_histograms
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.runtime.device import Precision, resolve_precision
from cliptune.runtime.distributed import is_main, process_group, rank_device
from cliptune.runtime.logs import setup_logging

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Evaluate a checkpoint, print a table and write `results/evaluation_results.json`; returns the exit code."""
    return run_stage(lambda: _evaluate_checkpoint(argv), name="evaluation.py")


def _evaluate_checkpoint(argv: list[str] | None) -> int:
    settings, _ = parse_settings(EvaluationSettings, argv, description=str(__doc__))

    setup_logging(settings.log_level)
    device = rank_device(settings.device)
    content = load_checkpoint(settings.checkpoint)
    precision = resolve_precision(settings.precision or content["config"]["training"]["precision"], device)
    run_data = DataSettings.model_validate(content["config"]["data"])
    max_skipped_fraction = (
        run_data.allowed_skipped_fraction if settings.max_skipped_fraction is None else settings.max_skipped_fraction
    )
    if settings.data_dir is None:
        if settings.split not in {None, "val"}:
            raise ValueError(f"--split {settings.split} needs --data_dir; without it the validation images are taken")
        data, split = run_data.val_data or run_data.data_dir, "val"
        pairs = _own_validation_pairs(content, image_dir=settings.image_dir, max_skipped_fraction=max_skipped_fraction)
    else:
        data, split = settings.data_dir, settings.split or "default"
        pairs = evaluation_pairs(
            settings.data_dir,
            split=settings.split,
            image_dir=settings.image_dir,
            caption_key=settings.caption_key,
            max_skipped_fraction=max_skipped_fraction,
        )
    with process_group(device):
        model = CLIPModel.from_checkpoint(settings.checkpoint, device=device)
        outcome = evaluate(
            model, pairs, batch_size=settings.encode_batch_size, num_workers=settings.num_workers, precision=precision
        )
        if is_main():
            _report(settings, outcome, data=data, split=split)
    return 0


def _report(settings: EvaluationSettings, outcome: Evaluation, *, data: str, split: str) -> None:
    print(metrics_table(outcome))
    results = {"checkpoint": settings.checkpoint, "data": data, "split": split, **outcome.to_dict()}
    path = Path(settings.output_dir) / "results" / "evaluation_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


class Evaluation(NamedTuple):
    """What an evaluation gave."""

    metrics: dict[str, float]
    chance: dict[str, float]
    histograms: dict[str, list[Any]]
    num_images: int
    num_texts: int
    throughput: dict[str, float]
    """`images_per_second` (reading and preprocessing included) and `texts_per_second` (tokenising included)."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as the results file stores them."""
        return self._asdict()


def evaluate(  # noqa: PLR0913  (what training and the stage choose differently)
    model: CLIPModel,
    pairs: Pairs,
    *,
    batch_size: int,
    num_workers: int | None,
    precision: Precision,
    loss_batch_size: int | None = None,
    cache_dir: Path | None = None,
    kept: PairFeatures | None = None,
    on_unreadable_image: Callable[[Issue], None] = log_problem,
) -> Evaluation:
    """Encode a data set and rank it against itself, over the full gallery.

    Args:
        model: a `CLIPModel`; comes back in the mode it came in.
        pairs: images with all their captions.
        batch_size: images or texts encoded at once.
        num_workers: loading processes; None: chosen for the machine.
        precision: of the forward passes.
        loss_batch_size: also give `val_loss`, the contrastive loss in batches of this size.
        cache_dir: keep the decoded pictures in this folder; the features are the same.
        kept: what the model's frozen towers give for `pairs`, which is then only projected.
        on_unreadable_image: called with each picture that cannot be read, in the process that met it.

    Raises:
        ValueError: features that are not finite, or no picture could be read.
    """
    encoded = encode_pairs(
        model,
        pairs,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
        cache_dir=cache_dir,
        kept=kept,
        on_unreadable_image=on_unreadable_image,
    )
    images, texts, owners = encoded[:3]
    device = model.device if model.device.type == "cuda" else torch.device("cpu")  # ranks need float64
    metrics = compute_retrieval_metrics(images, texts, owners, device=device)
    if loss_batch_size is not None:
        scale = model.logit_scale.detach().exp().item()
        metrics["val_loss"] = validation_loss(images, texts, owners, scale=scale, batch_size=loss_batch_size)
    histograms = similarity_histograms(images, texts, owners)
    throughput = {"images_per_second": encoded.images_per_second, "texts_per_second": encoded.texts_per_second}
    return Evaluation(metrics, chance_level(len(images), owners), histograms, len(images), len(texts), throughput)


def metrics_table(outcome: Evaluation) -> str:
    """Lay an evaluation out for reading: recalls with their chance, ranks, cosines, encoding speed."""
    metrics, chance = outcome.metrics, outcome.chance
    head = f"{'':22}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>9}{'median':>8}"
    lines = [f"{outcome.num_images} images, {outcome.num_texts} texts", "", head]
    for direction, name in (("i2t", "image to text"), ("t2i", "text to image")):
        recalls = "".join(f"{metrics[f'{direction}_r{k}']:8.1f}" for k in RECALLS)
        ranks = f"{metrics[f'{direction}_mean_rank']:9.1f}{metrics[f'{direction}_median_rank']:8.0f}"
        lines.append(f"{name:22}{recalls}{ranks}")
        lines.append(f"{'  chance':22}" + "".join(f"{chance[f'{direction}_r{k}']:8.2f}" for k in RECALLS))
    lines += [
        "",
        f"{'RSum':22}{metrics['rsum']:8.1f}   (chance {chance['rsum']:.1f}, at most 600)",
        f"{'matched cosine':22}{metrics['positive_similarity']:8.3f}",
        f"{'unmatched cosine':22}{metrics['negative_similarity']:8.3f}",
        f"{'gap':22}{metrics['similarity_gap']:8.3f}",
        "",
        f"{'images/s':22}{outcome.throughput['images_per_second']:8.1f}",
        f"{'texts/s':22}{outcome.throughput['texts_per_second']:8.1f}",
    ]
    return "\n".join(lines)


def _own_validation_pairs(content: dict[str, Any], *, image_dir: str | None, max_skipped_fraction: float) -> Pairs:
    """Find the images that the checkpoint's run validated on."""
    data = content["config"]["data"]
    pairs = load_pairs(
        data["val_data"] or data["data_dir"],
        image_dir=image_dir or data["image_dir"],
        caption_key=data["caption_key"],
        max_skipped_fraction=max_skipped_fraction,
    )
    wanted = content["val_images"]
    rows = pairs.find(wanted)
    missing = [path for path, row in zip(wanted, rows, strict=True) if row < 0]
    if missing:
        raise ValueError(
            f"{len(missing)} of the checkpoint's {len(wanted)} validation images are no longer in {data['data_dir']} "
            f"(first: {missing[0]}); name a data set with --data_dir"
        )
    return pairs.select(rows)


if __name__ == "__main__":
    sys.exit(main())
