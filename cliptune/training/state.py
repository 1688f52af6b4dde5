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
from cliptune.recorded import Count, Number, Place, WallTime
from cliptune.runtime.messages import count, printable, shorten
from cliptune.training.meters import EpochTotals, Step
from cliptune.training.wall_time import WallClock

TIE = 1e-9
"""Relative difference below which two RSums are the same: sums of the same recalls in another order differ by 1e-16."""

NOT_OF_VALIDATION = (
    "epoch", "step", "train_loss", "train_accuracy", "learning_rate", "backbone_learning_rate", "watched",
)  # fmt: skip
"""What a record holds beside the numbers of validation."""


def now() -> str:
    """Return the local time as results files show it, such as `2026-01-31T12:00:00`."""
    return datetime.now().isoformat(timespec="seconds")


class _Evaluation(results.Recorded):
    """What is kept of an evaluation: all that a results file needs."""

    metrics: results.Metrics
    chance: results.Chance
    histograms: results.Histograms
    num_images: Count
    num_texts: Count


_Sums = Annotated[list[Number], Field(min_length=3, max_length=3)]


class _Totals(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    sums: _Sums
    earlier: _Sums = [0.0] * 3
    num_pairs: Count
    num_batches: Count


class _Stored(results.Recorded):
    """A `RunState` as a checkpoint holds it."""

    started_at: str
    epoch: Count
    step: Count
    history: Annotated[list[results.EpochRecord], Field(min_length=1)]
    baseline: _Evaluation
    best: _Evaluation
    best_epoch: Place
    best_step: Count | None = None
    epochs_since_best: Count
    totals: _Totals | None
    wall_time: WallTime = WallTime()


@dataclass
class RunState:
    """How far a run has come.

    Attributes:
        epoch: the one that is trained, or was last; 0: the model as loaded.
        step: steps so far.
        history: a record for each evaluation: after every epoch, and within one where that is asked for. Its `epoch` is
            a whole number after an epoch, and 2.25 after a quarter of the third. Those with `earlier_data` are of
            validation data that the run had before it was resumed with other data.
        baseline: the evaluation of the model as loaded.
        best: the best evaluation.
        best_epoch, best_step: where it stands in the run, as its record says.
        epochs_since_best: evaluations since then; without those within an epoch they are epochs.
        totals: of the batches so far, within an epoch; None: between two epochs.
        wall_time: where the time went so far.
    """

    started_at: str = field(default_factory=now)
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    best_epoch: float = 0
    best_step: int = 0
    epochs_since_best: int = 0
    totals: EpochTotals | None = None
    wall_time: WallClock = field(default_factory=WallClock)

    @property
    def num_batches(self) -> int:
        """Batches of the current epoch that are done; 0 between two epochs."""
        return 0 if self.totals is None else self.totals.num_batches

    @property
    def epochs_done(self) -> int:
        """Whole epochs that are done; -1: not even the model as loaded is evaluated."""
        return self.epoch - (self.totals is not None or not self.history)

    def begin_epoch(self, device: torch.device) -> None:
        """Go to the next epoch, unless one is under way. The first is epoch 0, in which nothing is trained."""
        if self.totals is None:
            self.epoch = int(self.history[-1]["epoch"]) + 1 if self.history else 0
            self.totals = EpochTotals(device)

    def add(self, step: Step) -> None:
        """Take in a step of the epoch; waits for no device."""
        assert self.totals is not None
        self.totals.add(step.result)
        self.wall_time.add_waited(step.waited)
        if step.result is not None:
            self.step = step.result.global_step

    def train_means(self, *, steps_per_epoch: int) -> dict[str, float | None]:
        """Return the means of the training, in nats and percent; None without a step.

        Over the pairs of the whole epoch once it is done, and within it over those since the last evaluation.

        Args:
            steps_per_epoch: batches that an epoch has.

        Raises:
            ValueError: there was no pair in the epoch.
            FloatingPointError: no loss was finite.
        """
        if self.totals is None or self.epoch == 0:
            return {"train_loss": None, "train_accuracy": None}
        means = self.totals.mean(since_evaluation=self.num_batches < steps_per_epoch)
        return {"train_loss": means.loss, "train_accuracy": means.accuracy}

    @property
    def is_evaluated(self) -> bool:
        """Whether no step has been taken since the last evaluation."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    def add_evaluation(
        self,
        evaluation: dict[str, Any],
        *,
        means: dict[str, float | None],
        rates: dict[str, float],
        steps_per_epoch: int,
    ) -> bool:
        """Record an evaluation; with all batches of the epoch done, the epoch is.

        Args:
            evaluation: `metrics`, `chance`, `histograms` and the like, plain values.
            means: what `train_means` returned.
            rates: of the optimiser's groups, after the last step.
            steps_per_epoch: batches that an epoch has.

        Returns:
            Whether it is the best so far. Of a tie the earlier one stays.
        """
        is_within = self.epoch > 0 and self.num_batches < steps_per_epoch
        place = self.epoch - 1 + self.num_batches / steps_per_epoch if is_within else self.epoch
        of_groups = {
            "learning_rate": rates.get("projection", 0.0),
            "backbone_learning_rate": rates.get("backbone", rates.get("lora", 0.0)),
        }
        record = {"epoch": place, "step": self.step, **means, **of_groups, **evaluation["metrics"]}
        if num_skipped := evaluation.get("skipped", {}).get("images", 0):
            record["num_skipped"] = num_skipped
        if watched := evaluation.get("watched"):
            record["watched"] = watched
        self.history.append(record)
        if is_within and self.totals is not None:
            self.totals.begin_part()
        else:
            self.totals = None  # from here on a signal finds the epoch done
        if not self.baseline:
            self.baseline = evaluation
        improved = not self.best or self._is_better(evaluation)
        self.epochs_since_best = 0 if improved else self.epochs_since_best + 1
        if improved:
            self.best, self.best_epoch, self.best_step = evaluation, place, self.step
        return improved

    def _is_better(self, evaluation: dict[str, Any]) -> bool:
        key = self.selection
        # 190.0 and 190.00000000000003 are the same six recalls, added up in another order
        return bool(evaluation["metrics"][key] > self.best["metrics"][key] * (1 + TIE))

    def leave_epoch(self) -> None:
        """Forget what there is of an epoch under way, but for its steps and evaluations: it begins again."""
        self.epoch, self.totals = int(self.history[-1]["epoch"]), None

    def begin_again(self, loaded: dict[str, Any], best: dict[str, Any]) -> bool:
        """Go on with other validation data, on which the models as loaded and the best have been evaluated.

        Their records are of the new data from here on. All others say that they are not, and are compared with none.

        Returns:
            Whether the best one is better than the model as loaded there; else that is the best one again.
        """
        place = self.best_epoch, self.best_step
        renewed = {place: best, (0, 0): loaded}  # which may be one
        self.history = [_renewed(record, renewed.get((record["epoch"], record["step"]))) for record in self.history]
        self.baseline = self.best = loaded
        self.best_epoch, self.best_step, self.epochs_since_best = 0, 0, 0
        stays = place[0] > 0 and self._is_better(best)
        if stays:
            self.best, (self.best_epoch, self.best_step) = best, place
        return stays

    @property
    def comparable(self) -> list[dict[str, Any]]:
        """The records of the history that are of the validation data at hand; first that of the model as loaded."""
        return [record for record in self.history if not record.get("earlier_data")]

    @property
    def selection(self) -> str:
        """The metric that evaluations are compared by."""
        return results.selection_key(self.baseline["metrics"])

    def best_trained(self) -> dict[str, Any] | None:
        """Return the record of the best evaluation but that of the model as loaded; None: there is no other."""
        return max(self.comparable[1:], key=lambda record: record[self.selection], default=None)

    def is_stale(self, patience: int) -> bool:
        """Tell whether `patience` evaluations, unless it is 0, have brought nothing better, the last one just now."""
        return bool(patience) and self.is_evaluated and self.epochs_since_best >= patience

    def ending(self, num_epochs: int, patience: int) -> str | None:
        """Say why there is nothing left to train; None while there is."""
        if self.epochs_done >= num_epochs:
            return f"the run has had its {count(num_epochs, 'epoch')} (--num_epochs)"
        if self.is_stale(patience):
            return f"no better RSum for {count(self.epochs_since_best, 'evaluation')} (--early_stopping_patience)"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain values; waits for the device within an epoch."""
        totals = self.totals and self.totals.state_dict()
        return {
            **vars(self), "history": list(self.history), "totals": totals, "wall_time": self.wall_time.state_dict(),
        }  # fmt: skip

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
        # an epoch that is under way, which has totals, has records of evaluations within it alone
        num_done = values["epoch"] + (values["totals"] is None)
        places = [(record["epoch"], record["step"]) for record in history]
        steps = [step for _, step in places]
        best = values["best_epoch"], values.get("best_step")
        fits = (
            [epoch for epoch, _ in places if isinstance(epoch, int)] == list(range(num_done))
            and all(epoch <= values["epoch"] for epoch, _ in places)
            and steps == sorted(steps)
            and steps[-1] <= values["step"]
            and any(best in {(epoch, step), (epoch, None)} for epoch, step in places)
            and (content["epoch"], content["global_step"]) == (values["epoch"], values["step"])
        )
        if unknown or not fits:
            reason = f"unknown key {printable(shorten(unknown[0]))}" if unknown else "its epochs and steps do not agree"
            raise ValueError(f"{path}: damaged, or written by other means than this toolkit: run_state: {reason}")

    @classmethod
    def from_state_dict(cls, values: dict[str, Any], device: torch.device) -> RunState:
        """Build what `state_dict` described, with the sums of a broken-off epoch on the model's device."""
        if values.get("best_step") is None:  # of before evaluations within an epoch
            steps = {record["epoch"]: record["step"] for record in values["history"]}
            values = {**values, "best_step": steps[values["best_epoch"]]}
        totals = None
        if values["totals"] is not None:
            totals = EpochTotals(device)
            totals.load_state_dict(values["totals"])
        wall_time = WallClock(values.get("wall_time"))  # a run of before it was recorded begins at 0
        return cls(**{**values, "totals": totals, "wall_time": wall_time})


def _renewed(record: dict[str, Any], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Return a record with what its model's evaluation on other data found; without one it is of the earlier data."""
    if evaluation is None:
        return {**record, "earlier_data": True}
    kept = {key: record[key] for key in NOT_OF_VALIDATION if key in record}
    num_skipped = evaluation.get("skipped", {}).get("images", 0)
    return {**kept, **evaluation["metrics"], **({"num_skipped": num_skipped} if num_skipped else {})}
