"""SIGTERM and SIGINT as a wish that a run stops after a whole step, which several processes agree on."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch

from cliptune.runtime.distributed import all_max, world_size

GRACE_SECONDS = 15.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """Raised where a run stops.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 143 or 130."""
        return 128 + self.number


class StopSignals:
    """Notes SIGTERM and SIGINT while it is entered, instead of ending the process.

    A second SIGINT ends the process at once, without waiting for what it computes. So does, with several processes, a
    signal that they have not agreed on within 15 seconds: one of them may be gone, and the others wait for it in vain.
    In another thread than the main one Python takes no signals, and nothing happens.

    Attributes:
        number: of the first signal that came to this process; 0: none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._interruptible = False
        self._agreed = threading.Event()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._process = os.getpid()
        # written to by the system at once; Python's handler runs once the main thread is back from what it computes
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._earlier_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier_descriptor)
        self._agreed.set()
        self._sender.send(b"\0")  # to close it would not do: loading processes have it too
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
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self._interruptible = False

    def agree(self, *, due: bool = False) -> bool:
        """Stop here if any process got a signal, which all do at the same place: an exchange that waits for no GPU.

        Args:
            due: whatever else the processes have to agree on.

        Returns:
            Whether it is due in any process.

        Raises:
            Stopped: with the signal's number.
        """
        number, any_due = all_max(torch.tensor([self.number, int(due)])).tolist()
        if number:
            self._agreed.set()
            raise Stopped(number)
        return bool(any_due)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self.number:  # a loading process leaves it to the main one
            return
        self.number = number
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
        if not self._agreed.wait(GRACE_SECONDS):
            os._exit(128 + number)


LOADER_GRACE_SECONDS = 30


def leave_signals_to_main(_: int) -> None:
    """Let a loading process ignore SIGINT, and SIGTERM for half a minute: whole groups of processes get them.

    Were it to end before the main process has what it needs for a last step, it would take the run down with an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(*_: object) -> None:
    timer = threading.Timer(LOADER_GRACE_SECONDS, os._exit, [0])
    timer.daemon = True
    timer.start()
