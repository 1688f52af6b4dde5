import errno
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cliptune.data.loaders import TrainLoader
from cliptune.data.pairs import load_pairs
from cliptune.data.row_store import RECORD, ImageCache, Keys, RowStore, as_keys, digest
from cliptune.data.sample_data import create_sample_dataset
from cliptune.preprocess.transforms import PixelTransform, clip_transform, train_transform
from data_loader import ImageTextDataset
from tests.helpers.limits import run_limited

CPU = torch.device("cpu")


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    names = [tmp_path / f"{index}.jpg" for index in range(6)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(name)
    return [str(name) for name in names]


@pytest.fixture
def decoded(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded, in order."""
    names: list[str] = []
    load = PixelTransform.load

    def record(self: PixelTransform, source: str | bytes) -> object:
        found = (path for path in paths if source == path or source == Path(path).read_bytes())
        names.append(Path(next(found)).name)
        return load(self, source)

    monkeypatch.setattr(PixelTransform, "load", record)
    return names


def load_all(cache: ImageCache, paths: list[str]) -> list[np.ndarray]:
    return [cache.load(path)[0] for path in paths]


def expected(path: str) -> np.ndarray:
    transform = clip_transform(32)
    return transform.shrink(transform.load(path))


def test_each_image_is_decoded_once_over_runs_and_equal(tmp_path: Path, paths: list[str], decoded: list[str]) -> None:
    first = load_all(ImageCache(tmp_path / "cache", paths, clip_transform(32)), paths)
    assert decoded == [Path(path).name for path in paths]
    decoded.clear()
    cache = ImageCache(tmp_path / "cache", paths, clip_transform(32))
    second = load_all(cache, paths)
    assert decoded == []
    assert cache.load(paths[0])[1] == (70, 50)
    for one, two, path in zip(first, second, paths, strict=True):
        assert np.array_equal(one, two)
        assert np.array_equal(one, expected(path))


def test_a_changed_file_is_decoded_again_alone(tmp_path: Path, paths: list[str], decoded: list[str]) -> None:
    cache = ImageCache(tmp_path / "cache", paths, clip_transform(32))
    load_all(cache, paths)
    Image.new("RGB", (40, 40), "red").save(paths[2])
    os.utime(paths[4], ns=(1, 1))
    decoded.clear()
    pixels = load_all(cache, paths)
    assert decoded == ["2.jpg"]
    assert np.array_equal(pixels[2], expected(paths[2]))
    decoded.clear()
    load_all(cache, paths)
    assert decoded == []


def test_a_file_that_was_replaced_with_size_and_time_kept_is_decoded_again(
    tmp_path: Path, paths: list[str], decoded: list[str]
) -> None:
    """As `cp -p` and `rsync -t` do it; one that was copied anew is not."""
    for path, color in zip(paths[:2], ("red", "blue"), strict=True):
        Image.new("RGB", (40, 40), color).save(Path(path).with_suffix(".bmp"))
        Path(path).with_suffix(".bmp").replace(path)
    cache = ImageCache(tmp_path / "cache", paths, clip_transform(32))
    load_all(cache, paths)
    before = [Path(path).stat() for path in paths[:3]]
    contents = [Path(path).read_bytes() for path in paths[:3]]
    for index, content in enumerate((contents[1], contents[0], contents[2])):
        Path(paths[index]).unlink()
        Path(paths[index]).write_bytes(content)
        os.utime(paths[index], ns=(before[index].st_atime_ns, before[index].st_mtime_ns))
    assert [Path(path).stat().st_size for path in paths[:3]] == [status.st_size for status in before]
    decoded.clear()
    pixels = load_all(ImageCache(tmp_path / "cache", paths, clip_transform(32)), paths)
    assert sorted(decoded) == ["0.jpg", "1.jpg"]
    assert all(np.array_equal(got, expected(path)) for got, path in zip(pixels, paths, strict=True))


def test_added_removed_and_reordered_files_keep_the_rest(tmp_path: Path, paths: list[str], decoded: list[str]) -> None:
    load_all(ImageCache(tmp_path / "cache", paths[1:4], clip_transform(32)), paths[1:4])
    decoded.clear()
    pixels = load_all(ImageCache(tmp_path / "cache", paths[::-1], clip_transform(32)), paths)
    assert decoded == ["0.jpg", "4.jpg", "5.jpg"]
    assert all(np.array_equal(got, expected(path)) for got, path in zip(pixels, paths, strict=True))
    with pytest.raises(KeyError):
        ImageCache(tmp_path / "cache", paths[:1], clip_transform(32)).load(paths[1])


def test_other_preprocessing_has_its_own_images(tmp_path: Path, paths: list[str], decoded: list[str]) -> None:
    transforms = [
        clip_transform(32),
        clip_transform(48),
        train_transform(32, "crop"),
        train_transform(32, "none", fast_decode=True),
    ]
    for transform in transforms:
        ImageCache(tmp_path / "cache", paths, transform).load(paths[0])
    assert len(decoded) == 4
    ImageCache(tmp_path / "cache", paths, train_transform(32, "none")).load(paths[0])
    ImageCache(tmp_path / "cache", paths, train_transform(32, "color")).load(paths[0])
    assert len(decoded) == 4


def test_an_image_that_cannot_be_read_stays_an_error(tmp_path: Path, paths: list[str]) -> None:
    Path(paths[1]).write_text("broken")
    for _ in range(2):
        cache = ImageCache(tmp_path / "cache", paths, clip_transform(32))
        with pytest.raises(ValueError, match=r"1\.jpg: cannot be read"):
            cache.load(paths[1])
    Path(paths[1]).unlink()
    with pytest.raises(FileNotFoundError):
        cache.load(paths[1])


def change(folder: Path, ending: str, edit: Callable[[bytes], bytes]) -> None:
    (file,) = folder.glob(f"*{ending}")
    file.write_bytes(edit(file.read_bytes()))


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "keys cut within a record": (".keys", lambda data: data[: -RECORD.itemsize // 2]),
    "another checksum": (".keys", lambda data: data[:-8] + b"\1" + data[-7:]),
    "another key": (".keys", lambda data: bytes(RECORD.itemsize) + data[RECORD.itemsize :]),
    "a part of the row": (".rows", lambda data: data[: -32 * 32] + bytes(32 * 32)),
    "rows cut": (".rows", lambda data: data[:-100]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_half_written_row_is_never_used(damage: str, tmp_path: Path, paths: list[str], decoded: list[str]) -> None:
    load_all(ImageCache(tmp_path / "cache", paths, clip_transform(32)), paths)
    change(tmp_path / "cache", *DAMAGES[damage])
    decoded.clear()
    pixels = load_all(ImageCache(tmp_path / "cache", paths, clip_transform(32)), paths)
    assert len(decoded) == 1
    assert all(np.array_equal(got, expected(path)) for got, path in zip(pixels, paths, strict=True))


def test_a_run_killed_between_row_and_checksum_leaves_no_row(tmp_path: Path, paths: list[str]) -> None:
    cache = ImageCache(tmp_path / "cache", paths, clip_transform(32))
    cache.load(paths[0])
    (keys,) = (tmp_path / "cache").glob("*.keys")
    keys_before = keys.read_bytes()
    file = Path(paths[0])
    content, status = file.read_bytes(), file.stat()
    Image.new("RGB", (40, 40), "red").save(file)
    cache.load(paths[0])
    keys.write_bytes(keys_before)  # as if the writer had come no further than the row
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = ImageCache(tmp_path / "cache", paths, clip_transform(32))
    assert np.array_equal(again.load(paths[0])[0], expected(paths[0]))


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fills_up(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RowStore, "write", no_space)


def is_removed(folder: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)


def becomes_a_file(folder: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)
    folder.touch()


def is_emptied(folder: Path, patch: pytest.MonkeyPatch) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")


def is_overwritten(folder: Path, patch: pytest.MonkeyPatch) -> None:
    for path in folder.iterdir():
        path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


FAILURES = [fills_up, is_removed, becomes_a_file, is_emptied, is_overwritten]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fails", FAILURES)
def test_a_cache_that_fails_in_a_run_costs_one_line(
    fails: Callable[[Path, pytest.MonkeyPatch], None],
    num_workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    create_sample_dataset(tmp_path / "data", 12)
    plain, cached = (ImageTextDataset(tmp_path / "data", transform=clip_transform(64)) for _ in range(2))
    cached.cache_images(tmp_path / "cache")
    want = [batch.images for batch in TrainLoader(plain, batch_size=6, num_workers=0, device=CPU).epoch(1)]
    next(iter(TrainLoader(cached, batch_size=6, num_workers=num_workers, device=CPU).epoch(1)))
    fails(tmp_path / "cache", monkeypatch)
    logging.basicConfig(handlers=[logging.StreamHandler()], force=True)  # workers write to stderr, too
    loader = TrainLoader(cached, batch_size=6, num_workers=num_workers, device=CPU)
    for _ in range(2):
        got = list(loader.epoch(1))
        assert not [issue for batch in got for issue in batch.issues]
        assert all(torch.equal(batch.images, images) for batch, images in zip(got, want, strict=True))
    assert capfd.readouterr().err.count("the image cache fails") <= max(1, num_workers)


SMALL_DISK = """
import os, sys, numpy as np
from pathlib import Path
from cliptune.data.row_store import ImageCache
from cliptune.preprocess.transforms import clip_transform

paths = sys.argv[1:]
cache = ImageCache(Path("disk/cache"), paths, clip_transform(224))
cache.load(paths[0])
try:
    with open("disk/other", "wb", buffering=0) as file:
        while file.write(bytes(4096)): pass
except OSError: pass
transform = clip_transform(224)
for path in paths:
    assert np.array_equal(cache.load(path)[0], transform.shrink(transform.load(path)))
print("whole")
"""


@pytest.mark.slow
def test_a_disk_that_others_fill_does_not_end_a_run(tmp_path: Path, paths: list[str]) -> None:
    """What was mapped into memory could not be read there: a signal ended the process without a word."""
    (tmp_path / "disk").mkdir()
    done = run_limited(SMALL_DISK, *paths, folder=tmp_path, mount=f"{tmp_path}/disk", options="size=2m")
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr
    assert done.stderr.count("\n") == 1
    assert "the image cache fails" in done.stderr


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_several_processes_share_one_cache(method: str, tmp_path: Path, paths: list[str], decoded: list[str]) -> None:
    cache = ImageCache(tmp_path / "cache", paths, clip_transform(32))
    cache.load(paths[0])
    assert len(pickle.dumps(cache)) < 10_000  # without what it holds
    with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        results = list(pool.map(cache.load, paths * 3))
    for (pixels, _), path in zip(results, paths * 3, strict=True):
        assert np.array_equal(pixels, expected(path))
    decoded.clear()
    load_all(cache, paths)
    assert decoded == []


def test_two_runs_that_begin_at_once_agree_on_the_rows(tmp_path: Path, paths: list[str]) -> None:
    first = ImageCache(tmp_path / "cache", paths[:3], clip_transform(32))
    second = ImageCache(tmp_path / "cache", paths[3:], clip_transform(32))
    load_all(second, paths[3:])
    assert all(np.array_equal(first.load(path)[0], expected(path)) for path in paths[:3])
    assert all(np.array_equal(second.load(path)[0], expected(path)) for path in paths[3:])


def test_a_full_disk_is_said_before_the_run(tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"no room for 6 cached images: .* leave --cache_images away"):
        ImageCache(tmp_path / "cache", paths, clip_transform(32))


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["none", "crop", "color"])
def test_batches_from_the_cache(augment: str, tmp_path: Path) -> None:
    create_sample_dataset(tmp_path / "data", 12)
    pairs = load_pairs(tmp_path / "data")
    plain = ImageTextDataset(pairs, transform=train_transform(64, augment))
    cached = ImageTextDataset(pairs, transform=train_transform(64, augment))
    cached.cache_images(tmp_path / "cache")
    for epoch in (1, 2):
        for workers in (0, 2):
            loaders = [
                TrainLoader(d, batch_size=6, num_workers=n, device=CPU) for d, n in ((plain, 0), (cached, workers))
            ]
            for one, two in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
                assert torch.equal(one.image_ids, two.image_ids)
                difference = (one.images.int() - two.images.int()).abs().float().mean()
                assert difference == 0 if augment == "none" else difference < 4


def test_a_users_transform_cannot_be_cached(tmp_path: Path) -> None:
    create_sample_dataset(tmp_path / "data", 4)
    dataset = ImageTextDataset(tmp_path / "data", transform=lambda _: torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="this transform is another"):
        dataset.cache_images(tmp_path / "cache")


def keys_of(*names: object) -> Keys:
    return as_keys(digest(name) for name in names)


def rows_of(*numbers: int) -> np.ndarray:
    return np.array([[number, number + 1, 255 - number] for number in numbers], dtype=np.uint8)


def open_store(folder: Path, *names: object) -> tuple[RowStore, np.ndarray]:
    store = RowStore(folder / "s", 3)
    return store, store.announce(keys_of(*names), what="row", way_out="Try less")


def write(store: RowStore, indices: np.ndarray, *numbers: int) -> None:
    store.write(indices, keys_of(*numbers), rows_of(*numbers))


def test_a_store_finds_what_it_was_given(tmp_path: Path) -> None:
    numbers = (31, 12, 19, 11)
    store, indices = open_store(tmp_path, *numbers)
    assert indices.tolist() == [0, 1, 2, 3]
    assert not store.holds(indices, keys_of(*numbers)).any()
    write(store, indices[:3], *numbers[:3])
    again, more = open_store(tmp_path, 5, 19, 5, 31, 11)  # others, and one that comes twice
    assert more.tolist() == [4, 2, 4, 0, 3]
    for opened in (store, again):
        found = opened.holds(more[[1, 3, 4]], keys_of(19, 31, 11))
        assert found.tolist() == [True, True, False]
        assert np.array_equal(opened.read(more[[1, 3]], keys_of(19, 31))[0], rows_of(19, 31))
    assert not again.holds(more[[1]], keys_of(31)).any()  # another key's row


def test_keys_that_end_in_zeros_are_keys_like_others(tmp_path: Path) -> None:
    digests = [bytes(16), b"\1" + bytes(15), b"\1\0\1" + bytes(13), bytes(15) + b"\1"]
    store = RowStore(tmp_path / "s", 3)
    for _ in range(2):
        indices = store.announce(as_keys(digests), what="row", way_out="")
        assert indices.tolist() == [0, 1, 2, 3]
    store.write(indices, as_keys(digests), rows_of(1, 2, 3, 4))
    assert store.holds(indices, as_keys(digests)).all()


def test_rows_are_written_in_any_order_neighbours_together(tmp_path: Path) -> None:
    store, indices = open_store(tmp_path, *range(10))
    order = np.array([4, 5, 6, 9, 2, 1, 0])
    write(store, indices[order], *order.tolist())
    assert np.flatnonzero(store.holds(indices, keys_of(*range(10)))).tolist() == sorted(order.tolist())
    rows, whole = store.read(indices[order], keys_of(*order.tolist()))
    assert whole.all()
    assert np.array_equal(rows, rows_of(*order.tolist()))


def test_a_part_of_a_record_is_nobodys(tmp_path: Path) -> None:
    write(*open_store(tmp_path, 1, 2, 3), 1, 2, 3)
    change(tmp_path, ".keys", lambda data: data[:-5])  # the writer was killed within its third key
    store, indices = open_store(tmp_path, 1, 2, 3)
    assert store.holds(indices, keys_of(1, 2, 3)).tolist() == [True, True, False]
    write(store, indices, 1, 2, 3)
    store, indices = open_store(tmp_path, 1, 2, 3)
    assert store.holds(indices, keys_of(1, 2, 3)).all()
    assert np.array_equal(store.read(indices, keys_of(1, 2, 3))[0], rows_of(1, 2, 3))


def test_a_row_that_was_never_written_is_not_there_whatever_its_content(tmp_path: Path) -> None:
    store, indices = open_store(tmp_path, *range(200))
    assert not store.holds(indices, keys_of(*range(200))).any()
    assert not store.read(indices, keys_of(*range(200)))[1].any()


def test_a_disk_that_takes_a_part_of_a_row_is_an_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    store, indices = open_store(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, before[1]))
    try:
        with pytest.raises(OSError, match=r"s\.rows: only 2 of 3 bytes could be written"):
            write(store, indices, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not store.holds(indices, keys_of(1)).any()


def test_a_row_that_changes_on_the_disk_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    store, indices = open_store(tmp_path, 1, 2, 3)
    write(store, indices, 1, 2, 3)
    rows, whole = store.read(indices[[2, 0, 2]], keys_of(3, 1, 3))
    assert whole.all()
    assert np.array_equal(rows, rows_of(3, 1, 3))
    change(tmp_path, ".rows", lambda data: data[:4] + b"\0" + data[5:])
    assert store.read(indices, keys_of(1, 2, 3))[1].tolist() == [True, False, True]
    change(tmp_path, ".rows", lambda data: data[:2])  # shorter than what was there when it was opened
    assert not store.read(indices, keys_of(1, 2, 3))[1].any()
    change(tmp_path, ".keys", lambda data: data[:2])
    assert not store.holds(indices, keys_of(1, 2, 3)).any()


def test_rows_that_may_not_be_used_are_not_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, indices = open_store(tmp_path, 1, 2, 3)
    write(store, indices, 1, 2, 3)
    assert store.holds(indices, keys_of(1, 2, 3), valid=lambda rows: rows[:, 0] != 2).tolist() == [True, False, True]
    assert "s.rows: 1 row is damaged, computed anew" in caplog.text


def test_a_folder_that_takes_no_files_is_said_with_the_way_out(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "folder" / "s", 3)
    shutil.rmtree(tmp_path / "folder")
    assert store.announce(keys_of(1), what="row", way_out="").tolist() == [0]
    (tmp_path / "other.keys").mkdir()
    with pytest.raises(OSError, match=r"other.*rows cannot be cached there\. Try less"):
        RowStore(tmp_path / "other", 3).announce(keys_of(1), what="row", way_out="Try less")
