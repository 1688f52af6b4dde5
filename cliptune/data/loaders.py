"""Samples to batches, epoch after epoch, the same on every machine."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from cliptune.data.issues import Issue, image_issue
from cliptune.data.pairs import Pairs
from cliptune.data.table import IntArray
from cliptune.data.workers import make_loader
from cliptune.preprocess.jpeg_decoder import JpegPart, JpegsLeft
from cliptune.preprocess.tokens import CONTEXT_LENGTH
from cliptune.runtime.ahead import one_ahead
from cliptune.runtime.distributed import rank_slice

PIECE_SIZE = 64  # samples: a worker hands over no more at a time


class Sample(NamedTuple):
    """One image with one of its captions."""

    image: Tensor | Any | None  # Any: a transform of the user's gives tensors, which need not be told from `JpegPart`s
    """`[3, R, R]`, uint8, or what the user's transform gives; None if the image cannot be read; a `JpegPart`
    that the loader's decoder has still to decode."""
    tokens: Tensor
    """`[L]` int64, L the model's context length."""
    image_id: int
    """Index of the image in the data set."""
    caption_id: int
    """`caption_id` of the caption: the same for captions that say the same."""
    caption_index: int
    """Index of the caption in the data set."""
    issue: Issue | None = None
    """Why there is no image."""


class Batch(NamedTuple):
    """Samples whose image could be read, and why the others could not."""

    images: Tensor
    """`[B, 3, R, R]`, uint8, or what the user's transform gives: float pixels are taken as normalised."""
    tokens: Tensor
    """`[B, L]` int64."""
    image_ids: Tensor
    """`[B]` int64: index of each image in the data set."""
    issues: list[Issue]
    caption_ids: Tensor
    """`[B]` int64: `caption_id` of each caption."""
    caption_indices: Tensor
    """`[B]` int64: index of each caption in the data set."""
    jpegs: JpegsLeft | None = None
    """Those that are not decoded yet; `images` has none of them, and all others in their order."""


def caption_id(caption: str) -> int:
    """Return 63 bits that are the same for captions that differ only in case, white space or width of characters.

    They are the same on every machine and in every run, which Python's own `hash` of a text is not.
    """
    # "A  Cat" and full-width "Ａ ｃａｔ" -> "a cat"
    normalised = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    digest = hashlib.blake2b(normalised.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # int64 has no room for 64 bits without a sign


class SampleDataset(Protocol):
    """What a loader needs of a data set, such as `data_loader.ImageTextDataset`."""

    pairs: Pairs
    seed: int
    num_views: int
    context_length: int

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
        start: index of the batch that comes first; those before it are passed over.
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
        # a text as seed: with seed + epoch, epoch 2 of seed 0 would have the order of epoch 1 of seed 1
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(63))
        order = torch.randperm(self.num_items, generator=generator)
        for step in range(self.start, len(self)):
            end = None if step == len(self) - 1 else (step + 1) * self.batch_size
            yield order[step * self.batch_size : end].tolist()  # a list of all would be several times as large


def collate(samples: Sequence[Sample], context_length: int = CONTEXT_LENGTH) -> Batch:
    """Put samples into a batch; those without an image leave it, and their issues are noted."""
    readable = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in readable if isinstance(sample.image, Tensor)]
    jpegs = {row: sample.image for row, sample in enumerate(readable) if isinstance(sample.image, JpegPart)}
    tokens = [sample.tokens for sample in readable]
    return Batch(
        images=torch.stack(images) if images else torch.empty(0),  # [B, 3, R, R]
        tokens=torch.stack(tokens) if readable else torch.empty(0, context_length, dtype=torch.int64),  # [B, L]
        image_ids=torch.tensor([sample.image_id for sample in readable], dtype=torch.int64),
        issues=[sample.issue for sample in samples if sample.issue is not None],
        caption_ids=torch.tensor([sample.caption_id for sample in readable], dtype=torch.int64),
        caption_indices=torch.tensor([sample.caption_index for sample in readable], dtype=torch.int64),
        jpegs=JpegsLeft.packed(jpegs) if jpegs else None,
    )


class Decoder(Protocol):
    """Decodes JPEGs, such as `preprocess.jpeg_decoder.JpegDecoder`."""

    def decode(self, parts: Sequence[JpegPart], /) -> tuple[Tensor, dict[int, ValueError]]:
        """Return the pixels of at least one, uint8 `[J, 3, R, R]`, and by index why some have none."""


def decoded(piece: Batch, decoder: Decoder) -> Batch:
    """Decode the JPEGs that a piece still has; one that cannot be read leaves it, and its issue is noted."""
    if piece.jpegs is None:
        return piece
    parts = piece.jpegs.unpacked()
    pixels, errors = decoder.decode(list(parts.values()))
    is_jpeg = torch.zeros(len(piece.tokens), dtype=torch.bool)
    is_jpeg[list(parts)] = True
    images = pixels
    if len(piece.images):
        images = torch.empty(len(is_jpeg), *pixels.shape[1:], dtype=pixels.dtype)  # [B, 3, R, R]
        images[is_jpeg], images[~is_jpeg] = pixels, piece.images
    piece = piece._replace(images=images, jpegs=None)
    if not errors:
        return piece
    rows, kept = list(parts), torch.ones_like(is_jpeg)
    kept[[rows[index] for index in errors]] = False
    issues = [image_issue(parts[rows[index]].name, error) for index, error in errors.items()]
    tensors: dict[str, Any] = {
        name: value[kept] for name, value in piece._asdict().items() if isinstance(value, Tensor)
    }
    return piece._replace(issues=[*piece.issues, *issues], **tensors)


class _Pieces(Sampler[list[int]]):
    """This rank's part of each batch in pieces, so that all workers work on the batch that comes next.

    Two workers and a batch of 256: four pieces of 64. With whole batches one worker would load 256 samples while the
    run waits for them, and the other the batch after that.
    """

    def __init__(self, batches: EpochBatches, piece_size: int) -> None:
        self.batches = batches
        self.piece_size = piece_size

    def __iter__(self) -> Iterator[list[int]]:
        for items in self.batches:
            own = items[rank_slice(len(items))]
            yield from (own[start : start + self.piece_size] for start in range(0, len(own), self.piece_size))


class TrainLoader:
    """Batches of a data set, epoch after epoch; with several ranks each gets its part of every batch.

    Args:
        dataset: what is loaded.
        batch_size: pairs of a batch, over all ranks.
        num_workers: of each rank; 0: the rank loads by itself.
        device: where the batches will be used.
        piece_size: samples that a worker loads at a time.
        decoder: decodes what the data set's transform leaves encoded; None: nothing is left.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        *,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        piece_size: int = PIECE_SIZE,
        decoder: Decoder | None = None,
    ) -> None:
        self.dataset = dataset
        self.batches = EpochBatches(len(dataset), batch_size, seed=dataset.seed)
        self.piece_size = piece_size
        self.decoder = decoder
        self.collate = partial(collate, context_length=dataset.context_length)
        self.loader = make_loader(
            dataset,
            batch_sampler=_Pieces(self.batches, piece_size),
            num_workers=num_workers,
            collate_fn=self.collate,
            persistent=True,
            own_random=device.type == "cuda",
        )
        self.pin_memory = device.type == "cuda"
        self.in_thread = self.pin_memory and self.loader.num_workers > 0

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from index `start` on; the same for the same seed, whatever came before."""
        yield from joined_batches(partial(self._joined, epoch, start), in_thread=self.in_thread)

    def _joined(self, epoch: int, start: int, stopped: Callable[[], bool]) -> Iterator[Batch]:
        self.batches.epoch, self.batches.start = epoch, start
        self.dataset.set_epoch(epoch)
        pieces = pieces_of(self.loader, stopped, self.decoder)
        for items in self.batches:
            num_items = len(items[rank_slice(len(items))])
            if not num_items:
                yield self.collate([])
                continue
            num_pieces = -(-num_items // self.piece_size)
            yield join_pieces(pieces, num_items, num_pieces=num_pieces, pin_memory=self.pin_memory)


def pieces_of(loader: Iterable[Batch], stopped: Callable[[], bool], decoder: Decoder | None) -> Iterator[Batch]:
    """Yield pieces until somebody stops it, each decoded where it comes here: a thread ahead of its use, for a GPU."""
    pieces = takewhile(lambda _: not stopped(), loader)
    return pieces if decoder is None else (decoded(piece, decoder) for piece in pieces)


def joined_batches(joined: Callable[[Callable[[], bool]], Iterator[Batch]], *, in_thread: bool) -> Iterator[Batch]:
    """Join batches, for a GPU in a thread, which copies one into pinned memory while the one before is used.

    Not where the main process loads by itself: a transform draws from random states that all threads share.

    Args:
        joined: yields batches, given what tells it to stop.
        in_thread: a batch ahead.
    """
    return one_ahead(joined) if in_thread else joined(lambda: False)


def pinned(batch: Batch) -> Batch:
    """Put what a GPU gets of a batch into memory from which it copies by itself; the CPU reads the tokens."""
    return batch._replace(
        images=batch.images.pin_memory(),
        image_ids=batch.image_ids.pin_memory(),
        caption_ids=batch.caption_ids.pin_memory(),
    )


def join_pieces(pieces: Iterator[Batch], num_items: int, *, num_pieces: int, pin_memory: bool) -> Batch:
    """Make one batch of the next `num_items` items, which are the next `num_pieces` pieces; holds it and one piece."""
    if num_pieces == 1:
        return pinned(next(pieces)) if pin_memory else next(pieces)
    images, end = torch.empty(0), 0
    parts: list[Batch] = []
    for _ in range(num_pieces):
        piece = next(pieces)
        if len(piece.images):
            if not len(images):
                shape = (num_items, *piece.images.shape[1:])  # [num_items, 3, R, R]
                images = torch.empty(shape, dtype=piece.images.dtype, pin_memory=pin_memory)
            # copied as they come: `torch.cat` at the end would hold all pixels twice
            images[end : end + len(piece.images)] = piece.images
            end += len(piece.images)
        parts.append(piece._replace(images=torch.empty(0)))
    ids = ("tokens", "image_ids", "caption_ids", "caption_indices")
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in ids}
    batch = Batch(images=images[:end], issues=[issue for part in parts for issue in part.issues], **joined)
    return pinned(batch) if pin_memory else batch
