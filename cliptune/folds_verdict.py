"""What folds found, put together: their gain on what they held out, and the length that they choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cliptune import results
from cliptune.features.verdict import DIRECTIONS, Verdict, answered, compare, compare_chosen, num_groups
from cliptune.results import TrainingResults
from cliptune.runtime.messages import one_line
from cliptune.training.checkpoint import RunFiles
from cliptune.training.state import TIE

MERGED = "merged_rsum"
FOLD_BITS = 32
"""A group's number, in all folds, has its fold above these bits."""


class FoldsEvaluation(NamedTuple):
    """What stands for the evaluation of a model that no image is left to evaluate: the mean of the folds'."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `evaluation.Evaluation` does."""
        return self.values


class Fold(NamedTuple):
    """A fold that has ended, as its files have it."""

    results: TrainingResults
    ranks: dict[str, Any]
    """`results/retrieval.npz`."""

    @classmethod
    def read(cls, files: RunFiles) -> Fold:
        """Read a fold's files.

        Raises:
            FileNotFoundError: one is not there.
            ValueError: one is damaged, or another run's.
        """
        found = results.read(files.results)
        if not isinstance(found, TrainingResults):
            raise ValueError(f"{files.results} is no training run's")
        try:
            with np.load(files.retrieval, allow_pickle=False) as file:
                ranks = {name: file[name] for name in file.files}
            fits = ranks["run_id"] == found.run_id and len(ranks["epochs"]) == len(found.history)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{files.retrieval}: {one_line(error)}; {_way_out(files)}") from None
        if not fits:
            raise ValueError(f"{files.retrieval} is not of the run in {files.results}; {_way_out(files)}")
        return cls(found, ranks)

    def at(self, evaluation: int, *, merged: bool) -> dict[str, Any]:
        """Return the ranks that an evaluation found."""
        return {name: self.ranks[f"merged_{name}" if merged else name][evaluation] for name in DIRECTIONS}

    @property
    def groups(self) -> dict[str, Any]:
        """Group of each query."""
        groups = self.ranks["groups"]
        return {"i2t": groups, "t2i": groups[self.ranks["text_to_image"]]}


def _way_out(files: RunFiles) -> str:
    return f"once {files.root} is deleted, --resume trains this fold anew"


class Judged(NamedTuple):
    """What folds say together."""

    merged: bool
    curve: list[float]
    length: int
    epochs: list[int]
    """By which each fold is judged."""
    gains: list[Verdict | None]
    verdict: Verdict | None


def judge_folds(folds: Sequence[Fold]) -> Judged:
    """Judge each fold at the epoch that is best on the other folds, and all of them together; and choose a length.

    The queries of all folds are one set, each ranked in its own fold's gallery; the curves' mean is weighted by images.

    Args:
        folds: of curves of one length.
    """
    merged = all(results.selection_key(dict(fold.results.baseline)) == MERGED for fold in folds)
    key = MERGED if merged else "rsum"
    curves = np.array([[getattr(record, key) for record in fold.results.history] for fold in folds])  # [K, E]
    weights = np.array([fold.results.num_images for fold in folds])[:, None]
    gains = (curves - curves[:, :1]) * weights
    # with the model as loaded no candidate, as in every verdict; of a tie the earlier epoch
    epochs = [1 + int(_rounded(gains.sum(0) - gains[fold])[1:].argmax()) for fold in range(len(folds))]
    mean = (curves * weights).sum(0) / weights.sum()
    length = 0
    for epoch, value in enumerate(mean.tolist()):
        length = epoch if value > mean[length] * (1 + TIE) else length
    ranks = [[fold.at(epoch, merged=merged) for epoch in (0, own)] for fold, own in zip(folds, epochs, strict=True)]
    groups = [
        {name: values + (index << FOLD_BITS) for name, values in fold.groups.items()}
        for index, fold in enumerate(folds)
    ]
    each = [_compared(own, of) for own, of in zip(ranks, groups, strict=True)]
    evaluations = [_joined([fold.at(epoch, merged=merged) for fold in folds]) for epoch in range(len(mean))]
    return Judged(merged, mean.tolist(), length, epochs, each, _compared_all(evaluations, _joined(groups), epochs))


def _rounded(values: Any) -> Any:
    """Round sums of recalls: those of the same ones, added up in another order, differ in the last digit."""
    return np.round(values, 6)


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts]) for name in DIRECTIONS}


def _compared(ranks: Sequence[dict[str, Any]], groups: dict[str, Any]) -> Verdict | None:
    """Compare two evaluations; None if their queries are of one group."""
    (before, after), left = answered(ranks, groups)
    is_enough = all(len(left[name]) for name in DIRECTIONS) and num_groups(left) > 1
    return compare(before, after, left) if is_enough else None


def _compared_all(
    evaluations: Sequence[dict[str, Any]], groups: dict[str, Any], epochs: Sequence[int]
) -> Verdict | None:
    """Compare the queries of all folds, each at its fold's epoch, with those of the model as loaded."""
    ranks, left = answered(evaluations, groups)
    if not all(len(left[name]) for name in DIRECTIONS) or num_groups(left) < 2:
        return None
    names = np.unique(np.concatenate([left[name] for name in DIRECTIONS]))
    return compare_chosen(ranks, np.asarray(epochs)[names >> FOLD_BITS], left)


def mean_evaluations(folds: Sequence[Fold], *, merged: bool) -> list[FoldsEvaluation]:
    """Average the folds' evaluations, weighted by images."""
    found = [fold.results for fold in folds]
    weights = [each.num_images for each in found]

    def mean(values: Sequence[Any]) -> dict[str, float]:
        each = [value.model_dump() for value in values]
        names = [name for name in results.Metrics.model_fields if all(value.get(name) is not None for value in each)]
        means = {
            name: math.fsum(weight * value[name] for weight, value in zip(weights, each, strict=True)) / sum(weights)
            for name in names
            if not name.endswith("_misses")
        }
        # else it would be taken for what epochs are chosen by, and it is not
        return means if merged else {name: value for name, value in means.items() if not name.startswith("merged_")}

    common = {
        "chance": mean([each.chance for each in found]),
        "num_images": sum(weights),
        "num_texts": sum(each.num_texts for each in found),
        "skipped": {key: sum(each.skipped.get(key, 0) for each in found) for key in ("images", "records")},
    }
    # a file has those of the model as loaded and of the fold's best epoch alone
    histograms = [
        _summed([each.histograms.baseline for each in found]),
        _summed([each.histograms.best for each in found]),
    ]
    return [
        FoldsEvaluation({
            **common, "metrics": mean([each.history[epoch] for each in found]), "histograms": histograms[epoch > 0]
        })
        for epoch in range(len(found[0].history))
    ]  # fmt: skip


def _summed(histograms: Sequence[results.Histograms]) -> dict[str, Any]:
    counts = {key: np.sum([getattr(each, key) for each in histograms], axis=0) for key in ("positive", "negative")}
    return {"bin_edges": histograms[0].bin_edges, **{key: value.tolist() for key, value in counts.items()}}
