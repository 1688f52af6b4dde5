"""Running statistics of BatchNorm, which running a model in training changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class StatisticsSnapshot:
    """A copy of a module's running statistics, to put back."""

    def __init__(self, module: nn.Module) -> None:
        self._before = [(buffer, buffer.clone()) for buffer in running_statistics(module)]

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Put them back; `where` is a boolean scalar on their device: only if it is true, which is not waited for."""
        for buffer, before in self._before:
            buffer.copy_(before if where is None else torch.where(where, before, buffer))


@contextmanager
def held_statistics(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are, whatever runs inside."""
    before = StatisticsSnapshot(module)
    try:
        yield
    finally:
        before.restore()


def running_statistics(module: nn.Module) -> list[Tensor]:
    """List the buffers that running the module changes: those of BatchNorm in training."""
    kind = nn.modules.batchnorm._BatchNorm  # the base of all its forms
    norms = (layer for layer in module.modules() if isinstance(layer, kind) and layer.training)
    return [buffer for norm in norms for buffer in norm.buffers()]
