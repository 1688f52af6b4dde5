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

STEP_SECONDS = 4.0
"""How long a step may go on after a signal before it is given up."""


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGHUP while it is entered, instead of ending the process.

    A second SIGINT ends the process at once, without waiting for what it computes. So does, with several ranks, a
    signal that they have not agreed on within the grace period: one of them may be gone, and the others wait for it in
    vain. In another thread than the main one Python takes no signals, and nothing happens.

    Args:
        grace_seconds: how long ranks have to agree.
        step_seconds: how long `within_step` waits for the end of the work.

    Attributes:
        signal_number: of the first signal that came to this rank; 0: none.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS, step_seconds: float = STEP_SECONDS) -> None:
        self.signal_number = 0
        self.grace_seconds, self.step_seconds = grace_seconds, step_seconds
        self._interruptible, self._is_patient = False, False
        self._agreed = threading.Event()
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()
        self._watcher = SignalWatcher(self._notice)
        self._num_interrupts, self._waits = 0, False
        self._is_late, self._is_raised = False, False

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
            with self._translated():
                yield
        finally:
            self._interruptible = False

    @contextmanager
    def within_step(self) -> Iterator[None]:
        """Let the enclosed work come to its end, unless that takes more than `step_seconds` after a signal.

        It must be able to put back what it has changed, as a step can until it updates the weights. Usually it is done
        in time; while kernels are compiled for it, it may take a minute. Only in a single process: several would have
        to agree on which step is the last, and do that at its end.

        Raises:
            Stopped: the work is given up.
        """
        if world_size() > 1:
            yield
            return
        self._is_patient = True
        try:
            with self._translated():
                yield
        finally:
            self._is_patient = False
            if self._is_raised:
                self._agreed.set()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise `Stopped` for what a library made of it."""
        try:
            yield
        except Exception:
            if self._is_raised:
                raise Stopped(self.signal_number) from None
            raise

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
            del item  # so that its memory is free for the next

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
        if os.getpid() != self._process:  # a loader's worker leaves it to the main process
            return
        is_first = not self.signal_number
        self.signal_number = self.signal_number or number
        if (is_first and self._interruptible) or (self._is_late and self._is_patient):
            self._is_raised = True
            raise Stopped(self.signal_number)

    def _notice(self, number: int) -> None:
        """Take a signal in the watcher's thread, which runs whatever the main one waits for."""
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts == 2:
            os._exit(128 + number)
        if not self._waits:
            self._waits = True
            wait = self._leave_unless_agreed if world_size() > 1 else self._hurry
            threading.Thread(target=wait, args=(number,), daemon=True).start()

    def _hurry(self, _: int) -> None:
        """Have `_note` called again in the main thread, until that stops."""
        while not self._agreed.wait(self.step_seconds):
            self._is_late = True
            if self._is_patient and hasattr(signal, "pthread_kill"):
                # ends a wait in the system as well, which a flag would not; SIGTERM, as a second SIGINT says more
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _leave_unless_agreed(self, number: int) -> None:
        if not self._agreed.wait(self.grace_seconds):
            os._exit(128 + number)


WORKER_GRACE_SECONDS = 30


def leave_signals_to_main(_: int) -> None:
    """Let a loader's worker ignore SIGINT, SIGHUP, and SIGTERM for half a minute: whole groups of processes get them.

    Were it to end before the main process has what it needs for a last step, it would take the run down with an error.
    """
    for number in SIGNALS:
        signal.signal(number, _end_later if number == signal.SIGTERM else signal.SIG_IGN)


def _end_later(*_: object) -> None:
    timer = threading.Timer(WORKER_GRACE_SECONDS, os._exit, [0])
    timer.daemon = True
    timer.start()
