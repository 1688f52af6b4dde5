"""The journal of a run, opened with what its settings, model and data say of it."""

from __future__ import annotations

import logging

from cliptune.data.shards import Shards
from cliptune.runs.data import RunData
from cliptune.runs.folds import Part
from cliptune.runs.info import command_line, run_info
from cliptune.runs.saving import works_in_background
from cliptune.runtime.distributed import world_size
from cliptune.runtime.messages import count
from cliptune.settings import Config, seconds_of, steps_of
from cliptune.training import optim
from cliptune.training.advice import held_random_start, long_warmup, small_validation, unusual_tower_rate
from cliptune.training.journal import Journal, RunPlan, describe_model
from cliptune.training.saver import Saver
from cliptune.training.state import RunState
from cliptune.training.tracking import Tracker
from cliptune.training.trainer import MultimodalTrainer

logger = logging.getLogger("train")


def open_journal(
    config: Config,
    trainer: MultimodalTrainer,
    data: RunData,
    saver: Saver,
    *,
    tracker: Tracker,
    state: RunState,
    argv: list[str] | None,
    part: Part | None,
) -> Journal:
    """Open what tells people of the run; say what will be trained on what, and what is unusual about it.

    Args:
        config: of the run.
        trainer: of its model.
        data: of the run.
        saver: of its checkpoints.
        tracker: is told what TensorBoard is.
        state: where the run begins.
        argv: what the stage's `main` was given.
        part: the run is one of several.
    """
    model, settings, run_id = trainer.model, config.training, saver.about["run_id"]
    steps = len(data.loader)
    warmup_steps = optim.num_warmup_steps(settings.num_epochs * steps, settings.warmup_fraction)
    is_pretrained = not model.starts_random and model.projection_dim == model.architecture.embed_dim
    whole = None if part is None else part.whole
    plan = RunPlan(
        settings.num_epochs if whole is None else whole.length, steps,
        len(data.loader.dataset), settings.batch_size, warmup_steps, is_pretrained,
        is_softmax=settings.loss == "infonce", validate_every_steps=steps_of(settings.validate_every),
        validate_every_seconds=seconds_of(settings.validate_every),
    )  # fmt: skip
    peaks = optim.peak_rates(model, learning_rate=settings.learning_rate, backbone_lr_scale=settings.backbone_lr_scale)
    precision = precision_of(trainer)
    about = {
        "run_id": run_id,
        "config": config.model_dump(),
        "run": run_info(
            command=command_line("train.py", argv),
            device=model.device,
            precision=precision,
            world_size=world_size(),
            model_name=model.architecture.name,
            model_settings=model.architecture.to_dict(),
        ),
        "schedule": optim.schedule_points(
            total_steps=settings.num_epochs * steps, warmup_fraction=settings.warmup_fraction, peaks=peaks
        ),
    }
    journal = Journal(
        saver.files, state, plan=plan, watch=trainer.watch, about=about, device=model.device,
        interval=config.run.log_interval, tracker=tracker, in_background=works_in_background(model.device),
    )  # fmt: skip
    train, val = data.train, data.val
    extent = f"in {len(train.shards)} shards" if isinstance(train, Shards) else f"({train.num_pairs} pairs)"
    logger.info("run %s: model %s", run_id[:8] or "without id", describe_model(model))
    logger.info(
        "data %s: %d training images %s, %d validation images (%d pairs)",
        config.data.data_dir, len(train), extent, len(val), val.num_pairs,
    )  # fmt: skip
    logger.info("device %s, precision %s, %s", model.device, precision, count(data.num_workers, "loader worker"))
    if world_size() > 1:
        logger.info("%d ranks (%s), each with its part of a batch", world_size(), config.run.parallel)
    frozen = f" ({' and '.join(model.frozen_towers)} frozen)" if model.frozen_towers else ""
    logger.info("peak rates: %s%s", optim.describe_rates(trainer.optimizer), frozen)
    is_odd_rate_usual = model.starts_random or len(model.frozen_towers) == 2 or model.lora is not None
    journal.advise(
        small_validation=small_validation(len(val)) if part is None else None,
        long_warmup=long_warmup(
            warmup_steps=warmup_steps,
            total_steps=settings.num_epochs * steps,
            patience_steps=settings.early_stopping_patience * min(steps, steps_of(settings.validate_every) or steps),
        ),
        tower_rate=None if is_odd_rate_usual else unusual_tower_rate(peaks[1]),
        held_random_start=held_random_start(
            starts_random=model.starts_random, is_held=bool(config.model.lora_rank or config.model.train_layers)
        ),
    )
    return journal


def precision_of(trainer: MultimodalTrainer) -> str:
    """Say what the towers run in now, such as `bf16, compiled`; the compiler may fail in any step."""
    return trainer.grad_cache.precision.name + (", compiled" if trainer.model.is_compiled else "")
