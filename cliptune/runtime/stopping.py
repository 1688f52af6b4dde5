"""Signals that end a stage: with one line and an exit code, and what it was writing is whole or gone."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 15.0
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)  # SIGHUP: the terminal is gone; Windows has none
"""What asks a process to end."""


class Stopped(KeyboardInterrupt):
    """Raised where a run stops.

    Args:
        signal_number: such as `signal.SIGTERM`.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 143, 130 or 129."""
        return 128 + self.signal_number


class KilledWorkerError(RuntimeError):
    """Raised where a loader waits for a worker that is gone."""

    def __init__(self) -> None:
        super().__init__("a loader worker was killed, probably for want of memory: try fewer --num_workers")


def heeded_signals() -> list[signal.Signals]:
    """Return the signals to stop at: not SIGHUP where it was ignored from the start, as `nohup` wants it."""
    return [number for number in SIGNALS if number in _ALWAYS or signal.getsignal(number) != signal.SIG_IGN]


_ALWAYS = {signal.SIGTERM, signal.SIGINT}


_started: set[SignalWatcher] = set()


def _leave_to_parent() -> None:
    if _started:
        signal.set_wakeup_fd(-1)
    _started.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    # a child has the socket too: what ends a loader's worker or a pool's would be taken for the end of this process
    os.register_at_fork(after_in_child=_leave_to_parent)


class SignalWatcher:
    """Tells of signals in a thread, at once: Python's handlers run when the main thread is back from what it computes.

    Args:
        notice: called with each signal's number, in that thread.
    """

    def __init__(self, notice: Callable[[int], None]) -> None:
        self._notice = notice
        self._earlier_descriptor = -1
        self._receiver, self._sender = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin; in the main thread only."""
        self._sender.setblocking(False)
        _started.add(self)
        self._earlier_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def close(self) -> None:
        """End, whether it was started or not."""
        if self._thread.ident is not None:
            signal.set_wakeup_fd(self._earlier_descriptor)
            _started.discard(self)
            self._sender.send(b"\0")  # closing it would not do: a loader's workers have it too
            self._thread.join()
        self._sender.close()
        self._receiver.close()

    def _watch(self) -> None:
        while number := self._receiver.recv(1)[0]:
            if number in SIGNALS:
                self._notice(number)


@contextmanager
def stoppable(name: str, grace_seconds: float = GRACE_SECONDS, *, say: Callable[[str], str] = str) -> Iterator[None]:
    """Let a signal raise `Stopped` in the enclosed work, whose clean-up runs; only in the main thread.

    A second SIGINT ends the process at once, and so does the end of the grace period: the work may be stuck in a
    library, or the library may have dropped the exception.

    Args:
        name: of the stage, for the line it then ends with.
        grace_seconds: how long the clean-up may take.
        say: returns that line's text in the user's language.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, came = os.getpid(), 0
    timers: list[threading.Timer] = []
    interrupts = 0

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal came
        if os.getpid() == process and not came:  # a loader's worker, just forked, leaves it to the main process
            came = number
            raise Stopped(number)

    def notice(number: int) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts == 2:
            _leave(name, number, say)
        if not timers:
            timers.append(threading.Timer(grace_seconds, _leave, [name, number, say]))
            timers[0].daemon = True
            timers[0].start()

    watcher = SignalWatcher(notice)
    watcher.start()
    handlers = {number: signal.signal(number, stop) for number in heeded_signals()}
    try:
        yield
        if came:  # a library has dropped the exception, or the signal came with the end
            raise Stopped(came)
    except Exception:
        if came:  # what a library made of it: an import that is broken off may end in anything
            raise Stopped(came) from None
        raise
    finally:
        came = came or -1
        for number, handler in handlers.items():
            signal.signal(number, handler)
        watcher.close()
        for timer in timers:
            timer.cancel()


def leave_at_signals() -> None:
    """End the process with one line at a signal, while a stage is imported: nothing is there to be cleaned up."""
    name = os.path.basename(sys.argv[0])  # noqa: PTH119  (pathlib takes longer than all of this)
    for number in heeded_signals():
        signal.signal(number, lambda number, _: _leave(name, number))


def _leave(name: str, number: int, say: Callable[[str], str] = str) -> None:
    try:
        line = say(f"{name}: {Stopped(number)}")
        os.write(2, f"{line}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(128 + number)
