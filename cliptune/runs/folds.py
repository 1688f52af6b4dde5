"""Small sets: a run for each fold, judged by what it held out, then one on everything for the length that they choose.

A single split of a small set has too few validation images to tell an epoch from the next, and costs images to train
on. Here every image validates once, in the run that held its fold out (cross-validation: Stone, JRSS B 36, 1974). A
fold is judged at the epoch that is best on the other folds, so no image that judges was in the training or in the
choice of what it judges (cross-fitting). The runs are plain ones, in `folds/1/`, `folds/2/`, ...
"""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cliptune import recorded, results
from cliptune.cli import Started, override, resumed_config
from cliptune.data.folds import Folds
from cliptune.data.snapshot import Snapshot, Snapshots, describe_change, take_snapshots
from cliptune.features.verdict import Verdict
from cliptune.folds_verdict import Fold, FoldsEvaluation, judge_folds, mean_evaluations
from cliptune.language.catalogue import language_of
from cliptune.recorded import GainInterval, shown_epoch
from cliptune.results import FoldResult, FoldsResults
from cliptune.runs.data import RunData, Splits, folder_of, found_again, located, read_folded, without_excluded
from cliptune.runs.model import find_run_weights
from cliptune.runs.recipe import apply_recipe
from cliptune.runs.start import Resumed
from cliptune.runtime.distributed import world_size
from cliptune.runtime.files import read_json_object
from cliptune.runtime.logs import setup_logging
from cliptune.runtime.messages import count, one_line, printable
from cliptune.training.checkpoint import RunFiles
from cliptune.training.state import RunState, now

logger = logging.getLogger("train")

FIXED = {
    "output_dir", "cache_dir", "resume", "num_epochs", "early_stopping_patience", "watch_data", "interpolate",
    "validate_every", "allow_data_change",
}  # fmt: skip
"""Flags that are no run's of the folds: what this decides, and what would make folds different."""


class Part(NamedTuple):
    """What is told to a run that is one of several."""

    splits: Splits
    advises: bool = False
    """It tells what is odd about the data; the other folds' would say the same."""
    whole: Whole | None = None
    """It trains on everything; None: it holds a fold out."""

    def snapshots(self, resumed: Resumed | None, *, cache_file: Path) -> Snapshots:
        """Take snapshots of the run's data.

        Raises:
            ValueError: a resumed run had other data.
        """
        taken = take_snapshots(self.splits, cache_file=cache_file)
        if resumed is not None:
            stored = resumed.content.get("data", {}).items()
            before = {split: Snapshot.from_dict(values) for split, values in stored}
            if change := describe_change(before, taken):
                raise ValueError(f"{resumed.path}: the data is not what its folds were dealt from: {change}")
        return taken


class Whole(NamedTuple):
    """The run on everything, of which the folds know what it would be evaluated to."""

    length: int
    """Epochs after which it ends, on the schedule of all."""
    evaluations: Sequence[FoldsEvaluation]
    """After every epoch, the model as loaded first."""
    values: dict[str, Any]
    """What its results hold of the folds' verdict."""
    lines: Sequence[str]
    """What its summary says beside."""

    def validates(self, data: RunData[Any], state: RunState) -> RunData[Any]:
        """Return a run's data that gives the folds' evaluations in place of its own; `state` says how far it is."""
        return data._replace(validate=lambda: self.evaluations[len(state.history)])


def run_folds(started: Started, run: Callable[[Started, Part], int]) -> int:
    """Train the folds one after another, judge them and train on everything; a start that is resumed goes on.

    Args:
        started: what the run was started with.
        run: trains one run; returns its exit code.

    Returns:
        The exit code: that of the run that was stopped, if one was.

    Raises:
        ValueError: what does not go with folds, or a run that is not the one in the folder.
    """
    if world_size() > 1:
        raise ValueError("--folds trains one fold after another in one process: start it without torchrun")
    files, language = RunFiles(Path(started.config.run.output_dir)), language_of(started.config.run.language)
    with files.locked():
        record, started = _begin(started, files)
        config, cache_dir = started.config, files.cache
        cache_dir = cache_dir if config.run.cache_dir is None else Path(config.run.cache_dir)
        data = read_folded(config, given=started.given, cache_file=cache_dir / "identities.npz")
        record, started = _settle(record, started, data, files, cache_file=cache_dir / "identities.npz")
        _write(files, record)  # what a start that is killed in the first fold goes on with
        for fold in range(record.config["data"]["folds"]):
            if any(result.fold == fold + 1 for result in record.folds):
                continue
            folder = RunFiles(files.fold_runs / str(fold + 1))
            logger.info("fold %d of %d: %s", fold + 1, started.config.data.folds, folder.root)
            part = Part(_splits(started, data, fold), advises=fold == 0)
            if code := run(_of_fold(started, folder, cache_dir), part):
                return code
            del part
            gc.collect()  # its model, before the next one is made
            record = _with_fold(record, fold, folder)
            print(language.say_lines(fold_line(record.folds[fold])), flush=True)
            _write(files, record)
            _drop_states(folder)
        record, whole = _judge(record, files)
        print(language.say_lines("\n".join(["", *fold_table(record)])), flush=True)
        _write(files, record)
        part = Part(_splits(started, data, None), whole=whole)
        logger.info(
            "everything: %s, %d of %s; the validation numbers are the folds' means",
            count(len(part.splits["train"]), "image"), whole.length,
            count(started.config.training.num_epochs, "epoch"),
        )  # fmt: skip
        if code := run(_of_part(started, files, {"output_dir": str(files.root)}), part):
            return code
        _write(files, record.model_copy(update={"finished_at": now()}))
    return 0


def folds_started(started: Started) -> Started | None:
    """Return what a run with folds was started with, at the folder it goes on in; None: it is another run."""
    resume = started.config.run.resume
    if resume is None:
        return None if started.config.data.folds is None else started
    root = Path(started.config.run.output_dir)
    if resume != "latest":
        path = Path(resume)
        root = path if path.is_dir() else path.parent.parent
    above = root.resolve().parent
    if above.name == "folds" and RunFiles(above.parent).folds.exists():
        raise ValueError(f"--resume: {root} is a fold of the run in {above.parent}: --resume {above.parent} goes on")
    if resume != "latest":
        if not RunFiles(root).folds.exists():
            return None
        if "output_dir" in started.given and Path(started.config.run.output_dir).resolve() != root.resolve():
            raise ValueError(f"--resume {resume} is of a run with folds, which goes on in its own folder {root}")
        return started.at(root)
    if RunFiles(root).folds.exists():
        return started
    if started.config.data.folds is not None and RunFiles(root).states():
        raise ValueError(
            f"--resume: the run in {root} has no folds: --folds none goes on with it, and without --resume a new one "
            "begins"
        )
    return None if started.config.data.folds is None else started


def _begin(started: Started, files: RunFiles) -> tuple[FoldsResults | None, Started]:
    """Return the record that is gone on with, and the settings; None: it is a new one."""
    if started.config.run.resume is not None and files.folds.exists():
        record = _read(files.folds)
        there = [each for each in record.folds if RunFiles(files.fold_runs / str(each.fold)).results.exists()]
        if len(there) < len(record.folds):
            logger.warning("folds are gone: they, and the run on everything, are trained anew")
            for path in files.states():  # of another choice of the length, maybe
                path.unlink()
        record = record.model_copy(update={"folds": there, "finished_at": None})
        content = {"config": record.config, "config_file": record.config_file}
        config = found_again(resumed_config(content, started, source=files.folds), record.folder)
        if (num := config.training.num_epochs) != record.config["training"]["num_epochs"]:
            raise ValueError(f"--num_epochs {num} cannot change: folds of another length cannot be compared")
        return record, started._replace(config=config)
    pretrained = Path(started.config.model.pretrained)
    if pretrained.exists() and pretrained.resolve().is_relative_to(files.best.parent.resolve()):
        raise ValueError(f"--pretrained {pretrained} lies where this run writes: choose another --output_dir")
    return None, started


def _settle(
    record: FoldsResults | None, started: Started, data: Folds, files: RunFiles, *, cache_file: Path
) -> tuple[FoldsResults, Started]:
    """Return the record of a new start, or the one that is gone on with, whose data must be the same; and settings."""
    content = _content(data, cache_file=cache_file)
    if record is not None:
        if record.content != content:
            raise ValueError(
                f"{started.config.data.data_dir} is not the data that the folds were dealt from: restore it, or start "
                "without --resume"
            )
        return record, started
    config, where = started.config, started.config.data.data_dir
    files.set_aside_earlier_run()  # now that the data has been read
    if config.training.early_stopping_patience:
        logger.info("folds have no early stopping, so that their curves are of one length: --num_epochs decides it")
    if data.num_declared:
        logger.info("%s: the declared val (%s) is dealt out, too", where, count(data.num_declared, "image"))
    if len(data.test):
        logger.info("%s: the declared test (%s) is not looked at", where, count(len(data.test), "image"))
    if config.training.recipe is not None:
        weights = find_run_weights(config, started.given, None)
        config = apply_recipe(
            config, started, splits=_splits(started, data, None), weights=weights, is_resumed=False
        )  # fmt: skip
    record = FoldsResults(
        started_at=now(), finished_at=None, config=located(config).model_dump(mode="json"),
        config_file=started.file_values, folder=folder_of(config, ""), content=content, folds=[],
    )  # fmt: skip
    return record, started._replace(config=config)


def _content(data: Folds, *, cache_file: Path) -> str:
    """Return a hash of the images, their captions and folds, in any order of the images."""
    num_folds = int(data.of.max()) + 1
    splits = {"train": data.pairs, **{str(fold): data.splits(fold)["val"] for fold in range(num_folds)}}
    found = hashlib.sha256()
    for name, snapshot in take_snapshots(splits, cache_file=cache_file).items():
        found.update(f"{name} {snapshot.captions} ".encode() + np.sort(snapshot.files).tobytes())
    return found.hexdigest()[:32]


def _splits(started: Started, data: Folds, fold: int | None) -> Splits:
    splits = data.splits(fold)
    if started.config.data.exclude is not None:
        splits["train"] = without_excluded(splits, Path(started.config.data.exclude))
    # the test split stays aside: what every fold looks at is not unseen any more
    return {"train": splits["train"], "val": splits["val"]}


def _of_fold(started: Started, files: RunFiles, cache_dir: Path) -> Started:
    """Return the settings of a fold: a plain run, which can be looked at like any other."""
    num_folds = started.config.data.folds or 1
    own: dict[str, Any] = {
        "folds": None, "val_split": 1 / num_folds, "early_stopping_patience": 0, "watch_data": ["none"],
        "output_dir": str(files.root), "cache_dir": str(cache_dir),
    }  # fmt: skip
    return _of_part(started, files, own)


def _of_part(started: Started, files: RunFiles, own: dict[str, Any]) -> Started:
    config = override(started.config, {**own, "resume": "latest" if files.states() else None})
    given = {name: value for name, value in started.given.items() if name not in FIXED | {"folds"}}
    return Started(config, given, started.file_values)


def _with_fold(record: FoldsResults, fold: int, files: RunFiles) -> FoldsResults:
    """Take in a fold that has ended."""
    values = Fold.read(files).results
    curve = [evaluation.rsum for evaluation in values.history]
    result = FoldResult(
        fold=fold + 1, run_id=values.run_id, num_images=values.num_images, num_texts=values.num_texts, curve=curve
    )
    return record.model_copy(update={"folds": sorted([*record.folds, result], key=lambda each: each.fold)})


def fold_line(fold: FoldResult) -> str:
    """Say in a line how a fold went."""
    return (
        f"fold {fold.fold}: {count(fold.num_images, 'image')} held out, RSum {fold.curve[0]:.1f} as loaded, "
        f"{fold.curve[-1]:.1f} after {count(len(fold.curve) - 1, 'epoch')}"
    )


def _drop_states(files: RunFiles) -> None:
    """Delete what only a run that goes on needs; a fold's best model stays."""
    for path in (*files.states(), files.loaded):
        path.unlink(missing_ok=True)


def _judge(record: FoldsResults, files: RunFiles) -> tuple[FoldsResults, Whole]:
    """Judge all folds; returns the record with it, and what the run on everything is to know."""
    folds = [Fold.read(RunFiles(files.fold_runs / str(result.fold))) for result in record.folds]
    for result, fold in zip(record.folds, folds, strict=True):
        if result.run_id != fold.results.run_id:
            raise ValueError(
                f"{files.fold_runs / str(result.fold)} holds another run: delete it, and --resume trains this fold anew"
            )
    found = judge_folds(folds)
    told = [
        result.model_copy(update={"epoch": epoch, "gain": None if gain is None else _short(gain)})
        for result, epoch, gain in zip(record.folds, found.epochs, found.gains, strict=True)
    ]
    best = found.length or 1 + int(np.argmax(found.curve[1:]))
    verdict, reason = None, "the folds' images are of one group"
    if found.verdict is not None:
        reason = ""
        verdict = recorded.Verdict(
            verdict=found.verdict.verdict, rsum=GainInterval(*found.verdict[:3]),
            recalls={key: GainInterval(*interval) for key, interval in found.verdict.recalls.items()},
            num_groups=found.verdict.num_groups, split="folds", epoch=best, num_evaluations=len(found.curve) - 1,
            num_images=sum(fold.num_images for fold in told), merged=found.merged,
        )  # fmt: skip
    record = record.model_copy(
        update={
            "folds": told, "merged": found.merged, "curve": found.curve, "length": found.length, "verdict": verdict,
            "no_verdict": reason,
        }
    )  # fmt: skip
    values = {"verdict": verdict and verdict.model_dump(mode="json"), "no_verdict": reason}
    if not found.length:  # the model that stays is the one as loaded, of which a gain says nothing
        word = "" if verdict is None else f" (of the best, epoch {shown_epoch(best)}: RSum {verdict.rsum})"
        values = {"verdict": None, "no_verdict": f"no epoch is better on the folds' mean{word}"}
    lines = [_about(record, files)]
    return record, Whole(found.length, mean_evaluations(folds, merged=found.merged), values, lines)


def _short(found: Verdict) -> recorded.WatchedVerdict:
    return recorded.WatchedVerdict.model_validate(
        {"verdict": found.verdict, "rsum": GainInterval(*found[:3]), "num_groups": found.num_groups}
    )


def fold_table(record: FoldsResults) -> list[str]:
    """Lay out the folds and what they say together."""
    name = "RSum, merged" if record.merged else "RSum"
    lines = [f"{'fold':>4}{'images':>8}{'epoch':>7}   gain of {name} (95% interval), epoch chosen on the other folds"]
    for fold in record.folds:
        gain = "too few groups" if fold.gain is None else fold.gain.rsum
        lines.append(f"{fold.fold:4}{fold.num_images:8,}{fold.epoch!s:>7}   {gain}")
    if record.verdict is not None:
        lines.append(f" all{sum(fold.num_images for fold in record.folds):8,}{'':7}   {record.verdict.rsum}")
    return [*lines, "each image is ranked among those of its own fold, so RSums are those of small galleries"]


def _about(record: FoldsResults, files: RunFiles) -> str:
    where = f"{printable(str(files.folds))} holds the folds"
    if not record.length:
        return f"no epoch is better on the folds' mean, so nothing was trained on everything; {where}"
    return (
        f"the best model was trained on all images for {count(record.length, 'epoch')}, the length that the folds "
        f"chose. It has no validation images: the numbers above are the folds', whose models had fewer images; {where}"
    )


def begin_log(part: Part | None, files: RunFiles, level: str) -> bool:
    """Begin the log file of the run on everything, whose folder was cleared before the folds; tell if this is it."""
    if part is None or part.whole is None:
        return False
    setup_logging(level, files.log)
    return True


def _read(path: Path) -> FoldsResults:
    try:
        return FoldsResults.model_validate(read_json_object(path))
    except ValueError as error:
        raise ValueError(
            f"{path}: not what a run with folds wrote ({one_line(error)}): start without --resume"
        ) from None


def _write(files: RunFiles, record: FoldsResults) -> None:
    results.write(files.folds, record)
