"""A thread that works beside a run's steps, and copies for it of tensors that the steps change."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cliptune.runtime.device import free_memory, local_world_size

logger = logging.getLogger(__name__)

K = TypeVar("K")


class BackgroundThread:
    """Does one piece of work at a time; an error in it is raised, as it is, where the next is begun or it is asked for.

    Args:
        name: of the thread, as debuggers show it.
    """

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name)  # none is started before there is work
        self._work: Future[Any] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether it works."""
        return self._work is not None and not self._work.done()

    def start(self, work: Callable[[], Any]) -> None:
        """Begin, once the work before is done; raises what that raised."""
        self.wait()
        self._work = self._threads.submit(work)

    def check(self) -> None:
        """Raise what the work raised, if it is done; waits for nothing."""
        if not self.is_busy:
            self.wait()

    def wait(self) -> None:
        """Wait until there is nothing to do; raises what the work raised, once."""
        work, self._work = self._work, None
        if work is not None:
            work.result()


class HostCopies:
    """Copies states to main memory, where the steps that follow do not change them.

    From a GPU they are copied by its current stream into pinned memory, which PyTorch keeps and uses again: what the
    device computes next waits for the copy, the caller does not. Such a copy is whole after `wait`.

    Args:
        fixed: names of the tensors in `model_state_dict` that never change: copied once, on the CPU not at all.
    """

    def __init__(self, fixed: Collection[str] = ()) -> None:
        self._fixed = fixed
        self._of_fixed: dict[str, Tensor] = {}
        self._event: torch.cuda.Event | None = None

    def take(self, states: Mapping[K, dict[str, Any]]) -> dict[K, dict[str, Any]]:
        """Copy states; what several of them share, their copies share."""
        memo: dict[int, Any] = {}
        copies: dict[Any, Tensor] = {}
        for state in states.values():
            for name in self._fixed:
                tensor = state["model_state_dict"][name]
                if name not in self._of_fixed:
                    self._of_fixed[name] = tensor if tensor.device.type == "cpu" else _on_host(tensor)
                memo[id(tensor)] = self._of_fixed[name]
        tensors = [leaf for leaf in tree_leaves(list(states.values())) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if id(tensor) not in memo:
                # two state dicts of one model are other objects around the same memory
                key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
                memo[id(tensor)] = copies[key] = copies[key] if key in copies else _on_host(tensor)
        self._record(tensors)
        return copy.deepcopy(dict(states), memo)  # what is in the memo counts as copied already

    def wait(self) -> None:
        """Wait until the copies are whole; in any thread."""
        if self._event is not None:
            with torch.cuda.device(self._event.device):  # a thread begins with the first, and takes memory there
                self._event.synchronize()

    def _record(self, tensors: list[Tensor]) -> None:
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is not None:
            event = torch.cuda.Event(blocking=True)  # the waiting thread sleeps
            event.record(torch.cuda.current_stream(device))
            self._event = event  # after it is recorded: until then nothing waits for it


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    # to pinned memory, without waiting; on other devices than CUDA's nobody would know when it is there
    return tensor.detach().to("cpu", non_blocking=tensor.is_cuda)


def has_room_for_copies(states: Mapping[K, dict[str, Any]]) -> bool:
    """Tell whether main memory has room for copies of states: two may wait, and pinned memory goes by powers of two."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(list(states.values())) if isinstance(leaf, Tensor)]
    num_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    # the main rank alone makes one
    return free_memory(torch.device("cpu")) * local_world_size() > 4 * num_bytes


@contextmanager
def no_forks() -> Iterator[None]:
    """Let who wants to fork the process wait for the enclosed work of another thread.

    A loader's worker, forked in the middle of a product, would inherit locks that nobody in it gives back.
    """
    with _fork_lock():
        yield


@cache
def _fork_lock() -> threading.RLock:
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
