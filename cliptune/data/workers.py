"""Workers that load: as many as there is room for, and how they hand over what they have loaded.

A worker puts large tensors into shared memory, from which the main process takes them without a copy. Where that is
short (64 MB in a container, unless it is told otherwise), a tensor goes through a pipe instead, which takes longer and
needs no room. So nothing is lost, and nobody waits for it.
"""

from __future__ import annotations

import atexit
import errno
import logging
import mmap
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cliptune.runtime.messages import one_line
from cliptune.runtime.signals import leave_signals_to_main
from cliptune.runtime.stopping import KilledWorkerError

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
FILES_PER_WORKER = 10
"""Descriptors that the main process needs for each: its pipes and the tensors on their way."""
WORKER_BYTES = 1 << 16
"""Shared memory that each needs before it has loaded anything: a page for each lock of its queues."""
FILES_RESERVED = 32
"""Descriptors for all else that a process opens on the way: checkpoints, logs, figures, caches."""
SMALL_BYTES = 1 << 16
"""A tensor up to this size costs less in a pipe."""
FEWER_FILES = "try fewer --num_workers, or a higher limit (ulimit -n)"
IN_A_CONTAINER = "in a container, try docker run --shm-size=8g, or --ipc=host"

_said: set[str] = set()


def shared_number() -> Tensor:
    """Return an int64 scalar, 0, that workers see change; needs no room in `/dev/shm`."""
    # `share_memory_` would make a file in /dev/shm; a worker that is forked has this, and one that is not gets a tensor
    # in shared memory in its place when it is sent there
    return torch.frombuffer(mmap.mmap(-1, 8), dtype=torch.int64)[0]


def fitting_workers(num_workers: int, *, others: int = 0) -> int:
    """Return how many of these workers can be started here; say once why it is fewer.

    Args:
        num_workers: that are wanted.
        others: workers that will be started beside them, for which room is left.
    """
    if num_workers == 0:
        return 0
    try:
        multiprocessing.Lock()  # like all that queues to workers are made of, it lies in shared memory
        if _free_memory() < WORKER_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except (OSError, ImportError) as error:
        _say_once("no shared memory (%s), so no workers: the main process loads by itself; %s", error, IN_A_CONTAINER)
        return 0
    by_files = max(_free_descriptors() - FILES_RESERVED, 0) // FILES_PER_WORKER
    by_memory = _free_memory() // WORKER_BYTES
    found = min(num_workers, max(min(by_files, by_memory) - others, 0))
    if found < num_workers:
        what = "too few files may be open (ulimit -n)" if by_files <= by_memory else f"{SHARED_MEMORY} is too small"
        _say_once("%s for %d workers: going on with %d", what, num_workers, found)
    return found


def make_loader(
    dataset: Any,
    *,
    num_workers: int,
    batch_sampler: Iterable[list[Any]] | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    persistent: bool = False,
    own_random: bool = False,
) -> Loader:
    """Make a loader whose workers leave SIGINT and SIGTERM to the main process.

    Args:
        dataset: map-style, or an iterable one, which gives whole batches or shares the work itself.
        num_workers: at most; 0: the main process loads by itself.
        batch_sampler: indices of each batch.
        batch_size: of batches in the data set's order; None, without a `batch_sampler`: an item at a time.
        device: where the batches will be used; a GPU copies from pinned memory while it computes. None: nowhere.
        collate_fn: makes a batch of samples, or of what an item is where there are no batches; None: PyTorch's.
        persistent: keep the workers from one epoch to the next.
        own_random: draw the workers' seeds from a generator of its own, for a loader that another thread runs.

    Raises:
        KilledWorkerError: by the loader's iterator, once a worker is gone.
    """
    num_workers = fitting_workers(num_workers)
    if num_workers:
        dataset = (_Stream if isinstance(dataset, IterableDataset) else _Items)(dataset)
        collate_fn = partial(_hand_over, collate_fn or _as_it_is)
    return Loader(
        dataset,
        batch_size=1 if batch_sampler is not None else batch_size,  # 1 is how PyTorch says that it was not given
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=device is not None and device.type == "cuda",
        persistent_workers=persistent and num_workers > 0,
        worker_init_fn=_begin_worker,
        generator=torch.Generator() if own_random else None,
    )


class Loader(DataLoader[Any]):
    """A `DataLoader` that takes what `_hand_over` makes, and raises a worker's errors as they were there.

    It says that a worker was killed where its batch is waited for, and nowhere else. PyTorch raises at once, from a
    handler of SIGCHLD: in the middle of an update of the weights, which then could not be saved. Without the handler
    its iterator finds out by itself, within five seconds.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.persistent_workers:
            _kept.add(self)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._received() if self.num_workers else super().__iter__()

    def end_workers(self) -> None:
        """End workers that were kept; the next iteration starts others."""
        self._iterator = None

    def _received(self) -> Iterator[Any]:
        items = self._start()
        try:
            for item in items:
                if isinstance(item, _Failed):
                    items.close()  # left to the garbage collector, each worker takes 10 seconds to end
                    raise item.error
                yield _map_fields(item, _Piped, self._from_pipe)
                del item  # so that its memory is free for the next
        except RuntimeError as error:
            if "open files" in str(error) or "ancdata" in str(error):  # how PyTorch and Python say it
                raise OSError(f"too many open files: {FEWER_FILES}") from None
            raise

    def _start(self) -> Generator[Any]:
        takes_signals = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if takes_signals else None
        items: Any = self._iterator
        try:
            items = super().__iter__()  # persistent workers are waited for here
            if takes_signals:
                signal.signal(signal.SIGCHLD, before)
            yield from items
        # a tensor's memory is fetched from the worker that has put it there
        except (ConnectionError, EOFError, RuntimeError) as error:
            workers = items._workers if items is not None else ()
            is_of_pinning = str(error).startswith("Pin memory thread exited")  # which fetches them for a GPU
            if is_of_pinning and not any(worker.exitcode for worker in workers):
                raise OSError(f"probably too many open files: {FEWER_FILES}") from None
            is_of_worker = is_of_pinning or str(error).startswith("DataLoader worker (pid")
            if isinstance(error, RuntimeError) and not is_of_worker:
                raise
            # the others may wait for a lock that it held, and heed SIGTERM after half a minute only
            for worker in workers:
                worker.kill()
            raise KilledWorkerError from None

    def _from_pipe(self, piped: _Piped) -> Tensor:
        if piped.reason:
            _say_once("%s, so what workers load goes through pipes, which takes longer", piped.reason)
        tensor = torch.from_numpy(piped.content).view(piped.dtype)
        return tensor.pin_memory() if self.pin_memory else tensor


_kept: weakref.WeakSet[Loader] = weakref.WeakSet()


def end_kept_workers() -> None:
    """End the workers that any loader keeps for its next iteration, which would start others.

    Left to the garbage collector each takes 10 seconds to end, and half a minute where it gets SIGTERM at the end of
    the program.
    """
    for loader in list(_kept):
        loader.end_workers()


atexit.register(end_kept_workers)


@contextmanager
def no_workers_left() -> Iterator[None]:
    """End the workers that are kept when this is left, by an error as well."""
    try:
        yield
    finally:
        end_kept_workers()


class _Failed(NamedTuple):
    """What a worker gives in place of a batch. PyTorch's own way would put a traceback into the message."""

    error: Exception


class _Piped(NamedTuple):
    """A tensor that goes through a pipe."""

    content: NDArray[Any]
    """Its bytes, `[..., last dimension in bytes]`."""
    dtype: torch.dtype
    reason: str
    """Why it is not in shared memory; empty: it is small."""


class _Items(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _or_failed(lambda: self.dataset[index])

    def __getitems__(self, indices: list[int]) -> Any:
        return _or_failed(lambda: [self.dataset[index] for index in indices])


class _Stream(IterableDataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        items, end = iter(self.dataset), object()
        while (item := _or_failed(lambda: next(items, end))) is not end:
            yield item


def _or_failed(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (ValueError, OSError, MemoryError) as error:
        kind = next(kind for kind in (ValueError, OSError, MemoryError) if isinstance(error, kind))
        return _Failed(kind(one_line(error)))  # others may need more than a message to be made in the main process


def _hand_over(collate: Callable[[Any], Any], samples: Any) -> Any:
    """Make a batch, in a worker, and prepare its tensors for their way."""
    return samples if isinstance(samples, _Failed) else _map_fields(collate(samples), Tensor, _prepared)


def _as_it_is(item: Any) -> Any:
    return item


def _map_fields(item: Any, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """Change the fields of a named tuple that are of some kind, and those of named tuples in it."""
    if not hasattr(item, "_fields"):
        return item
    return item._replace(
        **{
            name: change(value) if isinstance(value, kind) else _map_fields(value, kind, change)
            for name, value in item._asdict().items()
        }
    )


def _prepared(tensor: Tensor) -> Tensor | _Piped:
    reason = ""
    if tensor.nbytes > SMALL_BYTES:
        reason = _why_not_shared(tensor.nbytes)
        if not reason:
            try:
                tensor.share_memory_()
                return tensor
            except RuntimeError as error:  # another worker was faster
                reason = one_line(error)
    return _Piped(tensor.contiguous().view(torch.uint8).numpy(), tensor.dtype, reason)


def _why_not_shared(num_bytes: int) -> str:
    """Say what there is too little of to put a tensor into shared memory; nothing if there is enough."""
    free = _free_memory()
    if free < 4 * num_bytes:  # other workers, ranks and programs look at the same number
        return f"only {free / 1e6:.0f} MB are free in {SHARED_MEMORY} ({IN_A_CONTAINER})"
    return "" if _free_descriptors() >= FILES_PER_WORKER else "few files may be open (ulimit -n)"


def _free_memory() -> int:
    """Return how many bytes of shared memory are free; a large number where the system does not say, as macOS."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 1 << 60


def _free_descriptors() -> int:
    """Count the files that this process may still open; a large number where the system does not say."""
    try:
        import resource  # noqa: PLC0415  (not on Windows)

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return 1 << 30 if limit == resource.RLIM_INFINITY else limit - len(os.listdir("/dev/fd"))  # noqa: PTH208
    except (ImportError, OSError) as error:
        return 0 if getattr(error, "errno", None) == errno.EMFILE else 1 << 30


def _begin_worker(worker_id: int) -> None:
    leave_signals_to_main(worker_id)
    threading.Thread(target=_end_with_main, daemon=True).start()
    # what fails on its way out is dropped by Python with a traceback, and the main process would wait for it for ever;
    # it sees a worker that ends
    Queue._on_queue_feeder_error = staticmethod(_leave)  # type: ignore[attr-defined]


def _end_with_main() -> None:
    """Leave once the main process is gone; a full pipe that nobody reads any more would hold a worker for ever."""
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


def _leave(error: Exception, _: Any) -> None:
    if not isinstance(error, ConnectionError):  # the main process is gone
        logger.error("a worker cannot hand over what it has loaded: %s", one_line(error))
    os._exit(1)


def _say_once(message: str, *arguments: Any) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message, *arguments)
