"""A checkpoint on disk: written atomically, verified, read without running code.

It is one `torch.save` file that holds tensors and plain values only, so `torch.load` opens it with `weights_only=True`.
Such a file is a zip archive with a CRC of each part, which `torch.load` does not compare: a flipped bit would become a
weight. So they are compared here. Keys that every checkpoint has: `format_version`, `model_state_dict`, `architecture`
(what `CLIPModel` needs to be built again), `self_test` (see `self_test.py`), `epoch`, `global_step`.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_leaves

from cliptune.model.bounds import check_size_on_disk, check_tensors, check_torch_file
from cliptune.model.checkpoint_fields import check_fields
from cliptune.runtime.files import atomic_writer, require_free_space
from cliptune.runtime.messages import first_few, shown

FORMAT_VERSION, OLDEST_READ = 4, 3
"""3: verified by the CRCs of its zip archive; 4: what no tensor shows is JSON in the state dict, not the activation's
bit. Files of 1 and 2 were never released; each later one must be readable."""
BEST_NAME = "best_model.pth"
SPARE_BYTES = 64 * 2**20
"""Room to leave on the disk beside the tensors."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a reader sees the old file or the whole new one, never a part.

    Raises:
        OSError: the disk has no room for it or cannot be written; the file that was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(
        path.parent,
        _num_bytes(state) + SPARE_BYTES,
        what=str(path),
        way_out="The one before is untouched: make room and --resume, or --resume it with another --output_dir",
    )
    try:
        with atomic_writer(path) as file:
            _write(file, {"format_version": FORMAT_VERSION, **state})
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}); the one before is untouched") from error


def load_checkpoint(path: str | Path, *, needs: Collection[str] = ()) -> dict[str, Any]:
    """Read a checkpoint of this toolkit onto the CPU.

    Args:
        path: of the file, or of a run's folder, whose best model is read.
        needs: keys that it must have beside those that every checkpoint has, such as `checkpoint_fields.CONFIG_KEYS`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not a checkpoint of this toolkit, of a format that this version does not read, or its keys
            are missing or of another type.
    """
    path = checkpoint_in(path)
    state = load_tensors(path)
    if not is_checkpoint(state):
        raise ValueError(
            f"{path}: not a checkpoint of this toolkit (weights alone and those of others go to --pretrained)"
        )
    check_fields(state, path, needs=needs)
    return state  # type: ignore[no-any-return]


def checkpoint_in(path: str | Path) -> Path:
    """Return the best model of a run's folder, or of its model-checkpoint folder; any other path as it is."""
    path = Path(path)
    found = (path / "model-checkpoint" / BEST_NAME, path / BEST_NAME)
    return next((file for file in found if file.is_file()), path)


def load_tensors(path: str | Path) -> Any:
    """Read a `torch.save` file that holds tensors and plain values only; a checkpoint of this toolkit is verified.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, it holds objects that could run code, or it is a checkpoint of this toolkit of a format
            that this version does not read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    check_size_on_disk(path)
    try:
        check_torch_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it refuses afterwards
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(content, path.stat().st_size)
    except pickle.UnpicklingError as error:  # whose message tells how to load it all the same
        objects = [shown(name) for name in _objects_in(path, error)]
        reason = "it is damaged, or holds more than tensors and plain values, which could run code"
        if objects:
            reason = (
                f"beside tensors it holds objects of {first_few(objects)}, which could run code: if you trust it, open "
                "it where it was made, and save its state dict alone with torch.save"
            )
        raise ValueError(f"{path}: cannot be opened safely: {reason}") from None
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot be opened safely as tensors and plain values: {reason}") from None
    if is_checkpoint(content):
        _check_format(content, path)
        _verify(path)
    return content


def read_value(path: Path, key: str, default: Any) -> Any:
    """Return one plain value of a checkpoint, whose tensors are not read; None if the file cannot be read."""
    try:
        check_torch_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(key, default)
    except Exception:  # damaged files fail in many ways
        return None


def holds_checkpoint(path: Path) -> bool:
    """Tell whether a file is a checkpoint of this toolkit, whose tensors are not read; False if it cannot be read."""
    try:
        check_torch_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return is_checkpoint(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception:  # damaged files, and those of others, fail in many ways
        return False


def _objects_in(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """Name the classes in a file that were refused; none of them is imported."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # PyTorch's older form, or damaged: there the message names the first
        return re.findall(r"GLOBAL (\S+) was not an allowed", str(error))


def is_checkpoint(content: Any) -> bool:
    """Tell a checkpoint of this toolkit from other content of a `torch.save` file."""
    return isinstance(content, dict) and {"model_state_dict", "architecture"} <= content.keys()


def _check_format(state: dict[str, Any], path: Path) -> None:
    version = state.get("format_version")
    if type(version) is not int or not OLDEST_READ <= version <= FORMAT_VERSION:
        older = type(version) is int and version < OLDEST_READ
        way_out = "such files cannot be read any more: train again" if older else "try the version that wrote it"
        raise ValueError(
            f"{path}: checkpoint format {version!r}, this version reads {OLDEST_READ} to {FORMAT_VERSION}; {way_out}"
        )
    if state.get("self_test") is None:
        raise ValueError(f"{path}: damaged, or written by other means than this toolkit: it holds no self_test")


def _verify(path: Path) -> None:
    """Compare a checkpoint with the CRCs in it. Files of others are not asked: they may be written without.

    Raises:
        ValueError: they differ, or there are none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # PyTorch's older form is no zip archive; damaged ones fail in many ways
        raise ValueError(f"{path}: damaged, or written by other means than this toolkit: {error}") from None
    if damaged is not None:
        raise ValueError(f"{path}: damaged: {damaged} in it is not what was written, by its CRC")


def _num_bytes(state: dict[str, Any]) -> int:
    storages = [value.untyped_storage() for value in tree_leaves(state) if isinstance(value, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _ErrorKeeper:
    """What `torch.save` writes to: PyTorch hides the error of a failed write behind one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(file: BinaryIO, state: dict[str, Any]) -> None:
    keeper = _ErrorKeeper(file)
    try:
        torch.save(state, keeper)  # type: ignore[arg-type]
    except RuntimeError:
        if keeper.error is not None:
            raise keeper.error from None
        raise
