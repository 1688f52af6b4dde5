"""Pixels on their way to the GPU while it computes: those of the next batch are copied during the step before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cliptune.runtime.device import is_out_of_memory

logger = logging.getLogger(__name__)

MAX_FRACTION = 0.02
"""Of a GPU's memory that the pixels of a batch may take to be copied ahead: for a while two batches are there. A step
on more pixels takes so long that copying them at its start does not show."""


class Copier(Protocol):
    """Copies to a device beside what it computes."""

    def start(self, images: Tensor) -> tuple[Tensor, Any]:
        """Begin a copy; return where it will be, and what `finish` needs."""

    def finish(self, copied: Tensor, begun: Any) -> None:
        """Let what the device computes from now on wait for a copy."""


class SideStream:
    """A stream of a CUDA device for copies alone.

    Args:
        device: to which pinned memory is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, images: Tensor) -> tuple[Tensor, Any]:
        """See `Copier`."""
        with torch.cuda.stream(self.stream):
            copied = images.to(self.device, non_blocking=True)
            return copied, self.stream.record_event()

    def finish(self, copied: Tensor, begun: Any) -> None:
        """See `Copier`."""
        main = torch.cuda.current_stream(self.device)
        main.wait_event(begun)
        # it is of the side stream's memory, which must not be given to a later copy while the main one still reads it
        copied.record_stream(main)


class _Copied(NamedTuple):
    batch: Any
    begun: Any


def fed(batches: Iterable[Any], device: torch.device, *, is_whole: Callable[[Tensor], bool]) -> Iterator[Any]:
    """Yield batches whose `images` are on the GPU already; elsewhere they are what they were.

    The rest of a batch stays where it is: the shapes of packed texts and the names of images are wanted on the CPU, and
    a GPU that is asked for them would have to be waited for.

    Args:
        batches: named tuples with `images`, uint8 or float, in pinned memory.
        device: where the model is.
        is_whole: tells which images go through the model at once; others stay in main memory, from which the step
            takes a micro-batch at a time.
    """
    if device.type != "cuda":
        return iter(batches)
    most = MAX_FRACTION * torch.cuda.get_device_properties(device).total_memory
    return copied_ahead(
        batches, SideStream(device), is_wanted=lambda images: is_whole(images) and images.nbytes <= most
    )


def copied_ahead(batches: Iterable[Any], copier: Copier, *, is_wanted: Callable[[Tensor], bool]) -> Iterator[Any]:
    """Yield batches in their order, with the images that are wanted copied; the copy of one more has begun by then.

    Args:
        batches: as `fed` takes them; closed when this ends, if they can be.
        copier: copies.
        is_wanted: tells which images to copy.
    """
    iterator = iter(batches)
    try:
        waiting: list[_Copied] = []
        has_room = True
        for batch in iterator:
            begun = None
            if has_room and is_wanted(batch.images):
                batch, begun = _begin(batch, copier)  # noqa: PLW2901
                has_room = begun is not None
            waiting.append(_Copied(batch, begun))
            del batch
            # one that is not copied does not wait: two large ones would be in main memory
            while len(waiting) > (begun is not None):
                yield _finished(waiting.pop(0), copier)
        while waiting:
            yield _finished(waiting.pop(0), copier)
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _begin(batch: Any, copier: Copier) -> tuple[Any, Any]:
    try:
        images, begun = copier.start(batch.images)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.info("the GPU has no room for the next batch: from here on each is copied when its step begins")
        return batch, None
    return batch._replace(images=images), begun


def _finished(copied: _Copied, copier: Copier) -> Any:
    if copied.begun is not None:
        copier.finish(copied.batch.images, copied.begun)
    return copied.batch
