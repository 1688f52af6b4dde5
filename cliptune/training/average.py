"""A moving average of the weights (EMA), which is evaluated and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cliptune.model.parallel import is_sharded


class WeightAverage:
    """The average of a model's trained parameters over the steps; running statistics are the model's own.

    After step t (from 1) the average is d times the one before and 1 - d times the weights, d = min(decay, (1 + t) /
    (10 + t)): with the whole decay from the start, a run of a few hundred steps would keep the weights it began with.
    TensorFlow's `ExponentialMovingAverage` warms up like this.

    Args:
        model: on its device.
        decay: of the average, below 1.

    Raises:
        ValueError: a sharded model, which would not run with what is put in place of its shards.
    """

    def __init__(self, model: Any, decay: float) -> None:
        if is_sharded(model):
            raise ValueError("ema does not go with a sharded model (FSDP); try ddp, or no ema")
        self.decay = decay
        self._trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int, *, unless: Tensor) -> None:
        """Take in the weights after a step; `unless` is a boolean scalar on their device: the step was skipped."""
        decay = min(self.decay, (1 + step) / (10 + step))
        fraction = (1 - decay) * (~unless).float()
        for name, average in self.tensors.items():
            average.lerp_(self._trained[name].detach(), fraction)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model have the average in place of its weights; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._trained.items():
            parameter.data, self.tensors[name] = self.tensors[name], parameter.data

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from stored `tensors`.

        Raises:
            ValueError: they are of other parameters.
        """
        if {name: value.shape for name, value in tensors.items()} != {
            name: value.shape for name, value in self.tensors.items()
        }:
            raise ValueError("an average of other parameters")
        for name, value in tensors.items():
            self.tensors[name].copy_(value)
