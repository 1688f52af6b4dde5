"""Features to similarities to ranks to metrics. As a stage it evaluates a checkpoint:

python evaluation.py --checkpoint model-checkpoint/best_model.pth
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import config
from checkpoint import load_checkpoint
from clip_model import CLIPModel
from config import NonNegativeInt, PositiveInt, Settings, parse_settings, run_stage
from data_loader import ImageTextDataset, Pairs, collate, evaluation_pairs, load_pairs
from feature_cache import Features, PairFeatures
from preprocessing import clip_transform, tokenize
from runtime import Precision, autocast, default_num_workers, resolve_device, resolve_precision, setup_logging

logger = logging.getLogger(__name__)

RECALLS = (1, 5, 10)
RECALL_KEYS = tuple(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in RECALLS)
NUM_BINS = 100


class EvaluationSettings(Settings):
    """Settings of the evaluation stage."""

    checkpoint: str = Field("model-checkpoint/best_model.pth", description="checkpoint to evaluate")
    data_dir: str | None = Field(None, description="data set; none: the checkpoint's own validation images")
    split: Literal["train", "val", "test", "all"] | None = Field(
        None, description="split of data_dir; none: val if it declares one, else everything"
    )
    image_dir: str | None = Field(None, description="folder that image paths are relative to; none: the index file's")
    caption_key: str | None = Field(None, description="column that holds the captions; none: caption, captions, title")
    batch_size: PositiveInt = Field(64, description="images or texts encoded at once")
    num_workers: NonNegativeInt | None = Field(None, description="loading processes; none: chosen for the machine")
    precision: config.Precision = Field("fp32", description="auto, fp32, bf16, fp16")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    output_dir: str = Field(".", description="evaluation_results.json goes to its results/")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug, info, warning, error")


def main(argv: list[str] | None = None) -> int:
    """Evaluate a checkpoint, print a table and write `results/evaluation_results.json`; returns the exit code."""
    return run_stage(lambda: _evaluate_checkpoint(argv), name="evaluation.py")


def _evaluate_checkpoint(argv: list[str] | None) -> int:
    settings, _ = parse_settings(EvaluationSettings, argv, description=str(__doc__).splitlines()[0])

    setup_logging(settings.log_level)
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    content = load_checkpoint(settings.checkpoint)
    if settings.data_dir is None:
        if settings.split not in {None, "val"}:
            raise ValueError(f"--split {settings.split} needs --data_dir; without it the validation images are taken")
        data, split = str(content["config"]["data"]["val_data"] or content["config"]["data"]["data_dir"]), "val"
        pairs = _own_validation_pairs(content, image_dir=settings.image_dir)
    else:
        data, split = settings.data_dir, settings.split or "default"
        pairs = evaluation_pairs(
            settings.data_dir, split=settings.split, image_dir=settings.image_dir, caption_key=settings.caption_key
        )
    model = CLIPModel.from_checkpoint(settings.checkpoint, device=device)
    outcome = evaluate(
        model, pairs, batch_size=settings.batch_size, num_workers=settings.num_workers, precision=precision
    )
    print(metrics_table(outcome))
    results = {"checkpoint": settings.checkpoint, "data": data, "split": split, **outcome.to_dict()}
    path = Path(settings.output_dir) / "results" / "evaluation_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


class Ranks(NamedTuple):
    """Rank of the best match of each query, 1 is best; halves come from ties."""

    i2t: Tensor
    """float64 `[number of images with a text]`."""
    t2i: Tensor
    """float64 `[number of texts]`."""


class Outcome(NamedTuple):
    """What an evaluation gave."""

    metrics: dict[str, float]
    chance: dict[str, float]
    histograms: dict[str, list[Any]]
    num_images: int
    num_texts: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as the results file stores them."""
        return self._asdict()


def compute_retrieval_metrics(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """Compute retrieval metrics over the full gallery, in blocks.

    Args:
        image_features: unit-norm float32 `[N, D]`.
        text_features: unit-norm float32 `[M, D]`.
        text_to_image: image row of each text, int64 `[M]`; an image without text is a distractor.

    Returns:
        Recalls `i2t_r1 ... t2i_r10` in percent of the queries, `rsum` (their sum, at most 600), mean and median ranks
        (1 is best), mean cosines of matched and unmatched pairs and their difference. An image's rank is that of its
        best caption, and its other captions do not count (Faghri et al. 2018, VSE++).

    Raises:
        ValueError: shapes that do not fit, features that are not finite, an image row that is not there.
    """
    ranks = retrieval_ranks(image_features, text_features, text_to_image)
    return {
        **rank_metrics(ranks),
        **similarity_means(image_features, text_features, text_to_image),
    }


def retrieval_ranks(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    *,
    image_block: int = 1024,
    text_block: int = 4096,
) -> Ranks:
    """Rank every query's best match in the full gallery.

    Rank = 1 + the negatives that score higher + half of those that score the same. Every score, a match's too, is an
    element of a product of one fixed, padded block shape: a product of another shape can differ in the last bit, which
    would break ties (a collapsed model would come out first or last, not in the middle).

    Args:
        image_features: `[N, D]`.
        text_features: `[M, D]`.
        text_to_image: `[M]`.
        image_block: images scored at once.
        text_block: texts scored at once; memory is proportional to the two blocks' product.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, an image row that is not there.
    """
    owners = _check_features(image_features, text_features, text_to_image)
    order = torch.argsort(owners, stable=True)  # then an image's texts lie in few blocks
    texts, owners = text_features[order], owners[order]
    blocks = _Blocks(image_features, texts, image_block=image_block, text_block=text_block)
    own = torch.empty(len(texts), device=texts.device)
    for rows, columns in blocks.spans(owners):
        scores = blocks.scores(rows, columns)
        mine = _owned(owners, rows, columns)
        own[columns][mine] = scores[owners[columns][mine] - rows.start, mine.nonzero().squeeze(1)]
    best = torch.full((len(image_features),), -math.inf, device=texts.device)
    best.scatter_reduce_(0, owners, own, "amax")
    # counted in halves of a place: 2 for a higher negative, 1 for an equal one
    ahead_of_image = torch.zeros(len(image_features), dtype=torch.int64, device=texts.device)
    ahead_of_text = torch.zeros(len(texts), dtype=torch.int64, device=texts.device)
    for rows, columns in blocks.all():
        scores = blocks.scores(rows, columns)
        ahead_of_image[rows] += _count_halves(scores, best[rows, None], dim=1)
        ahead_of_text[columns] += _count_halves(scores, own[None, columns], dim=0)
    # an image's own captions that tie with its best are no negatives, nor is a text's own image
    ahead_of_image.scatter_add_(0, owners, -(own == best[owners]).long())
    ahead_of_text -= 1
    with_text = torch.bincount(owners, minlength=len(image_features)) > 0
    t2i = torch.empty(len(texts), dtype=torch.float64, device=texts.device)
    t2i[order] = 1 + ahead_of_text.double() / 2
    return Ranks(1 + ahead_of_image[with_text].double() / 2, t2i)


class _Blocks:
    """Products of equal shape between blocks of images and blocks of texts."""

    def __init__(self, images: Tensor, texts: Tensor, *, image_block: int, text_block: int) -> None:
        self.num_images, self.num_texts = len(images), len(texts)
        self.image_block = min(image_block, _round_up(len(images), 64))
        self.text_block = min(text_block, _round_up(len(texts), 64))
        self.images, self.texts = images, texts

    def scores(self, rows: slice, columns: slice) -> Tensor:
        images = _padded(self.images[rows], self.image_block)
        texts = _padded(self.texts[columns], self.text_block)
        scores: Tensor = (images @ texts.T)[: rows.stop - rows.start, : columns.stop - columns.start]
        return scores

    def all(self) -> Iterator[tuple[slice, slice]]:
        for rows in self._slices(self.num_images, self.image_block):
            for columns in self._slices(self.num_texts, self.text_block):
                yield rows, columns

    def spans(self, owners: Tensor) -> Iterator[tuple[slice, slice]]:
        """Yield the blocks that hold a matched pair; `owners` is sorted."""
        for columns in self._slices(self.num_texts, self.text_block):
            first = int(owners[columns.start]) // self.image_block
            last = int(owners[columns.stop - 1]) // self.image_block
            for number in range(first, last + 1):
                start = number * self.image_block
                yield slice(start, min(start + self.image_block, self.num_images)), columns

    @staticmethod
    def _slices(total: int, size: int) -> Iterator[slice]:
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))


def _owned(owners: Tensor, rows: slice, columns: slice) -> Tensor:
    inside: Tensor = (owners[columns] >= rows.start) & (owners[columns] < rows.stop)
    return inside


def _count_halves(scores: Tensor, reference: Tensor, *, dim: int) -> Tensor:
    counts: Tensor = (scores > reference).sum(dim) + (scores >= reference).sum(dim)
    return counts


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _padded(block: Tensor, size: int) -> Tensor:

    missing = size - len(block)
    return torch.cat([block, block.new_zeros(missing, block.shape[1])]) if missing else block


def _check_features(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> Tensor:

    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if features.ndim != 2 or not len(features):
            raise ValueError(f"{name} must be [N, D] with N > 0, got {tuple(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{name} are not finite: the model has diverged")
    owners = torch.as_tensor(text_to_image, dtype=torch.int64, device=text_features.device)
    if image_features.shape[1] != text_features.shape[1] or owners.shape != (len(text_features),):
        shapes = f"{tuple(image_features.shape)}, {tuple(text_features.shape)}, {tuple(owners.shape)}"
        raise ValueError(f"image_features [N, D], text_features [M, D], text_to_image [M] do not fit: {shapes}")
    if int(owners.min()) < 0 or int(owners.max()) >= len(image_features):
        bad = int(owners.min()) if int(owners.min()) < 0 else int(owners.max())
        raise ValueError(f"text_to_image names image row {bad}, but there are {len(image_features)} images")
    return owners


def rank_metrics(ranks: Ranks) -> dict[str, float]:
    """Turn ranks into recalls (percent), `rsum`, mean and median ranks (1-based; ties as floor, as in VSE++)."""
    metrics: dict[str, float] = {}
    for direction, values in (("i2t", ranks.i2t), ("t2i", ranks.t2i)):
        for k in RECALLS:
            metrics[f"{direction}_r{k}"] = 100 * (values <= k).double().mean().item()
    metrics["rsum"] = sum(metrics.values())
    for direction, values in (("i2t", ranks.i2t), ("t2i", ranks.t2i)):
        metrics[f"{direction}_mean_rank"] = values.mean().item()
        metrics[f"{direction}_median_rank"] = math.floor((values - 1).quantile(0.5).item()) + 1
    return metrics


def chance_level(num_images: int, text_to_image: Tensor) -> dict[str, float]:
    """Return the recalls (percent) that random ranks give: for an image with c of M texts, 1 - C(M-c, K) / C(M, K)."""
    owners = torch.as_tensor(text_to_image).cpu()
    num_texts = len(owners)
    counts = torch.bincount(owners, minlength=num_images)
    chance: dict[str, float] = {}
    for k in RECALLS:
        miss = torch.ones(num_images, dtype=torch.float64)
        for place in range(min(k, num_texts)):
            miss *= ((num_texts - counts - place).clamp(min=0) / (num_texts - place)).double()
        chance[f"i2t_r{k}"] = 100 * (1 - miss[counts > 0]).mean().item()
    for k in RECALLS:
        chance[f"t2i_r{k}"] = 100 * min(k / num_images, 1.0)
    chance["rsum"] = sum(chance.values())
    return chance


def similarity_means(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """Return the mean cosine of matched and of unmatched image-text pairs and their gap; no matrix is built."""
    owners = _check_features(image_features, text_features, text_to_image)
    matched = (image_features[owners].double() * text_features.double()).sum(1)
    total = (image_features.double().sum(0) @ text_features.double().sum(0)).item()
    positive = matched.mean().item()
    unmatched = len(image_features) * len(text_features) - len(text_features)
    negative = (total - matched.sum().item()) / unmatched if unmatched else 0.0
    return {"positive_similarity": positive, "negative_similarity": negative, "similarity_gap": positive - negative}


def similarity_histograms(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> dict[str, list[Any]]:
    """Count the cosines of matched and unmatched pairs in 100 equal bins from -1 to 1."""
    owners = _check_features(image_features, text_features, text_to_image).cpu()
    images, texts = image_features.float().cpu(), text_features.float().cpu()
    everything = torch.zeros(NUM_BINS, dtype=torch.float64)
    blocks = _Blocks(images, texts, image_block=1024, text_block=4096)
    for rows, columns in blocks.all():
        everything += torch.histc(blocks.scores(rows, columns).clamp(-1, 1), NUM_BINS, -1, 1).double()
    matched = torch.histc((images[owners] * texts).sum(1).clamp(-1, 1), NUM_BINS, -1, 1).double()
    edges = torch.linspace(-1, 1, NUM_BINS + 1).tolist()
    # a match on the border of two bins may fall on either side in the two sums
    unmatched = (everything - matched).clamp(min=0)
    return {"bin_edges": edges, "positive": matched.long().tolist(), "negative": unmatched.long().tolist()}


def validation_loss(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, *, scale: float, batch_size: int
) -> float:
    """Return the mean contrastive loss (nats) of each image's first text, in batches of the training's size.

    The loss depends on the batch size, so only full batches count; a smaller set is one batch.
    """
    owners = torch.as_tensor(text_to_image).cpu()
    images, first = torch.unique(owners, return_inverse=True)
    first_text = torch.full((len(images),), len(owners)).scatter_reduce_(0, first, torch.arange(len(owners)), "amin")
    losses = []
    for start in range(0, max(len(images) - batch_size, 0) + 1, batch_size):
        rows = slice(start, start + batch_size)
        logits = scale * (image_features[images[rows]].float() @ text_features[first_text[rows]].float().T)
        labels = torch.arange(len(logits), device=logits.device)
        losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    return torch.stack(losses).mean().item()


def evaluate(
    model: CLIPModel,
    pairs: Pairs,
    *,
    batch_size: int,
    num_workers: int | None,
    precision: Precision,
    loss_batch_size: int | None = None,
    kept: PairFeatures | None = None,
) -> Outcome:
    """Encode a data set and rank it against itself, over the full gallery.

    Args:
        model: a `CLIPModel`; comes back in the mode it came in.
        pairs: images with all their captions.
        batch_size: images or texts encoded at once.
        num_workers: loading processes; None: chosen for the machine.
        precision: of the forward passes.
        loss_batch_size: also give `val_loss`, the contrastive loss in batches of this size.
        kept: what the model's frozen towers give for `pairs`, which is then only projected.

    Raises:
        ValueError: features that are not finite, or no picture could be read.
    """
    images, texts, owners = encode_pairs(
        model, pairs, batch_size=batch_size, num_workers=num_workers, precision=precision, kept=kept
    )
    metrics = compute_retrieval_metrics(images, texts, owners)
    if loss_batch_size is not None:
        scale = model.logit_scale.detach().exp().item()
        metrics["val_loss"] = validation_loss(images, texts, owners, scale=scale, batch_size=loss_batch_size)
    histograms = similarity_histograms(images, texts, owners)
    return Outcome(metrics, chance_level(len(images), owners), histograms, len(images), len(texts))


def encode_pairs(
    model: CLIPModel,
    pairs: Pairs,
    *,
    batch_size: int,
    num_workers: int | None,
    precision: Precision,
    kept: PairFeatures | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode every image and every caption; what is `kept` of frozen towers is only projected.

    Returns:
        `image_features [N, D]`, `text_features [M, D]`, `text_to_image [M]`, without the pictures that cannot be read
        (each is named in a warning) and their captions.
    """
    training = model.training
    model.eval()
    kept_images, kept_texts = kept or PairFeatures(None, None)
    with torch.inference_mode():
        if kept_images is not None:
            readable = _readable(kept_images)
            image_features = _project(
                model, model.project_image, kept_images, readable, batch_size=batch_size, precision=precision
            )
        else:
            image_features, readable = _encode_images(
                model, pairs, batch_size=batch_size, num_workers=num_workers, precision=precision
            )
        rows = torch.full((len(pairs),), -1)
        rows[readable] = torch.arange(len(readable))
        owners = rows[pairs.text_to_image]
        numbers = (owners >= 0).nonzero().squeeze(1)
        if kept_texts is not None:
            text_features = _project(
                model, model.project_text, kept_texts, numbers, batch_size=batch_size, precision=precision
            )
        else:
            captions = [pairs.captions[text] for text in numbers.tolist()]
            text_features = encode_captions(model, captions, batch_size=batch_size, precision=precision)
    model.train(training)
    if model.device.type == "mps":  # which has no float64, and ranks are counted in it
        image_features, text_features = image_features.cpu(), text_features.cpu()
    return image_features, text_features, owners[owners >= 0].to(text_features.device)


def _readable(images: Features) -> Tensor:
    for error in images.errors.values():
        logger.warning("left out: %s", error)
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
    model: CLIPModel, pairs: Pairs, *, batch_size: int, num_workers: int | None, precision: Precision
) -> tuple[Tensor, Tensor]:

    dataset = ImageTextDataset(pairs, transform=clip_transform(model.image_resolution))
    workers = default_num_workers(model.device) if num_workers is None else num_workers
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    features, ids = [], []
    for batch in tqdm(loader, desc="encode images", leave=False, disable=None):
        for error in batch.errors:
            logger.warning("left out: %s", error)
        if len(batch.image_ids):
            with autocast(model.device, precision):
                features.append(model.encode_image(batch.images))
            ids.append(batch.image_ids)
    if not features:
        raise ValueError("none of the pictures could be read")
    return torch.cat(features), torch.cat(ids)


def encode_captions(model: CLIPModel, captions: list[str], *, batch_size: int, precision: Precision) -> Tensor:
    """Encode texts `[M, D]`, in batches of similar length, since a batch costs as much as its longest text."""
    tokens, _ = tokenize(captions, model.architecture.context_length)
    order = torch.argsort(tokens.argmax(1), stable=True)
    features = torch.empty(len(tokens), model.projection_dim, device=model.device)
    for rows in tqdm(order.split(batch_size), desc="encode texts", leave=False, disable=None):
        with autocast(model.device, precision):
            features[rows.to(features.device)] = model.encode_text(tokens[rows])
    return features


def metrics_table(outcome: Outcome) -> str:
    """Lay an evaluation out for reading: recalls with their chance, ranks, cosines."""
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
    ]
    return "\n".join(lines)


def _own_validation_pairs(content: dict[str, Any], *, image_dir: str | None) -> Pairs:
    """Find the images that the checkpoint's run validated on."""
    data = content["config"]["data"]
    pairs = load_pairs(
        data["val_data"] or data["data_dir"],
        image_dir=image_dir or data["image_dir"],
        caption_key=data["caption_key"],
    )
    row_of = {path: row for row, path in enumerate(pairs.paths)}
    wanted = content["val_images"]
    missing = [path for path in wanted if path not in row_of]
    if missing:
        raise ValueError(
            f"{len(missing)} of the checkpoint's {len(wanted)} validation images are no longer in {data['data_dir']} "
            f"(first: {missing[0]}); name a data set with --data_dir"
        )
    return pairs.select(row_of[path] for path in wanted)


if __name__ == "__main__":
    sys.exit(main())
