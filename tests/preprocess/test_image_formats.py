import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

import data_loader
from cliptune.data.pairs import load_pairs
from cliptune.preprocess.decode import image_format, load_image
from cliptune.preprocess.image_formats import IMAGE_ENDINGS, unread_format
from tests.helpers.datasets import make_tar
from tests.helpers.runs import check_data
from tests.helpers.zoo import corners

WRITTEN = {
    "avif": "AVIF", "jp2": "JPEG2000", "jfif": "JPEG", "jpe": "JPEG", "ico": "ICO", "tga": "TGA", "qoi": "QOI",
    "pgm": "PPM", "dib": "DIB", "pcx": "PCX", "sgi": "SGI", "JPG": "JPEG", "TIFF": "TIFF",
}  # fmt: skip
WRITTEN = {ending: form for ending, form in WRITTEN.items() if form in Image.SAVE}  # AVIF and QOI are new in Pillow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory form, with an image of each format."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "images").mkdir()
    (folder / "captions").mkdir()
    for ending, form in WRITTEN.items():
        corners().save(folder / f"images/{ending}.{ending}", form)
        (folder / f"captions/{ending}.txt").write_text(f"one of {ending}\n")
    return folder


def test_the_directory_form_and_token_lines_have_images_of_every_format(folder: Path) -> None:
    pairs = load_pairs(folder)
    assert [Path(path).name for path in pairs.paths] == sorted(f"{ending}.{ending}" for ending in WRITTEN)
    assert all(load_image(path).mode == "RGB" for path in pairs.paths)
    lines = [f"images/{ending}.{ending}#0\tone of {ending}\n" for ending in WRITTEN]
    (folder / "token.txt").write_text("".join(lines))
    assert len(load_pairs(folder / "token.txt")) == len(WRITTEN)


def test_shards_that_are_written_are_read_again(folder: Path, tmp_path: Path) -> None:
    (folder / "images/jp2.jp2").rename(folder / "images/jp2.bin")  # which only its content tells
    lines = [f"images/{each}.{'bin' if each == 'jp2' else each},one of {each}\n" for each in WRITTEN]
    (folder / "data.csv").write_text("image,caption\n" + "".join(lines))
    flags = ["--data_dir", str(folder / "data.csv"), "--split", "all"]
    assert data_loader.main([*flags, "--to_shards", str(tmp_path / "out")]) == 0
    (folder / "images/jp2.bin").rename(folder / "images/jp2.jp2")
    assert sorted(load_pairs(tmp_path / "out/00000.tar").captions) == sorted(f"one of {each}" for each in WRITTEN)


def test_of_two_files_of_one_name_the_common_image_is_meant(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "captions").mkdir()
    for ending in ("tga", "jpg"):
        corners().save(tmp_path / f"images/a.{ending}")
    (tmp_path / "captions/a.txt").write_text("a\n")
    pairs = load_pairs(tmp_path)
    assert ([Path(path).name for path in pairs.paths], pairs.issues.count) == (["a.jpg"], 0)


BOX = b"\0\0\0\x18ftyp"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("svg", b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="x"/>', "SVG, a drawing"),
        ("cr3", BOX + b"crx \0\0\0\1", "a camera's raw file"),
        ("jxl", b"\xff\x0a\0\0", "JPEG XL"),
        ("exr", b"v/1\x01\2\0\0\0", "high dynamic range"),
        ("jpg", b"<!DOCTYPE html><html>", "a web page"),
        ("png", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("heif", BOX + b"isom\0\0\0\1", "a video"),
        ("pdf", b"%PDF-1.4\n", "a document"),
        ("jpeg", b"", "an empty file"),
        ("raw", b"\0\1\2\3", "of no known format"),
    ],
)
def test_what_is_no_image_is_named(
    name: str, content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "captions").mkdir()
    (tmp_path / f"images/a.{name}").write_bytes(content)
    (tmp_path / "captions/a.txt").write_text("a\n")
    assert check_data(tmp_path, tmp_path / "out") != 0
    assert said in capsys.readouterr().out
    make_tar(tmp_path / "0.tar", [(f"a.{name}", content), ("a.txt", b"a")])
    assert check_data(tmp_path / "0.tar", tmp_path / "out") != 0
    assert said in capsys.readouterr().out


def test_a_raw_file_that_begins_with_a_thumbnail_is_refused() -> None:
    buffer, tags = BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    tags[254], tags[330] = 1, 8
    Image.new("RGB", (8, 8)).save(buffer, "TIFF", tiffinfo=tags)
    with pytest.raises(ValueError, match="its first page is a thumbnail"):
        load_image(buffer.getvalue())


def test_heic_is_read_by_its_package_or_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = BytesIO()
    pillow_heif.from_pillow(corners()).save(buffer, quality=95)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(ValueError, match=r"HEIC, .*pip install pillow-heif"):
            load_image(buffer.getvalue())
    assert np.abs(np.asarray(load_image(buffer.getvalue())).astype(int) - np.asarray(corners())).mean() < 8
    assert f".{image_format(buffer.getvalue())}" in IMAGE_ENDINGS
    with pytest.raises(ValueError, match="HEIC"):
        load_image(buffer.getvalue()[:60])


def test_avif_of_another_brand_is_told_from_heic() -> None:
    assert unread_format(BOX + b"mif1\0\0\0\0mif1avifmiaf").count("AVIF") == 1
    assert unread_format(BOX + b"mif1\0\0\0\0mif1heic").startswith("HEIC")
