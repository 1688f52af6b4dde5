"""What a run tells people: log lines, lines of JSON, TensorBoard events, the results file, a summary."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from cliptune import results
from cliptune.recorded import GainInterval, Verdict, WallTime, shown_epoch
from cliptune.results import RECALL_KEYS
from cliptune.runtime.device import peak_memory
from cliptune.runtime.distributed import is_main
from cliptune.runtime.files import atomic_writer, write_text
from cliptune.runtime.logs import SHOWN_BY_BAR, progress_bar, reopen_log_file
from cliptune.runtime.messages import first_few, printable, shown
from cliptune.training.advice import chance_loss, is_at_chance, no_better_epoch
from cliptune.training.background import BackgroundThread
from cliptune.training.checkpoint import RunFiles
from cliptune.training.events import EventFile
from cliptune.training.meters import Step, StepRecord, StepWatch
from cliptune.training.review import Review
from cliptune.training.state import RunState, now
from cliptune.training.tracking import Tracker

logger = logging.getLogger("train")


class RunPlan(NamedTuple):
    """What a run is going to do, if nothing ends it before."""

    num_epochs: int
    steps_per_epoch: int
    pairs_per_epoch: int
    batch_size: int
    """Over all ranks."""
    warmup_steps: int
    is_pretrained: bool = False
    """The model as loaded has been trained on images and captions before."""
    is_softmax: bool = True
    """The training loss of features that tell nothing is ln(batch size)."""
    validate_every_steps: int | None = None
    """Steps between two evaluations within an epoch; None: there are none by steps."""
    validate_every_seconds: float | None = None

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.num_epochs * self.steps_per_epoch

    def steps_between_evaluations(self, seconds_per_step: float) -> int:
        """Return how many steps there are between two evaluations, at most."""
        steps = self.validate_every_steps or self.steps_per_epoch
        if self.validate_every_seconds is not None:
            steps = math.ceil(self.validate_every_seconds / max(seconds_per_step, 1e-9))
        return min(steps, self.steps_per_epoch)


class Journal:
    """Tells people what a run does; only the main rank's does.

    Args:
        files: of the run.
        state: where the run begins; what was told of steps after it is dropped, since they will come again.
        plan: what the run is going to do.
        watch: reads the steps' numbers.
        about: what the results file holds beside: the run's settings, its schedule, what it runs on.
        device: the model's, whose memory is told.
        interval: steps between two log lines.
        tracker: is told what TensorBoard is, and the verdict.
        in_background: images are drawn in a thread, while the run goes on.
    """

    def __init__(  # noqa: PLR0913  (what a run chooses and tests choose otherwise)
        self,
        files: RunFiles,
        state: RunState,
        *,
        plan: RunPlan,
        watch: StepWatch,
        about: dict[str, Any],
        device: torch.device,
        interval: int,
        tracker: Tracker,
        in_background: bool = False,
    ) -> None:
        self.files, self.plan, self.watch, self.about, self._tracker = files, plan, watch, about, tracker
        self.device, self.interval = device, interval
        self.review = Review(
            warmup_steps=plan.warmup_steps,
            # 0: unknown, and no loss is stuck there
            train_chance=chance_loss(plan.pairs_per_epoch, plan.batch_size) if plan.is_softmax else 0.0,
            is_pretrained=plan.is_pretrained,
            past=_whole_epochs(state),
            chance=state.best.get("chance"),
            num_images=state.best.get("num_images", 0),
        )
        self._epoch = state.epoch
        self._advice: set[str] = set()
        self._recent: list[StepRecord] = []
        """Since the last log line."""
        self._line_at = self._epoch_at = self._validation_at = time.monotonic()
        self._num_steps = self._num_pairs = 0
        self._waited = self._train_seconds = self._validation_seconds = 0.0
        self._bar = progress_bar(disable=True)
        self._wall_time: dict[str, float] = {}
        """As the results file has it."""
        self._steps: Any = None
        self._events: Any = None
        self._written: set[Path] = set()
        self._thread = BackgroundThread("images") if in_background else None
        if is_main():
            # a run that is resumed at step 40 was killed at step 47: 41 to 47 come again
            _drop_later_steps(files.steps, state.step)
            self._open_files(state)
            self._written = {path for path in (files.log, files.history, files.steps) if path.exists()}
            self._events = EventFile(files.events, purge_step=state.step + 1)
            settings = {
                f"{group}.{name}": value for group, values in about["config"].items() for name, value in values.items()
            }
            tracker.begin(run_id=about["run_id"], settings=settings, folder=files.log.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._thread is not None:
            self._thread.wait()
        self._bar.close()
        if self._steps is not None:
            self._steps.close()

    def advise(self, **findings: str | None) -> None:
        """Warn of each finding, by its kind once in a run."""
        for kind, finding in findings.items():
            if finding is not None and kind not in self._advice and is_main():
                self._advice.add(kind)
                logger.warning(finding)

    def begin_epoch(self, state: RunState) -> None:
        """Start the clock of an epoch, or of what is left of it; and its progress bar, if it trains."""
        self._epoch = state.epoch
        self._line_at = self._epoch_at = time.monotonic()
        self._num_steps = self._num_pairs = 0
        self._waited = 0.0
        state.wall_time.enter("step")
        self._recent.clear()
        if state.epoch:
            self._bar = progress_bar(
                total=self.plan.pairs_per_epoch,
                initial=0 if state.totals is None else state.totals.num_pairs,
                unit="pair",
                desc=f"epoch {state.epoch}/{self.plan.num_epochs}",
            )

    def log_step(self, step: Step) -> None:
        """Count a step, and tell of those whose numbers have been read."""
        num_pairs = 0 if step.result is None else step.result.num_pairs
        self._num_steps += 1
        self._num_pairs += num_pairs
        self._waited += step.waited
        self._bar.update(num_pairs)
        self.flush()

    def flush(self) -> None:
        """Write a line of JSON for each step whose numbers have been read, and one to the log every `interval`."""
        for record in self.watch.take():
            if not is_main():
                continue
            self._steps.write(json.dumps(_line_of(record, self._epoch)) + "\n")
            self._recent.append(record)
            if record.step % self.interval == 0:
                self._log_recent(record)
        if is_main():
            self._steps.flush()  # to the system: a killed run keeps its lines

    def begin_validation(self) -> None:
        """Stop the clock and the progress bar of the steps."""
        self.flush()
        self._bar.close()
        self._validation_at = time.monotonic()
        self._train_seconds = self._validation_at - self._epoch_at

    def note_precision(self, precision: str) -> None:
        """Let the results say what the towers run in from here on."""
        self.about["run"] = self.about["run"].model_copy(update={"precision": precision})

    def log_evaluation(self, state: RunState, *, improved: bool) -> None:
        """Tell of an evaluation, and of what its numbers say about the run."""
        self._validation_seconds = time.monotonic() - self._validation_at
        if is_main():
            record = state.history[-1]
            self._append_history(state)
            watched = {f"watched/{name}/rsum": each["rsum"] for name, each in record.get("watched", {}).items()}
            told = {
                f"epoch/{key}": value
                for key, value in {**record, **watched}.items()
                if key not in {"epoch", "step", "watched"} and value is not None
            }
            self._tell(told, record["step"])
            self.write_results(state, finished=False)
            if len(state.history) == 1 and state.selection != "rsum":
                logger.info(
                    "captions are classes here: a perfect model has an RSum of %.0f, so the best epoch goes by the "
                    "numbers with equal captions and images merged", record["ceiling_rsum"],
                )  # fmt: skip
            logger.info("%s", self._epoch_line(record, improved=improved))
        self._review(state)

    def show_answers(self, gallery: Any, encoded: Any, step: int) -> None:
        """Let a `report.live_gallery.LiveGallery`, if there is one, draw for TensorBoard what features find."""
        if gallery is None or not is_main() or (found := gallery.find(encoded)) is None:
            return

        def draw() -> None:
            if (drawn := gallery.draw(found)) is not None:
                self._events.add_image("retrieval", drawn, step)

        if self._thread is None:
            draw()
        else:
            self._thread.start(draw)

    def _tell(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)
        self._tracker.log(values, step)

    def _open_files(self, state: RunState) -> None:
        """Write the evaluations so far, and open what the steps are written to."""
        write_text(self.files.history, "".join(json.dumps(record) + "\n" for record in state.history))
        self._steps = self.files.steps.open("a", encoding="utf-8")

    def _append_history(self, state: RunState) -> None:
        """Add the last evaluation to `history.jsonl`; what somebody has removed meanwhile is begun again."""
        removed = sorted(path for path in self._written if not path.exists())
        if removed:
            self._steps.close()
            self._open_files(state)
            reopen_log_file()
            logger.warning(
                "removed while the run goes on, and begun again without what was in them: %s", first_few(removed)
            )
        else:
            with self.files.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.history[-1]) + "\n")

    def write_results(self, state: RunState, *, finished: bool) -> None:
        """Write the results file: all that the figures are drawn from."""
        if not is_main():
            return
        best, baseline, self._wall_time = state.best, state.baseline, state.wall_time.state_dict()
        values = {
            "started_at": state.started_at,
            "finished_at": now() if finished else None,
            "best_epoch": state.best_epoch,
            "metrics": best["metrics"],
            "baseline": baseline["metrics"],
            "chance": best["chance"],
            "num_images": best["num_images"],
            "num_texts": best["num_texts"],
            "skipped": best.get("skipped", {}),  # a run of before it was counted may be resumed
            "histograms": {"baseline": baseline["histograms"], "best": best["histograms"]},
            "num_skipped_steps": self.watch.num_skipped,
            "peak_memory_gb": peak_memory(self.device),
            "wall_time": self._wall_time,
            **self.about,
            "history": state.history,
        }
        results.write(self.files.results, results.TrainingResults.model_validate(values))
        self._written.add(self.files.results)

    def conclude(self, state: RunState, values: Mapping[str, Any]) -> None:
        """Write the results file of a run that is done, with what it says of the run besides, and tell the verdict."""
        self.about |= values
        self.write_results(state, finished=True)
        self._tracker.tell({"verdict": verdict_line(self.about), "best_epoch": shown_epoch(state.best_epoch)})
        self._tracker.end("finished")

    def summary(self, state: RunState) -> str:
        """Say whether the run has helped, and lay the best trained model beside the one as loaded."""
        lines = ["", verdict_line(self.about), "", *self._table(state)]
        if state.best_epoch == 0:
            num_images, at_chance = state.best["num_images"], _is_at_chance(state.comparable, state)
            lines.append(no_better_epoch(num_images, at_chance=at_chance))
        peak = ", ".join(f"{gb:.1f} GB ({key})" for key, gb in peak_memory(self.device).items())
        best_model, results_file = (printable(str(path)) for path in (self.files.best, self.files.results))
        spent = WallTime.model_validate(self._wall_time).sentence()
        if (self.about.get("verdict") or {}).get("split") == "folds":
            spent = f"{spent}, of the last run: what the folds took stands in their results"
        if self.watch.num_skipped:
            spent += (
                f"\nskipped steps: {self.watch.num_skipped:,} of {state.step:,}, whose loss or gradient was not finite"
            )
            spent += "; in fp16 that is how the scale of the loss is found" if self.watch.scaled else ""
        if "compiled" in (precision := self.about["run"].precision):  # else the log's first lines have said it
            spent += f"\nprecision: {precision}"
        lines.append(f"\n{spent}\npeak memory: {peak}\nbest model: {best_model}\nresults: {results_file}")
        return "\n".join(lines)

    def _table(self, state: RunState) -> list[str]:
        """Lay out what the verdict is about: validation, or the test split if there is one."""
        verdict, test = self.about.get("verdict"), self.about.get("test")
        trained = state.best_trained() or state.history[0]
        if verdict is not None:
            # an epoch that began again with other data may have had an evaluation at the same place before
            at_place = [record for record in state.comparable if record["epoch"] == verdict["epoch"]]
            trained = max(at_place, key=lambda record: record[state.selection])
        first, best, chance = state.baseline["metrics"], trained, state.best["chance"]
        if test is not None:
            first, best, chance = test["baseline"], test["metrics"], test["chance"]
        epoch, gain = f"epoch {shown_epoch(trained['epoch'])}", "gain (95% interval)" if verdict else ""
        lines = [f"{'':17}{'as loaded':>10}{epoch:>13}{gain:>28}{'chance':>9}"]
        prefix = state.selection.removesuffix("rsum")  # merged_ where captions are classes
        for name in (*RECALL_KEYS, "rsum"):
            gains = {} if verdict is None else {**verdict["recalls"], "rsum": verdict["rsum"]}
            gained, key = GainInterval(*gains[name]) if gains else "", f"{prefix}{name}"
            lines.append(f"{key:17}{first[key]:10.1f}{best[key]:13.1f}{gained!s:>28}{chance[key]:9.1f}")
        others = ("i2t_median_rank", "t2i_median_rank", "similarity_gap", "val_loss")
        return lines + [f"{key:17}{first[key]:10.3g}{best[key]:13.3g}" for key in others if key in first]

    def _log_recent(self, record: StepRecord) -> None:
        """Tell the mean loss and the speed since the last line."""
        recent, self._recent = self._recent, []
        elapsed, self._line_at = time.monotonic() - self._line_at, time.monotonic()
        losses = [past.loss for past in recent if math.isfinite(past.loss)]  # without skipped steps
        loss = fmean(losses) if losses else math.nan
        speed = sum(past.num_pairs for past in recent) / max(elapsed, 1e-9)
        left = self._seconds_left(record.step, time.monotonic() - self._epoch_at)
        logger.info(
            "epoch %d/%d, step %d/%d: loss %.3f, rates %s, %.0f pairs/s, %s left",
            self._epoch, self.plan.num_epochs, record.step, self.plan.total_steps, loss,
            ", ".join(f"{name} {rate:.3g}" for name, rate in record.rates.items()), speed,
            timedelta(seconds=round(left)), extra=SHOWN_BY_BAR,
        )  # fmt: skip
        self._tell({"step/train_loss": loss}, record.step)
        if not self._bar.disable:
            peak = [f"{key} {gb:.1f} GB" for key, gb in peak_memory(self.device).items()]
            self._bar.set_postfix_str(", ".join([f"loss {loss:.3f}", *peak]))

    def _seconds_left(self, step: int, seconds: float) -> float:
        """Estimate how long the rest of the run takes from the `seconds` of the steps since the last evaluation."""
        # 5 steps of 72 s, and the validations of this epoch and the next at 6 s each: 372 s
        steps_left, seconds_per_step = max(self.plan.total_steps - step, 0), seconds / max(self._num_steps, 1)
        validations_left = math.ceil(steps_left / self.plan.steps_between_evaluations(seconds_per_step))
        return steps_left * seconds_per_step + validations_left * self._validation_seconds

    def _epoch_line(self, record: dict[str, Any], *, improved: bool) -> str:
        trained = pace = ""
        if record["train_loss"] is not None:
            seconds = self._train_seconds
            pace = f", {seconds:.0f} s, {self._num_pairs / seconds:.1f} pairs/s"
            pace += f", waited {100 * self._waited / seconds:.0f}% for data"
            left = self._seconds_left(record["step"], seconds)
            pace += f", {timedelta(seconds=round(left))} left" if left else ""
            accuracy = f"accuracy {record['train_accuracy']:.1f}% in batches of {self.plan.batch_size}"
            trained = f"loss {record['train_loss']:.3f}, {accuracy}, "
        watched = "".join(f", {name} {each['rsum']:.1f}" for name, each in record.get("watched", {}).items())
        return (
            f"epoch {shown_epoch(record['epoch'])}: {trained}"
            f"val loss {record['val_loss']:.3f}, R@1 i2t {record['i2t_r1']:.1f} "
            f"t2i {record['t2i_r1']:.1f}, RSum {record['rsum']:.1f}{' (best)' if improved else ''}{watched}{pace}"
        )

    def _review(self, state: RunState) -> None:
        """Tell what an epoch's numbers say about the run; those of a part of an epoch say nothing."""
        history = _whole_epochs(state)
        if history[-1] is not state.history[-1]:
            return
        news = self.review.news(history, chance=state.best["chance"], num_images=state.best["num_images"])
        for line in news if is_main() else ():
            logger.warning(line)


def _whole_epochs(state: RunState) -> list[dict[str, Any]]:
    return [record for record in state.comparable if isinstance(record["epoch"], int)]


def verdict_line(about: Mapping[str, Any]) -> str:
    """Return a run's verdict in one line, or why there is none."""
    if about.get("verdict") is None:
        return f"No verdict: {about.get('no_verdict') or 'there is nothing to compare'}"
    return Verdict.model_validate(about["verdict"]).sentence()


def _is_at_chance(history: Sequence[dict[str, Any]], state: RunState) -> bool:
    """Tell whether no epoch of these has an RSum above chance."""
    best = max(record["rsum"] for record in history)
    return is_at_chance(best, state.best["chance"], num_images=state.best["num_images"])


def describe_model(model: Any) -> str:
    """Say which model it is, how it starts and how much of it is trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    start = "random start" if model.starts_random else "pretrained"
    part = f": {model.trained_part}" if model.trained_part else ""
    name = shown(model.architecture.name)
    return f"{name} ({start}), {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained{part}"


def _line_of(record: StepRecord, epoch: int) -> dict[str, Any]:
    """Return what `steps.jsonl` holds of a step; JSON has no NaN, so what is not finite is null."""
    loss = record.loss if math.isfinite(record.loss) else None
    line = {
        "step": record.step,
        "epoch": epoch,
        "loss": loss,
        "accuracy": None if loss is None else round(100 * record.accuracy, 4),
        "learning_rate": record.rates.get("projection", 0.0),
        "backbone_learning_rate": record.rates.get("backbone", record.rates.get("lora", 0.0)),
        "seconds": round(record.seconds, 6),
    }
    return {**line, "skipped": True} if record.is_skipped else line


def _drop_later_steps(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and one that a killed run has left half written."""
    if not path.exists():
        return
    with path.open("rb") as lines, atomic_writer(path) as file:
        for line in lines:
            if line.endswith(b"\n") and json.loads(line)["step"] <= last_step:
                file.write(line)
