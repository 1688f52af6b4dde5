"""TorchScript archives, as OpenAI publishes weights, read as plain tensors without running their code."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliptune.model.bounds import check_archive, check_pickle, check_size_on_disk, check_tensors

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Tell a TorchScript archive from other files by its content."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[1:2] == ["constants.pkl"] for name in archive.namelist())
    except Exception:  # no zip file, or one damaged in one of many ways
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a TorchScript archive, by its dotted attribute path, without running its code.

    Such an archive is a zip file: `data.pkl` describes a tree of objects whose attributes are tensors, `data/<key>`
    holds the bytes of each tensor's storage, `code/` the program. Only the first two are read, and the pickle may name
    nothing but tensor rebuilding; its `__torch__` classes become plain containers.

    Raises:
        ValueError: damaged, its description names something other than tensors and containers, or it would take more
            memory than its file has bytes.
    """
    check_size_on_disk(path)
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = path.stat().st_size
            check_archive(archive, num_bytes)
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))[: -len("data.pkl")]
            description = archive.read(f"{root}data.pkl")
            check_pickle(description)
            tree = _TensorUnpickler(description, archive, root).load()
            views = dict(_tensors_of(tree))
        check_tensors(views, num_bytes)
        tensors = {name: view.clone() for name, view in views.items()}
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{path}: damaged or unsafe TorchScript archive: {error or type(error).__name__}") from None
    return tensors


class _Container:
    """Stands for an object of the archived program; has its attributes and none of its behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.attributes: dict[str, Any] = state if isinstance(state, dict) else {}


class _Storage:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError("a tensor without storage")
    # a view may tell one number many times over (stride 0): nobody's weights do, and a copy would make them all
    if math.prod(size) > len(storage):
        raise pickle.UnpicklingError("a tensor of more numbers than are stored")
    return storage.as_strided(size, stride, offset)


def _keep_first(value: Any, *_: Any) -> Any:
    return value


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, description: bytes, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(BytesIO(description))
        self.archive = archive
        self.root = root
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        # all that a pickle can run are the things it names here; whatever is not known is refused
        if module.startswith("__torch__"):
            return _Container
        if module == "torch" and name in _DTYPES:
            return _Storage(_DTYPES[name])
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): _keep_first,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch.jit._pickle":
            return _keep_first
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        # ("storage", its class, its file's name below data/, the device it was on, its length)
        kind, storage, key, _, numel = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        if (key, storage.dtype) not in self.storages:  # which many tensors may share
            data = bytearray(self.archive.read(f"{self.root}data/{key}"))
            self.storages[key, storage.dtype] = (
                torch.frombuffer(data, dtype=storage.dtype, count=numel)
                if numel
                else torch.empty(0, dtype=storage.dtype)
            )
        return self.storages[key, storage.dtype]


def _tensors_of(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor with its path; an object that stands in many places counts where it is met first."""
    waiting, seen = [("", tree)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, _Container) and id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{name}.{key}" if name else str(key), child) for key, child in value.attributes.items()]
