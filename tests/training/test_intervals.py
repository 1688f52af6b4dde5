"""Batches on their way to the steps."""

import weakref
from collections.abc import Callable, Iterator

import pytest

from cliptune.runtime.signals import StopSignals
from cliptune.training.intervals import items_until

WAYS: list[Callable[[Iterator[set[int]]], Iterator[set[int]]]] = [
    lambda items: items_until(lambda: False, items),
    StopSignals().interruptible_items,
]


@pytest.mark.parametrize("way", WAYS, ids=["until something is due", "interruptible"])
def test_a_batch_that_was_used_is_gone_before_the_next_is_made(way: Callable[..., Iterator[set[int]]]) -> None:
    made: list[weakref.ref[set[int]]] = []

    def batches() -> Iterator[set[int]]:
        for number in range(3):
            assert [ref for ref in made if ref() is not None] == []
            batch = {number}
            made.append(weakref.ref(batch))
            yield batch
            del batch

    used = []
    for batch in way(batches()):
        used.append(batch.copy())
        del batch
    assert used == [{0}, {1}, {2}]
