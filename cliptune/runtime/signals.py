"""Graceful shutdown: SIGTERM, SIGINT and SIGHUP stop a run after a whole step, the same one in all ranks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

from cliptune.runtime.distributed import all_max, world_size
from cliptune.runtime.stopping import GRACE_SECONDS, SIGNALS, SignalWatcher, Stopped, heeded_signals

T = TypeVar("T")


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGHUP while it is entered, instead of ending the process.

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
        self._watcher = SignalWatcher(self._notice)
        self._num_interrupts, self._waits = 0, False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._watcher.start()
            self._handlers = {number: signal.signal(number, self._note) for number in heeded_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._agreed.set()
        self._watcher.close()

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
        except Exception:
            if self.signal_number:  # what a library made of the exception
                raise Stopped(self.signal_number) from None
            raise
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

    def _notice(self, number: int) -> None:
        """Take a signal in the watcher's thread, which runs whatever the main one waits for."""
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts == 2:
            os._exit(128 + number)
        if world_size() > 1 and not self._waits:
            self._waits = True
            threading.Thread(target=self._leave_unless_agreed, args=(number,), daemon=True).start()

    def _leave_unless_agreed(self, number: int) -> None:
        if not self._agreed.wait(self.grace_seconds):
            os._exit(128 + number)


WORKER_GRACE_SECONDS = 30


def leave_signals_to_main(_: int) -> None:
    """Let a loader's worker ignore SIGINT, SIGHUP, and SIGTERM for half a minute: whole groups of processes get them.

    Were it to end before the main process has what it needs for a last step, it would take the run down with an error.
    """
    signal.set_wakeup_fd(-1)  # of the main process's watcher, which has its own signals to tell of
    for number in SIGNALS:
        signal.signal(number, _end_later if number == signal.SIGTERM else signal.SIG_IGN)


def _end_later(*_: object) -> None:
    timer = threading.Timer(WORKER_GRACE_SECONDS, os._exit, [0])
    timer.daemon = True
    timer.start()
