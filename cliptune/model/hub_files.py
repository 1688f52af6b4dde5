"""Weights files as hubs publish them: found in a folder, read as tensors without running code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from cliptune.model.bounds import check_size_on_disk
from cliptune.model.checkpoint_file import load_tensors
from cliptune.runtime.files import read_json_object
from cliptune.runtime.messages import first_few, shown

_NAMES = (
    # open_clip's first: beside it timm keeps a model.safetensors of the image tower alone
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_VARIANTS = (
    "open_clip_model.*.safetensors", "open_clip_pytorch_model.*.bin", "model.*.safetensors",
    "model.safetensors.index.*.json", "pytorch_model.*.bin", "pytorch_model.bin.index.*.json",
)  # fmt: skip
"""Such as `fp16`, for folders that have nothing else."""
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\..+)")
MAX_JSON_BYTES = 2**24


def weights_files(folder: Path) -> list[Path]:
    """List the weights files of a folder, the one that is meant first; of those with other names the only one.

    Raises:
        FileNotFoundError: there is none, or there are several with names of their own.
    """
    found = [folder / name for name in _NAMES if (folder / name).is_file()]
    shards = {path.name for path in folder.glob("*-of-*") if _SHARD.fullmatch(path.name)}
    found = found or [path for pattern in _VARIANTS for path in sorted(folder.glob(pattern)) if path.name not in shards]
    inner = _sentence_transformers_folder(folder)
    if not found and inner is not None:
        return weights_files(inner)
    others = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if not found and len(others) == 1:
        found = others
    if not found:
        folders = sorted({path.parent for name in _NAMES for path in folder.glob(f"*/{name}")})
        candidates = others or folders or sorted(path for path in folder.glob("*/*") if path.suffix in _SUFFIXES)
        hint = f"; name one of {first_few([shown(path) for path in candidates])}" if candidates else ""
        raise FileNotFoundError(f"{folder}: no weights file in this folder; looked for {', '.join(_NAMES)}{hint}")
    return found


def whole_file(path: Path) -> Path:
    """Return the index of a shard, which alone is no model; of any other file itself."""
    shard = _SHARD.fullmatch(path.name)
    index = path if shard is None else path.with_name(f"{shard[1]}{shard[2]}.index.json")
    return index if index.is_file() else path


def read_hub_file(path: Path) -> Any:
    """Read tensors from a safetensors or `torch.save` file, or from all shards that an index lists.

    Raises:
        FileNotFoundError: a shard is not there.
        ValueError: damaged, or more than tensors and plain values.
    """
    if path.suffix == ".json":
        return _read_shards(path)
    return _read_safetensors(path) if _is_safetensors(path) else load_tensors(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file; empty where there is none, or it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _sentence_transformers_folder(folder: Path) -> Path | None:
    """Return the folder of the CLIP in a folder of sentence-transformers', which lists its modules in a file."""
    inner = folder / "0_CLIPModel"
    return inner if (folder / "modules.json").is_file() and inner.is_dir() else None


def _read_shards(index: Path) -> dict[str, Tensor]:
    if (size := index.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{index}: not an index of shards: it has {size / 1e6:,.0f} MB")
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index}: not an index of shards: it has no weight_map")
    listed = list(names.values())
    if not listed or any(not isinstance(name, str) or Path(name).name != name for name in listed):
        raise ValueError(f"{index}: not an index of shards: its weight_map lists no files of its folder")
    tensors: dict[str, Tensor] = {}
    files = sorted(set(listed))
    for name in files:
        path = index.with_name(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there, but {index.name} lists it: download all {len(files)} of them")
        content = _read_safetensors(path) if _is_safetensors(path) else load_tensors(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: holds no tensors by name")
        tensors |= content
    return tensors


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file  # noqa: PLC0415  (only where such a file is read)

    check_size_on_disk(path)
    try:
        # copies: what was read is a view of the file, which may change
        tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{path}: damaged safetensors file: {error}") from None
    return tensors
