"""Where a run computes: device, precision, memory, number of workers."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)


class Precision(NamedTuple):
    """How a forward pass computes: the autocast dtype (None: plain float32) and whether losses are scaled."""

    name: str
    dtype: torch.dtype | None
    scaled: bool


_PRECISIONS = {
    "fp32": Precision("fp32", None, scaled=False),
    "bf16": Precision("bf16", torch.bfloat16, scaled=False),
    "fp16": Precision("fp16", torch.float16, scaled=True),
}


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that is there.

    Raises:
        ValueError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: no such device: {name}; known: auto, cpu, cuda, cuda:1, mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        sees = "no CUDA device" if found == 0 else count(found, "CUDA device")
        raise ValueError(f"--device {name}: PyTorch sees {sees}; try --device cpu or --device auto")
    if device.type == "mps" and not _has_mps():
        raise ValueError("--device mps: not available here; try --device cpu or --device auto")
    if device.type not in {"cpu", "cuda", "mps"}:
        raise ValueError(f"--device: {name} is not supported; known: auto, cpu, cuda, cuda:1, mps")
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Turn `auto` into the fastest precision that the device has in hardware; check the others.

    Raises:
        ValueError: float16 on a device that cannot train with it.
    """
    if name == "auto":
        if device.type == "cuda":
            # of this device, which need not be the current one; `is_bf16_supported` tells of that
            has_bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
            return _PRECISIONS["bf16" if has_bf16 else "fp16"]
        return _PRECISIONS["bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"]
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"--precision fp16 needs a CUDA device, not {device.type}; try bf16 or fp32")
    return _PRECISIONS[name]


_WITHOUT_FLOAT64 = {"mps"}


def widest_float(device: torch.device) -> torch.dtype:
    """Return the type in which long sums are added up on a device: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


PINNED_BYTES = 2**24
"""Up to which a tensor is put into pinned memory on its way to a CUDA device; larger ones are there, or move seldom."""


def to_device(values: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Bring a tensor to a device; to a CUDA device while the CPU goes on.

    From memory that is not pinned a copy of more than 64 KB would wait for all that the device has to do before. To
    Apple's GPUs, too, PyTorch would copy later, but from memory that may hold something else by then (pytorch/pytorch
    issue 189690).
    """
    if device.type != "cuda":
        return values.to(device, dtype)
    if values.device.type == "cpu" and values.nbytes <= PINNED_BYTES and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, dtype, non_blocking=True)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Run the enclosed forward pass in `precision`; parameters stay float32."""
    if precision.dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision.dtype)


def without_autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Run what is enclosed as it would run outside of `autocast`, whose copies of the weights stay for the rest."""
    return nullcontext() if precision.dtype is None else torch.autocast(device.type, enabled=False)


def compiler_issue(device: torch.device) -> str | None:
    """Say why `torch.compile` does not work here (it needs a C++ compiler, or Triton on a GPU); None: it does."""
    # imported with the compiler, it warns of a CUDA without a GPU; for another device that is nothing to tell
    extensions = logging.getLogger("torch.utils.cpp_extension")
    level = extensions.level
    if device.type != "cuda":
        extensions.setLevel(logging.ERROR)
    try:
        x = torch.ones(2, device=device, requires_grad=True)
        with torch.enable_grad():
            torch.compile(_double)(x).sum().backward()
    except Exception as error:  # compilers fail in many ways
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    finally:
        extensions.setLevel(level)
    return None


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


CUDNN = "cudnn.conv"
"""It rounds to TF32 unless somebody says otherwise."""
ASKED_FOR, NOT_SAID = "ieee", "none"
EXACT = frozenset({ASKED_FOR, NOT_SAID})
"""What the newer API calls full float32: where somebody has asked for it, and where nobody has said anything."""


def product_precision() -> str:
    """Return what float32 products may be computed in: `highest`, unless somebody has allowed less by either API."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # it refuses to say, since the newer API was used
        older = "mixed"
    if older in {"high", "medium"}:
        return older
    said = {name: part.fp32_precision for name, part in _parts().items() if name != CUDNN}
    return ", ".join(f"{name} {value}" for name, value in said.items() if value not in EXACT) or older


def _parts() -> dict[str, Any]:
    """Return what has a precision of its own in PyTorch's newer API; empty for a version without it."""
    parts = {}
    for name in ("cuda.matmul", CUDNN, "mkldnn.matmul", "mkldnn.conv"):
        backend, operation = name.split(".")
        part = getattr(getattr(torch.backends, backend), operation, None)
        if hasattr(part, "fp32_precision"):
            parts[name] = part
    return parts


def _older_settings() -> tuple[str, bool] | None:
    """Return what the older API says of products and of cuDNN; None: it refuses, since the newer one was used."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def wants_exact_products() -> bool:
    """Tell whether somebody has asked for products in full float32 on a GPU: for `ieee`, or for `highest`.

    A PyTorch without the newer API (before 2.9) does not tell that from its default; then nobody has.
    """
    products = _parts().get("cuda.matmul")
    return products is not None and products.fp32_precision == ASKED_FOR


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Let float32 products on an NVIDIA GPU round their factors to TF32, of 10 bits, which is several times as fast.

    Not where somebody has asked for full float32, as far as `wants_exact_products` can tell.
    """
    if device.type != "cuda" or product_precision() != "highest" or wants_exact_products():
        yield  # there is nothing to allow, or somebody has: of the two ways to say it only one may be used
        return
    products = _parts().get("cuda.matmul")
    before = None if products is None else products.fp32_precision
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        if products is not None:
            products.fp32_precision = before  # the older API has made it `ieee`, as if somebody had asked for it


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply in full float32, whatever was allowed for training, or by whoever calls (TF32 and the like)."""
    older, parts = _older_settings(), _parts()
    before = {name: part.fp32_precision for name, part in parts.items()}
    if older is not None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    # what the older API did not reach; of the rest the newer one would contradict it
    parts = {name: part for name, part in parts.items() if part.fp32_precision not in EXACT}
    for part in parts.values():
        part.fp32_precision = ASKED_FOR
    try:
        yield
    finally:
        for name, part in parts.items():
            part.fp32_precision = NOT_SAID  # as its backend's, which it may have been before
            if part.fp32_precision != before[name]:
                part.fp32_precision = before[name]
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            torch.backends.cudnn.allow_tf32 = older[1]
        for name, part in _parts().items():
            if before[name] == NOT_SAID != part.fp32_precision:  # by the older API, as in `tf32`
                part.fp32_precision = NOT_SAID


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory held so far, in GB (10^9 bytes): `process`, and `gpu` on a CUDA device.

    The process's is its resident memory, without that of workers; it is not known on Windows.
    """
    peak: dict[str, float] = {}
    if sys.platform != "win32":
        import resource  # noqa: PLC0415  (not on Windows)

        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_reserved(device) / 1e9
    return peak


FULL_MEMORY = (
    "can't allocate memory",  # the CPU
    "CUDA out of memory",  # the allocator's, as a compiler tells it in an error of its own
    "CUDA error: out of memory", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",  # beside the allocator
    "MPS backend out of memory",
)  # fmt: skip
"""What PyTorch says of memory that is full where it has no exception of its own for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device or the main memory is full."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in FULL_MEMORY)
    )


def release_memory(device: torch.device) -> None:
    """Give back what PyTorch's allocator keeps of freed tensors on a GPU, which may be in pieces of the wrong sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Return how many bytes a device, or for `cpu` the machine or its control group, has free for this process."""
    if device.type == "cuda":
        # PyTorch keeps freed memory: taken, as the driver sees it, and free for us
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil  # noqa: PLC0415  (reads /proc when it is imported)

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:  # in a container the limit is the group's; pages of files that it has read are given back when needed
        limit = int((group / "memory.max").read_text())
        reclaimable = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, limit - int((group / "memory.current").read_text()) + int(reclaimable))
    except (OSError, ValueError, KeyError):  # no control group, or one without a limit
        pass
    return free // local_world_size()


def local_world_size() -> int:
    """Return how many ranks of a run share this machine, as `torchrun` says.

    Raises:
        ValueError: the variable is no such number.
    """
    return number_of_torchrun("LOCAL_WORLD_SIZE", least=1, default="1")


def number_of_torchrun(variable: str, *, least: int = 0, below: int = 2**31, default: str = "") -> int:
    """Read a variable of the environment that `torchrun` sets.

    Raises:
        ValueError: it is no such number; names it.
    """
    text = os.environ.get(variable, default)
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else -1
    if not least <= number < below:
        raise ValueError(
            f"the environment variable {variable} is {text[:50]!r}, not a number from {least} to {below - 1}; unset it "
            "or start the ranks with torchrun"
        )
    return number


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors of up to 32 MiB for the next step; without glibc nothing happens.

    Each step allocates the same tensors. Handed back in between, the system has to clear their pages every time.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold = -1, -3  # mallopt(3)
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1)


def default_num_workers(device: torch.device) -> int:
    """Choose the number of workers of a rank: on a GPU machine all cores but one, beside CPU training few or none.

    There every core computes, and a worker loads images many times as fast as a ViT-B/32 trains on them: with none at
    all, a step on two cores waits for about a hundredth of its time.
    """
    cores = num_cores()
    if device.type != "cuda":
        return min(4, cores // 4)
    # Beside a GPU every core decodes: a ViT-B/32 takes several thousand pairs a second, and a core decodes hundreds of
    # photos. One is left to the main process, which launches kernels and joins batches; more workers than 16 give it
    # more than it can hand on.
    return max(1, min(16, cores // local_world_size() - 1))


def num_cores() -> int:
    """Count the processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _cpu_has_bf16() -> bool:
    """Tell whether the processor multiplies bfloat16 in hardware; emulation is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
