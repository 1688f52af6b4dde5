"""How far a run has come: the plain values that a checkpoint stores beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cliptune import results
from cliptune.model.checkpoint_fields import validate
from cliptune.runtime.messages import count, printable, shorten
from cliptune.training.meters import EpochTotals, Step

TIE = 1e-9
"""Relative difference below which two RSums are the same: sums of the same recalls in another order differ by 1e-16."""


def now() -> str:
    """Return the local time as results files show it, such as `2026-01-31T12:00:00`."""
    return datetime.now().isoformat(timespec="seconds")


class _Evaluation(results.Recorded):
    """What is kept of an evaluation: all that a results file needs."""

    metrics: results.Metrics
    chance: results.Chance
    histograms: results.Histograms
    num_images: results.Count
    num_texts: results.Count


class _Totals(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    sums: Annotated[list[results.Number], Field(min_length=3, max_length=3)]
    num_pairs: results.Count
    num_batches: results.Count


class _Stored(results.Recorded):
    """A `RunState` as a checkpoint holds it."""

    started_at: str
    epoch: results.Count
    step: results.Count
    history: Annotated[list[results.EpochRecord], Field(min_length=1)]
    baseline: _Evaluation
    best: _Evaluation
    best_epoch: results.Count
    epochs_since_best: results.Count
    totals: _Totals | None


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
            "backbone_learning_rate": rates.get("backbone", rates.get("lora", 0.0)),
        }
        record = {"epoch": self.epoch, "step": self.step, **means, **of_groups, **evaluation["metrics"]}
        if num_skipped := evaluation.get("skipped", {}).get("images", 0):
            record["num_skipped"] = num_skipped
        if watched := evaluation.get("watched"):
            record["watched"] = watched
        self.history.append(record)
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

    def ending(self, num_epochs: int, patience: int) -> str | None:
        """Say why there is no epoch left to train; None while there is one."""
        if len(self.history) > num_epochs:
            return f"the run has had its {count(num_epochs, 'epoch')} (--num_epochs)"
        if self.is_stale(patience):
            return f"no better RSum for {count(self.epochs_since_best, 'epoch')} (--early_stopping_patience)"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain values; waits for the device within an epoch."""
        return {**vars(self), "history": list(self.history), "totals": self.totals and self.totals.state_dict()}

    @classmethod
    def check(cls, content: dict[str, Any], path: str | Path) -> None:
        """Check what a checkpoint holds of a run, before anything is made of it.

        Raises:
            ValueError: a key is missing, unknown or of another type, or they contradict each other; names the file.
        """
        values = content["run_state"]
        validate(_Stored, values, path, inside="run_state")
        unknown = sorted(map(str, values.keys() - {each.name for each in fields(cls)}))
        history = values["history"]
        # an epoch that is under way, which has totals, has no record yet
        epochs = list(range(values["epoch"] + (values["totals"] is None)))
        fits = (
            [record["epoch"] for record in history] == epochs
            and values["best_epoch"] in epochs
            and history[-1]["step"] <= values["step"]
            and (content["epoch"], content["global_step"]) == (values["epoch"], values["step"])
        )
        if unknown or not fits:
            reason = f"unknown key {printable(shorten(unknown[0]))}" if unknown else "its epochs and steps do not agree"
            raise ValueError(f"{path}: damaged, or written by other means than this toolkit: run_state: {reason}")

    @classmethod
    def from_state_dict(cls, values: dict[str, Any], device: torch.device) -> RunState:
        """Build what `state_dict` described, with the sums of a broken-off epoch on the model's device."""
        totals = None
        if values["totals"] is not None:
            totals = EpochTotals(device)
            totals.load_state_dict(values["totals"])
        return cls(**{**values, "totals": totals})
