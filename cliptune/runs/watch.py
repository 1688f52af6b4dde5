"""Data sets that a run watches beside its validation: what the model forgets. The best epoch is never chosen by them.

Each evaluation of the run has their retrieval, by the same protocol; at its end the best model is compared with the one
as loaded, image by image. A run that watches nothing is told at least how far its features have moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cliptune.data.known import KnownImages
from cliptune.data.pairs import DataSource, Pairs
from cliptune.data.skipped import SkippedData
from cliptune.data.snapshot import Snapshots, take_snapshots
from cliptune.data.splits import separate_validation
from cliptune.features.drift import Drift, ProbeFeatures, drift_between, encode_probes
from cliptune.features.verdict import Verdict, answered, compare
from cliptune.results import RECALL_KEYS, selection_key
from cliptune.runs.data import RunData
from cliptune.runtime.messages import count, printable, shorten
from cliptune.settings import Config

logger = logging.getLogger(__name__)

E = TypeVar("E")
"""`evaluation.Evaluation`."""
MAX_NAME = 24
"""Characters of a watched set's name in tables."""


class WatchedSet(NamedTuple):
    """A data set that is evaluated beside validation."""

    name: str
    data_dir: str
    pairs: Pairs
    """Without the images that the run trains on."""
    num_trained_on: int
    content: str
    """Tells its images and captions from others: a curve over two different sets would mean nothing."""


class Found(NamedTuple):
    """What is kept of an `evaluation.Evaluation`, whose features may be large."""

    metrics: dict[str, float]
    """All of them."""
    recalls: dict[str, float]
    """The six recalls and their `rsum`; with equal captions and images counted as one where captions are classes."""
    chance: dict[str, float]
    """Of the recalls."""
    num_images: int
    num_texts: int
    ranks: dict[str, Any]
    """That the recalls were made of."""
    merged: bool = False
    """Equal captions and images count as one."""

    @classmethod
    def of(cls, evaluation: Any, key: str) -> Found:
        """Take these parts of an evaluation; `key` is `results.selection_key`'s of the first one of its data set."""
        prefix, metrics, chance = key.removesuffix("rsum"), evaluation.metrics, evaluation.chance
        recalls, by_chance = (
            {name: values[prefix + name] for name in (*RECALL_KEYS, "rsum")} for values in (metrics, chance)
        )
        ranks = evaluation.merged_ranks if prefix else evaluation.ranks
        return cls(metrics, recalls, by_chance, evaluation.num_images, evaluation.num_texts, ranks, bool(prefix))


class Seen(NamedTuple):
    """What a model made of what is watched."""

    watched: dict[str, Found]
    """By the names of the sets."""
    probes: ProbeFeatures | None
    """Where no set is watched."""


def watching(data: RunData[E], config: Config, snapshots: Snapshots, evaluate: Callable[..., E]) -> RunData[E]:
    """Return a run's data with what the run is to watch; arguments as `read_watched` and `Watch` take them."""
    sets = read_watched(config, snapshots)
    return data._replace(watch=Watch(sets, data, evaluate, config.data.allowed_skipped_fraction))


def read_watched(config: Config, snapshots: Snapshots) -> list[WatchedSet]:
    """Read what a run is to watch: a declared `val` or `test` split, else all of it, without what the run trains on.

    Args:
        config: of the run. Its names of columns are tried first, since two sets of one make often have the same.
        snapshots: of the run's data.

    Raises:
        FileNotFoundError, ValueError: a set cannot be read, or has fewer than two images that are not trained on.
    """
    known = KnownImages({"train": snapshots["train"].to_dict()})
    found: list[WatchedSet] = []
    for address in config.data.watch_data:
        try:
            pairs = _read(config, address)
        except (FileNotFoundError, ValueError) as error:
            reason = str(error).partition("; `python")[0]  # sample data would be of no use here
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"--watch_data: {reason}; --watch_data names where it lies now, none goes on without") from None
        trained_on = known.are_in(pairs, "train", address)
        own, num_trained_on = pairs.select(np.flatnonzero(~trained_on)), int(trained_on.sum())
        if len(own) < 2:
            raise ValueError(
                f"--watch_data {address}: of its {count(len(pairs), 'image')} the run trains on {num_trained_on:,}; at "
                "least 2 others are needed to tell what is forgotten"
            )
        taken = {watched.name for watched in found}
        watched = WatchedSet(_name(address, taken), address, own, num_trained_on, _content(own))
        without = f", without {num_trained_on:,} that the run trains on" if num_trained_on else ""
        logger.info("watched: %s (%s): %s%s", watched.name, address, count(len(own), "image"), without)
        found.append(watched)
    return found


def _read(config: Config, address: str) -> Pairs:
    settings = config.data
    plain = DataSource(address, max_skipped_fraction=settings.allowed_skipped_fraction)
    if settings.caption_key is None and settings.image_key is None:
        return separate_validation(plain, address)
    try:
        return separate_validation(
            replace(plain, caption_key=settings.caption_key, image_key=settings.image_key), address
        )
    except ValueError as error:
        try:
            return separate_validation(plain, address)
        except ValueError:
            raise error from None


def _name(address: str, taken: set[str]) -> str:
    path = Path(address)
    name = path.parent.name if path.suffix and path.parent.name else path.name
    name = shorten(printable(name or address), MAX_NAME)
    return next(each for each in (name, *(f"{name} {number}" for number in range(2, 99))) if each not in taken)


def _content(pairs: Pairs) -> str:
    snapshot = take_snapshots({"train": pairs})["train"]
    return f"{(int(snapshot.files.sum()) + snapshot.captions) % 2**64:016x}"


class Watch:
    """Evaluates models on the sets that a run watches; every rank calls its methods.

    Args:
        sets: what `read_watched` returned.
        data: of the run, whose encoder and caches are used.
        evaluate: `evaluation.evaluate`.
        max_skipped_fraction: how many images of a set may be unreadable, in [0, 1].
    """

    def __init__(
        self,
        sets: Sequence[WatchedSet],
        data: RunData[Any],
        evaluate: Callable[..., Any],
        max_skipped_fraction: float,
    ) -> None:
        self.sets, self._encoder, self._outputs_of, self._evaluate = sets, data.encoder, data.outputs_of, evaluate
        self._skipped = {
            each.name: SkippedData([each.pairs], num_images=len(each.pairs), max_fraction=max_skipped_fraction)
            for each in sets
        }
        self._keys: dict[str, str] = {}

    def evaluate(self, other: Any = None) -> dict[str, Found]:
        """Evaluate the run's model, or another one, on each set.

        Raises:
            ValueError: features that are not finite, or too many images that cannot be read.
        """
        encoder = self._encoder if other is None else replace(self._encoder, model=other)
        evaluations = {}
        for name, _, pairs, *_ in self.sets:
            evaluation = self._evaluate(
                encoder, pairs, cached=self._outputs_of(pairs), on_unreadable_image=self._skipped[name].note
            )
            evaluations[name] = Found.of(evaluation, self._keys.setdefault(name, selection_key(evaluation.metrics)))
            self._skipped[name].agree()
        return evaluations

    def records(self, evaluations: Mapping[str, Found]) -> dict[str, Any]:
        """Return what the run's history has of them, under `watched`; nothing if nothing is watched."""
        records = {
            each.name: {
                **evaluations[each.name].recalls,
                "num_images": evaluations[each.name].num_images,
                "content": each.content,
            }
            for each in self.sets
        }
        return {"watched": records} if records else {}

    def look(self, model: Any) -> Seen:
        """Look at a model that is not sharded: on the sets, or on generic texts and scenes if there are none."""
        probes = None if self.sets else encode_probes(replace(self._encoder, model=model))
        return Seen(self.evaluate(model), probes)

    def compare(self, loaded: Seen, best: Seen) -> Forgotten:
        """Compare what two models made of what is watched."""
        sets = [_compared(each, loaded.watched[each.name], best.watched[each.name]) for each in self.sets]
        return Forgotten(sets, drift_of(loaded, best))


class Forgotten(NamedTuple):
    """What was lost, or won, between the model as loaded and the best one."""

    sets: list[dict[str, Any]]
    """As `results.WatchedResult` has it, one for each set."""
    drift: Drift | None

    def values(self) -> dict[str, Any]:
        """Return what the results file holds of it."""
        drift = {} if self.drift is None else {"drift": self.drift._asdict()}
        return {"watched": self.sets, **drift} if self.sets else drift

    def lines(self) -> list[str]:
        """Lay it out for reading."""
        if not self.sets:
            return [] if self.drift is None else ["", self.drift.describe()]
        head = f"{'watched, RSum':{MAX_NAME + 2}}{'as loaded':>10}{'best':>10}{'change':>10}"
        return ["", head, *(_line(values) for values in self.sets)]


def drift_of(before: Seen, after: Seen) -> Drift | None:
    """Return how far the features have moved, where they were looked at."""
    if before.probes is None or after.probes is None:
        return None
    return drift_between(before.probes, after.probes)


def verdict_values(verdict: Verdict | None) -> dict[str, Any] | None:
    """Return a verdict as the results file has it."""
    if verdict is None:
        return None
    return {"verdict": verdict.verdict, "rsum": [*verdict[:3]], "num_groups": verdict.num_groups}


def _compared(watched: WatchedSet, loaded: Found, best: Found) -> dict[str, Any]:
    (before, after), groups = answered([loaded.ranks, best.ranks], watched.pairs.query_groups)
    try:
        verdict = compare(before, after, groups)
    except ValueError:  # all images are of one group
        verdict = None
    return {
        "name": watched.name,
        "data": watched.data_dir,
        "num_images": best.num_images,
        "num_texts": best.num_texts,
        "num_trained_on": watched.num_trained_on,
        "baseline": loaded.recalls,
        "best": best.recalls,
        "chance": best.chance,
        "verdict": verdict_values(verdict),
        **({"merged": True} if best.merged else {}),
    }


def _line(values: Mapping[str, Any]) -> str:
    """Say what became of a set: RSums, the change with its interval, and whether it can be told from chance."""
    before, after, verdict = values["baseline"]["rsum"], values["best"]["rsum"], values["verdict"]
    line = f"{values['name']:{MAX_NAME + 2}}{before:10.1f}{after:10.1f}{after - before + 0.0:+10.1f}"
    if values.get("merged"):
        line = f"{line}  equal captions and images as one,"
    if verdict is None:
        return f"{line}  all of one group, so nobody knows what other images would give"
    _, low, high = verdict["rsum"]
    interval = f"{low:+.1f} to {high:+.1f}, {count(values['num_images'], 'image')}"
    return f"{line}  ({interval}): {verdict['verdict']}"
