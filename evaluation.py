"""Features to similarities to ranks to metrics. As a stage it evaluates a checkpoint:

python evaluation.py --checkpoint model-checkpoint/best_model.pth

Started by `torchrun`, several processes encode and rank a part each.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cliptune.runtime.stopping import leave_at_signals

    leave_at_signals()  # the imports take seconds

import logging
import math
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from cliptune.cli import check_command_line, parse_settings, run_stage, stored_config
from cliptune.settings import DataSettings, EvaluationSettings

if __name__ == "__main__":
    check_command_line(EvaluationSettings, str(__doc__))

import torch
from torch import Tensor

from clip_model import CLIPModel
from cliptune import results
from cliptune.data.issues import Issue
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.data.splits import evaluation_pairs
from cliptune.features.encode import Encoded, Encoder, PairOutputs, encode_pairs, log_issue
from cliptune.features.metrics import chance_level, compute_retrieval_metrics
from cliptune.features.similarity import similarity_histograms
from cliptune.model.checkpoint_fields import CONFIG_KEYS
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.model.weights import own_weights
from cliptune.runtime.device import resolve_precision
from cliptune.runtime.distributed import is_main, process_group, rank_device, world_size
from cliptune.runtime.logs import setup_logging
from cliptune.runtime.messages import count, first_few, printable
from cliptune.training.loss import ContrastiveLoss
from data_loader import ImageTextDataset

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Evaluate a checkpoint, print a table and write `results/evaluation_results.json`; returns the exit code."""
    return run_stage(lambda: _evaluate_checkpoint(argv), name="evaluation.py")


def _evaluate_checkpoint(argv: list[str] | None) -> int:
    settings, _ = parse_settings(EvaluationSettings, argv, description=str(__doc__))
    started_at = datetime.now().isoformat(timespec="seconds")
    setup_logging(settings.log_level)
    device = rank_device(settings.device)
    content = load_checkpoint(settings.checkpoint, needs=CONFIG_KEYS)
    config = stored_config(content["config"], settings.checkpoint)
    precision = resolve_precision(settings.precision or config.training.precision, device)
    pairs, source = _find_pairs(settings, config.data, content["val_images"])
    with process_group(device):
        model = CLIPModel(pretrained=own_weights(content, settings.checkpoint)).to(device).eval()
        run_id = content.get("run_id", "")
        del content  # the model has its own copy of the weights
        encoder = Encoder(
            model,
            ImageTextDataset,
            precision=precision,
            batch_size=settings.encode_batch_size,
            num_workers=settings.num_workers,
        )
        evaluation = evaluate(encoder, pairs)
        if is_main():
            print(metrics_table(evaluation))
            run = results.run_info(
                command=results.command_line("evaluation.py", argv),
                device=device,
                precision=precision.name,
                world_size=world_size(),
                model_name=model.architecture.name,
                model_settings=model.architecture.to_dict(),
            )
            times = {"started_at": started_at, "finished_at": datetime.now().isoformat(timespec="seconds")}
            values = {
                **times,
                "run_id": run_id,
                "run": run,
                "checkpoint": settings.checkpoint,
                **source,
                **evaluation.to_dict(),
            }
            path = Path(settings.output_dir) / "results" / "evaluation_results.json"
            results.write(path, results.EvaluationResults.model_validate(values))
            print(f"written: {printable(str(path))}")
    return 0


def _find_pairs(
    settings: EvaluationSettings, run_data: DataSettings, val_images: list[str]
) -> tuple[Pairs, dict[str, str]]:
    """Read the data set that is to be evaluated on; also return what the results file says of it."""
    max_skipped_fraction = (
        run_data.allowed_skipped_fraction if settings.max_skipped_fraction is None else settings.max_skipped_fraction
    )
    if settings.data_dir is None:
        if settings.split not in {None, "val"}:
            raise ValueError(f"--split {settings.split} needs --data_dir; without it the validation images are taken")
        pairs = _own_validation_pairs(
            val_images, run_data, image_dir=settings.image_dir, max_skipped_fraction=max_skipped_fraction
        )
        return pairs, {"data": run_data.val_data or run_data.data_dir, "split": "val"}
    source = DataSource(settings.data_dir, settings.image_dir, settings.caption_key, max_skipped_fraction)
    pairs = evaluation_pairs(source, split=settings.split)
    return pairs, {"data": settings.data_dir, "split": settings.split or "default"}


def _own_validation_pairs(
    val_images: list[str], run_data: DataSettings, *, image_dir: str | None, max_skipped_fraction: float
) -> Pairs:
    """Find the images that the checkpoint's run validated on."""
    data_dir, image_dir = run_data.val_data or run_data.data_dir, image_dir or run_data.image_dir
    pairs = load_pairs(DataSource(data_dir, image_dir, run_data.caption_key, max_skipped_fraction))
    indices = pairs.find(val_images)
    missing = [path for path, index in zip(val_images, indices, strict=True) if index < 0]
    if missing:
        raise ValueError(
            f"the checkpoint's run validated on {count(len(val_images), 'image')}, of which {len(missing):,} cannot be "
            f"found in {data_dir}: {first_few(missing, 1)}; try another data set with --data_dir"
        )
    return pairs.select(indices)


class Evaluation(NamedTuple):
    """What an evaluation gave; plain values under the keys of `cliptune.results`."""

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


def evaluate(
    encoder: Encoder,
    pairs: Pairs,
    *,
    loss_batch_size: int | None = None,
    cached: PairOutputs | None = None,
    on_unreadable_image: Callable[[Issue], None] = log_issue,
) -> Evaluation:
    """Encode a data set and rank it against itself, over the full gallery.

    Args:
        encoder: its model comes back in the mode it came in.
        pairs: images with all their captions.
        loss_batch_size: also give `val_loss`, the contrastive loss in batches of this size, in nats.
        cached: outputs of the model's frozen towers for `pairs`, which are then only projected.
        on_unreadable_image: called with each image that cannot be read, in the rank that met it.

    Raises:
        ValueError: features that are not finite, or no image could be read.
    """
    encoded = encode_pairs(encoder, pairs, cached=cached, on_unreadable_image=on_unreadable_image)
    features = encoded.image_features, encoded.text_features, encoded.text_to_image
    model = encoder.model
    device = model.device if model.device.type == "cuda" else torch.device("cpu")  # ranks need float64
    metrics = compute_retrieval_metrics(*features, device=device)
    num_images, num_texts = len(encoded.image_features), len(encoded.text_features)
    chance = chance_level(num_images, encoded.text_to_image)
    if loss_batch_size is not None:
        metrics["val_loss"] = validation_loss(encoded, model.logit_scale.detach(), batch_size=loss_batch_size)
        # of n equal scores each has the probability 1/n; a set smaller than a batch is one batch
        num_matched = len(encoded.text_to_image.unique())
        chance["val_loss"] = math.log(min(loss_batch_size, num_matched))
    histograms = similarity_histograms(*features)
    throughput = {"images_per_second": encoded.images_per_second, "texts_per_second": encoded.texts_per_second}
    return Evaluation(metrics, chance, histograms, num_images, num_texts, throughput)


@torch.no_grad()
def validation_loss(encoded: Encoded, logit_scale: Tensor, *, batch_size: int) -> float:
    """Return the mean contrastive loss of each image with its first text, in nats.

    It depends on the batch size (chance is ln B), so only full batches count: 10 images in batches of 4 are two
    batches, and the last two images are not looked at. A set smaller than a batch is one batch.

    Args:
        encoded: features of the whole set, which every rank has.
        logit_scale: log of the inverse temperature; the loss is computed where it is.
        batch_size: of the training.
    """
    owners = encoded.text_to_image
    images, image_of_text = torch.unique(owners, return_inverse=True)
    texts = torch.full((len(images),), len(owners))
    texts.scatter_reduce_(0, image_of_text, torch.arange(len(owners)), "amin")
    loss, losses = ContrastiveLoss(across_ranks=False), []
    for start in range(0, max(len(images) - batch_size, 0) + 1, batch_size):
        rows = slice(start, start + batch_size)
        batch = encoded.image_features[images[rows]], encoded.text_features[texts[rows]]
        losses.append(loss(*(features.to(logit_scale.device) for features in batch), logit_scale))
    return torch.stack(losses).mean().item()


def metrics_table(evaluation: Evaluation) -> str:
    """Lay an evaluation out for reading: recalls with their chance, ranks, cosines, encoding speed."""
    metrics, chance = evaluation.metrics, evaluation.chance
    head = f"{'':22}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>9}{'median':>8}"
    lines = [f"{count(evaluation.num_images, 'image')}, {count(evaluation.num_texts, 'text')}", "", head]
    for direction, name in (("i2t", "image to text"), ("t2i", "text to image")):
        recalls = "".join(f"{metrics[f'{direction}_r{k}']:8.1f}" for k in results.RECALLS)
        ranks = f"{metrics[f'{direction}_mean_rank']:9.1f}{metrics[f'{direction}_median_rank']:8.0f}"
        lines.append(f"{name:22}{recalls}{ranks}")
        lines.append(f"{'  chance':22}" + "".join(f"{chance[f'{direction}_r{k}']:8.2f}" for k in results.RECALLS))
    lines += [
        "",
        f"{'RSum':22}{metrics['rsum']:8.1f}   (chance {chance['rsum']:.1f}, at most 600)",
        f"{'matched cosine':22}{metrics['positive_similarity']:8.3f}",
        f"{'unmatched cosine':22}{metrics['negative_similarity']:8.3f}",
        f"{'gap':22}{metrics['similarity_gap']:8.3f}",
        "",
        f"{'images/s':22}{evaluation.throughput['images_per_second']:8.1f}",
        f"{'texts/s':22}{evaluation.throughput['texts_per_second']:8.1f}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
