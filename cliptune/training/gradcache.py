"""The gradient of a batch's loss with only some of its pairs in memory at once (GradCache, Gao et al. 2021).

The towers first run without a graph, a micro-batch at a time. The loss of the whole batch gives a gradient for each
feature. Then each micro-batch runs again, with the same random numbers, and takes its features' gradient back to the
parameters: the sum over the micro-batches is the whole batch's gradient. The last one keeps its graph the first time
and is not run again, so a batch that is one micro-batch is a plain step.

With several ranks each does this for its own pairs, and the last backward pass of a step adds up the gradients.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cliptune.model.batchnorm import StatisticsSnapshot, held_statistics
from cliptune.model.parallel import is_sharded
from cliptune.runtime.device import (
    Precision,
    autocast,
    is_out_of_memory,
    release_memory,
    tf32,
    to_device,
    without_autocast,
)
from cliptune.runtime.distributed import any_rank, gather_sizes, world_size
from cliptune.runtime.rng import RandomState
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.prefetch import Copier, SideStream
from cliptune.training.sigmoid_loss import SigmoidLoss

logger = logging.getLogger(__name__)

WAYS_OUT = "try --gradient_checkpointing, --precision bf16, --freeze_backbone or a smaller --model_name"

T = TypeVar("T")


class BatchLoss(NamedTuple):
    """What a batch gave, over all ranks."""

    loss: Tensor
    """In nats, a scalar on the device, not yet waited for."""
    accuracy: Tensor
    """In-batch R@1, both directions averaged, in [0, 1]; a scalar on the device."""
    num_pairs: int


@contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Turn a device's or the allocator's own error into one that names the ways out.

    Raises:
        MemoryError: memory ran out inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory: {WAYS_OUT}, or a smaller --batch_size") from None


class GradCache:
    """Computes the gradient of a batch, a micro-batch at a time; halves the micro-batch when memory runs out.

    Args:
        model: a `CLIPModel` on its device.
        loss: over the features of the whole batch.
        precision: of the towers; the loss is computed in float32.
        size: pairs of a micro-batch in each rank; None: all there are.
        parallel: what runs the model in several ranks: DDP's wrapper of it, or the model itself once it is sharded.
        scaler: scales the loss.

    Attributes:
        size: as given, or as memory allowed.
    """

    def __init__(
        self,
        model: Any,
        loss: ContrastiveLoss,
        *,
        precision: Precision,
        size: int | None,
        parallel: nn.Module | None,
        scaler: torch.amp.GradScaler,
    ) -> None:
        if loss.needs_bias and model.logit_bias is None:
            raise ValueError(
                "this loss needs a model with a logit_bias: call its learn_bias() before the optimiser is made"
            )
        self.model, self.loss, self.precision, self.size, self.scaler = model, loss, precision, size, scaler
        self.parallel = model if parallel is None else parallel
        # copies the next micro-batch's pixels to a GPU while one is computed
        self.copier: Copier | None = SideStream(model.device) if model.device.type == "cuda" else None
        self._begun: dict[int, tuple[Tensor, Any]] = {}
        # the towers of a sharded model gather weights: there no rank can tell the others that its memory is full
        self.towers_are_collective = world_size() > 1 and not isinstance(self.parallel, DistributedDataParallel)

    def backward(
        self, images: Tensor, tokens: Tensor, image_ids: Tensor | None, caption_ids: Tensor | None = None
    ) -> BatchLoss | None:
        """Set every parameter's gradient to that of the batch's loss, times the scaler's scale.

        Args:
            images: `[B, 3, R, R]`, or the image tower's output: this rank's part of the batch, which may be empty.
            tokens: int64 `[B, L]`, or the text tower's output.
            image_ids: int64 `[B]`, or None when every image of the batch is another.
            caption_ids: int64 `[B]`, the same for equal captions, or None when every caption is another.

        Returns:
            None if no rank has a pair.

        Raises:
            MemoryError: one pair does not fit, or memory ran out where the ranks could not agree to go on.
        """
        sizes = gather_sizes(len(tokens))
        if not sum(sizes):
            return None
        batch = self._batch(images, tokens, image_ids, caption_ids)
        before = _Snapshot(self.model)
        while True:
            self.model.zero_grad(set_to_none=True)
            size = min(self.size or max(sizes), max(sizes))
            # the same number of chunks in every rank, since each is a collective of a sharded model; a rank that has
            # fewer pairs runs a blank one, e.g. sizes (5, 2) in micro-batches of 3: rank 1 has [0:2] and then [3:2]
            chunks = [slice(start, min(start + size, len(tokens))) for start in range(0, max(sizes), size)]
            try:
                return BatchLoss(*self._backward(batch, chunks), sum(sizes))
            except _MemoryFull:
                if size == 1:
                    raise MemoryError(f"one pair does not fit into memory: {WAYS_OUT}") from None
            self.size = size // 2
            logger.warning("out of memory with micro-batches of %d pairs: going on with %d", size, self.size)
            before.restore()
            if isinstance(self.parallel, DistributedDataParallel):
                # in the ranks whose forward pass came through, it takes the next backward pass for that one's
                self.parallel.reducer._reset_state()
            gc.collect()  # what failed within a backward pass may hold tensors in circles
            release_memory(self.model.device)

    @torch.no_grad()
    def start_bias(
        self, images: Tensor, tokens: Tensor, image_ids: Tensor | None, caption_ids: Tensor | None = None
    ) -> bool:
        """Set the model's bias to `SigmoidLoss.initial_bias` of a batch, given as to `backward`.

        Returns:
            False if no rank has a pair.
        """
        sizes = gather_sizes(len(tokens))
        if not sum(sizes):
            return False
        batch, before = self._batch(images, tokens, image_ids, caption_ids), _Snapshot(self.model)
        size = min(self.size or max(sizes), max(sizes))
        chunks = [slice(start, min(start + size, len(tokens))) for start in range(0, max(sizes), size)]
        features = zip(*(self._encode(batch, chunk, synchronised=False) for chunk in chunks), strict=True)
        before.restore()  # as if nothing had run
        if is_sharded(self.model):  # an optimiser that is made now wants its shards, which only a backward pass brings
            self.model.reshard()
        image_features, text_features = (torch.cat(parts)[: len(tokens)] for parts in features)
        assert isinstance(self.loss, SigmoidLoss)
        bias = self.loss.initial_bias(image_features, text_features, self.model.logit_scale, **batch.ids())
        self.model.logit_bias.fill_(bias)
        return True

    def _batch(self, images: Tensor, tokens: Tensor, image_ids: Tensor | None, caption_ids: Tensor | None) -> _Batch:
        ids = (None if each is None else to_device(each, self.model.device) for each in (image_ids, caption_ids))
        return _Batch(images, tokens, *ids)

    def _backward(self, batch: _Batch, chunks: list[slice]) -> tuple[Tensor, Tensor]:
        """Attempt a step in these micro-batches; returns loss and accuracy."""
        *early, last = chunks
        self._begun = {}  # of what an attempt before has left
        encoded = self._attempt(lambda: self._encode_all(batch, early, last), collective=self.towers_are_collective)
        after = _Snapshot(self.model)
        loss, accuracy, gradients = self._attempt(lambda: self._loss(batch, encoded), collective=True)

        def take_back(chunk: slice, features: _Features) -> None:
            if chunk.start < chunk.stop:
                own = [gradient[chunk] for gradient in gradients]  # [chunk, D] each
            else:
                own = [torch.zeros_like(feature) for feature in features]
            device = self.model.device
            with tf32(device), without_autocast(device, self.precision):
                torch.autograd.backward(features, own)

        def replay(index: int, *, synchronised: bool) -> None:
            # as it was before the first run: dropout draws the same masks, and the graph is that of the same features
            encoded[index].before.restore()
            ahead = early[index + 1] if index + 1 < len(early) else None
            take_back(early[index], self._encode(batch, early[index], synchronised=synchronised, ahead=ahead))

        def replay_all_but_one() -> None:
            take_back(last, encoded.pop().features)  # first, so that its graph is gone before another is built
            # one autocast around all, so that they use the same copies of the weights; of shards nobody is to hold all
            is_whole = not self.towers_are_collective
            with autocast(self.model.device, self.precision) if is_whole else nullcontext():
                for index in range(len(early) - 1):
                    replay(index, synchronised=False)

        # the ranks' gradients are added up in one backward pass alone, which is the last; B = 8 in threes:
        # encode [0:3], [3:6] without a graph, [6:8] with one; loss; backward [6:8]; replay [0:3]; replay [3:6] and add
        if early:
            self._attempt(replay_all_but_one, collective=self.towers_are_collective)
            self._attempt(lambda: replay(len(early) - 1, synchronised=True), collective=True)
        else:
            self._attempt(lambda: take_back(last, encoded.pop().features), collective=True)
        after.restore()  # as if each micro-batch had run once
        return loss, accuracy

    def _encode_all(self, batch: _Batch, early: list[slice], last: slice) -> list[_Encoded]:
        """Run the towers on every micro-batch, on all but the last without a graph."""
        encoded = []
        # one autocast around all, so that they use the same copies of the weights; of shards nobody is to hold all
        is_whole = not self.towers_are_collective
        with torch.no_grad(), autocast(self.model.device, self.precision) if is_whole else nullcontext():
            for chunk, ahead in pairwise([*early, last]):
                before = _Snapshot(self.model)
                encoded.append(_Encoded(self._encode(batch, chunk, synchronised=False, ahead=ahead), before))
        features = self._encode(batch, last, synchronised=not early, ahead=early[0] if early else None)
        return [*encoded, _Encoded(features, _Snapshot(self.model))]

    def _encode(self, batch: _Batch, chunk: slice, *, synchronised: bool, ahead: slice | None = None) -> _Features:
        """Run the towers on a micro-batch.

        Args:
            batch: whose it is.
            chunk: its pairs.
            synchronised: its backward pass is the one that adds up all ranks'.
            ahead: the micro-batch that comes next.
        """
        images, tokens = batch.inputs(chunk, self.model.image_resolution)
        run, device = self.parallel if synchronised else self.model, self.model.device
        is_blank = chunk.start >= chunk.stop
        with tf32(device), autocast(device, self.precision), held_statistics(self.model) if is_blank else nullcontext():
            features: _Features = run(self._copied(images, chunk, batch, ahead), tokens)
        return features

    def _copied(self, images: Tensor, chunk: slice, batch: _Batch, ahead: slice | None) -> Tensor:
        """Bring a micro-batch's pixels to the device, and begin to copy those of the next one."""
        begun = self._begun.pop(chunk.start, None)
        pixels = to_device(images, self.model.device) if begun is None else begun[0]
        if self.copier is not None:
            if begun is not None:
                self.copier.finish(*begun)
            if ahead is not None and ahead.start < ahead.stop:
                self._begun[ahead.start] = self.copier.start(batch.images[ahead])
        return pixels

    def _loss(self, batch: _Batch, encoded: list[_Encoded]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return loss and accuracy of the whole batch, and the gradients of this rank's features."""
        num_pairs = len(batch.tokens)
        # new leaves: the graph ends here, and their gradients are what the replays take back; blank rows are cut off
        leaves = [
            torch.cat(parts).detach()[:num_pairs]  # [B, D]
            for parts in zip(*(micro_batch.features for micro_batch in encoded), strict=True)
        ]
        for leaf in leaves:
            leaf.requires_grad_()
        images, texts = leaves
        loss, accuracy = self.loss.with_accuracy(
            images, texts, self.model.logit_scale, self.model.logit_bias, **batch.ids()
        )
        self.scaler.scale(loss).backward()
        # DDP and FSDP divide the sum over the ranks by their number
        return loss.detach(), accuracy, [world_size() * leaf.grad for leaf in leaves if leaf.grad is not None]

    def _attempt(self, work: Callable[[], T], *, collective: bool) -> T:
        """Do work. If memory runs out in one rank, all repeat the step, unless the work has collectives in it.

        There the others wait for something that will not come, and only the end of the run frees them.
        """
        full = False
        try:
            result = work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            full = True
        # below the handler, which holds on to the tensors of what failed
        if collective and world_size() > 1:
            if full:
                raise MemoryError(f"out of memory in a collective: {WAYS_OUT}, or a lower --micro_batch_size")
            return result
        if any_rank(full):
            raise _MemoryFull
        return result


class _MemoryFull(Exception):  # noqa: N818  (an outcome, not an error)
    pass


_Features = tuple[Tensor, Tensor]


class _Encoded(NamedTuple):
    """Features of a micro-batch's images and texts, `[chunk, D]` each, and the state before they were computed."""

    features: _Features
    before: _Snapshot


class _Batch(NamedTuple):
    images: Tensor
    tokens: Tensor
    image_ids: Tensor | None
    caption_ids: Tensor | None

    def ids(self) -> dict[str, Tensor | None]:
        """Return what the loss needs to know which pairs are alike."""
        return {"image_ids": self.image_ids, "caption_ids": self.caption_ids}

    def inputs(self, chunk: slice, resolution: int) -> tuple[Tensor, Tensor]:
        """Return a micro-batch; where others have a pair and this rank has none, a blank one."""
        if chunk.start < chunk.stop:
            return self.images[chunk], self.tokens[chunk]
        images = self.images.new_zeros(1, *self.images.shape[1:]) if self.images.ndim > 1 else None
        blank = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8) if images is None else images
        return blank, self.tokens.new_zeros(1, *self.tokens.shape[1:])


class _Snapshot:
    """What running a model changes or draws from: random numbers and running statistics."""

    def __init__(self, model: Any) -> None:
        self.random = RandomState(model.device)
        self.statistics = StatisticsSnapshot(model)

    def restore(self) -> None:
        self.random.restore()
        self.statistics.restore()
