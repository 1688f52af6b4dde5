"""Fine-tune CLIP on image-text pairs: settings, data, model, loop, evaluation, saved results.

python train.py --data_dir ./data --batch_size 64

With several GPUs or machines `torchrun --nproc_per_node N train.py ...` starts N ranks of one run.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cliptune.runtime.stopping import leave_at_signals

    leave_at_signals()  # the imports take seconds

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from cliptune.cli import CONFIG_PATH, Started, check_command_line, load_config, run_stage, stored_config
from cliptune.settings import Config, seconds_of, steps_of

if __name__ == "__main__":
    check_command_line(Config, str(__doc__))

import torch
from torch import nn

from clip_model import CLIPModel, ContrastiveLoss, MultimodalTrainer, add_self_test, self_tester
from cliptune.data.caption_table import typical_texts
from cliptune.data.snapshot import Snapshots
from cliptune.data.workers import no_workers_left
from cliptune.features.retrieval import Retrieval
from cliptune.language.catalogue import language_of
from cliptune.runs.copies import copy_finder, main_finds_copies
from cliptune.runs.data import (
    RunData,
    Splits,
    changed_splits,
    odd_data,
    open_data,
    read_data,
    reread_data,
)
from cliptune.runs.folds import Part, begin_log, folds_started, run_folds
from cliptune.runs.interpolation import look_back
from cliptune.runs.journal import open_journal, precision_of
from cliptune.runs.loss import make_losses, start_bias
from cliptune.runs.model import find_run_weights, make_model, place_model
from cliptune.runs.other_data import Anew, go_on_with_other_data
from cliptune.runs.recipe import apply_recipe
from cliptune.runs.report import leave_report
from cliptune.runs.saving import make_saver
from cliptune.runs.start import Resumed, about_run, open_run, set_aside_earlier_run
from cliptune.runs.verdict import add_evaluation, judge, open_retrieval, run_test
from cliptune.runs.watch import watching
from cliptune.runtime.device import Precision, keep_freed_memory, resolve_precision
from cliptune.runtime.distributed import broadcast, is_main, main_first, process_group, rank_device, world_size
from cliptune.runtime.environment import process_start
from cliptune.runtime.logs import setup_logging
from cliptune.runtime.messages import printable
from cliptune.runtime.rng import seed_everything
from cliptune.runtime.signals import StopSignals
from cliptune.runtime.stopping import KilledWorkerError, Stopped
from cliptune.training import optim
from cliptune.training.gradcache import explained_out_of_memory
from cliptune.training.intervals import Interval, items_until
from cliptune.training.journal import Journal
from cliptune.training.meters import StepWatch
from cliptune.training.profile import step_profiler
from cliptune.training.run_models import settle_models, verify_best
from cliptune.training.saver import Saver
from cliptune.training.state import RunState
from cliptune.training.tracking import tracking
from data_loader import ImageTextDataset
from evaluation import evaluate
from visualization import draw_figures

logger = logging.getLogger("train")


def main(argv: list[str] | None = None) -> int:
    """Train as the settings say; returns the exit code."""
    return run_stage(lambda: _train(argv), name="train.py", argv=argv, config=CONFIG_PATH)


def _train(argv: list[str] | None) -> int:
    started = load_config(argv, description=str(__doc__))
    config = started.config
    setup_logging(config.run.log_level)
    device = rank_device(config.run.device)
    resolve_precision(config.training.precision, device)  # what is wrong is told before the ranks meet
    with process_group(device), explained_out_of_memory():
        if (folded := folds_started(started)) is not None:
            return run_folds(folded, partial(_run, argv=argv))
        return _run(started, argv=argv)


def _run(started: Started, part: Part | None = None, *, argv: list[str] | None) -> int:
    """Train one run; `part`: it is one of several."""
    # of a call, or of one run of several, the process may be older than what it is about
    began = process_start() if argv is None and part is None else time.monotonic()
    whole = None if part is None else part.whole
    with no_workers_left(), ExitStack() as held:
        # settings: a resumed run has its own
        config, files, resumed = open_run(started, held, is_locked=whole is not None)
        tracker = held.enter_context(tracking(config.run.track if is_main() else None))
        device = rank_device(config.run.device)
        precision = resolve_precision(config.training.precision, device)
        keep_freed_memory()

        # data and model
        # a wrong name or file is told before any data is read
        weights = find_run_weights(config, started.given, resumed)
        cache_dir = files.cache if config.run.cache_dir is None else Path(config.run.cache_dir)
        reading: dict[str, Any] = {"given": started.given, "cache_file": cache_dir / "identities.npz"}
        with main_finds_copies(copy_finder(config, reading["cache_file"])) as reading["find_copies"]:
            splits, snapshots = _read(config, resumed, part, **reading)
        config = apply_recipe(
            config, started, splits=splits, weights=weights, is_resumed=resumed is not None or part is not None
        )
        seed_everything(config.training.seed)  # here: what reads the data may draw, or find it cached and not draw
        with main_first():  # the other ranks find the weights downloaded
            model = make_model(config, weights, resumed, model_class=CLIPModel)
        del weights  # the model's own now, or copied to it
        if not begin_log(part, files, config.run.log_level):
            set_aside_earlier_run(files, config, resumed)

        parallel, micro_batch_size = place_model(
            config, model, precision=precision, device=device, num_samples=len(splits["train"]),
            texts=partial(typical_texts, splits["train"], model.architecture.context_length), resumed=resumed,
        )  # fmt: skip
        loss, val_loss = make_losses(config, splits["train"], {} if resumed is None else resumed.content)
        data = watching(
            open_data(
                config, model, splits, ImageTextDataset, partial(evaluate, loss=val_loss),
                skipped_path=files.skipped, cache_dir=cache_dir, precision=precision,
            ), config, snapshots, evaluate,
        )  # fmt: skip

        # loop, evaluation, results
        trainer = _make_trainer(
            config, model, loss, data, precision=precision, micro_batch_size=micro_batch_size, parallel=parallel
        )
        about = about_run(
            config, started, resumed, snapshots=snapshots, positives=loss.positives, val_images=data.val.paths
        )
        saver = make_saver(config, trainer, files=files, about=about, complete=add_self_test, self_tester=self_tester)
        state, anew = _begin(config, trainer, saver, data, resumed=resumed, snapshots=snapshots, began=began)
        if whole is None:
            retrieval = open_retrieval(
                files, data.val, state, run_id=about["run_id"], resumed=resumed, anew=anew, device=device
            )
        else:  # no image is left to evaluate on: the folds have told
            retrieval, data = None, whole.validates(data, state)
        journal = open_journal(config, trainer, data, saver, tracker=tracker, state=state, argv=argv, part=part)
        if is_main() and (part is None or part.advises):
            journal.advise(
                **odd_data(
                    config, splits, snapshots,
                    context_length=model.architecture.context_length, positives=loss.positives,
                )
            )  # fmt: skip
        code = _fit(
            config, data, trainer, state=state, journal=journal, saver=saver, retrieval=retrieval,
            length=None if whole is None else whole.length,
        )  # fmt: skip
        if is_main() and len(data.skipped):
            logger.warning(data.skipped.summary())
        if code == 0:
            _conclude(config, model, data, state=state, journal=journal, retrieval=retrieval, part=part)
    return code


def _read(config: Config, resumed: Resumed | None, part: Part | None, **reading: Any) -> tuple[Splits, Snapshots]:
    if part is not None:
        return part.splits, part.snapshots(resumed, cache_file=reading["cache_file"])
    if resumed is None:
        return read_data(config, **reading)
    return reread_data(config, resumed.content, **reading)


def _conclude(
    config: Config,
    model: CLIPModel,
    data: RunData,
    *,
    state: RunState,
    journal: Journal,
    retrieval: Retrieval | None,
    part: Part | None,
) -> None:
    """Verify what the run leaves, compare its best model with the one as loaded, draw it and tell of it."""
    state.wall_time.enter("rest")
    files = journal.files
    if is_main():
        verify_best(state, files, run_id=journal.about["run_id"])
    if part is not None and retrieval is not None:  # of a fold nothing is said alone
        journal.conclude(state, judge(retrieval, state, None))
        return
    with state.wall_time.inside("validation"):
        found = look_back(
            config, model, data, files, state=state, model_class=CLIPModel,
            complete=add_self_test, evaluations=() if retrieval is None else retrieval.ranks_of_all,
        )  # fmt: skip
        test = run_test(model, data, files, state, open_model=partial(_open_model, device=model.device))
    whole = None if part is None else part.whole
    if whole is None and retrieval is None:
        return
    own = judge(retrieval, state, test) if retrieval is not None else {} if whole is None else whole.values
    journal.conclude(state, found.values | own)
    for figure in draw_figures(files.results, language=config.run.language):
        logger.info("figure: %s", figure)
    page = leave_report(files.results, config.run.report, language=config.run.language)
    report = () if page is None else (f"report: {printable(str(page))}",)
    lines = [journal.summary(state), *report, *(() if whole is None else whole.lines), *found.lines]
    print(language_of(config.run.language).say_lines("\n".join(lines)))


def _open_model(path: Path, *, device: torch.device) -> CLIPModel:
    return CLIPModel.from_checkpoint(path).to(device)


def _fit(
    config: Config,
    data: RunData,
    trainer: MultimodalTrainer,
    *,
    state: RunState,
    journal: Journal,
    saver: Saver,
    retrieval: Retrieval | None,
    length: int | None,
) -> int:
    """Evaluate the model as loaded, then train until the last epoch, the early stop or a signal.

    SIGTERM, SIGINT and SIGHUP stop it after the step that they come in, and its state is saved. With a `length` it ends
    after as many epochs, and never early.

    Returns:
        The exit code: 0, or 143, 130 or 129 after a signal.

    Raises:
        KilledWorkerError: a loader worker was killed; the state after the last step is saved.
    """
    settings, device, code = config.training, trainer.model.device, 0
    limits, stop = (settings.num_epochs, settings.early_stopping_patience), StopSignals()
    limits = limits if length is None else (length, 0)
    nothing_is_left = bool(state.history) and state.ending(*limits) is not None
    every = settings.validate_every
    validation = Interval(every_steps=steps_of(every), every_seconds=seconds_of(every))
    batches: Iterator[Any] | None = None
    profiling = step_profiler(config.run.profile if is_main() else 0, journal.files.trace, device)
    trainer.interruptible = stop.within_step
    with stop, journal, saver.of_run(state), profiling as profiler:
        try:
            # epoch 0 is the model as loaded: no step, and an evaluation that the others are compared with
            while (ending := state.ending(*limits)) is None:
                stop.check()
                state.begin_epoch(device)
                journal.begin_epoch(state)
                if batches is None:  # else the epoch goes on after an evaluation within it
                    epoch = data.loader.epoch(state.epoch, start=state.num_batches) if state.epoch else ()
                    batches = stop.interruptible_items(trainer.fed(epoch))
                is_due = partial(_is_validation_due, validation, state, steps_per_epoch=len(data.loader))
                for step in trainer.steps(items_until(is_due, batches)):
                    state.add(step)
                    journal.log_step(step)
                    data.note_issues(step.issues)
                    profiler.step()
                    # after the last step the epoch's own state is saved, with its evaluation
                    if saver.is_due(state.step) and state.num_batches < len(data.loader):
                        saver.save(state)
                    stop.check()
                improved = _evaluate(data, trainer, stop, state=state, journal=journal, retrieval=retrieval)
                validation.restart()
                batches = batches if state.totals is not None else None
                saver.save(state, best=improved)
                journal.log_evaluation(state, improved=improved)
            if nothing_is_left:
                reason = ending if length is None else "it has the length that the folds chose"
                logger.info("nothing is left to train: %s", reason)
            elif state.epochs_done < limits[0]:
                logger.info("early stop: %s", ending)
            journal.write_results(state, finished=True)
        except (Stopped, KilledWorkerError) as end:
            code = _end_early(end, data, state=state, saver=saver)
    return code


def _is_validation_due(interval: Interval, state: RunState, *, steps_per_epoch: int) -> bool:
    """Tell whether to evaluate within the epoch before the next step: also in a run that was stopped in doing so."""
    return 0 < state.num_batches < steps_per_epoch and not state.is_evaluated and interval.is_due(state.step)


def _evaluate(
    data: RunData,
    trainer: MultimodalTrainer,
    stop: StopSignals,
    *,
    state: RunState,
    journal: Journal,
    retrieval: Retrieval | None,
) -> bool:
    """Evaluate the model and record what comes; tell whether it is the best so far."""
    trainer.settle()
    means = state.train_means(steps_per_epoch=len(data.loader))
    journal.begin_validation()
    journal.note_precision(precision_of(trainer))  # in the steps before, the compiler may have failed
    state.wall_time.enter("validation")
    # a signal leaves the state as it is before the evaluation, and a resumed run evaluates it again; only inside, since
    # weights of which some are swapped with their average would be saved like this
    with trainer.averaged(), stop.interruptible():
        evaluation, watched = data.validate(), data.watch.evaluate()
    data.skipped.agree()
    agreed = broadcast(evaluation.to_dict() | data.watch.records(watched))  # so that all ranks decide the same
    rates = optim.rates_of(trainer.optimizer)
    improved = state.add_evaluation(agreed, means=means, rates=rates, steps_per_epoch=len(data.loader))
    if retrieval is not None:
        add_evaluation(retrieval, evaluation, state, improved=improved, device=trainer.model.device)
        journal.show_answers(data.gallery, evaluation.encoded, state.step)
    return improved


def _end_early(end: Stopped | KilledWorkerError, data: RunData, *, state: RunState, saver: Saver) -> int:
    """Save the state after the last step and say so; return a signal's exit code, or raise the error."""
    if isinstance(end, KilledWorkerError) and world_size() > 1:  # the other ranks are in the middle of a step
        raise end
    # between two epochs it is saved already
    if state.history and state.totals is not None and not saver.has_saved(state):
        saver.save(state)
    saver.flush(state)
    where = f"at epoch {state.epoch}, step {state.step}, which are saved: --resume goes on from there"
    what = "stopped" if isinstance(end, KilledWorkerError) else str(end)
    logger.info("%s %s", what, where if state.history else "before anything was trained")
    data.skipped.agree()
    if isinstance(end, KilledWorkerError):
        raise end
    return end.exit_code


def _make_trainer(
    config: Config,
    model: CLIPModel,
    loss: ContrastiveLoss,
    data: RunData,
    *,
    precision: Precision,
    micro_batch_size: int | None,
    parallel: nn.Module | None,
) -> MultimodalTrainer:
    settings = config.training
    start_bias(model, loss, data.loader, precision=precision, micro_batch_size=micro_batch_size, parallel=parallel)
    optimizer = optim.build_optimizer(
        model,
        learning_rate=settings.learning_rate,
        backbone_lr_scale=settings.backbone_lr_scale,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )
    total_steps = settings.num_epochs * len(data.loader)
    return MultimodalTrainer(
        model,
        loss,
        optimizer,
        optim.build_scheduler(optimizer, total_steps=total_steps, warmup_fraction=settings.warmup_fraction),
        precision=precision,
        gradient_clip_norm=settings.gradient_clip_norm,
        micro_batch_size=micro_batch_size,
        parallel=parallel,
        seed=settings.seed,
        watch=StepWatch(
            settings.skip_nonfinite,
            scaled=precision.scaled,
            interval=config.run.log_interval,
            name_samples=data.name_samples,
        ),
        ema=settings.ema,
    )


def _begin(
    config: Config,
    trainer: MultimodalTrainer,
    saver: Saver,
    data: RunData[Any],
    *,
    resumed: Resumed | None,
    snapshots: Snapshots,
    began: float,
) -> tuple[RunState, Anew | None]:
    """Begin at the model as loaded, or continue from a checkpoint, whose weights the model holds already.

    Returns:
        The state, and the models as loaded and the best on validation data that is not what the run had.
    """
    state = RunState()
    state.wall_time.begin(began)
    if resumed is None:
        return state, None
    stored = stored_config(resumed.content["config"], resumed.path)
    if stored.training.micro_batch_size == config.training.micro_batch_size:
        trainer.grad_cache.size = resumed.content["micro_batch_size"]  # what was found to fit
    changed = changed_splits(resumed.content, snapshots)
    state = saver.restore(*resumed)
    state.wall_time.begin(began)
    if is_main():
        settle_models(state, saver, state_path=resumed.path)
    state.best, state.best_epoch, state.best_step = broadcast((state.best, state.best_epoch, state.best_step))
    if not changed:
        return state, None
    open_model = partial(_open_model, device=trainer.model.device)
    return state, go_on_with_other_data(state, saver, data, changed=changed, open_model=open_model)


if __name__ == "__main__":
    sys.exit(main())
