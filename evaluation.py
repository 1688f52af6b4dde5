"""Features to similarities to ranks to metrics. As a stage it evaluates a checkpoint:

python evaluation.py --checkpoint model-checkpoint/best_model.pth

Started by `torchrun`, several processes encode and rank a part each.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config import DataSettings, EvaluationSettings, check_command_line, parse_settings, run_stage

if __name__ == "__main__":
    check_command_line(EvaluationSettings, str(__doc__))

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from checkpoint import load_checkpoint
from clip_model import CLIPModel
from data_loader import ImageTextDataset, Pairs, collate, evaluation_pairs, load_pairs
from distributed import gather_rows, is_main, num_processes, own_device, process_group, progress_bar, rank
from feature_cache import Features, PairFeatures
from preprocessing import clip_transform, tokenize
from retrieval import (
    RECALLS,
    chance_level,
    compute_retrieval_metrics,
    similarity_histograms,
    validation_loss,
)
from rows import Problem
from runtime import Precision, autocast, default_num_workers, leave_signals_to_main, resolve_precision, setup_logging

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Evaluate a checkpoint, print a table and write `results/evaluation_results.json`; returns the exit code."""
    return run_stage(lambda: _evaluate_checkpoint(argv), name="evaluation.py")


def _evaluate_checkpoint(argv: list[str] | None) -> int:
    settings, _ = parse_settings(EvaluationSettings, argv, description=str(__doc__))

    setup_logging(settings.log_level)
    device = own_device(settings.device)
    content = load_checkpoint(settings.checkpoint)
    precision = resolve_precision(settings.precision or content["config"]["training"]["precision"], device)
    run_data = DataSettings.model_validate(content["config"]["data"])
    max_bad_share = run_data.allowed_bad_share if settings.max_bad_share is None else settings.max_bad_share
    if settings.data_dir is None:
        if settings.split not in {None, "val"}:
            raise ValueError(f"--split {settings.split} needs --data_dir; without it the validation images are taken")
        data, split = run_data.val_data or run_data.data_dir, "val"
        pairs = _own_validation_pairs(content, image_dir=settings.image_dir, max_bad_share=max_bad_share)
    else:
        data, split = settings.data_dir, settings.split or "default"
        pairs = evaluation_pairs(
            settings.data_dir,
            split=settings.split,
            image_dir=settings.image_dir,
            caption_key=settings.caption_key,
            max_bad_share=max_bad_share,
        )
    with process_group(device):
        model = CLIPModel.from_checkpoint(settings.checkpoint, device=device)
        outcome = evaluate(
            model, pairs, batch_size=settings.batch_size, num_workers=settings.num_workers, precision=precision
        )
        if is_main():
            _report(settings, outcome, data=data, split=split)
    return 0


def _report(settings: EvaluationSettings, outcome: Outcome, *, data: str, split: str) -> None:
    print(metrics_table(outcome))
    results = {"checkpoint": settings.checkpoint, "data": data, "split": split, **outcome.to_dict()}
    path = Path(settings.output_dir) / "results" / "evaluation_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def log_problem(problem: Problem) -> None:
    """Warn of a picture that is left out."""
    logger.warning("left out: %s", problem)


class Outcome(NamedTuple):
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
    on_bad_image: Callable[[Problem], None] = log_problem,
) -> Outcome:
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
        on_bad_image: called with each picture that cannot be read, in the process that met it.

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
        on_bad_image=on_bad_image,
    )
    images, texts, owners = encoded[:3]
    device = model.device if model.device.type == "cuda" else torch.device("cpu")  # ranks need float64
    metrics = compute_retrieval_metrics(images, texts, owners, device=device)
    if loss_batch_size is not None:
        scale = model.logit_scale.detach().exp().item()
        metrics["val_loss"] = validation_loss(images, texts, owners, scale=scale, batch_size=loss_batch_size)
    histograms = similarity_histograms(images, texts, owners)
    throughput = {"images_per_second": encoded.images_per_second, "texts_per_second": encoded.texts_per_second}
    return Outcome(metrics, chance_level(len(images), owners), histograms, len(images), len(texts), throughput)


class Encoded(NamedTuple):
    """A data set's features, in main memory, and how fast they came."""

    image_features: Tensor
    """float32 `[N, D]`."""
    text_features: Tensor
    """float32 `[M, D]`."""
    text_to_image: Tensor
    """int64 `[M]`."""
    images_per_second: float
    texts_per_second: float


def encode_pairs(
    model: CLIPModel,
    pairs: Pairs,
    *,
    batch_size: int,
    num_workers: int | None,
    precision: Precision,
    cache_dir: Path | None = None,
    kept: PairFeatures | None = None,
    on_bad_image: Callable[[Problem], None] = log_problem,
) -> Encoded:
    """Encode every image and every caption, without the pictures that cannot be read and their captions.

    What is `kept` of frozen towers is only projected.

    Each of these pictures goes to `on_bad_image`. Features leave the device batch by batch: however large the data set,
    a GPU holds one batch.

    Raises:
        ValueError: no picture could be read.
    """
    training = model.training
    model.eval()
    start = time.perf_counter()
    kept_images, kept_texts = kept or PairFeatures(None, None)
    with torch.no_grad():  # FSDP's buffers would be unfit for training after inference_mode
        if kept_images is not None:
            readable = _readable(kept_images, on_bad_image)
            image_features = _project(
                model, model.project_image, kept_images, readable, batch_size=batch_size, precision=precision
            )
        else:
            image_features, readable = _encode_images(
                model,
                pairs,
                batch_size=batch_size,
                num_workers=num_workers,
                precision=precision,
                cache_dir=cache_dir,
                on_bad_image=on_bad_image,
            )
        rows = torch.full((len(pairs),), -1)
        rows[readable] = torch.arange(len(readable))
        owners = rows[pairs.text_to_image]
        middle = time.perf_counter()
        numbers = (owners >= 0).nonzero().squeeze(1)
        if kept_texts is not None:
            text_features = _project(
                model, model.project_text, kept_texts, numbers, batch_size=batch_size, precision=precision
            )
        else:
            captions = [pairs.captions[text] for text in numbers.tolist()]
            text_features = encode_captions(model, captions, batch_size=batch_size, precision=precision)
    end = time.perf_counter()
    model.train(training)
    speeds = len(image_features) / (middle - start), len(text_features) / (end - middle)
    return Encoded(image_features, text_features, owners[owners >= 0], *speeds)


def _readable(images: Features, on_bad_image: Callable[[Problem], None]) -> Tensor:
    for problem in images.errors.values():
        on_bad_image(problem)
    readable = torch.from_numpy(images.rows >= 0).nonzero().squeeze(1)
    if not len(readable):
        raise ValueError("none of the pictures could be read")
    return readable


def _project(
    model: CLIPModel,
    project: Callable[[Tensor], Tensor],
    kept: Features,
    numbers: Tensor,
    *,
    batch_size: int,
    precision: Precision,
) -> Tensor:
    """Take kept outputs of a frozen tower into the shared space, `[len(numbers), D]`."""
    features = torch.empty(len(numbers), model.projection_dim, device=model.device)
    for start in range(0, len(numbers), batch_size):
        rows = slice(start, start + batch_size)
        with autocast(model.device, precision):
            features[rows] = project(kept[numbers[rows].numpy()])
    return features


def _encode_images(
    model: CLIPModel,
    pairs: Pairs,
    *,
    batch_size: int,
    num_workers: int | None,
    precision: Precision,
    cache_dir: Path | None,
    on_bad_image: Callable[[Problem], None],
) -> tuple[Tensor, Tensor]:
    dataset = ImageTextDataset(pairs, transform=clip_transform(model.image_resolution))
    if cache_dir is not None:
        dataset.keep_images(cache_dir)
    workers = default_num_workers(model.device) if num_workers is None else num_workers
    on_gpu = model.device.type == "cuda"
    batches, num_rounds = deal(torch.arange(len(pairs)).split(batch_size))
    loader = DataLoader(
        dataset,
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=workers,
        collate_fn=collate,
        pin_memory=on_gpu,
        worker_init_fn=leave_signals_to_main,
    )
    features = _Features(sum(map(len, batches)), model)
    ids = [torch.empty(0, dtype=torch.int64)]
    blank = torch.zeros(1, 3, model.image_resolution, model.image_resolution, dtype=torch.uint8)
    loaded = iter(loader)
    for _ in progress_bar(range(num_rounds), desc="encode images"):
        batch = next(loaded, None)
        for problem in batch.errors if batch else []:
            on_bad_image(problem)
        if batch is None or not len(batch.image_ids):
            with autocast(model.device, precision):
                model.encode_image(blank)  # the others may need this process's part of a sharded model
            continue
        with autocast(model.device, precision):
            features.append(model.encode_image(batch.images))
        ids.append(batch.image_ids)
    numbers, rows = gather_rows(torch.cat(ids)), gather_rows(features.all())
    if not len(numbers):
        raise ValueError("none of the pictures could be read")
    order = torch.argsort(numbers)
    return rows[order], numbers[order]


def encode_captions(model: CLIPModel, captions: list[str], *, batch_size: int, precision: Precision) -> Tensor:
    """Encode texts, in batches of similar length, since a batch costs as much as its longest text.

    Returns:
        float32 `[M, D]` in main memory.
    """
    tokens, _ = tokenize(captions, model.architecture.context_length)
    batches, num_rounds = deal(torch.argsort(tokens.argmax(1), stable=True).split(batch_size))
    features = _Features(sum(map(len, batches)), model)
    for number in progress_bar(range(num_rounds), desc="encode texts"):
        with autocast(model.device, precision):
            if number < len(batches):
                features.append(model.encode_text(tokens[batches[number]]))
            else:
                model.encode_text(tokens[:1])
    numbers = gather_rows(torch.cat([torch.empty(0, dtype=torch.int64), *batches]))
    return gather_rows(features.all())[torch.argsort(numbers)]


def deal(batches: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
    """Return this process's batches, whole ones in turn, and how many the process with the most has."""
    return batches[rank() :: num_processes()], -(-len(batches) // num_processes())


class _Features:
    """Features on their way from the device to main memory; the device goes on while they are copied."""

    def __init__(self, most: int, model: CLIPModel) -> None:
        self.on_gpu = model.device.type == "cuda"
        self.rows = torch.empty(most, model.projection_dim, pin_memory=self.on_gpu)
        self.end = 0

    def append(self, features: Tensor) -> None:
        start, self.end = self.end, self.end + len(features)
        self.rows[start : self.end].copy_(features, non_blocking=self.on_gpu)

    def all(self) -> Tensor:
        if self.on_gpu:
            torch.cuda.synchronize()
        return self.rows[: self.end]


def metrics_table(outcome: Outcome) -> str:
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


def _own_validation_pairs(content: dict[str, Any], *, image_dir: str | None, max_bad_share: float) -> Pairs:
    """Find the images that the checkpoint's run validated on."""
    data = content["config"]["data"]
    pairs = load_pairs(
        data["val_data"] or data["data_dir"],
        image_dir=image_dir or data["image_dir"],
        caption_key=data["caption_key"],
        max_bad_share=max_bad_share,
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
