from pathlib import Path

import pytest
import torch

from checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint

STATE = {"model_state_dict": {"w": torch.arange(4.0)}, "architecture": {}, "epoch": 1, "global_step": 2}


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
