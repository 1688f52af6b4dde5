"""Captions in files beside images, in captions/, or in the names of folders and files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cliptune.data.caption_files import read_directory
from cliptune.data.pairs import DataSource, load_pairs
from data_loader import ImageTextDataset
from tests.helpers.datasets import make_images, read_rows, write_files


def test_images_and_captions(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a/x.JPG", "images/y.png", "images/z.png", "images/z.jpg", "captions/q.txt", text="q")
    write_files(tmp_path, "captions/a/x.txt", text="one\n\ntwo\n")
    write_files(tmp_path, "captions/z.txt", text="clash\n")
    index = read_directory(tmp_path)
    assert index.form == "directory"
    assert [(row.image, row.captions) for row in index.rows] == [("images/a/x.JPG", ("one", "two"))]
    assert [str(issue) for issue in index.issues.first] == [
        "images/z.jpg: clashes with images/z.png", "images/y.png: no captions (no captions/y.txt)",
        "captions/q.txt: captions without an image (no images/q.*)",
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["txt", "caption", "TXT"])
@pytest.mark.parametrize("folder", ["", "img/10_kite/", "images/", "a.b/c.d/"])
def test_captions_beside_images(ending: str, folder: str, tmp_path: Path) -> None:
    make_images(tmp_path, f"{folder}1.png", f"{folder}2.v2.png")
    write_files(tmp_path, f"{folder}1.{ending}", text="\ufeffone\r\n\r\ntwo\r\n")
    write_files(tmp_path, f"{folder}2.v2.{ending}", text="three")
    pairs = load_pairs(tmp_path)
    assert [pairs.captions_of(row) for row in range(2)] == [["one", "two"], ["three"]]
    assert list(pairs.groups) == list(pairs.paths)  # kohya's 10_kite is no group


@pytest.mark.parametrize(("image", "text"), [("IMG_1.JPG", "img_1.txt"), ("Tag/ä.png", "tag/A\u0308.TXT")])
@pytest.mark.parametrize("apart", [False, True])
def test_captions_are_found_in_another_case(
    image: str, text: str, apart: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not apart and Path(image).parent.name:
        make_images(tmp_path, "tag/other.png")  # which the folder of the captions has to have
        write_files(tmp_path, "tag/other.txt", text="other")
    make_images(tmp_path, f"images/{image}" if apart else image)
    write_files(tmp_path, f"captions/{text}" if apart else text, text="one")
    with caplog.at_level("INFO"):
        pairs = load_pairs(tmp_path)
    captions = {Path(path).name: pairs.captions_of(row) for row, path in enumerate(pairs.paths)}
    assert captions[Path(image).name] == ["one"]
    assert pairs.issues.count == 0
    assert f"{tmp_path}: 1 image: captions found in another case or Unicode form" in caplog.text


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("ending", ["txt", "caption"])
def test_captions_may_be_behind_the_whole_name(
    ending: str, apart: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, texts = ("images/", "captions/") if apart else ("", "")
    make_images(tmp_path, *(f"{images}{name}" for name in ("1.png", "b/Ä.PNG", "own.png", "two.png", "two.png.png")))
    write_files(tmp_path, f"{texts}1.png.{ending}", f"{texts}b/A\u0308.png.{ending}", text="whole")
    write_files(tmp_path, f"{texts}own.txt", text="own")
    write_files(tmp_path, f"{texts}own.png.{ending}", f"{texts}two.png.{ending}", text="of another")
    (tmp_path / f"{texts}1.json").write_text('{"width": 3}')
    with caplog.at_level("INFO"):
        index = read_directory(tmp_path)
    captions = {row.image.removeprefix(images): row.captions for row in index.rows}
    of_another = {"two.png.png": ("of another",)}
    assert captions == {"1.png": ("whole",), "b/Ä.PNG": ("whole",), "own.png": ("own",), **of_another}
    assert f"{tmp_path}: 2 images: captions found behind the whole name, as of a.jpg in a.jpg.txt" in caplog.text
    assert "another case" not in caplog.text
    assert [str(issue).partition(" (")[0] for issue in index.issues.first] == [
        f"{images}two.png: no captions", f"{texts}own.png.{ending}: captions without an image",
    ]  # fmt: skip


def test_only_whole_names_make_a_data_set_but_for_json(tmp_path: Path) -> None:
    make_images(tmp_path, "1.png", "2.png")
    (tmp_path / "1.png.json").write_text('{"title": "1.png"}')
    with pytest.raises(ValueError, match="2 images and no captions"):
        read_directory(tmp_path)
    (tmp_path / "1.png.json").unlink()
    write_files(tmp_path, "1.png.txt", "2.png.txt", text="whole")
    assert list(load_pairs(tmp_path).captions) == ["whole", "whole"]


def test_images_that_differ_by_case_share_no_captions(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "A.png", "b.png")
    write_files(tmp_path, "a.txt", "b.txt", text="one")
    index = read_directory(tmp_path)
    assert [row.image for row in index.rows] == ["b.png"]
    assert [str(issue) for issue in index.issues.first] == ["A.png: clashes with a.png"]


def test_captions_apart_may_end_in_caption(tmp_path: Path) -> None:
    make_images(tmp_path, "Images/1.png")
    write_files(tmp_path, "Captions/1.caption", text="one")
    assert read_rows(tmp_path) == [("Images/1.png", ["one"], None)]


def test_what_has_no_counterpart_beside_it_is_an_issue(tmp_path: Path) -> None:
    names = ["ok.png", "bare.png", "blank.png", "latin.png", "pipe.png", "big.png"]
    make_images(tmp_path, *names)
    write_files(tmp_path, "ok.txt", "lost.txt", "drawing.txt", "readme.txt", "classes.txt", text="fine\n")
    write_files(tmp_path, "blank.txt", "drawing.mp4", "settings.json", text="\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    os.mkfifo(tmp_path / "pipe.txt")
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(1 << 25)
    index = read_directory(tmp_path)
    assert [row.image for row in index.rows] == ["ok.png"]
    assert [str(issue).partition("; save")[0] for issue in index.issues.first] == [
        "bare.png: no captions (no bare.txt)",
        "big.png: big.txt: a file of 33,554,432 bytes; at most 16,777,216 are read",
        "blank.png: no caption in blank.txt",
        "latin.png: latin.txt: not UTF-8 at byte 3",
        "pipe.png: pipe.txt: not a file",
        "drawing.txt: captions without an image (drawing.mp4 is no image)",
        "lost.txt: captions without an image (no lost.*)",
    ]  # fmt: skip


def test_texts_in_folders_without_images_are_no_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, "img/5_boat/1.png")
    write_files(tmp_path, "img/5_boat/1.txt", "sample_prompts.txt", "old/1.txt", text="x")
    index = read_directory(tmp_path)
    assert (len(index.rows), index.issues.count) == (1, 0)
    assert "1 file is not read, in folders without images: old/1.txt" in caplog.text


def img2dataset(folder: Path, number: int, *, caption: str | None = "x", status: str = "success", **extra: str) -> None:
    """Write what img2dataset's files output has of one address."""
    name = f"{number // 10:05}/{number:09}"
    if status == "success":
        make_images(folder, f"{name}.jpg")
    values = {"caption": caption, "key": f"{number:09}", "status": status, "url": "https://x/y.jpg", **extra}
    write_files(folder, f"{name}.json", text=json.dumps(values))
    write_files(folder, f"{name}.txt", text=caption or "")


def test_img2dataset_files(tmp_path: Path) -> None:
    img2dataset(tmp_path, 0, caption="one\ntwo", alt="an alt")
    img2dataset(tmp_path, 1, status="failed_to_download")
    img2dataset(tmp_path, 2, caption=None)
    img2dataset(tmp_path, 10, alt="other")
    write_files(tmp_path, "00000.parquet", "00000_stats.json", "00001.parquet", "00001_stats.json", text="{}")
    expected = [("00000/000000000.jpg", ["one\ntwo"], None), ("00001/000000010.jpg", ["x"], None)]
    assert read_rows(tmp_path, max_skipped_fraction=0.5) == expected  # a caption of two lines is one
    issues = load_pairs(DataSource(tmp_path, max_skipped_fraction=0.5)).issues
    assert list(map(str, issues.first)) == ["00000/000000002.jpg: no caption in 00000/000000002.txt"]
    assert read_rows(tmp_path / "00000", max_skipped_fraction=0.5) == [("000000000.jpg", ["one\ntwo"], None)]
    alt = read_rows(tmp_path, captions_from="json", caption_key="alt", max_skipped_fraction=0.5)
    assert [row[1] for row in alt] == [["an alt"], ["other"]]
    assert read_rows(tmp_path, captions_from="txt", max_skipped_fraction=0.5)[0][1] == ["one", "two"]


def test_json_may_have_its_captions_under_another_name(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    write_files(tmp_path, "a.json", "b.json", text='{"text": "from the JSON"}')
    write_files(tmp_path, "a.txt", text="from the text")
    assert [row[1] for row in read_rows(tmp_path)] == [["from the text"], ["from the JSON"]]


def test_an_inner_key_names_a_text_in_json(tmp_path: Path) -> None:
    make_images(tmp_path, "1.png", "2.png")
    (tmp_path / "1.json").write_text('{"caption": {"en": "a cat", "de": "eine Katze"}}')
    (tmp_path / "2.json").write_text('{"caption": "plain"}')
    index = read_directory(tmp_path, caption_key="caption.de")
    assert [(row.image, row.captions) for row in index.rows] == [("1.png", ("eine Katze",))]
    assert [str(issue) for issue in index.issues.first] == ["2.png: no caption in 2.json"]


def test_of_two_images_of_a_caption_the_usual_one_is_meant(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png")
    write_files(tmp_path, "a.psd", "a.txt", text="x")
    assert read_rows(tmp_path) == [("a.png", ["x"], None)]


def test_json_beside_an_image_may_be_something_else(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    write_files(tmp_path, "a.json", text='{"shapes": [], "imagePath": "a.png"}')
    write_files(tmp_path, "b.json", text="{")
    write_files(tmp_path, "a.txt", "b.txt", text="from the text")
    assert [row[1] for row in read_rows(tmp_path)] == [["from the text"]] * 2


def test_folders_as_captions(tmp_path: Path) -> None:
    names = ["red_kite/1.png", "a/b/great-auk/2.png", "001.Black_footed_Albatross/3.png", "10_boat/4.png", "7/5.png"]
    make_images(tmp_path, *names, "6.png")
    options: Any = {"captions_from": "folder", "max_skipped_fraction": 0.5}
    found = {name: captions for name, captions, _ in read_rows(tmp_path, **options)}
    assert [found[name] for name in names] == [
        ["a photo of a red kite"], ["a photo of a great auk"], ["a photo of a Black footed Albatross"],
        ["a photo of a boat"], ["a photo of a 7"],
    ]  # fmt: skip
    issues = load_pairs(DataSource(tmp_path, **options)).issues
    assert list(map(str, issues.first)) == ["6.png: in no folder that names its class"]
    assert read_rows(tmp_path / "a/b", caption_template="{}, {{ok}}", **options)[0][1] == ["great auk, {{ok}}"]


def test_folders_as_captions_in_split_folders(tmp_path: Path) -> None:
    make_images(tmp_path, "set/train/kite/1.png", "set/val/kite/1.png", "set/test/boat/1.png")
    assert read_rows(tmp_path, captions_from="folder") == [
        ("set/test/boat/1.png", ["a photo of a boat"], "test"),
        ("set/train/kite/1.png", ["a photo of a kite"], "train"),
        ("set/val/kite/1.png", ["a photo of a kite"], "val"),
    ]  # fmt: skip


def test_file_names_as_captions(tmp_path: Path) -> None:
    make_images(
        tmp_path, "a red kite.png", "x/a_blue-boat.v2.png", "e\u0301cole.png", "0001.png", "same.png", "same.jpg"
    )
    write_files(tmp_path, "data.json", "a red kite.txt", text="[]")  # names were asked for
    found = read_rows(tmp_path, captions_from="filename", max_skipped_fraction=0.5)
    assert sorted(captions for _, captions, _ in found) == [
        ["a blue boat.v2"], ["a red kite"], ["same"], ["same"], ["\u00e9cole"],
    ]  # fmt: skip
    dataset = ImageTextDataset(tmp_path / "x", captions_from="filename", caption_template="a drawing of {}")
    assert dataset.pairs.captions[0] == "a drawing of a blue boat.v2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions_from": "folders"}, "captions_from 'folders'"),
        ({"captions_from": "folder", "caption_template": "a photo"}, r"has no {}"),
        ({"caption_template": "a {}"}, "needs captions_from folder or"),
        ({"captions_from": "txt", "caption_template": "a {}"}, "needs captions_from folder or"),
    ],
)
def test_settings_of_names_are_checked(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DataSource(tmp_path, **options)  # type: ignore[arg-type]


def test_captions_from_is_for_folders(tmp_path: Path) -> None:
    write_files(tmp_path, "data.csv")
    with pytest.raises(ValueError, match=r"data\.csv: captions_from txt is for a folder of images, and this is a file"):
        load_pairs(DataSource(tmp_path / "data.csv", captions_from="txt"))
    with pytest.raises(ValueError, match="not for shards"):
        DataSource("{00..03}.tar", captions_from="txt")


def test_linked_folders_are_entered_but_in_no_circle(tmp_path: Path) -> None:
    disk, data = tmp_path / "disk", tmp_path / "data"
    make_images(disk, "images/x.png", "images/deep/y.png", "images/.hidden/z.png")
    write_files(disk, "captions/x.txt", "captions/deep/y.txt", text="a dog")
    for part in ("images", "captions"):
        (data / part).mkdir(parents=True)
        (data / part / "cats").symlink_to(disk / part)
        (data / part / "cats again").symlink_to(disk / part)
        (data / part / "up").symlink_to("..")
        (data / part / "root").symlink_to("/")
    (disk / "images" / "back").symlink_to(data / "images")
    found = read_directory(data)
    assert not found.issues.count
    assert sorted(found.rows.images) == [
        "images/cats again/deep/y.png", "images/cats again/x.png", "images/cats/deep/y.png", "images/cats/x.png",
    ]  # fmt: skip


@pytest.mark.parametrize("split", ["", "train/"])
def test_linked_folders_of_other_forms(split: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    make_images(disk, "kite/a.png", "kite/deep/b.png")
    write_files(disk, "kite/a.txt", "kite/deep/b.txt", text="x")
    (disk / "kite/up").symlink_to(disk)
    (disk / "kite/self").symlink_to(disk / "kite/self")
    (tmp_path / "data" / "self").parent.mkdir()
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data" / "self")
    (tmp_path / "data" / split).mkdir(exist_ok=True)
    (tmp_path / "data" / split / "linked").symlink_to(disk / "kite")
    (tmp_path / "data" / "val").mkdir()
    (tmp_path / "data" / "val" / "linked").symlink_to(disk / "kite/deep")
    for options in ({}, {"captions_from": "folder"}):
        pairs = load_pairs(DataSource(tmp_path / "data", max_skipped_fraction=1, **options))  # type: ignore[arg-type]
        assert str(disk / "kite/a.png") in list(pairs.paths)
