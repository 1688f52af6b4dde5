"""Encode every image and every caption of a data set once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clip_model import CLIPModel
from cliptune.data.issues import Issue
from cliptune.data.loaders import make_loader
from cliptune.data.pairs import Pairs
from cliptune.features.cache import Features, PairFeatures
from cliptune.preprocess.tokens import tokenize
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.device import Precision, autocast, default_num_workers
from cliptune.runtime.distributed import gather_rows, rank, world_size
from cliptune.runtime.logs import progress_bar
from data_loader import ImageTextDataset

logger = logging.getLogger(__name__)


def log_problem(issue: Issue) -> None:
    """Warn of a picture that is left out."""
    logger.warning("left out: %s", issue)


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
    on_unreadable_image: Callable[[Issue], None] = log_problem,
) -> Encoded:
    """Encode every image and every caption, without the pictures that cannot be read and their captions.

    What is `kept` of frozen towers is only projected.

    Each of these goes to `on_unreadable_image`. Features leave the device batch by batch: however large the data set,
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
            readable = _readable(kept_images, on_unreadable_image)
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
                on_unreadable_image=on_unreadable_image,
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


def _readable(images: Features, on_unreadable_image: Callable[[Issue], None]) -> Tensor:
    for issue in images.errors.values():
        on_unreadable_image(issue)
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
    on_unreadable_image: Callable[[Issue], None],
) -> tuple[Tensor, Tensor]:
    dataset = ImageTextDataset(pairs, transform=clip_transform(model.image_resolution))
    if cache_dir is not None:
        dataset.cache_images(cache_dir)
    workers = default_num_workers(model.device) if num_workers is None else num_workers
    batches, num_rounds = deal(torch.arange(len(pairs)).split(batch_size))
    batch_indices = [batch.tolist() for batch in batches]
    loader = make_loader(dataset, batch_sampler=batch_indices, num_workers=workers, device=model.device)
    features = _Features(sum(map(len, batches)), model)
    ids = [torch.empty(0, dtype=torch.int64)]
    blank = torch.zeros(1, 3, model.image_resolution, model.image_resolution, dtype=torch.uint8)
    loaded = iter(loader)
    for _ in progress_bar(range(num_rounds), desc="encode images"):
        batch = next(loaded, None)
        for issue in batch.issues if batch else []:
            on_unreadable_image(issue)
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
    return batches[rank() :: world_size()], -(-len(batches) // world_size())


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
