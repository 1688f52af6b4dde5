"""Where a run's wall time goes: every moment belongs to one phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cliptune.recorded import WallTime


class WallClock:
    """Adds up the seconds of each phase of a run, see `WallTime`; a look at a clock at every change of phase, no more.

    It asks no device to finish. What a GPU still computes is waited for where its numbers are read, which is in a step
    or right after the last one, and counts there.

    Args:
        earlier: seconds of each phase so far, of the parts of the run before this one.
    """

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        self._seconds = dict.fromkeys(WallTime.model_fields, 0.0) | dict(earlier or {})
        self._phase, self._at = "start", time.monotonic()

    def begin(self, at: float) -> None:
        """Count from this `time.monotonic()` on, in phase `start`."""
        self._phase, self._at = "start", at

    def enter(self, phase: str) -> None:
        """Go on in this phase."""
        now = time.monotonic()
        self._seconds[self._phase] += now - self._at
        self._phase, self._at = phase, now

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """Be in this phase for a while, and then in the one before again."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def add_waited(self, seconds: float) -> None:
        """Take what was waited for a batch out of the steps."""
        self._seconds["step"] -= seconds
        self._seconds["data"] += seconds

    def state_dict(self) -> dict[str, float]:
        """Return the seconds of each phase so far."""
        self.enter(self._phase)
        # steps are timed by another clock than this one: of no step at all a rounding may be left
        return {phase: round(max(seconds, 0.0), 3) for phase, seconds in self._seconds.items()}
