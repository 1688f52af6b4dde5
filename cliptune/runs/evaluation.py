"""What an evaluation is of: the models, and images that none of them was trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cliptune.cli import stored_config
from cliptune.data.identity import Hashes, file_identities
from cliptune.data.index import NoCaptionsError
from cliptune.data.known import KnownImages
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.data.splits import declared_split, default_split
from cliptune.data.suspects import exclude, read_suspects
from cliptune.data.table import BoolArray
from cliptune.features.tables import has_repeats
from cliptune.features.verdict import answered, compare, num_groups, recall_intervals
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.checkpoint_fields import CONFIG_KEYS
from cliptune.model.checkpoint_file import checkpoint_in, holds_checkpoint, load_checkpoint
from cliptune.model.published import ARCHIVES, published_weights
from cliptune.model.weights import NAMED_WEIGHTS, Weights, find_weights, own_weights
from cliptune.results import Comparison, RunInfo, selection_key
from cliptune.runs.data import found_again
from cliptune.runtime.messages import count, first_few, nearest, printable
from cliptune.settings import MAX_SKIPPED_FRACTION, Config
from cliptune.stage_settings import EvaluationSettings

logger = logging.getLogger(__name__)


class Candidate:
    """A model to evaluate: a run's checkpoint, other weights, or the name of published ones.

    Args:
        named: what it was called: a file, a folder, or a name.
        activation: for weights files that do not tell it.
        keep: hold what is read in memory until `take_weights`; False: read it again there.

    Attributes:
        path: the file or folder; of a name itself.
        config: settings of the checkpoint's run; None: other weights, of which nobody knows what they were trained on.
        known: the images that the run had.

    Raises:
        FileNotFoundError: neither there nor a name.
        ValueError: damaged, or no weights of a CLIP.
    """

    def __init__(self, named: str, *, activation: str | None = None, keep: bool = True) -> None:
        self.named, self.activation = named, activation
        self.path = str(checkpoint_in(named))
        self.is_name = not Path(self.path).exists()
        if self.is_name:
            _check_published(named)
        self.is_own = not self.is_name and holds_checkpoint(Path(self.path))
        content: dict[str, Any] = load_checkpoint(self.path, needs=CONFIG_KEYS) if self.is_own else {}
        # a file that cannot be used is told before anything is evaluated
        weights = None if self.is_own or self.is_name else self._read_weights()
        self._content, self._weights = (content, weights) if keep else ({}, None)
        self.config = self._settings(content) if self.is_own else None
        self.known = KnownImages(
            content.get("data", {}),
            earlier=content.get("earlier_data", []),
            was_trained=content.get("global_step", 0) > 0,
        )
        self.val_images: list[str] = content.get("val_images", [])
        self.run_id: str = content.get("run_id", "")

    def fetch(self) -> None:
        """Download what a name stands for, unless it is on this machine.

        Raises:
            OSError: it cannot be had; says how to get it.
        """
        if not self.is_name:
            return
        try:
            published_weights(self.named)
        except OSError as error:
            reason = str(error).partition(", or a local file with --pretrained")[0]
            raise OSError(f"{reason}, or a local file with --checkpoint") from None

    def take_weights(self) -> Weights:
        """Return the weights, which are not held any longer."""
        content, weights = self._content, self._weights
        self._content, self._weights = {}, None
        if not self.is_own:
            return weights or self._read_weights()
        return own_weights(content or load_checkpoint(self.path, needs=CONFIG_KEYS), self.path)

    def validated_on(self, pairs: Pairs, split: str, files: Hashes) -> BoolArray:
        """Tell which images the run had in a split, bool `[N]`; of an old checkpoint by their paths."""
        if self.known.holds(split):
            return self.known.are_in(pairs, split, "", files=files)
        found = np.zeros(len(pairs), dtype=bool)
        indices = pairs.find(self.val_images)
        found[indices[indices >= 0]] = True
        return found

    def _settings(self, content: dict[str, Any]) -> Config:
        return found_again(stored_config(content["config"], self.path), content.get("folder", ""))

    def _read_weights(self) -> Weights:
        found = find_weights(
            self.named if self.is_name else None,
            "openai" if self.is_name else f"./{self.path}" if self.path in NAMED_WEIGHTS else self.path,
            activation=None if self.is_name else self.activation,
        )
        assert found is not None  # only random weights are None
        return found


def find_candidates(named: Sequence[str], *, activation: str | None = None) -> list[Candidate]:
    """Find models by what they are called, each once; the weights of several are not held in memory.

    Raises:
        FileNotFoundError, ValueError: see `Candidate`.
    """
    names = {checkpoint_in(name): name for name in named}.values()
    return [Candidate(name, activation=activation, keep=len(names) == 1) for name in names]


def _check_published(name: str) -> None:
    if name in ARCHIVES:
        return
    if name in ARCHITECTURES:
        raise ValueError(f"--checkpoint {name}: no weights are published under this name; there are {_names()}")
    hint = nearest(name, ARCHIVES)
    hint = hint if hint.startswith("; did") else f"; names of published weights are {_names()}"
    raise FileNotFoundError(f"no such checkpoint: {name}{hint}")


def _names() -> str:
    return ", ".join(ARCHIVES)


class Chosen(NamedTuple):
    """The images of a data set that are evaluated."""

    pairs: Pairs
    data_dir: str
    split: str
    num_left_out: int
    """Images that were left out, since a candidate was trained on them."""
    trained: dict[str, int]
    """How many of `pairs` each candidate was trained on, by its path."""
    max_skipped_fraction: float
    excluded: Mapping[str, int] = {}
    """How many `images`, and `pairs` of these and others, a list of suspects has left out."""

    def note(self) -> str | None:
        """Say which images were trained on, and what that means."""
        if self.num_left_out:
            number = self.num_left_out + len(self.pairs)
            return (
                f"{self.data_dir}: {self.num_left_out:,} of the {count(number, 'image')} were trained on, and are left "
                "out; --include_trained evaluates them as well"
            )
        if not any(self.trained.values()):
            return None
        return (
            f"{self.data_dir}: {_by_candidate(self.trained)} of the {count(len(self.pairs), 'image')} were trained on, "
            "so these numbers do not tell how the model does on new images: without --include_trained they are left out"
        )


def choose_images(settings: EvaluationSettings, data_dir: str | None, candidates: Sequence[Candidate]) -> Chosen:
    """Read a data set, without the images that a candidate was trained on.

    Args:
        settings: of the stage.
        data_dir: the data set; None: the images that the candidates' runs validated on.
        candidates: the models.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, is not the one that the runs had, or nothing is left of it.
    """
    fraction = settings.max_skipped_fraction
    if fraction is None:
        fraction = max(_allowed_fraction(candidate) for candidate in candidates)
    find = _own_validation if data_dir is None else _of_data_set
    pairs, split, source = find(settings, data_dir, candidates, fraction)
    data_dir = str(source.data_dir)
    files = file_identities(pairs.paths)
    trained = [candidate.known.trained_on(pairs, data_dir, files=files) for candidate in candidates]
    counts = {candidate.path: int(found.sum()) for candidate, found in zip(candidates, trained, strict=True)}
    in_any = np.logical_or.reduce(trained)
    if settings.include_trained or not in_any.any():
        return Chosen(pairs, data_dir, split, 0, counts, fraction)
    if in_any.all():
        raise ValueError(
            f"{data_dir}: all images were trained on ({_by_candidate(counts)} of {len(pairs):,}), so nothing is left "
            f"that tells how a model does on new ones: name other data with --data_dir"
            f"{_other_split(split, candidates)}, or evaluate these all the same with --include_trained"
        )
    chosen = pairs.select(np.flatnonzero(~in_any))
    return Chosen(chosen, data_dir, split, int(in_any.sum()), dict.fromkeys(counts, 0), fraction)


def with_and_without(chosen: Chosen, suspects: str | None, candidates: Sequence[Candidate]) -> list[Chosen]:
    """Return a data set, and the same without the pairs that a list leaves out, if there are any; say how many.

    Raises:
        FileNotFoundError, ValueError: the list cannot be read, or leaves nothing.
    """
    if suspects is None:
        return [chosen]
    left, num_images, num_pairs, _ = exclude(chosen.pairs, read_suspects(Path(suspects)))
    counts = f"{num_pairs:,} of the {count(chosen.pairs.num_pairs, 'pair')}, and with them {count(num_images, 'image')}"
    logger.info("--exclude %s leaves out %s of %s", suspects, counts, chosen.data_dir)
    if not num_pairs:
        return [chosen]
    if not len(left):
        raise ValueError(f"--exclude {suspects} leaves nothing of {chosen.data_dir} to evaluate")
    trained = dict(chosen.trained)
    if any(trained.values()):
        files = file_identities(left.paths)
        for candidate in candidates:
            trained[candidate.path] = int(candidate.known.trained_on(left, chosen.data_dir, files=files).sum())
    excluded = {"images": num_images, "pairs": num_pairs}
    split = f"{chosen.split}, without {Path(suspects).name}"  # a set of its own, in tables and results
    return [chosen, chosen._replace(pairs=left, split=split, trained=trained, excluded=excluded)]


def _by_candidate(counts: dict[str, int]) -> str:
    """Say how many images each candidate was trained on: `54`, or `A 54; B 60`."""
    if len(counts) == 1:
        return f"{next(iter(counts.values())):,}"
    return first_few([f"{printable(path)} {number:,}" for path, number in counts.items()], limit=10)


def _other_split(split: str, candidates: Sequence[Candidate]) -> str:
    """Return the flag that takes validation images of a single checkpoint, where that is another choice."""
    if len(candidates) > 1 or split == "val" or not candidates[0].known.holds("val"):
        return ""
    return ", take the images that the run validated on with --split val"


def _allowed_fraction(candidate: Candidate) -> float:
    return MAX_SKIPPED_FRACTION if candidate.config is None else candidate.config.data.allowed_skipped_fraction


Found = tuple[Pairs, str, DataSource]
"""Images, the split that they are, and how they were read."""


def _of_data_set(
    settings: EvaluationSettings, data_dir: str | None, candidates: Sequence[Candidate], fraction: float
) -> Found:
    """Read a data set that was named."""
    assert data_dir is not None
    source = DataSource(
        data_dir, settings.image_dir, settings.label_key or settings.caption_key, fraction,
        image_key=settings.image_key,
        captions_from=settings.captions_from, caption_template=settings.caption_template,
    )  # fmt: skip
    try:
        pairs = load_pairs(source)
    except NoCaptionsError:
        if settings.classes is None or source.captions_from is not None or not Path(data_dir).is_dir():
            raise
        source = replace(source, captions_from="folder")  # images alone are enough to be classified
        pairs = load_pairs(source)
    split = settings.split or default_split(pairs, source)
    runs = [candidate for candidate in candidates if candidate.known.holds(split)]
    if split in pairs.declared() or not runs:
        return declared_split(pairs, split, source), split, source
    first, *others = runs
    return _shared(first.known.select(pairs, split, source), split, [first, *others]), split, source


def _own_validation(
    settings: EvaluationSettings, _: str | None, candidates: Sequence[Candidate], fraction: float
) -> Found:
    """Find the images that the candidates' runs validated on, where they found them."""
    runs = [candidate for candidate in candidates if candidate.config is not None]
    if not runs:
        names = first_few([candidate.path for candidate in candidates])
        raise ValueError(f"--data_dir is needed: {names} holds weights alone, and no run's validation images")
    if settings.split not in {None, "val"}:
        raise ValueError(f"--split {settings.split} needs --data_dir; without it the validation images are taken")
    first = runs[0]
    assert first.config is not None
    data = first.config.data
    for run in runs:
        if run.config is not None and run.config.data.folds is not None:
            raise ValueError(
                f"{run.path} is of a run with --folds, whose last model has no validation images of its own: its "
                "results/folds.json says what the folds found. Name other data with --data_dir"
            )
    source = DataSource(
        data.data_dir, settings.image_dir or data.image_dir, settings.label_key or data.caption_key, fraction,
        image_key=data.image_key, captions_from=data.captions_from, caption_template=data.caption_template,
    )  # fmt: skip
    source = source if data.val_data is None else source.at(data.val_data)
    return _shared(_validated_by(first, source), "val", runs), "val", source


def _shared(pairs: Pairs, split: str, runs: Sequence[Candidate]) -> Pairs:
    """Return those of the first run's images that all of them had in a split, and say how many that are."""
    if len(runs) == 1:
        return pairs
    files = file_identities(pairs.paths)
    had = [run.validated_on(pairs, split, files) for run in runs[1:]]
    shared = np.flatnonzero(np.logical_and.reduce(had))
    counts = {runs[0].path: len(pairs)} | {run.path: int(found.sum()) for run, found in zip(runs[1:], had, strict=True)}
    if not len(shared):
        raise ValueError(
            f"no image is in the {split} of all runs (of those of the first: {_by_candidate(counts)}): name a data set "
            "with --data_dir, from which what they were trained on is left out (runs of one --split_seed have the same "
            "split)"
        )
    if len(shared) < len(pairs):
        logger.warning(
            "the runs had different images in %s; taken are the %s that all of them had (of those of the first: %s)",
            split, f"{len(shared):,}", _by_candidate(counts),
        )  # fmt: skip
    return pairs.select(shared)


def _validated_by(run: Candidate, source: DataSource) -> Pairs:
    """Return the images that a run validated on."""
    way_out = "--data_dir DATA --split val takes them from where they lie now, --image_dir images of the same index"
    try:
        pairs = load_pairs(source)
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).partition("; `python")[0]  # sample data would be of no use here
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        where = f"looked for in {Path(source.data_dir).absolute()}"
        raise kind(f"the images that the checkpoint's run validated on, {where}: {reason}; {way_out}") from None
    indices = pairs.find(run.val_images)
    if run.known.holds("val"):
        own = pairs.select(indices) if (indices >= 0).all() else None
        if own is not None and run.known.are_in(own, "val", str(source.data_dir)).all():
            return own  # only their files had to be looked at
        return run.known.select(pairs, "val", source)
    missing = [path for path, index in zip(run.val_images, indices, strict=True) if index < 0]
    if missing:
        raise ValueError(
            f"the checkpoint's run validated on {count(len(run.val_images), 'image')}, of which {len(missing):,} "
            f"cannot be found in {source.data_dir}: {first_few(missing, 1)}; try another data set with --data_dir"
        )
    return pairs.select(indices)


class EvaluationRecord(NamedTuple):
    """What an evaluation of a candidate gave."""

    values: dict[str, Any]
    """Under the keys of `results.EvaluationResults`."""
    ranks: dict[str, Any]
    """Of every query, `i2t` and `t2i`; NaN where there is none."""
    merged_ranks: dict[str, Any]
    """The same with duplicates merged."""


def record_of(candidate: Candidate, chosen: Chosen, evaluation: Any, *, run: RunInfo) -> EvaluationRecord:
    """Complete an evaluation with what it is of, and with intervals.

    Args:
        candidate: the model.
        chosen: the images.
        evaluation: an `evaluation.Evaluation` of them.
        run: what it ran on.
    """
    values = evaluation.to_dict()
    intervals = _intervals(evaluation.ranks, chosen.pairs)
    if has_repeats(values["metrics"]):
        merged = _intervals(evaluation.merged_ranks, chosen.pairs)
        intervals |= {f"merged_{key}": bounds for key, bounds in merged.items()}
    of_what = {
        "run_id": candidate.run_id,
        "run": run,
        "checkpoint": candidate.path,
        "data": chosen.data_dir,
        "split": chosen.split,
        "num_trained_on": chosen.trained[candidate.path],
        "num_left_out": chosen.num_left_out,
        "excluded": chosen.excluded,
        "intervals": intervals,
    }
    return EvaluationRecord(of_what | values, evaluation.ranks, evaluation.merged_ranks)


def _intervals(ranks: dict[str, Any], pairs: Pairs) -> dict[str, tuple[float, float]]:
    """Return the intervals of the recalls; none of a single group."""
    (answers,), groups = answered([ranks], pairs.query_groups)
    return recall_intervals(answers, groups) if num_groups(groups) > 1 else {}


def compare_all(chosen: Chosen, records: Sequence[EvaluationRecord]) -> list[Comparison]:
    """Compare each two checkpoints on a set, on the images that all could be asked of; none of a single group.

    Where captions are classes, duplicates are merged, as where a run chooses its best epoch.
    """
    own = [record for record in records if (record.values["data"], record.values["split"]) == chosen[1:3]]
    if len(own) < 2:
        return []
    merged = selection_key(own[0].values["metrics"]) == "merged_rsum"
    all_ranks = [record.merged_ranks if merged else record.ranks for record in own]
    ranks, groups = answered(all_ranks, chosen.pairs.query_groups)
    if num_groups(groups) < 2:
        return []
    found = []
    for (before, first), (after, second) in combinations(zip(own, ranks, strict=True), 2):
        verdict = compare(first, second, groups)
        found.append(
            Comparison(
                data=chosen.data_dir,
                split=chosen.split,
                before=before.values["checkpoint"],
                after=after.values["checkpoint"],
                merged=merged,
                recalls={key: tuple(interval) for key, interval in verdict.recalls.items()},
                **{key: value for key, value in verdict._asdict().items() if key != "recalls"},
            )
        )
    return found
