"""What results files hold: one schema, written by the stages, read by figures.

Whoever wants to read a results file without this toolkit finds here what each key means. Keys that are not listed are
kept as they are, so a file of a later version can be read.
"""

from __future__ import annotations

import platform
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from cliptune.runtime.environment import device_name, git_commit, package_versions
from cliptune.runtime.files import read_json_object, write_json
from cliptune.runtime.messages import count, printable, shorten

if TYPE_CHECKING:
    import torch

RECALLS = (1, 5, 10)
RECALL_KEYS = tuple(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in RECALLS)
MAX_BYTES = 2**28
"""Of a file that is read; a thousand epochs take about 1 MB."""
MAX_SIZE = 1e100
"""Of a number."""
MAX_BINS = 10_000
MIN_BIN_WIDTH = 1e-9
_TRAINING_ONLY_KEYS = ("history", "baseline", "best_epoch")

# strict: neither `true` nor `"3"` is a number
# what is larger cannot be drawn, and no run comes near it
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-MAX_SIZE, le=MAX_SIZE)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
# whole numbers stay whole ones, so that a file says "epoch": 3
Place = Annotated[
    Number,
    Field(ge=0),
    AfterValidator(lambda place: int(place) if place.is_integer() else place),
    PlainSerializer(lambda place: place),
]
"""Epochs that are done, a fraction within one."""


class Recorded(BaseModel):
    """Base of what a results file holds: immutable, and keys of later versions are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Recalls(Recorded):
    """Recall at 1, 5 and 10 of both directions, in percent of the queries, and their sum."""

    i2t_r1: Number
    i2t_r5: Number
    i2t_r10: Number
    t2i_r1: Number
    t2i_r5: Number
    t2i_r10: Number
    rsum: Number

    def recalls(self) -> list[float]:
        """List the recalls in the order of `RECALL_KEYS`."""
        return [getattr(self, key) for key in RECALL_KEYS]


class Chance(Recalls):
    """What a random ranking gives, and the loss of a model for which all pairs of a batch look alike."""

    val_loss: Annotated[Number, Field(ge=0, le=44)] | None = None
    """ln(images in a validation batch): a validation set smaller than a training batch is one batch."""


class Metrics(Recalls):
    """One evaluation, over the full gallery."""

    i2t_mean_rank: Number
    t2i_mean_rank: Number
    i2t_median_rank: Number
    t2i_median_rank: Number
    positive_similarity: Number
    negative_similarity: Number
    similarity_gap: Number
    image_cosine: Number
    text_cosine: Number
    val_loss: Number | None = None
    """Contrastive loss in nats, in batches of the training's size; not measured by `evaluation.py`."""


class EpochRecord(Metrics):
    """One entry of a run's history, an evaluation: after an epoch or within one; epoch 0 is the model as loaded."""

    epoch: Place
    step: Count
    train_loss: Number | None
    """Mean over the pairs since the evaluation before, in nats."""
    train_accuracy: Number | None
    """In-batch accuracy in percent: a training curve, not a result."""
    learning_rate: Number
    backbone_learning_rate: Number | None
    val_loss: Number
    num_skipped: Count = 0
    """Validation images that could not be read."""


# a list of three in the file: with names, 500 points would be most of it
class SchedulePoint(NamedTuple):
    """The rates of the update that follows `step` updates; after the last one both are 0."""

    step: Count
    learning_rate: Number
    backbone_learning_rate: Number


class Histograms(Recorded):
    """Cosines of matched (`positive`) and unmatched (`negative`) pairs, counted in the same bins."""

    bin_edges: list[Number]
    positive: list[Count]
    negative: list[Count]

    @model_validator(mode="after")
    def _fit_together(self) -> Histograms:
        edges = self.bin_edges
        if len(edges) < 2 or any(left >= right for left, right in pairwise(edges)):
            raise ValueError("bin_edges: expected two or more numbers, each larger than the one before")
        if len(edges) > MAX_BINS + 1:
            raise ValueError(f"bin_edges: expected at most {MAX_BINS:,} bins, found {len(edges) - 1:,}")
        if max(map(abs, edges)) > 10 or min(right - left for left, right in pairwise(edges)) < MIN_BIN_WIDTH:
            raise ValueError(f"bin_edges: expected cosines, and bins no narrower than {MIN_BIN_WIDTH:g}")
        for key in ("positive", "negative"):
            if len(getattr(self, key)) != len(edges) - 1:
                raise ValueError(f"{key}: expected {len(edges) - 1} counts, one fewer than bin_edges")
        return self


class RunHistograms(Recorded):
    """Of the model as loaded and of the best epoch."""

    baseline: Histograms
    best: Histograms


class RunInfo(Recorded):
    """What is needed to run it again: software, machine, command, model."""

    versions: dict[str, str]
    """Of each package that can change a result."""
    python: str
    system: str
    commit: str | None
    """Of the checkout; with `-dirty` if its files were changed. None: not a checkout."""
    command: str
    device: str
    device_name: str
    precision: str
    world_size: Count
    model_name: str
    """Of the model that really ran, which weights from a file decide."""
    model_settings: dict[str, Any]
    """Its architecture: sizes, layers, activation."""


class _ModelName(Recorded):
    name: str


class _BatchSize(Recorded):
    batch_size: Annotated[int, Field(strict=True, gt=0, lt=2**63)]


class RecordedConfig(Recorded):
    """A run's settings; only those that figures need are looked at, since settings change their names."""

    model: _ModelName
    training: _BatchSize


class Results(Recorded):
    """What both kinds of results files hold."""

    started_at: str | None = None
    finished_at: str | None = None
    """None: the run has not ended, or was stopped."""
    run_id: str = ""
    """Of the run, as its checkpoints have it."""
    run: RunInfo | None = None
    """None: a file of before it was recorded."""
    num_images: Count
    num_texts: Count
    skipped: dict[str, Count] = {}
    """What this evaluation lacks: `images` that could not be read, `records` of the index that could not be used."""
    metrics: Metrics
    chance: Chance


class Gain(NamedTuple):
    """A gain over the model as loaded in points, and the 95% interval that it may lie in as well."""

    gain: Number
    low: Number
    high: Number

    def __str__(self) -> str:
        return f"{self.gain:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


class Verdict(Recorded):
    """Whether the best trained model is better than the one as loaded."""

    verdict: Literal["better", "not distinguishable", "worse"]
    rsum: Gain
    recalls: dict[str, Gain]
    """Under `i2t_r1` to `t2i_r10`."""
    split: Literal["val", "test"]
    epoch: Place
    """Of the evaluation that is judged."""
    num_evaluations: Count
    """Of these it is the best one. On `val` its luck in that is taken off the gain; on `test` it had none."""
    num_images: Count
    num_groups: Count
    merged: bool = False
    """Equal captions and images counted as one."""

    def sentence(self) -> str:
        """Say it in one line."""
        images = count(self.num_images, f"{SPLIT_NAMES[self.split]} image")
        how = f", epoch {shown_epoch(self.epoch)} against the model as loaded"
        if self.split == "test":
            how += "; nothing was chosen by these images"
        elif self.num_evaluations > 1:
            how += f"; the luck of being the best of {self.num_evaluations:,} evaluations is taken off"
        how += "; equal captions and images count as one" if self.merged else ""
        gain = f"{self.rsum.gain:+.1f} (95% interval {self.rsum.low:+.1f} to {self.rsum.high:+.1f})"
        return f"{VERDICTS[self.verdict]}: RSum {gain} on {images}{how}"


VERDICTS = {
    "better": "Better than before",
    "not distinguishable": "Not distinguishable from before",
    "worse": "Worse than before",
}
SPLIT_NAMES = {"val": "validation", "test": "test"}


class EvaluationGain(Recorded):
    """The gain of one evaluation over the model as loaded, on the same images; its luck in being chosen is in it."""

    epoch: Place
    i2t_r1: Gain
    t2i_r1: Gain
    rsum: Gain


class TestResults(Recorded):
    """The model as loaded and the best one on the test split, which they see once, after everything was chosen."""

    __test__ = False  # it is no test of pytest's
    num_images: Count
    num_texts: Count
    baseline: Metrics
    metrics: Metrics
    chance: Chance
    histograms: RunHistograms


class TrainingResults(Results):
    """`results/training_results.json`; `metrics` are those of the best evaluation."""

    best_epoch: Place
    baseline: Metrics
    histograms: RunHistograms
    peak_memory_gb: dict[str, Number] = {}
    config: RecordedConfig
    history: list[EpochRecord]
    schedule: list[SchedulePoint] = []
    """The planned rates of the whole run, at up to about 500 steps, the first and the last among them."""
    verdict: Verdict | None = None
    """None: the run has not ended, or `no_verdict` says why."""
    no_verdict: str = ""
    gains: list[EvaluationGain] = []
    """Of every evaluation after the model as loaded, for the curves."""
    test: TestResults | None = None
    """None: the data declares no test split, or the model as loaded is the best."""

    @model_validator(mode="after")
    def _holds_the_best_epoch(self) -> TrainingResults:
        if all(record.epoch != self.best_epoch for record in self.history):
            raise ValueError(f"history: has no record of best_epoch, {self.best_epoch}")
        return self

    @property
    def model_name(self) -> str:
        """The model that was trained; in a file of before it was recorded, the one that the settings name."""
        return self.run.model_name if self.run is not None else self.config.model.name


class EvaluationResults(Results):
    """`results/evaluation_results.json`."""

    checkpoint: str = ""
    data: str = ""
    split: str | None = None
    num_trained_on: Count = 0
    """Of the images: those that the checkpoint's run was trained on."""
    histograms: Histograms
    throughput: dict[str, Number] = {}
    """`images_per_second` (reading and preprocessing included) and `texts_per_second` (tokenising included)."""


def read(path: Path) -> TrainingResults | EvaluationResults:
    """Read a results file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a results file; names, in one line, the file and the first key that is missing or wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such results file: {path}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path}: not a results file: it has {size / 1e6:,.0f} MB")
    values = read_json_object(path)
    # a training file that lacks one of its keys is told so, not taken for an evaluation
    kind = TrainingResults if any(key in values for key in _TRAINING_ONLY_KEYS) else EvaluationResults
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_describe(error.errors(include_url=False)[0])}") from None


def write(path: Path, results: TrainingResults | EvaluationResults) -> None:
    """Write a results file, which a reader sees whole or not at all; what was not given is left away."""
    # a null that was given (not measured, not ended) is written, a default of this schema is not
    write_json(path, results.model_dump(mode="json", exclude_unset=True))


def shown_epoch(epoch: float) -> str:
    """Return the place of an evaluation as people read it: `3`, or `2.25` within epoch 3."""
    return f"{epoch:,}" if isinstance(epoch, int) else f"{epoch:,.2f}"


def command_line(stage: str, argv: list[str] | None) -> str:
    """Return the command that started a stage, as a shell takes it (`argv`: what its `main` was given)."""
    return shlex.join([stage, *(sys.argv[1:] if argv is None else argv)])


def run_info(
    *,
    command: str,
    device: torch.device,
    precision: str,
    world_size: int,
    model_name: str,
    model_settings: dict[str, Any],
) -> RunInfo:
    """Collect what a results file says of its run; takes a few hundredths of a second (Git).

    Args:
        command: from `command_line`.
        device: of this process.
        precision: as resolved, such as `bf16`.
        world_size: processes of the run.
        model_name: of the model that runs, `model.architecture.name`.
        model_settings: `model.architecture.to_dict()`.
    """
    return RunInfo(
        versions=package_versions(),
        python=platform.python_version(),
        system=platform.platform(),
        commit=git_commit(),
        command=command,
        device=str(device),
        device_name=device_name(device),
        precision=precision,
        world_size=world_size,
        model_name=shorten(model_name),
        model_settings={
            key: shorten(value) if isinstance(value, str) else value for key, value in model_settings.items()
        },
    )


_EXPECTED = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "named_tuple_type": "a list",
    "too_long": "3 values",  # a point of the schedule
    "string_type": "a text",
    "greater_than": "a number over {gt:g}",
    "greater_than_equal": "a number of {ge:g} or more",
    "less_than_equal": "a number of {le:g} or less",
}


def _describe(issue: Any) -> str:
    """Say what is wrong with one key, as it stands in the file: `history[3].val_loss`."""
    key = ""
    for part in issue["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{printable(shorten(part))}"
    key = key.removeprefix(".")
    if issue["type"] == "missing":
        return f"no key {key}, which train.py and evaluation.py write"
    if issue["type"] == "value_error":  # of a check across keys, which names the key within
        return f"{key}.{issue['ctx']['error']}".removeprefix(".")
    expected = _EXPECTED.get(issue["type"], "a number").format(**issue.get("ctx", {}))
    return f"{key}: expected {expected}, found {_kind(issue['input'])}"


def _kind(value: Any) -> str:
    """Name a JSON value in a few words; a number by its first digits."""
    if type(value) in (int, float):
        return str(value)[:12]
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), type(value).__name__)
