"""What results are made of: numbers, the place of an evaluation, and what is said of a run in the end."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from cliptune.runtime.messages import count

R = TypeVar("R")
"""`results.EpochRecord`."""
MAX_SIZE = 1e100
"""Of a number."""

# strict: neither `true` nor `"3"` is a number
# what is larger cannot be drawn, and no run comes near it
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-MAX_SIZE, le=MAX_SIZE)]
Seconds = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
# whole numbers stay whole ones, so that a file says "epoch": 3
Place = Annotated[
    Number,
    Field(ge=0),
    AfterValidator(lambda place: int(place) if place.is_integer() else place),
    PlainSerializer(lambda place: place),
]
"""Epochs that are done, a fraction within one."""
Bounds = tuple[Number, Number]
"""Low and high."""


RECORDED = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
"""Of what a results file holds: immutable, and keys of later versions are kept."""


def comparable(history: Iterable[R]) -> list[R]:
    """Return those of a run's records that are of the validation data that it has had last."""
    return [record for record in history if not getattr(record, "earlier_data", False)]


def shown_epoch(epoch: float) -> str:
    """Return the place of an evaluation as people read it: `3`, or `2.25` within epoch 3."""
    return f"{epoch:,}" if isinstance(epoch, int) else f"{epoch:,.2f}"


class GainInterval(NamedTuple):
    """A gain over the model as loaded in points, and the 95% interval that it may lie in as well."""

    gain: Number
    low: Number
    high: Number

    def __str__(self) -> str:
        return f"{self.gain:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


class Verdict(BaseModel):
    """Whether the best trained model is better than the one as loaded."""

    model_config = RECORDED

    verdict: Literal["better", "not distinguishable", "worse"]
    rsum: GainInterval
    recalls: dict[str, GainInterval]
    """Under `i2t_r1` to `t2i_r10`."""
    split: Literal["val", "test", "folds"]
    epoch: Place
    """Of the evaluation that is judged."""
    num_evaluations: Count
    """Of these it is the best one. On `val` its luck in that is taken off the gain; on the others it had none."""
    num_images: Count
    num_groups: Count
    merged: bool = False
    """Equal captions and images counted as one."""
    num_earlier: Count = 0
    """Of these evaluations one was the best of so many on validation data that the run had before: that luck stays."""

    def sentence(self) -> str:
        """Say it in one line."""
        images = count(self.num_images, f"{SPLIT_NAMES[self.split]} image")
        how = f", epoch {shown_epoch(self.epoch)} against the model as loaded"
        if self.split == "folds":
            how += "; each is judged by a fold's model that neither trained on it nor was chosen by it"
        elif self.split == "test":
            how += "; nothing was chosen by these images"
        elif self.num_evaluations > 1:
            how += f"; the luck of being the best of {self.num_evaluations:,} evaluations is taken off"
        if self.num_earlier:
            how += (
                "; the best model of before the validation data changed is among them: its luck on images that both "
                "have is not taken off"
            )
        how += "; equal captions and images count as one" if self.merged else ""
        gain = f"{self.rsum.gain:+.1f} (95% interval {self.rsum.low:+.1f} to {self.rsum.high:+.1f})"
        return f"{VERDICTS[self.verdict]}: RSum {gain} on {images}{how}"


VERDICTS = {
    "better": "Better than before",
    "not distinguishable": "Not distinguishable from before",
    "worse": "Worse than before",
}
SPLIT_NAMES = {"val": "validation", "test": "test", "folds": "held-out"}


class EvaluationGain(BaseModel):
    """The gain of one evaluation over the model as loaded, on the same images; its luck in being chosen is in it."""

    model_config = RECORDED

    epoch: Place
    i2t_r1: GainInterval
    t2i_r1: GainInterval
    rsum: GainInterval


class WallTime(BaseModel):
    """Where a run's time went, in seconds on the main rank; with that of all its parts, if it was resumed."""

    model_config = RECORDED

    start: Seconds = 0.0
    """From the start of the process on: imports, weights, reading the data."""
    data: Seconds = 0.0
    """Waiting for batches."""
    step: Seconds = 0.0
    """Forward, loss, backward, update."""
    validation: Seconds = 0.0
    """Evaluations, also on watched data, of the test split and of averages of the weights."""
    saving: Seconds = 0.0
    """Writing checkpoints."""
    rest: Seconds = 0.0
    """All else until the results are written; the figures come after that."""

    def phases(self) -> dict[str, float]:
        """Return the seconds of each."""
        return {phase: getattr(self, phase) for phase in type(self).model_fields}

    @property
    def total(self) -> float:
        """Their sum, in seconds: the phases have no moment in common, and leave none out."""
        return sum(self.phases().values())

    def sentence(self) -> str:
        """Say it in one line."""
        total = max(self.total, 1e-9)
        parts = ", ".join(f"{phase} {100 * seconds / total:.0f}%" for phase, seconds in self.phases().items())
        return f"wall time: {timedelta(seconds=round(self.total))} ({parts})"


class WatchedRecord(BaseModel):
    """An evaluation of a data set that is watched."""

    model_config = RECORDED

    rsum: Number
    """The six recalls stand beside it."""
    num_images: Count
    content: str = ""
    """Tells its images and captions from others; records of another content are of another curve."""


class WatchedVerdict(BaseModel):
    """Whether one evaluation is better than another, by RSum."""

    model_config = RECORDED

    verdict: Literal["better", "not distinguishable", "worse"]
    rsum: GainInterval
    num_groups: Count


class WatchedResult(BaseModel):
    """What became of a data set that the run watched, between the model as loaded and the best one."""

    model_config = RECORDED

    name: str
    data: str
    num_images: Count
    num_texts: Count
    num_trained_on: Count
    """Images of the set that the run trained on, and that are left out."""
    baseline: dict[str, Number]
    """The six recalls and `rsum` of the model as loaded."""
    best: dict[str, Number]
    chance: dict[str, Number]
    verdict: WatchedVerdict | None = None
    """None: all images are of one group."""
    merged: bool = False
    """Equal captions and images count as one, since the captions are classes."""


class DriftResult(BaseModel):
    """How far the best model's features are from those of the model as loaded."""

    model_config = RECORDED

    text_overlap: Number
    """Percent of the nearest neighbours, among generic texts, that are still the same."""
    image_overlap: Number
    """The same among drawn scenes."""
    text_cosine: Number
    """Mean cosine of a feature with the one of the model as loaded."""
    image_cosine: Number
    num_texts: Count
    num_images: Count
    num_neighbours: Count


class InterpolationPoint(BaseModel):
    """An average of the weights as loaded (alpha 0) and the best ones (alpha 1): its retrieval on validation."""

    model_config = RECORDED

    rsum: Number
    """The six recalls stand beside it."""
    alpha: Annotated[Number, Field(ge=0, le=1)]
    watched: dict[str, Number] = {}
    """RSum of each watched set."""
    text_overlap: Number | None = None
    """As `DriftResult` has it, where nothing is watched."""
    image_overlap: Number | None = None


class Interpolation(BaseModel):
    """What lies between the model as loaded and the best one."""

    model_config = RECORDED

    points: Annotated[list[InterpolationPoint], Field(min_length=1)]
    chosen: Number
    """Alpha of `interpolated_model.pth`."""
    max_loss: Number
    """Points of the mean recall, RSum / 6, that may be lost on each watched set."""
    merged: bool = False
    """Equal captions and images count as one on validation, since the captions are classes."""
    verdict: WatchedVerdict | None = None
    """Of the chosen one over the model as loaded, on validation, without the luck of the choice."""
