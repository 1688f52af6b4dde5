import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliptune.data import index as entries
from cliptune.data.caption_files import read_directory
from cliptune.data.folders import find_index
from cliptune.data.formats import read_index
from cliptune.language.catalogue import language_of

EXPECTED = [("a b.jpg", ("one", "two, three")), ("c.png", ("四",))]


def write(folder: Path, text: str, name: str = "index.bin") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


FORMS = {
    "json": json.dumps(
        [
            {"image_path": "a b.jpg", "caption": "one"},
            {"image_path": "c.png", "caption": ["四"]},
            {"image_path": "a b.jpg", "caption": "two, three"},
        ]
    ),
    "jsonl": '{"filename": "a b.jpg", "title": ["one", "two, three"]}\n{"filename": "c.png", "title": "四"}\n',
    "csv": '\ufeffimage,caption\na b.jpg,one\na b.jpg,"two, three"\nc.png,四\n',
    "tsv": "filepath\ttitle\na b.jpg\tone\na b.jpg\ttwo, three\nc.png\t四\n",
    "coco": json.dumps(
        {
            "images": [{"id": 1, "file_name": "a b.jpg"}, {"id": 2, "file_name": "c.png"}],
            "annotations": [
                {"image_id": 1, "caption": "one"},
                {"image_id": 1, "caption": "two, three"},
                {"image_id": 2, "caption": "四"},
            ],
        }
    ),
    "karpathy": json.dumps(
        {
            "images": [
                {"filename": "a b.jpg", "split": "restval", "sentences": [{"raw": "one"}, {"raw": "two, three"}]},
                {"filename": "c.png", "split": "test", "sentences": [{"raw": "四"}]},
            ]
        }
    ),
    "mapping": json.dumps({"a b.jpg": ["one", "two, three"], "c.png": "四"}),
    "token": "a b.jpg#0\tone\na b.jpg#1\ttwo, three\nc.png#zhm#0 四\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_found_by_its_content(form: str, tmp_path: Path) -> None:
    index = read_index(write(tmp_path, FORMS[form]))
    assert index.form == form
    assert [(row.image, row.captions) for row in index.rows] == EXPECTED
    assert index.issues.count == 0


def parquet(folder: Path, columns: dict[str, Any], name: str = "data.parquet", **options: Any) -> Path:
    pq.write_table(pa.table(columns), folder / name, **options)
    return folder / name


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_is_read_by_row_group(text: pa.DataType, tmp_path: Path) -> None:
    images = pa.array(["a b.jpg", "a b.jpg", "c.png"], text)
    captions = pa.array(["one", "two, three", "四"], text)
    path = parquet(tmp_path, {"image": images, "caption": captions, "score": [1.0, None, 2.0]}, row_group_size=2)
    index = read_index(path)
    assert (index.form, index.ignored_columns, index.issues.count) == ("parquet", {"score": 3}, 0)
    assert [(row.image, row.captions) for row in index.rows] == EXPECTED
    assert index.rows[1].location == "data.parquet: row 3"
    assert find_index(tmp_path) == [(None, path)]


def test_parquet_may_hold_lists_and_nothing(tmp_path: Path) -> None:
    columns = {"file_name": ["a.jpg", None, "b.jpg", "c.jpg"], "captions": [["x", "y"], ["x"], None, []]}
    index = read_index(parquet(tmp_path, {**columns, "split": ["val", None, None, None]}))
    assert [(row.image, row.captions, row.split) for row in index.rows] == [("a.jpg", ("x", "y"), "val")]
    assert [str(issue) for issue in index.issues.first] == [
        "data.parquet: row 2: image is null, not text",
        "data.parquet: row 3: caption is null, not text",
        "data.parquet: row 4: no caption",
    ]


def test_a_parquet_cell_that_python_cannot_hold_costs_its_row(tmp_path: Path) -> None:
    encoded = pa.array([b"a.jpg", b"\xff.jpg", b"c.jpg"])
    images = pa.StringArray.from_buffers(3, *encoded.buffers()[1:])
    groups = pa.array([None, None, 2**60], pa.timestamp("us"))
    index = read_index(parquet(tmp_path, {"image": images, "caption": ["x", "y", "z"], "group": groups}))
    assert [row.image for row in index.rows] == ["a.jpg"]
    assert [str(issue) for issue in index.issues.first] == [
        "data.parquet: row 2: text is not UTF-8",
        "data.parquet: row 3: date value out of range",
    ]


@pytest.mark.parametrize("names", [["image", "image", "caption"], ["z", "z", "image", "caption"]])
def test_parquet_with_two_columns_of_one_name_is_refused(names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a.jpg"])] * len(names), names=names), path)
    with pytest.raises(ValueError, match=rf"data\.parquet: column '{names[0]}' stands twice"):
        read_index(path)


def test_damaged_parquet_is_one_clean_error(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"image": ["a.jpg"], "caption": ["x"]})
    content = path.read_bytes()
    for end in range(4, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="damaged Parquet file"):
            read_index(path)
    path.write_bytes(content.replace(b"caption", b"\xffaption"))
    with pytest.raises(ValueError, match=r"data\.parquet: damaged Parquet file"):
        read_index(path)


def test_splits_and_groups_are_read(tmp_path: Path) -> None:
    assert [row.split for row in read_index(write(tmp_path, FORMS["karpathy"])).rows] == ["train", "test"]
    text = '{"image": "a.jpg", "caption": "x", "split": "dev", "group": "g"}\n{"image": "b.jpg", "caption": "y"}'
    assert [row[2:4] for row in read_index(write(tmp_path, text)).rows] == [("val", "g"), (None, None)]


def test_further_columns_are_counted_and_caption_key_picks_one(tmp_path: Path) -> None:
    path = write(tmp_path, '[{"image": "a.jpg", "caption": "x", "caption_zh": "好", "width": 3}]')
    assert read_index(path).ignored_columns == {"caption_zh": 1, "width": 1}
    assert read_index(path, caption_key="caption_zh").rows[0].captions == ("好",)
    with pytest.raises(ValueError, match="did you mean caption_zh"):
        read_index(path, caption_key="captoin_zh")


def test_problems_are_collected_with_their_places(tmp_path: Path) -> None:
    rows = [
        {"image": "ok.jpg", "caption": "fine"},
        {"image": "a.jpg", "caption": " "},
        {"image": "b.jpg", "caption": False},
    ]
    rows += [{"image": None, "caption": "x"}, {"image": "c.jpg", "caption": "x", "split": "tset"}, 7]
    index = read_index(write(tmp_path, json.dumps(rows), "i.json"))
    assert [issue.location.split(":")[1] for issue in index.issues.first] == [
        " row 2",
        " row 3",
        " row 4",
        " row 5",
        " row 6",
    ]
    assert index.issues.first[3].reason == "unknown split 'tset'; known: train, val, test"


@pytest.mark.parametrize(("text", "name"), [
    ("image,caption,split\na.jpg,x,train\nb.jpg,x,1\n", "i.csv"),
    ('[{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": "x", "split": 1}]', "i.json"),
])  # fmt: skip
def test_a_number_is_no_split_and_what_to_do_is_said(text: str, name: str, tmp_path: Path) -> None:
    (issue,) = read_index(write(tmp_path, text, name)).issues.first
    assert "write train, val or test in its place" in issue.reason
    assert "划分" in language_of("zh").say(issue.reason)
    assert "write train" not in language_of("zh").say(issue.reason)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("[]", "it has no records"),
        ('[{"image": "a.jpg", "caption": ""}]', "row 1: empty caption"),
        ('[{"image": "a.jpg",\n "capt', "line 2, column 2"),
        ('[{"pic": "a.jpg", "caption": "x"}]', "no image column: found pic, caption.*--image_key"),
        ('[{"url": "https://a.org/a.jpg", "caption": "x"}]', "url: it holds addresses: download the images first"),
        ('[["a.jpg", "x"]]', r'row 1: expected an object, found a list .*orient="records"'),
        ("a.jpg\nb.jpg\n", "of no known form"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_index(write(tmp_path, text))


HALF_GOOD = {
    "a line that is no JSON": ('{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg",\n', "line 2: not valid JSON"),
    "a quote before another one": ('image,caption\na.jpg,x\nb.jpg,"y \\"z\\""\n', "line 3: not a valid row"),
    "a comma without quotes": ("image,caption\nb.jpg,one, two\na.jpg,x\n", "line 2: 3 cells, the header has 2"),
    "a NUL byte": ("image,caption\nb.jpg,o\0ne\na.jpg,x\n", "line 2: caption holds a NUL byte"),
    "half a character": (r'[{"image": "b.jpg", "caption": "\ud800"}, {"image": "a.jpg", "caption": "x"}]', "row 1"),
    "not a number": (
        '[{"image": "b.jpg", "caption": NaN}, {"image": "a.jpg", "caption": "x"}]',
        "row 1: caption is NaN",
    ),
    "a group that is a list": (
        '[{"image": "b.jpg", "caption": "y", "group": []}, {"image": "a.jpg", "caption": "x"}]',
        "row 1: group is a list",
    ),
}


@pytest.mark.parametrize("case", HALF_GOOD)
def test_a_bad_entry_costs_itself_alone(case: str, tmp_path: Path) -> None:
    text, issue = HALF_GOOD[case]
    index = read_index(write(tmp_path, text))
    assert [(row.image, row.captions) for row in index.rows] == [("a.jpg", ("x",))]
    assert index.issues.count == 1
    assert issue in str(index.issues.first[0])


def test_entries_of_one_image_are_joined(tmp_path: Path) -> None:
    twice = '{"a.jpg": ["x"], "a.jpg": ["y"]}'
    assert read_index(write(tmp_path, twice)).rows[0].captions == ("x", "y")
    half_said = (
        '[{"image": "a.jpg", "caption": "x"}, {"image": "a.jpg", "caption": "y", "split": "val"},'
        ' {"image": "a.jpg", "caption": "z", "split": "test"}]'
    )
    index = read_index(write(tmp_path, half_said))
    assert [(row.captions, row.split) for row in index.rows] == [(("x", "y", "z"), "val")]
    assert "split 'test', but 'val'" in str(index.issues.first[0])


def test_all_rows_choose_the_columns(tmp_path: Path) -> None:
    rows: list[object] = [{}, 3, {"image": "old.jpg", "title": "t"}, {"image": "b.jpg", "caption": "x", "n": 1}]
    rows += [{"image_path": "a.jpg", "title": "t", "caption": "y"}, {"image": "c.jpg", "n": 2}]
    index = read_index(write(tmp_path, json.dumps(rows), "i.json"))
    assert [(row.image, row.captions, row.location) for row in index.rows] == [("a.jpg", ("y",), "i.json: row 5")]
    assert [str(issue)[8:] for issue in index.issues.first] == [
        "row 1: no image_path",
        "row 2: expected an object, found a number",
        "row 3: no image_path",
        "row 4: no image_path",
        "row 6: no image_path",
    ]
    assert index.ignored_columns == {"image": 3, "title": 2, "n": 2}


def test_problems_stand_in_the_order_of_the_rows_and_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "MAX_ISSUES", 100)
    rows = [{"image": "a.jpg", "caption": "x", "split": "val", "group": "g"}, {"image": "b.jpg", "caption": ""}]
    rows += [{"image": "a.jpg", "caption": "y", "split": "test", "group": "h"}, {"image": "c.jpg", "caption": ""}]
    index = read_index(write(tmp_path, json.dumps(rows + 200 * rows[1:3]), "i.json"))
    assert [str(issue) for issue in index.issues.first[:5]] == [
        "i.json: row 2: empty caption",
        "i.json: row 3: 'a.jpg': split 'test', but 'val' at i.json: row 1",
        "i.json: row 3: 'a.jpg': group 'h', but 'g' at i.json: row 1",
        "i.json: row 4: empty caption",
        "i.json: row 5: empty caption",
    ]
    assert (index.issues.count, len(index.issues.first)) == (4 + 600, 100)


def test_a_header_that_holds_a_carriage_return_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: of no known form"):
        read_index(write(tmp_path, "im\rage,caption\na.jpg,x\n"))


def test_lines_end_at_line_ends_only(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "captions").mkdir()
    (tmp_path / "images/a.png").touch()
    (tmp_path / "captions/a.txt").write_text("one\u2028still one\r\ntwo\n", encoding="utf-8", newline="")
    assert read_directory(tmp_path).rows[0].captions == ("one\u2028still one", "two")
    assert len(read_index(write(tmp_path, "image,caption\ra.jpg,x\rb.jpg,y\r")).rows) == 2


@pytest.mark.parametrize("caption", [{"text": "a cat", "id": 7}, [{"raw": "a cat", "tokens": ["a", "cat"]}]])
def test_a_caption_may_be_the_text_of_an_object(caption: Any, tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "captions": caption}, {"image": "b.jpg", "captions": ["b", {"Caption": "c"}]}]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    for path in (write(tmp_path, json.dumps(rows)), tmp_path / "a.parquet"):
        index = read_index(path)
        assert [row.captions for row in index.rows] == [("a cat",), ("b", "c")][: len(index.rows)]
        assert index.issues.count == 0


@pytest.mark.parametrize(
    ("caption", "what"),
    [([{"en": "a", "de": "b"}], "en; de"), ([{"title": "a", "text": "b"}], "title; text"), ({}, "no keys")],
)
def test_an_object_that_does_not_say_which_text_is_meant_is_an_issue(caption: Any, what: str, tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "caption": "a"}, {"image": "b.jpg", "caption": caption}]
    index = read_index(write(tmp_path, json.dumps(rows)))
    assert [issue.reason for issue in index.issues.first] == [
        f"caption is an object of {what}: write the text that is meant in its place"
    ]


TEXTS = {"en": "a cat", "de": ["eine Katze", "ein Tier"], "fr": None}


@pytest.mark.parametrize(("key", "wanted"), [
    ("caption.en", [("a cat",), ("b",)]), ("caption.de,caption.en", [("eine Katze", "ein Tier", "a cat"), ("b",)]),
    ("title,caption.en", [("t", "a cat"), ("b",)]),
])  # fmt: skip
def test_an_inner_key_names_a_text_of_an_object(key: str, wanted: list[tuple[str, ...]], tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "caption": TEXTS, "title": "t", "split": "val"},
        {"image": "b.jpg", "caption": {"en": "b"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = "\n".join(map(json.dumps, rows))
    for path in (
        write(tmp_path, json.dumps(rows), "a.json"),
        write(tmp_path, lines, "a.jsonl"),
        tmp_path / "a.parquet",
    ):
        index = read_index(path, caption_key=key)
        assert [(row.captions, row.split) for row in index.rows] == list(zip(wanted, ["val", None], strict=True))
        assert "caption" not in index.ignored_columns
        with pytest.raises(ValueError, match=r"no row has caption_key 'caption\.it'"):
            read_index(path, caption_key="caption.it")


def test_a_column_of_the_very_name_comes_before_an_inner_key(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "caption": {"en": "inside"}, "caption.en": "outside"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for path in (write(tmp_path, json.dumps([row])), tmp_path / "a.parquet"):
        assert read_index(path, caption_key="caption.en").rows[0].captions == ("outside",)


def test_what_has_no_such_text_inside_is_an_issue(tmp_path: Path) -> None:
    captions = [{"en": "a"}, {"de": "b"}, "c", {"en": None}]
    rows = [{"image": f"{n}.jpg", "caption": caption} for n, caption in enumerate(captions)]
    index = read_index(write(tmp_path, json.dumps(rows)), caption_key="caption.en")
    assert [row.captions for row in index.rows] == [("a",)]
    assert [issue.reason for issue in index.issues.first] == [
        "no caption.en",
        "no caption.en",
        "caption is null, not text",
    ]
    plain = read_index(write(tmp_path, json.dumps(rows[1:]))).issues.first[0].reason
    assert plain.endswith(
        "object of de: name the text that is meant, as in --caption_key COLUMN.de, or write it in its place"
    )
    assert "--caption_key COLUMN.de" in language_of("zh").say(plain)
    assert "name the text" not in language_of("zh").say(plain)


def test_a_lone_object_is_a_row(tmp_path: Path) -> None:
    index = read_index(write(tmp_path, '{\n "image": "a.jpg",\n "caption": "x"\n}'))
    assert [(row.image, row.captions) for row in index.rows] == [("a.jpg", ("x",))]


def test_invalid_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"image": "\xff"}]')
    with pytest.raises(ValueError, match="not UTF-8 at byte 12"):
        read_index(path)


CAPTIONS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(lambda text: text.strip())


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(CAPTIONS, min_size=1, max_size=4))
def test_captions_survive_json_and_csv(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> None:
    folder = tmp_path_factory.mktemp("round")
    expected = tuple(caption.strip() for caption in captions)
    rows = [{"image": "a.jpg", "caption": caption} for caption in captions]
    assert read_index(write(folder, json.dumps(rows))).rows[0].captions == expected
    with (folder / "x").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert read_index(folder / "x").rows[0].captions == expected


REAL = {
    "annotations/coco_captions_val2017.json": ("coco", 5000, 25014),
    "annotations/ucm_karpathy.json": ("karpathy", 2100, 10500),
    "annotations/sydney_karpathy.json": ("karpathy", 613, 3065),
    "annotations/Flickr8k.token.txt": ("token", 8093, 40460),
    "annotations/captions.kaggle.txt": ("csv", 8091, 40455),
    "annotations/flickr8k_zh_test.captions.txt": ("token", 1000, 5000),
    "flickr8k/train.json": ("json", 6000, 30000),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str, real_data: Path) -> None:
    index = read_index(real_data / name)
    assert (index.form, len(index.rows), sum(len(row.captions) for row in index.rows)) == REAL[name]


@pytest.mark.slow
def test_two_forms_of_flickr8k_agree(real_data: Path) -> None:
    tokens = {row.image: row.captions for row in read_index(real_data / "annotations/Flickr8k.token.txt").rows}
    table = {row.image: row.captions for row in read_index(real_data / "annotations/captions.kaggle.txt").rows}
    assert set(tokens) - set(table) == {"2258277193_586949ec62.jpg.1", "2258277193_586949ec62.jpg"} - set(table)
    assert all(sorted(tokens[image]) == sorted(table[image]) for image in table)
