"""Fine-tune CLIP on image-text pairs: settings, data, model, loop, evaluation, saved results.

python train.py --data_dir ./data --batch_size 64

With several GPUs or machines `torchrun --nproc_per_node N train.py ...` starts N ranks of one run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cliptune.cli import check_command_line, load_config, override, run_stage
from cliptune.settings import DEFAULT_DATA_DIR, DEFAULT_MODEL_NAME, Config

if __name__ == "__main__":
    check_command_line(Config, str(__doc__))

import torch
from torch import Tensor, nn

from clip_model import TOWERS, CLIPModel, ContrastiveLoss, MultimodalTrainer, add_self_test
from cliptune.data.loaders import TrainLoader
from cliptune.data.pairs import Pairs, holds_only_placeholders
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.shard_loader import ShardLoader, training_shards
from cliptune.data.shards import Shards, is_shards
from cliptune.data.skipped import SkippedData
from cliptune.data.splits import training_pairs
from cliptune.features.cache import FeatureCache, FeatureLoader
from cliptune.model.architectures import known_architecture
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.model.parallel import is_sharded, parallel_model
from cliptune.model.weights import Weights, own_weights, read_weights
from cliptune.preprocess.transforms import train_transform
from cliptune.runtime.device import Precision, can_compile, default_num_workers, keep_freed_memory, resolve_precision
from cliptune.runtime.distributed import (
    barrier,
    broadcast,
    is_main,
    main_first,
    process_group,
    rank_device,
    world_size,
)
from cliptune.runtime.logs import setup_logging
from cliptune.runtime.rng import seed_everything
from cliptune.runtime.signals import Stopped, StopSignals
from cliptune.settings import SAMPLE_SIZE, seconds_of
from cliptune.training.advice import long_warmup, small_validation, unusual_tower_rate
from cliptune.training.checkpoint import CheckpointWriter, RunFiles, Saver, load_newest_state
from cliptune.training.gradcache import explained_out_of_memory
from cliptune.training.journal import Journal, RunPlan
from cliptune.training.memory import fitting_size
from cliptune.training.meters import StepWatch
from cliptune.training.optim import BACKBONE_LR_SCALE, build_optimizer, build_scheduler, num_warmup_steps, rates_of
from cliptune.training.profile import step_profiler
from cliptune.training.state import RunState
from data_loader import ImageTextDataset
from evaluation import Evaluation, evaluate
from visualization import draw_figures

logger = logging.getLogger("train")

MAY_CHANGE_ON_RESUME = {
    "compile", "num_epochs", "early_stopping_patience", "num_workers", "device", "precision", "output_dir", "cache_dir",
    "micro_batch_size", "gradient_checkpointing", "parallel", "skip_nonfinite", "resume", "checkpoint_every",
    "keep_checkpoints", "profile", "log_interval", "log_level", "on_unreadable_image", "max_skipped_fraction",
}  # fmt: skip
AUGMENTED_VIEWS = 4


def main(argv: list[str] | None = None) -> int:
    """Train as the settings say; returns the exit code."""
    return run_stage(lambda: _train(argv), name="train.py")


def _train(argv: list[str] | None) -> int:
    config, given = load_config(argv, description=str(__doc__))
    setup_logging(config.run.log_level)
    device = rank_device(config.run.device)
    resolve_precision(config.training.precision, device)  # what is wrong is told before the ranks meet
    with process_group(device), ExitStack() as held, explained_out_of_memory():
        config, files, resumed = _open_run(config, given, held)
        device = rank_device(config.run.device)
        precision = resolve_precision(config.training.precision, device)
        seed_everything(config.training.seed)
        keep_freed_memory()

        weights = _find_weights(config, given, resumed)  # a wrong name or file is told before any data is read
        with main_first():
            sources = _read_data(config, given)
        with main_first():  # the other ranks find the weights downloaded
            model = _make_model(config, weights, resumed)
        if is_main():
            _set_aside_earlier_run(files, config, resumed)
        parallel, micro_batch_size = _place_model(config, model, precision=precision, device=device)
        data = _open_data(config, model, sources, files=files, precision=precision)
        plan = _plan(config, data)
        trainer = _make_trainer(
            config, model, plan, precision=precision, micro_batch_size=micro_batch_size, parallel=parallel
        )
        saver = _make_saver(config, trainer, data, files)
        state = RunState() if resumed is None else _restore(config, trainer, saver, resumed)
        about = {"config": config.model_dump()}
        journal = Journal(files, state, plan=plan, about=about, device=device, interval=config.run.log_interval)
        _announce(config, data, trainer, plan=plan, journal=journal)
        code = _fit(config, data, trainer, state=state, journal=journal, saver=saver)
        if is_main() and code == 0:
            for figure in draw_figures(files.results):
                logger.info("figure: %s", figure)
            print(journal.summary(state))
    return code


def _fit(
    config: Config, data: RunData, trainer: MultimodalTrainer, *, state: RunState, journal: Journal, saver: Saver
) -> int:
    """Evaluate the model as loaded, then train epoch by epoch until the last one, the early stop or a signal.

    SIGTERM and SIGINT stop it after the step that they come in, and its state is saved.

    Returns:
        The exit code: 0, or 143 or 130 after a signal.
    """
    device, code = trainer.model.device, 0
    stop = StopSignals()
    watch = StepWatch(
        config.training.skip_nonfinite,
        scaled=trainer.scaler.is_enabled(),
        interval=config.run.log_interval,
        name_samples=data.name_samples,
    )
    profiler = step_profiler(config.run.profile if is_main() else 0, journal.files.trace, device)

    def save_place() -> None:
        journal.log_records(watch.read())  # a state that is not finite is not saved
        trainer.average_statistics()
        saver.save(state)

    def finish_epoch() -> None:
        means = state.train_means()
        journal.begin_validation()
        trainer.average_statistics()
        with stop.interruptible():
            evaluation = validate()
        data.skipped.agree()
        evaluation = broadcast(evaluation)  # so that all ranks decide the same
        improved = state.finish_epoch(evaluation.to_dict(), means=means, rates=rates_of(trainer.optimizer))
        saver.save(state, best=improved)
        journal.write_results(state, finished=False)
        journal.log_epoch(state, improved=improved)

    with stop, journal, closing(saver), profiler:
        try:
            with stop.interruptible():
                validate = _make_validation(config, trainer, data)
            if not state.history:
                finish_epoch()
            while state.totals is not None or state.epoch < config.training.num_epochs:
                stop.check()
                if state.is_stale(config.training.early_stopping_patience):
                    logger.info(
                        "early stop: no better RSum for %d epochs (--early_stopping_patience)", state.epochs_since_best
                    )
                    break
                state.begin_epoch(device)
                journal.begin_epoch(state)
                batches = data.loader.epoch(state.epoch, start=state.num_batches)
                for step in trainer.steps(stop.interruptible_items(batches)):
                    state.add(step)
                    journal.log_step(step, watch.add(step))
                    for issue in step.issues:
                        data.skipped.note(issue)
                    profiler.step()
                    if saver.is_due(state.step) and state.num_batches < len(data.loader):
                        save_place()
                    stop.check()
                journal.log_records(watch.read())
                finish_epoch()
        except Stopped as signal:
            code = signal.exit_code
            if state.totals is not None:  # between two epochs it is saved already
                save_place()
            where = f"at epoch {state.epoch}, step {state.step}, which are saved: --resume goes on from there"
            logger.info("%s %s", signal, where if state.history else "before anything was trained")
            data.skipped.agree()
        if code == 0:
            journal.write_results(state, finished=True)
        if is_main() and len(data.skipped):
            logger.warning(data.skipped.summary())
    return code


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Path
    content: dict[str, Any]


def _open_run(config: Config, given: dict[str, Any], held: ExitStack) -> tuple[Config, RunFiles, Resumed | None]:
    """Keep other runs out of the output folder while `held` is, and find what to resume from.

    Returns:
        The settings, which are a resumed run's own but for those that may change; the run's files; the checkpoint.

    Raises:
        FileNotFoundError: the checkpoint named is not there.
        ValueError: it cannot be resumed from, a given flag may not change, or another run is writing there.
    """
    resume, resumed = config.run.resume, None
    if resume not in {None, "latest"}:
        resumed = Resumed(Path(str(resume)), load_checkpoint(str(resume)))
        config = _resumed_settings(resumed, given)
    files = RunFiles(Path(config.run.output_dir))
    if is_main():
        held.enter_context(files.locked())
    barrier()  # no rank reads what a run that just ends may still be writing
    if resume == "latest":
        found = load_newest_state(files)
        if found is None:
            logger.info("nothing to resume in %s: starting from the beginning", files.root)
        else:
            resumed = Resumed(*found)
            config = _resumed_settings(resumed, {**given, "output_dir": config.run.output_dir})
    if resumed is not None:
        epoch, step = resumed.content["epoch"], resumed.content["global_step"]
        logger.info("resuming at epoch %d, step %d from %s", epoch, step, resumed.path)
    return config, files, resumed


def _resumed_settings(resumed: Resumed, given: dict[str, Any]) -> Config:
    """Return the settings of a checkpoint, changed by the flags that are given and may change."""
    if "run_state" not in resumed.content:
        raise ValueError(f"{resumed.path} holds no training state to resume from; use last_model.pth")
    stored = Config.model_validate(resumed.content["config"])
    changed = {name: value for name, value in given.items() if override(stored, {name: value}) != stored}
    refused = sorted(set(changed) - MAY_CHANGE_ON_RESUME)
    if refused:
        flags = ", ".join(f"--{name}" for name in refused)
        raise ValueError(f"{flags} cannot change when a run is resumed: start a new one, or leave the flag away")
    for name, value in changed.items():
        if name != "resume":
            logger.info("resumed with --%s %s", name, value)
    return override(stored, changed)


def _find_weights(config: Config, given: dict[str, Any], resumed: Resumed | None) -> str | Weights:
    """Read the weights from the file that is named, or check the name of the model whose weights will be loaded."""
    settings = config.model
    if resumed is not None:  # the checkpoint holds architecture and weights; nothing else is needed
        return own_weights(resumed.content, resumed.path)
    if settings.pretrained in {"auto", "openai", "none"}:
        known_architecture(settings.name)
        return settings.pretrained
    weights = read_weights(Path(settings.pretrained), activation=settings.activation)
    chosen = "model_name" in given or settings.name != DEFAULT_MODEL_NAME
    if chosen and weights.architecture.name != settings.name:
        message = "%s holds a %s, and the file decides: the model name %s is not used"
        logger.warning(message, settings.pretrained, weights.architecture.name, settings.name)
    return weights


class Sources(NamedTuple):
    """Where a run's pairs come from; it trains on the shards if there are any."""

    train: Pairs | Shards
    val: Pairs

    @property
    def indexes(self) -> list[Pairs]:
        """Those of the sources that are read from an index."""
        return [source for source in self if isinstance(source, Pairs)]


def _read_data(config: Config, given: dict[str, Any]) -> Sources:
    """Read the indexes; make sample data where the user named none and has none."""
    folder = Path(DEFAULT_DATA_DIR)
    if "data_dir" not in given and config.data.data_dir == DEFAULT_DATA_DIR and holds_only_placeholders(folder):
        index = create_sample_dataset(folder, SAMPLE_SIZE)
        logger.info("no --data_dir was given and %s is empty: made %d sample images (%s)", folder, SAMPLE_SIZE, index)
    if is_shards(config.data.data_dir):
        return Sources(
            *training_shards(
                config.data.data_dir,
                val_data=config.data.val_data,
                max_skipped_fraction=config.data.allowed_skipped_fraction,
                image_dir=config.data.image_dir,
                caption_key=config.data.caption_key,
                captions=config.data.captions,
                cache_images=config.data.cache_images,
            )
        )
    pairs = training_pairs(config.data, seed=config.training.seed)
    return Sources(pairs["train"], pairs["val"])


def _make_model(config: Config, weights: str | Weights, resumed: Resumed | None) -> CLIPModel:
    settings = config.model
    model = CLIPModel(
        settings.name, settings.projection_dim, settings.freeze_backbone, weights,
        activation=settings.activation, freeze_tower=settings.freeze_tower,
    )  # fmt: skip
    if resumed is not None:
        model.starts_random = resumed.content["starts_random"]
        model.holds_batchnorm = resumed.content["holds_batchnorm"]
    return model


def _set_aside_earlier_run(files: RunFiles, config: Config, resumed: Resumed | None) -> None:
    """Move an earlier run's files out of the way of a new one's, and begin the log file."""
    if resumed is None and (folder := files.set_aside_earlier_run()) is not None:
        logger.info("the earlier run's files are now in %s", folder)
    setup_logging(config.run.log_level, files.log)


def _place_model(
    config: Config, model: CLIPModel, *, precision: Precision, device: torch.device
) -> tuple[nn.Module | None, int | None]:
    """Bring the model to its device, or its shards to their ranks.

    Returns:
        What runs it in several ranks, and how many pairs a rank has in memory at once; None: all of its part.
    """
    if config.training.compile and can_compile(device):
        model.compile_towers()
    if config.training.gradient_checkpointing:
        model.checkpoint_gradients()
    if config.run.parallel != "fsdp" or world_size() == 1:
        model.to(device)
    size: Any = config.training.micro_batch_size
    if size == "auto":
        own_pairs = -(-config.training.batch_size // world_size())
        runs_no_tower = set(model.frozen_towers) == set(TOWERS) and _num_views(config)  # their outputs are cached
        size = None if runs_no_tower else fitting_size(model, precision=precision, most=own_pairs, device=device)
    return parallel_model(model, config.run.parallel, device), size


class RunData(NamedTuple):
    """The batches of training, and what the validation reads."""

    loader: TrainLoader | FeatureLoader | ShardLoader
    sources: Sources
    cache: FeatureCache | None
    """Of frozen towers' outputs."""
    image_cache_dir: Path | None
    num_workers: int
    encode_batch_size: int
    """Images or texts encoded at once where no gradient is wanted."""
    precision: Precision
    skipped: SkippedData

    def name_samples(self, image_ids: Tensor) -> list[str]:
        """Return what a message calls some images of the training data."""
        train = self.sources.train
        return [train.describe(index) if isinstance(train, Shards) else train.paths[index] for index in image_ids]


def _open_data(config: Config, model: CLIPModel, sources: Sources, *, files: RunFiles, precision: Precision) -> RunData:
    """Open the loader of the training, and the caches of images and of frozen towers' outputs."""
    settings, workers = config.data, config.data.num_workers
    num_workers = default_num_workers(model.device) if workers is None else workers
    encode_batch_size = min(max(config.training.batch_size, 64), 256)
    cache_dir = files.cache if config.run.cache_dir is None else Path(config.run.cache_dir)
    image_cache_dir = cache_dir / "images" if settings.cache_images else None
    cache = None
    if _caches_features(config, model):
        cache = FeatureCache(
            model, cache_dir / "features", precision=precision, batch_size=encode_batch_size, num_workers=num_workers
        )
    transform = train_transform(model.image_resolution, settings.augment, fast_decode=settings.fast_decode)
    options: dict[str, Any] = {
        "batch_size": config.training.batch_size, "num_workers": num_workers, "device": model.device,
    }  # fmt: skip
    seed = config.training.seed
    loader: TrainLoader | FeatureLoader | ShardLoader
    if isinstance(sources.train, Shards):
        caption_key = settings.caption_key
        loader = ShardLoader(sources.train, transform=transform, seed=seed, caption_key=caption_key, **options)
    else:
        dataset = ImageTextDataset(sources.train, transform=transform, captions=settings.captions, seed=seed)
        if image_cache_dir is not None:
            dataset.cache_images(image_cache_dir)
        loader = TrainLoader(dataset, **options)
        if cache is not None:
            dataset.num_views = _num_views(config) if "image" in model.frozen_towers else 0
            loader = FeatureLoader(loader, cache, augment=settings.augment, num_epochs=config.training.num_epochs)
    skipped = SkippedData(
        sources.indexes,
        num_images=sum(map(len, sources)),
        max_share=settings.allowed_skipped_fraction,
        path=files.skipped,
    )
    return RunData(loader, sources, cache, image_cache_dir, num_workers, encode_batch_size, precision, skipped)


def _num_views(config: Config) -> int:
    """Return how many views of an image a frozen tower's outputs are cached for; none of shards."""
    if is_shards(config.data.data_dir):
        return 0
    views = config.data.feature_views
    return (1 if config.data.augment == "none" else AUGMENTED_VIEWS) if views is None else views


def _caches_features(config: Config, model: CLIPModel) -> bool:
    """Tell whether outputs of frozen towers are cached; say why not, where they could be expected to be."""
    if not model.frozen_towers:
        return False
    if is_shards(config.data.data_dir):
        logger.info("outputs of frozen towers are not cached for shards: as with --feature_views 0")
    elif _num_views(config) and is_sharded(model):
        logger.info("outputs of frozen towers are not cached with --parallel fsdp: they run in every epoch")
    return bool(_num_views(config)) and not is_sharded(model)


def _make_validation(config: Config, trainer: MultimodalTrainer, data: RunData) -> Callable[[], Evaluation]:
    """Return what evaluates the model; where a tower is frozen, its outputs are computed here."""
    return partial(
        evaluate,
        trainer.model,
        data.sources.val,
        batch_size=data.encode_batch_size,
        num_workers=data.num_workers,
        precision=data.precision,
        loss_batch_size=config.training.batch_size,
        cache_dir=data.image_cache_dir,
        kept=None if data.cache is None else data.cache.of_pairs(data.sources.val),
        on_unreadable_image=data.skipped.note,
    )


def _plan(config: Config, data: RunData) -> RunPlan:
    settings, steps = config.training, len(data.loader)
    warmup_steps = num_warmup_steps(settings.num_epochs * steps, settings.warmup_fraction)
    return RunPlan(settings.num_epochs, steps, len(data.loader.dataset), settings.batch_size, warmup_steps)


def _tower_rate(config: Config, model: CLIPModel) -> float:
    """Return the peak rate of the towers over that of the projection layers."""
    scale = config.training.backbone_lr_scale
    return (1.0 if model.starts_random else BACKBONE_LR_SCALE) if scale is None else scale


def _make_trainer(
    config: Config,
    model: CLIPModel,
    plan: RunPlan,
    *,
    precision: Precision,
    micro_batch_size: int | None,
    parallel: nn.Module | None,
) -> MultimodalTrainer:
    settings = config.training
    optimizer = build_optimizer(
        model,
        learning_rate=settings.learning_rate,
        backbone_lr_scale=_tower_rate(config, model),
        weight_decay=settings.weight_decay,
    )
    return MultimodalTrainer(
        model,
        ContrastiveLoss(),
        optimizer,
        build_scheduler(optimizer, total_steps=plan.total_steps, warmup_fraction=settings.warmup_fraction),
        precision=precision,
        gradient_clip_norm=settings.gradient_clip_norm,
        micro_batch_size=micro_batch_size,
        parallel=parallel,
        seed=settings.seed,
    )


def _make_saver(config: Config, trainer: MultimodalTrainer, data: RunData, files: RunFiles) -> Saver:
    model, every = trainer.model, config.run.checkpoint_every
    all_frozen = set(TOWERS) == set(model.frozen_towers)
    fixed = [name for name in model.state_dict() if name.startswith("backbone.")] if all_frozen else []
    writer = CheckpointWriter(files, fixed=fixed, keep=config.run.keep_checkpoints, complete=add_self_test)
    return Saver(
        writer,
        trainer,
        about={"config": config.model_dump(), "val_images": list(data.sources.val.paths)},
        every_steps=every if isinstance(every, int) else None,
        every_seconds=seconds_of(every) if isinstance(every, str) else None,
    )


def _restore(config: Config, trainer: MultimodalTrainer, saver: Saver, resumed: Resumed) -> RunState:
    """Continue from a checkpoint; the model holds its weights already."""
    content, writer = resumed.content, saver.writer
    trainer.load_state_dict(content)
    if content["config"]["training"]["micro_batch_size"] == config.training.micro_batch_size:
        trainer.grad_cache.size = content["micro_batch_size"]  # what was found to fit
    if resumed.path.resolve() == writer.files.last.resolve():
        writer.last_step = content["global_step"]
    state = RunState.from_state_dict(content["run_state"], trainer.model.device)
    content.clear()  # the optimiser has its own copies
    return state


def _announce(config: Config, data: RunData, trainer: MultimodalTrainer, *, plan: RunPlan, journal: Journal) -> None:
    """Say what will be trained on what, and what is unusual about it."""
    model, settings, (train, val) = trainer.model, config.training, data.sources
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    logger.info(
        "model %s (%s), %.1f M parameters, %.1f M trained",
        model.architecture.name, "random start" if model.starts_random else "pretrained",
        sum(size for size, _ in sizes) / 1e6, sum(size for size, is_trained in sizes if is_trained) / 1e6,
    )  # fmt: skip
    extent = f"in {len(train.shards)} shards" if isinstance(train, Shards) else f"({train.num_pairs} pairs)"
    logger.info(
        "data %s: %d training images %s, %d validation images (%d pairs)",
        config.data.data_dir, len(train), extent, len(val), val.num_pairs,
    )  # fmt: skip
    logger.info("device %s, precision %s, %d loader workers", model.device, data.precision.name, data.num_workers)
    if world_size() > 1:
        logger.info("%d ranks (%s), each with its part of a batch", world_size(), config.run.parallel)
    tower_rate = settings.learning_rate * _tower_rate(config, model)
    frozen = f" ({' and '.join(model.frozen_towers)} frozen)" if model.frozen_towers else ""
    logger.info("peak rates: projection layers %.3g, towers %.3g%s", settings.learning_rate, tower_rate, frozen)
    moves_pretrained = not model.starts_random and set(model.frozen_towers) != set(TOWERS)
    journal.advise(
        small_validation=small_validation(len(val)),
        long_warmup=long_warmup(
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
            patience_steps=settings.early_stopping_patience * plan.steps_per_epoch,
        ),
        tower_rate=unusual_tower_rate(tower_rate) if moves_pretrained else None,
    )


if __name__ == "__main__":
    sys.exit(main())
