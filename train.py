"""Fine-tune CLIP on image-text pairs: settings, data, model, loop, evaluation, saved results.

python train.py --data_dir ./data --batch_size 64

With several GPUs or machines `torchrun --nproc_per_node N train.py ...` starts N processes of it, which are one run.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from cliptune.cli import check_command_line, load_config, override, run_stage
from cliptune.settings import DEFAULT_DATA_DIR, DEFAULT_MODEL_NAME, Config

if __name__ == "__main__":
    check_command_line(Config, str(__doc__))

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from clip_model import TOWERS, CLIPModel, ModelName, MultimodalTrainer, add_self_test
from cliptune.data.loaders import Batch, TrainLoader
from cliptune.data.pairs import Pairs, holds_only_placeholders
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.shard_loader import ShardLoader, training_shards
from cliptune.data.shards import Shards, is_shards
from cliptune.data.skipped import SkippedData
from cliptune.data.splits import training_pairs
from cliptune.features.cache import FeatureCache, FeatureLoader
from cliptune.features.encode import Encoder, PairOutputs
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.model.parallel import is_sharded, load_optimizer_state, parallel_model, whole
from cliptune.model.towers import running_statistics
from cliptune.preprocess.transforms import train_transform
from cliptune.results import RECALL_KEYS
from cliptune.runtime.device import (
    Precision,
    can_compile,
    default_num_workers,
    is_out_of_memory,
    keep_freed_memory,
    peak_memory,
    resolve_precision,
)
from cliptune.runtime.distributed import (
    average,
    barrier,
    broadcast,
    is_main,
    main_first,
    process_group,
    rank,
    rank_device,
    world_size,
)
from cliptune.runtime.logs import progress_bar, setup_logging
from cliptune.runtime.rng import draw_bits, seed_everything
from cliptune.runtime.signals import Stopped, StopSignals
from cliptune.settings import SAMPLE_SIZE
from cliptune.training.advice import chance_loss, collapse, long_warmup, small_validation, stuck_loss
from cliptune.training.checkpoint import CheckpointWriter, RunFiles, load_newest_state
from cliptune.training.gradcache import WAYS_OUT
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.memory import fitting_size
from cliptune.training.meters import EpochTotals, StepWatch
from cliptune.training.optim import build_optimizer, build_scheduler, num_warmup_steps
from cliptune.training.profile import StepProfiler
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
STEP_STREAM = 2
LOWEST_TOWER_RATE, HIGHEST_TOWER_RATE = 3e-7, 5e-5


def main(argv: list[str] | None = None) -> int:
    """Train as the settings say; returns the exit code."""
    return run_stage(lambda: _train(argv), name="train.py")


def _train(argv: list[str] | None) -> int:
    config, given = load_config(argv, description=str(__doc__))
    setup_logging(config.run.log_level)
    device = rank_device(config.run.device)
    resolve_precision(config.training.precision, device)  # what is wrong is told before the processes meet
    with process_group(device), ExitStack() as held:
        config, files, state = _open_run(config, given, held)
        device = rank_device(config.run.device)
        precision = resolve_precision(config.training.precision, device)
        seed_everything(config.training.seed)
        keep_freed_memory()
        with main_first():
            if "data_dir" not in given:
                _make_sample_data(config)
            if is_shards(config.data.data_dir):
                shards, val = training_shards(
                    config.data.data_dir,
                    val_data=config.data.val_data,
                    max_skipped_fraction=config.data.allowed_skipped_fraction,
                    image_dir=config.data.image_dir,
                    caption_key=config.data.caption_key,
                    captions=config.data.captions,
                    cache_images=config.data.cache_images,
                )
                pairs = {"val": val}
            else:
                shards, pairs = None, training_pairs(config.data, seed=config.training.seed)
        with main_first():  # the others find the weights downloaded
            model = _make_model(config, given, state)
        if is_main():
            if state is None and (folder := files.set_aside_earlier_run()) is not None:
                logger.info("the earlier run's files are now in %s", folder)
            setup_logging(config.run.log_level, files.log)
        return _train_model(config, model, pairs, files, shards=shards, state=state, device=device, precision=precision)


def _train_model(
    config: Config,
    model: CLIPModel,
    pairs: dict[str, Pairs],
    files: RunFiles,
    *,
    shards: Shards | None,
    state: dict[str, Any] | None,
    device: torch.device,
    precision: Precision,
) -> int:
    try:
        if config.training.compile and can_compile(device):
            model.compile_towers()
        if config.training.gradient_checkpointing:
            model.checkpoint_gradients()
        sharded = config.run.parallel == "fsdp" and world_size() > 1
        if not sharded:
            model.to(device)
        size = _micro_batch_size(config, model, precision, device)
        parallel = parallel_model(model, config.run.parallel, device)
        run = Run(
            config, model, pairs, files, precision=precision, shards=shards, micro_batch_size=size, parallel=parallel
        )
        if state is not None:
            run.restore(state)
        code = run.train()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory: {WAYS_OUT} need less; so does a smaller --batch_size") from None
    if is_main() and code == 0:
        for figure in draw_figures(files.results):
            logger.info("figure: %s", figure)
        print(run.summary())
    return code


@dataclass
class Progress:
    """How far a run has come; all of it plain values, so that a checkpoint holds it."""

    started_at: str
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    best_epoch: int = 0
    epochs_since_best: int = 0
    totals: dict[str, Any] | None = None
    """Of the epoch's batches so far, in a state saved within an epoch: its place there."""


class Run:
    """One training run: epochs, validation, early stop, what is saved; trains on `shards` if there are any.

    Each of several processes goes through all of it; the main one writes.
    """

    def __init__(
        self,
        config: Config,
        model: CLIPModel,
        pairs: dict[str, Pairs],
        files: RunFiles,
        *,
        precision: Precision,
        shards: Shards | None = None,
        micro_batch_size: int | None = None,
        parallel: nn.Module | None = None,
    ) -> None:
        settings = config.training
        self.config, self.model, self.pairs, self.files, self.precision = config, model, pairs, files, precision
        self.shards = shards
        workers = config.data.num_workers
        self.num_workers = default_num_workers(model.device) if workers is None else workers
        self.cache_dir = files.cache if config.run.cache_dir is None else Path(config.run.cache_dir)
        self.image_cache_dir = self.cache_dir / "images" if config.data.cache_images else None
        self.encoder = Encoder(
            model,
            ImageTextDataset,
            precision=precision,
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            image_cache_dir=self.image_cache_dir,
        )
        self.cache = self._open_cache()
        self.val_features: PairOutputs | None = None
        self.loader = self._open_loader()
        scale = settings.backbone_lr_scale
        self.backbone_lr_scale = (1.0 if model.starts_random else 0.01) if scale is None else scale
        optimizer = build_optimizer(
            model,
            learning_rate=settings.learning_rate,
            backbone_lr_scale=self.backbone_lr_scale,
            weight_decay=settings.weight_decay,
        )
        steps = settings.num_epochs * len(self.loader)
        scheduler = build_scheduler(optimizer, total_steps=steps, warmup_fraction=settings.warmup_fraction)
        self.warmup_steps = num_warmup_steps(steps, settings.warmup_fraction)
        self.found: set[str] = set()
        self.trainer = MultimodalTrainer(
            model,
            ContrastiveLoss(),
            optimizer,
            scheduler,
            precision=precision,
            gradient_clip_norm=settings.gradient_clip_norm,
            micro_batch_size=micro_batch_size,
            parallel=parallel,
        )
        self.watch = StepWatch(
            settings.skip_nonfinite,
            scaled=precision.scaled,
            interval=config.run.log_interval,
            name_samples=self._name_samples,
        )
        frozen = set(TOWERS) == set(model.frozen_towers)
        towers = [name for name in model.state_dict() if name.startswith("backbone.")]
        self.checkpoints = CheckpointWriter(
            files,
            fixed=towers if frozen else [],
            keep=config.run.keep_checkpoints,
            every=config.run.checkpoint_every,
            complete=add_self_test,
        )
        self.progress = Progress(datetime.now().isoformat(timespec="seconds"))
        self.totals: EpochTotals | None = None
        self.stop = StopSignals()
        num_images = sum(map(len, pairs.values())) + (0 if shards is None else len(shards))
        self.skipped_data = SkippedData(
            list(pairs.values()),
            num_images=num_images,
            max_share=config.data.allowed_skipped_fraction,
            path=files.bad_images,
        )
        num_profiled = config.run.profile if is_main() else 0
        self.profiler = StepProfiler(num_profiled, files.trace, model.device) if num_profiled else None

    def train(self) -> int:
        """Evaluate the model as loaded, then train epoch by epoch until the last one or the early stop.

        SIGTERM and SIGINT stop it after the step that they come in, and its state is saved.

        Returns:
            The exit code: 0, or 143 or 130 after a signal.
        """
        self._announce()
        code = 0
        if is_main():
            self.writer = SummaryWriter(str(self.files.events), purge_step=self.trainer.global_step + 1)
        with self.stop:
            try:
                self._train_epochs()
            except Stopped as stop:
                code = stop.exit_code
                self._save_place()
                self._log_stop(stop)
                self.skipped_data.agree()
            finally:
                self.checkpoints.flush()
                if self.profiler is not None:
                    self.profiler.close()
        if is_main():
            if code == 0:
                self._write_results(finished=True)
            self.writer.close()
            if len(self.skipped_data):
                logger.warning(self.skipped_data.summary())
        return code

    def _train_epochs(self) -> None:
        progress, settings = self.progress, self.config.training
        if self.cache is not None:
            with self.stop.interruptible():
                self.val_features = self.cache.of_pairs(self.pairs["val"])
        if not progress.history:
            self._finish_epoch({"train_loss": None, "train_accuracy": None}, seconds=0.0)
        while self.totals is not None or progress.epoch < settings.num_epochs:
            self.stop.agree()
            if self.totals is None:
                if self._is_stale():
                    since = progress.epochs_since_best
                    logger.info("early stop: no better RSum for %d epochs (--early_stopping_patience)", since)
                    break
                progress.epoch += 1
                self.totals = EpochTotals(self.model.device)
            self._train_epoch(self.totals)

    def _train_epoch(self, totals: EpochTotals) -> None:
        """Train and evaluate the rest of an epoch, which is all of it if `totals` are empty."""
        self.epoch_start, self.skipped = time.monotonic(), totals.num_pairs
        result = self.trainer.train_epoch(
            self._batches(totals),
            totals=totals,
            watch=self.watch,
            check_interval=self.config.run.log_interval,
            on_check=self._log_step,
        )
        values = {"train_loss": result.loss, "train_accuracy": result.accuracy}
        self._finish_epoch(values, seconds=time.monotonic() - self.epoch_start)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state; the model holds its weights already."""
        load_optimizer_state(self.trainer.optimizer, state["optimizer_state_dict"])
        if self.trainer.scheduler is not None:
            self.trainer.scheduler.load_state_dict(state["scheduler_state_dict"])
        self.trainer.scaler.load_state_dict(state["scaler_state_dict"])
        self.trainer.global_step = state["global_step"]
        if state["config"]["training"]["micro_batch_size"] == self.config.training.micro_batch_size:
            self.trainer.micro_batches.size = state["micro_batch_size"]  # what was found to fit
        self.progress = Progress(**state["progress"])
        if self.progress.totals is not None:
            self.totals = EpochTotals(self.model.device)
            self.totals.load_state_dict(self.progress.totals)
        if Path(state["file"]).resolve() == self.files.last.resolve():
            self.checkpoints.last_step = state["global_step"]
        if is_main():  # epochs after the checkpoint will come again
            lines = [json.dumps(entry) + "\n" for entry in self.progress.history]
            self.files.history.write_text("".join(lines), encoding="utf-8")

    def summary(self) -> str:
        """Lay the result beside the model as loaded."""
        progress = self.progress
        first, best = progress.baseline["metrics"], progress.best["metrics"]
        lines = ["", f"{'':24}{'as loaded':>12}{f'epoch {progress.best_epoch}':>12}{'chance':>12}"]
        for key in (*RECALL_KEYS, "rsum"):
            chance = progress.best["chance"][key]
            lines.append(f"{key:24}{first[key]:12.1f}{best[key]:12.1f}{chance:12.1f}")
        for key in ("i2t_median_rank", "t2i_median_rank", "similarity_gap", "val_loss"):
            lines.append(f"{key:24}{first[key]:12.3g}{best[key]:12.3g}")
        if progress.best_epoch == 0:
            lines.append("no epoch beat the model as loaded, which is kept as best: lower --learning_rate")
        peak = ", ".join(f"{gb:.1f} GB ({key})" for key, gb in peak_memory(self.model.device).items())
        lines.append(f"\npeak memory: {peak}\nbest model: {self.files.best}\nresults: {self.files.results}")
        return "\n".join(lines)

    def _open_loader(self) -> TrainLoader | FeatureLoader | ShardLoader:
        """Open what gives the batches of training."""
        data, settings, model = self.config.data, self.config.training, self.model
        transform = train_transform(model.image_resolution, data.augment, fast_decode=data.fast_decode)
        if self.shards is not None:
            return ShardLoader(
                self.shards,
                transform=transform,
                batch_size=settings.batch_size,
                num_workers=self.num_workers,
                device=model.device,
                seed=settings.seed,
                caption_key=data.caption_key,
            )
        dataset = ImageTextDataset(self.pairs["train"], transform=transform, captions=data.captions, seed=settings.seed)
        if self.image_cache_dir is not None:
            dataset.cache_images(self.image_cache_dir)
        loader = TrainLoader(dataset, batch_size=settings.batch_size, num_workers=self.num_workers, device=model.device)
        if self.cache is None:
            return loader
        dataset.num_views = _num_views(self.config) if "image" in model.frozen_towers else 0
        return FeatureLoader(loader, self.cache, augment=data.augment, num_epochs=settings.num_epochs)

    def _open_cache(self) -> FeatureCache | None:
        """Open the kept features of the frozen towers, if there are any and they are wanted."""
        if self.shards is not None and self.model.frozen_towers:
            logger.info("what frozen towers give for shards is not kept: as with --feature_views 0")
        if not self.model.frozen_towers or not _num_views(self.config):
            return None
        if is_sharded(self.model):
            logger.info("no features of frozen towers are kept with --parallel fsdp: they run in every epoch")
            return None
        return FeatureCache(self.encoder, self.cache_dir / "features")

    @property
    def eval_batch_size(self) -> int:
        """Images or texts encoded at once where no gradient is wanted."""
        return min(max(self.config.training.batch_size, 64), 256)

    def _announce(self) -> None:
        model, settings = self.model, self.config.training
        start = "random start" if model.starts_random else "pretrained"
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        name = model.architecture.name
        logger.info("model %s (%s), %.1f M parameters, %.1f M trained", name, start, total / 1e6, trained / 1e6)
        if self.shards is None:
            train = f"{len(self.pairs['train'])} training images ({self.pairs['train'].num_pairs} pairs)"
        else:
            train = f"{len(self.shards)} training images in {len(self.shards.shards)} shards"
        val = self.pairs["val"]
        logger.info(
            "data %s: %s, %d validation images (%d pairs)",
            self.config.data.data_dir, train, len(val), val.num_pairs,
        )  # fmt: skip
        logger.info(
            "device %s, precision %s, %d loading processes", model.device, self.precision.name, self.num_workers
        )
        if world_size() > 1:
            logger.info("%d processes (%s), each with its part of a batch", world_size(), self.config.run.parallel)
        tower_rate = settings.learning_rate * self.backbone_lr_scale
        held = f" ({' and '.join(model.frozen_towers)} frozen)" if model.frozen_towers else ""
        logger.info("peak rates: projection layers %.3g, towers %.3g%s", settings.learning_rate, tower_rate, held)
        steps = len(self.loader)
        self._diagnose(
            small_validation=small_validation(len(val)),
            long_warmup=long_warmup(
                warmup_steps=self.warmup_steps,
                total_steps=settings.num_epochs * steps,
                patience_steps=settings.early_stopping_patience * steps,
            ),
        )
        if model.starts_random or set(model.frozen_towers) == set(TOWERS):
            return
        if not LOWEST_TOWER_RATE <= tower_rate <= HIGHEST_TOWER_RATE:
            logger.warning(
                "pretrained towers rarely gain at a rate of %.3g; %g to %g is usual: change --backbone_lr_scale",
                tower_rate, LOWEST_TOWER_RATE, HIGHEST_TOWER_RATE,
            )  # fmt: skip

    def _diagnose(self, **findings: str | None) -> None:
        """Say what was found, each kind once in a run."""
        for kind, finding in findings.items():
            if finding is not None and kind not in self.found and is_main():
                self.found.add(kind)
                logger.warning(finding)

    def _diagnose_epoch(self, outcome: Evaluation) -> None:
        history = self.progress.history
        losses = [entry["train_loss"] for before, entry in pairwise(history) if before["step"] >= self.warmup_steps]
        metrics = outcome.metrics
        self._diagnose(
            stuck_loss=stuck_loss(losses, chance_loss(len(self.loader.dataset), self.config.training.batch_size)),
            collapse=collapse(
                image_cosine=metrics["image_cosine"],
                text_cosine=metrics["text_cosine"],
                rsum=metrics["rsum"],
                chance=outcome.chance["rsum"],
            )
            if len(history) > 1
            else None,
        )

    def _batches(self, totals: EpochTotals) -> Iterator[Batch]:
        """Yield an epoch's batches from the first that is not in `totals`; measure how long they are waited for."""
        epoch, last = self.progress.epoch, self.config.training.num_epochs
        total, done = len(self.loader.dataset), totals.num_pairs
        self.bar = progress_bar(total=total, initial=done, unit="pair", desc=f"epoch {epoch}/{last}")
        self.waited = 0.0
        batches = self.loader.epoch(epoch, start=totals.num_batches)
        with self.bar:
            while True:
                start = time.perf_counter()
                with self.stop.interruptible():
                    batch = next(batches, None)
                if batch is None:
                    return
                self.waited += time.perf_counter() - start
                for issue in batch.issues:
                    self.skipped_data.note(issue)
                if self.profiler is not None:
                    self.profiler.step()
                self._seed_step()
                yield batch
                self.bar.update(len(batch.tokens) * world_size())
                self._after_step(totals)

    def _after_step(self, totals: EpochTotals) -> None:
        """Stop if a signal asks for it, or save the state if that is due."""
        due = is_main() and self.checkpoints.is_due(self.trainer.global_step)
        if self.stop.agree(due=due) and totals.num_batches < len(self.loader):
            self._save_place()

    def _save_place(self) -> None:
        """Save the state within an epoch; between two epochs it is saved already."""
        if self.totals is None:
            return
        self.watch.look()
        average(running_statistics(self.model))
        state = self._state(with_optimizer=True)
        if is_main():
            self.checkpoints.save({self.files.last: state})

    def _log_stop(self, stop: Stopped) -> None:
        if self.progress.history:
            epoch, step = self.progress.epoch, self.trainer.global_step
            logger.info("%s at epoch %d, step %d, which are saved: --resume goes on from there", stop, epoch, step)
        else:
            logger.info("%s before anything was trained", stop)

    def _seed_step(self) -> None:
        """Make random numbers of the step, such as dropout's, depend on seed, step and process alone."""
        step = self.trainer.global_step
        bits = draw_bits(self.config.training.seed, step, np.array([rank()]), stream=STEP_STREAM)
        torch.manual_seed(int(bits[0] >> np.uint64(1)))

    def _name_samples(self, image_ids: Tensor) -> list[str]:
        if self.shards is not None:
            return [self.shards.describe(number) for number in image_ids.tolist()]
        return [self.pairs["train"].paths[number] for number in image_ids.tolist()]

    def _log_step(self, step: int, loss: float) -> None:
        logger.debug("step %d: loss %.4f", step, loss)
        if is_main():
            self.writer.add_scalar("step/train_loss", loss, step)
        if not self.bar.disable:
            peak = peak_memory(self.model.device)
            self.bar.set_postfix_str(
                ", ".join([f"loss {loss:.3f}", *(f"{key} {gb:.1f} GB" for key, gb in peak.items())])
            )

    def _is_stale(self) -> bool:
        patience = self.config.training.early_stopping_patience
        return bool(patience) and self.progress.epochs_since_best >= patience

    def _finish_epoch(self, values: dict[str, Any], *, seconds: float) -> None:
        progress = self.progress
        average(running_statistics(self.model))
        with self.stop.interruptible():
            outcome = self._evaluate()
        self.skipped_data.agree()
        outcome = broadcast(outcome)  # so that all decide the same
        self.totals = None
        entry = {
            "epoch": progress.epoch,
            "step": self.trainer.global_step,
            **values,
            **self._rates(),
            **outcome.metrics,
        }
        progress.history.append(entry)
        improved = self._keep_if_best(outcome)
        # best first: if only it is written, a resumed run comes to it again; the last one counts on it
        states = {self.files.best: self._state(with_optimizer=False)} if improved else {}
        states[self.files.last] = self._state(with_optimizer=True)
        if is_main():
            self._record(entry)
            self.checkpoints.save(states)
            self._write_results(finished=False)
        self._log_epoch(entry, improved=improved, seconds=seconds)
        self._diagnose_epoch(outcome)

    def _evaluate(self) -> Evaluation:
        return evaluate(
            self.encoder,
            self.pairs["val"],
            loss_batch_size=self.config.training.batch_size,
            cached=self.val_features,
            on_unreadable_image=self.skipped_data.note,
        )

    def _rates(self) -> dict[str, float]:
        rates = {group["name"]: group["lr"] for group in self.trainer.optimizer.param_groups}
        return {"learning_rate": rates["projection"], "backbone_learning_rate": rates.get("backbone", 0.0)}

    def _keep_if_best(self, outcome: Evaluation) -> bool:
        progress = self.progress
        if not progress.baseline:
            progress.baseline = outcome.to_dict()
        improved = not progress.best or outcome.metrics["rsum"] > progress.best["metrics"]["rsum"]
        progress.epochs_since_best = 0 if improved else progress.epochs_since_best + 1
        if improved:
            progress.best, progress.best_epoch = outcome.to_dict(), progress.epoch
        return improved

    def _record(self, entry: dict[str, Any]) -> None:
        with self.files.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for key, value in entry.items():
            if key not in {"epoch", "step"} and value is not None:
                self.writer.add_scalar(f"epoch/{key}", value, entry["step"])
        self.writer.flush()

    def _state(self, *, with_optimizer: bool) -> dict[str, Any]:
        model, trainer = self.model, self.trainer
        state: dict[str, Any] = {
            "epoch": self.progress.epoch,
            "global_step": trainer.global_step,
            "model_state_dict": whole(model.state_dict()),
            "architecture": model.architecture.to_dict(),
            "config": self.config.model_dump(),
            "metrics": self.progress.history[-1],
            "val_images": list(self.pairs["val"].paths),
            "starts_random": model.starts_random,
            "holds_batchnorm": model.holds_batchnorm,
        }
        if with_optimizer:
            assert trainer.scheduler is not None
            state |= {
                "optimizer_state_dict": whole(trainer.optimizer.state_dict()),
                "scheduler_state_dict": trainer.scheduler.state_dict(),
                "scaler_state_dict": trainer.scaler.state_dict(),
                "progress": asdict(self.progress) | {"totals": self.totals and self.totals.state_dict()},
                "micro_batch_size": trainer.micro_batches.size,
            }
        return state

    def _write_results(self, *, finished: bool) -> None:
        progress = self.progress
        results = {
            "started_at": progress.started_at,
            "finished_at": datetime.now().isoformat(timespec="seconds") if finished else None,
            "best_epoch": progress.best_epoch,
            "metrics": progress.best["metrics"],
            "baseline": progress.baseline["metrics"],
            "chance": progress.best["chance"],
            "num_images": progress.best["num_images"],
            "num_texts": progress.best["num_texts"],
            "histograms": {"baseline": progress.baseline["histograms"], "best": progress.best["histograms"]},
            "peak_memory_gb": peak_memory(self.model.device),
            "config": self.config.model_dump(),
            "history": progress.history,
        }
        self.files.results.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.files.results.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.files.results)

    def _log_epoch(self, entry: dict[str, Any], *, improved: bool, seconds: float) -> None:
        trained = pace = ""
        if entry["train_loss"] is not None:
            rate, waited = (len(self.loader.dataset) - self.skipped) / seconds, 100 * self.waited / seconds
            left = (self.config.training.num_epochs - entry["epoch"]) * (time.monotonic() - self.epoch_start)
            pace = f", {seconds:.0f} s, {rate:.1f} pairs/s, waited {waited:.0f}% for data"
            pace += f", {timedelta(seconds=round(left))} left" if left else ""
            size = self.config.training.batch_size
            trained = f"loss {entry['train_loss']:.3f}, accuracy {entry['train_accuracy']:.1f}% in batches of {size}, "
        logger.info(
            "epoch %d: %sval loss %.3f, R@1 i2t %.1f t2i %.1f, RSum %.1f%s%s",
            entry["epoch"], trained, entry["val_loss"], entry["i2t_r1"], entry["t2i_r1"], entry["rsum"],
            " (best)" if improved else "", pace,
        )  # fmt: skip


def _num_views(config: Config) -> int:
    """Return how many views of a picture a frozen tower keeps; none of shards."""
    if is_shards(config.data.data_dir):
        return 0
    views = config.data.feature_views
    return (1 if config.data.augment == "none" else AUGMENTED_VIEWS) if views is None else views


def _micro_batch_size(config: Config, model: CLIPModel, precision: Precision, device: torch.device) -> int | None:
    """Return how many pairs of a batch a process has in memory at once; None: all of its part."""
    wanted = config.training.micro_batch_size
    if wanted != "auto":
        return wanted
    if set(model.frozen_towers) == set(TOWERS) and _num_views(config):
        return None  # their outputs are kept, and no tower runs
    own = -(-config.training.batch_size // world_size())
    return fitting_size(model, precision=precision, most=own, device=device)


def _open_run(config: Config, given: dict[str, Any], held: ExitStack) -> tuple[Config, RunFiles, dict[str, Any] | None]:
    """Keep other runs out of the output folder while `held` is, and find what to resume from.

    Returns:
        The settings, which are a resumed run's own but for those that may change; the run's files; the state if there
        is one, with the `file` that it comes from.

    Raises:
        FileNotFoundError: the checkpoint named is not there.
        ValueError: it cannot be resumed from, a given flag may not change, or another run is writing there.
    """
    resume, state = config.run.resume, None
    if resume not in {None, "latest"}:
        state = {**load_checkpoint(str(resume)), "file": str(resume)}
        config = _resumed_settings(state, given)
    files = RunFiles(Path(config.run.output_dir))
    if is_main():
        held.enter_context(files.locked())
    barrier()  # none reads what a run that just ends may still be writing
    if resume == "latest":
        found = load_newest_state(files)
        if found is None:
            logger.info("nothing to resume in %s: starting from the beginning", files.root)
        else:
            state = {**found[1], "file": str(found[0])}
            config = _resumed_settings(state, {**given, "output_dir": config.run.output_dir})
    if state is not None:
        logger.info("resuming at epoch %d, step %d from %s", state["epoch"], state["global_step"], state["file"])
    return config, files, state


def _resumed_settings(state: dict[str, Any], given: dict[str, Any]) -> Config:
    """Return the settings of a state, changed by the flags that are given and may change."""
    if "optimizer_state_dict" not in state:
        raise ValueError(f"{state['file']} holds no training state to resume from; use last_model.pth")
    stored = Config.model_validate(state["config"])
    changed = {name: value for name, value in given.items() if override(stored, {name: value}) != stored}
    refused = sorted(set(changed) - MAY_CHANGE_ON_RESUME)
    if refused:
        flags = ", ".join(f"--{name}" for name in refused)
        raise ValueError(f"{flags} cannot change when a run is resumed; start a new one, or leave the flag away")
    for name, value in changed.items():
        if name != "resume":
            logger.info("resumed with --%s %s", name, value)
    return override(stored, changed)


def _make_sample_data(config: Config) -> None:
    """Make sample data where the user named none and has none."""
    folder = Path(DEFAULT_DATA_DIR)
    if config.data.data_dir == DEFAULT_DATA_DIR and holds_only_placeholders(folder):
        index = create_sample_dataset(folder, SAMPLE_SIZE)
        logger.info("no --data_dir was given and %s is empty: made %d sample images (%s)", folder, SAMPLE_SIZE, index)


def _make_model(config: Config, given: dict[str, Any], state: dict[str, Any] | None) -> CLIPModel:
    settings = config.model
    chosen = "model_name" in given or settings.name != DEFAULT_MODEL_NAME
    name = settings.name if chosen else ModelName(settings.name)
    pretrained, activation = settings.pretrained, settings.activation
    if state is not None:  # the checkpoint holds architecture and weights; nothing else is needed
        name, pretrained = ModelName(settings.name), state["file"]
    model = CLIPModel(
        name, settings.projection_dim, settings.freeze_backbone, pretrained,
        activation=activation, freeze_tower=settings.freeze_tower,
    )  # fmt: skip
    if state is not None:
        model.starts_random, model.holds_batchnorm = state["starts_random"], state["holds_batchnorm"]
    return model


if __name__ == "__main__":
    sys.exit(main())
