"""A run's files and its state on disk: written atomically, verified, read without running code.

A checkpoint is one `torch.save` file that holds tensors and plain values only, so `torch.load` opens it with
`weights_only=True`. Behind it, where a reader of zip files does not look, stands the SHA-256 of all bytes before it:
`torch.load` compares no checksum, and a flipped bit would become a weight. Keys that every checkpoint has:
`format_version`, `model_state_dict`, `architecture` (what `CLIPModel` needs to be built again), `self_test` (see
`self_test.py`), `epoch`, `global_step`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import shutil
import uuid
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""2: has a checksum and a self_test."""
CHECKSUM_MARK = b"\nSHA-256\n"
CHECKSUM_BYTES = len(CHECKSUM_MARK) + hashlib.sha256().digest_size
SPARE_BYTES = 64 * 2**20
BLOCK_BYTES = 2**20


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a reader sees the old file or the whole new one, never a part.

    Raises:
        OSError: the disk has no room for it or cannot be written; the file that was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(path, state)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _HashedFile(io.FileIO(temporary, "wb")) as file:
            _write(file, {"format_version": FORMAT_VERSION, **state})
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}); the one before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: _HashedFile, state: dict[str, Any]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError:
        if file.error is not None:  # which PyTorch hides behind its own
            raise file.error from None
        raise
    file.write(CHECKSUM_MARK + file.digest.digest())


class _HashedFile(io.BufferedWriter):
    """A file to write to; keeps the digest of what is written, and the error if that fails."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file)
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _check_room(path: Path, state: dict[str, Any]) -> None:
    storages = [value.untyped_storage() for value in tree_leaves(state) if isinstance(value, torch.Tensor)]
    needed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + SPARE_BYTES
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(
            f"no room for {path}: it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free. The one before is "
            "untouched: make room and --resume, or --resume it with another --output_dir"
        )


def _flush_folder(folder: Path) -> None:
    """Bring a new name to the disk, where the system can."""
    if os.name == "posix":
        with suppress(OSError):  # some network file systems cannot
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this toolkit onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not a checkpoint of this toolkit, or of a newer format.
    """
    state = load_tensors(path)
    if not is_checkpoint(state):
        raise ValueError(f"{path}: not a checkpoint of this toolkit (weights of others go to --pretrained)")
    check_format(state, path)
    return state  # type: ignore[no-any-return]


def is_checkpoint(content: Any) -> bool:
    """Tell a checkpoint of this toolkit from other content of a `torch.save` file."""
    return isinstance(content, dict) and {"model_state_dict", "architecture"} <= content.keys()


def check_format(state: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint that this version does not read.

    Raises:
        ValueError: of another format, or something is missing.
    """
    version = state.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path}: checkpoint format {version!r}, this version reads {FORMAT_VERSION}")
    if state.get("self_test") is None:
        raise ValueError(f"{path}: damaged, or written by other means than this toolkit: it holds no self_test")


def load_tensors(path: str | Path) -> Any:
    """Read a `torch.save` file that holds tensors and plain values only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or it holds objects that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    verified = _verify(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it refuses afterwards
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message tells how to load it all the same
        raise ValueError(
            f"{path}: cannot be opened safely: it is damaged, or holds more than tensors and plain values, which could "
            "run code"
        ) from None
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot be opened safely as tensors and plain values: {reason}") from None
    if not verified and isinstance(content, dict) and content.get("format_version") == FORMAT_VERSION:
        raise ValueError(f"{path}: damaged, or not written by checkpoint.save_checkpoint: its checksum is not there")
    return content


def _verify(path: Path) -> bool:
    """Compare a file with the checksum at its end; returns whether there is one.

    Raises:
        ValueError: they differ.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = file.seek(0, os.SEEK_END) - CHECKSUM_BYTES
        file.seek(max(left, 0))
        mark, expected = file.read(len(CHECKSUM_MARK)), file.read()
        if mark != CHECKSUM_MARK:
            return False
        file.seek(0)
        while block := file.read(min(BLOCK_BYTES, left)):
            digest.update(block)
            left -= len(block)
    if digest.digest() != expected:
        raise ValueError(f"{path}: damaged: its content is not what was written, by its SHA-256")
    return True
