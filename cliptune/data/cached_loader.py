"""Batches of images that are cached already: read by threads straight into a batch's memory, a batch ahead.

Of a cached image nothing is left to compute, so what counts is how often its bytes are copied: here once, from the
system's cache of the disk into the memory that a GPU copies from. A worker process would copy them three times (to an
image, to a piece of a batch, to the batch) and the interpreter would run for each image. Threads do, since the copy and
the checksum run without the interpreter's lock. The file is read, not mapped into memory, see `RowStore.read`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cliptune.data.caption_table import caption_table
from cliptune.data.issues import Issue, image_issue
from cliptune.data.loaders import PIECE_SIZE, Batch, SampleDataset, TrainLoader, pinned
from cliptune.data.row_store import ImageCache
from cliptune.data.table import IntArray
from cliptune.preprocess.resize import Pixels
from cliptune.runtime.distributed import rank_slice

MAX_MISSING = 0.02
"""Fraction of the images that may not be cached yet: a thread decodes them, one at a time, where workers would at once.
Some cannot be read, and never are."""
AHEAD_BYTES = 1 << 30
"""A batch of more is not read ahead: two of them would be in memory."""


class CachedDataset(SampleDataset, Protocol):
    """What is needed of a data set, such as `data_loader.ImageTextDataset`."""

    cache: ImageCache | None


class _Reading(NamedTuple):
    """A batch that is being read."""

    image_indices: IntArray
    """`[B]`."""
    caption_indices: IntArray
    """`[B]`."""
    images: Tensor
    """uint8 `[B, R, R, 3]`."""
    parts: list[Future[list[Issue | None]]]
    """What is wrong with each of its images, piece by piece."""


class CachedReader:
    """Reads batches of a data set that caches images.

    Args:
        dataset: has a cache, whose images are final.
        num_threads: that read; 0 counts as 1.
        device: where the batches will be used: for a GPU they are in pinned memory.
    """

    def __init__(self, dataset: CachedDataset, *, num_threads: int, device: torch.device) -> None:
        assert dataset.cache is not None
        self.dataset, self.cache = dataset, dataset.cache
        self.num_threads = num_threads
        self.pin_memory = device.type == "cuda"
        self.captions = caption_table(dataset.pairs, dataset.context_length)
        self._decoding = threading.Lock()

    def is_ready(self) -> bool:
        """Tell whether nearly all images are cached, by whichever run."""
        return self.cache.count_missing() <= MAX_MISSING * len(self.dataset.pairs)

    def batches(self, items_of: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Yield a batch for each list of items: as samples give it, but pixels lie in memory with the channels last."""
        waiting: deque[_Reading] = deque()
        pool = ThreadPoolExecutor(max(self.num_threads, 1), thread_name_prefix="cached images")
        try:
            for items in items_of:
                waiting.append(self._begin(np.array(items, dtype=np.int64), pool))
                ahead = int(waiting[-1].images.nbytes <= AHEAD_BYTES)
                while len(waiting) > ahead:
                    yield self._finish(waiting.popleft())
            while waiting:
                yield self._finish(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(self, items: IntArray, pool: ThreadPoolExecutor) -> _Reading:
        image_indices, caption_indices = self.dataset.choose(items)
        side = self.cache.transform.resolution
        images = torch.empty(len(items), side, side, 3, dtype=torch.uint8, pin_memory=self.pin_memory)
        pixels, parts = images.numpy(), []
        for start in range(0, len(items), PIECE_SIZE):
            piece = slice(start, start + PIECE_SIZE)
            parts.append(pool.submit(self._read, image_indices[piece], caption_indices[piece], pixels[piece]))
        return _Reading(image_indices, caption_indices, images, parts)

    def _read(self, image_indices: IntArray, caption_indices: IntArray, pixels: Pixels) -> list[Issue | None]:
        """Read images to their place `[n, R, R, 3]`, in a thread; return what is wrong with each."""
        self.captions.tokens(caption_indices)  # here, since it may take longer than the images
        paths = [self.dataset.pairs.paths[index] for index in image_indices.tolist()]
        issues: list[Issue | None] = [None] * len(paths)
        for number in np.flatnonzero(~self.cache.load_many(paths, pixels)).tolist():
            try:
                with self._decoding:  # `load` may write, and is made for one thread
                    pixels[number] = self.cache.load(paths[number])[0]
            except (ValueError, OSError) as error:
                issues[number] = image_issue(paths[number], error)
        return issues

    def _finish(self, reading: _Reading) -> Batch:
        found = [issue for part in reading.parts for issue in part.result()]
        image_indices, caption_indices, images, _ = reading
        if issues := [issue for issue in found if issue is not None]:
            readable = np.array([issue is None for issue in found])
            image_indices, caption_indices = image_indices[readable], caption_indices[readable]
            images = images[torch.from_numpy(readable)]
        images = images.permute(0, 3, 1, 2)  # [B, 3, R, R], not copied
        ids = torch.from_numpy(image_indices), self.captions.ids(caption_indices), torch.from_numpy(caption_indices)
        batch = Batch(images, self.captions.tokens(caption_indices), ids[0], issues, *ids[1:])
        return pinned(batch) if self.pin_memory else batch


class CachedLoader(TrainLoader):
    """A `TrainLoader` of a data set that caches images: once they are cached, an epoch needs no workers.

    Until then, and with a random transform, which has work to do for each image, it is what `TrainLoader` is.

    Args:
        dataset: caches images.
        options: as `TrainLoader` takes them; there are as many threads as workers.
    """

    def __init__(self, dataset: CachedDataset, *, num_workers: int, device: torch.device, **options: Any) -> None:
        super().__init__(dataset, num_workers=num_workers, device=device, **options)
        self._reader = reader_of(dataset, num_threads=num_workers, device=device)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield what `TrainLoader.epoch` yields."""
        if self._reader is None or not self._reader.is_ready():
            yield from super().epoch(epoch, start=start)
            return
        self.loader.end_workers()
        self.batches.epoch, self.batches.start = epoch, start
        self.dataset.set_epoch(epoch)
        yield from self._reader.batches(items[rank_slice(len(items))] for items in self.batches)


def reader_of(dataset: Any, *, num_threads: int, device: torch.device) -> CachedReader | None:
    """Return what reads a data set's cached images, or None if it caches none, or none that are final."""
    cache = getattr(dataset, "cache", None)
    if cache is None or not cache.transform.is_final:
        return None
    return CachedReader(dataset, num_threads=num_threads, device=device)
