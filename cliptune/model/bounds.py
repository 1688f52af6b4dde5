"""How much memory a weights file may take: no more than the bytes that it has on the disk, known before it is read.

A few bytes can stand for any amount of memory: a compressed zip entry, a pickle that makes lists of lists, a tensor
larger than its storage (which PyTorch then enlarges) or one that tells a number many times over.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickletools import genops
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 2**28
"""Of the part of a file that describes its tensors: a few hundred bytes each."""
MAX_PICKLE_BYTES_OF_OTHERS = 2**24
"""Of files that are no checkpoints of this toolkit, whose description tells of tensors alone."""
MIN_PICKLE_BYTES = 2**25
"""Always allowed; above it, the description may be as large as the tensors are."""
MIN_VALUES, MAX_VALUES = 100_000, 10_000_000
"""In a file, tensors and plain values together: as many as it has bytes, within these limits."""
SPARSE_BYTES = 2**30
"""A file of more, of which less than a tenth is on the disk, is refused: the rest of it would be read as zeros."""

_ZIP_HEAD = b"PK\x03\x04"  # by which PyTorch tells the two forms of its files
_PICKLES_OF_OLD_FORM = 5
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}


def check_size_on_disk(path: Path) -> None:
    """Refuse a file most of which is holes: 40 GB of zeros take a few kB on the disk.

    Raises:
        ValueError: it is such a file.
    """
    status = path.stat()
    on_disk = getattr(status, "st_blocks", status.st_size) * 512  # Windows does not tell
    if status.st_size > SPARSE_BYTES and on_disk * 10 < status.st_size:
        raise ValueError(
            f"{path}: a sparse file: of its {status.st_size / 1e9:.1f} GB {on_disk / 1e9:.1f} GB are on the disk"
        )


def check_torch_file(path: Path) -> None:
    """Look at a file of `torch.save` or `torch.jit.save` before it is read.

    Raises:
        ValueError: compressed parts, parts larger than the file, or a description larger than its tensors need.
        zipfile.BadZipFile: damaged.
    """
    with path.open("rb") as file:
        if file.read(4) != _ZIP_HEAD:
            file.seek(0)
            _check_old_form(file, path.stat().st_size)
            return
    with zipfile.ZipFile(path) as archive:
        check_archive(archive, path.stat().st_size)


def check_archive(archive: zipfile.ZipFile, num_bytes: int) -> None:
    """Look at an archive's directory; the program in `code/`, which alone PyTorch compresses, is never read.

    Args:
        archive: of `torch.save` or `torch.jit.save`.
        num_bytes: of its file.

    Raises:
        ValueError: its parts are compressed, or together larger than the file.
    """
    read = [entry for entry in archive.infolist() if "code" not in entry.filename.split("/")[1:2]]
    for entry in read:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(
                f"compressed tensors: {entry.filename[:100]!r}, {entry.compress_size:,} bytes, would become "
                f"{entry.file_size:,}; PyTorch compresses nothing: save the file again with torch.save"
            )
    total = sum(entry.file_size for entry in read)
    if total > num_bytes:
        raise ValueError(f"its parts have {total:,} bytes together, the file has {num_bytes:,}")
    of_pickles = sum(entry.file_size for entry in read if entry.filename.endswith(".pkl"))
    _check_pickle_size(of_pickles, min(MAX_PICKLE_BYTES, max(MIN_PICKLE_BYTES, total - of_pickles)))


def check_pickle(data: bytes) -> None:
    """Refuse a pickle of which a few bytes make the unpickler reserve any amount of memory.

    Raises:
        ValueError: it is one, or damaged.
    """
    _check_pickle_size(len(data), MAX_PICKLE_BYTES_OF_OTHERS)
    # the memo is an array: LONG_BINPUT 4294967295 alone would make it 64 GB
    if any(opcode.name in _MEMO and int(index or 0) > len(data) for opcode, index, _ in genops(data)):
        raise ValueError("a pickle with a memo larger than itself")


def check_tensors(content: Any, num_bytes: int) -> None:
    """Look at what was read: its tensors must have been in the file, number by number.

    Args:
        content: tensors and plain values, nested in any way.
        num_bytes: of the file.

    Raises:
        ValueError: a tensor that is not in memory as plain numbers or holds more numbers than are stored; storages of
            more bytes than the file; or more values than any checkpoint has.
    """
    storages: dict[int, int] = {}
    total = num_seen = 0
    waiting, limit = [content], min(max(num_bytes, MIN_VALUES), MAX_VALUES)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            storage = _storage_of(value)
            storages[storage.data_ptr()] = storage.nbytes()
            total += value.numel() * value.element_size()
            continue
        children = _children(value)
        # lists of the same list, ten times, twelve levels deep, are 10^12 values
        num_seen += len(children)
        if num_seen > limit:
            raise ValueError(f"more than {limit:,} values")
        waiting.extend(children)
    # a storage is enlarged where a tensor claims more; shared tensors may count twice
    if sum(storages.values()) > num_bytes or total > 2 * num_bytes:
        raise ValueError("tensors of more numbers than are stored")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set | frozenset) else []


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        raise ValueError("a tensor that is sparse, quantised, nested or without numbers")
    storage = tensor.untyped_storage()
    if tensor.numel() * tensor.element_size() > storage.nbytes():
        raise ValueError("a tensor of more numbers than are stored")
    return storage


def _check_pickle_size(num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise ValueError(f"the description of its tensors has {num_bytes:,} bytes, at most {limit:,} are read")


def _check_old_form(file: BinaryIO, num_bytes: int) -> None:
    """Measure the pickles that a file of PyTorch's older form begins with; numbers follow."""
    limit = min(max(num_bytes // 2, 2**20), MAX_PICKLE_BYTES_OF_OTHERS)
    for _ in range(_PICKLES_OF_OLD_FORM):
        for _ in genops(file):
            _check_pickle_size(file.tell(), limit)
