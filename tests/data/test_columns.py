import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

import data_loader
from cliptune.data.formats import read_index
from cliptune.data.pairs import DataSource, load_pairs
from tests.helpers.datasets import make_images
from tests.helpers.runs import check_data


def read(folder: Path, columns: str, row: str, **keys: str | None) -> list[tuple[str, tuple[str, ...]]]:
    (folder / "data.csv").write_text(f"{columns}\n{row}\n")
    return [(row.image, row.captions) for row in read_index(folder / "data.csv", **keys).rows]


@pytest.mark.parametrize(
    "name",
    [
        "image",
        "Image",
        " IMAGE ",
        "image_path",
        "Image Path",
        "imagePath",
        "image-path",
        "filepath",
        "file_path",
        "file_name",
        "FileName",
        "image_file",
        "image_filename",
        "image_name",
        "img",
        "img_path",
        "img_name",
        "file",
        "path",
        "image_id",
    ],
)
def test_names_of_the_image_column(name: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"{name},caption", "a.jpg,x") == [("a.jpg", ("x",))]
    (tmp_path / "data.jsonl").write_text(json.dumps({name: "a.jpg", "Caption": "x", " Split ": "test"}))
    assert [row[:3] for row in read_index(tmp_path / "data.jsonl").rows] == [("a.jpg", ("x",), "test")]


@pytest.mark.parametrize(
    "name",
    [
        "caption",
        "Caption",
        "captions",
        "TITLE",
        "text",
        "TEXT",
        "sentence",
        "raw",
        "comment",
        "description",
        "prompt",
        "alt_text",
    ],
)
def test_names_of_the_caption_column(name: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"img,{name}", "a.jpg,x") == [("a.jpg", ("x",))]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("image,caption_0,caption_1,caption_10,caption_2", ("a", "b", "d", "c")),
        ("image,caption1,caption2,caption3,other", ("a", "b", "c")),
        ("image,Text 1,Text 2,x,y", ("a", "b")),
        ("image,caption,caption_1,title,y", ("a", "b")),
    ],
)
def test_numbered_columns_are_captions_each(columns: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    assert read(tmp_path, columns, "a.jpg,a,b,c,d") == [("a.jpg", expected)]
    assert read(tmp_path, "image,caption_0,caption_1", 'a.jpg,,"[""x"", ""y""]"') == [("a.jpg", ("x", "y"))]


def test_keys_name_the_columns(tmp_path: Path) -> None:
    columns, row = "what,where,image,caption,a,", "one,a.jpg,b.jpg,two,three,"
    assert read(tmp_path, columns, row, image_key="where", caption_key="what") == [("a.jpg", ("one",))]
    assert read(tmp_path, columns, row, image_key="Where") == [("a.jpg", ("two",))]
    assert read(tmp_path, columns, row, caption_key="what, caption,A") == [("b.jpg", ("one", "two", "three"))]
    assert read(tmp_path, columns, row, image_key="caption", caption_key="image") == [("two", ("b.jpg",))]
    assert read(tmp_path, 'image,"a,b",a', "a.jpg,one,two", caption_key="a,b") == [("a.jpg", ("one",))]
    assert read(tmp_path, "x,y", "a.jpg,one", image_key="x", caption_key="y") == [("a.jpg", ("one",))]
    with pytest.raises(ValueError, match="no row has image_key 'wherre'; did you mean where"):
        read(tmp_path, columns, row, image_key="wherre")
    with pytest.raises(ValueError, match="no row has caption_key 'capt'; did you mean caption"):
        read(tmp_path, columns, row, caption_key="what,capt")


def test_what_is_taken_where_several_columns_could_be_meant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    read(tmp_path, "path,file_name,text,prompt", "a.jpg,b.jpg,x,y")
    assert "images are taken from file_name; --image_key takes another: path" in caplog.text
    assert "captions are taken from text; --caption_key takes another: prompt" in caplog.text
    caplog.clear()
    read(tmp_path, "image,image_id,caption", "a.jpg,7,x")
    assert "taken from" not in caplog.text


def test_what_is_no_column_of_images_or_captions_is_said(tmp_path: Path) -> None:
    for columns, message in {
        "url,caption": "url: it holds addresses: download the images first",
        "image,label": "label: it holds classes: write a caption",
        "image,foo": "no caption column: found image, foo; known: caption.*--caption_key",
        "foo,caption": "no image column: found caption, foo; known: image_path.*--image_key|found foo, caption",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(tmp_path, columns, "a.jpg,x")
    chat = [{"image": "a.jpg", "conversations": [{"from": "gpt", "value": "a kite"}]}]
    (tmp_path / "data.json").write_text(json.dumps(chat))
    with pytest.raises(ValueError, match="conversations: it holds dialogues"):
        read_index(tmp_path / "data.json")


@pytest.mark.slow
def test_a_file_whose_every_row_has_a_new_column_is_read_in_time(tmp_path: Path) -> None:
    rows = [{"image": f"{number}.jpg", f"caption_{number}": "x"} for number in range(3000)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    begin = time.process_time()
    assert len(read_index(tmp_path / "data.jsonl").rows) == 3000
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("value", [7, 1.5, -3, True, None, float("nan"), {"a": 1}])
def test_numbers_are_captions_and_other_values_are_not(value: Any, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.jpg", "caption": ["x", value]}]))
    index = read_index(tmp_path / "data.json")
    is_number = not isinstance(value, bool) and value in {7, 1.5, -3} if not isinstance(value, dict) else False
    assert index.rows[0].captions == (("x", str(value)) if is_number else ("x",))
    assert index.issues.count == (not is_number)


def test_lists_in_cells_are_captions_each(tmp_path: Path) -> None:
    for cell in ('"[""one"", ""two""]"', "\"['one', 'two']\"", "\"['one' 'two']\""):
        assert read(tmp_path, "image,caption", f"a.jpg,{cell}") == [("a.jpg", ("one", "two"))]
    assert read(tmp_path, "image,caption", "a.jpg,[sic] a dog") == [("a.jpg", ("[sic] a dog",))]
    # a table that was made JSON
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.jpg", "caption": '["one", "two"]'}]))
    assert read_index(tmp_path / "data.json").rows[0].captions == ("one", "two")


COCO = {
    "images": [{"id": number, "file_name": f"{number}.png"} for number in range(40)],
    "annotations": [{"image_id": number, "caption": f"kite {number}"} for number in range(25)],
}
KARPATHY = {
    "images": [
        {"filename": f"{number}.png", "sentences": [{"raw": f"kite {number}"}] if number < 25 else []}
        for number in range(40)
    ]
}


@pytest.mark.slow
@pytest.mark.parametrize("content", [COCO, KARPATHY], ids=["coco", "karpathy"])
def test_each_image_without_captions_counts(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    make_images(tmp_path, *(f"{number}.png" for number in range(40)))
    pairs = load_pairs(DataSource(path, max_skipped_fraction=0.5))
    assert (len(pairs), pairs.issues.count, len(pairs.issues.first)) == (25, 15, 1)
    assert data_loader.main(["--data_dir", str(path)]) == 2
    message = capsys.readouterr().err
    assert "15 of 40 records cannot be used: data.json: 15 images have no caption" in message
    assert "more" not in message
    assert check_data(path, tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "15 issues; 25 images can be read"


def test_the_command_line_and_the_class_take_an_image_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(tmp_path, *(f"{number}.png" for number in range(12)))
    rows = [f"{number}.png,gone.png,kite {number},kite {number} again" for number in range(12)]
    path = tmp_path / "data.csv"
    path.write_text("\n".join(["where,image,en,de", *rows]))
    flags = ["--data_dir", str(path), "--image_key", "where", "--caption_key", "en,de"]
    assert data_loader.main(flags) == 0
    assert "12, 24 pairs, 2 captions an image" in capsys.readouterr().out
    dataset = data_loader.ImageTextDataset(path, image_key="where", caption_key="en,de", captions="all")
    assert len(dataset) == 24
