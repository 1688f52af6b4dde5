"""How far a run has come: the plain values that a checkpoint stores beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch

from cliptune.training.meters import EpochTotals, Step

TIE = 1e-9
"""Relative difference below which two RSums are the same: sums of the same recalls in another order differ by 1e-16."""


def now() -> str:
    """Return the local time as results files show it, such as `2026-01-31T12:00:00`."""
    return datetime.now().isoformat(timespec="seconds")


@dataclass
class RunState:
    """How far a run has come.

    Attributes:
        epoch: the one that is trained, or was last; 0: the model as loaded.
        step: steps so far.
        history: a record for each epoch that is done.
        baseline: the evaluation of the model as loaded.
        best: the evaluation of the best epoch.
        epochs_since_best: epochs done since then.
        totals: of the batches so far, within an epoch; None: between two epochs.
    """

    started_at: str = field(default_factory=now)
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    best_epoch: int = 0
    epochs_since_best: int = 0
    totals: EpochTotals | None = None

    @property
    def num_batches(self) -> int:
        """Batches of the current epoch that are done; 0 between two epochs."""
        return 0 if self.totals is None else self.totals.num_batches

    def begin_epoch(self, device: torch.device) -> None:
        """Go to the next epoch, unless one is under way. The first is epoch 0, in which nothing is trained."""
        if self.totals is None:
            self.epoch = len(self.history)
            self.totals = EpochTotals(device)

    def add(self, step: Step) -> None:
        """Take in a step of the epoch; waits for no device."""
        assert self.totals is not None
        self.totals.add(step.result)
        if step.result is not None:
            self.step = step.result.global_step

    def train_means(self) -> dict[str, float | None]:
        """Return the means over the epoch's pairs, in nats and percent; None in epoch 0.

        Raises:
            ValueError: there was no pair.
            FloatingPointError: no loss was finite.
        """
        if self.totals is None or self.epoch == 0:
            return {"train_loss": None, "train_accuracy": None}
        means = self.totals.mean()
        return {"train_loss": means.loss, "train_accuracy": means.accuracy}

    def finish_epoch(
        self, evaluation: dict[str, Any], *, means: dict[str, float | None], rates: dict[str, float]
    ) -> bool:
        """Record an epoch and its evaluation.

        Args:
            evaluation: `metrics`, `chance`, `histograms` and the like, plain values.
            means: what `train_means` returned.
            rates: of the optimiser's groups, at the epoch's end.

        Returns:
            Whether it is the best so far. Of a tie the earlier one stays.
        """
        of_groups = {
            "learning_rate": rates.get("projection", 0.0),
            "backbone_learning_rate": rates.get("backbone", 0.0),
        }
        self.history.append({"epoch": self.epoch, "step": self.step, **means, **of_groups, **evaluation["metrics"]})
        self.totals = None  # from here on a signal finds the epoch done
        if not self.baseline:
            self.baseline = evaluation
        # 190.0 and 190.00000000000003 are the same six recalls, added up in another order
        improved = not self.best or evaluation["metrics"]["rsum"] > self.best["metrics"]["rsum"] * (1 + TIE)
        self.epochs_since_best = 0 if improved else self.epochs_since_best + 1
        if improved:
            self.best, self.best_epoch = evaluation, self.epoch
        return improved

    def is_stale(self, patience: int) -> bool:
        """Tell whether `patience` epochs, unless it is 0, have brought nothing better."""
        return bool(patience) and self.totals is None and self.epochs_since_best >= patience

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain values; waits for the device within an epoch."""
        return {**vars(self), "history": list(self.history), "totals": self.totals and self.totals.state_dict()}

    @classmethod
    def from_state_dict(cls, values: dict[str, Any], device: torch.device) -> RunState:
        """Build what `state_dict` described, with the sums of a broken-off epoch on the model's device."""
        totals = None
        if values["totals"] is not None:
            totals = EpochTotals(device)
            totals.load_state_dict(values["totals"])
        return cls(**{**values, "totals": totals})
