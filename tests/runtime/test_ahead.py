import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cliptune.runtime.ahead import one_ahead


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "one ahead"]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_items_come_in_their_order_one_ahead_at_most() -> None:
    made: list[int] = []

    def make(_: Callable[[], bool]) -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    items = one_ahead(make)
    assert made == []
    for expected in range(20):
        assert next(items) == expected
        wait_for(lambda expected=expected: len(made) == min(expected + 2, 20))  # type: ignore[misc]
    time.sleep(0.02)
    assert list(items) == []
    assert not threads()


def test_an_error_is_raised_where_its_item_is_due() -> None:
    def make(_: Callable[[], bool]) -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("no more")

    items = one_ahead(make)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="no more"):
        next(items)
    assert not threads()


def test_whoever_leaves_early_ends_what_was_going_on() -> None:
    closed: list[bool] = []

    def make(stopped: Callable[[], bool]) -> Iterator[int]:
        try:
            yield 1
            while not stopped():  # as one that waits for workers
                time.sleep(0.001)
            yield 2
        finally:
            closed.append(stopped())

    items = one_ahead(make)
    assert next(items) == 1
    start = time.monotonic()
    items.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 5
    assert closed == [True]
    assert not threads()


@pytest.mark.slow
def test_an_item_is_freed_when_it_was_used() -> None:
    class Item:
        pass

    def make(_: Callable[[], bool]) -> Iterator[Any]:
        for _number in range(3):
            yield Item()

    items = one_ahead(make)
    first = weakref.ref(next(items))
    next(items)
    gc.collect()
    assert first() is None
    assert len(list(items)) == 1


def test_the_thread_is_on_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert list(one_ahead(lambda _: iter("ab"))) == ["a", "b"]
    assert chosen == [3]
