"""Graceful shutdown: SIGTERM and SIGINT stop a run after a whole step, the same one in all ranks."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

from cliptune.runtime.distributed import all_max, world_size

GRACE_SECONDS = 15.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)

T = TypeVar("T")


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
        """What a shell expects of a process that a signal ended: 143 or 130."""
        return 128 + self.signal_number


class StopSignals:
    """Notes SIGTERM and SIGINT while it is entered, instead of ending the process.

    A second SIGINT ends the process at once, without waiting for what it computes. So does, with several ranks, a
    signal that they have not agreed on within the grace period: one of them may be gone, and the others wait for it in
    vain. In another thread than the main one Python takes no signals, and nothing happens.

    Args:
        grace_seconds: how long ranks have to agree.

    Attributes:
        signal_number: of the first signal that came to this rank; 0: none.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        self.signal_number = 0
        self.grace_seconds = grace_seconds
        self._interruptible = False
        self._agreed = threading.Event()
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()
        self._earlier_descriptor = -1
        self._receiver, self._sender = socket.socketpair()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        # written to by the system at once; Python's handler runs once the main thread is back from what it computes
        self._sender.setblocking(False)
        self._earlier_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._watcher.start()
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(self._earlier_descriptor)
            self._agreed.set()
            self._sender.send(b"\0")  # closing it would not do: a loader's workers have it too
            self._watcher.join()
        self._sender.close()
        self._receiver.close()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Stop at once within the enclosed work, which changes nothing that is saved; only in a single process.

        Raises:
            Stopped: a signal came, or had come before.
        """
        if world_size() > 1:
            yield
            return
        self._interruptible = True
        try:
            if self.signal_number:
                raise Stopped(self.signal_number)
            yield
        finally:
            self._interruptible = False

    def interruptible_items(self, items: Iterable[T]) -> Iterator[T]:
        """Yield what an iterable gives; the wait for each may be interrupted, as by `interruptible`."""
        iterator = iter(items)
        while True:
            with self.interruptible():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def check(self) -> None:
        """Stop here if any rank got a signal: a collective that all ranks run in the same place and no GPU waits for.

        Raises:
            Stopped: with the signal's number.
        """
        signal_number = int(all_max(torch.tensor(self.signal_number)).item())
        if signal_number:
            self._agreed.set()
            raise Stopped(signal_number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self.signal_number:  # a loader's worker leaves it to the main process
            return
        self.signal_number = number
        if self._interruptible:
            raise Stopped(number)

    def _watch(self) -> None:
        """Read the signals' numbers in a thread, which runs whatever the main one waits for."""
        interrupts = 0
        waited_for = world_size() == 1
        while number := self._receiver.recv(1)[0]:
            if number not in SIGNALS:
                continue
            interrupts += number == signal.SIGINT
            if interrupts == 2:
                os._exit(128 + number)
            if not waited_for:
                waited_for = True
                threading.Thread(target=self._leave_unless_agreed, args=(number,), daemon=True).start()

    def _leave_unless_agreed(self, number: int) -> None:
        if not self._agreed.wait(self.grace_seconds):
            os._exit(128 + number)


WORKER_GRACE_SECONDS = 30


def leave_signals_to_main(_: int) -> None:
    """Let a loader's worker ignore SIGINT, and SIGTERM for half a minute: whole groups of processes get them.

    Were it to end before the main process has what it needs for a last step, it would take the run down with an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(*_: object) -> None:
    timer = threading.Timer(WORKER_GRACE_SECONDS, os._exit, [0])
    timer.daemon = True
    timer.start()
