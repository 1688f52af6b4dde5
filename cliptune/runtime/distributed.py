"""Several processes as one run: who is who, and what they exchange.

`torchrun` starts the processes and tells each its number. Without it a run is one process: then nothing is initialised,
and every exchange below gives back what it was given.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cliptune.runtime.device import resolve_device

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes are one run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this is the process that writes files and reports."""
    return rank() == 0


def rank_device(name: str) -> torch.device:
    """Turn a device's name into this process's own: on a machine with several GPUs each process takes its own.

    Raises:
        ValueError: no such device, or too few GPUs for the processes of this machine.
    """
    device = resolve_device(name)
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_processes == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(f"--device {name}: {local_processes} processes cannot share one device; use cuda or cpu")
    found = torch.cuda.device_count()
    if found < local_processes:
        raise ValueError(f"{local_processes} processes on this machine, but {found} GPU(s): lower --nproc_per_node")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started; without it, do nothing.

    An error leaves at once, without waiting for the others: their next exchange fails, or `torchrun` ends them.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield
    dist.barrier()
    dist.destroy_process_group()


def all_sum(values: Tensor) -> Tensor:
    """Add up every process's tensor of the same shape, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_max(values: Tensor) -> Tensor:
    """Take the largest of every process's tensor, element by element, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def all_min(values: Tensor) -> Tensor:
    """Take the smallest of every process's tensor, element by element, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MIN)
    return values


def any_rank(flag: bool) -> bool:
    """Tell whether it is so in any process; a GPU is not waited for."""
    return bool(all_max(torch.tensor(int(flag))).item())


def gather_sizes(size: int) -> list[int]:
    """Return the number that each process gives, in their order; a GPU is not waited for."""
    if not dist.is_initialized():
        return [size]
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = size
    numbers: list[int] = all_sum(sizes).tolist()
    return numbers


def gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Put every process's rows one after another.

    Args:
        rows: `[n, ...]`; n may differ from process to process.
        sizes: how many each has, if that is known.

    Returns:
        `[sum of all n, ...]`, without a gradient.
    """
    if not dist.is_initialized():
        return rows.detach()
    sizes = gather_sizes(len(rows)) if sizes is None else sizes
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def broadcast(values: T) -> T:
    """Return what the main process has; plain values."""
    if not dist.is_initialized():
        return values
    holder = [values]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_values(values: T) -> list[T]:
    """Return what each process has, in their order; plain values."""
    if not dist.is_initialized():
        return [values]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, values)
    return parts


def rank_slice(num_items: int) -> slice:
    """Return which of the items that all have are this process's: consecutive, as many as the others' to within one."""
    return slice(*(number * num_items // world_size() for number in (rank(), rank() + 1)))


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def copy_weights(model: nn.Module) -> None:
    """Give every process the main one's parameters and buffers."""
    if dist.is_initialized():
        for value in (*model.parameters(), *model.buffers()):
            dist.broadcast(value.detach(), src=0)


def average(buffers: Sequence[Tensor]) -> None:
    """Give every process the mean of all processes' buffers, in place; whole numbers stay."""
    for buffer in buffers:
        if buffer.is_floating_point():
            all_sum(buffer).div_(world_size())


@contextmanager
def main_first() -> Iterator[None]:
    """Let one process of each machine do the enclosed work before the others, who then find it done."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    yield
    if first:
        barrier()
