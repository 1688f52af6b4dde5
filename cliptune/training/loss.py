"""The contrastive loss of a batch and its gradient, slice by slice and over all ranks.

With logits s_ij = scale * cosine(image i, text j), row sums R_i = ln sum_j exp s_ij and column sums C_j =
ln sum_i exp s_ij, the loss of B pairs is sum_i (R_i + C_i - 2 s_ii) / 2B, and its derivative by s_ij is
(exp(s_ij - R_i) + exp(s_ij - C_j) - 2 [i = j]) / 2B. So two passes over slices of the logits give both, and no B x B
matrix is held. A rank does the slices of its own images.

Where pairs are positives of each other, the target of image i is 1 / n_i for each of its n_i positives, and that of a
text likewise (soft cross-entropy). 2 s_ii becomes the sum over the positives of s_ij (1 / n_i + 1 / n_j), and 2 [i = j]
becomes 1 / n_i + 1 / n_j there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cliptune.runtime.device import widest_float
from cliptune.runtime.distributed import all_max, all_sum
from cliptune.training.pair_logits import POSITIVES, SLICE_LOGITS, Hits, PairLogits, Pairs


class ContrastiveLoss(nn.Module):
    """Symmetric InfoNCE: the mean of both directions' cross-entropies (Radford et al. 2021, figure 3), in nats.

    In a run of several ranks each gives its own pairs, and the loss is that of all of them together.

    Args:
        temperature: initial temperature of the loss's own learned `logit_scale` = ln(1 / temperature), used when a call
            brings none.
        positives: `pair`, `image` or `caption`, see `pair_logits`. With `caption` the target is spread evenly over a
            pair's positives; the least loss is then the mean of ln(number of positives), not 0.
        across_ranks: False: the loss is that of this rank's pairs alone, and no collective runs.
        slice_logits: logits held at once, at least 16 rows of them; None: what suits the device.

    Raises:
        ValueError: a temperature that is not positive, or unknown `positives`.
    """

    needs_bias = False
    """A bias adds the same to all logits, and changes nothing."""

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        positives: str = "image",
        across_ranks: bool = True,
        slice_logits: int | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if positives not in POSITIVES:
            raise ValueError(f"positives must be one of {', '.join(POSITIVES)}, got {positives!r}")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.positives, self.across_ranks, self.slice_logits = positives, across_ranks, slice_logits

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
        caption_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch of pairs, a scalar.

        Args:
            image_features: unit-norm `[B, D]`; row i matches text i.
            text_features: unit-norm `[B, D]`.
            logit_scale: log of the inverse temperature, a scalar; None: the loss's own.
            logit_bias: added to all logits, a scalar, where the loss depends on it; None: the loss's own.
            image_ids: int64 `[B]`, the same for pairs of the same image; None: no image comes twice.
            caption_ids: int64 `[B]`, the same for equal captions; None: no caption comes twice.
        """
        return self.with_accuracy(
            image_features, text_features, logit_scale, logit_bias, image_ids=image_ids, caption_ids=caption_ids
        )[0]

    def with_accuracy(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
        caption_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and the in-batch accuracy in [0, 1], both directions averaged: two scalars.

        A pair counts if a positive scores highest; of equal scores the first does. The accuracy has no gradient.
        Arguments as `forward`'s.
        """
        if image_features.shape != text_features.shape or image_features.ndim != 2:
            shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            raise ValueError(f"features must be two equal [B, D] tensors, got {shapes}")
        scale = self.logit_scale if logit_scale is None else logit_scale
        pairs = self.pairs(image_ids, caption_ids)
        with torch.autocast(image_features.device.type, enabled=False):
            return self._compute(image_features.float(), text_features.float(), scale.float(), logit_bias, pairs)

    def chance(self, num_pairs: int, *, caption_ids: Tensor | None = None) -> float:
        """Return the loss of features that tell nothing, in nats: each text then has the probability 1 / B.

        Args:
            num_pairs: of the batch, each with another image.
            caption_ids: as `forward`'s.
        """
        return math.log(num_pairs)

    def pairs(self, image_ids: Tensor | None, caption_ids: Tensor | None) -> Pairs:
        """Return what the logits of a batch need beside its features."""
        return Pairs(self.positives, image_ids, caption_ids, self.across_ranks, self.slice_logits)

    def _compute(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], _InfoNCE.apply(images, texts, logit_scale, pairs))


class _InfoNCE(torch.autograd.Function):
    """Computes the gradient beside the loss, since both need the same slices."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, logit_scale: Tensor, pairs: Pairs) -> Any:
        logits = PairLogits(images, texts, logit_scale.exp(), pairs)
        targets = _Targets(logits)
        sums = _row_and_column_sums(logits, targets)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*_gradient(logits, targets, sums))
        # a sum over an epoch's accuracies would else hold the graph of each step, and with it the features
        ctx.mark_non_differentiable(sums.accuracy)
        return sums.loss, sums.accuracy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # the loss's own gradient scales what forward has computed; the accuracy has none
        return *(gradients[0] * gradient for gradient in ctx.saved_tensors), None


class _Targets:
    """What both directions want of the logits, slice by slice: 1 / n_i + 1 / n_j of positives, 0 of others."""

    def __init__(self, logits: PairLogits) -> None:
        self.logits = logits
        self.parts = 1 / logits.num_positives().float() if logits.has_more_positives else None  # [B]

    def dot(self, values: Tensor, rows: slice) -> Tensor:
        """Return the sum of targets times logits of each row, `[rows]`."""
        if self.parts is None:
            return 2 * self.logits.matches(values, rows)
        wanted: Tensor = torch.linalg.vecdot(values, self._of(rows))
        return wanted

    def subtract_from(self, weights: Tensor, rows: slice) -> None:
        """Take the targets from `[rows, B]`, in place."""
        if self.parts is None:
            self.logits.matches(weights, rows).sub_(2)
        else:
            weights.sub_(self._of(rows))

    def _of(self, rows: slice) -> Tensor:
        assert self.parts is not None
        own = self.parts[self.logits.own][rows]
        return (own[:, None] + self.parts).mul_(self.logits.alike(rows))


class _Sums(NamedTuple):
    """What the first pass gives: `rows` is this rank's R `[b]`, `columns` all C `[B]`."""

    rows: Tensor
    columns: Tensor
    loss: Tensor
    accuracy: Tensor


def _row_and_column_sums(logits: PairLogits, targets: _Targets) -> _Sums:
    num_rows, num_pairs = len(logits.images), len(logits.texts)
    row_sums, wanted = logits.images.new_empty(num_rows), logits.images.new_empty(num_rows)
    column_sums, hits = logits.images.new_full((num_pairs,), -math.inf), Hits(logits)
    for rows, values in logits.slices():
        row_sums[rows], wanted[rows] = values.logsumexp(1), targets.dot(values, rows)
        column_sums = torch.logaddexp(column_sums, values.logsumexp(0))
        hits.add(rows, values)
    if logits.across_ranks:
        top = all_max(column_sums.clone())
        column_sums = top + all_sum((column_sums - top).exp()).log()
    wide = widest_float(row_sums.device)
    parts = torch.stack([(row_sums + column_sums[logits.own] - wanted).to(wide).sum(), hits.count().to(wide)])
    loss, accuracy = logits.total(parts).float() / (2 * num_pairs)
    return _Sums(row_sums, column_sums, loss, accuracy)


def _gradient(logits: PairLogits, targets: _Targets, sums: _Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this rank's images and texts, `[b, D]` each, and of `logit_scale`."""
    of_images, of_texts = torch.empty_like(logits.images), torch.zeros_like(logits.texts)
    factor = logits.scale / (2 * len(logits.texts))
    for rows, values in logits.slices(last=True):
        weights = (values - sums.rows[rows, None]).exp_()  # [rows, B]
        weights += values.sub_(sums.columns).exp_()
        targets.subtract_from(weights, rows)
        weights *= factor
        torch.mm(weights, logits.texts, out=of_images[rows])
        of_texts.addmm_(weights.T, logits.images[rows])
    # d loss / d ln scale = sum of d loss / d s_ij * s_ij, which is each image's gradient times the image itself
    of_scale = logits.total(torch.linalg.vecdot(of_images, logits.images).sum())
    return of_images, logits.total(of_texts)[logits.own], of_scale


__all__ = ["POSITIVES", "SLICE_LOGITS", "ContrastiveLoss"]
