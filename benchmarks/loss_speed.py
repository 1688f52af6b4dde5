"""The loss of a large batch with its gradient, ours against the usual ways, turn by turn on the same features.

python benchmarks/loss_speed.py --device cuda --sizes 4096,16384,65536

`whole` is PyTorch's own: all logits at once, a cross-entropy each way. `recomputed` is how losses save memory that
leave the gradient to autograd: slices of the logits, each computed again in the backward pass.
"""

from __future__ import annotations

import argparse
import functools
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import SKIPPED, Row, tell
from benchmarks.timing import ratio, take_turns
from cliptune.runtime.device import is_out_of_memory, resolve_device
from cliptune.training.loss import ContrastiveLoss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(argv: list[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    options = parse(argv)
    for size in map(int, options.sizes.split(",")):
        measure(size, options)
    return 0


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sizes", default="4096,8192", help="pairs of the batches")
    parser.add_argument("--dim", type=int, default=512, help="length of a feature")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def measure(size: int, options: Namespace) -> None:
    """Time every way on one batch; a way whose memory does not suffice is told so."""
    device = resolve_device(options.device)
    torch.manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(size, options.dim, device=device), dim=-1).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(3.0, device=device, requires_grad=True)
    cases: dict[str, Callable[[], object]] = {}
    gradients: dict[str, Tensor] = {}
    for name, loss in WAYS.items():
        case = functools.partial(run, loss, images, texts, scale)
        try:
            gradients[name] = case()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tell(Row(f"{size:,} pairs: {name}", state=SKIPPED, note="does not fit into memory"))
        else:
            cases[name] = case
    for name, gradient in gradients.items():
        if name != "ours" and "ours" in gradients:
            apart = ((gradient - gradients["ours"]).norm() / gradient.norm()).item()
            tell(Row(f"{size:,} pairs: gradient against {name}'s", apart, must=1e-4, higher=False, check=True))
    timings = take_turns(cases, repeats=options.repeats, device=options.device)
    for name, timing in timings.items():
        tell(Row(f"{size:,} pairs: {name}", 1000 * timing.median, "ms", note=f"spread {timing.spread:.0%}"))
        if name != "ours" and "ours" in timings:
            tell(Row(f"{size:,} pairs: {name} over ours", ratio(timings, "ours", name), "times"))


def run(loss: Loss, images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Compute a loss and its gradient; return that of the images, `[B, D]`."""
    images.grad = texts.grad = scale.grad = None
    loss(images, texts, scale).backward()
    assert images.grad is not None
    return images.grad


def whole(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Compute all logits at once."""
    logits = scale.exp() * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def recomputed(images: Tensor, texts: Tensor, scale: Tensor, *, rows: int = 4096) -> Tensor:
    """Compute slices of the logits, and each once more for its gradient."""
    parts = [checkpoint(_slice_sums, own, texts, scale, use_reentrant=False) for own in images.split(rows)]
    row_sums, column_sums = torch.cat([row for row, _ in parts]), torch.stack([column for _, column in parts])
    diagonal = scale.exp() * (images * texts).sum(1)
    return ((row_sums + column_sums.logsumexp(0)) / 2 - diagonal).mean()


def _slice_sums(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    logits = scale.exp() * images @ texts.T  # [rows, B]
    return logits.logsumexp(1), logits.logsumexp(0)


WAYS: dict[str, Loss] = {"ours": ContrastiveLoss(), "whole": whole, "recomputed": recomputed}


if __name__ == "__main__":
    sys.exit(main())
