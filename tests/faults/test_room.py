"""Runs whose caches, disk or shared memory fail them."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cliptune.data.loaders import TrainLoader
from cliptune.data.row_store import RowStore
from cliptune.data.sample_data import create_sample_dataset
from tests.helpers.limits import TRAIN, run_limited
from tests.helpers.runs import SMALL, lines_of, small_runs
from train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def runs() -> Iterator[pytest.MonkeyPatch]:
    with small_runs() as patch:
        yield patch


@pytest.fixture
def data(tmp_path: Path) -> Path:
    create_sample_dataset(tmp_path / "data", 40)
    return tmp_path / "data"


def losses_of(data: Path, output: Path, *flags: object) -> list[float]:
    command = [*SMALL, "--data_dir", data, "--output_dir", output, "--num_epochs", "2", "--precision", "fp32", *flags]
    assert main([str(flag) for flag in command]) == 0
    assert not (output / "results" / "skipped.json").exists()
    return [line["loss"] for line in lines_of(output / "logs" / "steps.jsonl")]


def swap_with_times_kept(data: Path) -> None:
    """Let two images change places as `rsync -t` would: size and time of change stay."""
    paths = [data / "images" / f"scene_0000{number}.png" for number in (1, 2)]
    contents, status = [path.read_bytes() for path in paths], [path.stat() for path in paths]
    for path, content, times in zip(paths, contents[::-1], status, strict=True):
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def overwrite(change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def apply(cache: Path) -> None:
        for path in cache.glob("features/*.rows"):
            rows = np.fromfile(path, dtype="<f4")
            change(rows)
            rows.tofile(path)

    return apply


CHANGES: dict[str, Callable[[Path], None]] = {
    "noise": overwrite(lambda rows: np.copyto(rows, np.random.default_rng(0).standard_normal(rows.shape))),
    "nan": overwrite(lambda rows: rows.fill(np.nan)),
    "images swapped": lambda cache: swap_with_times_kept(cache.parent / "data"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_on_a_cache_that_is_no_longer_right_is_that_without(change: str, data: Path, tmp_path: Path) -> None:
    for number, color in ((1, "red"), (2, "blue")):  # of the same size
        Image.new("RGB", (64, 64), color).save(data / "images" / f"scene_0000{number}.png", format="BMP")
    flags = ["--freeze_backbone", "--cache_dir"]
    losses_of(data, tmp_path / "a", *flags, tmp_path / "cache")
    CHANGES[change](tmp_path / "cache")
    got = losses_of(data, tmp_path / "b", *flags, tmp_path / "cache")
    assert got == pytest.approx(losses_of(data, tmp_path / "c", *flags, tmp_path / "other"), abs=1e-5)


def remove(cache: Path, _: pytest.MonkeyPatch) -> None:
    shutil.rmtree(cache / "images")


def fill(cache: Path, patch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(28, "No space left on device", "x.rows")

    patch.setattr(RowStore, "write", write)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", [remove, fill])
def test_an_image_cache_that_fails_in_a_run_changes_nothing(
    fault: Any, num_workers: int, data: Path, tmp_path: Path, runs: pytest.MonkeyPatch
) -> None:
    expected = losses_of(data, tmp_path / "a")
    epoch = TrainLoader.epoch

    def fails_first(self: TrainLoader, *arguments: Any, **options: Any) -> Any:
        if (tmp_path / "cache" / "images").is_dir():
            fault(tmp_path / "cache", runs)
        return epoch(self, *arguments, **options)

    runs.setattr(TrainLoader, "epoch", fails_first)
    flags = ["--cache_images", "--cache_dir", tmp_path / "cache", "--num_workers", num_workers]
    assert losses_of(data, tmp_path / "b", *flags) == expected


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_with_a_read_only_shared_memory_is_that_without_workers(
    num_workers: int, data: Path, tmp_path: Path
) -> None:
    flags = [*SMALL, "--data_dir", str(data), "--output_dir", "out", "--num_epochs", "1", "--num_workers", num_workers]
    done = run_limited(TRAIN, *flags, folder=tmp_path, mount="/dev/shm", options="ro")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no shared memory") == (num_workers > 0)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_of_many_views_and_workers_in_few_files(data: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--data_dir", str(data), "--output_dir", "out", "--num_epochs", "70", "--freeze_backbone"]
    flags += ["--augment", "crop", "--feature_views", "70", "--early_stopping_patience", "0", "--num_workers", "8"]
    done = run_limited(TRAIN, *flags, folder=tmp_path, files=64)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("too few files may be open") == 1
    assert len(list((tmp_path / "out" / "cache" / "features").iterdir())) == 4
