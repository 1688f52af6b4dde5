"""Ranks without processes: what a rank does by itself, one after another."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    """Let PyTorch say that this process is a rank of several; collectives do not work."""
    with mock.patch.multiple(
        "torch.distributed",
        is_initialized=lambda: True,
        get_rank=lambda: rank,
        get_world_size=lambda: world_size,
    ):
        yield
