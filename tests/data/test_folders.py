"""Which form a folder is read in: every layout that people have, told from the others by what lies in it."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliptune.data.folders import find_index
from cliptune.data.pairs import DataSource, load_pairs
from tests.helpers.datasets import make_images, make_index, read_rows, write_files


def found(folder: Path) -> list[tuple[str | None, str]]:
    return [(split, path.relative_to(folder).as_posix()) for split, path in find_index(folder)]


def test_index_files_come_in_the_documented_order(tmp_path: Path) -> None:
    write_files(tmp_path, "notes.txt", text="notes")
    write_files(tmp_path, "pairs.csv")
    assert found(tmp_path) == [(None, "pairs.csv")]
    write_files(tmp_path, "tokens.txt", text="a.png#0\tx\n")
    with pytest.raises(ValueError, match=r"several index files: pairs.csv, tokens.txt; name one with --data_dir FILE"):
        find_index(tmp_path)
    for name in ("metadata.csv", "data.parquet", "data.json"):
        write_files(tmp_path, name)
        assert found(tmp_path) == [(None, name)]
    write_files(tmp_path, "train.json", "dev.csv")
    assert found(tmp_path) == [("train", "train.json"), ("val", "dev.csv")]
    write_files(tmp_path, "train.csv")
    with pytest.raises(ValueError, match=r"several train files: train.csv, train.json"):
        find_index(tmp_path)


def test_files_that_are_plainly_no_index_are_passed_over(tmp_path: Path) -> None:
    write_files(tmp_path, "pairs.csv")
    names = [
        "README.json", "requirements.txt", "stats.json", "00000_stats.json", "dataset_info.json", "classes.txt",
        "config.json", "LICENSE.txt", "00001.parquet", "part.json",
    ]  # fmt: skip
    write_files(tmp_path, *names, "00001/a.png", "part.tar", text="{}\n")
    assert found(tmp_path) == [(None, "pairs.csv")]


@pytest.mark.parametrize("where", ["", "data/"])
def test_the_files_of_a_split_that_the_hub_numbers_are_one(where: str, tmp_path: Path) -> None:
    names = [f"{where}train-0000{n}-of-00002.parquet" for n in range(2)]
    names += [f"{where}validation-00000-of-00001-3fa85f6457174562.parquet", f"{where}test.parquet"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [f"{number}.png"], "caption": [f"number {number}"]}), tmp_path / name)
    make_images(tmp_path / where, *[f"{number}.png" for number in range(4)])
    write_files(tmp_path, "README.md", "dataset_infos.json", text="{}")
    assert found(tmp_path) == list(zip(["train", "train", "val", "test"], names, strict=True))
    assert [row[1:] for row in read_rows(tmp_path)] == [
        (["number 0"], "train"), (["number 1"], "train"), (["number 2"], "val"), (["number 3"], "test"),
    ]  # fmt: skip
    (tmp_path / names[0]).unlink()
    with pytest.raises(ValueError, match=r"are 1 of 2 files: number 0 is missing"):
        find_index(tmp_path)


def test_only_numbers_that_count_files_join_them(tmp_path: Path) -> None:
    write_files(tmp_path, "a/0000.parquet", "a/0001.parquet", "b/flickr_8.parquet", "b/flickr_30.parquet")
    assert found(tmp_path / "a") == [(None, "0000.parquet"), (None, "0001.parquet")]
    with pytest.raises(ValueError, match="several index files"):
        find_index(tmp_path / "b")


def test_split_folders_with_metadata(tmp_path: Path) -> None:
    for split, number in {"train": 1, "dev": 2, "test": 3}.items():
        make_images(tmp_path / split, "a.png")
        write_files(tmp_path / split, "metadata.csv", text=f"file_name,caption\na.png,number {number}\nb.png,gone\n")
    assert read_rows(tmp_path, max_skipped_fraction=0.5) == [
        ("dev/a.png", ["number 2"], "val"), ("test/a.png", ["number 3"], "test"), ("train/a.png", ["number 1"], "train")
    ]  # fmt: skip
    issues = load_pairs(DataSource(tmp_path, max_skipped_fraction=0.5)).issues
    assert [issue.location for issue in issues.first] == [
        "train/metadata.csv: line 3", "dev/metadata.csv: line 3", "test/metadata.csv: line 3",
    ]  # fmt: skip
    assert read_rows(tmp_path / "train", max_skipped_fraction=0.5)[0][1:] == (["number 1"], None)


def test_metadata_above_its_split_folders(tmp_path: Path) -> None:
    make_images(tmp_path, "train/a.png", "test/b.png")
    write_files(tmp_path, "metadata.csv", text="file_name,caption\ntrain/a.png,x\ntest/b.png,x\n")
    assert [row[2] for row in read_rows(tmp_path)] == ["test", "train"]
    write_files(tmp_path, "metadata.csv", text="file_name,caption,split\ntrain/a.png,x,val\ntest/b.png,x,\n")
    assert [row[2] for row in read_rows(tmp_path)] == [None, "val"]


def test_split_folders_of_other_forms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, "Train/a.png", "valid/images/b.png", "test/c.png", "extra/d.png")
    write_files(tmp_path, "Train/a.txt", "valid/captions/b.caption", "extra/d.txt", text="x\n")
    make_index(tmp_path / "test", [{"image": "c.png", "caption": "x"}])
    with caplog.at_level(logging.INFO):
        assert read_rows(tmp_path) == [
            ("Train/a.png", ["x"], "train"), ("test/c.png", ["x"], "test"), ("valid/images/b.png", ["x"], "val")
        ]  # fmt: skip
    assert "not extra/" in caplog.text


def test_a_folder_named_as_a_split_may_be_a_class(tmp_path: Path) -> None:
    make_images(tmp_path, "boat/1.png", "train/2.png", "car/3.png")
    assert read_rows(tmp_path, captions_from="folder") == [
        ("boat/1.png", ["a photo of a boat"], None), ("car/3.png", ["a photo of a car"], None),
        ("train/2.png", ["a photo of a train"], None),
    ]  # fmt: skip


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "train/a.csv", "val/a.csv", "valid/a.csv")
    with pytest.raises(ValueError, match=r"several val folders: val, valid; name one with --data_dir FOLDER"):
        find_index(tmp_path)


def test_splits_inside_images_are_honoured(tmp_path: Path) -> None:
    make_images(tmp_path, "images/train/a.png", "images/val/b.png")
    write_files(tmp_path, "captions/train/a.txt", "captions/val/b.txt", text="x\n")
    assert [row[2] for row in read_rows(tmp_path)] == ["train", "val"]


def test_the_only_folder_is_entered_but_no_circle(tmp_path: Path) -> None:
    write_files(tmp_path, "unzipped/flickr/labels.json", "__MACOSX/unzipped/._flickr")
    assert found(tmp_path) == [(None, "unzipped/flickr/labels.json")]
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle/again").symlink_to("..", target_is_directory=True)
    with pytest.raises(FileNotFoundError, match="no data set"):
        load_pairs(tmp_path / "circle/again/circle")


@pytest.mark.parametrize(
    ("names", "taken", "flag"),
    [
        (("data.json", "images/a.png", "captions/a.txt"), "data.json", "--captions_from txt"),
        (("pairs.json", "images/a.png", "images/a.txt"), "pairs.json", "--captions_from txt"),
        (("a.png", "a.txt", "pairs.json"), "pairs.json", "--captions_from txt"),
        (("train.json", "pairs.json"), "train.json", "--data_dir FILE"),
        (("images/a.png", "captions/a.txt", "one.json", "two.json"), "captions", "--data_dir FILE"),
        (("images/a.png", "captions/a.txt", "images/a.caption"), "captions", "images takes those beside"),
        (("a.png", "a.txt", "a.caption"), "captions of .txt, not of .caption", "--captions_from caption"),
    ],
)
def test_of_two_forms_one_is_taken_and_the_flag_of_the_other_is_said(
    names: tuple[str, ...], taken: str, flag: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        if name.endswith(".png"):
            make_images(tmp_path, name)
        else:
            image = next((other for other in names if other.endswith(".png")), "")
            write_files(tmp_path, name, text=json.dumps([{"image": image or "b.png", "caption": "x"}]))
    make_images(tmp_path, "b.png")
    with caplog.at_level(logging.INFO):
        load_pairs(DataSource(tmp_path, max_skipped_fraction=1))
    [said] = [record.getMessage() for record in caplog.records if flag in record.getMessage()]
    assert taken in said


def test_json_that_names_no_image_is_no_index_of_images_with_captions(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png")
    write_files(tmp_path, "a.txt", text="x\n")
    write_files(tmp_path, "settings.json", text='{"resolution": 512}')
    assert read_rows(tmp_path) == [("a.png", ["x"], None)]


def test_a_test_file_without_captions_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, "a.png", "b.png", "c.png")
    make_index(tmp_path, [{"image": "a.png", "caption": "x"}], "train.json")
    make_index(tmp_path, [{"image": "b.png", "caption": "x"}], "val.json")
    kinds = {
        "csv": "image\nc.png\n", "tsv": "image\tid\nc.png\t3\n", "jsonl": '{"image": "c.png"}\n{"image": "b.png"}\n',
        "json": '{"images": [{"id": 1, "file_name": "c.png"}]}',
        "coco": '{"images": [{"id": 1, "file_name": "c.png"}], "annotations": []}',
        "empty": "image,caption\nc.png,\n", "list": '[{"image": "c.png", "caption": null}]', "names": "c.png\n",
    }  # fmt: skip
    for kind, text in kinds.items():
        path = tmp_path / f"test.{kind if kind in {'csv', 'tsv', 'jsonl', 'json'} else 'json'}"
        path.write_text(text, encoding="utf-8")
        caplog.clear()
        assert [row[2] for row in read_rows(tmp_path)] == ["train", "val"], kind
        assert f"{path} is left out: it has no captions" in caplog.text
        path.unlink()
    make_index(tmp_path, [{"image": "b.png"}], "val.json")
    with pytest.raises(ValueError, match=r"val.json: no caption column"):
        load_pairs(tmp_path)


def test_a_test_folder_without_captions_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, "train/a.png", "val/b.png", "test/c.png")
    write_files(tmp_path, "train/a.txt", "val/b.txt", text="x\n")
    assert [row[2] for row in read_rows(tmp_path)] == ["train", "val"]
    assert "test is left out: it has no captions" in caplog.text
    (tmp_path / "val/b.txt").unlink()
    with pytest.raises(ValueError, match=r"val: 1 image and no captions"):
        load_pairs(tmp_path)


def test_a_damaged_test_file_is_no_test_file_without_captions(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png")
    make_index(tmp_path, [{"image": "a.png", "caption": "x"}], "train.json")
    (tmp_path / "test.json").write_text('[{"image": "c.png"', encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_pairs(tmp_path)
