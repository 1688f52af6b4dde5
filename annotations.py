"""An index file of any known form, as rows of images with their captions.

The form is found by the content, never by the file's ending. This module only reads: whether the images exist is
checked by the caller. What is wrong with single entries is collected with its place, so that all of it can be
reported at once; a file that cannot be read at all is a `ValueError`.
"""

from __future__ import annotations

import csv
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from config import nearest

IMAGE_COLUMNS = ("image_path", "image", "filepath", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "captions", "title")
SPLITS = {
    "train": "train", "training": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip
IMAGE_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
INDEX_ENDINGS = frozenset((".json", ".jsonl", ".csv", ".tsv", ".txt"))
KNOWN_FORMS = (
    'known forms: a JSON list or JSON lines of {"image_path", "caption"}; CSV or TSV with a header such as '
    "image,caption; COCO captions; Karpathy; a JSON mapping {file name: [captions]}; lines of name.jpg#0<TAB>caption; "
    "a folder with images/ and captions/"
)

_ENDING = "|".join(sorted(ending[1:] for ending in IMAGE_ENDINGS))
# The tag follows the first ending, or a little after it: Flickr8k really holds "2258277193_586949ec62.jpg.1#0".
_TOKEN_LINE = re.compile(rf"([^\t]+?\.(?:{_ENDING})[^#\s]{{0,16}})#\S*(.*)", re.IGNORECASE | re.DOTALL)
_IMAGE_NAME = re.compile(rf"\.(?:{_ENDING})\b", re.IGNORECASE)
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FIRST_LINE = re.compile(r"\s*([^\n]*)")
# Two lines that are objects each: never the start of one JSON document.
_JSON_LINES = re.compile(r"\s*\{[^\n]*\}[ \t\r]*\n\s*\{")
_NUL_MARK = "\udc00"  # cannot come from UTF-8; the csv and json modules refuse a file for one NUL byte
_MAX_MESSAGE = 200
_MAX_HEADER = 65536


class Row(NamedTuple):
    """One image of the index with its captions.

    `image` is the path as written (relative to the folder in the directory form), `captions` holds at least one,
    stripped, in order of appearance, `split` is "train", "val", "test" or None, and `place` tells where the image
    first appears ("data.json: row 17"; rows and lines count from 1).
    """

    image: str
    captions: tuple[str, ...]
    split: str | None
    group: str | None
    place: str


class Index(NamedTuple):
    """What an index file holds.

    `form` is json, jsonl, csv, tsv, coco, karpathy, mapping, token or directory; `ignored_columns` tells in how many
    objects each unused key stood; `problems` has one line for each problem, with its place.
    """

    rows: list[Row]
    form: str
    ignored_columns: dict[str, int]
    problems: list[str]


def read_index(path: Path, *, caption_key: str | None = None) -> Index:
    """Read an index file of any known form; captions come from the column `caption_key` if it is given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, of no known form, without a usable row, or lacks the column `caption_key`.
    """
    if path.is_dir():
        if caption_key is not None:
            raise ValueError(f"{path}: caption_key {_quote(caption_key)}: a folder with captions/ has no columns")
        return read_directory(path)
    found = _Found(path, caption_key)
    text = _decode(path)
    start = _FIRST_LINE.match(text)
    first = start[1] if start else ""
    if not first.strip():
        raise ValueError(f"{path}: the file is empty; {KNOWN_FORMS}")
    if _JSON_LINES.match(text):
        form = _read_json_lines(found, text)
    elif first[0] in "[{":
        form = _read_document(found, text)
    elif header := _header(first, caption_key):
        form = _read_table(found, text, *header)
    elif _TOKEN_LINE.match(first):
        form = _read_token_lines(found, text)
    else:
        bare = " is a name without a caption" if _IMAGE_NAME.search(first) and len(first.split()) == 1 else ""
        line = text.count("\n", 0, start.start(1) if start else 0) + 1
        raise ValueError(f"{path}: line {line}: of no known form: {_quote(first.strip())}{bare}; {KNOWN_FORMS}")
    return found.index(form)


def read_directory(folder: Path) -> Index:
    """Read images/a/b.png with its captions from captions/a/b.txt, one a line; pairs go by the path without ending.

    Raises:
        FileNotFoundError: images/ or captions/ is not there.
        ValueError: there is no usable pair.
    """
    for part in ("images", "captions"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder}: no folder {part}/; the directory form needs images/ and captions/")
    found = _Found(folder, None)
    images = _by_stem(found, folder, "images", IMAGE_ENDINGS)
    texts = _by_stem(found, folder, "captions", frozenset((".txt",)))
    for stem, image in images.items():
        text = texts.get(stem)
        if image is not None and stem not in texts:
            found.problem(image, f"no captions (no captions/{_short(stem)}.txt)")
        elif image is not None and text is not None:
            found.add(image, image, _caption_lines(found, folder, text))
    for stem, text in texts.items():
        if text is not None and stem not in images:
            found.problem(text, f"captions without an image (no images/{_short(stem)}.*)")
    return found.index("directory")


def find_index(folder: Path) -> dict[str, Path] | Path:
    """Decide which index a folder holds.

    Returns:
        The files of the splits ({"train": ..., "val": ...}) if there is a train file, else data.json, else the only
        index file, else the folder itself if it has images/ and captions/; a `folder` that is a file is returned.

    Raises:
        FileNotFoundError: there is no such folder, or no index in it.
        ValueError: several files could be meant; the message names them.
    """
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder; `python data_loader.py` makes sample data")
    candidates = sorted(path for path in folder.iterdir() if _is_candidate(path))
    splits: dict[str, list[Path]] = {}
    for path in candidates:
        if path.stem.lower() in SPLITS and path.stem.lower() != "restval":
            splits.setdefault(SPLITS[path.stem.lower()], []).append(path)
    if "train" in splits:
        return _one_for_each(folder, splits)
    if folder / "data.json" in candidates:
        return folder / "data.json"
    if len(candidates) == 1:
        return candidates[0]
    if (folder / "images").is_dir() and (folder / "captions").is_dir():
        return folder
    if candidates and len(candidates) == sum(map(len, splits.values())):
        return _one_for_each(folder, splits)
    if candidates:
        raise ValueError(f"{folder}: several index files: {_names(candidates)}; name one with --data_dir FILE")
    raise FileNotFoundError(
        f"{folder}: no data set: looked for train.*, val.*, test.*, data.json, one file *.json, *.jsonl, *.csv, *.tsv "
        "or *.txt, and images/ with captions/; `python data_loader.py` makes sample data"
    )


@dataclass(slots=True)
class _Draft:
    """A row while its captions are still being gathered."""

    captions: list[str]
    split: str | None
    group: str | None
    place: str


class _Found:
    """What has been read so far of one index: images in order of appearance, and problems."""

    def __init__(self, path: Path, caption_key: str | None) -> None:
        self.path = path
        self.name = path.name
        self.caption_key = caption_key
        self.drafts: dict[str, _Draft] = {}
        self.ignored: Counter[str] = Counter()
        self.problems: list[str] = []

    def problem(self, place: str, message: str) -> None:
        """Note a problem at its place."""
        self.problems.append(f"{_short(place)}: {_short(message)}")

    def captions(self, place: str, values: Any) -> list[str]:
        """Return the usable captions of one entry; the others become problems."""
        usable = []
        for value in values if isinstance(values, list) else [values]:
            try:
                usable.append(_text("caption", value))
            except ValueError as error:
                self.problem(place, str(error))
        if values == []:
            self.problem(place, "no caption")
        return usable

    def add(self, place: str, image: Any, captions: Any, split: Any = None, group: Any = None) -> None:
        """Take one entry, merged with earlier ones of its image; what is wrong with it becomes a problem."""
        usable = self.captions(place, captions)
        try:
            image, split, group = _text("image", image), _split(split), _group(group)
        except ValueError as error:
            self.problem(place, str(error))
            return
        if not usable:
            return
        draft = self.drafts.setdefault(image, _Draft(usable, split, group, place))
        if draft.captions is usable:
            return
        draft.captions += usable
        for name, value in (("split", split), ("group", group)):
            before = getattr(draft, name)
            if before is None:
                setattr(draft, name, value)
            elif value not in (None, before):
                self.problem(place, f"{_quote(image)}: {name} {_quote(value)}, but {_quote(before)} at {draft.place}")

    def index(self, form: str) -> Index:
        """Close the reading; no row at all is a ValueError that quotes the first problems."""
        if not self.drafts:
            reasons = "; ".join(self.problems[:3]) or "it has no entries"
            more = f"; and {len(self.problems) - 3} more problems" if len(self.problems) > 3 else ""
            raise ValueError(f"{self.path}: no image with a caption: {reasons}{more}")
        rows = [Row(image, tuple(d.captions), d.split, d.group, d.place) for image, d in self.drafts.items()]
        return Index(rows, form, dict(self.ignored), self.problems)

    def choose(self, columns: Counter[str], known: Sequence[str], what: str) -> str:
        """Return the first of the known names that is among `columns`; raise if there is none."""
        for name in known:
            if name in columns:
                return name
        present = [_short(name) for name, _ in columns.most_common(20)]
        if what == "caption" and self.caption_key is not None:
            hint = nearest(self.caption_key, present)
            raise ValueError(f"{self.path}: no row has caption_key {_quote(self.caption_key)}{hint}")
        way_out = "; name it with --caption_key" if what == "caption" else ""
        listed = ", ".join(present) or "no keys"
        raise ValueError(f"{self.path}: no {what} column: found {listed}; known: {', '.join(known)}{way_out}")

    def choose_caption(self, columns: Counter[str], known: Sequence[str] = CAPTION_COLUMNS) -> str:
        """Return the caption column: `caption_key`, or the first known one."""
        return self.choose(columns, known if self.caption_key is None else (self.caption_key,), "caption")

    def ignore(self, columns: Counter[str], used: Iterable[str]) -> None:
        """Count the columns that are not used."""
        self.ignored.update({name: count for name, count in columns.items() if name not in set(used)})

    def refuse_caption_key(self, form: str) -> None:
        """Raise if a column is asked for in a form that has none."""
        if self.caption_key is not None:
            raise ValueError(f"{self.path}: caption_key {_quote(self.caption_key)}: the {form} form has no columns")

    def objects(self, values: Any, unit: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the objects of a JSON list with their places; other values become problems."""
        for number, value in enumerate(values, 1):
            if isinstance(value, dict):
                yield f"{self.name}: {unit} {number}", value
            else:
                self.problem(f"{self.name}: {unit} {number}", f"expected an object, found {_kind(value)}")

    def uncaptioned(self, places: list[str]) -> None:
        """Note the images that no caption belongs to; many of them in one line."""
        if len(places) > 5:
            first = ", ".join(place.removeprefix(f"{self.name}: ") for place in places[:3])
            self.problem(self.name, f"{len(places)} images have no caption ({first}, ...)")
        else:
            for place in places:
                self.problem(place, "no caption")


def _read_rows(found: _Found, rows: list[Any], numbers: Sequence[int], unit: str) -> None:
    """Take objects with an image column and a caption column; a row that could not be parsed is its ValueError."""
    columns = _columns(rows)
    if not columns and rows:
        rows = [row if not isinstance(row, dict) else ValueError("no image and no caption") for row in rows]
    else:
        image_columns = [name for name in IMAGE_COLUMNS if name != found.caption_key]
        image_column = found.choose(columns, image_columns, "image")
        caption_column = found.choose_caption(columns)
        found.ignore(columns, (image_column, caption_column, "split", "group"))
    for number, row in zip(numbers, rows, strict=True):
        place = f"{found.name}: {unit} {number}"
        if not isinstance(row, dict):
            found.problem(place, str(row) if isinstance(row, ValueError) else f"expected an object, found {_kind(row)}")
        elif image_column in row and caption_column in row:
            found.add(place, row[image_column], row[caption_column], row.get("split"), row.get("group"))
        else:
            found.problem(place, f"no {caption_column if image_column in row else image_column}")


def _read_json_lines(found: _Found, text: str) -> str:
    rows: list[Any] = []
    numbers = []
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            numbers.append(number)
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                rows.append(ValueError(f"not valid JSON: {getattr(error, 'msg', None) or _reason(error)}"))
    _read_rows(found, rows, numbers, "line")
    return "jsonl"


def _read_document(found: _Found, text: str) -> str:
    """Read one JSON value: the form is told by its keys."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{found.path}: not valid JSON: {_reason(error)}") from None
    if isinstance(document, list):
        if document:
            _read_rows(found, document, range(1, len(document) + 1), "row")
        return "json"
    if isinstance(document.get("images"), list):
        if isinstance(document.get("annotations"), list):
            return _read_coco(found, document["images"], document["annotations"])
        return _read_karpathy(found, document["images"])
    if not document or any(_IMAGE_NAME.search(name) for name in document):
        return _read_mapping(found, text)
    if not document.keys().isdisjoint(IMAGE_COLUMNS):
        return _read_json_lines(found, json.dumps(document))
    keys = ", ".join(_short(key) for key in list(document)[:10])
    raise ValueError(f"{found.path}: a JSON object of no known form (keys: {keys}); {KNOWN_FORMS}")


def _read_coco(found: _Found, images: list[Any], annotations: list[Any]) -> str:
    image_columns, caption_columns = _columns(images), _columns(annotations)
    name_column = found.choose(image_columns, ("file_name", *IMAGE_COLUMNS), "image")
    caption_column = found.choose_caption(caption_columns)
    found.ignore(image_columns, ("id", name_column, "split", "group"))
    found.ignore(caption_columns, ("id", "image_id", caption_column))
    listed: dict[int | str, tuple[str, dict[str, Any]]] = {}
    for place, image in found.objects(images, "image"):
        image_id: Any = image.get("id")
        if not _is_id(image_id) or image_id in listed:
            found.problem(place, f"id {_quote(image_id)} {'stands twice' if _is_id(image_id) else 'is not an id'}")
        else:
            listed[image_id] = (place, image)
    captions: dict[int | str, list[str]] = {}
    for place, annotation in found.objects(annotations, "annotation"):
        image_id = annotation.get("image_id")
        if not _is_id(image_id) or image_id not in listed:
            found.problem(place, f"image_id {_quote(image_id)} is the id of no image")
        else:
            usable = found.captions(place, annotation.get(caption_column))
            captions.setdefault(image_id, []).extend(usable)
    for image_id, (place, image) in listed.items():
        if captions.get(image_id):
            found.add(place, image.get(name_column), captions[image_id], image.get("split"), image.get("group"))
    found.uncaptioned([place for image_id, (place, _) in listed.items() if image_id not in captions])
    return "coco"


def _read_karpathy(found: _Found, images: list[Any]) -> str:
    columns = _columns(images)
    lists = (image.get("sentences") for image in images if isinstance(image, dict))
    sentence_columns = _columns(chain.from_iterable(each for each in lists if isinstance(each, list)))
    found.choose(columns, ("filename",), "image")
    caption_column = found.choose_caption(sentence_columns, ("raw",))
    found.ignore(columns, ("filename", "filepath", "split", "group", "sentences"))
    found.ignore(sentence_columns, (caption_column,))
    uncaptioned = []
    for place, image in found.objects(images, "image"):
        sentences = image.get("sentences")
        name, folder = image.get("filename"), image.get("filepath")
        if not sentences:
            uncaptioned.append(place)
        elif not isinstance(sentences, list):
            found.problem(place, f"sentences is {_kind(sentences)}, not a list")
        else:
            captions = [each.get(caption_column) if isinstance(each, dict) else None for each in sentences]
            path = f"{folder}/{name}" if isinstance(name, str) and name.strip() and folder else name
            found.add(place, path, captions, image.get("split"), image.get("group"))
    found.uncaptioned(uncaptioned)
    return "karpathy"


def _read_mapping(found: _Found, text: str) -> str:
    found.refuse_caption_key("mapping")
    # Read as pairs: a plain JSON object keeps only the last captions of a name that stands twice.
    for number, (image, captions) in enumerate(json.loads(text, object_pairs_hook=tuple), 1):
        found.add(f"{found.name}: row {number}", image, captions)
    return "mapping"


def _read_table(found: _Found, text: str, delimiter: str, names: list[str]) -> str:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{found.path}: column {_quote(twice[0])} stands twice in the header")
    # Strict: without it a quote that never closes would swallow the rows after it.
    reader = csv.reader(_lines(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: list[Any] = []
    numbers = []
    more, header_seen = True, False
    while more:
        number = reader.line_num + 1
        try:
            cells = next(reader)
            if header_seen and any(cells):
                rows.append(_table_row(names, cells))
                numbers.append(number)
            header_seen = header_seen or any(cell.strip() for cell in cells)
        except csv.Error as error:
            rows.append(ValueError(f"not a valid row: {error} (a quote inside quotes is written twice)"))
            numbers.append(number)
        except StopIteration:
            more = False
    if rows:
        _read_rows(found, rows, numbers, "line")
    return "tsv" if delimiter == "\t" else "csv"


def _table_row(names: list[str], cells: list[str]) -> dict[str, str] | ValueError:
    if len(cells) == len(names):
        return dict(zip(names, cells, strict=True))
    return ValueError(f"{len(cells)} cells, the header has {len(names)} (cells that hold the delimiter need quotes)")


def _read_token_lines(found: _Found, text: str) -> str:
    found.refuse_caption_key("token")
    for number, line in enumerate(_lines(text), 1):
        if match := _TOKEN_LINE.match(line):
            found.add(f"{found.name}: line {number}", match[1], match[2])
        elif line.strip():
            found.problem(f"{found.name}: line {number}", f"not name.jpg#0<TAB>caption: {_quote(line.strip())}")
    return "token"


def _header(line: str, caption_key: str | None) -> tuple[str, list[str]] | None:
    """Return the delimiter that gives most known names in the first line, and the names; None for no table."""
    best: tuple[int, str, list[str]] = (0, "", [])
    for delimiter in ",\t;" if len(line) < _MAX_HEADER else "":
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
        num_known = len({*IMAGE_COLUMNS, *CAPTION_COLUMNS, caption_key}.intersection(names))
        if len(names) > 1 and num_known > best[0]:
            best = (num_known, delimiter, names)
    return best[1:] if best[0] else None


def _decode(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\0", _NUL_MARK)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    return text if "\n" in text else text.replace("\r", "\n")


def _lines(text: str) -> Iterator[str]:
    """Yield lines with their ends; str.splitlines would also split at characters that captions may hold."""
    return (match[0] for match in _LINE.finditer(text))


def _columns(rows: Iterable[Any]) -> Counter[str]:
    return Counter(chain.from_iterable(row for row in rows if isinstance(row, dict)))


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_kind(value)}, not text")
    text: str = value.strip()
    if not text:
        raise ValueError(f"empty {what}")
    if "\0" in text or (not text.isascii() and re.search("[\ud800-\udfff]", text)):
        raise ValueError(f"{what} holds a NUL byte or half a character")
    return text


def _split(value: Any) -> str | None:
    if value is None or value == "":
        return None
    split = SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise ValueError(f"unknown split {_quote(value)}; known: train, val, test")
    return split


def _group(value: Any) -> str | None:
    if value is None or value == "":
        return None
    return str(value) if _is_id(value) and not isinstance(value, str) else _text("group", value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool | int | float | str):
        number = "NaN" if isinstance(value, float) and math.isnan(value) else "a number"
        return {bool: "a boolean", str: "text"}.get(type(value), number)
    return "a list" if isinstance(value, list) else "an object"


def _quote(value: Any) -> str:
    return repr(_short(value, 60)) if isinstance(value, str) else str(value) if _is_id(value) else _kind(value)


def _short(text: str, limit: int = _MAX_MESSAGE) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return "nested too deeply" if isinstance(error, RecursionError) else _short(str(error))


def _by_stem(found: _Found, folder: Path, part: str, endings: frozenset[str]) -> dict[str, str | None]:
    """Return the files below folder/part by their path without ending, sorted; None where several clash.

    Names that differ only by case clash too: they are one file on some file systems.
    """
    clashing: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((folder / part).rglob("*")):
        name = path.relative_to(folder / part)
        if path.suffix.lower() in endings and not any(each.startswith(".") for each in name.parts) and path.is_file():
            stem = unicodedata.normalize("NFC", name.with_suffix("").as_posix())
            clashing.setdefault(stem.casefold(), []).append((stem, f"{part}/{name.as_posix()}"))
    by_stem: dict[str, str | None] = {}
    for files in clashing.values():
        if len(files) > 1:
            found.problem(files[0][1], f"clashes with {', '.join(file for _, file in files[1:])}")
        by_stem |= {stem: file if len(files) == 1 else None for stem, file in files}
    return by_stem


def _caption_lines(found: _Found, folder: Path, name: str) -> list[str]:
    """Return the captions of one text file; blank lines are no captions."""
    try:
        lines = list(_lines(_decode(folder / name)))
    except ValueError as error:
        found.problem(name, str(error).removeprefix(f"{folder / name}: "))
        return []
    captions: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            captions += found.captions(f"{name}: line {number}", line)
    return captions


def _is_candidate(path: Path) -> bool:
    if path.name.lower().startswith((".", "readme", "license")) or path.suffix.lower() not in INDEX_ENDINGS:
        return False
    if not path.is_file() or path.suffix.lower() != ".txt":
        return path.is_file()
    with path.open("rb") as file:
        head = file.read(_MAX_HEADER).decode("utf-8", errors="replace").removeprefix("\ufeff")
    first = _FIRST_LINE.match(head)
    return first is not None and (_TOKEN_LINE.match(first[1]) or _header(first[1], None)) is not None


def _one_for_each(folder: Path, splits: dict[str, list[Path]]) -> dict[str, Path]:
    for split, paths in splits.items():
        if len(paths) > 1:
            raise ValueError(f"{folder}: several {split} files: {_names(paths)}; name one with --data_dir FILE")
    order = [split for split in ("train", "val", "test") if split in splits]
    return {split: splits[split][0] for split in order}


def _names(paths: list[Path]) -> str:
    return _short(", ".join(path.name for path in paths))
