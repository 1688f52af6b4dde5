"""The contrastive loss of a batch and its gradient, slice by slice and over all ranks.

With logits s_ij = scale * cosine(image i, text j), row sums R_i = ln sum_j exp s_ij and column sums C_j =
ln sum_i exp s_ij, the loss of B pairs is sum_i (R_i + C_i - 2 s_ii) / 2B, and its derivative by s_ij is
(exp(s_ij - R_i) + exp(s_ij - C_j) - 2 [i = j]) / 2B. So two passes over slices of the logits give both, and no B x B
matrix is held. A rank does the slices of its own images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cliptune.runtime.distributed import all_max, all_min, all_sum, gather_rows, gather_sizes, rank, world_size

SLICE_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits held at once, by the type of device: 16 MiB and 512 MiB."""


class ContrastiveLoss(nn.Module):
    """Symmetric InfoNCE: the mean of both directions' cross-entropies (Radford et al. 2021, figure 3), in nats.

    In a run of several ranks each gives its own pairs, and the loss is that of all of them together.

    Args:
        temperature: initial temperature of the loss's own learned `logit_scale` = ln(1 / temperature), used when a call
            brings none.
        across_ranks: False: the loss is that of this rank's pairs alone, and no collective runs.
        slice_logits: logits held at once, at least 16 rows of them; None: what suits the device.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(
        self, temperature: float = 0.07, *, across_ranks: bool = True, slice_logits: int | None = None
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.across_ranks, self.slice_logits = across_ranks, slice_logits

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
            image_ids: int64 `[B]`; pairs of the same image are no negatives of each other; None: no image comes twice.
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
        """Return the loss, and the in-batch accuracy in [0, 1], both directions averaged: two scalars.

        A pair counts if it scores highest; of equal scores the first does. Arguments as `forward`'s.
        """
        if image_features.shape != text_features.shape or image_features.ndim != 2:
            shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            raise ValueError(f"features must be two equal [B, D] tensors, got {shapes}")
        scale = self.logit_scale if logit_scale is None else logit_scale
        with torch.autocast(image_features.device.type, enabled=False):
            result = _InfoNCE.apply(
                image_features.float(), text_features.float(), scale.float(), image_ids, self._slicing(image_features)
            )
        return cast(tuple[Tensor, Tensor], result)

    def _slicing(self, features: Tensor) -> _Slicing:
        budget = self.slice_logits or SLICE_LOGITS.get(features.device.type, SLICE_LOGITS["cpu"])
        return _Slicing(budget, self.across_ranks and world_size() > 1)


class _Slicing(NamedTuple):
    num_logits: int
    """Held at once."""
    across_ranks: bool


class _InfoNCE(torch.autograd.Function):
    """Computes the gradient beside the loss, since both need the same slices."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, logit_scale: Tensor, ids: Tensor | None, slicing: _Slicing
    ) -> Any:
        logits = _Logits(images, texts, logit_scale.exp(), ids, slicing)
        sums = _row_and_column_sums(logits)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*_gradient(logits, sums))
        return sums.loss, sums.accuracy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # the loss's own gradient scales what forward has computed; the accuracy has none
        return *(gradients[0] * gradient for gradient in ctx.saved_tensors), None, None


class _Logits:
    """Slices of the logits of this rank's images `[b, D]` with all ranks' texts `[B, D]`, float32."""

    def __init__(self, images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor | None, slicing: _Slicing) -> None:
        self.images, self.scale, self.ids = images.detach(), scale, ids
        self.across_ranks = slicing.across_ranks
        self.texts, self.all_ids, self.offset = texts.detach(), ids, 0
        if self.across_ranks:
            sizes = gather_sizes(len(images))
            self.texts = gather_rows(texts, sizes)  # [B, D]
            self.all_ids = None if ids is None else gather_rows(ids, sizes)  # [B]
            self.offset = sum(sizes[: rank()])
        # this rank's columns among all texts: image i of this rank matches text offset + i
        self.own = slice(self.offset, self.offset + len(images))
        self.rows_at_once = max(slicing.num_logits // max(len(self.texts), 1), 16)
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
            # another caption of the same image is no negative: exp(-inf) = 0 takes it out of both sums
            same = self.ids[rows, None] == self.all_ids
            self.matches(same, rows).fill_(False)
            logits.masked_fill_(same, -math.inf)
        return logits

    def matches(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the logits of the matching pairs in a slice, `[rows]`: a view."""
        return logits.diagonal(self.offset + rows.start)

    def total(self, values: Tensor) -> Tensor:
        """Add up all ranks' tensors, in place."""
        return all_sum(values) if self.across_ranks else values


class _Sums(NamedTuple):
    """What the first pass gives: `rows` is this rank's R `[b]`, `columns` all C `[B]`."""

    rows: Tensor
    columns: Tensor
    loss: Tensor
    accuracy: Tensor


def _row_and_column_sums(logits: _Logits) -> _Sums:
    num_rows, num_pairs = len(logits.images), len(logits.texts)
    row_sums, matches = logits.images.new_empty(num_rows), logits.images.new_empty(num_rows)
    column_sums, highest = (logits.images.new_full((num_pairs,), -math.inf) for _ in range(2))
    # a column's winner is found slice by slice: only a higher score takes over, so of equal ones the first row counts
    winners = torch.full((num_pairs,), num_pairs, device=row_sums.device)
    row_hits = torch.zeros((), dtype=torch.int64, device=row_sums.device)
    for rows, values in logits.slices():
        row_sums[rows], matches[rows] = values.logsumexp(1), logits.matches(values, rows)
        column_sums = torch.logaddexp(column_sums, values.logsumexp(0))
        in_slice, first = values.max(0)
        winners = torch.where(in_slice > highest, first + (logits.offset + rows.start), winners)
        highest = torch.maximum(highest, in_slice)
        own = torch.arange(rows.start, rows.stop, device=values.device) + logits.offset
        row_hits += (values.argmax(1) == own).sum()
    if logits.across_ranks:
        column_sums, winners = _over_ranks(column_sums, highest, winners)
    own_columns = column_sums[logits.own]
    column_hits = (winners[logits.own] == torch.arange(num_pairs, device=winners.device)[logits.own]).sum()
    parts = torch.stack([(row_sums + own_columns - 2 * matches).double().sum(), (row_hits + column_hits).double()])
    loss, accuracy = logits.total(parts).float() / (2 * num_pairs)
    return _Sums(row_sums, column_sums, loss, accuracy)


def _over_ranks(column_sums: Tensor, highest: Tensor, winners: Tensor) -> tuple[Tensor, Tensor]:
    """Join what each rank found in its rows: the columns' sums, and the first row that scores highest in each."""
    top = all_max(highest.clone())
    column_sums = top + all_sum((column_sums - top).exp()).log()
    return column_sums, all_min(torch.where(highest == top, winners, len(winners)))


def _gradient(logits: _Logits, sums: _Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this rank's images and texts, `[b, D]` each, and of `logit_scale`."""
    of_images, of_texts = torch.empty_like(logits.images), torch.zeros_like(logits.texts)
    factor = logits.scale / (2 * len(logits.texts))
    for rows, values in logits.slices(again=True):
        weights = (values - sums.rows[rows, None]).exp_()  # [rows, B]
        weights += values.sub_(sums.columns).exp_()
        logits.matches(weights, rows).sub_(2)
        weights *= factor
        torch.mm(weights, logits.texts, out=of_images[rows])
        of_texts.addmm_(weights.T, logits.images[rows])
    # d loss / d ln scale = sum of d loss / d s_ij * s_ij, which is each image's gradient times the image itself
    of_scale = logits.total(torch.linalg.vecdot(of_images, logits.images).sum())
    return of_images, logits.total(of_texts)[logits.own], of_scale


__all__ = ["ContrastiveLoss"]
