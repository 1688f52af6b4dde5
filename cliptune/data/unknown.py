"""What a file that is no index resembles, and the smallest change that makes it one."""

from __future__ import annotations

import re
from pathlib import Path

from cliptune.data.index import IMAGE_COLUMNS, KNOWN_FORMS, NoCaptionsError, quote
from cliptune.data.token_lines import IMAGE_NAME

_OFFICE, _ZIP = b"[Content_Types].xml", b"PK\x03\x04"
_HEAD = 4096
_BINARY = {
    b"\xd0\xcf\x11\xe0": "an Excel workbook (.xls): save it as CSV, in Excel as CSV UTF-8",
    b"ARROW1": 'a Feather or Arrow file: write it with pandas.read_feather(...).to_parquet("data.parquet")',
    b"\xff\xff\xff\xff": 'an Arrow stream: write it with datasets.Dataset.from_file(...).to_parquet("data.parquet")',
    b"\x1f\x8b": "compressed with gzip: unpack it with gunzip",
    b"BZh": "compressed with bzip2: unpack it with bunzip2",
    b"\xfd7zXZ": "compressed with xz: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it with unzstd",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"SQLite format 3": "an SQLite database: write its table as CSV",
    b"\x89HDF": 'an HDF5 file: write its table with pandas.read_hdf(...).to_parquet("data.parquet")',
    b"\x93NUMPY": "a NumPy array: write names and captions as CSV with a header image,caption",
    b"%PDF": "a PDF: write names and captions as CSV with a header image,caption",
}
# a pickle of protocol 2 to 5 begins so; those of pandas and of lists and dicts
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x95\x8c\]}(cX]", re.DOTALL)
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")

_NUMBERS = re.compile(r"[\d.\s+-]+")
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


def refuse_binary(path: Path) -> None:
    """Raise if a file is no text: the message says what it is, and how it becomes an index."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if what := _binary_kind(head):
        raise ValueError(f"{path}: {what}")


def _binary_kind(head: bytes) -> str:
    if head.startswith(_ZIP):
        if _OFFICE in head or b"xl/" in head:
            return "an Excel workbook (.xlsx): save it as CSV, in Excel as CSV UTF-8"
        if b"mimetypeapplication/vnd.oasis.opendocument" in head:
            return "an OpenDocument table (.ods): save it as CSV"
        return "a ZIP archive: unpack it, and name the folder or the index file in it"
    if head.startswith(_IMAGES):
        return "an image: --data_dir names a folder, an index file or shards"
    if _PICKLE.match(head):
        return 'a pickle, which is not opened: write it with pandas.read_pickle(...).to_parquet("data.parquet")'
    for start, what in _BINARY.items():
        if head.startswith(start):
            return what
    if head[257:262] == b"ustar":
        return "a tar file: unpack it, or rename it to end in .tar if it holds shards"
    num_zeros = head.count(0)
    if num_zeros > len(head) // 4 and not head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        is_text = bytes(set(head)).replace(b"\0", b"").isascii()
        return "UTF-16 without a byte order mark: save it as UTF-8" if is_text else "no text, and no Parquet file"
    return ""


def resemblance(line: str) -> tuple[str, type[ValueError]]:
    """Say what a file of no known form resembles by its first line, and what would make it readable."""
    found = f"of no known form: {quote(line)}"
    if _is_bare(line):
        return f"{found} is {_bare(line)}", NoCaptionsError
    return f"{found}{_resemblance(line)}", ValueError


def _resemblance(line: str) -> str:
    if line.startswith("#"):
        return " is a comment: remove the lines before the header"
    if line.startswith("<"):
        return " looks like XML or HTML: write names and captions as CSV with a header image,caption"
    if _NUMBERS.fullmatch(line) and len(line.split()) > 1:
        return " is numbers alone, as YOLO's boxes are: write captions as CSV with a header image,caption"
    for delimiter in ",\t;|":
        cells = [cell.strip().strip("\"'") for cell in line.split(delimiter)]
        if len(cells) > 1 and any(map(_is_image, cells)):
            return f" is no header: add one as the first line, {_header(cells, delimiter)}{_addresses(cells)}"
        if 1 < len(cells) < 100 and all(0 < len(cell) < 40 for cell in cells):
            return " names no known column: if it is a header, say which with --image_key and --caption_key"
    words = line.split()
    if _is_image(words[0]) or {"image", "caption"} <= set(map(str.lower, words)):
        return " has blanks between its columns: write a tab there, below a header image<TAB>caption"
    return f"; {KNOWN_FORMS}"


def _is_bare(line: str) -> bool:
    return len(line.split()) == 1 and (_is_image(line) or line in IMAGE_COLUMNS)


def _bare(line: str) -> str:
    if _ADDRESS.match(line):
        return "an address without a caption: download the images first, for example with img2dataset"
    return "a name without a caption: write each line as name.jpg#0<TAB>caption, or as CSV with a header image,caption"


def _is_image(cell: str) -> bool:
    return bool(_ADDRESS.match(cell)) or (IMAGE_NAME.search(cell) is not None and len(cell.split()) == 1)


def _header(cells: list[str], delimiter: str) -> str:
    """Write a header for cells of which one is an image."""
    image = next(index for index, cell in enumerate(cells) if _is_image(cell))
    caption = max((index for index in range(len(cells)) if index != image), key=lambda index: len(cells[index]))
    names = [f"column_{index}" for index in range(1, len(cells) + 1)]
    names[image], names[caption] = "image", "caption"
    return quote(delimiter.join(names)) if delimiter != "\t" else quote("<TAB>".join(names))


def _addresses(cells: list[str]) -> str:
    return "; and it holds addresses: download the images first" if any(map(_ADDRESS.match, cells)) else ""
