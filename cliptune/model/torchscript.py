"""TorchScript archives, as OpenAI publishes weights, read as plain tensors without running their code."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        ValueError: damaged, or its description names something other than tensors and containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))[: -len("data.pkl")]
            with archive.open(f"{root}data.pkl") as file:
                tree = _TensorUnpickler(file, archive, root).load()
                tensors = dict(_tensors_of(tree, ""))
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
    # a view may tell one number many times over (stride 0): nobody's weights do, and `clone` would make them all
    if math.prod(size) > len(storage):
        raise pickle.UnpicklingError("a tensor of more numbers than are stored")
    return storage.as_strided(size, stride, offset).clone()


def _keep_first(value: Any, *_: Any) -> Any:
    return value


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self.archive = archive
        self.root = root

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
        entry = self.archive.getinfo(f"{self.root}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:  # as PyTorch writes it; a few bytes cannot unfold into any number
            raise pickle.UnpicklingError("compressed tensors")
        data = bytearray(self.archive.read(entry))
        return (
            torch.frombuffer(data, dtype=storage.dtype, count=numel) if numel else torch.empty(0, dtype=storage.dtype)
        )


def _tensors_of(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    attributes = value.attributes if isinstance(value, _Container) else {}
    for key, child in attributes.items():
        yield from _tensors_of(child, f"{name}.{key}" if name else str(key))
