"""Towers and blocks as programs of `torch.compile`, until the compiler fails on one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cliptune.runtime.device import is_out_of_memory
from cliptune.runtime.messages import one_line

logger = logging.getLogger(__name__)


class Compiler:
    """What both towers of a model are compiled by; where it fails on one part, all go on without it.

    Attributes:
        has_failed: it has failed on a part of the model.
    """

    has_failed = False

    def run_tower(self, function: Callable[..., Tensor], module: nn.Module, *given: Any) -> Tensor:
        """Run a function of a tower and its inputs as a compiled program, or as it is."""
        try:
            return _run_compiled(function, module, *given)
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_out_of_memory(error):  # of what else is there while it compiles: who tries less compiles again
                raise
            self._give_up(error)
        return function(module, *given)

    def of_block(self, function: Callable[..., Tensor], *, dynamic: bool | None) -> Callable[..., Tensor]:
        """Return what runs a function of a block and its inputs, as a compiled program or as it is, both times alike.

        A checkpointed block runs again in the backward pass, and must then keep the tensors that it kept before: also
        where the compiler has failed on another block in between.
        """
        if self.has_failed:
            return function
        chosen = _program(function, dynamic=dynamic)

        def run(*given: Any) -> Tensor:
            nonlocal chosen
            try:
                return chosen(*given)
            except torch._dynamo.exc.TorchDynamoException as error:
                if is_out_of_memory(error):
                    raise
                self._give_up(error)
            chosen = function
            return chosen(*given)

        return run

    def _give_up(self, error: Exception) -> None:
        logger.warning("the compiler fails on this model (%s); going on without", one_line(error))
        self.has_failed = True


def _run_compiled(function: Callable[..., Tensor], module: nn.Module, *given: Any) -> Tensor:
    """Run a tower as a compiled program, which is one for all sizes of batches.

    A program of fixed sizes would be faster by little, and a last smaller batch, or a micro-batch that is halved when
    memory runs out, would be compiled anew, for as long as a minute.
    """
    for value in given:
        if isinstance(value, Tensor):
            # pixels have fixed sides; whether a position is used is told by batch and length
            torch._dynamo.maybe_mark_dynamic(value, (0, 1) if value.dtype == torch.bool else 0)
    with backward_at_once():
        return _program(function)(module, *given)


@contextmanager
def backward_at_once() -> Iterator[None]:
    """Compile a backward pass with its forward pass: here a compiler that fails can be left, and a signal is heard."""
    from torch._functorch import config as settings  # noqa: PLC0415  (PyTorch brings it with the compiler)

    if not hasattr(settings, "force_non_lazy_backward_lowering"):  # an older PyTorch
        yield
        return
    with settings.patch(force_non_lazy_backward_lowering=True):
        yield


@cache
def _program(function: Callable[..., Tensor], *, dynamic: bool | None = None) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=dynamic)
