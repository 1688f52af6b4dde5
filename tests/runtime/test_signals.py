import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cliptune.runtime.signals import StopSignals
from cliptune.runtime.stopping import SIGNALS, Stopped

ROOT = Path(__file__).parent.parent.parent
STUCK = """
import ctypes, sys
from cliptune.runtime import signals
signals.world_size = lambda: int(sys.argv[1])
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
with signals.StopSignals(grace_seconds=0.2):
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)  # waits without end, and not for Python
"""


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_waits_until_the_processes_agree(number: signal.Signals, code: int) -> None:
    before = handlers()
    stop = StopSignals()
    with pytest.raises(Stopped, match=number.name) as stopped, stop:
        stop.check()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.signal_number == number
        stop.check()
    assert stopped.value.exit_code == code
    assert handlers() == before


def test_the_first_signal_counts() -> None:
    with StopSignals() as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        assert stop.signal_number == signal.SIGTERM


def test_work_that_changes_nothing_stops_at_once() -> None:
    reached: list[str] = []
    with StopSignals() as stop:
        with pytest.raises(Stopped), stop.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
            reached.append("the end of it")
        with pytest.raises(Stopped), stop.interruptible():
            reached.append("what comes after the signal")
    assert not reached


def test_a_step_is_finished_unless_it_takes_long() -> None:
    reached: list[str] = []
    with StopSignals(step_seconds=0.2) as stop:
        with stop.within_step():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            reached.append("the end of a short one")
        time.sleep(0.5)  # what is no step is left alone, such as saving
        reached.append("what comes between")
        with pytest.raises(Stopped, match="SIGINT"), stop.within_step():
            threading.Event().wait(10)  # for a lock, as for another thread that compiles
            reached.append("the end of a long one")
    assert reached == ["the end of a short one", "what comes between"]


def test_what_a_library_makes_of_the_end_of_a_step_is_the_signal() -> None:
    with StopSignals(step_seconds=0.1) as stop:
        with pytest.raises(Stopped), stop.within_step():
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                time.sleep(10)
            except BaseException:
                raise RuntimeError("the compiler has failed") from None
        with pytest.raises(ValueError, match="its own"), StopSignals().within_step():
            raise ValueError("its own")


def test_a_wait_for_the_next_item_stops_at_once_and_the_work_on_it_does_not() -> None:
    def slow() -> Iterator[int]:
        yield 1
        yield 2
        time.sleep(10)
        yield 3

    seen: list[int] = []
    with StopSignals() as stop, pytest.raises(Stopped):
        for item in stop.interruptible_items(slow()):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                seen.append(20)
    assert seen == [1, 2, 20]
    assert list(StopSignals().interruptible_items(range(3))) == [0, 1, 2]


def test_in_several_processes_nothing_stops_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliptune.runtime.signals.world_size", lambda: 2)
    with StopSignals(step_seconds=0.01) as stop:
        with stop.interruptible(), stop.within_step():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        with pytest.raises(Stopped):
            stop.check()


def test_another_thread_takes_no_signals() -> None:
    seen: list[object] = []

    def enter() -> None:
        before = handlers()
        with StopSignals() as stop:
            stop.check()
            seen.append(handlers() == before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "sent", "code"),
    [
        (1, [signal.SIGTERM, signal.SIGINT, signal.SIGINT], 130),
        (2, [signal.SIGTERM], 143),
        (1, [signal.SIGTERM, signal.SIGINT], None),
    ],
    ids=["second SIGINT", "no agreement", "one process"],
)
def test_who_leaves_at_once_though_the_main_thread_is_stuck(
    world_size: int, sent: list[signal.Signals], code: int | None
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, str(world_size)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        for number in sent:
            run.send_signal(number)
            time.sleep(0.05)
        if code is None:
            with pytest.raises(subprocess.TimeoutExpired):
                run.wait(timeout=0.5)
            run.kill()
        else:
            assert run.wait(timeout=30) == code
