"""Optimiser steps: forward, loss, backward, clip, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cliptune.model.batchnorm import StatisticsSnapshot, running_statistics
from cliptune.model.lora import adapted_weight, is_adapter, merged
from cliptune.model.parallel import clip_gradient, load_optimizer_state, unscale_gradient, whole
from cliptune.runtime.device import Precision
from cliptune.runtime.distributed import average, rank
from cliptune.runtime.rng import seed_step
from cliptune.training.average import WeightAverage
from cliptune.training.gradcache import GradCache
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.meters import EpochResult, EpochTotals, Step, StepResult, StepWatch
from cliptune.training.optim import load_scaler_state, load_scheduler_state, rates_of
from cliptune.training.prefetch import fed

MAX_LOGIT_SCALE = math.log(100)  # as in section 2.5 of CLIP's paper


class MultimodalTrainer:
    """Takes optimiser steps; knows nothing of settings, files or plots.

    Args:
        model: a `CLIPModel` on its device.
        loss: over the features of a whole batch.
        optimizer: over the model's trained parameters.
        scheduler: stepped once a step; None: constant rates.
        precision: of the forward pass; parameters and the loss stay float32.
        gradient_clip_norm: largest norm of the whole gradient; 0: no clipping.
        micro_batch_size: pairs that are in memory at once, in each rank; None: the whole batch. The gradient is the
            same. It is halved when memory runs out.
        parallel: what runs the model in several ranks, see `parallel.parallel_model`.
        seed: makes each step's random numbers depend on it, the step and the rank alone; None: they go on.
        watch: reads the numbers of the steps; None: one that ends at the first that are not finite.
        ema: decay of the average of the weights, see `WeightAverage`; None: there is none.

    Raises:
        ValueError: an average of a sharded model.

    Attributes:
        global_step: steps so far, with those that were skipped.
        interruptible: makes a context for the part of a step that may be given up, since it updates no weight.
    """

    def __init__(  # noqa: PLR0913  (what a notebook and a run choose differently)
        self,
        model: Any,
        loss: ContrastiveLoss,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        *,
        precision: Precision,
        gradient_clip_norm: float = 1.0,
        micro_batch_size: int | None = None,
        parallel: nn.Module | None = None,
        seed: int | None = None,
        watch: StepWatch | None = None,
        ema: float | None = None,
    ) -> None:
        self.model = model
        self.watch = StepWatch() if watch is None else watch
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.gradient_clip_norm = gradient_clip_norm
        self.seed = seed
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=precision.scaled)
        self.grad_cache = GradCache(
            model, loss, precision=precision, size=micro_batch_size, parallel=parallel, scaler=self.scaler
        )
        self.average = None if ema is None else WeightAverage(model, ema)
        self.global_step = 0
        self.interruptible: Callable[[], AbstractContextManager[object]] = nullcontext

    def train_step(
        self, images: Tensor, tokens: Tensor, image_ids: Tensor | None = None, caption_ids: Tensor | None = None
    ) -> StepResult | None:
        """Take one optimiser step; with a loss or gradient that is not finite it changes nothing.

        Args:
            images: `[B, 3, R, R]`, or the image tower's output, as `CLIPModel.forward` takes them; with several
                ranks this one's part of the batch.
            tokens: int64 `[B, L]`, or the text tower's output.
            image_ids: int64 `[B]`, or None when every image of the batch is another.
            caption_ids: int64 `[B]`, the same for equal captions, or None when every caption is another.

        Returns:
            The numbers of the step, whose device is not waited for; None if the batch was empty in all ranks.

        Raises:
            MemoryError: one pair does not fit into memory.
        """
        statistics = StatisticsSnapshot(self.model)
        try:
            with self.interruptible():
                result = self.grad_cache.backward(images, tokens, image_ids, caption_ids)
        except BaseException:  # a signal: as if the step had not begun
            statistics.restore()
            self.model.zero_grad(set_to_none=True)
            raise
        if result is None:
            return None
        unscale_gradient(self.scaler, self.optimizer)
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        norm = clip_gradient(parameters, self.gradient_clip_norm)
        values = torch.stack([result.loss, result.accuracy, norm, self.model.logit_scale.detach().exp()])  # [4]
        rates = rates_of(self.optimizer)
        is_bad = ~(result.loss.isfinite() & norm.isfinite())
        self._step_unless(is_bad)
        statistics.restore(where=is_bad)  # the forward pass has moved them
        self.scaler.update()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if self.scheduler is not None:
            self.scheduler.step()
        self.global_step += 1
        if self.average is not None:
            self.average.update(self.global_step, unless=is_bad)
        return StepResult(self.global_step, result.num_pairs, rates, values)

    def steps(self, batches: Iterable[Any]) -> Iterator[Step]:
        """Take a step for each batch, and yield it: what to do about it is the caller's business.

        Args:
            batches: tuples that begin with `images`, `tokens`, `image_ids`, as `train_step` takes them; their
                `caption_ids`, and their `issues`, what could not be loaded, count if they have any.

        Raises:
            FloatingPointError: losses or gradients are not finite; says step, rates, scale and samples.
        """
        self.model.train()
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            waited = time.perf_counter() - start
            images, tokens, image_ids, *_ = batch
            if self.seed is not None:
                seed_step(self.seed, self.global_step, rank())
            result = self.train_step(images, tokens, image_ids, getattr(batch, "caption_ids", None))
            issues = getattr(batch, "issues", ())
            del batch, images, tokens  # their memory is free for the next batch
            seconds = time.perf_counter() - start
            if result is not None:
                self.watch.add(result, image_ids, seconds=seconds)
            yield Step(result, issues, seconds, waited)

    def fed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Copy the images of a batch to a GPU while the step before it runs, see `prefetch.fed`."""

        def is_whole(images: Tensor) -> bool:
            size = self.grad_cache.size
            return size is None or len(images) <= size

        return fed(batches, self.model.device, is_whole=is_whole)

    def settle(self) -> None:
        """Read the numbers of all steps so far, and give every rank the mean of all ranks' BatchNorm statistics.

        Raises:
            FloatingPointError: as `steps` does; what is not finite is neither saved nor evaluated.
        """
        self.watch.read()
        average(running_statistics(self.model))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have the average of its weights, if there is one, while it is evaluated or saved."""
        with nullcontext() if self.average is None else self.average.in_use():
            yield

    def model_state(self) -> dict[str, Any]:
        """Return the state dict of the model that training has made: averaged, adapters merged; a collective."""
        with self.averaged():
            return merged(whole(self.model.state_dict()), self.model.lora)

    def train_epoch(self, batches: Iterable[Any]) -> EpochResult:
        """Train over the `batches` of one epoch, as `steps` takes them.

        Raises:
            FloatingPointError: losses or gradients are not finite; says step, rates, scale and samples.
            ValueError: there was no batch.
        """
        totals = EpochTotals(self.model.device)
        for step in self.steps(batches):
            totals.add(step.result)
            self.watch.take()
        self.settle()
        return totals.mean()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside `model_state`; a collective if the model is sharded."""
        state = whole(self.model.state_dict())
        # what the model holds where `model_state` has something else
        names = {name for name in state if is_adapter(name)}
        names |= {adapted_weight(name) for name in names} | set(self.average.tensors if self.average else ())
        return {
            "optimizer_state_dict": whole(self.optimizer.state_dict()),
            "scheduler_state_dict": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "num_skipped_steps": self.watch.num_skipped,
            "num_skipped_in_a_row": self.watch.num_in_a_row,
            "micro_batch_size": self.grad_cache.size,
            "compiled": self.model.is_compiled,
            "weights_state_dict": {name: state[name] for name in names},
            "average_state_dict": {} if self.average is None else dict(self.average.tensors),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, beside `global_step`; the micro-batch size stays this trainer's.

        The weights are loaded already, where the model was built: a sharded one could not take them.
        """
        load_optimizer_state(self.optimizer, state["optimizer_state_dict"])
        if self.scheduler is not None:
            load_scheduler_state(self.scheduler, state["scheduler_state_dict"], step=state["global_step"])
        load_scaler_state(self.scaler, state["scaler_state_dict"])
        # a run of before they were counted may be resumed
        self.watch.num_skipped = state.get("num_skipped_steps", 0)
        self.watch.num_in_a_row = state.get("num_skipped_in_a_row", 0)
        if self.average is not None:
            self.average.load_state_dict(state["average_state_dict"])
        self.global_step = state["global_step"]

    def _step_unless(self, is_bad: Tensor) -> None:
        """Take the optimiser's step or, with a gradient that is not finite, leave weights and moments as they are.

        Fused optimisers take the answer as a tensor, so that no device is waited for (`GradScaler` does the same).
        """
        if not self.optimizer.defaults.get("fused"):
            if not is_bad:
                self.optimizer.step()
            return
        self.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]
