import gzip
import pickle
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pytest

from cliptune.data.formats import read_index


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img/0.jpg,a red kite\nimg/1.jpg,a boat\n", "is no header: add one as the first line, 'image,caption'"),
        ("0.jpg,kite\n", "is no header: add one as the first line, 'image,caption'"),
        ("a red kite\timg/0.jpg\n", "is no header: add one as the first line, 'caption<TAB>image'"),
        ("0;img/0.jpg;a red kite;1\n", "add one as the first line, 'column_1;image;caption;column_4'"),
        ("a kite\thttps://a.org/0.jpg\n", "'caption<TAB>image'; and it holds addresses: download the images first"),
        ("https://a.org/0.jpg\nhttps://a.org/1.jpg\n", "an address without a caption: download the images first"),
        ("img/0.jpg\nimg/1.jpg\n", "a name without a caption: write each line as name.jpg#0<TAB>caption"),
        ("image\nimg/0.jpg\n", "a name without a caption"),
        ("# a comment\nimage,caption\n", "is a comment: remove the lines before the header"),
        ("image caption\n0.jpg a kite\n", "has blanks between its columns: write a tab"),
        ("0.jpg a red kite\n", "has blanks between its columns: write a tab"),
        ("0 0.5 0.5 0.25 0.25\n", "YOLO's boxes"),
        ("<annotation>\n", "XML or HTML"),
        ("foo,bar\nx,y\n", "names no known column: .*--image_key and --caption_key"),
        ("It was a dark and stormy night; the rain fell in torrents, except at occasional intervals.\n", "known forms"),
    ],
)
def test_texts_of_no_known_form_say_what_they_resemble(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_index(path)


def office(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("[Content_Types].xml", "<x/>")
        file.writestr("xl/worksheets/sheet1.xml", "<x/>")


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.csv", "image,caption\n")


KINDS = {
    "an Excel workbook: save it as CSV": office,
    "a ZIP archive: unpack it": archive,
    "an OpenDocument table": lambda path: path.write_bytes(
        b"PK\x03\x04" + bytes(26) + b"mimetypeapplication/vnd.oasis.opendocument.spreadsheet"
    ),
    "compressed with gzip: unpack it": lambda path: path.write_bytes(gzip.compress(b"image,caption\n")),
    "a pickle, which is not opened": lambda path: path.write_bytes(pickle.dumps([{"image": "a.jpg"}])),
    "a Feather or Arrow file": lambda path: pa.feather.write_feather(pa.table({"image": ["a.jpg"]}), path),
    "an image: --data_dir names": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "neither text nor Parquet": lambda path: path.write_bytes(bytes(range(128, 256)) + bytes(500)),
}


@pytest.mark.parametrize("message", KINDS)
def test_other_files_say_what_they_are(message: str, tmp_path: Path) -> None:
    KINDS[message](tmp_path / "data.csv")
    with pytest.raises(ValueError, match=rf"data\.csv: {message}"):
        read_index(tmp_path / "data.csv")
