"""The contrastive loss of a batch and its gradient, slice by slice and over all processes.

With logits s_ij = scale * cosine(image i, text j), row sums R_i = ln sum_j exp s_ij and column sums C_j =
ln sum_i exp s_ij, the loss of B pairs is sum_i (R_i + C_i - 2 s_ii) / 2B, and its derivative by s_ij is
(exp(s_ij - R_i) + exp(s_ij - C_j) - 2 [i = j]) / 2B. So two passes over slices of the logits give both, and no B x B
matrix is held. A process does the slices of its own images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cliptune.runtime.distributed import all_max, all_min, all_sum, gather_rows, gather_sizes, rank

SLICE_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits held at once."""


class ContrastiveLoss(nn.Module):
    """Symmetric InfoNCE: the mean of both directions' cross-entropies (Radford et al. 2021, figure 3), in nats.

    In a run of several processes each gives its own pairs, and the loss is that of all of them together.

    Args:
        temperature: initial temperature of the loss's own learned `logit_scale` = ln(1 / temperature), used when a call
            brings none.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch of pairs, a scalar.

        Args:
            image_features: unit-norm `[B, D]`; row i matches text i.
            text_features: unit-norm `[B, D]`.
            logit_scale: log of the inverse temperature, a scalar; None: the loss's own.
            image_ids: `[B]`; pairs of the same image are no negatives of each other.
        """
        return self.with_accuracy(image_features, text_features, logit_scale, image_ids=image_ids)[0]

    def with_accuracy(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and the share of pairs that score highest, both directions averaged, in [0, 1]: two scalars.

        Of equal scores the first counts. Arguments as `forward`'s.
        """
        if image_features.shape != text_features.shape or image_features.ndim != 2:
            shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            raise ValueError(f"features must be two equal [B, D] tensors, got {shapes}")
        scale = self.logit_scale if logit_scale is None else logit_scale
        with torch.autocast(image_features.device.type, enabled=False):
            result = _InfoNCE.apply(image_features.float(), text_features.float(), scale.float(), image_ids)
        return cast(tuple[Tensor, Tensor], result)


class _InfoNCE(torch.autograd.Function):
    """Computes the gradient beside the loss, since both need the same slices."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, logit_scale: Tensor, ids: Tensor | None) -> Any:
        logits = _Logits(images, texts, logit_scale.exp(), ids)
        sums = _row_and_column_sums(logits)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*_gradient(logits, sums))
        return sums.loss, sums.accuracy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *(gradients[0] * each for each in ctx.saved_tensors), None


class _Logits:
    """Slices of the logits of this process's images `[b, D]` with all processes' texts `[B, D]`, float32."""

    def __init__(self, images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor | None) -> None:
        sizes = gather_sizes(len(images))
        self.images, self.scale, self.ids = images.detach(), scale, ids
        self.texts = gather_rows(texts, sizes)
        self.all_ids = None if ids is None else gather_rows(ids, sizes)
        self.offset = sum(sizes[: rank()])
        self.own = slice(self.offset, self.offset + len(images))
        budget = SLICE_LOGITS.get(images.device.type, SLICE_LOGITS["cpu"])
        self.rows_at_once = max(budget // max(len(self.texts), 1), 16)
        self._only: Tensor | None = None

    def slices(self, *, again: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of images with their logits, `[rows, B]`; if there is one slice, it is computed once.

        Args:
            again: this is the second and last time; the logits may be overwritten.
        """
        for start in range(0, len(self.images), self.rows_at_once):
            rows = slice(start, min(start + self.rows_at_once, len(self.images)))
            logits = self._only if again and self._only is not None else self._compute(rows)
            if len(self.images) <= self.rows_at_once:
                self._only = None if again else logits
            yield rows, logits

    def _compute(self, rows: slice) -> Tensor:
        logits = (self.scale * self.images[rows]) @ self.texts.T
        if self.ids is not None and self.all_ids is not None:
            same = self.ids[rows, None] == self.all_ids
            self.own_places(same, rows).fill_(False)
            logits.masked_fill_(same, -math.inf)
        return logits

    def own_places(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the places of the matches in a slice, `[rows]`: a view."""
        return logits.diagonal(self.offset + rows.start)


class _Sums(NamedTuple):
    """What the first pass gives: `rows` is this process's R `[b]`, `columns` all C `[B]`."""

    rows: Tensor
    columns: Tensor
    loss: Tensor
    accuracy: Tensor


def _row_and_column_sums(logits: _Logits) -> _Sums:
    num_rows, num_pairs = len(logits.images), len(logits.texts)
    row_sums, matches = logits.images.new_empty(num_rows), logits.images.new_empty(num_rows)
    column_sums, highest = (logits.images.new_full((num_pairs,), -math.inf) for _ in range(2))
    winners = torch.full((num_pairs,), num_pairs, device=row_sums.device)
    row_hits = torch.zeros((), dtype=torch.int64, device=row_sums.device)
    for rows, values in logits.slices():
        row_sums[rows], matches[rows] = values.logsumexp(1), logits.own_places(values, rows)
        column_sums = torch.logaddexp(column_sums, values.logsumexp(0))
        in_slice, first = values.max(0)
        winners = torch.where(in_slice > highest, first + (logits.offset + rows.start), winners)
        highest = torch.maximum(highest, in_slice)
        own = torch.arange(rows.start, rows.stop, device=values.device) + logits.offset
        row_hits += (values.argmax(1) == own).sum()
    column_sums, winners = _over_processes(column_sums, highest, winners)
    own_columns = column_sums[logits.own]
    column_hits = (winners[logits.own] == torch.arange(num_pairs, device=winners.device)[logits.own]).sum()
    parts = torch.stack([(row_sums + own_columns - 2 * matches).double().sum(), (row_hits + column_hits).double()])
    loss, accuracy = all_sum(parts).float() / (2 * num_pairs)
    return _Sums(row_sums, column_sums, loss, accuracy)


def _over_processes(column_sums: Tensor, highest: Tensor, winners: Tensor) -> tuple[Tensor, Tensor]:
    """Join what each process found in its rows: the columns' sums, and the first row that scores highest in each."""
    top = all_max(highest.clone())
    column_sums = top + all_sum((column_sums - top).exp()).log()
    return column_sums, all_min(torch.where(highest == top, winners, len(winners)))


def _gradient(logits: _Logits, sums: _Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this process's images and texts, `[b, D]` each, and of `logit_scale`."""
    of_images, of_texts = torch.empty_like(logits.images), torch.zeros_like(logits.texts)
    factor = logits.scale / (2 * len(logits.texts))
    for rows, values in logits.slices(again=True):
        weights = (values - sums.rows[rows, None]).exp_()
        weights += values.sub_(sums.columns).exp_()
        logits.own_places(weights, rows).sub_(2)
        weights *= factor
        torch.mm(weights, logits.texts, out=of_images[rows])
        of_texts.addmm_(weights.T, logits.images[rows])
    of_scale = all_sum(torch.linalg.vecdot(of_images, logits.images).sum())
    return of_images, all_sum(of_texts)[logits.own], of_scale


__all__ = ["ContrastiveLoss"]
