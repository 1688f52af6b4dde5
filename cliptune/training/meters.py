"""The numbers of steps and epochs, read without waiting for the device at every step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

OVERFLOWS_IN_A_ROW = 20
"""With float16 the loss is scaled by 65,536 at first; what overflows when that was halved so often is not the scale."""
NUM_NAMED = 3


class StepResult(NamedTuple):
    """What a step gave, over all ranks."""

    global_step: int
    """Steps of the run so far, with this one."""
    num_pairs: int
    rates: dict[str, float]
    """By the name of the parameter group."""
    values: Tensor
    """Loss, in-batch accuracy, norm of the whole gradient, scale of the logits: float32 `[4]`, not yet waited for."""

    @property
    def loss(self) -> Tensor:
        """Contrastive loss in nats, a scalar on the device."""
        return self.values[0]

    @property
    def accuracy(self) -> Tensor:
        """In-batch R@1, both directions averaged, in [0, 1], a scalar on the device."""
        return self.values[1]


class Step(NamedTuple):
    """A step of an epoch, as the trainer yields it."""

    result: StepResult | None
    """None: the batch held no pair."""
    issues: Sequence[Any]
    """Samples that are missing from the batch, as its loader tells them."""
    seconds: float
    """From asking for a batch to the end of the step; a device other than the CPU may still compute then."""
    waited: float
    """Seconds of these that the batch took to come."""


class StepRecord(NamedTuple):
    """A step's numbers, as they are recorded."""

    step: int
    loss: float
    accuracy: float
    gradient_norm: float
    scale: float
    rates: dict[str, float]
    num_pairs: int
    seconds: float

    @property
    def is_skipped(self) -> bool:
        """Whether it changed no weight: its loss or gradient is not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.gradient_norm))


class StepWatch:
    """Reads the numbers of steps, some at a time, and ends the run when too many in a row are not finite.

    On the CPU this is free, and every step is read. Elsewhere a non-finite step is noticed some steps later; it changed
    nothing, and those after it were taken.

    Args:
        skip: non-finite steps in a row that are skipped with a warning.
        scaled: losses are scaled, as with float16: an overflow of the gradient alone is how the scale is found.
        interval: steps between two reads on another device than the CPU; each read waits for it.
        name_samples: turns the image ids of a batch into names; None: they are only counted.

    Attributes:
        num_skipped: non-finite steps of the run, of those that have been read.
        num_in_a_row: the last so many of them.
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
        self.num_in_a_row = self.num_skipped = 0
        self._pending: list[tuple[StepResult, Tensor | None, float]] = []
        self._records: list[StepRecord] = []

    def add(self, result: StepResult, image_ids: Tensor | None, *, seconds: float = 0.0) -> None:
        """Take in a step; read it and those before it if it is time. Raises as `read` does."""
        self._pending.append((result, image_ids, seconds))
        if result.values.device.type == "cpu" or result.global_step % self.interval == 0:
            self.read()

    def read(self) -> None:
        """Read all steps since the last time.

        Raises:
            FloatingPointError: too many in a row were not finite; says step, rates, scale and samples.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        # one copy, and so one wait, for all of them
        values = torch.stack([result.values for result, _, _ in pending]).tolist()
        for (result, image_ids, seconds), numbers in zip(pending, values, strict=True):
            loss, accuracy, norm, scale = numbers
            record = StepRecord(
                result.global_step, loss, accuracy, norm, scale, result.rates, result.num_pairs, seconds
            )
            self._records.append(record)  # the bad one too: steps.jsonl shows where the run ended
            self._check(record, image_ids)

    def take(self) -> list[StepRecord]:
        """Return what has been read since the last call."""
        records, self._records = self._records, []
        return records

    def _check(self, record: StepRecord, image_ids: Tensor | None) -> None:
        if not record.is_skipped:
            self.num_in_a_row = 0
            return
        self.num_in_a_row += 1
        self.num_skipped += 1
        message = self._describe(record, image_ids)
        # a finite loss with an infinite gradient: the scaler halves its scale, and the next step may fit
        overflow = self.scaled and math.isfinite(record.loss)
        if self.num_in_a_row > (max(self.skip, OVERFLOWS_IN_A_ROW) if overflow else self.skip):
            raise FloatingPointError(
                f"{message}. Lower --learning_rate, train with --precision fp32, look at these samples, or skip such "
                "steps with --skip_nonfinite; the last checkpoint is untouched"
            )
        log = logger.debug if overflow else logger.warning
        log("skipped (%d in a row): %s", self.num_in_a_row, message)

    def _describe(self, record: StepRecord, image_ids: Tensor | None) -> str:
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in record.rates.items())
        return (
            f"step {record.step} has a loss of {record.loss:.4g} and a gradient of norm {record.gradient_norm:.4g} "
            f"(rates: {rates}; scale of the logits: {record.scale:.4g}; samples: {self._name(image_ids)}) and changed "
            "no weight"
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
    """Sums over the batches of an epoch: of those since the last evaluation within it, and of those before.

    Args:
        device: the model's.

    Attributes:
        sums: since the last evaluation, of finite losses: loss times pairs, accuracy times pairs, pairs.
        earlier: the same of the epoch's batches before that evaluation.
        num_pairs: of the whole epoch so far.
        num_batches: batches of the epoch that are done, with those that held no pair.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums, self.earlier = torch.zeros(3, device=device), torch.zeros(3, device=device)
        self.num_pairs = self.num_batches = 0

    def add(self, result: StepResult | None) -> None:
        """Add a batch; None: it held no pair."""
        self.num_batches += 1
        if result is None:
            return
        # on the device: where() leaves out what is not finite without asking whether it is, which would wait
        added = result.num_pairs * torch.cat([result.values[:2], torch.ones_like(result.values[:1])])
        self.sums += torch.where(result.loss.isfinite(), added, 0.0)
        self.num_pairs += result.num_pairs

    def begin_part(self) -> None:
        """Begin the sums since the last evaluation again."""
        self.earlier += self.sums
        self.sums.zero_()

    def mean(self, *, since_evaluation: bool = False) -> EpochResult:
        """Return the means over the pairs of the epoch, but for those whose loss is not finite; waits for the device.

        Args:
            since_evaluation: only of the pairs since the last evaluation within the epoch.

        Raises:
            ValueError: there was no pair.
            FloatingPointError: no loss was finite.
        """
        if not self.num_pairs:
            raise ValueError("no batch of pairs to train on")
        loss, accuracy, num_pairs = (self.sums if since_evaluation else self.earlier + self.sums).tolist()
        if not num_pairs:
            raise FloatingPointError("no loss of the epoch is finite; lower --learning_rate, or use --precision fp32")
        return EpochResult(loss / num_pairs, 100 * accuracy / num_pairs, self.num_pairs)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {**vars(self), "sums": self.sums.tolist(), "earlier": self.earlier.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        # a state of before both were summed has nothing of the time before its last evaluation
        sums = {name: torch.tensor(state.get(name, [0.0] * 3), device=self.sums.device) for name in ("sums", "earlier")}
        vars(self).update(state, **sums)
