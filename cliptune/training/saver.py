"""What a run's checkpoints hold, and when they are due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cliptune.model.lora import base_fingerprint, save_adapter
from cliptune.runtime.distributed import is_main
from cliptune.runtime.messages import one_line
from cliptune.training.checkpoint import CheckpointWriter, Complete, RunFiles, State
from cliptune.training.intervals import Interval
from cliptune.training.state import RunState


class Saver:
    """Saves a run's state: what a checkpoint holds, and when it is due within an epoch.

    Every rank calls its methods, since a sharded model's tensors are put together by all of them; the main one writes.

    Args:
        files: of the run.
        trainer: a `trainer.MultimodalTrainer`.
        about: what every checkpoint of the run holds beside: its `run_id`, its `config`, its `val_images`, ...
        keep: how many states to resume from there are.
        complete: adds what a checkpoint lacks, when it is written.
        background: states are written in a thread, see `CheckpointWriter`; None: in place.
        every_steps: steps between two states within an epoch; None: none is due by steps.
        every_seconds: or the time between them; None: none is due by time.
        clock: tells the time, in seconds.
    """

    def __init__(  # noqa: PLR0913  (what a run chooses and tests choose otherwise)
        self,
        files: RunFiles,
        trainer: Any,
        *,
        about: dict[str, Any],
        keep: int = 1,
        complete: Complete | None = None,
        background: Callable[[State], Complete] | None = None,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.files, self.trainer, self.about = files, trainer, about
        towers = {name: value for name, value in trainer.model.named_parameters() if name.startswith("backbone.")}
        are_fixed = not any(parameter.requires_grad for parameter in towers.values())
        fixed = [name for name in trainer.model.state_dict() if name.startswith("backbone.")] if are_fixed else []
        self._writer = CheckpointWriter(
            files, run_id=about.get("run_id", ""), fixed=fixed, keep=keep, complete=complete,
            save_adapter=self._save_adapter, background=background, clock=clock,
        )  # fmt: skip
        self._learned = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        self._base: str | None = None
        self._last_place: object = None
        self._interval = Interval(every_steps=every_steps, every_seconds=every_seconds, clock=clock)

    def is_due(self, step: int) -> bool:
        """Tell whether a state should be saved after this step, in all ranks or in none.

        Raises:
            OSError: a file could not be written since.
        """
        self._writer.check()
        return self._interval.is_due(step)

    def save(self, state: RunState, *, best: bool = False) -> None:
        """Save the state to resume from, and at first the model as loaded; `best`: save the model as the best one, too.

        Raises:
            FloatingPointError: steps that are not read yet are not finite.
            OSError: a file cannot be written, or could not since the last call.
        """
        self.trainer.settle()
        with state.wall_time.inside("saving"):
            self._save(state, best=best)
        self._last_place = _place(state)
        self._interval.restart()

    def has_saved(self, state: RunState) -> bool:
        """Tell whether nothing has come since the last `save`."""
        return self._last_place == _place(state)

    def _save(self, state: RunState, *, best: bool) -> None:
        content = self._model(state)
        # the model as loaded stays for the run's life; it is the best one, too, until an epoch is better
        states = {self.files.loaded: content} if state.epoch == 0 else {}
        # the best after the last: were the last alone written, the best could be made of it
        states[self.files.last] = {**content, "run_state": state.state_dict(), **self.trainer.state_dict()}
        states |= {self.files.best: content} if best else {}
        if best and self.trainer.model.lora is not None:
            states[self.files.adapter] = dict(states[self.files.last])
        if is_main():
            self._writer.save(states)

    def restore(self, path: Path, content: dict[str, Any]) -> RunState:
        """Go on from a checkpoint, whose weights the model has already; `content` is empty afterwards.

        Raises:
            ValueError: its optimiser's state is of other parameters, or damaged; names the file.
        """
        try:
            self.trainer.load_state_dict(content)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            reason = f"its optimiser's state does not fit its model ({type(error).__name__}: {one_line(error)})"
            raise ValueError(f"{path}: damaged, or written by other means than this toolkit: {reason}") from None
        if path.resolve() == self.files.last.resolve():
            self._writer.last_step = content["global_step"]
        state = RunState.from_state_dict(content["run_state"], self.trainer.model.device)
        content.clear()  # the optimiser has its own copies
        return state

    @contextmanager
    def of_run(self, state: RunState) -> Iterator[None]:
        """Write what waits when the run ends, however it does."""
        try:
            yield
        finally:
            self.flush(state)

    def flush(self, state: RunState) -> None:
        """Bring all that was saved to the disk.

        Raises:
            OSError: a file cannot be written.
        """
        with state.wall_time.inside("saving"):
            self._writer.flush()

    def _save_adapter(self, state: State) -> None:
        """Write what of the best model was learned, small, beside it; of the model itself no tensor is read."""
        model = self.trainer.model
        held, learned = {**state["model_state_dict"], **state["weights_state_dict"]}, state["average_state_dict"]
        if self._base is None:
            self._base = base_fingerprint(held)
        tensors = {name: learned.get(name, held[name]) for name in self._learned}
        about = {"base": self._base, "model_name": model.architecture.name, "run_id": self.about.get("run_id", "")}
        save_adapter(self.files.adapter, tensors, model.lora, about=about)

    def _model(self, state: RunState) -> dict[str, Any]:
        model = self.trainer.model
        return {
            **self.about,
            "epoch": state.epoch,
            "global_step": state.step,
            "metrics": state.history[-1],
            "model_state_dict": self.trainer.model_state(),
            "architecture": model.architecture.to_dict(),
            "starts_random": model.starts_random,
            "holds_batchnorm": model.holds_batchnorm,
        }


def _place(state: RunState) -> object:
    return state.epoch, state.step, state.num_batches, len(state.history)
