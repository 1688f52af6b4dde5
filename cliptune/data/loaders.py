"""Samples to batches, epoch after epoch, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cliptune.data.issues import Issue
from cliptune.data.pairs import Pairs
from cliptune.data.table import IntArray
from cliptune.preprocess.tokens import CONTEXT_LENGTH
from cliptune.runtime.distributed import share
from cliptune.runtime.signals import leave_signals_to_main

PIECE_SIZE = 64


class Sample(NamedTuple):
    """One image with one of its captions."""

    image: Tensor | None
    """`[3, R, R]`, uint8, or what the user's transform gives; None if the picture cannot be read."""
    tokens: Tensor
    """`[77]` int64."""
    image_id: int
    """Number of the image in the data set."""
    caption_id: int
    """Number of the caption in the data set."""
    error: Issue | None = None
    """Why there is no image."""


class Batch(NamedTuple):
    """Samples whose picture could be read, and the reasons for those that could not."""

    images: Tensor
    """`[B, 3, R, R]`, uint8, or what the user's transform gives: float pixels are taken as normalised."""
    tokens: Tensor
    """`[B, 77]` int64."""
    image_ids: Tensor
    """`[B]` int64."""
    errors: list[Issue]
    caption_ids: Tensor
    """`[B]` int64."""


class SampleDataset(Protocol):
    """What a loader needs of a data set, such as `data_loader.ImageTextDataset`."""

    pairs: Pairs
    seed: int
    num_views: int

    @property
    def view(self) -> int:
        """View of each image that this epoch sees."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, by which captions and augmentation vary."""

    def choose(self, items: IntArray) -> tuple[IntArray, IntArray]:
        """Return the image and this epoch's caption of each item."""


class EpochBatches(Sampler[list[int]]):
    """Every item once an epoch, in an order drawn from seed and epoch.

    A single item left over joins the batch before it: alone it would have nothing to be contrasted with.

    Attributes:
        epoch: decides the order.
        start: number of the batch that comes first; those before it are left out.
    """

    def __init__(self, num_items: int, batch_size: int, *, seed: int) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        batches, rest = divmod(self.num_items, self.batch_size)
        return max(batches + (rest > 1), 1)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(63))
        order = torch.randperm(self.num_items, generator=generator)
        for number in range(self.start, len(self)):
            end = None if number == len(self) - 1 else (number + 1) * self.batch_size
            yield order[number * self.batch_size : end].tolist()  # a list of all would be several times as large


class _Pieces(Sampler[list[int]]):
    """This process's share of each batch in pieces, so that all loading processes work on the batch that comes next."""

    def __init__(self, batches: EpochBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for items in self.batches:
            own = items[share(len(items))]
            yield from (own[start : start + PIECE_SIZE] for start in range(0, len(own), PIECE_SIZE))


class TrainLoader:
    """Batches of a data set, epoch after epoch; with several processes each gets its share of every batch.

    Args:
        dataset: what is loaded.
        batch_size: pairs of a batch, over all processes.
        num_workers: loading processes of each process; 0: none.
        device: where the batches will be used.
    """

    def __init__(self, dataset: SampleDataset, *, batch_size: int, num_workers: int, device: torch.device) -> None:
        self.dataset = dataset
        self.batches = EpochBatches(len(dataset), batch_size, seed=dataset.seed)
        self.pin_memory = device.type == "cuda"
        self.loader: DataLoader[Any] = DataLoader(
            cast(Dataset[Sample], dataset),
            batch_sampler=_Pieces(self.batches),
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_main,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from number `start` on; the same for the same seed, whatever came before."""
        self.batches.epoch, self.batches.start = epoch, start
        self.dataset.set_epoch(epoch)
        pieces = iter(self.loader)
        for items in self.batches:
            num_items = len(items[share(len(items))])
            num_pieces = -(-num_items // PIECE_SIZE)
            yield join_pieces(pieces, num_items, num_pieces=num_pieces, pin_memory=self.pin_memory)


def join_pieces(pieces: Iterator[Batch], num_items: int, *, num_pieces: int, pin_memory: bool) -> Batch:
    """Make one batch of the next `num_items` items, which are the next `num_pieces` pieces; holds it and one piece."""
    if num_pieces <= 1:
        return next(pieces) if num_pieces else collate([])
    images: Tensor | None = None
    parts = []
    end = 0
    for _ in range(num_pieces):
        piece = next(pieces)
        if len(piece.images):
            if images is None:
                shape = (num_items, *piece.images.shape[1:])
                images = torch.empty(shape, dtype=piece.images.dtype, pin_memory=pin_memory)
            images[end : end + len(piece.images)] = piece.images
            end += len(piece.images)
        parts.append(piece._replace(images=torch.empty(0)))
    return Batch(
        torch.empty(0) if images is None else images[:end],
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.image_ids for part in parts]),
        [error for part in parts for error in part.errors],
        torch.cat([part.caption_ids for part in parts]),
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples into a batch; those without a picture leave it, and their reasons are kept."""
    good = [sample for sample in samples if sample.image is not None]
    errors = [sample.error for sample in samples if sample.error is not None]
    if not good:
        no_ids = torch.empty(0, dtype=torch.long)
        return Batch(torch.empty(0), torch.empty(0, CONTEXT_LENGTH, dtype=torch.long), no_ids, errors, no_ids)
    images = torch.stack([sample.image for sample in good if sample.image is not None])
    ids = torch.tensor([sample.image_id for sample in good])
    captions = torch.tensor([sample.caption_id for sample in good])
    return Batch(images, torch.stack([sample.tokens for sample in good]), ids, errors, captions)
