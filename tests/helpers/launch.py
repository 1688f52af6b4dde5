"""Start a stage in several ranks, over gloo on the CPU: with `torchrun`, or faster."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.rank_server import LATE

ROOT = Path(__file__).parent.parent.parent
LIMIT_SECONDS = 300


def torchrun_command(world_size: int, script: str, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    return [*launcher, str(ROOT / script), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(world_size: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = torchrun_command(world_size, script, *arguments)
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )


def run_ranks(world_size: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Do what `torchrun` does, with ranks that need not import PyTorch once more.

    Raises:
        TimeoutError: not done in `LIMIT_SECONDS`; says what was running. The ranks are ended.
    """
    return _forked(script, arguments, world_size=world_size)


def run_alone(script: str, *arguments: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script in a process and session of its own, which need not import PyTorch once more.

    Args:
        script: below the root.
        arguments: its `sys.argv[1:]`.
        variables: of its environment, beside those that all have.

    Raises:
        TimeoutError: not done in `LIMIT_SECONDS`; says what was running. It is ended, with what it has started.
    """
    return _forked(script, arguments, world_size=None, variables=variables)


def _forked(script: str, arguments: tuple[str, ...], **options: object) -> subprocess.CompletedProcess[str]:
    server = _rank_server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        job = {"script": str(ROOT / script), "arguments": arguments, "seconds": LIMIT_SECONDS, **options}
        server.stdin.write(json.dumps({**job, "stdout": stdout.name, "stderr": stderr.name}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline().strip()
        if answer == LATE:
            command, told = " ".join((script, *arguments)), (stdout.read() + stderr.read())[-3000:]
            raise TimeoutError(f"not done after {LIMIT_SECONDS} s: {command} ({options}), which told: {told}")
        return subprocess.CompletedProcess(arguments, int(answer), stdout.read(), stderr.read())


@functools.cache
def _rank_server() -> "subprocess.Popen[str]":
    """It ends when its input does, with this process."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "rank_server.py")]
    return subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
