"""The end of a run: its best model beside the one as loaded, on what is watched; and, if asked, what lies between them.

Weights between a pretrained model and what fine-tuning made of it often keep more of what the first knew than the
second does, and lose little or nothing of what it gained (WiSE-FT: Wortsman et al., Robust fine-tuning of zero-shot
models, CVPR 2022).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cliptune.features.verdict import DIRECTIONS, Ranks, Verdict, answered, compare_averages
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.model.weights import own_weights
from cliptune.recorded import Interpolation
from cliptune.results import selection_key
from cliptune.runs.data import RunData
from cliptune.runs.watch import Forgotten, Found, Seen, drift_of, verdict_values
from cliptune.runtime.distributed import any_rank, barrier, is_main
from cliptune.runtime.logs import progress_bar
from cliptune.runtime.messages import printable
from cliptune.settings import Config
from cliptune.training.checkpoint import RunFiles
from cliptune.training.state import TIE, RunState

logger = logging.getLogger(__name__)

ALPHAS = tuple(step / 10 for step in range(11))
RECORD = "interpolation"
"""What a results file and `interpolated_model.pth` have of it, `recorded.Interpolation`."""
MAX_LOSS = 1.0
"""Points of the mean recall, RSum / 6, that an average may lose on each watched set, against the model as loaded."""


class Ends:
    """The model as loaded, the best one, and the averages of their weights.

    Args:
        files: of the run.
        model_class: `clip_model.CLIPModel`.
        device: where the model is run.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or damaged; or the two hold different models.
    """

    def __init__(self, files: RunFiles, *, model_class: Callable[..., Any], device: torch.device) -> None:
        loaded, self.content = load_checkpoint(files.loaded), load_checkpoint(files.best)
        self.loaded, self.best = loaded["model_state_dict"], self.content["model_state_dict"]
        if loaded.get("run_id") != self.content.get("run_id"):
            raise ValueError(f"{files.loaded} and {files.best} are of different runs")
        shapes = [{name: value.shape for name, value in state.items()} for state in (self.loaded, self.best)]
        if shapes[0] != shapes[1] or loaded["architecture"] != self.content["architecture"]:
            raise ValueError(f"{files.loaded} and {files.best} are of different architectures")
        # a model may take the tensors it is built of as its own, and it is to be given others
        own = {name: value.clone() for name, value in self.best.items()}
        weights = own_weights({**self.content, "model_state_dict": own}, files.best)
        self._model = model_class(pretrained=weights).to(device).eval()

    def weights(self, alpha: float) -> dict[str, Tensor]:
        """Return the weights at `alpha`: 0 is the model as loaded, 1 the best one, both bit for bit.

        Averaged in float32: parameters, the temperature as the logarithm that is learned (so the temperatures'
        geometric mean), and BatchNorm's statistics, which are those of no model in between, but near. What is no
        number of a model (counts of batches, settings) is the best one's.
        """
        if alpha in {0, 1}:
            return dict(self.best if alpha else self.loaded)
        return {
            # lerp leaves equal weights, such as a frozen tower's, exactly as they are
            name: torch.lerp(self.loaded[name].float(), best.float(), alpha).to(best.dtype)
            if best.is_floating_point()
            else best
            for name, best in self.best.items()
        }

    def model_at(self, alpha: float) -> Any:
        """Return the model with the weights at `alpha`; it is one and the same at every call."""
        self._model.load_state_dict(self.weights(alpha))
        return self._model


class Point(NamedTuple):
    """An average of the two models."""

    alpha: float
    validation: Found
    seen: Seen

    def loses(self, first: Point) -> float:
        """Return how many points of the mean recall are lost, at most, on a watched set; minus infinity if none is."""
        watched = self.seen.watched
        return max(
            ((first.seen.watched[name].recalls["rsum"] - watched[name].recalls["rsum"]) / 6 for name in watched),
            default=-math.inf,
        )

    def values(self, first: Point) -> dict[str, Any]:
        """Return what the results file has of it."""
        drift = drift_of(first.seen, self.seen)
        return {
            "alpha": self.alpha,
            **self.validation.recalls,
            "watched": {name: each.recalls["rsum"] for name, each in self.seen.watched.items()},
            **({} if drift is None else {"text_overlap": drift.text_overlap, "image_overlap": drift.image_overlap}),
        }


def choose(points: Sequence[Point], *, max_loss: float = MAX_LOSS) -> tuple[Point, list[Point]]:
    """Return the point with the best RSum on validation among those that lose little of what is watched, and all those.

    Of a tie it is the one nearest to the model as loaded.

    Args:
        points: from alpha 0 on, which loses nothing.
        max_loss: points of the mean recall that may be lost on each watched set.
    """
    allowed = [point for point in points if point.loses(points[0]) <= max_loss]
    chosen = allowed[0]
    for point in allowed:
        if point.validation.recalls["rsum"] > chosen.validation.recalls["rsum"] * (1 + TIE):
            chosen = point
    return chosen, allowed


class LookBack(NamedTuple):
    """What the end of a run adds to its results and its summary."""

    values: dict[str, Any]
    lines: list[str]


def look_back(
    config: Config,
    model: Any,
    data: RunData[Any],
    files: RunFiles,
    *,
    state: RunState,
    model_class: Callable[..., Any],
    complete: Callable[[dict[str, Any]], dict[str, Any]],
    evaluations: Sequence[Ranks] = (),
) -> LookBack:
    """Compare the best model with the one as loaded; with `interpolate` evaluate what lies between, and save the best.

    An average that was chosen before stays, with its record, while its two ends are the run's. Every rank calls it.

    Args:
        config: of the run.
        model: that was trained.
        data: of the run, with what it watches.
        files: of the run.
        state: where the run has ended.
        model_class: `clip_model.CLIPModel`.
        complete: completes a checkpoint's content, `clip_model.add_self_test`.
        evaluations: ranks on validation of the run's evaluations, the model as loaded first, as `retrieval.npz` has
            them, so that the estimate covers the choice of the best one; none: they are not known any more.
    """
    open_ends = partial(Ends, files, model_class=model_class, device=model.device)
    found = _looked(
        config, model, data, files,
        is_best_trained=state.best_epoch > 0, open_ends=open_ends, complete=complete, evaluations=evaluations,
    )  # fmt: skip
    if RECORD in found.values or not is_main() or not files.interpolated.exists():
        return found
    kept = _kept(files, state)
    return LookBack({**found.values, **kept.values}, [*found.lines, *kept.lines])


def _looked(
    config: Config,
    model: Any,
    data: RunData[Any],
    files: RunFiles,
    *,
    is_best_trained: bool,
    open_ends: Callable[[], Ends],
    complete: Callable[[dict[str, Any]], dict[str, Any]],
    evaluations: Sequence[Ranks],
) -> LookBack:
    """Compare and average, without regard to what was found before."""
    is_asked_for = bool(config.data.watch_data) or config.training.interpolate
    if not is_best_trained:
        end = "\nthe best model is the one as loaded: nothing is forgotten, and nothing lies between them"
        return LookBack({}, [end] if is_asked_for else [])
    if model.starts_random and not is_asked_for:
        return LookBack({}, [])  # it knew nothing
    barrier()  # the main rank may still be writing the best model
    ends: Ends | None = None
    try:
        ends = open_ends()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:  # what the run is for is saved already
        logger.warning("the best model is not compared with the one as loaded: %s", error)
    if any_rank(ends is None) or ends is None:
        return LookBack({}, [])
    if not config.training.interpolate:
        return _told(data.watch.compare(*(data.watch.look(ends.model_at(alpha)) for alpha in (0.0, 1.0))))
    points: list[Point] = []
    for alpha in progress_bar(ALPHAS, desc="interpolation"):
        average = ends.model_at(alpha)
        evaluation = data.validate(average)
        key = selection_key(points[0].validation.metrics if points else evaluation.metrics)
        points.append(Point(alpha, Found.of(evaluation, key), data.watch.look(average)))
    data.skipped.agree()
    return _interpolated(data, ends, points, path=files.interpolated, complete=complete, evaluations=evaluations)


def _interpolated(
    data: RunData[Any],
    ends: Ends,
    points: Sequence[Point],
    *,
    path: Path,
    complete: Callable[[dict[str, Any]], dict[str, Any]],
    evaluations: Sequence[Ranks],
) -> LookBack:
    """Choose one of the averages, estimate its gain and save it."""
    chosen, allowed = choose(points)
    # alpha 0 is the model as loaded: whatever the folds chose, what is saved gains nothing over it
    verdict = estimated_gain(data, allowed, evaluations=evaluations) if chosen.alpha else None
    values = Interpolation.model_validate(
        {
            "points": [point.values(points[0]) for point in points],
            "chosen": chosen.alpha,
            "max_loss": MAX_LOSS,
            "merged": chosen.validation.merged,
            "verdict": verdict_values(verdict),
        }
    ).model_dump(mode="json")
    if is_main():
        _save(ends, chosen, path, record=values, complete=complete)
    barrier()
    forgotten = _told(data.watch.compare(points[0].seen, points[-1].seen))
    lines = _lines(points, chosen, verdict, path=path)
    return LookBack({**forgotten.values, RECORD: values}, [*forgotten.lines, *lines])


def estimated_gain(data: RunData[Any], allowed: Sequence[Point], *, evaluations: Sequence[Ranks]) -> Verdict | None:
    """Estimate what the choice gains on fresh images over the model as loaded, without the luck of the choice.

    The choice is that of alpha among the averages that are allowed, and that of the evaluation they are made of. None
    where the run's evaluations are lost, and so nobody knows what the second one was chosen among.
    """
    if len(evaluations) < 2:
        return None
    prefix = "merged_" if allowed[0].validation.merged else ""
    of_run = [{key: each[prefix + key] for key in DIRECTIONS} for each in evaluations]
    averages = [point.validation.ranks for point in allowed]
    ranks, groups = answered([*averages, *of_run], data.val.query_groups)
    try:
        return compare_averages(ranks[: len(averages)], ranks[len(averages) :], groups)
    except ValueError:  # all validation images are of one group
        return None


def _save(
    ends: Ends,
    chosen: Point,
    path: Path,
    *,
    record: dict[str, Any],
    complete: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Save the chosen average as a checkpoint like the best model's, and in it how it was chosen."""
    metrics = {**ends.content.get("metrics", {}), **chosen.validation.metrics}
    state = {key: value for key, value in ends.content.items() if key not in {"self_test", "format_version"}}
    state |= {"model_state_dict": ends.weights(chosen.alpha), "metrics": metrics, "alpha": chosen.alpha}
    save_checkpoint(path, complete({**state, RECORD: record}))


def _kept(files: RunFiles, state: RunState) -> LookBack:
    """Return the record of an average that was chosen before; one that is not of the run's ends is set aside."""
    path, record = files.interpolated, None
    try:
        content, best = load_checkpoint(path), load_checkpoint(files.best)
        if all(content.get(key) == best.get(key) for key in ("run_id", "epoch", "global_step")):
            record = content.get(RECORD)
    except (OSError, ValueError) as error:
        logger.warning("%s", error)
    if record is not None:
        # the models may be the same, and the data another one: then the ends have other numbers
        now = [each["metrics"][state.selection] for each in (state.baseline, state.best)]
        then = [record["points"][i]["rsum"] for i in (0, -1)]
        if all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(now, then, strict=True)):
            line = f"interpolated model, as it was chosen before (alpha {record['chosen']:.1f}): {printable(str(path))}"
            return LookBack({RECORD: record}, [line])
    aside = path.with_name(f"{path.stem}.aside.pth")
    while aside.exists():
        aside = aside.with_name(f"{aside.stem}+.pth")
    path.rename(aside)
    line = (
        f"the interpolated model lies between other models than the run's, or was chosen on other data: it is now "
        f"{printable(str(aside))}, and --resume --interpolate makes one anew"
    )
    return LookBack({}, [line])


def _told(forgotten: Forgotten) -> LookBack:
    return LookBack(forgotten.values(), forgotten.lines())


def _lines(points: Sequence[Point], chosen: Point, verdict: Verdict | None, *, path: Path) -> list[str]:
    """Say which average was chosen, how it compares with both ends, and what it gains."""
    names = list(chosen.seen.watched)
    head = f"{'interpolated, RSum':24}{'validation':>12}" + "".join(
        f"{name:>{max(len(name), 10) + 2}}" for name in names
    )
    rows = []
    for point in points:
        mark = " (chosen)" if point is chosen else ""
        watched = (f"{point.seen.watched[name].recalls['rsum']:{max(len(name), 10) + 2}.1f}" for name in names)
        rows.append(f"{f'alpha {point.alpha:.1f}{mark}':24}{point.validation.recalls['rsum']:12.1f}" + "".join(watched))
    among = f" of those that lose at most {MAX_LOSS:g} point of mean recall on each watched set" if names else ""
    gain = (
        "; what it gains on new images cannot be told: too few of them, or the run's own evaluations are lost"
        if verdict is None
        else (
            f"; over the model as loaded {verdict.gain:+.1f} (95%: {verdict.low:+.1f} to {verdict.high:+.1f}, "
            f"{verdict.num_groups:,} groups of images): {verdict.verdict}"
        )
    )
    rsum, merged = chosen.validation.recalls["rsum"], chosen.validation.merged
    if chosen.alpha == 0:
        gain = "; so nothing is gained over it"
    gain += "; equal captions and images count as one" if merged else ""
    which = {0.0: ", the model as loaded,", 1.0: ", the best model,"}.get(chosen.alpha, "")
    summary = f"alpha {chosen.alpha:.1f}{which} is the best{among}: RSum {rsum:.1f}{gain}"
    return ["", head, *rows, summary, f"interpolated model: {printable(str(path))}"]
