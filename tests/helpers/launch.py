"""Start real processes with `torchrun`, over gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def torchrun_command(world_size: int, script: str, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    return [*launcher, str(ROOT / script), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(world_size: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = torchrun_command(world_size, script, *arguments)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
