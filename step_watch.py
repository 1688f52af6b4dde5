"""Steps whose loss or gradient is not finite: noticed without waiting for the device at every step, and said."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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
