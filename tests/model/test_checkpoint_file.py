"""A checkpoint on disk: whole or refused, whatever happens while it is written or to it afterwards."""

import argparse
import gzip
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clip_model import CLIPModel
from cliptune.model.checkpoint_file import (
    FORMAT_VERSION,
    SPARE_BYTES,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
)

STATE = {
    "model_state_dict": {"w": torch.arange(4.0)},
    "architecture": {},
    "self_test": {},
    "epoch": 1,
    "global_step": 2,
}
LANDED = sorted((Path(__file__).parent / "checkpoints").glob("format_*.pth.gz"))
"""One checkpoint of each format that was ever released."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "x.pth", STATE)
    return tmp_path / "x.pth"


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.pth"
    save_checkpoint(path, STATE)
    loaded = load_checkpoint(path)
    assert loaded["model_state_dict"]["w"].tolist() == [0, 1, 2, 3]
    assert loaded["format_version"] == FORMAT_VERSION
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.pth"]


def test_it_is_a_file_of_torch_save_with_the_crcs_of_its_parts(path: Path) -> None:
    for mmap in (False, True):
        assert torch.load(path, mmap=mmap)["model_state_dict"]["w"].tolist() == [0, 1, 2, 3]
    assert zipfile.ZipFile(path).testzip() is None


def test_every_format_that_was_landed_is_read(tmp_path: Path) -> None:
    assert f"format_{FORMAT_VERSION}.pth.gz" in [file.name for file in LANDED]
    for file in LANDED:
        path = tmp_path / file.stem
        path.write_bytes(gzip.decompress(file.read_bytes()))
        content = load_checkpoint(path)
        assert (content["epoch"], content["global_step"]) == (1, 1)
        model = CLIPModel.from_checkpoint(path)  # which does the self-test
        assert (model.architecture.name, model.projection_dim) == ("ViT-Tiny", 6)
        assert model.encode_text("a dog").shape == (1, 6)


@pytest.mark.parametrize(
    ("version", "way_out"), [(1, "train again"), (2, "train again"), (99, "version that wrote it")]
)
def test_other_formats_are_refused(version: int, way_out: str, tmp_path: Path) -> None:
    torch.save({**STATE, "format_version": version}, tmp_path / "x.pth")
    message = rf"x\.pth: checkpoint format {version}, this version reads 3 to {FORMAT_VERSION}; .*{way_out}"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "x.pth")


def test_files_of_others_may_be_without_crcs(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"state_dict": STATE["model_state_dict"]}, path)
    damage_first_crc(path)
    assert load_tensors(path)["state_dict"]["w"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="not a checkpoint of this toolkit"):
        load_checkpoint(path)
    save_checkpoint(path, STATE)
    damage_first_crc(path)
    with pytest.raises(ValueError, match=r"x\.pth: damaged"):
        load_checkpoint(path)


class Best(float):
    """A class of a user's own."""


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        ({"best": np.float64(1.5)}, "numpy"),
        ({"path": Path("x")}, "pathlib"),
        ({"best": Best(1)}, "test_checkpoint_file.Best"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_objects_in_a_file_are_named_with_the_way_out(content: Any, named: str, is_old: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not is_old)
    with pytest.raises(ValueError, match=rf"x\.pth: cannot be opened safely: .*{named}.* save its state dict alone"):
        load_tensors(path)


def damage_first_crc(path: Path) -> None:
    """Change a CRC in the archive's directory."""
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 16] ^= 1
    path.write_bytes(data)


def test_one_in_pytorchs_older_form_is_refused(tmp_path: Path) -> None:
    torch.save({**STATE, "format_version": FORMAT_VERSION}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"x\.pth: damaged, or written by other means"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.slow
def test_any_flipped_bit_is_seen_or_changes_nothing(path: Path) -> None:
    """Harmless are flips in padding and in fields that no reader uses, such as the time of day."""
    data, harmless = bytearray(path.read_bytes()), 0
    for i in range(len(data)):
        bit = 1 << i % 8
        data[i] ^= bit
        path.write_bytes(data)
        try:
            content = load_checkpoint(path)
        except ValueError as error:
            assert "x.pth" in str(error)
        else:
            harmless += 1
            assert content["model_state_dict"]["w"].tolist() == [0, 1, 2, 3]
            assert {**content, "model_state_dict": 0} == {
                **STATE,
                "format_version": FORMAT_VERSION,
                "model_state_dict": 0,
            }
        data[i] ^= bit
    assert harmless < 0.6 * len(data)  # most of so small a file is padding and names
    path.write_bytes(data)
    load_checkpoint(path)


@pytest.mark.slow
def test_any_missing_end_is_seen(path: Path) -> None:
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"x\.pth"):
            load_checkpoint(path)


def test_without_room_nothing_is_begun(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    monkeypatch.setattr("cliptune.runtime.files.shutil.disk_usage", lambda _: SimpleNamespace(free=SPARE_BYTES))
    with pytest.raises(OSError, match=r"no room for .*x\.pth: it needs 0\.07 GB"):
        save_checkpoint(path, {**STATE, "model_state_dict": {"w": torch.zeros(10_000)}})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["x.pth"]


def test_a_disk_that_fills_up_leaves_the_old_file(path: Path, tmp_path: Path) -> None:
    """The disk is full for real, as far as the process can tell, wherever in the file that is.

    The message is the system's. PyTorch has one of its own for about half of the places ("unexpected pos").
    """
    resource = pytest.importorskip("resource")
    big = {**STATE, "model_state_dict": {"w": torch.zeros(10_000)}}
    save_checkpoint(tmp_path / "big.pth", big)
    size = (tmp_path / "big.pth").stat().st_size
    (tmp_path / "big.pth").unlink()
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in [*range(0, size, 1111), size - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(
                OSError, match=r"x\.pth cannot be written \(File too large\); the one before is untouched"
            ):
                save_checkpoint(path, big)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_a_state_is_on_the_disk_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(os, "fsync", noted("flush", fsync))
    monkeypatch.setattr(Path, "replace", noted("rename", replace))
    save_checkpoint(path, STATE)
    assert events == ["flush", "rename", "flush"]  # the last one is the folder's
