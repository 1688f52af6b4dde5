import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.near_duplicates import encoded
from cliptune.data.near_duplicates import NearDuplicates, find_near_duplicates
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.data.splits import num_asked, split_pairs, training_pairs
from cliptune.data.table import SPLITS, IntArray, Strings
from cliptune.data.units import LARGEST, LARGEST_ANYWAY, components, find_units
from tests.helpers.photos import make_with_copies, photo


def random_pairs(size: int, rng: np.random.Generator) -> Pairs:
    """Images of which some are in groups and some have declared splits, in any order."""
    names = [f"/data/{i:04}.png" for i in rng.permutation(size)]
    in_group = rng.random(size) < rng.choice([0, 0.3, 1])
    groups = [
        f"g{rng.integers(1 + size // 4)}" if grouped else name for name, grouped in zip(names, in_group, strict=True)
    ]
    return Pairs(
        paths=Strings.of(names),
        captions=Strings.of(names),
        starts=np.arange(size + 1),
        groups=Strings.of(groups),
        splits=np.full(size, -1, dtype=np.int8),
    )


def random_copies(size: int, rng: np.random.Generator) -> NearDuplicates:
    pairs = np.sort(rng.integers(0, size, (int(rng.integers(0, size)), 2)), axis=1)
    pairs = np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)
    return NearDuplicates(pairs, rng.random(len(pairs)) < 0.3, np.zeros(len(pairs), dtype=np.float32))


def sides_of(pairs: Pairs, splits: dict[str, Pairs]) -> IntArray:
    sides = np.full(len(pairs), -1)
    for code, split in enumerate(SPLITS):
        sides[pairs.paths.find(splits[split].paths)] = code
    return sides


@pytest.mark.parametrize("num_graphs", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_unit_is_on_two_sides_of_random_graphs(num_graphs: int) -> None:
    rng, num_leaks, num_joined = np.random.default_rng(0), 0, 0
    for _ in range(num_graphs):
        size = int(rng.integers(2, 60))
        pairs, copies = random_pairs(size, rng), random_copies(size, rng)
        units = find_units(pairs.groups, copies)
        seed, val_split = int(rng.integers(1000)), float(rng.choice([0.1, 0.3]))
        splits = split_pairs(pairs, val_split=val_split, seed=seed, units=units)
        sides = sides_of(pairs, splits)
        assert (sides >= 0).all() and sum(map(len, splits.values())) == size
        # by groups, files and near-duplicates themselves, not by what `units` says of them
        groups = np.array(list(pairs.groups))
        same_group = np.argwhere(np.triu(groups[:, None] == groups, k=1))
        same_file, near = copies.pairs[copies.identical], copies.pairs[~copies.identical]
        lumps = np.concatenate([np.zeros(0, dtype=int), *units.lumps])
        near = near[~np.isin(near[:, 0], lumps)]
        for edges in (same_group, same_file, near):
            num_leaks += int((sides[edges[:, 0]] != sides[edges[:, 1]]).sum())
            num_joined += len(edges)
        for lump in units.lumps:
            assert len(lump) > max(LARGEST * size, LARGEST_ANYWAY)
        # the same whatever the order of the records
        order = rng.permutation(size)
        place = np.argsort(order)
        moved = NearDuplicates(place[copies.pairs], copies.identical, copies.distances)
        again = pairs.select(order)
        same = split_pairs(again, val_split=val_split, seed=seed, units=find_units(again.groups, moved))
        assert set(same["val"].paths) == set(splits["val"].paths)
        all_edges = np.concatenate([same_group, copies.pairs])
        if len(np.unique(components(size, all_edges))) > 1:
            assert len(splits["train"]) and len(splits["val"])
    assert num_leaks == 0
    assert num_joined > 10 * num_graphs


def test_what_is_known_of_copies_changes_little_else_of_a_split() -> None:
    rng, moved, sizes = np.random.default_rng(0), [], []
    no_edges = NearDuplicates(np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=bool), np.zeros(0, dtype=np.float32))
    for seed in range(20):
        pairs = replace(random_pairs(600, rng), groups=Strings.of(f"{i:04}" for i in range(600)))
        near = rng.permutation(600)[:60].reshape(30, 2)
        copies = NearDuplicates(near, np.zeros(30, dtype=bool), np.zeros(30, dtype=np.float32))
        unknown, known = (
            sides_of(pairs, split_pairs(pairs, seed=seed, units=find_units(pairs.groups, found)))
            for found in (no_edges, copies)
        )
        other = np.flatnonzero(unknown != known)
        torn = np.flatnonzero(unknown[near[:, 0]] != unknown[near[:, 1]])
        makes_up = np.setdiff1d(other, near)
        assert len(torn) == len(np.intersect1d(other, near[torn]))
        assert len(other) <= 2 * len(torn)
        moved.append(len(makes_up))
        sizes.append(int((known == SPLITS.index("val")).sum()))
    assert set(sizes) == {60}
    assert np.mean(moved) < 4


@pytest.mark.parametrize("declared", ["train", "val", "test"])
def test_an_image_without_a_split_follows_its_unit(declared: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pairs = random_pairs(20, np.random.default_rng(0))
    pairs.splits[0] = SPLITS.index(declared)
    no_groups = Strings.of(pairs.paths)
    copies = NearDuplicates(np.array([[0, 5]]), np.array([False]), np.zeros(1, dtype=np.float32))
    splits = split_pairs(pairs, units=find_units(no_groups, copies))
    sides = sides_of(pairs, splits)
    assert sides[0] == sides[5]
    if declared != "train":
        assert sides[0] == SPLITS.index(declared)
        assert "1 image without a split of their own follow" in caplog.text


def test_declared_splits_are_honoured_and_what_leaks_across_them_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    records = []
    for i in range(12):
        photo(i).save(tmp_path / f"{i}.png")
        records.append({"image": f"{i}.png", "caption": f"clouds {i}", "split": "val" if i > 8 else "train"})
    encoded(photo(3), np.random.default_rng(0)).save(tmp_path / "10.png")
    (tmp_path / "data.json").write_text(json.dumps(records))
    splits = training_pairs(
        DataSource(tmp_path), val_data=None, val_split=0.1, seed=0,
        find_copies=lambda paths: find_near_duplicates(paths, cache_dir=None, num_workers=0),
    )  # fmt: skip
    assert (len(splits["train"]), len(splits["val"])) == (9, 3)
    assert "1 image of val is a near-duplicate of train images" in caplog.text
    assert "3.png and " in caplog.text and "10.png" in caplog.text


@pytest.mark.parametrize("join", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_copies_stay_on_one_side_or_are_told(tmp_path: Path, join: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = make_with_copies(tmp_path / "data")
    found = find_near_duplicates(load_pairs(folder).paths, cache_dir=None, num_workers=0)
    num_split = 0
    for seed in range(12):
        splits = training_pairs(
            DataSource(folder), val_data=None, val_split=0.3, seed=seed, join=join, find_copies=lambda _: found
        )
        assert len(splits["val"]) == num_asked(39, 0.3)
        val = {Path(path).stem for path in splits["val"].paths}
        for i in range(3):
            assert (f"{i:02}" in val) == (f"same-{i}" in val)
            num_split += len({name in val for name in (f"{i:02}", f"crop-{i}", f"jpeg-{i}")}) > 1
    assert (num_split == 0) == join
    assert ("near-duplicates of train images" in caplog.text) != join
    assert ("brings its copies along" in caplog.text) == join


@pytest.mark.slow
def test_a_validation_set_of_its_own_is_compared_with_the_training_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, held = make_with_copies(tmp_path / "data"), tmp_path / "held"
    held.mkdir()
    for i in range(3):
        encoded(photo(i + 10), np.random.default_rng(0)).save(held / f"{i}.png")
    (held / "data.json").write_text(json.dumps([{"image": f"{i}.png", "caption": f"held {i}"} for i in range(3)]))
    splits = training_pairs(
        DataSource(folder), val_data=str(held), val_split=0.3, seed=0,
        find_copies=lambda paths: find_near_duplicates(paths, cache_dir=None, num_workers=0),
    )  # fmt: skip
    assert (len(splits["train"]), len(splits["val"])) == (39, 3)
    assert "3 images of val are near-duplicates of train images" in caplog.text
