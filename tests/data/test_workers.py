import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cliptune.data import row_store, tar_samples, workers
from cliptune.data.loaders import TrainLoader
from cliptune.data.shard_loader import ShardLoader
from cliptune.data.shards import open_shards
from cliptune.data.workers import fitting_workers, make_loader, shared_number
from cliptune.preprocess import decode
from cliptune.preprocess.decode import read_bytes
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.stopping import KilledWorkerError
from data_loader import ImageTextDataset
from tests.helpers.datasets import make_shards
from tests.helpers.limits import run_limited

CPU = torch.device("cpu")
SHM = "/dev/shm"


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    workers._said.clear()
    yield
    workers._said.clear()


def in_half_precision(_: Any) -> torch.Tensor:
    return torch.rand(3, 150, 150).bfloat16()


def no_room(_: object) -> Any:
    return type("Usage", (), {"free": 0})


def fails(*_: object) -> Any:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


ROOM: dict[str, tuple[Any, str, Callable[..., Any]] | None] = {
    "enough": None,
    "too little": (shutil, "disk_usage", no_room),
    "taken meanwhile": (torch.Tensor, "share_memory_", fails),
    "too few files": (workers, "_free_descriptors", lambda: 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("transform", [clip_transform(96), in_half_precision])
@pytest.mark.parametrize("room", ROOM)
def test_batches_are_the_same_however_they_are_handed_over(
    room: str,
    transform: Any,
    sample_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = ImageTextDataset(sample_dir, transform=transform)
    want = list(TrainLoader(dataset, batch_size=24, num_workers=0, device=CPU).epoch(1))
    loader = TrainLoader(dataset, batch_size=24, num_workers=2, device=CPU)
    if (change := ROOM[room]) is not None:
        monkeypatch.setattr(*change)
    for got, expected in zip(loader.epoch(1), want, strict=True):
        for field in ("images", "tokens", "image_ids", "caption_ids", "caption_indices"):
            assert torch.equal(getattr(got, field), getattr(expected, field))
        assert got.images.dtype == expected.images.dtype
    list(loader.epoch(2))
    assert caplog.text.count("goes through pipes") == (room != "enough")


def test_without_shared_memory_the_main_process_loads(
    sample_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lock() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(multiprocessing, "Lock", lock)
    monkeypatch.setattr(torch.Tensor, "share_memory_", fails)
    loader = TrainLoader(ImageTextDataset(sample_dir), batch_size=20, num_workers=4, device=CPU)
    assert loader.loader.num_workers == 0
    assert [len(batch.images) for batch in loader.epoch(1)] == [20, 20, 20]
    TrainLoader(ImageTextDataset(sample_dir), batch_size=20, num_workers=4, device=CPU)
    assert caplog.text.count("no shared memory") == 1
    assert "--shm-size" in caplog.text


def test_a_tiny_shared_memory_has_few_workers_or_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for free, expected in ((1 << 30, 8), (200_000, 3), (4096, 0)):
        monkeypatch.setattr(workers, "_free_memory", lambda free=free: free)
        assert fitting_workers(8) == expected
    assert caplog.text.count("/dev/shm is too small for 8 workers: going on with 3") == 1
    assert caplog.text.count("no shared memory ([Errno 28] No space left on device)") == 1


@pytest.mark.parametrize(("free", "expected"), [(1000, 8), (32 + 35, 3), (32, 0), (0, 0)])
def test_there_are_as_many_workers_as_files_allow(
    free: int, expected: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "_free_descriptors", lambda: free)
    assert [fitting_workers(8), fitting_workers(8), fitting_workers(0)] == [expected, expected, 0]
    assert caplog.text.count("ulimit -n") == (expected < 8)


def test_room_is_left_for_other_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((1000, 8), (32 + 110, 3), (32 + 50, 0)):
        monkeypatch.setattr(workers, "_free_descriptors", lambda free=free: free)
        assert fitting_workers(8, others=8) == expected


def test_files_are_counted() -> None:
    before = workers._free_descriptors()
    with Path(os.devnull).open():
        assert workers._free_descriptors() == before - 1


class Broken(Dataset[int]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> int:
        if index == 5:
            raise self.error
        return index


class BrokenStream(IterableDataset[int]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[int]:
        yield 1
        raise self.error


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [Broken, BrokenStream])
@pytest.mark.parametrize("error", [ValueError("no: 1"), FileNotFoundError(2, "No such file", "x y"), MemoryError()])
def test_an_error_of_a_worker_is_what_it_was(kind: Any, error: Exception, num_workers: int) -> None:
    with pytest.raises((ValueError, OSError, MemoryError)) as raised:
        list(make_loader(kind(error), num_workers=num_workers))
    assert str(raised.value) in {str(error), "MemoryError"}
    assert isinstance(error, type(raised.value))


class Unsendable:
    def __reduce__(self) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")


def make_unsendable(samples: Any) -> Any:
    return Unsendable() if samples[0] == 4 else samples


@pytest.mark.slow
def test_what_cannot_be_handed_over_ends_the_run() -> None:
    """PyTorch alone waits for it for ever."""
    batches = [[0], [4], [6]]
    loader = make_loader(Broken(ValueError()), batch_sampler=batches, num_workers=2, collate_fn=make_unsendable)
    alarm = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(30)
    try:
        with pytest.raises(RuntimeError, match="a loader worker was killed"):
            list(loader)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)


class Deadly(Dataset[int]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.slow
@pytest.mark.parametrize("in_thread", [False, True])
def test_batches_joined_in_a_thread_are_the_same(in_thread: bool, sample_dir: Path) -> None:
    dataset = ImageTextDataset(sample_dir, transform=clip_transform(32))
    want = {
        epoch: list(TrainLoader(dataset, batch_size=24, num_workers=0, device=CPU).epoch(epoch)) for epoch in (1, 2)
    }
    loader = TrainLoader(dataset, batch_size=24, num_workers=2, device=CPU, piece_size=5)
    loader.in_thread = in_thread
    early = loader.epoch(1)
    next(early)
    early.close()  # type: ignore[attr-defined]
    for epoch in (1, 2):
        for got, expected in zip(loader.epoch(epoch), want[epoch], strict=True):
            for field in ("images", "tokens", "image_ids", "caption_ids", "caption_indices"):
                assert torch.equal(getattr(got, field), getattr(expected, field))


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 8])
def test_beside_a_gpu_a_batch_is_pinned_once_and_not_by_the_loader(
    pieces: int, sample_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[tuple[int, ...]] = []
    empty = torch.empty

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tuple(tensor.shape))
        return tensor

    def make(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*shape, **options)  # without a GPU there is no pinned memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "empty", make)
    dataset = ImageTextDataset(sample_dir, transform=clip_transform(32))
    gpu = torch.device("cuda")
    loader = TrainLoader(dataset, batch_size=24, num_workers=2, device=gpu, piece_size=24 // pieces)
    assert (loader.loader.pin_memory, loader.in_thread) == (False, True)
    assert not TrainLoader(
        dataset, batch_size=24, num_workers=0, device=gpu
    ).in_thread  # transforms share its random state
    state = torch.get_rng_state()
    assert [len(batch.images) for batch in loader.epoch(1)] == [24, 24, 12]
    assert torch.equal(torch.get_rng_state(), state)  # which the step draws from meanwhile
    assert sorted(pinned) == sorted([(24, 3, 32, 32), (24,), (24,)] * 2 + [(12, 3, 32, 32), (12,), (12,)])


class DeadlyPairs(ImageTextDataset):
    def __getitem__(self, index: int) -> Any:
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.slow
def test_a_killed_worker_is_said_through_the_thread(sample_dir: Path) -> None:
    loader = TrainLoader(DeadlyPairs(sample_dir), batch_size=24, num_workers=2, device=CPU, piece_size=6)
    loader.in_thread = True
    with pytest.raises(KilledWorkerError, match="try fewer --num_workers"):
        list(loader.epoch(1))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_where_a_worker_is_killed_the_others_end_too(persistent: bool) -> None:
    of_others = multiprocessing.active_children()  # kept by runs of this process that nobody has collected yet
    loader = make_loader(Deadly(), num_workers=3, persistent=persistent)
    with pytest.raises(KilledWorkerError, match="try fewer --num_workers"):
        list(loader)
    for worker in set(multiprocessing.active_children()) - set(of_others):
        worker.join(timeout=20)
        assert not worker.is_alive()


@pytest.mark.parametrize(("exitcode", "error", "said"), [
    (-signal.SIGKILL, KilledWorkerError, "try fewer --num_workers"),
    (None, OSError, "probably too many open files: try fewer"),
    (0, OSError, "probably too many open files: try fewer"),  # a worker that has loaded all of its part
])  # fmt: skip
def test_what_ends_pytorchs_thread_for_a_gpu_is_named(
    exitcode: int | None, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread fetches what workers have loaded, and all that PyTorch then says is that it is gone."""
    killed: list[bool] = []

    class Items:
        _workers = (SimpleNamespace(exitcode=exitcode, kill=lambda: killed.append(True)),)

        def __iter__(self) -> "Items":
            return self

        def __next__(self) -> int:
            raise RuntimeError("Pin memory thread exited unexpectedly")

    monkeypatch.setattr(DataLoader, "__iter__", lambda _: Items())
    loader = make_loader(Deadly(), num_workers=1)
    with pytest.raises(error, match=said):
        list(loader)
    assert killed == ([True] if exitcode else [])


class Numbers(Dataset[int]):
    def __init__(self) -> None:
        self.number = shared_number()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return int(self.number)


def test_workers_see_a_shared_number() -> None:
    dataset = Numbers()
    loader = make_loader(dataset, num_workers=2, persistent=True)
    assert list(loader) == [0, 0, 0, 0]
    dataset.number.fill_(7)
    assert list(loader) == [7, 7, 7, 7]


def refusing(call: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    """Let a call fail for one file as it does in a process that may open no more."""

    def refuse(path: Any) -> Any:
        if str(path).endswith(name):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return call(path)

    return refuse


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_too_many_open_files_are_no_fault_of_an_image(
    num_workers: int, cached: bool, sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ImageTextDataset(sample_dir, transform=clip_transform(32))
    if cached:
        dataset.cache_images(tmp_path / "cache")
    refuse = refusing(read_bytes, "scene_00007.png")
    for module in (decode, row_store):
        monkeypatch.setattr(module, "read_bytes", refuse)
    loader = TrainLoader(dataset, batch_size=60, num_workers=num_workers, device=CPU)
    with pytest.raises(OSError, match=r"Too many open files: try fewer --num_workers, or a higher limit \(ulimit -n\)"):
        list(loader.epoch(1))


def test_too_many_open_files_are_no_fault_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(make_shards(tmp_path, 4, 4))
    loader = ShardLoader(shards, transform=clip_transform(8), batch_size=4, num_workers=0, device=CPU, seed=1)
    monkeypatch.setattr(tar_samples, "gopen", refusing(tar_samples.gopen, "01.tar"))
    with pytest.raises(OSError, match=r"01\.tar: Too many open files"):
        list(loader.epoch(1))


LOAD = """
import logging, sys, torch
from cliptune.data.loaders import TrainLoader
from data_loader import ImageTextDataset

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    dataset = ImageTextDataset(sys.argv[1])
    loader = TrainLoader(dataset, batch_size=60, num_workers=int(sys.argv[2]), device=torch.device("cpu"), piece_size=9)
    print([int(batch.images.sum()) for epoch in (1, 2) for batch in loader.epoch(epoch)], loader.loader.num_workers)
"""
LIMITS: dict[str, tuple[dict[str, Any], str, int]] = {
    "4 MB": ({"mount": SHM, "options": "size=4m"}, "goes through pipes", 4),
    "read-only": ({"mount": SHM, "options": "ro"}, "no shared memory", 0),
    "64 files": ({"files": 64}, "too few files may be open", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_a_loader_with_little_room_gives_the_same(limit: str, sample_dir: Path, tmp_path: Path) -> None:
    options, line, num_workers = LIMITS[limit]
    dataset = ImageTextDataset(sample_dir)
    loader = TrainLoader(dataset, batch_size=60, num_workers=0, device=CPU)
    sums = [int(batch.images.sum()) for epoch in (1, 2) for batch in loader.epoch(epoch)]
    done = run_limited(LOAD, sample_dir, 4, folder=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    found, _, count = done.stdout.strip().rpartition(" ")
    assert found == str(sums)
    assert int(count) == num_workers or 0 <= int(count) < num_workers == 3
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
