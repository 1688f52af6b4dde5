import json
from pathlib import Path
from typing import Any

import pytest

from cliptune.data.formats import read_index

RECORDS = [
    {"image": "a.jpg", "caption": "one", "n": 1},
    {"image": "b.jpg", "caption": "two", "n": 2},
    {"image": "c.jpg", "caption": "three", "n": 3},
]


def read(folder: Path, content: Any) -> list[tuple[str, tuple[str, ...], str | None]]:
    (folder / "data.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return [(row.image, row.captions, row.split) for row in read_index(folder / "data.json").rows]


EXPECTED = [("a.jpg", ("one",), None), ("b.jpg", ("two",), None), ("c.jpg", ("three",), None)]


@pytest.mark.parametrize("orient", ["records", "split", "index", "columns", "table", "lines"])
def test_tables_as_pandas_writes_them(orient: str, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    options = {"orient": "records", "lines": True} if orient == "lines" else {"orient": orient}
    frame = pandas.DataFrame(RECORDS)
    assert read(tmp_path, frame.to_json(**options)) == EXPECTED
    assert read(tmp_path, frame.set_index("n").to_json(**options)) == EXPECTED
    lists = frame.assign(caption=[["one"], ["two"], ["three"]])
    assert read(tmp_path, lists.to_json(**options)) == EXPECTED


def test_values_without_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'row 1: expected an object, found a list .*orient="records"'):
        read(tmp_path, [["a.jpg", "one"]])


@pytest.mark.parametrize(
    "content",
    [
        {"data": RECORDS},
        {"info": {"version": 1}, "samples": RECORDS},
        {"annotations": RECORDS, "categories": [{"id": 1, "name": "kite"}]},
        {"images": RECORDS},
        {"image": [row["image"] for row in RECORDS], "caption": [[row["caption"]] for row in RECORDS]},
        {row["image"]: {"caption": row["caption"], "n": 1} for row in RECORDS},
        {f"id {number}": row for number, row in enumerate(RECORDS)},
    ],
)
def test_objects_that_hold_records(content: Any, tmp_path: Path) -> None:
    assert read(tmp_path, content) == EXPECTED


@pytest.mark.parametrize(
    "content",
    [
        {"train": RECORDS[:1], "val": RECORDS[1:2], "test": RECORDS[2:]},
        {"Train": RECORDS[:1], "validation": RECORDS[1:2], "testing": RECORDS[2:], "info": {}, "tags": []},
        {"train": {"a.jpg": "one"}, "dev": {"b.jpg": ["two"]}, "test": {"c.jpg": {"caption": "three"}}},
        {"train": RECORDS[:1], "val": [{**RECORDS[1], "split": "train"}], "test": RECORDS[2:], "labels": [{"id": 1}]},
    ],
)
def test_keys_may_be_splits(content: Any, tmp_path: Path) -> None:
    expected = [(*row[:2], split) for row, split in zip(EXPECTED, ("train", "val", "test"), strict=True)]
    assert read(tmp_path, content) == expected


def test_a_lone_object_with_a_list_of_captions_is_a_row(tmp_path: Path) -> None:
    assert read(tmp_path, {"image": "a.jpg", "captions": ["one", "two"]}) == [("a.jpg", ("one", "two"), None)]


def test_a_mapping_of_names_without_an_ending(tmp_path: Path) -> None:
    assert read(tmp_path, {"001": ["one", "two"], "002": ["three"]}) == [
        ("001", ("one", "two"), None), ("002", ("three",), None),
    ]  # fmt: skip


def test_captions_as_plain_texts_in_a_karpathy_file(tmp_path: Path) -> None:
    images = [{"filename": "a.jpg", "split": "val", "sentences": ["one", "two"]}]
    assert read(tmp_path, {"images": images}) == [("a.jpg", ("one", "two"), "val")]


def test_broken_rows_of_tables_count_each(tmp_path: Path) -> None:
    table = {"columns": ["image", "caption"], "data": [["a.jpg", "one"], ["b.jpg"], 3, ["c.jpg", ""]]}
    (tmp_path / "data.json").write_text(json.dumps(table))
    index = read_index(tmp_path / "data.json")
    assert [str(issue) for issue in index.issues.first] == [
        "data.json: row 2: 1 cells, the header has 2",
        "data.json: row 3: expected a list of cells, found a number",
        "data.json: row 4: empty caption",
    ]
    (tmp_path / "data.json").write_text('{"image": ["a.jpg", "b.jpg"], "caption": ["one"]}')
    index = read_index(tmp_path / "data.json")
    assert [str(issue) for issue in index.issues.first] == ["data.json: row 2: no caption"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": RECORDS, "b": RECORDS}, "several keys hold records: a, b; keep one list, or name them train"),
        ({"version": 1, "name": "x"}, r"of no known form \(keys: version, name\)"),
        ({"data": [{"image": "a.jpg", "url": "x"}]}, "no caption column: found image, url"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [0]}]}, "COCO's boxes"),
        ({"images": [], "annotations": []}, "no image column"),
        ({"images": []}, "of no known form|no records"),
        ({"train": {}, "val": {}}, "of no known form"),
    ],
)
def test_other_objects_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)
