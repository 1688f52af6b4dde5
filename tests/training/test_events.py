from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cliptune.training.events import EventFile


def read(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    events = EventFile(tmp_path / "new", purge_step=1)
    for step in (1, 2, 3):
        events.add_scalar("epoch/val_loss", step / 2, step)
        events.add_scalar("step/train_loss", float("nan"), step)
    assert read(tmp_path / "new", "epoch/val_loss") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert [step for step, _ in read(tmp_path / "new", "step/train_loss")] == [1, 2, 3]


def test_steps_that_come_again_replace_those_before(tmp_path: Path) -> None:
    for purge_step, value in ((1, 1.0), (3, 2.0)):  # killed in step 4, resumed after step 2
        events = EventFile(tmp_path, purge_step=purge_step)
        for step in range(purge_step, 5):
            events.add_scalar("loss", value, step)
    assert read(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_folder_that_is_removed_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = EventFile(tmp_path / "x", purge_step=1)
    events.add_scalar("loss", 1.0, 1)
    events.path.unlink()
    events.path.parent.rmdir()
    events.add_scalar("loss", 2.0, 2)
    assert read(tmp_path / "x", "loss") == [(2, 2.0)]
    assert "TensorBoard events" not in caplog.text


def test_what_cannot_be_written_is_said_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x").touch()
    events = EventFile(tmp_path / "x", purge_step=1)
    events.add_scalar("loss", 1.0, 1)
    assert caplog.text.count("no more TensorBoard events are written") == 1
