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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_model import CLIPModel
from cliptune import results
from cliptune.data.issues import Issue
from cliptune.data.known import KnownImages
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.data.skipped import SkippedData
from cliptune.data.splits import declared_split, default_split
from cliptune.features.encode import Encoded, Encoder, PairOutputs, encode_pairs, log_issue
from cliptune.features.metrics import chance_level, rank_metrics
from cliptune.features.ranks import Ranks, retrieval_ranks
from cliptune.features.similarity import similarity_histograms, similarity_means
from cliptune.features.tables import metrics_table
from cliptune.model.checkpoint_fields import CONFIG_KEYS
from cliptune.model.checkpoint_file import checkpoint_in, load_checkpoint
from cliptune.model.weights import own_weights
from cliptune.run_data import found_again
from cliptune.runtime.device import resolve_precision
from cliptune.runtime.distributed import is_main, process_group, rank_device, world_size
from cliptune.runtime.logs import setup_logging
from cliptune.runtime.messages import count, first_few, printable
from cliptune.training.loss import ContrastiveLoss
from data_loader import ImageTextDataset

logger = logging.getLogger(__name__)

RankArray = NDArray[np.float32]
"""Ranks, 1 is best; they are halves of whole numbers, exact up to 2^23."""


def main(argv: list[str] | None = None) -> int:
    """Evaluate a checkpoint, print a table and write `results/evaluation_results.json`; returns the exit code."""
    return run_stage(lambda: _evaluate_checkpoint(argv), name="evaluation.py")


def _evaluate_checkpoint(argv: list[str] | None) -> int:
    settings, _ = parse_settings(EvaluationSettings, argv, description=str(__doc__))
    started_at = datetime.now().isoformat(timespec="seconds")
    setup_logging(settings.log_level)
    device = rank_device(settings.device)
    checkpoint = checkpoint_in(settings.checkpoint)
    content = load_checkpoint(checkpoint, needs=CONFIG_KEYS)
    config = found_again(stored_config(content["config"], checkpoint), content.get("folder", ""))
    precision = resolve_precision(settings.precision or config.training.precision, device)
    chosen = _find_pairs(settings, config.data, content)
    skipped = SkippedData(
        [chosen.pairs],
        num_images=len(chosen.pairs),
        max_fraction=chosen.max_skipped_fraction,
        path=Path(settings.output_dir) / "results" / "evaluation_skipped.json",
    )
    with process_group(device):
        model = CLIPModel(pretrained=own_weights(content, checkpoint)).to(device).eval()
        run_id = content.get("run_id", "")
        del content  # the model has its own copy of the weights
        encoder = Encoder(
            model,
            ImageTextDataset,
            precision=precision,
            batch_size=settings.encode_batch_size,
            num_workers=settings.num_workers,
        )
        evaluation = evaluate(encoder, chosen.pairs, on_unreadable_image=skipped.note)
        skipped.agree()
        if is_main():
            print(metrics_table(evaluation.to_dict()))
            if chosen.num_trained_on:
                print(f"{'trained on':22}{chosen.num_trained_on:8,}   of these images")
            if len(skipped):
                logger.warning(skipped.summary())
            if (warning := chosen.warning()) is not None:
                logger.warning(warning)
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
                "checkpoint": str(checkpoint),
                "data": chosen.data_dir,
                "split": chosen.split,
                "num_trained_on": chosen.num_trained_on,
                **evaluation.to_dict(),
            }
            path = Path(settings.output_dir) / "results" / "evaluation_results.json"
            results.write(path, results.EvaluationResults.model_validate(values))
            print(f"written: {printable(str(path))}")
    return 0


class Chosen(NamedTuple):
    """The images that are evaluated."""

    pairs: Pairs
    data_dir: str
    split: str
    is_runs_own: bool
    """The split is the checkpoint's, not one that the data declares."""
    num_trained_on: int
    """Of the images: those that the checkpoint's run was trained on."""
    max_skipped_fraction: float

    def warning(self) -> str | None:
        """Say that the numbers are not those of new images, if they are not."""
        if not self.num_trained_on:
            return None
        flag = "no --data_dir" if "val" in self.pairs.declared() else "--split val"
        way_out = f"{flag} takes the images that the run validated on"
        if self.is_runs_own and self.split != "train":
            way_out = "they are copies of training images, which `data_loader.py --check` looks for"
        return (
            f"{self.num_trained_on:,} of the {count(len(self.pairs), 'image')} were trained on, so these numbers do "
            f"not tell how the model does on new images: {way_out}"
        )


def _find_pairs(settings: EvaluationSettings, run_data: DataSettings, content: dict[str, Any]) -> Chosen:
    """Read the data set that is to be evaluated on.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is not the one that the checkpoint's run had.
    """
    known = KnownImages(content.get("data", {}))
    fraction = settings.max_skipped_fraction
    fraction = run_data.allowed_skipped_fraction if fraction is None else fraction
    is_runs_own = settings.data_dir is None
    if settings.data_dir is not None:
        source = DataSource(
            settings.data_dir, settings.image_dir, settings.caption_key, fraction, image_key=settings.image_key,
            captions_from=settings.captions_from, caption_template=settings.caption_template,
        )  # fmt: skip
        pairs = load_pairs(source)
        split = settings.split or default_split(pairs, source)
        is_runs_own = split not in pairs.declared() and known.holds(split)
        pairs = known.select(pairs, split, source) if is_runs_own else declared_split(pairs, split, source)
    else:
        if settings.split not in {None, "val"}:
            raise ValueError(f"--split {settings.split} needs --data_dir; without it the validation images are taken")
        source, split = DataSource(
            run_data.data_dir, settings.image_dir or run_data.image_dir, run_data.caption_key, fraction,
            image_key=run_data.image_key, captions_from=run_data.captions_from,
            caption_template=run_data.caption_template,
        ), "val"  # fmt: skip
        source = source if run_data.val_data is None else source.at(run_data.val_data)
        pairs = _own_validation_pairs(source, known, content["val_images"])
    num_trained_on = int(known.are_in(pairs, "train", str(source.data_dir)).sum())
    return Chosen(pairs, str(source.data_dir), split, is_runs_own, num_trained_on, fraction)


def _own_validation_pairs(source: DataSource, known: KnownImages, val_images: list[str]) -> Pairs:
    """Find the images that the checkpoint's run validated on, where it found them."""
    way_out = "--data_dir DATA --split val takes them from where they lie now, --image_dir images of the same index"
    try:
        pairs = load_pairs(source)
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).partition("; `python")[0]  # sample data would be of no use here
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        where = f"looked for in {Path(source.data_dir).absolute()}"
        raise kind(f"the images that the checkpoint's run validated on, {where}: {reason}; {way_out}") from None
    indices = pairs.find(val_images)
    if known.holds("val"):
        own = pairs.select(indices) if (indices >= 0).all() else None
        if own is not None and known.are_in(own, "val", str(source.data_dir)).all():
            return own  # only their files had to be looked at
        return known.select(pairs, "val", source)
    missing = [path for path, index in zip(val_images, indices, strict=True) if index < 0]
    if missing:
        raise ValueError(
            f"the checkpoint's run validated on {count(len(val_images), 'image')}, of which {len(missing):,} cannot be "
            f"found in {source.data_dir}: {first_few(missing, 1)}; try another data set with --data_dir"
        )
    return pairs.select(indices)


class Evaluation(NamedTuple):
    """What an evaluation gave; plain values under the keys of `cliptune.results`."""

    metrics: dict[str, float]
    chance: dict[str, float]
    histograms: dict[str, list[Any]]
    num_images: int
    num_texts: int
    skipped: dict[str, int]
    """`images` that could not be read, and `records` of their index that could not be used."""
    throughput: dict[str, float]
    """`images_per_second` (reading and preprocessing included) and `texts_per_second` (tokenising included)."""
    ranks: dict[str, RankArray]
    """Rank of each image's best caption, `i2t` `[images of the data set]`, and of each caption's image, `t2i` `[its
    captions]`; NaN for an image without a caption, or that could not be read, and its captions. So queries stand at the
    same place in every evaluation of a data set."""
    encoded: Encoded | None = None
    """The features."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as the results file stores them: neither ranks nor features."""
        return {key: value for key, value in self._asdict().items() if key not in {"ranks", "encoded"}}


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
    ranks = retrieval_ranks(*features, device=device)
    metrics = {**rank_metrics(ranks), **similarity_means(*features)}
    num_images, num_texts = len(encoded.image_features), len(encoded.text_features)
    chance = chance_level(num_images, encoded.text_to_image)
    if loss_batch_size is not None:
        metrics["val_loss"] = validation_loss(encoded, model.logit_scale.detach(), batch_size=loss_batch_size)
        # of n equal scores each has the probability 1/n; a set smaller than a batch is one batch
        num_matched = len(encoded.text_to_image.unique())
        chance["val_loss"] = math.log(min(loss_batch_size, num_matched))
    histograms = similarity_histograms(*features)
    throughput = {"images_per_second": encoded.images_per_second, "texts_per_second": encoded.texts_per_second}
    skipped = {"images": len(pairs) - num_images, "records": pairs.issues.count}
    of_queries = _ranks_of_queries(ranks, encoded, pairs)
    return Evaluation(metrics, chance, histograms, num_images, num_texts, skipped, throughput, of_queries, encoded)


def _ranks_of_queries(ranks: Ranks, encoded: Encoded, pairs: Pairs) -> dict[str, RankArray]:
    """Put the ranks of what was encoded to their images and captions in the data set."""
    i2t, t2i = (torch.full((size,), math.nan) for size in (len(pairs), pairs.num_pairs))
    i2t[encoded.image_indices[encoded.text_to_image.unique()]] = ranks.i2t.float()
    t2i[encoded.text_indices] = ranks.t2i.float()
    return {"i2t": i2t.numpy(), "t2i": t2i.numpy()}


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


if __name__ == "__main__":
    sys.exit(main())
