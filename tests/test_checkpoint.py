from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import FORMAT_VERSION, CheckpointWriter, load_checkpoint, save_checkpoint

STATE = {"model_state_dict": {"w": torch.arange(4.0)}, "architecture": {}, "probe": {}, "epoch": 1, "global_step": 2}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a" / "x.pth", STATE)
    loaded = load_checkpoint(tmp_path / "a" / "x.pth")
    assert torch.equal(loaded["model_state_dict"]["w"], STATE["model_state_dict"]["w"])  # type: ignore[index]
    assert loaded["format_version"] == FORMAT_VERSION
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.pth"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, STATE)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, STATE)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


class Clock:
    """A time that passes only in writing: 2 s a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.written: list[str] = []
        monkeypatch.setattr(checkpoint.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(checkpoint, "save_checkpoint", self.save)

    def save(self, path: Path, state: dict[str, object]) -> None:
        save_checkpoint(path, state)
        self.now += 2
        self.written.append(f"{path.name} {state['epoch']}")


def state_of(epoch: int, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, object]:
    return {**STATE, "model_state_dict": {"fixed": fixed, "moving": moving}, "epoch": epoch}


def test_states_that_come_too_fast_wait_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, writer = Clock(monkeypatch), CheckpointWriter(["fixed"])
    best, last, fixed, moving = tmp_path / "best", tmp_path / "last", torch.zeros(3), torch.zeros(3)
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
    clock, writer = Clock(monkeypatch), CheckpointWriter()
    for epoch in (1, 2):
        writer.save({tmp_path / "last": {**STATE, "epoch": epoch}})
    assert clock.written == ["last 1", "last 2"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_damaged_files_are_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, STATE)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"x\.pth"):
        load_checkpoint(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    torch.save({**STATE, "format_version": 99}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="checkpoint format 99"):
        load_checkpoint(tmp_path / "x.pth")
