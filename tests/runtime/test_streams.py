"""Standard streams that are closed, full or read by nobody; in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.datasets import make_images, make_index

ROOT = Path(__file__).parent.parent.parent
STAGE = """
import logging, os, sys
from cliptune.cli import run_stage
from cliptune.runtime.logs import setup_logging

def stage():
    setup_logging("info", __import__("pathlib").Path("x.log"))
    for number in range(3000):
        print("line", number)
        logging.getLogger("stage").info("logged %d", number)
    with open("opened", "w") as file:
        descriptor = file.fileno()
    os.write(2, b"a line of a library in C\\n")
    open("result", "w").write(f"{descriptor} {sys.stdin.read()!r}")
    return 3

sys.exit(run_stage(stage, name="stage.py"))
"""


def run(redirections: str, folder: Path, script: str = STAGE) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'set -o pipefail; "$@" {redirections}', "bash", sys.executable, "-c", script]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirections", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-", "2>&1 | head -1", "| true", "2> >(true)", "2>/dev/full"]
)
def test_a_stage_runs_to_its_end_whoever_reads(redirections: str, tmp_path: Path) -> None:
    done = run(redirections, tmp_path)
    assert done.returncode == 3, done.stderr
    descriptor, read = (tmp_path / "result").read_text().split()
    assert int(descriptor) > 2  # else a library's messages would go into a file of the run
    assert read == "''"
    assert not (tmp_path / "opened").read_text()
    assert len((tmp_path / "x.log").read_text().splitlines()) == 3000
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_what_cannot_be_printed_is_an_error(tmp_path: Path) -> None:
    """Of a table that goes to a full disk somebody wants to know."""
    done = run(">/dev/full", tmp_path, STAGE.replace("3000", "2"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == ("stage.py: error: [Errno 28] No space left on device: 'standard output'")


def test_a_stream_of_somebody_else_stays_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    from cliptune.runtime.streams import open_streams  # noqa: PLC0415

    before = sys.stdout, sys.stderr
    open_streams()
    assert (sys.stdout, sys.stderr) == before
    print("caf\udce9")
    assert capsys.readouterr().out == "caf\\udce9\n"


@pytest.mark.slow
def test_files_outside_ascii_are_found_where_the_locale_is_not(tmp_path: Path) -> None:
    """`LC_ALL=C` as containers and cron have it."""
    make_images(tmp_path / "数据", "图.png", "片.png", "é.png")
    make_index(tmp_path / "数据", [{"image": f"{name}.png", "caption": name} for name in "图片é"])
    done = subprocess.run(
        [sys.executable, ROOT / "data_loader.py", "--data_dir", "数据", "--check", "--num_workers", "0"],
        cwd=tmp_path, env={"LC_ALL": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").endswith("no issues; all 3 images can be read\n")


@pytest.mark.slow
def test_a_terminal_that_is_gone_ends_no_stage(tmp_path: Path) -> None:
    """As after `nohup`, when the window is closed."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", STAGE]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
    ) as run:
        os.close(theirs)
        os.close(ours)
        assert run.wait(timeout=60) == 3
    assert len((tmp_path / "x.log").read_text().splitlines()) == 3000
