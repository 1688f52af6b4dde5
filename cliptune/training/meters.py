"""Steps whose loss or gradient is not finite: noticed without waiting for the device at every step, and said."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cliptune.training.gradcache import StepResult

logger = logging.getLogger(__name__)

OVERFLOWS_IN_A_ROW = 20
"""With float16 the loss is scaled by 65,536 at first; what overflows when that was halved so often is not the scale."""
NUM_NAMED = 3


class StepNumbers(NamedTuple):
    """What tells whether a step was taken."""

    step: int
    rates: dict[str, float]
    """By the name of the parameter group."""
    values: Tensor
    """Loss, norm of the whole gradient, scale of the logits: float32 `[3]` on the device, not yet waited for."""


class StepWatch:
    """Looks at the numbers of steps, some at a time, and ends the run when too many in a row are not finite.

    On the CPU a look is free, and every step is looked at. Elsewhere a bad step is noticed some steps later; it changed
    nothing, and those after it were taken.

    Args:
        skip: bad steps in a row that are left out with a warning.
        scaled: losses are scaled, as with float16: an overflow of the gradient alone is how the scale is found.
        interval: steps between two looks on another device than the CPU; each look waits for it.
        name_samples: turns the image ids of a batch into names; None: they are only counted.
    """

    def __init__(
        self,
        skip: int = 0,
        *,
        scaled: bool = False,
        interval: int = 10,
        name_samples: Callable[[Tensor], list[str]] | None = None,
    ) -> None:
        self.skip, self.scaled, self.interval, self.name_samples = skip, scaled, interval, name_samples
        self.bad_in_a_row = 0
        self._pending: list[tuple[StepNumbers, Tensor | None]] = []

    def add(self, numbers: StepNumbers, image_ids: Tensor | None) -> None:
        """Take in a step, and look if it is time; raises as `look` does."""
        self._pending.append((numbers, image_ids))
        if numbers.values.device.type == "cpu" or len(self._pending) >= self.interval:
            self.look()

    def look(self) -> None:
        """Look at all steps since the last look.

        Raises:
            FloatingPointError: too many in a row were not finite; says step, rates, scale and samples.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        values = torch.stack([numbers.values for numbers, _ in pending]).tolist()
        for (numbers, image_ids), (loss, norm, scale) in zip(pending, values, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                self.bad_in_a_row = 0
                continue
            self.bad_in_a_row += 1
            said = self._describe(numbers, image_ids, loss=loss, norm=norm, scale=scale)
            overflow = self.scaled and math.isfinite(loss)
            if self.bad_in_a_row > (max(self.skip, OVERFLOWS_IN_A_ROW) if overflow else self.skip):
                raise FloatingPointError(
                    f"{said}. Lower --learning_rate, train with --precision fp32, look at these samples, or leave out "
                    "such steps with --skip_nonfinite; the last checkpoint is untouched"
                )
            log = logger.debug if overflow else logger.warning
            log("left out (%d in a row): %s", self.bad_in_a_row, said)

    def _describe(
        self, numbers: StepNumbers, image_ids: Tensor | None, *, loss: float, norm: float, scale: float
    ) -> str:
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in numbers.rates.items())
        return (
            f"step {numbers.step} has a loss of {loss:.4g} and a gradient of norm {norm:.4g} (rates: {rates}; scale of "
            f"the logits: {scale:.4g}; samples: {self._name(image_ids)}) and changed no weight"
        )

    def _name(self, image_ids: Tensor | None) -> str:
        if image_ids is None:
            return "unknown"
        if self.name_samples is None:
            return f"{len(image_ids)}"
        names = self.name_samples(image_ids[:NUM_NAMED])
        more = len(image_ids) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")


class EpochResult(NamedTuple):
    """What one epoch of training gave, averaged over its pairs."""

    loss: float
    """In nats; ln(batch size) is chance."""
    accuracy: float
    """In-batch R@1, both directions averaged, in percent. It depends on the batch size: never a result."""
    num_pairs: int


class EpochTotals:
    """What the batches of an epoch have given so far.

    Args:
        device: the model's.

    Attributes:
        num_batches: batches that are done, with those that held no pair.
    """

    def __init__(self, device: torch.device) -> None:
        # of finite losses: loss and accuracy times pairs, pairs; since the last look: loss, steps
        self.sums = torch.zeros(5, device=device)
        self.num_pairs = self.num_steps = self.num_batches = 0

    def add(self, result: StepResult | None) -> None:
        """Add a batch; None: it held no pair."""
        self.num_batches += 1
        if result is None:
            return
        one = torch.ones_like(result.loss)
        of_pairs = result.num_pairs * torch.stack([result.loss, result.accuracy, one])
        added = torch.cat([of_pairs, torch.stack([result.loss, one])])
        self.sums += torch.where(result.loss.isfinite(), added, 0.0)
        self.num_pairs, self.num_steps = self.num_pairs + result.num_pairs, self.num_steps + 1

    def mean(self) -> EpochResult:
        """Return the means over all pairs, without those whose loss is not finite; waits for the device.

        Raises:
            ValueError: there was no pair.
            FloatingPointError: no loss was finite.
        """
        if not self.num_pairs:
            raise ValueError("no batch of pairs to train on")
        loss, accuracy, num_pairs = self.sums[:3].tolist()
        if not num_pairs:
            raise FloatingPointError("no loss of the epoch is finite; lower --learning_rate, or use --precision fp32")
        return EpochResult(loss / num_pairs, 100 * accuracy / num_pairs, self.num_pairs)

    def mean_since_last(self) -> float:
        """Return the mean loss of the steps since the last call; waits for the device."""
        loss, num_steps = self.sums[3:].tolist()
        self.sums[3:] = 0
        return float(loss / max(num_steps, 1))

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {**vars(self), "sums": self.sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        vars(self).update(state, sums=torch.tensor(state["sums"], device=self.sums.device))
