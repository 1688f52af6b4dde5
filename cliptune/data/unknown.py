"""What a file that is no index resembles, and the smallest change that makes it one."""

from __future__ import annotations

import re
from pathlib import Path

from cliptune.data.index import IMAGE_COLUMNS, KNOWN_FORMS, NoCaptionsError, quote
from cliptune.data.token_lines import IMAGE_NAME

_HEAD = 4096
_ZIP, _OFFICE, _OPEN_DOCUMENT = b"PK\x03\x04", b"[Content_Types].xml", b"mimetypeapplication/vnd.oasis"
_EXCEL = "an Excel workbook: save it as CSV, in Excel as CSV UTF-8"
_TO_PARQUET = 'write it with pandas.{}(...).to_parquet("data.parquet")'
_BINARY = {
    b"\xd0\xcf\x11\xe0": _EXCEL,
    b"ARROW1": f"a Feather or Arrow file: {_TO_PARQUET.format('read_feather')}",
    b"\xff\xff\xff\xff": 'an Arrow stream: write it with datasets.Dataset.from_file(...).to_parquet("data.parquet")',
    b"\x1f\x8b": "compressed with gzip: unpack it with gunzip",
    b"BZh": "compressed with bzip2: unpack it with bunzip2",
    b"\xfd7zXZ": "compressed with xz: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it with unzstd",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"SQLite format 3": "an SQLite database: write its table as CSV",
    b"\x89HDF": f"an HDF5 file: {_TO_PARQUET.format('read_hdf')}",
    b"\x93NUMPY": "a NumPy array: write names and captions as CSV with a header image,caption",
    b"%PDF": "a PDF: write names and captions as CSV with a header image,caption",
}
# a pickle of protocol 2 to 5 begins so; those of pandas and of lists and dicts
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x95\x8c\]}(cX]", re.DOTALL)
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")
_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
"""Of UTF-16 and UTF-32, which have many zeros."""

_NUMBERS = re.compile(r"[\d.\s+-]+")
_STARTS = {
    "#": " is a comment: remove the lines before the header",
    "<": " looks like XML or HTML: write names and captions as CSV with a header image,caption",
}
_BLANKS = " has blanks between its columns: write a tab there, below a header image<TAB>caption"
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
    kinds = (
        (head.startswith(_ZIP) and (_OFFICE in head or b"xl/" in head), _EXCEL),
        (head.startswith(_ZIP) and _OPEN_DOCUMENT in head, "an OpenDocument table (.ods): save it as CSV"),
        (head.startswith(_ZIP), "a ZIP archive: unpack it, and name the folder or the index file in it"),
        (head.startswith(_IMAGES), "an image: --data_dir names a folder, an index file or shards"),
        (_PICKLE.match(head), f"a pickle, which is not opened: {_TO_PARQUET.format('read_pickle')}"),
        (head[257:262] == b"ustar", "a tar file: unpack it, or rename it to end in .tar if it holds shards"),
        *((head.startswith(start), what) for start, what in _BINARY.items()),
        (not head.startswith(_MARKS) and head.count(0) > len(head) // 4, _not_text(head)),
    )
    return next((what for is_kind, what in kinds if is_kind), "")


def _not_text(head: bytes) -> str:
    if head.replace(b"\0", b"").isascii():
        return "UTF-16 without a byte order mark: save it as UTF-8"
    return "neither text nor Parquet"


def resemblance(line: str) -> tuple[str, type[ValueError]]:
    """Say what a file of no known form resembles by its first line, and what would make it readable."""
    found = f"of no known form: {quote(line)}"
    if _is_bare(line):
        return f"{found} is {_bare(line)}", NoCaptionsError
    return f"{found}{_resemblance(line)}", ValueError


def _resemblance(line: str) -> str:
    words = line.split()
    has_blanks = _is_image(words[0]) or {"image", "caption"} <= set(map(str.lower, words))
    for start, what in _STARTS.items():
        if line.startswith(start):
            return what
    if _NUMBERS.fullmatch(line) and len(words) > 1:
        return " is numbers alone, as YOLO's boxes are: write captions as CSV with a header image,caption"
    return _table_resemblance(line) or (_BLANKS if has_blanks else f"; {KNOWN_FORMS}")


def _table_resemblance(line: str) -> str:
    for delimiter in ",\t;|":
        cells = [cell.strip().strip("\"'") for cell in line.split(delimiter)]
        if len(cells) > 1 and any(map(_is_image, cells)):
            return f" is no header: add one as the first line, {_header(cells, delimiter)}{_addresses(cells)}"
        if 1 < len(cells) < 100 and all(0 < len(cell) < 40 for cell in cells):
            return " names no known column: if it is a header, say which with --image_key and --caption_key"
    return ""


def _is_bare(line: str) -> bool:
    is_one = len(line.split()) == 1 and not _table_resemblance(line)
    return is_one and (_is_image(line) or line in IMAGE_COLUMNS)


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
