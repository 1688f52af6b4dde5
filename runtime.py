"""Where a run happens: device, precision, seeds, loading processes, logging."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

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
        raise ValueError(f"--device {name}: PyTorch sees {found} CUDA device(s); use --device cpu or --device auto")
    if device.type == "mps" and not _has_mps():
        raise ValueError("--device mps: not available here; use --device cpu or --device auto")
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
            return _PRECISIONS["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]
        return _PRECISIONS["bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"]
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"--precision fp16 needs a CUDA device, not {device.type}; use bf16 or fp32")
    return _PRECISIONS[name]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Run the enclosed forward pass in `precision`; parameters stay float32."""
    if precision.dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision.dtype)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (model initialisation draws from them)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def default_num_workers(device: torch.device) -> int:
    """Choose the number of loading processes: on a GPU machine its cores up to 8, beside CPU training few or none.

    There every core computes, and a process loads pictures many times as fast as a ViT-B/32 trains on them: with none
    at all, a step on two cores waits for about a hundredth of its time.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    return min(8, cores) if device.type == "cuda" else min(4, cores // 4)


def setup_logging(level: str, log_path: Path | None = None) -> None:
    """Send log lines to stderr and, if given, to a text file."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setFormatter(logging.Formatter("%(message)s" if level != "debug" else "%(name)s: %(message)s"))
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        file_handler = logging.FileHandler(log_path, encoding="utf-8")
        file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file_handler)
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    for noisy in ("matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)


def import_clip() -> ModuleType:
    """Import OpenAI's `clip`, without the warning of its PyPI form about `pkg_resources`.

    Raises:
        ImportError: it is not installed, or its PyPI form finds no `pkg_resources`; says what to install.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pkg_resources is deprecated")
            import clip  # noqa: PLC0415
    except ModuleNotFoundError as error:
        way_out = "pip install 'setuptools<81'" if error.name == "pkg_resources" else "./setup.sh installs it"
        raise ImportError(f"OpenAI's clip package cannot be imported ({error}); {way_out}") from error
    module: ModuleType = clip
    return module


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _cpu_has_bf16() -> bool:
    """Tell whether the processor multiplies bfloat16 in hardware; emulation is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
