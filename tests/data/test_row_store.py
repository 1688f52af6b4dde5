import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cliptune.data import row_store as image_cache
from cliptune.data.loaders import TrainLoader
from cliptune.data.pairs import load_pairs
from cliptune.data.row_store import ENTRY, ImageCache
from cliptune.data.sample_data import create_sample_dataset
from cliptune.preprocess.transforms import PixelTransform, clip_transform, train_transform
from data_loader import ImageTextDataset

CPU = torch.device("cpu")


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    names = [tmp_path / f"{number}.jpg" for number in range(6)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(name)
    return [str(name) for name in names]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded, in order."""
    names: list[str] = []
    load = PixelTransform.load

    def record(self: PixelTransform, path: str | Path) -> object:
        names.append(Path(path).name)
        return load(self, path)

    monkeypatch.setattr(PixelTransform, "load", record)
    return names


def load_all(cache: ImageCache, paths: list[str]) -> list[np.ndarray]:
    return [cache.load(path)[0] for path in paths]


def expected(path: str) -> np.ndarray:
    transform = clip_transform(32)
    return transform.shrink(transform.load(path))


def test_each_picture_is_decoded_once_over_runs_and_equal(tmp_path: Path, paths: list[str], decoded: list[str]) -> None:
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
    assert decoded == ["2.jpg", "4.jpg"]
    assert np.array_equal(pixels[2], expected(paths[2]))
    decoded.clear()
    load_all(cache, paths)
    assert decoded == []


def test_added_removed_and_reordered_files_keep_the_rest(tmp_path: Path, paths: list[str], decoded: list[str]) -> None:
    load_all(ImageCache(tmp_path / "cache", paths[1:4], clip_transform(32)), paths[1:4])
    decoded.clear()
    pixels = load_all(ImageCache(tmp_path / "cache", paths[::-1], clip_transform(32)), paths)
    assert decoded == ["0.jpg", "4.jpg", "5.jpg"]
    assert all(np.array_equal(got, expected(path)) for got, path in zip(pixels, paths, strict=True))
    with pytest.raises(KeyError):
        ImageCache(tmp_path / "cache", paths[:1], clip_transform(32)).load(paths[1])


def test_other_preprocessing_has_its_own_pictures(tmp_path: Path, paths: list[str], decoded: list[str]) -> None:
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


def test_a_picture_that_cannot_be_read_stays_an_error(tmp_path: Path, paths: list[str]) -> None:
    Path(paths[1]).write_text("broken")
    for _ in range(2):
        cache = ImageCache(tmp_path / "cache", paths, clip_transform(32))
        with pytest.raises(ValueError, match=r"1\.jpg: cannot be read"):
            cache.load(paths[1])
    Path(paths[1]).unlink()
    with pytest.raises(FileNotFoundError):
        cache.load(paths[1])


def cut_entries(folder: Path) -> None:
    (file,) = folder.glob("*.entries")
    file.write_bytes(file.read_bytes()[: -ENTRY.itemsize // 2])


def spoil_entry(folder: Path) -> None:
    (file,) = folder.glob("*.entries")
    data = bytearray(file.read_bytes())
    data[-3:] = b"\0\0\0"
    file.write_bytes(data)


def spoil_pixels(folder: Path) -> None:
    (file,) = folder.glob("*.pixels")
    data = bytearray(file.read_bytes())
    data[-32 * 32 :] = bytes(32 * 32)
    file.write_bytes(data)


def cut_pixels(folder: Path) -> None:
    (file,) = folder.glob("*.pixels")
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [cut_entries, spoil_entry, spoil_pixels, cut_pixels])
def test_a_half_written_row_is_never_used(
    damage: Callable[[Path], None], tmp_path: Path, paths: list[str], decoded: list[str]
) -> None:
    load_all(ImageCache(tmp_path / "cache", paths, clip_transform(32)), paths)
    damage(tmp_path / "cache")
    decoded.clear()
    pixels = load_all(ImageCache(tmp_path / "cache", paths, clip_transform(32)), paths)
    assert len(decoded) == 1
    assert all(np.array_equal(got, expected(path)) for got, path in zip(pixels, paths, strict=True))


def test_a_run_killed_between_pixels_and_entry_leaves_no_row(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(tmp_path / "cache", paths, clip_transform(32))
    cache.load(paths[0])

    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    file = Path(paths[0])
    content, status = file.read_bytes(), file.stat()
    Image.new("RGB", (40, 40), "red").save(file)
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "_checksum", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.load(paths[0])
    file.write_bytes(content)  # so that the old entry fits the file again, but not the pixels
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = ImageCache(tmp_path / "cache", paths, clip_transform(32))
    assert np.array_equal(again.load(paths[0])[0], expected(paths[0]))


@pytest.mark.parametrize("method", ["spawn", "fork"])
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
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"needs 0\.00 GB more, .* leave --cache_images away"):
        ImageCache(tmp_path / "cache", paths, clip_transform(32))


@pytest.mark.parametrize("augment", ["none", "crop", "color"])
def test_batches_from_the_cache(augment: str, tmp_path: Path) -> None:
    create_sample_dataset(tmp_path / "data", 12)
    pairs = load_pairs(tmp_path / "data")
    plain = ImageTextDataset(pairs, transform=train_transform(64, augment))
    kept = ImageTextDataset(pairs, transform=train_transform(64, augment))
    kept.cache_images(tmp_path / "cache")
    for epoch in (1, 2):
        for workers in (0, 2):
            loaders = [
                TrainLoader(d, batch_size=6, num_workers=n, device=CPU) for d, n in ((plain, 0), (kept, workers))
            ]
            for one, two in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
                assert torch.equal(one.image_ids, two.image_ids)
                difference = (one.images.int() - two.images.int()).abs().float().mean()
                assert difference == 0 if augment == "none" else difference < 4


def test_a_users_transform_cannot_be_kept(tmp_path: Path) -> None:
    create_sample_dataset(tmp_path / "data", 4)
    dataset = ImageTextDataset(tmp_path / "data", transform=lambda _: torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="this transform is another"):
        dataset.cache_images(tmp_path / "cache")
