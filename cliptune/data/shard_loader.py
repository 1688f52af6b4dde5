"""Shards to batches: streamed, shuffled, each sample once an epoch whatever processes share the work."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from cliptune.data.issues import Issue, first_issues, image_issue
from cliptune.data.loaders import (
    PIECE_SIZE,
    Batch,
    Decoder,
    EpochBatches,
    Sample,
    caption_id,
    collate,
    join_pieces,
    joined_batches,
    pieces_of,
)
from cliptune.data.pairs import DataSource, Pairs
from cliptune.data.shards import Shard, Shards, open_shards
from cliptune.data.splits import separate_validation
from cliptune.data.tar_samples import TarSample, read_samples
from cliptune.data.workers import fitting_workers, make_loader, shared_number
from cliptune.preprocess.jpeg_decoder import JpegPart
from cliptune.preprocess.tokens import CONTEXT_LENGTH, tokenize
from cliptune.preprocess.transforms import PixelTransform
from cliptune.runtime import distributed
from cliptune.runtime.messages import count
from cliptune.runtime.rng import draw_bits, seeded

SHUFFLE_BUFFER = 1000
NUM_CHECKED = 20


def training_shards(
    source: DataSource,
    *,
    val_data: str | None,
    captions: str = "random",
    cache_images: bool = False,
) -> dict[str, Shards | Pairs]:
    """Return a run's `train` shards and its `val` pairs.

    Args:
        source: its `data_dir` names the shards, `path/{00000..00099}.tar`; the rest is how `val_data` is read, and the
            `caption_key` of both.
        val_data: the validation set: an index, a folder or other shards.
        captions: of a run's settings; shards have no `all`.
        cache_images: of a run's settings; shards have no such cache.

    Raises:
        ValueError: settings that shards do not go with, fewer than 2 samples, or none of the first ones is usable.
        FileNotFoundError: some shards are missing.
        OSError: one of them cannot be read.
    """
    data_dir = str(source.data_dir)
    if val_data is None:
        raise ValueError(f"{data_dir}: shards need --val_data: an index, a folder, or other shards")
    if cache_images:
        raise ValueError("--cache_images does not go with shards: their images are streamed, never cached")
    if captions == "all":
        raise ValueError("--captions all does not go with shards: each image has one caption an epoch")
    shards = open_shards(data_dir, may_run_commands=source.may_run_commands)
    if len(shards) < 2:
        raise ValueError(f"{data_dir}: {count(len(shards), 'sample')}, at least 2 are needed")
    _check_first_samples(shards, source.caption_key)
    return {"train": shards, "val": separate_validation(source, val_data)}


def _check_first_samples(shards: Shards, caption_key: str | None) -> None:
    """Find out before the first epoch, not after it, that no sample is as it should be."""
    shard = next(shard for shard in shards.shards if shard.num_samples)
    issues = []
    for sample in read_samples(shard.url, 0, NUM_CHECKED, caption_key=caption_key):
        try:
            sample.image()
            sample.captions(caption_key)
            return
        except ValueError as error:
            issues.append(Issue(str(error), image=f"{shard.label}/{sample.key}"))
    shown = first_issues(issues, 3, total=len(issues))
    raise ValueError(f"{shard.url}: none of the first {count(len(issues), 'sample')} is usable: {shown}")


class ShardLoader:
    """Batches of shards, epoch after epoch; with several ranks each gets its part of every batch.

    Each epoch has an order of shards. It is cut into as many equal parts as there are ranks, and each of these into one
    for each worker, at any sample, not at shards: so the parts are equal however many shards there are, and a shard at
    a cut is opened by both sides. Every worker goes through its part once, through a buffer from which it draws.

    The caption of an image and its augmentation depend on seed, epoch, shard's name and key; the order also depends on
    the number of ranks and workers. A sample without an image, a caption or readable pixels leaves its batch, and its
    reason is in `Batch.issues`.

    Args:
        shards: what is loaded.
        transform: images to pixels; a random one draws from `torch` or `random`.
        batch_size: pairs of a batch, over all ranks.
        num_workers: of each rank; 0: the rank loads by itself.
        device: where the batches will be used.
        seed: of the order, the caption choice and a random transform.
        caption_key: key of the captions in each sample's JSON, or ending of its text file; None: the usual ones.
        shuffle_buffer: samples of each worker's buffer.
        context_length: tokens of a caption, the model's.
        decoder: decodes what the transform leaves encoded; None: nothing is left.
    """

    def __init__(  # noqa: PLR0913  (what a notebook and a run choose differently)
        self,
        shards: Shards,
        *,
        transform: PixelTransform,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        seed: int,
        caption_key: str | None = None,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        context_length: int = CONTEXT_LENGTH,
        decoder: Decoder | None = None,
    ) -> None:
        self.dataset = shards
        self.decoder = decoder
        num_workers = fitting_workers(num_workers)
        self.plan = _Plan(len(shards), batch_size, distributed.rank(), distributed.world_size(), max(num_workers, 1))
        self.stream = _Stream(
            shards, self.plan, transform=transform, seed=seed, caption_key=caption_key, shuffle_buffer=shuffle_buffer,
            context_length=context_length,
        )  # fmt: skip
        self.loader = make_loader(
            self.stream, num_workers=num_workers, persistent=True, own_random=device.type == "cuda",
            collate_fn=partial(collate, context_length=context_length),
        )  # fmt: skip
        self.pin_memory = device.type == "cuda"
        self.in_thread = self.pin_memory and self.loader.num_workers > 0

    def __len__(self) -> int:
        return self.plan.num_steps

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from index `start` on; the same for the same seed, whatever came before.

        What comes before is read, but not decoded.

        Raises:
            ValueError: a shard holds more samples than its index says.
        """
        yield from joined_batches(partial(self._joined, epoch, start), in_thread=self.in_thread)

    def _joined(self, epoch: int, start: int, stopped: Callable[[], bool]) -> Iterator[Batch]:
        self.stream.set_epoch(epoch, start)
        pieces = pieces_of(self.loader, stopped, self.decoder)
        for step in range(start, len(self)):
            num_items = self.plan.own_before(step + 1) - self.plan.own_before(step)
            # PyTorch takes a piece of each worker in turn, and each has as many: the next ones are this step's
            num_pieces = self.plan.num_workers * self.plan.pieces_of(step)
            yield join_pieces(pieces, num_items, num_pieces=num_pieces, pin_memory=self.pin_memory)


class _Plan(NamedTuple):
    """Who loads how many samples of which step: those of a batch are dealt out in turn, like cards.

    13 samples, batches of 5, 2 ranks: after step 0 rank 0 has had `len(range(0, 5, 2))` = 3 and rank 1 2 of them, after
    step 1 5 and 5 of 10, after step 2 7 and 6 of 13. So the parts of each batch add up to it and differ by one at most,
    and everyone knows everyone's without a message. A rank's samples are dealt out to its workers in the same way.
    """

    num_samples: int
    batch_size: int
    rank: int
    world_size: int
    num_workers: int

    @property
    def num_steps(self) -> int:
        """The steps of an epoch, as many as without shards."""
        return len(EpochBatches(self.num_samples, self.batch_size, seed=0))

    def own_before(self, step: int) -> int:
        """Count this rank's samples in the steps before `step`."""
        total = self.num_samples if step == self.num_steps else step * self.batch_size
        return len(range(self.rank, total, self.world_size))

    def worker_before(self, step: int, worker: int) -> int:
        """Count a worker's samples in the steps before `step`."""
        return len(range(worker, self.own_before(step), self.num_workers))

    def pieces_of(self, step: int) -> int:
        """Count the pieces in which each worker hands over its samples of `step`: the same for all of them."""
        most = -(-(self.own_before(step + 1) - self.own_before(step)) // self.num_workers)
        return max(-(-most // PIECE_SIZE), 1)

    def range_of(self, worker: int) -> tuple[int, int]:
        """Return where in the epoch's order of samples a worker begins, and where it ends.

        The ranks' totals stand one after another there, in each of them its workers'.
        """
        own = self.own_before(self.num_steps)
        start = sum(len(range(rank, self.num_samples, self.world_size)) for rank in range(self.rank))
        start += sum(len(range(other, own, self.num_workers)) for other in range(worker))
        return start, start + len(range(worker, own, self.num_workers))


class _Drawn(NamedTuple):
    """A sample on its way through the shuffling buffer."""

    sample_index: int
    """In the data set."""
    shard: str
    """The shard's label."""
    sample: TarSample | None
    reason: str
    """Why there is no sample."""


class _Stream(IterableDataset[list[Sample]]):
    """What one worker gives in an epoch, piece by piece."""

    def __init__(
        self,
        shards: Shards,
        plan: _Plan,
        *,
        transform: PixelTransform,
        seed: int,
        caption_key: str | None,
        shuffle_buffer: int,
        context_length: int,
    ) -> None:
        self.shards = shards
        self.plan = plan
        self.transform = transform
        self.seed = seed
        self.caption_key = caption_key
        self.shuffle_buffer = shuffle_buffer
        self.context_length = context_length
        self._epoch, self._first_step = shared_number(), shared_number()  # workers that stay alive see a new epoch

    def set_epoch(self, epoch: int, first_step: int) -> None:
        self._epoch.fill_(epoch)
        self._first_step.fill_(first_step)

    def __iter__(self) -> Iterator[list[Sample]]:
        info = get_worker_info()
        worker, epoch = 0 if info is None else info.id, int(self._epoch)
        samples = self._shuffled(worker, epoch)
        for step in range(self.plan.num_steps):
            num_samples = self.plan.worker_before(step + 1, worker) - self.plan.worker_before(step, worker)
            if step < int(self._first_step):
                deque(islice(samples, num_samples), maxlen=0)  # read and dropped: the order behind them stays
                continue
            num_pieces = self.plan.pieces_of(step)
            for piece in range(num_pieces):
                first, last = (num_samples * cut // num_pieces for cut in (piece, piece + 1))
                yield [self._load(drawn, epoch) for drawn in islice(samples, last - first)]

    def _shuffled(self, worker: int, epoch: int) -> Iterator[_Drawn]:
        order = list(self.shards.shards)
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        drawn = _read_range(order, *self.plan.range_of(worker), caption_key=self.caption_key)
        generator = random.Random(f"{self.seed}/{epoch}/{self.plan.rank}/{worker}")
        return iter(shuffle(self.shuffle_buffer, rng=generator)(drawn))

    def _load(self, drawn: _Drawn, epoch: int) -> Sample:
        index, shard, tar_sample, reason = drawn
        name = f"{shard}: sample {index}" if tar_sample is None else f"{shard}/{tar_sample.key}"
        try:
            if tar_sample is None:
                raise ValueError(reason)
            captions = tar_sample.captions(self.caption_key)
            image = self.transform.load(tar_sample.image())
        except (ValueError, OSError) as error:
            image_issue(name, error)  # raises what is not the image's fault
            return Sample(None, torch.empty(0, dtype=torch.long), index, 0, index, Issue(str(error), image=name))
        # what is drawn goes by the sample's name, since its index and its worker depend on how the work is dealt out
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        item = np.frombuffer(digest, dtype="<i8")
        caption = captions[int(draw_bits(self.seed, epoch, item)[0] % np.uint64(len(captions)))]
        with seeded(int(draw_bits(self.seed, epoch, item, stream=1)[0] >> np.uint64(1))):
            pixels = self.transform(image)  # [3, R, R]
        if isinstance(pixels, JpegPart):
            pixels = pixels._replace(name=name)
        return Sample(pixels, tokenize([caption], self.context_length)[0][0], index, caption_id(caption), index)


def _read_range(order: Sequence[Shard], start: int, end: int, *, caption_key: str | None) -> Iterator[_Drawn]:
    """Yield the samples `start` to `end` of the shards one after another."""
    before = 0
    for shard in order:
        first, last = max(start - before, 0), min(end - before, shard.num_samples)
        before += shard.num_samples
        if first < last:
            yield from _read_shard(shard, first, last, caption_key=caption_key)


def _read_shard(shard: Shard, start: int, end: int, *, caption_key: str | None) -> Iterator[_Drawn]:
    """Yield a shard's samples `start` to `end`; for each that is promised but does not come, the reason."""
    position, reason = start, f"fewer than the {count(shard.num_samples, 'sample')} of its index"
    try:
        # to the end and one further, which must not be there
        last = end + (end == shard.num_samples)
        for sample in read_samples(shard.url, start, last, caption_key=caption_key):
            if position == end:
                raise ValueError(f"{shard.url} holds more than the {count(end, 'sample')} of its index: correct it")
            yield _Drawn(shard.first + position, shard.label, sample, "")
            position += 1
    except OSError as error:
        image_issue(shard.url, error)
        reason = str(error)
    for missing in range(position, end):
        yield _Drawn(shard.first + missing, shard.label, None, reason)
