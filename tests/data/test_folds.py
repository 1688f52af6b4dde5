"""Folds: whole units, all of one size as near as it comes, the same everywhere; a declared test is in none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cliptune.data.folds import deal, read_folds
from cliptune.data.near_duplicates import identical_files
from cliptune.data.pairs import DataSource
from tests.helpers.datasets import make_images, make_index


def test_units_are_whole_and_folds_of_about_one_size() -> None:
    rng = np.random.default_rng(0)
    for seed in range(200):
        num_folds = int(rng.integers(2, 8))
        units = rng.integers(0, int(rng.integers(num_folds, 60)), 100)
        units[:num_folds] = np.arange(num_folds)
        folds = deal(units, num_folds=num_folds, seed=seed)
        assert all(len(np.unique(folds[units == unit])) == 1 for unit in np.unique(units))
        sizes = np.bincount(folds, minlength=num_folds)
        assert sizes.min() > 0
        # one is larger than another by no more than its smallest unit
        assert sizes.max() - sizes.min() <= np.bincount(units).max()
        np.testing.assert_array_equal(folds, deal(units * 7 + 3, num_folds=num_folds, seed=seed))


def test_another_seed_deals_otherwise() -> None:
    units = np.arange(40)
    assert (deal(units, num_folds=4, seed=1) != deal(units, num_folds=4, seed=2)).any()


def read(folder: Path, num_folds: int) -> dict[str, int]:
    folds = read_folds(DataSource(folder), num_folds=num_folds, seed=1, find_copies=identical_files, join=True)
    return {Path(path).name: int(fold) for path, fold in zip(folds.pairs.paths, folds.of, strict=True)}


def test_a_declared_val_is_dealt_out_and_a_declared_test_is_not(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(12)]
    make_images(tmp_path, *names)
    splits = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    groups = ["a", "a", "a", *names[3:]]
    make_index(
        tmp_path,
        [
            {"image": name, "caption": name, "split": split, "group": group}
            for name, split, group in zip(names, splits, groups, strict=True)
        ],
    )
    found = read(tmp_path, 3)
    assert set(found) == set(names[:9])
    assert len({found[name] for name in names[:3]}) == 1
    assert sorted(np.bincount(list(found.values())).tolist()) == [3, 3, 3]


def test_fewer_groups_than_folds_are_refused(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(6)]
    make_images(tmp_path, *names)
    make_index(tmp_path, [{"image": name, "caption": name, "group": f"g{i % 2}"} for i, name in enumerate(names)])
    with pytest.raises(ValueError, match="2 groups cannot be dealt into 3 folds: try --folds 2"):
        read(tmp_path, 3)
    make_index(tmp_path, [{"image": name, "caption": name, "group": "g"} for name in names])
    with pytest.raises(ValueError, match="all images are one group"):
        read(tmp_path, 2)
