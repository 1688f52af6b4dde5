"""What comes next, made ready by a thread while the present is worked on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")

END_SECONDS = 10
"""How long the end of the thread is waited for."""


def one_ahead(make: Callable[[Callable[[], bool]], Iterator[T]]) -> Iterator[T]:
    """Yield what an iterator gives, in its order; a thread runs it, one item ahead at most.

    Args:
        make: makes the iterator, in that thread, of a function that tells whether nobody waits for it any more: it
            ends then as soon as it can.

    Raises:
        What the iterator raises, where its item is due.
    """
    wanted: SimpleQueue[None] = SimpleQueue()
    ready: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    stop = threading.Event()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    thread = threading.Thread(target=_work, args=(make, wanted, ready, stop, gpu), name="one ahead", daemon=True)
    thread.start()
    wanted.put(None)
    try:
        while True:
            kind, item = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            wanted.put(None)  # the next one, while this one is used
            yield item
            del item
    finally:
        stop.set()
        wanted.put(None)
        thread.join(END_SECONDS)


def _work(
    make: Callable[[Callable[[], bool]], Iterator[Any]],
    wanted: SimpleQueue[None],
    ready: SimpleQueue[tuple[str, Any]],
    stop: threading.Event,
    gpu: int | None,
) -> None:
    if gpu is not None:
        torch.cuda.set_device(gpu)  # a thread begins with the first one, and would take memory there
    try:
        items, end = make(stop.is_set), object()
        while True:
            wanted.get()
            if stop.is_set():
                break
            ready.put(("item", item) if (item := next(items, end)) is not end else ("end", None))
            if item is end:
                break
            del item  # whoever takes it frees it
        if hasattr(items, "close"):
            items.close()
    except BaseException as error:
        ready.put(("error", error))
