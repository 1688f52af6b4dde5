import errno
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cliptune.data import cached_loader, row_store
from cliptune.data.cached_loader import CachedLoader, CachedReader, reader_of
from cliptune.data.loaders import Batch, TrainLoader
from cliptune.data.row_store import ImageCache
from cliptune.data.table import Strings
from cliptune.preprocess.decode import read_bytes
from cliptune.preprocess.transforms import PixelTransform, clip_transform, train_transform
from data_loader import ImageTextDataset

CPU = torch.device("cpu")


def open_cached(data: Any, cache: Path, **options: Any) -> ImageTextDataset:
    dataset = ImageTextDataset(data, transform=clip_transform(32), **options)
    dataset.cache_images(cache)
    return dataset


def fill(dataset: ImageTextDataset) -> None:
    for path in dataset.pairs.paths:
        try:
            assert dataset.cache is not None
            dataset.cache.load(path)
        except (ValueError, OSError):
            pass  # what cannot be read is never cached


def assert_same(got: list[Batch], want: list[Batch]) -> None:
    assert len(got) == len(want)
    for one, two in zip(got, want, strict=True):
        for name in ("images", "tokens", "image_ids", "caption_ids", "caption_indices"):
            assert torch.equal(getattr(one, name), getattr(two, name))
            assert getattr(one, name).dtype == getattr(two, name).dtype
        assert one.issues == two.issues


def no_workers() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.is_alive()]


@pytest.fixture
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what forbids it from then on."""

    def forbid() -> None:
        monkeypatch.setattr(PixelTransform, "load", lambda *_: pytest.fail("an image is decoded"))

    return forbid


@pytest.mark.parametrize("captions", ["random", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_batches_are_those_of_samples_bit_for_bit(
    captions: str, num_workers: int, sample_dir: Path, tmp_path: Path, nothing_is_decoded: Callable[[], None]
) -> None:
    plain = ImageTextDataset(sample_dir, transform=clip_transform(32), captions=captions)
    want = [list(TrainLoader(plain, batch_size=23, num_workers=0, device=CPU).epoch(epoch)) for epoch in (1, 2, 3)]
    cached = open_cached(sample_dir, tmp_path / "cache", captions=captions)
    loader = CachedLoader(cached, batch_size=23, num_workers=0, device=CPU)
    assert_same(list(loader.epoch(1)), want[0])  # and fills the cache
    nothing_is_decoded()
    before = no_workers()
    loader = CachedLoader(cached, batch_size=23, num_workers=num_workers, device=CPU)
    for epoch in (1, 2, 3):
        assert_same(list(loader.epoch(epoch)), want[epoch - 1])
        assert no_workers() == before
    assert_same(list(loader.epoch(2, start=2)), want[1][2:])


def test_workers_fill_the_cache_and_end_when_it_is_full(sample_dir: Path, tmp_path: Path) -> None:
    pairs = ImageTextDataset(sample_dir).pairs.select(range(20))
    loader = CachedLoader(open_cached(pairs, tmp_path / "cache"), batch_size=8, num_workers=2, device=CPU)
    first = list(loader.epoch(1))
    workers = list(loader.loader._iterator._workers)  # type: ignore[union-attr]
    assert len(workers) == 2
    assert_same(list(loader.epoch(1)), first)
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()


def test_what_cannot_be_read_is_skipped_as_without_a_cache(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_loader, "MAX_MISSING", 0.2)
    pairs = ImageTextDataset(sample_dir).pairs.select(range(30))
    (tmp_path / "bad.png").write_bytes(b"no image")
    others = {3: str(tmp_path / "bad.png"), 17: str(tmp_path / "gone.png")}
    pairs = replace(pairs, paths=Strings.of(others.get(number, path) for number, path in enumerate(pairs.paths)))
    plain = ImageTextDataset(pairs, transform=clip_transform(32))
    want = list(TrainLoader(plain, batch_size=10, num_workers=0, device=CPU).epoch(1))
    dataset = open_cached(pairs, tmp_path / "cache")
    fill(dataset)
    loader = CachedLoader(dataset, batch_size=10, num_workers=2, device=CPU)
    assert loader._reader is not None
    assert loader._reader.is_ready()
    assert_same(list(loader.epoch(1)), want)
    assert sum(len(batch.issues) for batch in want) == 2


def test_an_image_that_changes_after_it_was_cached_is_read_anew(sample_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sample_dir, tmp_path / "data")
    dataset = open_cached(tmp_path / "data", tmp_path / "cache")
    fill(dataset)
    loader = CachedLoader(dataset, batch_size=60, num_workers=2, device=CPU)
    (before,) = loader.epoch(1)
    path = Path(dataset.pairs.paths[7])
    Image.new("RGB", (50, 40), (200, 10, 10)).save(path)
    Path(dataset.pairs.paths[8]).unlink()
    (after,) = loader.epoch(1)
    assert [issue.image for issue in after.issues] == [dataset.pairs.paths[8]]
    row = after.image_ids.tolist().index(7)
    assert torch.equal(after.images[row], clip_transform(32)(clip_transform(32).load(path)))
    rest = before.images[(before.image_ids != 7) & (before.image_ids != 8)]
    assert torch.equal(after.images[after.image_ids != 7], rest)


def test_a_damaged_row_is_decoded_and_a_fault_of_the_process_ends_the_run(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_cached(sample_dir, tmp_path / "cache")
    fill(dataset)
    loader = CachedLoader(dataset, batch_size=60, num_workers=2, device=CPU)
    (want,) = loader.epoch(1)
    (rows,) = (tmp_path / "cache").glob("*.rows")
    content = bytearray(rows.read_bytes())
    content[5000] ^= 1
    rows.write_bytes(content)
    (got,) = loader.epoch(1)
    assert_same([got], [want])

    def refuse(path: Any) -> bytes:
        if str(path).endswith("scene_00007.png"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return read_bytes(path)

    os.utime(next(path for path in dataset.pairs.paths if path.endswith("scene_00007.png")), (1, 1))  # a stamp is new
    monkeypatch.setattr(row_store, "read_bytes", refuse)
    with pytest.raises(OSError, match="Too many open files: try fewer --num_workers"):
        list(loader.epoch(1))


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["crop", "color"])
def test_a_random_transform_has_work_for_workers(augment: str, sample_dir: Path, tmp_path: Path) -> None:
    dataset = ImageTextDataset(sample_dir, transform=train_transform(32, augment))
    assert reader_of(dataset, num_threads=1, device=CPU) is None
    dataset.cache_images(tmp_path / "cache")
    assert reader_of(dataset, num_threads=1, device=CPU) is None
    loader = CachedLoader(dataset, batch_size=20, num_workers=0, device=CPU)
    plain = TrainLoader(dataset, batch_size=20, num_workers=0, device=CPU)
    assert_same(list(loader.epoch(1)), list(plain.epoch(1)))


@pytest.mark.parametrize(("most", "ahead"), [(1 << 30, 1), (0, 0)])
def test_one_batch_is_read_ahead_if_there_is_room_and_threads_end(
    most: int, ahead: int, sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_loader, "AHEAD_BYTES", most)
    dataset = open_cached(sample_dir, tmp_path / "cache")
    fill(dataset)
    asked: list[int] = []
    choose = dataset.choose
    monkeypatch.setattr(dataset, "choose", lambda items: asked.append(len(items)) or choose(items))  # type: ignore[func-returns-value]
    batches = CachedReader(dataset, num_threads=2, device=CPU).batches([[1, 2], [3, 4], [5], [6, 0]])
    for number in range(1, 3):
        next(batches)
        assert len(asked) == number + ahead
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cached images")]


def test_a_cache_that_is_removed_gives_way_to_workers(sample_dir: Path, tmp_path: Path) -> None:
    dataset = open_cached(sample_dir, tmp_path / "cache")
    fill(dataset)
    loader = CachedLoader(dataset, batch_size=20, num_workers=0, device=CPU)
    want = list(loader.epoch(1))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"")
    assert dataset.cache is not None
    assert dataset.cache.count_missing() == 60
    assert_same(list(loader.epoch(1)), want)


def test_images_that_others_have_cached_count(sample_dir: Path, tmp_path: Path) -> None:
    dataset = open_cached(sample_dir, tmp_path / "cache")
    paths = list(dataset.pairs.paths)
    other = ImageCache(tmp_path / "cache", paths[:50], clip_transform(32))
    for path in paths[:50]:
        other.load(path)
    assert dataset.cache is not None
    assert dataset.cache.count_missing() == 10
