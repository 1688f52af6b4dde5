"""What a run goes on from, if from anything: its folder, its checkpoint, and the settings that it has then."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from cliptune.cli import Started, resumed_config
from cliptune.data.snapshot import Snapshots
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.runs.data import earlier_data, folder_of, found_again, located
from cliptune.runs.decoding import require_decoder
from cliptune.runtime.distributed import barrier, is_main, rank_device
from cliptune.runtime.logs import setup_logging
from cliptune.settings import Config
from cliptune.training.checkpoint import RunFiles, check_state, load_newest_state

logger = logging.getLogger("train")


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def checked(cls, path: Path, content: dict[str, Any]) -> Resumed:
        """Return a checkpoint that a run can be resumed from.

        Raises:
            ValueError: it is none.
        """
        check_state(content, path)
        return cls(path, content)

    @classmethod
    def named(cls, path: Path) -> Resumed:
        """Return a checkpoint, or the newest one of a run's folder.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: a run cannot be resumed from it.
        """
        if not path.is_dir():
            return cls.checked(path, load_checkpoint(path))
        found = load_newest_state(RunFiles(path))
        if found is None:
            raise FileNotFoundError(f"--resume: {path} holds no run's model-checkpoint/last_model.pth")
        return cls.checked(*found)

    def settings(self, started: Started) -> Config:
        """Return its run's settings, changed by the flags that are given and may change."""
        return found_again(resumed_config(self.content, started, source=self.path), self.content.get("folder", ""))


def open_run(started: Started, held: ExitStack, *, is_locked: bool = False) -> tuple[Config, RunFiles, Resumed | None]:
    """Keep other runs out of the output folder while `held` is, and find what to resume from.

    Args:
        started: what the run was started with.
        held: for as long as the run goes on.
        is_locked: whoever calls keeps other runs out.

    Returns:
        The settings, which are a resumed run's own but for those that may change; the run's files; the checkpoint.

    Raises:
        FileNotFoundError: the checkpoint named is not there.
        ValueError: it cannot be resumed from, a given flag may not change, another run is writing there, or no JPEG can
            be decoded where a new run's settings say.
    """
    config, resumed = started.config, None
    resume = config.run.resume
    if resume not in {None, "latest"}:
        resumed = Resumed.named(Path(str(resume)))
        if "output_dir" not in started.given:  # where it goes on is told by where the file lies, not by what it holds
            started = started.at(RunFiles.around(resumed.path).root)
        config = resumed.settings(started)
    files = RunFiles(Path(config.run.output_dir))
    if is_main() and not is_locked:
        held.enter_context(files.locked())
    barrier()  # no rank reads what a run that just ends may still be writing
    if resume == "latest":
        found = load_newest_state(files)
        if found is None:
            logger.info("nothing to resume in %s: starting from the beginning", files.root)
        else:
            resumed = Resumed.checked(*found)
            config = resumed.settings(started)
    if resumed is None:
        require_decoder(config, rank_device(config.run.device))
    else:
        epoch, step = resumed.content["epoch"], resumed.content["global_step"]
        logger.info("resuming at epoch %d, step %d from %s", epoch, step, resumed.path)
    return config, files, resumed


def about_run(
    config: Config,
    started: Started,
    resumed: Resumed | None,
    *,
    snapshots: Snapshots,
    positives: str,
    val_images: Iterable[str],
) -> dict[str, Any]:
    """Return what every checkpoint of a run says of it.

    Args:
        config: of the run.
        started: what it was started with.
        resumed: what it goes on from.
        snapshots: of its data.
        positives: that its loss has.
        val_images: paths of its validation images.
    """
    began = {} if resumed is None else resumed.content
    return {
        "run_id": began.get("run_id", "") if began else uuid.uuid4().hex,
        "config": located(config).model_dump(),
        "folder": folder_of(config, began.get("folder", "")),
        "config_file": began.get("config_file", started.file_values),
        "positives": positives,
        "data": {split: snapshot.to_dict() for split, snapshot in snapshots.items()},
        "earlier_data": earlier_data(config, began, snapshots),
        "val_images": list(val_images),
    }


def set_aside_earlier_run(files: RunFiles, config: Config, resumed: Resumed | None) -> None:
    """Move the files of an earlier or another run out of the way of this one's, and begin the log file."""
    if not is_main():
        return
    if resumed is None or resumed.path.resolve().parent != files.last.parent.resolve():
        files.set_aside_earlier_run()
    setup_logging(config.run.log_level, files.log)
