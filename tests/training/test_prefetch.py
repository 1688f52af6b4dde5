from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from clip_model import ContrastiveLoss, MultimodalTrainer
from cliptune.runtime.signals import StopSignals
from cliptune.runtime.stopping import Stopped
from cliptune.training.prefetch import copied_ahead, fed
from tests.helpers.models import FP32, SMALL_VIT, make_model, small_architectures

__all__ = ["small_architectures"]


class Batch(NamedTuple):
    images: Tensor
    tokens: Tensor
    issues: list[str]


class Loaded:
    """Batches of a loader, which notes what is asked for and that it was closed."""

    def __init__(self, sizes: list[int], *, stops_at: int | None = None) -> None:
        self.sizes, self.stops_at, self.log = sizes, stops_at, []  # type: ignore[var-annotated]

    def __iter__(self) -> Iterator[Batch]:
        try:
            for number, size in enumerate(self.sizes):
                self.log.append(f"load {number}")
                if number == self.stops_at:
                    raise Stopped(15)
                yield Batch(torch.full((size, 3, 2, 2), number, dtype=torch.uint8), torch.arange(size), [str(number)])
        finally:
            self.log.append("closed")


class StandIn:
    """A side stream whose copies are not there before they are waited for."""

    def __init__(self, log: list[str], *, room: int = 99) -> None:
        self.log, self.room = log, room

    def start(self, images: Tensor) -> tuple[Tensor, Any]:
        if not self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.room -= 1
        self.log.append(f"copy {int(images[0, 0, 0, 0])}")
        return torch.full_like(images, 255), images

    def finish(self, copied: Tensor, begun: Any) -> None:
        copied.copy_(begun)
        self.log.append(f"wait {int(begun[0, 0, 0, 0])}")


def numbers(batches: Any) -> list[tuple[int, int, list[str]]]:
    return [(int(batch.images.float().mean()), len(batch.tokens), batch.issues) for batch in batches]


def test_batches_come_in_their_order_with_one_copy_ahead() -> None:
    loaded = Loaded([4, 4, 4, 2])
    expected = numbers(loaded)
    loaded.log.clear()
    batches = copied_ahead(loaded, StandIn(loaded.log), is_wanted=lambda _: True)
    next(batches)
    assert loaded.log == ["load 0", "copy 0", "load 1", "copy 1", "wait 0"]
    next(batches)
    assert loaded.log[5:] == ["load 2", "copy 2", "wait 1"]
    assert numbers(copied_ahead(loaded, StandIn([]), is_wanted=lambda _: True)) == expected


def test_what_is_not_wanted_stays_where_it_is_and_does_not_wait() -> None:
    loaded = Loaded([4, 9, 9, 4])
    expected = numbers(loaded)
    loaded.log.clear()
    batches = copied_ahead(loaded, StandIn(loaded.log), is_wanted=lambda images: len(images) < 9)
    assert numbers(batches) == expected
    assert loaded.log == [
        "load 0", "copy 0", "load 1", "wait 0", "load 2", "load 3", "copy 3", "closed", "wait 3",
    ]  # fmt: skip
    loaded.log.clear()
    next(copied_ahead(loaded, StandIn(loaded.log), is_wanted=lambda _: False))
    assert loaded.log[:1] == ["load 0"]
    assert "load 1" not in loaded.log


def test_without_room_it_says_so_once_and_goes_on_plainly(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    loaded = Loaded([3] * 6)
    copier = StandIn(loaded.log, room=2)
    assert numbers(copied_ahead(loaded, copier, is_wanted=lambda _: True)) == numbers(Loaded([3] * 6))
    assert caplog.text.count("the GPU has no room for the next batch") == 1
    assert loaded.log.count("copy 2") == 0


def test_another_error_of_the_device_is_not_hidden() -> None:
    class Broken(StandIn):
        def start(self, images: Tensor) -> tuple[Tensor, Any]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    loaded = Loaded([3, 3])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        next(copied_ahead(loaded, Broken([]), is_wanted=lambda _: True))
    assert loaded.log[-1] == "closed"


def test_the_loader_is_closed_where_a_signal_or_the_end_of_the_epoch_comes_between() -> None:
    loaded = Loaded([3] * 5, stops_at=3)
    stop = StopSignals()
    batches = stop.interruptible_items(copied_ahead(loaded, StandIn([]), is_wanted=lambda _: True))
    assert [int(next(batches).images[0, 0, 0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(Stopped):
        next(batches)
    assert loaded.log[-1] == "closed"
    loaded = Loaded([3] * 5)
    batches = copied_ahead(loaded, StandIn([]), is_wanted=lambda _: True)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert loaded.log[-1] == "closed"


def test_a_trainer_leaves_batches_of_micro_batches_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(batches: Any, _: Any, *, is_whole: Any) -> list[bool]:
        return [is_whole(batch.images) for batch in batches]

    monkeypatch.setattr("cliptune.training.trainer.fed", copied)
    model = make_model(SMALL_VIT.name)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for size, expected in ((None, [True, True]), (4, [True, False]), (3, [False, False])):
        trainer = MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=FP32, micro_batch_size=size)
        assert list(trainer.fed(Loaded([4, 5]))) == expected


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_batches_are_what_they_were(device: str) -> None:
    made = list(Loaded([3, 2]))
    given = fed(made, torch.device(device), is_whole=lambda _: True)
    assert [id(batch) for batch in given] == [id(batch) for batch in made]
    loaded = Loaded([3, 2])
    next(fed(loaded, torch.device(device), is_whole=lambda _: True))
    assert loaded.log[:1] == ["load 0"]
    assert "load 1" not in loaded.log
