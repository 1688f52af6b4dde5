"""Whether what runs is being turned into something else: a program for other inputs, or another function."""

from __future__ import annotations

import torch


def is_recorded() -> bool:
    """Tell whether what runs becomes a program that will see other inputs, or another function.

    Then nothing may depend on the values of the example, and no tensor that is made may be kept: it is a stand-in.
    """
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or is_transformed()


def is_transformed() -> bool:
    """Tell whether a transform of `torch.func` is at work, which knows no fused kernels."""
    # the state is private; `autograd.Function` asks for it in the same way
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())
