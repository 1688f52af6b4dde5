"""What a run runs on: versions of packages, the commit of the checkout, the name of its device."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TOOLKIT = "clip-finetuning-toolkit"
PACKAGES = ("torch", "torchvision", "clip", "clip-anytorch", "numpy", "numba", "pillow", "simplejpeg", "pyarrow")
ROOT = Path(__file__).resolve().parents[2]


def process_start() -> float:
    """Return when this process began, as a time of `time.monotonic`; exact to a hundredth of a second."""
    import psutil  # noqa: PLC0415  (reads /proc when it is imported)

    # the time of the day may have been set since: then the process began now
    age = time.time() - float(psutil.Process().create_time())
    return time.monotonic() - max(age, 0.0)


def package_versions() -> dict[str, str]:
    """Return the version of each package that can change a result, without those that are not installed."""
    found = {}
    for name in (TOOLKIT, *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # of the two CLIP packages there is one; a checkout is not installed
            continue
    return found


def git_commit() -> str | None:
    """Return the checkout's commit, with `-dirty` if tracked files differ from it; None: not a checkout, or no Git."""
    if not (ROOT / ".git").exists():  # else Git would find a repository of the user's around an installed package
        return None
    describe = ["--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(["git", *describe], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Name the chip, as in `NVIDIA H100 80GB HBM3` or `AMD EPYC 9R14`."""
    if device.type == "cuda":
        import torch  # noqa: PLC0415  (what only reads results needs no PyTorch)

        return torch.cuda.get_device_name(device)
    try:  # platform.processor() is empty on most Linux systems
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
