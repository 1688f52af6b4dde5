import logging
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliptune.data import lookup
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from tests.helpers.datasets import make_images, make_index, make_parquet, make_shards


def load(folder: Path, names: Sequence[str], image_dir: Path | None = None, *, share: float = 0.0) -> Pairs:
    """Read an index of these paths, at most a share of which may miss."""
    index = make_index(folder, [{"image_path": name, "caption": name} for name in names])
    return load_pairs(DataSource(index, image_dir=image_dir, max_skipped_fraction=share))


def found(folder: Path, names: Sequence[str], image_dir: Path | None = None, *, share: float = 0.0) -> list[str]:
    pairs = load(folder, names, image_dir, share=share)
    return [str(Path(path).relative_to(folder.resolve())) for path in pairs.paths]


@pytest.mark.parametrize("written", ["img\\a.png", ".\\img\\a.png", "img\\sub\\..\\a.png", "IMG\\A.PNG"])
def test_backslashes_are_slashes_where_that_finds_the_file(written: str, tmp_path: Path) -> None:
    make_images(tmp_path, "img/a.png", "img/sub/b.png")
    assert found(tmp_path, [written]) == ["img/a.png"]


def test_a_name_with_a_backslash_is_taken_as_it_is(tmp_path: Path) -> None:
    make_images(tmp_path, "img\\a.png", "img/a.png")
    assert found(tmp_path, ["img\\a.png"]) == ["img\\a.png"]


@pytest.mark.parametrize(
    "written",
    [
        "/content/drive/data/img/a.png", "C:\\data\\img\\a.png", "c:/data/img/a.png", "\\\\server\\share\\img\\a.png",
        "../old/img/a.png", "img/a.png", "data/img/a.png", "file:///old/img/a.png", "/old/img/A.PNG", "/old/img/a",
    ],
)  # fmt: skip
def test_image_dir_takes_the_place_of_folders(written: str, tmp_path: Path) -> None:
    make_images(tmp_path, "new/img/a.png", "new/a.png")
    assert found(tmp_path, [written], tmp_path / "new") == ["new/img/a.png"]
    # the longest part of the path that is there, however little that is
    assert found(tmp_path, [written], tmp_path / "new" / "img") == ["new/img/a.png"]


def test_images_are_found_in_the_folders_of_image_dir(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As COCO has them: --image_dir coco serves the captions of train2017/ and of val2017/."""
    make_images(tmp_path, "coco/train2017/1.png", "coco/train2017/2.png", "coco/val2017/2.png", "coco/val2017/a/3.png")
    caplog.set_level(logging.INFO)
    names = ["1.png", "a/3.png", "2.png", "/old/1.png", "https://example.org/1.png"]
    pairs = load(tmp_path, names, tmp_path / "coco", share=0.9)
    assert [Path(path).name for path in pairs.paths] == ["1.png", "3.png"]
    # 2.png might be either, and of an absolute path nothing is left out
    assert [issue.image for issue in pairs.issues.first] == names[2:]
    assert "2 image paths: found in the one folder of --image_dir that has it" in caplog.text
    with pytest.raises(ValueError, match="none of its 1 image is found"):
        load(tmp_path, ["1.png"])
    for number in range(20):  # classes, perhaps
        (tmp_path / "coco" / f"class{number}").mkdir()
    with pytest.raises(ValueError, match="none of its 1 image is found"):
        load(tmp_path, ["1.png"], tmp_path / "coco")


def test_without_image_dir_no_folder_is_replaced(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    with pytest.raises(ValueError, match="1 of 2 records cannot be used"):
        load(tmp_path, ["a.png", "/old/b.png"])


def test_paths_that_would_become_one_are_issues(tmp_path: Path) -> None:
    make_images(tmp_path, "1.png", "2.png", "3.png")
    pairs = load(tmp_path, ["/old/a/1.png", "/old/b/1.png", "/old/a/2.png", "3.png"], tmp_path, share=0.5)
    assert [Path(path).name for path in pairs.paths] == ["2.png", "3.png"]
    assert [str(issue) for issue in pairs.issues.first] == [
        f"data.json: row {row}: several paths of the index end at {tmp_path}/1.png" for row in (1, 2)
    ]


FORMS: tuple[Literal["NFC"], Literal["NFD"]] = ("NFC", "NFD")
NAMES = ["é.png", "İstanbul.png", "straße.PNG", "日本.jpeg", "a.b.png"]


@pytest.mark.parametrize("is_composed", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_unicode_forms_are_found(name: str, is_composed: bool, tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, f"ü/{name}") for form in FORMS)
    written, on_disk = (composed, decomposed) if is_composed else (decomposed, composed)
    make_images(tmp_path, on_disk)
    assert found(tmp_path, [written]) == [on_disk]


@pytest.mark.parametrize("written", ["img/a.PNG", "IMG/a.png", "Img/A.Png", "img/a"])
def test_case_and_a_missing_ending_are_found_where_one_file_fits(written: str, tmp_path: Path) -> None:
    make_images(tmp_path, "img/a.png", "img/b.png")
    (tmp_path / "img" / "a.txt").touch()
    assert found(tmp_path, [written]) == ["img/a.png"]


@pytest.mark.parametrize("written", ["A.pnG", "a"])
def test_where_several_files_fit_none_is_taken(written: str, tmp_path: Path) -> None:
    make_images(tmp_path, "a.PNG", "a.png", "b.png", "a.jpg")
    assert found(tmp_path, ["b.png", written], share=0.5) == ["b.png"]


def test_of_several_that_fit_the_nearest_is_taken(tmp_path: Path) -> None:
    make_images(tmp_path, unicodedata.normalize("NFD", "é.png"), "É.png", "1.5.png", "1.png")
    assert found(tmp_path, [unicodedata.normalize("NFC", "é.png"), "1.5"]) == [
        unicodedata.normalize("NFD", "é.png"),
        "1.5.png",
    ]


def test_another_ending_is_another_file(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    assert found(tmp_path, ["b.png", "a.jpg", "c"], share=0.9) == ["b.png"]


def test_file_addresses_are_paths_and_others_are_named(tmp_path: Path) -> None:
    make_images(tmp_path, "a b#.png")
    (tmp_path / "a b#.png").rename(tmp_path / "a ü%.png")
    address = (tmp_path / "a ü%.png").as_uri()
    pairs = load(tmp_path, [address, "https://example.org/b.png", "s3://bucket/c.png"], share=0.9)
    assert list(pairs.paths) == [str(tmp_path / "a ü%.png")]
    assert [issue.reason for issue in pairs.issues.first] == [
        f"image {name}: an address, not a file" for name in ("https://example.org/b.png", "s3://bucket/c.png")
    ]


def test_escaped_characters_are_taken_where_that_finds_the_file(tmp_path: Path) -> None:
    make_images(tmp_path, "a b.png", "c%20d.png", "c d.png")
    names = ["a%20b.png", "c%20d.png"]
    assert found(tmp_path, names) == ["a b.png", "c%20d.png"]
    assert found(tmp_path, [f"/old/{name}" for name in names], tmp_path) == ["a b.png", "c%20d.png"]


def test_images_in_the_cells_are_named_as_such(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png")
    content = "iVBORw0KGgo/" * 10_000
    pairs = load(tmp_path, ["a.png", content], tmp_path, share=0.9)
    assert pairs.issues.first[0].reason.endswith("too long for a path (an image in base64 must be written to a file)")


def test_what_was_taken_as_what_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, *(f"img/{number}.png" for number in range(40)))
    caplog.set_level(logging.INFO)
    load(tmp_path, [*(f"img\\{number}.png" for number in range(39)), "img\\39"])
    assert [message.removeprefix(str(tmp_path)) for message in caplog.messages] == [
        "/data.json: 40 image paths: backslashes taken as slashes",
        "/data.json: 1 image path: without an ending, which the one image of that name has",
    ]


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    make_images(tmp_path, "store/a.png")
    (tmp_path / "img").symlink_to("store")
    (tmp_path / "b.png").symlink_to("store/a.png")
    assert found(tmp_path, ["IMG/a.png", "b.png", "img/a"]) == ["store/a.png"]


def test_images_inside_other_files_can_be_named(tmp_path: Path) -> None:
    make_parquet(tmp_path / "x.parquet", 3)
    make_shards(tmp_path, 2)
    names = ["x.parquet@2/image", "00.tar@512+75/0000.png"]
    assert found(tmp_path, [*names, "y.parquet@2/image"], share=0.5) == names


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path, *(f"img/{number}.png" for number in range(50)))
    listed = []
    list_folder = os.listdir

    def list_and_note(folder: str) -> list[str]:
        listed.append(folder)
        return list_folder(folder)

    monkeypatch.setattr(os, "listdir", list_and_note)
    assert len(found(tmp_path, [f"img/{number}" for number in range(50)])) == 50
    assert listed == [str(tmp_path / "img")]


def test_the_names_that_are_remembered_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_MAX_LISTED", 25)
    names = [f"{folder}/{number}.png" for number in range(4) for folder in "abcdefgh"]
    make_images(tmp_path, *names)
    assert found(tmp_path, [name.removesuffix(".png") for name in names]) == names


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1), max_size=6))
def test_no_path_is_too_odd_to_look_for(parts: list[str]) -> None:
    finder = lookup.ImageFinder(Path("/nonexistent"), replaces_folders=True)
    assert finder.find("\\".join(parts)) == ""
    assert finder.find("/".join(parts)) == ""
    assert finder.find(quote("/".join(parts))) == ""
