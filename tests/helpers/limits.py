"""Machines with little room: a small disk or `/dev/shm`, or few files, for processes of their own."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.launch import environment


@cache
def _can_mount() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


def run_limited(
    code: str, *arguments: object, folder: Path, mount: str = "", options: str = "", files: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code in `folder`, in which small models are known.

    Args:
        code: of a script; `arguments` are its `sys.argv[1:]`.
        folder: the current one.
        mount: where a tmpfs of its own is, with `options`; needs root.
        files: that may be open at once.
    """
    if mount and not _can_mount():
        pytest.skip("needs root")
    script = folder / "script.py"
    script.write_text(
        "from cliptune.model.architectures import ARCHITECTURES\nfrom tests.helpers.models import SMALL_VIT\n"
        "ARCHITECTURES[SMALL_VIT.name] = SMALL_VIT\n" + code
    )
    prepare = f"mount -t tmpfs -o {options} none {mount} && " if mount else ""
    prepare += f"ulimit -n {files} && " if files else ""
    shell = ["sh", "-c", prepare + 'exec "$@"', "sh", sys.executable, str(script), *map(str, arguments)]
    command = ["unshare", "-m", *shell] if mount else shell
    env = {**environment(), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)


TRAIN = "import sys, train\nif __name__ == '__main__':\n    sys.exit(train.main(sys.argv[1:]))\n"
"""Script of a run."""
