"""The sigmoid loss of a batch and its gradient, slice by slice and over all ranks.

With logits s_ij = scale * cosine(image i, text j) + bias and z_ij = 1 for positives, -1 for others, the loss of B pairs
is sum_ij ln(1 + exp(-z_ij s_ij)) / B (Zhai et al. 2023, equation 1 and algorithm 1), and its derivative by s_ij is
-z_ij sigmoid(-z_ij s_ij) / B. Nothing is normalised over a row or a column, so one pass over slices gives both.
"""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliptune.runtime.device import widest_float
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.pair_logits import Hits, PairLogits, Pairs

logger = logging.getLogger(__name__)

INITIAL_BIAS = -10.0
"""Zhai et al.'s, for random features, a scale of 10 and batches of tens of thousands; see `initial_bias`."""
MAX_BIAS_STEPS, BIAS_TOLERANCE = 100, 1e-4


class SigmoidLoss(ContrastiveLoss):
    """Each image with each text is a question of its own: do they belong together? In nats, summed over a pair's texts.

    It is called as `ContrastiveLoss` is. What `positives` makes positives are positives here, each fully; what it
    leaves out is left out.

    Args:
        temperature: initial temperature of the loss's own learned `logit_scale`, used when a call brings none.
        bias: initial value of its own learned `logit_bias`, likewise.
        positives, across_ranks, slice_logits: as `ContrastiveLoss`'s.

    Raises:
        ValueError: a temperature that is not positive, or unknown `positives`.
    """

    needs_bias = True

    def __init__(self, temperature: float = 0.1, bias: float = INITIAL_BIAS, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def chance(self, num_pairs: int, *, caption_ids: Tensor | None = None) -> float:
        """Return the loss of features that tell nothing, in nats, at the bias that is best for them.

        All B^2 logits then say the fraction f of positives among them, and B times the entropy of f is the loss: with
        B positives ln B + (B - 1) ln(B / (B - 1)), nearly ln B + 1.
        """
        nothing = torch.zeros(num_pairs, 1)
        pairs = Pairs(self.positives, None, caption_ids, across_ranks=False)
        numbers = PairLogits(nothing, nothing, torch.ones(()), pairs).num_positives()
        fraction = numbers.sum().item() / num_pairs**2
        parts = [part for part in (fraction, 1 - fraction) if part]
        return -num_pairs * sum(part * math.log(part) for part in parts)

    @torch.no_grad()
    def initial_bias(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        image_ids: Tensor | None = None,
        caption_ids: Tensor | None = None,
    ) -> float:
        """Return the bias at which the mean probability is the fraction of positives: 1 / B where each has one.

        There the bias has no gradient: the loss begins with what the features tell, and not with thousands of negatives
        that are all believed. That depends on the model's scale and cosines, so they are measured. A fixed bias of -10
        fits cosines around 0 and a scale of 10; with a scale of 100 and cosines of 0.2 between images and texts that do
        not belong together, as OpenAI's models have, each of these has a probability of nearly 1.

        Arguments as `forward`'s; a collective if the loss is.
        """
        pairs = self.pairs(image_ids, caption_ids)
        logits = PairLogits(image_features.float(), text_features.float(), logit_scale.float().exp(), pairs)
        num_positives = logits.num_positives().sum().item()
        counted, total, _ = self._sums(logits, 0.0)
        wanted = _log_odds(min(num_positives / counted, 0.5))
        bias = wanted - total / counted
        # the log odds of the mean probability rise with the bias, by 1 at most: so each step goes the right way, and
        # none too far; for [-20, 20] and a half, from 0, it is found at once
        for _ in range(MAX_BIAS_STEPS):
            mean = self._sums(logits, bias)[2] / counted
            step = wanted - _log_odds(mean)
            bias += step
            if abs(step) < BIAS_TOLERANCE:
                break
        return bias

    def _sums(self, logits: PairLogits, bias: float) -> tuple[float, float, float]:
        """Count the logits that are not left out; add them up, and their probabilities."""
        wide = widest_float(logits.images.device)
        sums = torch.zeros(3, dtype=wide, device=logits.images.device)
        for _, values in logits.slices():
            found = values[values != -math.inf].to(wide)
            sums += torch.stack([torch.ones_like(found).sum(), found.sum(), (found + bias).sigmoid().sum()])
        counted, total, probability = logits.total(sums).tolist()
        return counted, total, probability

    def _compute(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        bias = self.logit_bias if logit_bias is None else logit_bias
        return cast(tuple[Tensor, Tensor], _Sigmoid.apply(images, texts, logit_scale, bias.float(), pairs))


class _Sigmoid(torch.autograd.Function):
    """Computes the gradient beside the loss, since both need the same slices."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        logits = PairLogits(images, texts, logit_scale.exp(), pairs)
        num_pairs, hits = len(logits.texts), Hits(logits)
        of_images, of_texts = torch.zeros_like(logits.images), torch.zeros_like(logits.texts)
        wide = widest_float(images.device)
        sums = torch.zeros(3, dtype=wide, device=images.device)  # loss, hits, gradient of the bias
        needs_gradient = any(ctx.needs_input_grad)
        for rows, values in logits.slices(last=True):
            hits.add(rows, values)  # a bias changes no order
            alike = logits.alike(rows) if logits.has_more_positives else None
            signed = _negate_positives(logits, values.add_(logit_bias), rows, alike)  # -z s, [rows, B]
            sums[0] += F.softplus(signed).sum(dtype=wide)
            if needs_gradient:
                weights = _negate_positives(logits, signed.sigmoid_(), rows, alike)  # -z sigmoid(-z s)
                sums[2] += weights.sum(dtype=wide)
                torch.mm(weights, logits.texts, out=of_images[rows])
                of_texts.addmm_(weights.T, logits.images[rows])
        sums[1] = hits.count() / 2
        loss, accuracy, of_bias = (logits.total(sums) / num_pairs).float()
        if needs_gradient:
            factor = logits.scale / num_pairs
            of_images, of_texts = of_images * factor, logits.total(of_texts)[logits.own] * factor
            of_scale = logits.total(torch.linalg.vecdot(of_images, logits.images).sum())  # as `loss._gradient`'s
            ctx.save_for_backward(of_images, of_texts, of_scale, of_bias)
        ctx.mark_non_differentiable(accuracy)  # as `loss._InfoNCE`'s
        return loss, accuracy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *(gradients[0] * gradient for gradient in ctx.saved_tensors), None


def _negate_positives(logits: PairLogits, values: Tensor, rows: slice, alike: Tensor | None) -> Tensor:
    """Return `[rows, B]` with the positives' values negated; `alike` tells which they are, None: each its own alone."""
    if alike is not None:
        return torch.where(alike, -values, values)
    logits.matches(values, rows).neg_()
    return values


def _log_odds(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)


__all__ = ["SigmoidLoss"]
