"""A run told to a service that tracks runs, through that service's own library: Weights & Biases, or MLflow.

Where the library sends it, and as whom, is the library's matter (`WANDB_MODE`, `MLFLOW_TRACKING_URI`, ...). It is told
numbers, settings and the verdict: no image, no caption, no model.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from cliptune.runtime.messages import one_line

logger = logging.getLogger("train")

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""What `pip install` takes for each."""
RUN_ID = "cliptune.run_id"
"""Tag of MLflow's runs, whose own ids cannot be chosen."""
MAX_PARAMS = 100
"""That MLflow takes at once."""
Status = Literal["finished", "stopped", "failed"]


class Service(Protocol):
    """One run at a service."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Tell numbers of a step."""

    def tell(self, facts: Mapping[str, str | float]) -> None:
        """Tell what holds of the whole run."""

    def end(self, status: Status) -> None:
        """End the run."""


class Wandb:
    """A run at Weights & Biases; started again with its id it goes on."""

    def __init__(self, library: ModuleType, *, run_id: str, settings: Mapping[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = library.init(id=run_id, resume="allow", dir=str(folder))
        self._run.config.update(dict(settings), allow_val_change=True)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Tell numbers of a step; those of steps that it has already it leaves out."""
        self._run.log(dict(values), step=step)

    def tell(self, facts: Mapping[str, str | float]) -> None:
        """Put facts into the run's summary."""
        self._run.summary.update(dict(facts))

    def end(self, status: Status) -> None:
        """End the run."""
        self._run.finish(exit_code=int(status != "finished"))


class Mlflow:
    """A run at MLflow, in the experiment that the environment names; found again by a tag it goes on."""

    def __init__(self, library: ModuleType, *, run_id: str, settings: Mapping[str, Any], folder: Path) -> None:
        del folder
        self._library = library
        named = f"tags.`{RUN_ID}` = '{run_id}'"
        found = library.search_runs(filter_string=named, max_results=1, output_format="list")
        run = library.start_run(run_id=found[0].info.run_id if found else None, tags={RUN_ID: run_id})
        # what a run has once it keeps: a resumed run has the parameters that it began with
        new = [(name, value) for name, value in settings.items() if name not in run.data.params]
        for start in range(0, len(new), MAX_PARAMS):
            library.log_params(dict(new[start : start + MAX_PARAMS]))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Tell numbers of a step."""
        self._library.log_metrics(dict(values), step=step)

    def tell(self, facts: Mapping[str, str | float]) -> None:
        """Set tags of the run."""
        self._library.set_tags(dict(facts))

    def end(self, status: Status) -> None:
        """End the run."""
        words = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._library.end_run(status=words[status])


SERVICES: dict[str, Callable[..., Service]] = {"wandb": Wandb, "mlflow": Mlflow}


class Tracker:
    """Tells a service, or nobody. Once the run trains, what fails at the service is a warning, and it is told no more.

    Args:
        name: key of `SERVICES`; None: nobody is told.

    Raises:
        ImportError: the service's library is not installed.
    """

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._service: Service | None = None
        self._library = None if name is None else _import(name)

    def begin(self, *, run_id: str, settings: Mapping[str, Any], folder: Path) -> None:
        """Begin the run, or go on with the one of this id.

        Args:
            run_id: of the run.
            settings: flat: `{"training.seed": 0}`.
            folder: where the library may put its files.

        Raises:
            ValueError: the service cannot be told: nobody is logged in, it is not reached, ...
        """
        if self._name is None:
            return
        try:
            self._service = SERVICES[self._name](self._library, run_id=run_id, settings=settings, folder=folder)
        except Exception as error:  # each library has its own
            raise ValueError(
                f"--track {self._name}: {one_line(error)}; without the flag the run is told to nobody"
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Tell numbers, such as `{"epoch/val_loss": 1.2}`, of a step."""
        self._tell(lambda service: service.log(values, step))

    def tell(self, facts: Mapping[str, str | float]) -> None:
        """Tell what holds of the whole run, such as its verdict."""
        self._tell(lambda service: service.tell(facts))

    def end(self, status: Status) -> None:
        """End the run, if it has begun."""
        self._tell(lambda service: service.end(status))
        self._service = None

    def _tell(self, call: Callable[[Service], None]) -> None:
        if self._service is None:
            return
        try:
            call(self._service)
        except Exception as error:  # whatever it is: the run goes on without the service
            self._service = None
            logger.warning("%s is told no more of the run: %s", self._name, one_line(error))


@contextmanager
def tracking(name: str | None) -> Iterator[Tracker]:
    """Give a tracker whose run ends with the block: finished if the verdict was told, failed by an exception."""
    tracker = Tracker(name)
    try:
        yield tracker
    except BaseException:
        tracker.end("failed")
        raise
    tracker.end("stopped")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"--track {name} needs {error.name}: pip install {PACKAGES[name]}") from None
