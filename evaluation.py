"""Features to similarities to ranks to metrics. As a stage it evaluates models, several beside each other:

python evaluation.py --checkpoint ViT-B/32 model-checkpoint/best_model.pth --data_dir ./data

Started by `torchrun`, several processes encode and rank a part each.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cliptune.runtime.stopping import leave_at_signals

    leave_at_signals()  # the imports take seconds

import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cliptune.cli import check_command_line, parse_settings, run_stage
from cliptune.stage_settings import EvaluationSettings

if __name__ == "__main__":
    check_command_line(EvaluationSettings, str(__doc__))

import numpy as np
import torch
from numpy.typing import NDArray

from clip_model import CLIPModel
from cliptune import results
from cliptune.data.issues import Issue
from cliptune.data.loaders import caption_id
from cliptune.data.pairs import Pairs
from cliptune.data.repeats import perfect_recalls
from cliptune.data.skipped import SkippedData
from cliptune.features.encode import Encoded, Encoder, encode_pairs, log_issue
from cliptune.features.metrics import chance_level, merged_ranks, rank_metrics
from cliptune.features.ranks import Ranks, retrieval_ranks
from cliptune.features.similarity import similarity_histograms, similarity_means
from cliptune.features.tables import evaluation_report, metrics_html, metrics_table
from cliptune.features.tower_outputs import PairOutputs
from cliptune.language.catalogue import language_of
from cliptune.results import of_evaluations
from cliptune.runs.classes import Classification, class_report, class_tasks, classify_set, of_classes
from cliptune.runs.evaluation import (
    Candidate,
    EvaluationRecord,
    choose_images,
    compare_all,
    find_candidates,
    record_of,
    with_and_without,
)
from cliptune.runs.info import command_line, run_info
from cliptune.runtime.device import resolve_precision
from cliptune.runtime.distributed import is_main, main_first, process_group, rank_device, world_size
from cliptune.runtime.logs import setup_logging
from cliptune.runtime.messages import printable
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.state import now
from data_loader import ImageTextDataset

logger = logging.getLogger(__name__)

RankArray = NDArray[np.float32]
"""Ranks, 1 is best; they are halves of whole numbers, exact up to 2^23."""

ENCODE_BATCH_SIZE = 64
"""Images encoded at once where no setting says it."""


def main(argv: list[str] | None = None) -> int:
    """Evaluate models, print tables and write `results/evaluation_results.json`; returns the exit code."""
    return run_stage(lambda: _evaluate_checkpoints(argv), name="evaluation.py", argv=argv)


def _evaluate_checkpoints(argv: list[str] | None) -> int:
    settings, _ = parse_settings(EvaluationSettings, argv, description=str(__doc__))
    started_at = now()
    setup_logging(settings.log_level)
    device = rank_device(settings.device)

    # models, and images that none of them was trained on
    candidates = find_candidates(settings.checkpoint, activation=settings.activation)
    data_dirs: list[str | None] = [*dict.fromkeys(settings.data_dir)] or [None]
    chosen_sets = [choose_images(settings, data_dir, candidates) for data_dir in data_dirs]
    sets = [each for chosen in chosen_sets for each in with_and_without(chosen, settings.exclude, candidates)]
    skipped = SkippedData(
        [chosen.pairs for chosen in chosen_sets],  # what is left of a set is no more data
        num_images=sum(len(chosen.pairs) for chosen in chosen_sets),
        max_fraction=max(chosen.max_skipped_fraction for chosen in chosen_sets),
        path=Path(settings.output_dir) / "results" / "evaluation_skipped.json",
    )
    tasks = class_tasks(settings, [chosen.pairs for chosen in sets])
    with process_group(device):
        with main_first():  # the other ranks find the weights downloaded
            for candidate in candidates:
                candidate.fetch()

        # evaluations of each model on every set
        records: list[EvaluationRecord] = []
        classified: list[Classification] = []
        for candidate in candidates:
            encoder, run = _load(candidate, settings, command=command_line("evaluation.py", argv))
            for chosen, task in zip(sets, tasks, strict=True):
                if task is not None:
                    classified.append(classify_set(encoder, chosen, task, (candidate, run), note=skipped.note))
                    continue
                evaluation = evaluate(encoder, chosen.pairs, on_unreadable_image=skipped.note)
                records.append(record_of(candidate, chosen, evaluation, run=run))
            del encoder  # one model at a time is in memory
        skipped.agree()

        # tables and results
        if is_main():
            times = {"started_at": started_at, "finished_at": now()}
            comparisons = [comparison for chosen in sets for comparison in compare_all(chosen, records)]
            values = [record.values for record in records]
            language = language_of(settings.language)
            report = class_report(classified) if classified else evaluation_report(values, comparisons)
            print(language.say_lines(report))
            for message in [chosen.note() for chosen in chosen_sets] + [skipped.summary() if len(skipped) else None]:
                if message is not None:
                    logger.warning(message)
            name = "classification_results.json" if classified else "evaluation_results.json"
            path = Path(settings.output_dir) / "results" / name
            found = of_classes(classified, times) if classified else of_evaluations(values, comparisons, times=times)
            results.write(path, found)
            print(language.say(f"written: {printable(str(path))}"))
    return 0


def _load(candidate: Candidate, settings: EvaluationSettings, *, command: str) -> tuple[Encoder, results.RunInfo]:
    """Load a model, and say what it runs on."""
    device = rank_device(settings.device)
    stored = "auto" if candidate.config is None else candidate.config.training.precision
    precision = resolve_precision(settings.precision or stored, device)
    model = CLIPModel(pretrained=candidate.take_weights()).to(device).eval()
    encoder = Encoder(
        model, ImageTextDataset, precision=precision, batch_size=settings.encode_batch_size,
        num_workers=settings.num_workers,
    )  # fmt: skip
    run = run_info(
        command=command,
        device=device,
        precision=precision.name,
        world_size=world_size(),
        model_name=model.architecture.name,
        model_settings=model.architecture.to_dict(),
    )
    return encoder, run


class Evaluation(NamedTuple):
    """What an evaluation gave; plain values under the keys of `cliptune.results`. It shows as its table."""

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
    merged_ranks: dict[str, RankArray]
    """The same with equal texts and copies of an image merged; NaN also for all but the first of what is equal."""
    encoded: Encoded | None = None
    """The features, if they were asked for."""

    def __repr__(self) -> str:
        return metrics_table(self._as_values())

    def _repr_html_(self) -> str:
        return metrics_html(self._as_values())

    def _as_values(self) -> dict[str, Any]:
        """Return what tables are made of; nothing is known here of groups, nor of what was trained on."""
        return {**self.to_dict(), "intervals": {}, "num_left_out": 0, "num_trained_on": 0}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as the results file stores them: neither ranks nor features."""
        left_out = {"ranks", "merged_ranks", "encoded"}
        return {key: value for key, value in self._asdict().items() if key not in left_out}


def evaluate(
    encoder: Encoder | CLIPModel,
    pairs: Pairs | ImageTextDataset,
    *,
    loss: ContrastiveLoss | None = None,
    loss_batch_size: int | None = None,
    cached: PairOutputs | None = None,
    on_unreadable_image: Callable[[Issue], None] = log_issue,
    keep_features: bool = False,
) -> Evaluation:
    """Encode a data set and rank it against itself, over the full gallery.

    Args:
        encoder: its model comes back in the mode it came in. A model alone runs in its device's own precision.
        pairs: images with all their captions; or a data set of them, whose transform does not count.
        loss: that the model is trained with, on this rank's pairs alone; None: InfoNCE.
        loss_batch_size: also give `val_loss`, the loss in batches of this size, in nats.
        cached: outputs of the model's frozen towers for `pairs`, which are then only projected.
        on_unreadable_image: called with each image that cannot be read, in the rank that met it.
        keep_features: give them, too.

    Raises:
        ValueError: features that are not finite, or no image could be read.
    """
    if isinstance(encoder, CLIPModel):
        precision = resolve_precision("auto", encoder.device)
        encoder = Encoder(encoder, ImageTextDataset, precision=precision, batch_size=ENCODE_BATCH_SIZE)
    if isinstance(pairs, ImageTextDataset):
        pairs = pairs.pairs
    encoded = encode_pairs(encoder, pairs, cached=cached, on_unreadable_image=on_unreadable_image)
    features = encoded.image_features, encoded.text_features, encoded.text_to_image
    model = encoder.model
    # ties need products that repeat bit by bit, which other devices are not known to give
    device = model.device if model.device.type == "cuda" else torch.device("cpu")
    ranks = retrieval_ranks(*features, device=device)
    num_images, num_texts = len(encoded.image_features), len(encoded.text_features)
    merged = merged_ranks(
        ranks, *features, image_kinds=encoded.image_kinds, text_kinds=encoded.text_kinds, device=device
    )
    kinds = (encoded.text_kinds, encoded.text_to_image, encoded.image_kinds)
    ceiling = perfect_recalls(*(codes.numpy() for codes in kinds))
    metrics = {
        **rank_metrics(ranks), **merged.metrics, "ceiling_rsum": ceiling["rsum"], **similarity_means(*features)
    }  # fmt: skip
    chance = {**chance_level(num_images, encoded.text_to_image), **merged.chance}
    if loss_batch_size is not None:
        loss = ContrastiveLoss(across_ranks=False) if loss is None else loss
        found = validation_loss(encoded, model, loss, batch_size=loss_batch_size, captions=pairs.captions)
        metrics["val_loss"], chance["val_loss"] = found
    histograms = similarity_histograms(*features)
    throughput = {"images_per_second": encoded.images_per_second, "texts_per_second": encoded.texts_per_second}
    skipped = {"images": len(pairs) - num_images, "records": pairs.issues.count}
    firsts = (torch.where(first, values, math.nan) for first, values in zip(merged.is_first, merged.ranks, strict=True))
    return Evaluation(
        metrics, chance, histograms, num_images, num_texts, skipped, throughput,
        ranks=_ranks_of_queries(ranks, encoded, pairs), merged_ranks=_ranks_of_queries(Ranks(*firsts), encoded, pairs),
        encoded=encoded if keep_features else None,
    )  # fmt: skip


def _ranks_of_queries(ranks: Ranks, encoded: Encoded, pairs: Pairs) -> dict[str, RankArray]:
    """Put the ranks of what was encoded to their images and captions in the data set."""
    i2t, t2i = (torch.full((size,), math.nan) for size in (len(pairs), pairs.num_pairs))
    i2t[encoded.image_indices[encoded.text_to_image.unique()]] = ranks.i2t.float()
    t2i[encoded.text_indices] = ranks.t2i.float()
    return {"i2t": i2t.numpy(), "t2i": t2i.numpy()}


@torch.no_grad()
def validation_loss(
    encoded: Encoded, model: Any, loss: ContrastiveLoss, *, batch_size: int, captions: Sequence[str]
) -> tuple[float, float]:
    """Return the mean loss of each image with its first text, and that of features that tell nothing, in nats.

    It depends on the batch size (chance is ln B), so only full batches count: 10 images in batches of 4 are two
    batches, and the last two images are not looked at. A set smaller than a batch is one batch.

    Args:
        encoded: features of the whole set, which every rank has.
        model: its `logit_scale` and `logit_bias` count; the loss is computed where they are.
        loss: on this rank's pairs alone.
        batch_size: of the training.
        captions: of the data set, which say what else is a positive.
    """
    owners = encoded.text_to_image
    images, image_of_text = torch.unique(owners, return_inverse=True)
    texts = torch.full((len(images),), len(owners))
    texts.scatter_reduce_(0, image_of_text, torch.arange(len(owners)), "amin")
    ids = torch.tensor([caption_id(captions[index]) for index in encoded.text_indices[texts].tolist()])
    losses, chances = [], []
    for start in range(0, max(len(images) - batch_size, 0) + 1, batch_size):
        rows = slice(start, start + batch_size)
        batch = encoded.image_features[images[rows]], encoded.text_features[texts[rows]], ids[rows]
        image_features, text_features, own_ids = (values.to(model.logit_scale.device) for values in batch)
        found = loss(image_features, text_features, model.logit_scale, model.logit_bias, caption_ids=own_ids)
        losses.append(found)
        chances.append(loss.chance(len(own_ids), caption_ids=ids[rows]))
    return torch.stack(losses).mean().item(), math.fsum(chances) / len(chances)


if __name__ == "__main__":
    sys.exit(main())
