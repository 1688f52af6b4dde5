import json
from pathlib import Path

import pytest

from cliptune.data.formats import read_index
from cliptune.data.pairs import DataSource, load_pairs
from cliptune.preprocess.decode import read_bytes
from tests.helpers.datasets import make_chinese_clip, png_bytes
from tests.helpers.runs import check_data


@pytest.mark.slow
def test_chinese_clips_files_are_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for first, split in enumerate(("train", "valid", "test")):
        make_chinese_clip(tmp_path, split, 10, first=10 * first)
    pairs = load_pairs(tmp_path)
    assert [read_bytes(path) for path in pairs.paths] == list(map(png_bytes, range(30)))
    assert list(pairs.captions) == [f"数字 {number}" for number in range(30)]
    assert pairs.splits.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert pairs.paths[0].startswith(f"{tmp_path}/train_imgs.tsv@5+")
    assert pairs.paths[0].endswith("/1000")
    assert check_data(tmp_path, tmp_path, "--num_workers", "2") == 0
    assert "all 30 images can be read" in capsys.readouterr().out


def test_one_split_is_found_by_its_captions(tmp_path: Path) -> None:
    path = make_chinese_clip(tmp_path, "muge", 3)
    assert read_index(path).form == "chinese-clip"
    assert list(load_pairs(tmp_path).paths) == list(load_pairs(path).paths)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text(f"{lines[1]}\n", encoding="utf-8")  # of one line
    pairs = load_pairs(DataSource(path, max_skipped_fraction=1))
    assert [read_bytes(image) for image in pairs.paths] == [png_bytes(1)]


def test_images_and_captions_belong_together_by_id(tmp_path: Path) -> None:
    path = make_chinese_clip(tmp_path, "train", 5)
    images = tmp_path / "train_imgs.tsv"
    lines = images.read_text().splitlines()
    images.write_text("\r\n".join([lines[0], "", lines[1], lines[0], "1234", *lines[2:]]))  # and no end of line
    texts = [
        {"text_id": 1, "text": "both", "image_ids": [1000, "1004"]},
        {"text_id": 2, "text": "again", "image_ids": [1000]},
        {"text_id": 3, "text": "nobody's", "image_ids": []},
        {"text_id": 4, "text": " ", "image_ids": [1001]},
        {"text_id": 5, "text": "gone", "image_ids": [7]},
        {"text_id": 6, "text": "x", "image_ids": 1000},
    ]
    path.write_text("\n".join(map(json.dumps, texts)) + "\n{", encoding="utf-8")
    index = read_index(path)
    assert [(row.image.rpartition("/")[2], row.captions) for row in index.rows] == [
        ("1000", ("both", "again")),
        ("1004", ("both",)),
    ]
    assert [read_bytes(row.image) for row in index.rows] == [png_bytes(0), png_bytes(4)]
    assert index.rows[1].location == "train_texts.jsonl: line 1"
    assert [str(issue) for issue in index.issues.first] == [
        "train_imgs.tsv: line 4: id '1000' stands twice",
        "train_imgs.tsv: line 5: no image: expected an id, a tab and the image in base64",
        "train_texts.jsonl: line 3: a caption of no image: image_ids is empty",
        "train_texts.jsonl: line 4: empty caption",
        "train_texts.jsonl: line 5: image_ids: train_imgs.tsv has no image 7",
        "train_texts.jsonl: line 6: image_ids is a number, not a list",
        "train_texts.jsonl: line 7: not valid JSON: Expecting property name enclosed in double quotes",
        "train_imgs.tsv: line 6: no caption",
        "train_imgs.tsv: line 7: no caption",
    ]
    assert index.issues.count == 9


def test_half_of_a_pair_of_files_is_named(tmp_path: Path) -> None:
    path = make_chinese_clip(tmp_path, "train", 3)
    with pytest.raises(ValueError, match=r"train_imgs\.tsv: images in base64: name the file of their captions"):
        load_pairs(tmp_path / "train_imgs.tsv")
    (tmp_path / "train_imgs.tsv").rename(tmp_path / "images.tsv")
    with pytest.raises(ValueError, match=r"train_texts\.jsonl: .* there is no train_imgs\.tsv beside it"):
        load_pairs(path)


def test_a_damaged_image_costs_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chinese_clip(tmp_path, "train", 20)
    images = tmp_path / "train_imgs.tsv"
    images.write_bytes(
        images.read_bytes().replace(b"1003\tiVBOR", b"1003\tiV!OR").replace(b"1005\tiVBOR", b"1005\tAAAAA")
    )
    assert check_data(tmp_path, tmp_path) == 1
    out = capsys.readouterr().out
    assert "/1003: damaged base64" in out
    assert "/1005: cannot be read as an image" in out
    assert "2 issues; 18 images can be read" in out
