from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cliptune.data import parquet
from cliptune.data.formats import read_index
from cliptune.data.identity import file_identities
from cliptune.data.pairs import DataSource, load_pairs
from cliptune.data.table import Strings
from cliptune.preprocess.decode import load_image, read_bytes
from data_loader import ImageTextDataset
from data_loader import main as data_loader
from tests.helpers.datasets import make_images, make_parquet, png_bytes
from tests.helpers.runs import check_data

IMAGES = [{"bytes": png_bytes(number), "path": f"{number}.png"} for number in range(4)]
CAPTIONS = list("abcd")


def write(folder: Path, columns: dict[str, Any], name: str = "data.parquet", **options: Any) -> Path:
    pq.write_table(pa.table(columns), folder / name, **options)
    return folder / name


def check_pairs(path: Path, num_images: int = 4) -> None:
    pairs = load_pairs(path)
    assert [read_bytes(image) for image in pairs.paths] == [png_bytes(number) for number in range(num_images)]
    assert list(pairs.captions) == CAPTIONS[:num_images]


@pytest.mark.parametrize("rows_per_group", [1, 3, 4])
def test_images_of_the_hub_are_read_in_place(rows_per_group: int, tmp_path: Path) -> None:
    path = write(tmp_path, {"image": IMAGES, "caption": CAPTIONS}, row_group_size=rows_per_group)
    check_pairs(tmp_path)
    assert load_pairs(path).paths[2] == f"{tmp_path}/data.parquet@3/image"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["image", "jpg", "pixel.data", "image_bytes"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())], ids=str)
def test_a_column_of_bytes_holds_images_whatever_its_name(kind: pa.DataType, name: str, tmp_path: Path) -> None:
    bytes_of = pa.array([image["bytes"] for image in IMAGES], pa.binary()).cast(kind)
    # a column of paths does not win over the images themselves, nor do bytes that are no image
    check_pairs(
        write(tmp_path, {"filename": list("wxyz"), "hash": [b"\x80\x81"] * 4, name: bytes_of, "caption": CAPTIONS})
    )


def test_a_struct_may_have_further_fields(tmp_path: Path) -> None:
    images = [{"height": 8, "path": None, "bytes": image["bytes"], "width": 8} for image in IMAGES]
    check_pairs(write(tmp_path, {"image": images, "caption": CAPTIONS}))


def test_a_row_without_bytes_has_a_path_or_is_an_issue(tmp_path: Path) -> None:
    make_images(tmp_path, "1.png")
    images = [IMAGES[0], {"bytes": None, "path": "1.png"}, {"bytes": None, "path": None}, None]
    path = write(tmp_path, {"image": images, "caption": CAPTIONS}, row_group_size=1)
    pairs = load_pairs(DataSource(path, max_skipped_fraction=0.5))
    assert list(pairs.paths) == [f"{tmp_path}/data.parquet@1/image", str(tmp_path / "1.png")]
    assert [str(issue) for issue in pairs.issues.first] == [
        "data.parquet: row 3: image is null, not text",
        "data.parquet: row 4: image is null, not text",
    ]


def test_images_are_not_read_to_list_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_parquet(tmp_path / "data.parquet", 40, rows_per_group=10)
    read = parquet._parquet_rows

    def only_texts(file: Any, columns: Sequence[str], batch_size: int) -> Any:
        assert list(columns) == ["caption", "image.path"]
        return read(file, columns, batch_size)

    monkeypatch.setattr(parquet, "_parquet_rows", only_texts)
    assert len(read_index(path).rows) == 40


def test_an_image_that_is_missing_later_is_an_issue_once_it_is_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [*IMAGES * 10, {"bytes": None, "path": "0.png"}, None]
    path = write(tmp_path, {"image": images, "caption": list(map(str, range(42)))})
    assert check_data(path, tmp_path) == 1
    out = capsys.readouterr().out
    assert "data.parquet@41/image: the row holds no bytes" in out
    assert "data.parquet@42/image: the row holds no bytes" in out


def test_a_row_a_caption_is_one_image(tmp_path: Path) -> None:
    """Images repeat; the name alone, which may be that of every image, does not say so."""
    images = [image for image in IMAGES for _ in range(3)]
    captions = [f"{name} {number}" for name in CAPTIONS for number in range(3)]
    pairs = load_pairs(write(tmp_path, {"image": images, "caption": captions}, row_group_size=4))
    assert [read_bytes(path) for path in pairs.paths] == [png_bytes(number) for number in range(4)]
    assert [pairs.captions_of(row) for row in range(4)] == [captions[row : row + 3] for row in (0, 3, 6, 9)]
    images = [{"bytes": image["bytes"], "path": "image.png"} for image in images]
    assert len(load_pairs(write(tmp_path, {"image": images, "caption": captions}))) == 10  # the first three are one


def test_only_paths_in_a_struct_are_paths(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{number}.png" for number in range(4)))
    images = [{"bytes": None, "path": image["path"]} for image in IMAGES]
    pairs = load_pairs(write(tmp_path, {"image": images, "caption": CAPTIONS}))
    assert [Path(path).name for path in pairs.paths] == [image["path"] for image in IMAGES]


def test_text_that_is_not_marked_as_text_is_text(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{number}.png" for number in range(4)))
    images = [f"{number}.png".encode() for number in range(4)]
    captions = [caption.encode() for caption in CAPTIONS[:3]] + [b"\xff"]
    pairs = load_pairs(DataSource(write(tmp_path, {"image": images, "caption": captions}), max_skipped_fraction=0.3))
    assert list(pairs.captions) == CAPTIONS[:3]
    assert [str(issue) for issue in pairs.issues.first] == ["data.parquet: row 4: text is not UTF-8"]


def test_a_column_of_paths_counts_where_the_images_column_is_empty(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{number}.png" for number in range(4)))
    empty = pa.array([None] * 4, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    names = [f"{number}.png" for number in range(4)]
    assert len(load_pairs(write(tmp_path, {"image": empty, "file_name": names, "caption": CAPTIONS}))) == 4


@pytest.mark.parametrize("content", [b"x", {"bytes": b"x", "path": None}])
def test_lists_of_images_are_refused_by_name(content: Any, tmp_path: Path) -> None:
    path = write(tmp_path, {"image": [[content]], "caption": ["x"]})
    with pytest.raises(ValueError, match="the column 'image' holds lists of images: give each image a row"):
        read_index(path)


def test_a_file_of_images_needs_its_ending(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": IMAGES, "caption": CAPTIONS}, name="data.bin")
    with pytest.raises(ValueError, match=r"data\.bin holds images: rename it to end in \.parquet"):
        read_index(path)


def test_a_link_to_a_file_of_another_name_is_read(tmp_path: Path) -> None:
    """As the Hub's cache has them."""
    (tmp_path / "blobs").mkdir()
    make_parquet(tmp_path / "x.parquet", 4).rename(tmp_path / "blobs" / "0a1b")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").symlink_to("../blobs/0a1b")
    paths = load_pairs(tmp_path / "data").paths
    assert [read_bytes(path) for path in paths] == [png_bytes(number) for number in range(4)]


def test_large_row_groups_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parquet, "_LARGE_GROUP", 2000)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3000)
    read_index(make_parquet(tmp_path / "a.parquet", 100, rows_per_group=10))
    assert not caplog.messages
    read_index(make_parquet(tmp_path / "b.parquet", 100, rows_per_group=50))
    assert "--to_shards" in caplog.text


def test_the_whole_line_reads_images_in_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_parquet(tmp_path / "a" / "data.parquet", 60, rows_per_group=16)
    assert check_data(path, tmp_path, "--num_workers", "2") == 0
    assert "all 60 images can be read" in capsys.readouterr().out
    assert data_loader(["--data_dir", str(path), "--to_shards", str(tmp_path / "b"), "--split", "all"]) == 0
    shards = load_pairs(next((tmp_path / "b").glob("*.tar")))
    assert sorted(map(read_bytes, shards.paths)) == sorted(map(png_bytes, range(60)))
    data_set = ImageTextDataset(path, transform=lambda image: torch.tensor(image.getpixel((0, 0))))
    images = [data_set[row].image for row in range(60)]
    assert [image[0] for image in images if image is not None] == list(range(60))
    files = [tmp_path / f"{number}.png" for number in range(60)]
    for number, file in enumerate(files):
        file.write_bytes(png_bytes(number))
    in_parquet, plain = file_identities(load_pairs(path).paths), file_identities(Strings.of(map(str, files)))
    assert in_parquet.tolist() == plain.tolist()


def test_a_damaged_image_costs_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [*IMAGES[:3], {"bytes": b"no image", "path": "3.png"}]
    path = write(tmp_path, {"image": images, "caption": CAPTIONS})
    assert check_data(path, tmp_path) == 1
    out = capsys.readouterr().out
    assert "data.parquet@4/image: cannot be read as an image" in out
    with pytest.raises(ValueError, match=r"data\.parquet@4/image: cannot be read as an image"):
        load_image(f"{path}@4/image")


def test_keys_and_numbered_captions_count_beside_images(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{number}.png" for number in range(4)))
    other = [{"bytes": png_bytes(9 - number), "path": None} for number in range(4)]
    names = [f"{number}.png" for number in range(4)]
    columns = {"mask": other, "Image": IMAGES, "filename": names, "caption_0": CAPTIONS, "caption_1": names}
    path = write(tmp_path, columns)
    pairs = load_pairs(path)
    assert [read_bytes(image) for image in pairs.paths] == [png_bytes(number) for number in range(4)]
    assert pairs.captions_of(1) == ["b", "1.png"]
    masks = load_pairs(DataSource(path, image_key="mask", caption_key="caption_0")).paths
    assert [read_bytes(image) for image in masks] == [png_bytes(9 - number) for number in range(4)]
    assert Path(load_pairs(DataSource(path, image_key="filename")).paths[3]) == tmp_path / "3.png"
    with pytest.raises(ValueError, match="no row has image_key 'maks'; did you mean mask"):
        load_pairs(DataSource(path, image_key="maks"))
