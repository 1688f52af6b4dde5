import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.data.snapshot import Snapshot, describe_change, is_reordered, keep_sides, take_snapshots
from cliptune.data.splits import split_pairs

Change = Callable[[Path], None]


def make(folder: Path, num_images: int = 40) -> Path:
    """Make an index of files, which need not be images here."""
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(num_images):
        (folder / "images" / f"{i:02}.png").write_bytes(np.random.default_rng(i).bytes(100 + i))
        records.append({"image": f"images/{i:02}.png", "caption": [f"first caption of {i}", f"second of {i}"]})
    write(folder, records)
    return folder


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "data.json").write_text(json.dumps(records))


def change_records(change: Callable[[list[dict[str, Any]]], object]) -> Change:
    def apply(folder: Path) -> None:
        records = json.loads((folder / "data.json").read_text())
        change(records)
        write(folder, records)

    return apply


def rename(folder: Path) -> None:
    (folder / "images").rename(folder / "pictures")
    index = folder / "data.json"
    index.write_text(index.read_text().replace("images/", "pictures/"))


def splits(folder: Path) -> dict[str, Pairs]:
    return split_pairs(load_pairs(folder), seed=3)


def keep(folder: Path, taken: dict[str, Snapshot]) -> Pairs:
    pairs = load_pairs(folder)
    return keep_sides(pairs, pairs.root, taken)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: None, ""),
        (rename, ""),
        (change_records(lambda records: records[0].update(caption=["second of 0", "first caption of 0"])), ""),
        (change_records(lambda records: records.pop(7)), "1 image gone"),
        (lambda folder: (folder / "images" / "11.png").write_bytes(b"x"), "1 image changed"),
        (change_records(lambda records: records[5].update(caption="another")), "other captions in train"),
        (change_records(lambda records: records[5].update(caption=records[6]["caption"])), "other captions in train"),
    ],
)
def test_what_differs_is_told(tmp_path: Path, change: Change, expected: str) -> None:
    folder = make(tmp_path / "data")
    before = splits(folder)
    declared = {path: split for split, pairs in before.items() for path in pairs.paths}
    change_records(lambda records: [r.update(split=declared[str(folder / str(r["image"]))]) for r in records])(folder)
    taken = take_snapshots(splits(folder))
    change(folder)
    now = take_snapshots(splits(folder))
    assert describe_change(taken, now) == expected
    restored = {split: Snapshot.from_dict(snapshot.to_dict()) for split, snapshot in taken.items()}
    assert describe_change(restored, now) == expected


def test_images_that_come_to_the_other_side_are_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    before = take_snapshots(splits(folder))
    now = take_snapshots(split_pairs(load_pairs(folder), seed=4))
    assert describe_change(before, now) == "8 images on another side of the split"


def test_a_data_set_in_another_place_is_the_same(tmp_path: Path) -> None:
    before = take_snapshots(splits(make(tmp_path / "data")))
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert not describe_change(before, take_snapshots(splits(tmp_path / "moved")))
    # the index here, its images there
    (tmp_path / "index").mkdir()
    shutil.move(tmp_path / "moved" / "data.json", tmp_path / "index")
    source = DataSource(tmp_path / "index", image_dir=tmp_path / "moved")
    assert not describe_change(before, take_snapshots(split_pairs(load_pairs(source), seed=3)))


def test_another_order_of_the_records_is_the_same_data_in_another_order(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    before = take_snapshots(splits(folder))
    change_records(lambda records: records.reverse())(folder)
    now = take_snapshots(splits(folder))
    assert not describe_change(before, now)
    assert is_reordered(before, now) and not is_reordered(before, before)


def test_a_validation_set_of_its_own_may_have_the_same_relative_paths(tmp_path: Path) -> None:
    train, val = make(tmp_path / "train"), make(tmp_path / "val", 5)
    for path in (val / "images").iterdir():
        path.write_bytes(b"other " + path.read_bytes())
    before = take_snapshots({"train": load_pairs(train), "val": load_pairs(val)})
    assert not describe_change(before, take_snapshots({"train": load_pairs(train), "val": load_pairs(val)}))
    train_pairs, val_pairs = load_pairs(train), load_pairs(val)
    assert len(keep_sides(train_pairs, train_pairs.root, before)) == 40
    assert len(keep_sides(val_pairs, train_pairs.root, before)) == 5


def test_copies_are_counted_one_by_one(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", 10)
    for i in (1, 2, 3):
        shutil.copy(folder / "images" / "00.png", folder / "images" / f"0{i}.png")
    before = {"train": take_snapshots({"train": load_pairs(folder)})["train"]}
    change_records(lambda records: [records.pop(1) for _ in range(2)])(folder)
    rename(folder)
    assert describe_change(before, take_snapshots({"train": load_pairs(folder)})) == "2 images gone"


def test_images_keep_their_sides_when_data_is_added(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    before = splits(folder)
    taken = take_snapshots(before)
    for i in range(40, 140):
        (folder / "images" / f"{i}.png").write_bytes(np.random.default_rng(i).bytes(50))
    more = [{"image": f"images/{i}.png", "caption": f"new {i}"} for i in range(40, 140)]
    change_records(lambda records: records.extend(more))(folder)
    drawn = split_pairs(load_pairs(folder), seed=3)
    assert set(drawn["val"].paths) != set(before["val"].paths)
    kept = split_pairs(keep(folder, taken), seed=3)
    assert set(kept["val"].paths) == set(before["val"].paths)
    assert len(kept["train"]) == 140 - len(kept["val"])


def test_an_image_that_is_declared_to_change_sides_is_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    before = splits(folder)
    taken = take_snapshots(before)
    validated, trained = str(before["val"].paths[0]), str(before["train"].paths[0])

    def declare(records: list[dict[str, Any]]) -> None:
        for record in records:
            path = str(folder / str(record["image"]))
            record["split"] = "train" if path == validated else "val" if path == trained else ""

    change_records(declare)(folder)
    kept = keep(folder, taken)
    assert set(load_pairs(folder).paths) - set(kept.paths) == {validated, trained}
    assert not set(split_pairs(kept)["val"].paths) & set(before["train"].paths)
