"""Runs whose batches come as they do beside a GPU: joined in a thread, copied a step ahead, read from the cache."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cliptune.data.cached_loader import CachedReader
from cliptune.data.loaders import TrainLoader
from cliptune.training.prefetch import copied_ahead
from tests.helpers import runs
from tests.helpers.runs import SMALL, assert_same_runs, signal_at, small_runs
from train import main

FLAGS = [*SMALL, "--num_epochs", "3", "--validate_every", "4", "--precision", "fp32"]
"""Epochs of 6 steps."""


@pytest.fixture(scope="module")
def whole(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with small_runs():
        assert main([*FLAGS, "--data_dir", str(sample_dir), "--output_dir", str(folder)]) == 0
    return folder


class Copies:
    """Stands in for a side stream."""

    def start(self, images: Tensor) -> tuple[Tensor, Any]:
        return torch.zeros_like(images), images

    def finish(self, copied: Tensor, begun: Any) -> None:
        copied.copy_(begun)


@pytest.fixture
def as_on_a_gpu(small: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    begin = TrainLoader.__init__

    def in_thread(self: TrainLoader, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self.in_thread = self.loader.num_workers > 0

    def fed(batches: Any, _: torch.device, *, is_whole: Any) -> Any:
        return copied_ahead(batches, Copies(), is_wanted=is_whole)

    small.setattr(TrainLoader, "__init__", in_thread)
    small.setattr("cliptune.training.trainer.fed", fed)
    return small


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--num_workers", "2"], ["--num_workers", "2", "--cache_images"], ["--cache_images"], ["--micro_batch_size", "4"]],
)
def test_a_run_is_the_same_and_one_that_is_stopped_goes_on_to_its_end(
    flags: list[str], whole: Path, sample_dir: Path, tmp_path: Path, as_on_a_gpu: pytest.MonkeyPatch
) -> None:
    run = [*FLAGS, "--data_dir", str(sample_dir), "--output_dir", str(tmp_path / "run"), *flags]
    plain = whole
    if "--micro_batch_size" in flags:
        plain = tmp_path / "plain"
        with small_runs():
            assert main([*FLAGS, "--data_dir", str(sample_dir), "--output_dir", str(plain), *flags]) == 0
    signal_at(as_on_a_gpu, {2: signal.SIGTERM, 6: signal.SIGINT, 10: signal.SIGTERM})
    assert main(run) == 143
    as_on_a_gpu.setattr(runs, "DIFFER", runs.DIFFER | {"num_workers", "cache_images"})
    resume = partial(main, ["--resume", str(tmp_path / "run"), "--output_dir", str(tmp_path / "run")])
    assert [resume(), resume(), resume()] == [130, 143, 0]
    assert_same_runs(tmp_path / "run", plain)


@pytest.mark.slow
def test_a_full_cache_feeds_training_and_validation_without_a_sample(
    whole: Path, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    run = [*FLAGS, "--data_dir", str(sample_dir), "--cache_images", "--cache_dir", str(tmp_path / "cache")]
    assert main([*run, "--output_dir", str(tmp_path / "first")]) == 0
    small.setattr("data_loader.ImageTextDataset.__getitem__", lambda *_: pytest.fail("a sample is loaded"))
    read: list[int] = []
    batches = CachedReader.batches

    def note(self: CachedReader, items_of: Any) -> Any:
        read.append(len(self.dataset))
        return batches(self, items_of)

    small.setattr(CachedReader, "batches", note)
    assert main([*run, "--output_dir", str(tmp_path / "second"), "--num_workers", "2"]) == 0
    assert sorted(set(read)) == [6, 54]
    small.setattr(runs, "DIFFER", runs.DIFFER | {"num_workers", "cache_images", "cache_dir"})
    for name in ("first", "second"):
        assert_same_runs(tmp_path / name, whole)
