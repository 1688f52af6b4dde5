"""Signals that end a stage which has nothing to save."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cliptune.cli import run_stage
from cliptune.runtime import stopping
from cliptune.runtime.files import atomic_writer
from cliptune.runtime.stopping import SIGNALS, Stopped, stoppable

ROOT = Path(__file__).parent.parent.parent
STUCK = """
import ctypes, os, sys
from cliptune.runtime.stopping import stoppable
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
with stoppable("stage.py", grace_seconds=0.3):
    while True:  # a signal may come before the wait
        try:
            print("ready", flush=True)
            libc.pthread_mutex_lock(mutex)  # waits without end, and not for Python
        except BaseException:
            pass
"""
IMPORTS = """
import sys, time
sys.argv[0] = "a/stage.py"
from cliptune.runtime.stopping import leave_at_signals
leave_at_signals()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_one_line_an_exit_code_and_no_file(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]

    def stage() -> int:
        with atomic_writer(tmp_path / "result") as file:
            file.write(b"half of it")
            os.kill(os.getpid(), number)
            time.sleep(10)
        return 0

    assert run_stage(stage, name="stage.py") == 128 + number
    assert capsys.readouterr().err == f"stage.py: stopped by {number.name}\n"
    assert not list(tmp_path.iterdir())
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("kept", [False, True])
def test_an_exception_that_a_library_swallows_or_replaces_is_the_signal_all_the_same(kept: bool) -> None:
    def stage() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except BaseException:
            if not kept:
                raise AttributeError("partially initialised module") from None
        return 0

    assert run_stage(stage, name="stage.py") == 143


def test_a_hang_up_is_left_alone_where_it_was_ignored_from_the_start() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable("stage.py"):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_break_off_the_clean_up() -> None:
    done = []
    with contextlib.suppress(Stopped), stoppable("stage.py"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            done.append("cleaned up")
    assert done


def test_a_signal_to_a_forked_child_is_not_one_to_this_process() -> None:
    """A pool ends its processes with SIGTERM, which a watcher of this process had taken for its own end."""
    noticed: list[int] = []
    watcher = stopping.SignalWatcher(noticed.append)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    watcher.start()
    try:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        watcher.close()
        signal.signal(signal.SIGTERM, before)
    assert noticed == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("script", "sent"),
    [(STUCK, [signal.SIGTERM]), (STUCK, [signal.SIGINT] * 2), (IMPORTS, [signal.SIGINT]), (IMPORTS, [signal.SIGHUP])],
    ids=["stuck", "second SIGINT", "imports", "hang-up in imports"],
)
def test_who_leaves_at_once_though_nothing_is_raised(script: str, sent: list[signal.Signals]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == "ready\n"
        for number in sent:
            run.send_signal(number)
            time.sleep(0.05)
        assert run.wait(timeout=30) == 128 + sent[-1]
        assert run.stderr.read() == f"stage.py: stopped by {sent[-1].name}\n"
