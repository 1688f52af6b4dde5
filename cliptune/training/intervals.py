"""When something that is done again and again within an epoch is due: after so many steps, or so much time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from cliptune.runtime.distributed import any_rank, is_main

T = TypeVar("T")


class Interval:
    """Tells when something is due, in all ranks or in none.

    Args:
        every_steps: steps of the run between two times; None: none is due by steps.
        every_seconds: or the time between them; None: none is due by time.
        clock: tells the time, in seconds.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every_steps, self.every_seconds, self._clock = every_steps, every_seconds, clock
        self._done_at = clock()

    def is_due(self, step: int) -> bool:
        """Tell whether it is due after this step; of time, the main rank's clock decides."""
        if self.every_steps is not None:
            return step % self.every_steps == 0
        if self.every_seconds is None:
            return False
        return any_rank(is_main() and self._clock() - self._done_at >= self.every_seconds)

    def restart(self) -> None:
        """Say that it has been done now."""
        self._done_at = self._clock()


def items_until(is_due: Callable[[], bool], items: Iterator[T]) -> Iterator[T]:
    """Yield items until something is due, before the first of them too; the rest stays in the iterator."""
    while not is_due():
        try:
            item = next(items)
        except StopIteration:
            return
        yield item
        del item  # so that its memory is free for the next
