"""What results files hold: one schema, written by the stages, read by figures.

Whoever wants to read a results file without this toolkit finds here what each key means. Keys that are not listed are
kept as they are, so a file of a later version can be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError, model_validator

from cliptune.recorded import (
    RECORDED,
    Bounds,
    Count,
    DriftResult,
    EvaluationGain,
    Interpolation,
    Number,
    Place,
    Verdict,
    WallTime,
    WatchedRecord,
    WatchedResult,
    WatchedVerdict,
)
from cliptune.runtime.files import read_json_object, write_json
from cliptune.schema_issues import describe_issue

RECALLS = (1, 5, 10)
RECALL_KEYS = tuple(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in RECALLS)
CEILING_OF_CLASSES = 540.0
"""RSum of a perfect model below which the standard protocol measures how captions repeat rather than the model."""
MAX_BYTES = 2**28
"""Of a file that is read; a thousand epochs take about 1 MB."""
MAX_BINS = 10_000
MIN_BIN_WIDTH = 1e-9
_TRAINING_ONLY_KEYS = ("history", "baseline", "best_epoch")


class Recorded(BaseModel):
    """Base of what a results file holds."""

    model_config = RECORDED


class MergedRecalls(Recorded):
    """The recalls with equal texts and copies of an image merged, see docs/EVALUATION.md."""

    merged_i2t_r1: Number | None = None
    merged_i2t_r5: Number | None = None
    merged_i2t_r10: Number | None = None
    merged_t2i_r1: Number | None = None
    merged_t2i_r5: Number | None = None
    merged_t2i_r10: Number | None = None
    merged_rsum: Number | None = None
    """None: a file of before they were taken."""


class Recalls(MergedRecalls):
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

    val_loss: Annotated[Number, Field(ge=0, le=2**31)] | None = None
    """ln(images in a validation batch): a validation set smaller than a training batch is one batch. Of a sigmoid loss
    see `SigmoidLoss.chance`."""


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
    ceiling_rsum: Number | None = None
    """RSum that no model exceeds on these captions, since texts that several images have cannot be told apart."""
    i2t_duplicate_misses: Count | None = None
    """Images found at 1 only once equal texts and copies of an image are merged."""
    t2i_duplicate_misses: Count | None = None
    """The same of texts."""
    val_loss: Number | None = None
    """Contrastive loss in nats, in batches of the training's size; not measured by `evaluation.py`."""


class EpochRecord(Metrics):
    """One entry of a run's history, an evaluation: after an epoch or within one; epoch 0 is the model as loaded."""

    epoch: Place
    step: Count
    train_loss: Number | None
    """In nats: after an epoch the mean over its pairs, within one over those since the evaluation before."""
    train_accuracy: Number | None
    """In-batch accuracy in percent: a training curve, not a result."""
    learning_rate: Number
    backbone_learning_rate: Number | None
    val_loss: Number
    num_skipped: Count = 0
    """Validation images that could not be read."""
    earlier_data: bool = False
    """Of validation data that the run had before it was resumed with other data."""
    watched: dict[str, WatchedRecord] = {}
    """The sets of `watch_data` by their names."""


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


class _Training(Recorded):
    batch_size: Annotated[int, Field(strict=True, gt=0, lt=2**63)]
    loss: str = "infonce"


class RecordedConfig(Recorded):
    """A run's settings; only those that figures need are looked at, since settings change their names."""

    model: _ModelName
    training: _Training


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
    num_skipped_steps: Count = 0
    """Steps that changed no weight, since their loss or gradient was not finite."""
    peak_memory_gb: dict[str, Number] = {}
    wall_time: WallTime | None = None
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
    watched: list[WatchedResult] = []
    drift: DriftResult | None = None
    interpolation: Interpolation | None = None

    @model_validator(mode="after")
    def _holds_the_best_epoch(self) -> TrainingResults:
        if all(record.epoch != self.best_epoch or record.earlier_data for record in self.history):
            raise ValueError(f"history: has no record of best_epoch, {self.best_epoch}")
        return self

    def watched_curves(self) -> dict[str, list[tuple[float, float]]]:
        """Return epoch and RSum of each watched set, without what was evaluated on another set of its name."""
        records = [(record.epoch, record.watched) for record in self.history]
        last = {name: each.content for _, watched in records for name, each in watched.items()}
        return {
            name: [(place, now[name].rsum) for place, now in records if name in now and now[name].content == content]
            for name, content in last.items()
        }

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
    excluded: dict[str, Count] = {}
    """What `--exclude` left out of the set: `images`, and `pairs` with these and others."""
    num_left_out: Count = 0
    """Images of the data set that are not among these, since a checkpoint's run was trained on them."""
    intervals: dict[str, Bounds] = {}
    """Low and high of the 95% interval of each recall and of RSum; empty of a single group."""
    histograms: Histograms
    throughput: dict[str, Number] = {}
    """`images_per_second` (reading and preprocessing included) and `texts_per_second` (tokenising included)."""


class CheckFinding(Recorded):
    """One thing that `data_loader.py --check` found."""

    kind: str
    name: str = ""  # of its row in the table
    number: Number | None
    text: str
    advice: str  # what to do; empty: nothing
    values: dict[str, Number] = {}
    """Numbers behind the text."""


class DataCheckResults(Recorded):
    """`results/data_check.json`."""

    started_at: str
    finished_at: str
    data: str
    num_images: Count
    num_texts: Count
    splits: dict[str, Count]
    """Images of each."""
    num_issues: Count
    issues: list[dict[str, str | None]]
    """The first 1,000: image, reason and, for a record, its location."""
    findings: list[CheckFinding]


class FoldResult(Recorded):
    """A fold: a run that validated on it and was trained on all others."""

    fold: Count
    """From 1 on; its run lies in `folds/<fold>`."""
    run_id: str
    num_images: Count
    num_texts: Count
    curve: list[Number]
    """RSum after every epoch, on its images in a gallery of their own; the model as loaded first."""
    epoch: Count | None = None
    """The best one on the other folds, by which this one is judged."""
    gain: WatchedVerdict | None = None
    """What that epoch gains on this fold; None: its images are of one group, or folds are still to come."""


class FoldsResults(Recorded):
    """`results/folds.json`; written after every fold."""

    started_at: str
    finished_at: str | None
    """None: the folds, or the run on everything, have not ended."""
    config: dict[str, Any]
    config_file: dict[str, Any] = {}
    folder: str = ""
    """In which it was started."""
    content: str
    """Tells the data, and how it is dealt out, from other data."""
    folds: list[FoldResult]
    merged: bool = False
    """Curves and gains are with equal captions and images merged, since captions are classes."""
    curve: list[Number] = []
    """Mean of the folds' curves, weighted by images."""
    length: Count | None = None
    """Epochs of the run on everything: where the mean curve is best; 0: the model as loaded is."""
    verdict: Verdict | None = None
    no_verdict: str = ""


class Comparison(Recorded):
    """What one checkpoint gains over another on the same images."""

    data: str
    split: str | None = None
    before: str
    after: str
    merged: bool = False
    """Duplicates are merged, since captions are classes."""
    gain: Number
    """Of RSum, from `before` to `after`."""
    low: Number
    high: Number
    verdict: str
    """`better`, `worse` or `not distinguishable`."""
    recalls: dict[str, tuple[Number, Number, Number]]
    """Gain, low and high of each recall."""
    num_groups: Count


class SeveralEvaluations(Recorded):
    """`results/evaluation_results.json` of several checkpoints, or on several data sets."""

    started_at: str | None = None
    finished_at: str | None = None
    evaluations: Annotated[list[EvaluationResults], Field(min_length=1)]
    comparisons: list[Comparison] = []


def of_evaluations(
    evaluations: list[dict[str, Any]], comparisons: list[Comparison], *, times: dict[str, str]
) -> EvaluationResults | SeveralEvaluations:
    """Put evaluations into the form of their file: a single one stands alone.

    Args:
        evaluations: values under the keys of `EvaluationResults`.
        comparisons: of their checkpoints.
        times: `started_at` and `finished_at`.
    """
    if len(evaluations) == 1:
        return EvaluationResults.model_validate(times | evaluations[0])
    return SeveralEvaluations.model_validate({**times, "evaluations": evaluations, "comparisons": comparisons})


def selection_key(metrics: Mapping[str, float | None]) -> str:
    """Return the key of the number that epochs are compared by: `rsum`, or `merged_rsum` where captions are classes.

    Captions count as classes if they repeat so much that a perfect model stays below 90% of 600 by the standard
    protocol. The captions decide, not the model: ask it of the first evaluation of a run.

    Args:
        metrics: of an evaluation.
    """
    ceiling, merged = metrics.get("ceiling_rsum"), metrics.get("merged_rsum")
    return "rsum" if ceiling is None or merged is None or ceiling >= CEILING_OF_CLASSES else "merged_rsum"


AnyResults = TrainingResults | EvaluationResults | SeveralEvaluations


def read(path: Path) -> AnyResults:
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
    kind: type[AnyResults] = EvaluationResults
    if any(key in values for key in _TRAINING_ONLY_KEYS):
        kind = TrainingResults
    elif "evaluations" in values:
        kind = SeveralEvaluations
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {describe_issue(error.errors(include_url=False)[0])}") from None


def write(path: Path, results: Recorded) -> None:
    """Write a results file, which a reader sees whole or not at all; what was not given is left away."""
    # a null that was given (not measured, not ended) is written, a default of this schema is not
    write_json(path, results.model_dump(mode="json", exclude_unset=True))
