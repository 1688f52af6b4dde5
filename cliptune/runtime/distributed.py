"""The ranks of a run, and their collectives.

`torchrun` starts a process for each rank. Without it the world has size one: nothing is initialised, and collectives
give back what they were given.
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

from cliptune.runtime.device import local_world_size, number_of_torchrun, resolve_device
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


def rank() -> int:
    """Return which process of the run this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many ranks the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this is the rank that writes files and reports."""
    return rank() == 0


def rank_device(name: str) -> torch.device:
    """Turn a device's name into this rank's own: on a machine with several GPUs each rank takes its own.

    Raises:
        ValueError: no such device, or too few GPUs for the ranks of this machine.
    """
    device = resolve_device(name)
    local_ranks = local_world_size()
    if local_ranks == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(f"--device {name}: {local_ranks} ranks cannot share one device; try cuda or cpu")
    found = torch.cuda.device_count()
    if found < local_ranks:
        raise ValueError(f"{local_ranks} ranks on this machine, but {count(found, 'GPU')}: lower --nproc_per_node")
    return torch.device("cuda", number_of_torchrun("LOCAL_RANK", below=local_ranks))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the ranks that `torchrun` started; without it, only make the device the current one.

    An error leaves at once, without waiting for the others: their next collective fails, or `torchrun` ends them.
    """
    if device.type == "cuda" and device.index is not None:  # threads and libraries go by the current one
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    number_of_torchrun("RANK", below=number_of_torchrun("WORLD_SIZE", least=1))
    if "MASTER_PORT" in os.environ:
        number_of_torchrun("MASTER_PORT", below=2**16)
    # two backends: numbers of the host go over gloo, so that agreeing on them waits for no GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield
    dist.barrier()
    dist.destroy_process_group()


def all_sum(values: Tensor) -> Tensor:
    """Add up all ranks' tensors of the same shape, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_max(values: Tensor) -> Tensor:
    """Take the largest of all ranks' tensors, element by element, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def all_min(values: Tensor) -> Tensor:
    """Take the smallest of all ranks' tensors, element by element, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MIN)
    return values


def any_rank(flag: bool) -> bool:
    """Tell whether it is so in any rank; a GPU is not waited for."""
    return bool(all_max(torch.tensor(int(flag))).item())


def gather_sizes(size: int) -> list[int]:
    """Return the size that each rank gives, in their order; a GPU is not waited for."""
    if not dist.is_initialized():
        return [size]
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = size
    gathered: list[int] = all_sum(sizes).tolist()
    return gathered


def gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Put all ranks' rows one after another.

    Args:
        rows: `[n, ...]`; n may differ from rank to rank.
        sizes: how many each has, if that is known.

    Returns:
        `[sum of all n, ...]`, without a gradient.
    """
    if not dist.is_initialized():
        return rows.detach()
    sizes = gather_sizes(len(rows)) if sizes is None else sizes
    # all_gather takes equal shapes alone: sizes (3, 1) become (3, 3) on the way
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def broadcast(values: T) -> T:
    """Return what the main rank has; plain values."""
    if not dist.is_initialized():
        return values
    holder = [values]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_values(values: T) -> list[T]:
    """Return what each rank has, in their order; plain values."""
    if not dist.is_initialized():
        return [values]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, values)
    return parts


def rank_slice(num_items: int) -> slice:
    """Return which of the items that all have are this rank's: consecutive, as many as the others' to within one."""
    # 10 items, 3 ranks: [0:3], [3:6], [6:10]
    return slice(rank() * num_items // world_size(), (rank() + 1) * num_items // world_size())


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def copy_weights(model: nn.Module) -> None:
    """Give every rank the main one's parameters and buffers."""
    if dist.is_initialized():
        for value in (*model.parameters(), *model.buffers()):
            dist.broadcast(value.detach(), src=0)


def average(buffers: Sequence[Tensor]) -> None:
    """Give every rank the mean of all ranks' buffers, in place; whole numbers stay."""
    for buffer in buffers:
        if buffer.is_floating_point():
            all_sum(buffer).div_(world_size())


@contextmanager
def main_first() -> Iterator[None]:
    """Let one rank of each machine do the enclosed work before the others, who then find it done."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    yield
    if first:
        barrier()
