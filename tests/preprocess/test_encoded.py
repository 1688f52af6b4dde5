import base64
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliptune.preprocess import parquet_images
from cliptune.preprocess.decode import archive_of, file_stamp, load_image, read_bytes, read_ends
from cliptune.preprocess.encoded import base64_path, container_of, parquet_path
from tests.helpers.datasets import make_parquet, png_bytes


def rows_of(path: Path, count: int, column: str = "image") -> list[str]:
    return [parquet_path(str(path), row, column) for row in range(1, count + 1)]


@pytest.mark.parametrize("rows_per_group", [1, 7, 100])
def test_images_in_parquet_are_read_in_any_order(rows_per_group: int, tmp_path: Path) -> None:
    paths = rows_of(make_parquet(tmp_path / "x.parquet", 40, rows_per_group=rows_per_group), 40)
    for row in (0, 39, 38, 3, 3, 4, 5, 20, 19, *range(40)):
        assert read_bytes(paths[row]) == png_bytes(row)
    assert load_image(paths[9]).getpixel((0, 0)) == (9, 0, 0)
    assert read_ends(paths[9], 10) == (len(png_bytes(9)), png_bytes(9)[:10], png_bytes(9)[-10:])
    assert archive_of(paths[9]) == container_of(paths[9]) == str(tmp_path / "x.parquet")
    assert file_stamp(paths[9]) == file_stamp(tmp_path / "x.parquet")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())], ids=str)
def test_bytes_of_every_kind_are_read(kind: pa.DataType, tmp_path: Path) -> None:
    images = pa.array([png_bytes(0), None, png_bytes(2)], pa.binary()).cast(kind)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img.jpg": images}), path)
    first, second, third = rows_of(path, 3, "img.jpg")
    assert (read_bytes(first), read_bytes(third)) == (png_bytes(0), png_bytes(2))
    with pytest.raises(OSError, match=r"x\.parquet@2/img\.jpg: the row holds no bytes"):
        read_bytes(second)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    path = make_parquet(tmp_path / "x.parquet", 3)
    for row in (0, 4):
        with pytest.raises(OSError, match=rf"x\.parquet@{row}/image: no such row: the file has 3"):
            read_bytes(parquet_path(str(path), row, "image"))
    with pytest.raises(OSError, match=r"x\.parquet@1/jpg: .*jpg"):
        read_bytes(parquet_path(str(path), 1, "jpg"))
    with pytest.raises(FileNotFoundError, match=r"y\.parquet"):
        read_bytes(parquet_path(str(tmp_path / "y.parquet"), 1, "image"))
    content = path.read_bytes()
    for damaged in (content[:-20], content[:8] + b"\xff" * 200 + content[208:]):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"x\.parquet@1/image: "):
            read_bytes(parquet_path(str(path), 1, "image"))
    path.write_bytes(content)
    assert read_bytes(parquet_path(str(path), 1, "image")) == png_bytes(0)


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    [path] = rows_of(make_parquet(tmp_path / "x.parquet", 1), 1)
    assert read_bytes(path) == png_bytes(0)
    pq.write_table(pa.table({"image": [png_bytes(7)]}), tmp_path / "x.parquet")
    assert read_bytes(path) == png_bytes(7)


def test_what_is_cached_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_images, "CACHE_BYTES", 500)
    monkeypatch.setattr(parquet_images, "_reader", reader := parquet_images._Reader())
    paths = rows_of(make_parquet(tmp_path / "x.parquet", 60, rows_per_group=20), 60)
    for row in (*range(60), *range(59, -1, -1), 7, 45, 7):
        assert read_bytes(paths[row]) == png_bytes(row)
        assert sum(len(content or b"") for content in reader._images.values()) <= 500


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_reads_by_itself(tmp_path: Path) -> None:
    paths = rows_of(make_parquet(tmp_path / "x.parquet", 30), 30)
    assert read_bytes(paths[3]) == png_bytes(3)
    with parquet_images._reader._lock:  # as another thread may hold it
        child = os.fork()
        if not child:
            os._exit(0 if [read_bytes(path) for path in paths] == list(map(png_bytes, range(30))) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read_bytes(paths[4]) == png_bytes(4)


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode], ids=["plain", "url-safe"])
@pytest.mark.parametrize("padding", [True, False])
def test_images_in_base64_are_read(padding: bool, encode: object, tmp_path: Path) -> None:
    assert callable(encode)
    content = png_bytes(5) + bytes(range(256))  # has every letter of the alphabet
    text = encode(content) if padding else encode(content).rstrip(b"=")
    (tmp_path / "x.tsv").write_bytes(b"17\t" + text + b"\n18\t" + b"!" * 40)
    path = base64_path(str(tmp_path / "x.tsv"), 3, len(text), "17")
    assert read_bytes(path) == content
    assert read_ends(path, 10) == (len(content), content[:10], content[-10:])
    with pytest.raises(OSError, match=r"x\.tsv@\d+\+40/18: damaged base64"):
        read_bytes(base64_path(str(tmp_path / "x.tsv"), len(text) + 7, 40, "18"))
