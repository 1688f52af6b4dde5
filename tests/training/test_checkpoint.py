import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_model import MultimodalTrainer, add_self_test
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.runtime.files import read_json_object, write_json
from cliptune.training.checkpoint import CheckpointWriter, RunFiles, load_newest_state
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.meters import StepResult
from cliptune.training.optim import build_optimizer
from cliptune.training.saver import Saver
from cliptune.training.state import RunState
from tests.helpers.models import FP32, make_batch, make_model, small_architectures

__all__ = ["small_architectures"]

STATE = {
    "model_state_dict": {"w": torch.arange(4.0)},
    "architecture": {},
    "self_test": {},
    "epoch": 1,
    "global_step": 2,
}


class Clock:
    """A time that passes only in writing: 2 s a file, as the writer completes it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.written: list[int] = []

    def __call__(self) -> float:
        return self.now

    def complete(self, state: dict[str, Any]) -> dict[str, Any]:
        self.now += 2
        self.written.append(state["epoch"])
        return state


def state_of(epoch: int, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, object]:
    return {**STATE, "model_state_dict": {"fixed": fixed, "moving": moving}, "epoch": epoch}


def test_states_that_come_too_fast_wait_as_they_were(tmp_path: Path) -> None:
    clock, files, fixed, moving = Clock(), RunFiles(tmp_path), torch.zeros(3), torch.zeros(3)
    writer = CheckpointWriter(files, fixed=["fixed"], complete=clock.complete, clock=clock)
    best, last = files.best, files.last
    writer.save({best: state_of(0, fixed, moving), last: state_of(0, fixed, moving)})
    assert clock.written == [0, 0]
    for epoch in (1, 2, 3):  # the writing ended at 104 and took 4 s: nothing is due before 184
        moving += 1
        clock.now += 20
        improved = {best: state_of(epoch, fixed, moving)} if epoch < 3 else {}
        writer.save({**improved, last: state_of(epoch, fixed, moving)})
    assert clock.written[2:] == []
    fixed += 1  # which it never is: a copy would not show it
    moving += 1
    clock.now += 20
    writer.save({last: state_of(4, fixed, moving)})
    assert clock.written[2:] == [2, 4]  # the best, then the last
    assert load_checkpoint(best)["model_state_dict"]["moving"].tolist() == [2, 2, 2]
    assert load_checkpoint(best)["model_state_dict"]["fixed"].tolist() == [1, 1, 1]
    assert load_checkpoint(last)["model_state_dict"]["moving"].tolist() == [4, 4, 4]
    moving += 1
    writer.save({last: state_of(5, fixed, moving)})
    moving += 1
    assert load_checkpoint(last)["epoch"] == 4
    writer.flush()
    assert load_checkpoint(last)["model_state_dict"]["moving"].tolist() == [5, 5, 5]
    writer.flush()
    assert clock.written[4:] == [5]


def test_without_fixed_tensors_every_state_is_written_at_once(tmp_path: Path) -> None:
    clock, files = Clock(), RunFiles(tmp_path)
    writer = CheckpointWriter(files, complete=clock.complete, clock=clock)
    for epoch in (1, 2):
        writer.save({files.last: {**STATE, "epoch": epoch}})
    assert clock.written == [1, 2]


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


def trainer_of() -> MultimodalTrainer:
    model = make_model("ViT-Mini")
    optimizer = build_optimizer(model, learning_rate=1e-3, backbone_lr_scale=1.0, weight_decay=0.1)
    return MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=FP32)


def test_a_state_is_due_by_steps_or_by_time(tmp_path: Path) -> None:
    clock, trainer, files = Clock(), trainer_of(), RunFiles(tmp_path)
    by_steps = Saver(files, trainer, about={}, clock=clock, every_steps=5)
    by_time = Saver(files, trainer, about={}, clock=clock, every_seconds=120)
    never = Saver(files, trainer, about={}, clock=clock)
    assert [by_steps.is_due(step) for step in (4, 5, 6, 10)] == [False, True, False, True]
    clock.now += 119
    assert not by_time.is_due(5)
    clock.now += 1
    assert by_time.is_due(6)
    by_time.save(RunState(history=[{}]))
    assert not by_time.is_due(7)
    assert not never.is_due(500)


def test_a_run_goes_on_as_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    files, trainer = RunFiles(tmp_path), trainer_of()
    batch = make_batch(trainer.model, 8)
    state = RunState(history=[{"epoch": 0}])
    state.begin_epoch(trainer.model.device)
    for step in trainer.steps([batch, batch]):
        state.add(step)
    Saver(files, trainer, about={"config": {}}, complete=add_self_test).save(state)
    content = load_checkpoint(files.last)
    other = trainer_of()
    other.model.load_state_dict(content["model_state_dict"])
    restored = Saver(files, other, about={}).restore(files.last, content)
    assert not content  # neither held twice
    assert restored.state_dict() == state.state_dict()
    assert (restored.epoch, restored.step, restored.num_batches) == (1, 2, 2)
    for each in (trainer, other):
        each.train_step(*batch)
    weights = zip(trainer.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in weights)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    trainer = trainer_of()
    saver = Saver(RunFiles(tmp_path), trainer, about={})
    bad = StepResult(1, 4, {}, torch.tensor([torch.nan, 0.0, torch.nan, 14.0]))
    with pytest.raises(FloatingPointError, match="step 1 has a loss of nan"):
        trainer.watch.add(bad, None)
    trainer.watch._pending.append((bad, None, 0.0))  # of a GPU, which is not waited for
    with pytest.raises(FloatingPointError, match="step 1 has a loss of nan"):
        saver.save(RunState(history=[{}]))
    assert not list(tmp_path.iterdir())


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


@pytest.mark.slow
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
    partial = files.last.with_name(f".last_model.pth.{'0a' * 16}.cliptune.tmp")
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
            mine = files.last.with_name(".foo.tmp")
            mine.touch()
            with files.locked():
                assert not partial.exists()
                assert mine.exists()
        finally:
            os.killpg(run.pid, 9)  # the child, in a session of its own


def earlier_run(files: RunFiles, started_at: object = "2026-01-31T12:00:00") -> list[Path]:
    """Leave a file of each folder, with its path as content; the results file says when the run began."""
    paths = [files.best, files.last, files.interpolated, files.history, files.events / "events.1", files.results]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path.relative_to(files.root)))
    write_json(files.results, {"started_at": started_at})
    return paths


def assert_set_aside(files: RunFiles, paths: list[Path], folder: Path | None) -> None:
    assert folder is not None
    assert folder.parent == files.root / "previous"
    for path in paths:
        name = path.relative_to(files.root)
        assert not path.exists()
        assert (folder / name).read_text() == str(name) or path == files.results
    assert read_json_object(folder / "results/training_results.json")


@pytest.mark.parametrize(
    "started_at",
    ["/tmp/elsewhere", "../../elsewhere", "..", "", "x" * 1000, "2026-01-31T12:00:00/../../../x", None, 7, [], "a\nb"],
)
def test_nothing_leaves_the_output_folder(started_at: object, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "a" / "out")
    paths = earlier_run(files, started_at)
    for path in (*paths, files.events):
        os.utime(path, (1.8e9,) * 2)
    folder = files.set_aside_earlier_run()
    assert_set_aside(files, paths, folder)
    assert folder is not None
    assert folder.name.startswith("2027-01-")  # the files' time
    assert [path.name for path in tmp_path.rglob("*") if path.parent in {tmp_path, tmp_path / "a"}] == ["a", "out"]


@pytest.mark.parametrize("seconds", [-1e10, 1e11])
def test_files_of_any_time_are_set_aside(seconds: float, tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    paths = earlier_run(files, "soon")
    for path in (*paths, files.events):
        os.utime(path, (seconds,) * 2)
    assert_set_aside(files, paths, files.set_aside_earlier_run())


def test_what_is_set_aside_is_said_with_its_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    files = RunFiles(tmp_path)
    assert files.set_aside_earlier_run() is None
    for index, size in enumerate((1_000_000, 2_500_000)):
        earlier_run(files, f"2026-01-31T12:00:0{index}")
        files.best.write_bytes(bytes(size))
        files.last.unlink()
        files.last.hardlink_to(files.best)
        files.set_aside_earlier_run()
    first, second = [record.getMessage() for record in caplog.records]
    assert first.endswith("previous/2026-01-31T12-00-00 (1.0 MB)")
    assert second.endswith(f"previous/2026-01-31T12-00-01 (2.5 MB); {tmp_path}/previous holds 3.5 MB in all")


@pytest.mark.parametrize("names", [["model-checkpoint"], ["model-checkpoint", "results", "logs"], ["previous"]])
@pytest.mark.parametrize("other_disk", [False, True])
def test_folders_may_be_links(other_disk: bool, names: list[str], tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if other_disk and (not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev):
        pytest.skip("there is no other disk")
    with tempfile.TemporaryDirectory(dir=shm if other_disk else tmp_path) as elsewhere:
        files = RunFiles(tmp_path / "out")
        files.root.mkdir()
        for name in names:
            (Path(elsewhere) / name).mkdir()
            (files.root / name).symlink_to(Path(elsewhere) / name)
        folders = set()
        for _ in range(3):  # three runs that began in the same second
            with files.locked():
                paths = earlier_run(files)
                folder = files.set_aside_earlier_run()
                assert_set_aside(files, paths, folder)
                folders.add(folder)
        assert len(folders) == 3
        assert all((files.root / name).is_symlink() for name in names)


def test_a_run_that_is_killed_while_files_are_set_aside_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, rename, calls = RunFiles(tmp_path), Path.rename, []
    paths = earlier_run(files)

    def killed(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        files.set_aside_earlier_run()
    assert_set_aside(files, paths, files.set_aside_earlier_run())


def test_a_link_to_a_disk_that_is_not_there_is_told(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "out")
    files.root.mkdir()
    files.last.parent.symlink_to("/mnt/not/there")
    with pytest.raises(FileNotFoundError, match=r"model-checkpoint is a link to /mnt/not/there"), files.locked():
        pass
