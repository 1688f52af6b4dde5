import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from cliptune.data.kept_workers import KeptWorkers
from cliptune.data.loaders import Batch
from cliptune.preprocess.transforms import clip_transform
from data_loader import ImageTextDataset

CPU = torch.device("cpu")


def pids(before: set[int | None]) -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()} - before


@pytest.mark.slow
def test_data_sets_share_workers_that_stay(sample_dir: Path) -> None:
    before = pids(set())
    kept, pairs = KeptWorkers(), ImageTextDataset(sample_dir).pairs

    def open_part(start: int) -> Any:
        return kept.open(start, lambda: ImageTextDataset(pairs.select(range(start, 60)), transform=clip_transform(32)))

    def load(start: int, num_workers: int) -> list[Batch]:
        return list(kept.load(open_part(start), [[0, 5], [2], [1, 3, 4]], num_workers=num_workers, device=CPU))

    found, workers = [], []
    for start, num_workers in ((0, 2), (20, 1), (40, 3), (0, 2), (20, 1), (40, 3)):
        found.append(load(start, num_workers))
        workers.append(pids(before))
    assert [len(each) for each in workers] == [2, 2, 3, 3, 3, 3]  # a data set that asks for fewer takes what there is
    assert workers[2] == workers[3] == workers[4] == workers[5]
    for start, batches in zip((0, 20, 40, 0, 20, 40), found, strict=True):
        dataset = open_part(start)
        assert dataset is open_part(start)
        for batch, items in zip(batches, ([0, 5], [2], [1, 3, 4]), strict=True):
            assert torch.equal(batch.images, torch.stack([dataset[item].image for item in items]))
    kept.end()
    assert not pids(before)


def test_a_pass_that_is_broken_off_leaves_nothing_behind(sample_dir: Path) -> None:
    kept = KeptWorkers()
    dataset = kept.open("a", lambda: ImageTextDataset(sample_dir, transform=clip_transform(32)))
    passed = kept.load(dataset, [[item] for item in range(30)], num_workers=2, device=CPU)
    next(passed)
    passed.close()  # type: ignore[attr-defined]
    again = list(kept.load(dataset, [[7], [8, 9]], num_workers=2, device=CPU))
    assert [batch.image_ids.tolist() for batch in again] == [[7], [8, 9]]
    kept.end()


def test_workers_end_with_what_keeps_them(sample_dir: Path) -> None:
    before = pids(set())
    kept = KeptWorkers()
    dataset = kept.open("a", lambda: ImageTextDataset(sample_dir, transform=clip_transform(32)))
    list(kept.load(dataset, [[1], [2]], num_workers=2, device=CPU))
    assert len(pids(before)) == 2
    del kept
    assert not pids(before)


def test_a_data_set_is_made_once(sample_dir: Path) -> None:
    kept, made = KeptWorkers(), []

    def make() -> ImageTextDataset:
        made.append(ImageTextDataset(sample_dir))
        return made[-1]

    opened = [kept.open(key, make) for key in ("a", "b", "a")]
    assert opened == [made[0], made[1], made[0]]
    assert all(kept.holds(dataset) for dataset in made)
    assert not kept.holds(ImageTextDataset(sample_dir))
