"""The loss of a large batch with its gradient, ours against the usual ways, turn by turn on the same features.

python benchmarks/loss_speed.py --device cuda --sizes 4096,16384,65536

`whole` is PyTorch's own: all logits at once, a cross-entropy each way. `recomputed` is how losses save memory that
leave the gradient to autograd: slices of the logits, each computed again in the backward pass. `tiles` is how
memory-efficient losses do it (Cheng et al. 2024, Inf-CL): tiles of the logits, a maximum and a sum of each row and
column that are carried from tile to tile, and the tiles once more for the gradient. The three products, logits and
both gradients, are what no way can do without; `ours` also counts the in-batch accuracy, which the others do not.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

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
    cases[PRODUCTS] = functools.partial(products, images.detach(), texts.detach())
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


class _Tiles(torch.autograd.Function):
    """Two passes over tiles of `side` rows and columns: sums, then gradients."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, logit_scale: Tensor, side: int) -> Tensor:
        scale, num_pairs = logit_scale.exp(), len(images)
        spans = [slice(start, min(start + side, num_pairs)) for start in range(0, num_pairs, side)]
        tiles = [(rows, columns) for rows in spans for columns in spans]
        scaled = scale * images
        of_rows, of_columns = _OnlineSums(images), _OnlineSums(images)
        for rows, columns in tiles:
            logits = scaled[rows] @ texts[columns].T  # [side, side]
            of_rows.add(rows, logits, 1)
            of_columns.add(columns, logits, 0)
        row_sums, column_sums = of_rows.logarithms(), of_columns.logarithms()
        of_images, of_texts = torch.zeros_like(images), torch.zeros_like(texts)
        for rows, columns in tiles:
            logits = scaled[rows] @ texts[columns].T
            weights = (logits - row_sums[rows, None]).exp_()
            weights += logits.sub_(column_sums[columns]).exp_()
            if rows == columns:
                weights.diagonal().sub_(2)
            of_images[rows].addmm_(weights, texts[columns])
            of_texts[columns].addmm_(weights.T, images[rows])
        factor = scale / (2 * num_pairs)
        of_images, of_texts = of_images * factor, of_texts * factor
        ctx.save_for_backward(of_images, of_texts, (of_images * images).sum())
        return ((row_sums + column_sums) / 2 - (scaled * texts).sum(1)).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *(gradients[0] * gradient for gradient in ctx.saved_tensors), None


class _OnlineSums:
    """ln sum exp of each row, or column, carried from tile to tile."""

    def __init__(self, like: Tensor) -> None:
        self.top, self.sums = like.new_full((len(like),), -math.inf), like.new_zeros(len(like))

    def add(self, place: slice, logits: Tensor, dim: int) -> None:
        top = torch.maximum(self.top[place], logits.amax(dim))
        # what was summed below an old maximum is made smaller to fit the new one
        old = self.sums[place] * (self.top[place] - top).exp()
        self.sums[place] = old + (logits - top.unsqueeze(dim)).exp_().sum(dim)
        self.top[place] = top

    def logarithms(self) -> Tensor:
        return self.top + self.sums.log()


def tiles(images: Tensor, texts: Tensor, scale: Tensor, *, side: int | None = None) -> Tensor:
    """Compute tiles of the logits, `side` times `side`, in two passes."""
    if side is None:
        side = 8192 if images.is_cuda else 1024
    return cast(Tensor, _Tiles.apply(images, texts, scale, side))


def products(images: Tensor, texts: Tensor, *, rows: int = 4096) -> Tensor:
    """Compute the logits and both gradients as bare products, in slices."""
    of_texts = torch.zeros_like(texts)
    for own in images.split(rows):
        logits = own @ texts.T
        torch.mm(logits, texts)
        of_texts.addmm_(logits.T, own)
    return of_texts


WAYS: dict[str, Loss] = {"ours": ContrastiveLoss(), "whole": whole, "recomputed": recomputed, "tiles": tiles}
PRODUCTS = "the three products"


if __name__ == "__main__":
    sys.exit(main())
