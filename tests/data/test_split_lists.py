import logging
from collections import Counter
from pathlib import Path

import pytest

from cliptune.data.formats import read_index
from cliptune.data.table import Row


def read(folder: Path, lists: dict[str, str], *, name: str = "Flickr8k.token.txt", images: int = 10) -> list[Row]:
    table = name.endswith("csv")
    lines = ["image,caption"] if table else []
    lines += [f"img/{number:03}.jpg{',' if table else '#0' + chr(9)}kite {number}" for number in range(images)]
    (folder / name).write_text("\n".join(lines))
    for file, text in lists.items():
        (folder / file).write_text(text)
    return list(read_index(folder / name).rows)


def names(*numbers: int, ending: str = ".jpg") -> str:
    return "".join(f"{number:03}{ending}\n" for number in numbers)


FLICKR8K = {
    "Flickr_8k.trainImages.txt": names(*range(6)),
    "Flickr_8k.devImages.txt": names(6, 7),
    "Flickr_8k.testImages.txt": names(8),
}


@pytest.mark.parametrize("index", ["Flickr8k.token.txt", "captions.csv"])
def test_official_lists_are_the_splits(index: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rows = read(tmp_path, FLICKR8K, name=index)
    assert [row.split for row in rows] == [*["train"] * 6, "val", "val", "test"]
    assert "train 6, val 2, test 1 images; 1 image in none of them left out" in caplog.text


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"train.txt": names(*range(6), ending=""), "val.txt": names(6, 7)}, {"train": 6, "val": 2, "test": 2}),
        ({"flickr30k_test.txt": names(1, 2)}, {"train": 8, "test": 2}),
        ({"val_list.txt": "img/003.jpg\r\n\r\nimg/004.jpg"}, {"train": 8, "val": 2}),
        ({"train.txt": names(*range(10)), "test.txt": names(3)}, {"train": 9, "test": 1}),
    ],
)
def test_lists_of_other_names(lists: dict[str, str], expected: dict[str, int], tmp_path: Path) -> None:
    assert Counter(row.split for row in read(tmp_path, lists)) == expected


@pytest.mark.parametrize(
    "lists",
    [
        {"train.txt": "0 0.5 0.5 0.1 0.1\n", "notes.txt": names(1), "classes_test.txt": "kite\nboat\n"},
        {"train.txt": names(*range(50, 60))},
    ],
)
def test_other_files_are_no_lists(lists: dict[str, str], tmp_path: Path) -> None:
    assert {row.split for row in read(tmp_path, lists)} == {None}


def test_splits_of_the_index_come_first(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(names(0, 1))
    (tmp_path / "data.csv").write_text("image,caption,split\n000.jpg,x,val\n001.jpg,y,\n")
    assert [row.split for row in read_index(tmp_path / "data.csv").rows] == ["val", None]


def test_flickr8k_itself(real_data: Path) -> None:
    rows = read_index(real_data / "annotations/Flickr8k.token.txt").rows
    assert Counter(row.split for row in rows) == {"train": 6000, "val": 1000, "test": 1093}
