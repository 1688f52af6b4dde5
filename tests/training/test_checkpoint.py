import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.training import checkpoint as run_checkpoint
from cliptune.training.checkpoint import CheckpointWriter, RunFiles, load_newest_state

STATE = {
    "model_state_dict": {"w": torch.arange(4.0)},
    "architecture": {},
    "self_test": {},
    "epoch": 1,
    "global_step": 2,
}


class Clock:
    """A time that passes only in writing: 2 s a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.written: list[str] = []
        monkeypatch.setattr(run_checkpoint.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(run_checkpoint, "save_checkpoint", self.save)

    def save(self, path: Path, state: dict[str, object]) -> None:
        save_checkpoint(path, state)
        self.now += 2
        self.written.append(f"{path.stem.removesuffix('_model')} {state['epoch']}")


def state_of(epoch: int, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, object]:
    return {**STATE, "model_state_dict": {"fixed": fixed, "moving": moving}, "epoch": epoch}


def test_states_that_come_too_fast_wait_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, files, fixed, moving = Clock(monkeypatch), RunFiles(tmp_path), torch.zeros(3), torch.zeros(3)
    best, last, writer = files.best, files.last, CheckpointWriter(files, fixed=["fixed"])
    writer.save({best: state_of(0, fixed, moving), last: state_of(0, fixed, moving)})
    assert clock.written == ["best 0", "last 0"]
    for epoch in (1, 2, 3):  # the writing ended at 104 and took 4 s: nothing is due before 184
        moving += 1
        clock.now += 20
        improved = {best: state_of(epoch, fixed, moving)} if epoch < 3 else {}
        writer.save({**improved, last: state_of(epoch, fixed, moving)})
    assert clock.written[2:] == []
    waiting = [state["model_state_dict"] for state in writer._waiting.values()]
    assert all(tensors["fixed"] is fixed for tensors in waiting)
    moving += 1
    clock.now += 20
    writer.save({last: state_of(4, fixed, moving)})
    assert clock.written[2:] == ["best 2", "last 4"]
    assert load_checkpoint(best)["model_state_dict"]["moving"].tolist() == [2, 2, 2]
    assert load_checkpoint(last)["model_state_dict"]["moving"].tolist() == [4, 4, 4]
    moving += 1
    writer.save({last: state_of(5, fixed, moving)})
    moving += 1
    assert load_checkpoint(last)["epoch"] == 4
    writer.flush()
    assert load_checkpoint(last)["model_state_dict"]["moving"].tolist() == [5, 5, 5]
    writer.flush()
    assert clock.written[4:] == ["last 5"]


def test_without_fixed_tensors_every_state_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, files = Clock(monkeypatch), RunFiles(tmp_path)
    writer = CheckpointWriter(files)
    for epoch in (1, 2):
        writer.save({files.last: {**STATE, "epoch": epoch}})
    assert clock.written == ["last 1", "last 2"]


def saved_states(files: RunFiles, *steps: int, keep: int) -> CheckpointWriter:
    writer = CheckpointWriter(files, keep=keep)
    for step in steps:
        writer.save({files.best: STATE, files.last: {**STATE, "global_step": step}})
    return writer


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_states_are_kept(keep: int, tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    saved_states(files, 0, 7, 20, 20, 100, keep=keep)
    names = ["last_model.pth", "step_00000020.pth", "step_00000007.pth"][:keep]
    assert [path.name for path in files.states()] == names
    assert [load_checkpoint(path)["global_step"] for path in files.states()] == [100, 20, 7][:keep]
    assert len(list(files.last.parent.iterdir())) == keep + 1


def test_states_of_a_course_that_was_left_go(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    saved_states(files, 10, 20, 30, keep=3)
    saved_states(files, 15, keep=3)  # as resumed from step_00000010.pth
    assert [path.name for path in files.states()] == ["last_model.pth", "step_00000010.pth"]


def test_a_disk_without_second_names_keeps_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    files = RunFiles(tmp_path)
    saved_states(files, 1, 2, keep=2)
    assert [load_checkpoint(path)["global_step"] for path in files.states()] == [2]
    assert "does not take a second name" in caplog.text


def test_a_state_is_due_by_steps_or_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(run_checkpoint.time, "monotonic", lambda: now[0])
    files = RunFiles(tmp_path)
    by_steps, by_time, never = (CheckpointWriter(files, every=every) for every in (5, "2m", None))
    assert [by_steps.is_due(step) for step in (4, 5, 6, 10)] == [False, True, False, True]
    now[0] = 119
    assert not by_time.is_due(5)
    now[0] = 120
    assert by_time.is_due(6)
    by_time.save({files.last: STATE})
    assert not by_time.is_due(7)
    assert not never.is_due(500)


def test_the_newest_intact_state_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = RunFiles(tmp_path)
    assert load_newest_state(files) is None
    saved_states(files, 1, 2, 3, keep=3)
    found = load_newest_state(files)
    assert found is not None
    assert (found[0], found[1]["global_step"]) == (files.last, 3)
    for name in ("last_model.pth", "step_00000002.pth"):
        path = files.last.with_name(name)
        path.write_bytes(path.read_bytes()[:-700])
    found = load_newest_state(files)
    assert found is not None
    assert (found[0].name, found[1]["global_step"]) == ("step_00000001.pth", 1)
    assert "last_model.pth" in caplog.text
    files.last.unlink()
    files.earlier(1).unlink()
    with pytest.raises(ValueError, match=r"no state to resume from is intact: .*step_00000002\.pth"):
        load_newest_state(files)


def test_a_folder_is_locked_until_the_process_ends_however_it_does(tmp_path: Path) -> None:
    """The other process has a child, as one with loading processes has, which must not hold the lock."""
    code = (
        "import os, signal, sys, time; from pathlib import Path; from cliptune.training.checkpoint import RunFiles\n"
        "with RunFiles(Path(sys.argv[1])).locked():\n"
        "    if os.fork():\n"
        "        print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    files = RunFiles(tmp_path)
    partial = files.last.with_name(".last_model.pth.abc.tmp")
    partial.parent.mkdir()
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent.parent.parent, stdout=subprocess.PIPE, start_new_session=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"locked\n"
        partial.touch()
        with pytest.raises(ValueError, match=r"another run .* choose another --output_dir"), files.locked():
            pass
        assert partial.exists()
        run.kill()
        run.wait()
        try:
            with files.locked():
                assert not partial.exists()
        finally:
            os.killpg(run.pid, 9)  # the child, in a session of its own
