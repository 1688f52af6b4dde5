"""An index file of any known form, as rows of images with their captions.

The form is found by the content, never by the file's ending. This module only reads: whether the images exist is
checked by the caller. What is wrong with single records is collected with its source location, so that
all of it can be reported at once; a file that cannot be read at all is a `ValueError`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from cliptune.data.index import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    SPLITS,
    Index,
    Records,
    count_columns,
    is_id,
    kind,
    quote,
)
from cliptune.data.text_stream import TextFile, json_reason
from cliptune.runtime.messages import one_line, shorten

IMAGE_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
INDEX_ENDINGS = frozenset((".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet"))
KNOWN_FORMS = (
    'known forms: a JSON list or JSON lines of {"image_path", "caption"}; CSV or TSV with a header such as '
    "image,caption; Parquet with such columns; COCO captions; Karpathy; a JSON mapping {file name: [captions]}; lines "
    "of name.jpg#0<TAB>caption; a folder with images/ and captions/"
)

_ENDING = "|".join(sorted(ending[1:] for ending in IMAGE_ENDINGS))
# The tag follows the first ending, or a little after it: Flickr8k really holds "2258277193_586949ec62.jpg.1#0".
_TOKEN_LINE = re.compile(rf"([^\t]+?\.(?:{_ENDING})[^#\s]{{0,16}})#\S*(.*)", re.IGNORECASE | re.DOTALL)
_IMAGE_NAME = re.compile(rf"\.(?:{_ENDING})\b", re.IGNORECASE)
_FIRST_LINE = re.compile(r"\s*([^\n]*)")
_MAX_HEADER = 65536
_PARQUET_MAGIC = b"PAR1"
_PARQUET_ROWS = 1 << 14


def read_index(path: Path, *, caption_key: str | None = None) -> Index:
    """Read an index file of any known form; captions come from the column `caption_key` if it is given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, of no known form, without a usable row, or lacks the column `caption_key`.
    """
    if path.is_dir():
        if caption_key is not None:
            raise ValueError(f"{path}: caption_key {quote(caption_key)}: a folder with captions/ has no columns")
        return read_directory(path)
    found = Records(path, caption_key)
    if is_parquet(path):
        return found.index(_read_parquet(found))
    text = TextFile(path)
    number, line = text.first_line(2 * _MAX_HEADER)
    first = line.strip()
    if not first:
        raise ValueError(f"{path}: the file is empty; {KNOWN_FORMS}")
    if first[0] == "[":
        form = _read_rows(found, "json", lambda: enumerate(text.json_items(), 1), unit="row")
    elif first[0] == "{" and _is_json_lines(text):
        form = _read_rows(found, "jsonl", lambda: _json_lines(text), unit="line")
    elif first[0] == "{":
        form = _read_object(found, text)
    elif header := _header(line.lstrip().removesuffix("\n"), caption_key):
        form = _read_table(found, text, *header)
    elif _TOKEN_LINE.match(first):
        form = _read_token_lines(found, text)
    else:
        bare = " is a name without a caption" if _IMAGE_NAME.search(first) and len(first.split()) == 1 else ""
        raise ValueError(f"{path}: line {number}: of no known form: {quote(first)}{bare}; {KNOWN_FORMS}")
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
    found = Records(folder, None)
    images = _by_stem(found, folder, "images", IMAGE_ENDINGS)
    texts = _by_stem(found, folder, "captions", frozenset((".txt",)))
    for stem, image in images.items():
        text = texts.get(stem)
        if image is not None and stem not in texts:
            found.issue(image, f"no captions (no captions/{shorten(stem)}.txt)", image=image)
        elif image is not None and text is not None:
            found.add(image, image, _caption_lines(found, folder, text))
    for stem, text in texts.items():
        if text is not None and stem not in images:
            found.issue(text, f"captions without an image (no images/{shorten(stem)}.*)")
    return found.index("directory")


def find_index(folder: Path) -> dict[str, Path] | Path:
    """Decide which index a folder holds.

    Returns:
        The files of the splits ({"train": ..., "val": ...}) if there is a train file, else data.json, else
        data.parquet, else the only index file, else the folder itself if it has images/ and captions/; a `folder` that
        is a file is returned.

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
    for name in ("data.json", "data.parquet"):
        if folder / name in candidates:
            return folder / name
    if len(candidates) == 1:
        return candidates[0]
    if (folder / "images").is_dir() and (folder / "captions").is_dir():
        return folder
    if candidates and len(candidates) == sum(map(len, splits.values())):
        return _one_for_each(folder, splits)
    if candidates:
        raise ValueError(f"{folder}: several index files: {_names(candidates)}; name one with --data_dir FILE")
    raise FileNotFoundError(
        f"{folder}: no data set: looked for train.*, val.*, test.*, data.json, data.parquet, one file *.json, *.jsonl, "
        "*.csv, *.tsv, *.txt or *.parquet, and images/ with captions/; `python data_loader.py` makes sample data"
    )


def _read_rows(found: Records, form: str, rows: Callable[[], Iterator[tuple[int, Any]]], *, unit: str) -> str:
    """Take numbered objects with an image column and a caption column; one that could not be parsed is its ValueError.

    All rows have a say in which columns are meant, and they pass by one at a time. So they are read with the choice
    that the names seen so far give, and from the start again should a new name change it.
    """
    found.unit = unit
    names: dict[str, None] = {}
    columns = None
    while columns is None:
        found.restart()
        columns = _take_rows(found, rows(), names)
    if columns:
        image_column = found.choose(columns, found.image_columns, "image")
        caption_column = found.choose_caption(columns)
        found.ignore(columns, (image_column, caption_column, "split", "group"))
    return form


def _take_rows(found: Records, rows: Iterator[tuple[int, Any]], names: dict[str, None]) -> Counter[str] | None:
    """Take the rows with the columns that `names` give; None once a row has names that give others."""
    image_column, caption_column = chosen = found.preferred(names)
    # millions of rows have a few shapes: ("image", "caption") 999,990 times, ("image", "caption", "split") 10 times
    shapes: dict[tuple[str, ...], int] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            found.issue(number, str(row) if isinstance(row, ValueError) else f"expected an object, found {kind(row)}")
            continue
        shape = tuple(row)
        num_before = shapes.get(shape, 0)
        shapes[shape] = num_before + 1
        if not num_before:
            names.update(dict.fromkeys(shape))
            if found.preferred(names) != chosen:
                return None
        if image_column in row and caption_column in row:
            found.add(number, row[image_column], row[caption_column], row.get("split"), row.get("group"))
        elif names:
            found.issue(number, f"no {caption_column if image_column in row else image_column}")
        else:
            found.issue(number, "no image and no caption")
    columns: Counter[str] = Counter()
    for shape, num_rows in shapes.items():
        columns.update(dict.fromkeys(shape, num_rows))
    return columns


def is_parquet(path: Path) -> bool:
    """Tell whether a file begins as Parquet does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC


def _read_parquet(found: Records) -> str:
    """Take the rows of the columns that matter, some thousands at a time; no other column is read."""
    import pyarrow.parquet as pq  # noqa: PLC0415  (only where such a file is read)

    found.unit = "row"
    try:
        with pq.ParquetFile(found.path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
            _refuse_repeated(found, schema.names)
            columns = Counter(dict.fromkeys(schema.names, num_rows))
            texts = Counter({name: num_rows for name in schema.names if not _holds_bytes(schema.field(name).type)})
            held = next((name for name in found.image_columns if name in columns and name not in texts), None)
            if held is not None and texts.keys().isdisjoint(found.image_columns):
                raise ValueError(
                    f"{found.path}: the column {held} holds the images themselves, which is not read: write them to "
                    "files and name these in a column image_path"
                )
            image_column = found.choose(texts, found.image_columns, "image")
            caption_column = found.choose_caption(columns)
            used = [image_column, caption_column, *({"split", "group"} & columns.keys())]
            found.ignore(columns, used)
            for number, row in enumerate(_parquet_rows(file, used), 1):
                if isinstance(row, ValueError):
                    found.issue(number, str(row))
                else:
                    found.add(number, row[image_column], row[caption_column], row.get("split"), row.get("group"))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column name
        raise ValueError(f"{found.path}: damaged Parquet file: {one_line(error)}") from None
    return "parquet"


def _parquet_rows(file: Any, columns: list[str]) -> Iterator[dict[str, Any] | ValueError]:
    """Yield the cells of each row by name; for one that Python cannot hold (not UTF-8, year 30,000) its error."""
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):  # one by one, so that a bad cell costs its row alone
            rows = [_parquet_row(batch.slice(row, 1)) for row in range(len(batch))]
        yield from rows


def _parquet_row(batch: pa.RecordBatch) -> dict[str, Any] | ValueError:
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError:
        return ValueError("text is not UTF-8")
    except (ValueError, OverflowError) as error:
        return ValueError(one_line(error))
    return row


def _refuse_repeated(found: Records, names: list[str]) -> None:
    """Raise if two columns have one name: either could be meant."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{found.path}: column {quote(twice[0])} stands twice in the header")


def _holds_bytes(kind: pa.DataType) -> bool:
    """Tell a column of images from one of their paths; the Hub has both in one, `{"bytes": ..., "path": ...}`."""
    return bool(pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_json_lines(text: TextFile) -> bool:
    """Tell whether the first two lines are objects each: never the start of one JSON document."""
    filled = (line.strip() for line in text.lines() if line.strip())
    first, second = next(filled, ""), next(filled, "")
    return first.startswith("{") and first.endswith("}") and second.startswith("{")


def _json_lines(text: TextFile) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each line that is not blank; the value of an invalid one is the ValueError."""
    for number, line in enumerate(text.lines(), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                value = ValueError(f"not valid JSON: {getattr(error, 'msg', None) or json_reason(error)}")
            yield number, value


def _read_object(found: Records, text: TextFile) -> str:
    """Read one JSON object: the form is told by its keys."""
    try:
        document = json.loads(text.read())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{found.path}: not valid JSON: {json_reason(error)}") from None
    if isinstance(document.get("images"), list):
        if isinstance(document.get("annotations"), list):
            return _read_coco(found, document["images"], document["annotations"])
        return _read_karpathy(found, document["images"])
    if not document or any(_IMAGE_NAME.search(name) for name in document):
        del document  # it is parsed once more, as pairs
        return _read_mapping(found, text)
    if not document.keys().isdisjoint(IMAGE_COLUMNS):
        return _read_rows(found, "jsonl", lambda: iter([(1, document)]), unit="line")
    keys = ", ".join(shorten(key) for key in list(document)[:10])
    raise ValueError(f"{found.path}: a JSON object of no known form (keys: {keys}); {KNOWN_FORMS}")


def _read_coco(found: Records, images: list[Any], annotations: list[Any]) -> str:
    found.unit = "image"
    image_columns, caption_columns = count_columns(images), count_columns(annotations)
    name_column = found.choose(image_columns, ("file_name", *IMAGE_COLUMNS), "image")
    caption_column = found.choose_caption(caption_columns)
    found.ignore(image_columns, ("id", name_column, "split", "group"))
    found.ignore(caption_columns, ("id", "image_id", caption_column))
    listed: dict[int | str, tuple[int, dict[str, Any]]] = {}
    for number, image in found.objects(images, "image"):
        image_id: Any = image.get("id")
        if not is_id(image_id) or image_id in listed:
            found.issue(number, f"id {quote(image_id)} {'stands twice' if is_id(image_id) else 'is not an id'}")
        else:
            listed[image_id] = (number, image)
    captions: dict[int | str, list[str]] = {}
    for number, annotation in found.objects(annotations, "annotation"):
        image_id, location = annotation.get("image_id"), found.location(number, "annotation")
        if not is_id(image_id) or image_id not in listed:
            found.issue(location, f"image_id {quote(image_id)} is the id of no image")
        else:
            usable = found.captions(location, annotation.get(caption_column))
            captions.setdefault(image_id, []).extend(usable)
    for image_id, (number, image) in listed.items():
        if captions.get(image_id):
            found.add(number, image.get(name_column), captions[image_id], image.get("split"), image.get("group"))
    found.uncaptioned([number for image_id, (number, _) in listed.items() if image_id not in captions])
    return "coco"


def _read_karpathy(found: Records, images: list[Any]) -> str:
    found.unit = "image"
    columns = count_columns(images)
    lists = (image.get("sentences") for image in images if isinstance(image, dict))
    sentence_columns = count_columns(
        chain.from_iterable(sentences for sentences in lists if isinstance(sentences, list))
    )
    found.choose(columns, ("filename",), "image")
    caption_column = found.choose_caption(sentence_columns, ("raw",))
    found.ignore(columns, ("filename", "filepath", "split", "group", "sentences"))
    found.ignore(sentence_columns, (caption_column,))
    uncaptioned = []
    for number, image in found.objects(images, "image"):
        sentences = image.get("sentences")
        name, folder = image.get("filename"), image.get("filepath")
        if not sentences:
            uncaptioned.append(number)
        elif not isinstance(sentences, list):
            found.issue(number, f"sentences is {kind(sentences)}, not a list")
        else:
            captions = [value.get(caption_column) if isinstance(value, dict) else None for value in sentences]
            path = f"{folder}/{name}" if isinstance(name, str) and name.strip() and folder else name
            found.add(number, path, captions, image.get("split"), image.get("group"))
    found.uncaptioned(uncaptioned)
    return "karpathy"


def _read_mapping(found: Records, text: TextFile) -> str:
    found.refuse_caption_key("mapping")
    found.unit = "row"
    # read as pairs: a plain JSON object keeps only the last captions of a name that stands twice.
    for number, (image, captions) in enumerate(json.loads(text.read(), object_pairs_hook=tuple), 1):
        found.add(number, image, captions)
    return "mapping"


def _read_table(found: Records, text: TextFile, delimiter: str, names: list[str]) -> str:
    _refuse_repeated(found, names)
    form = "tsv" if delimiter == "\t" else "csv"
    return _read_rows(found, form, lambda: _table_rows(text, delimiter, names), unit="line")


def _table_rows(text: TextFile, delimiter: str, names: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield line number and cells by name of each row below the header; instead of an invalid row its ValueError."""
    # Strict: without it a quote that never closes would swallow the rows after it.
    reader = csv.reader(text.lines(), delimiter=delimiter, skipinitialspace=True, strict=True)
    more, header_seen = True, False
    while more:
        number = reader.line_num + 1
        try:
            cells = next(reader)
            if header_seen and any(cells):
                yield number, _table_row(names, cells)
            header_seen = header_seen or any(cell.strip() for cell in cells)
        except csv.Error as error:
            yield number, ValueError(f"not a valid row: {error} (a quote inside quotes is written twice)")
        except StopIteration:
            more = False


def _table_row(names: list[str], cells: list[str]) -> dict[str, str] | ValueError:
    if len(cells) == len(names):
        return dict(zip(names, cells, strict=True))
    return ValueError(f"{len(cells)} cells, the header has {len(names)} (cells that hold the delimiter need quotes)")


def _read_token_lines(found: Records, text: TextFile) -> str:
    found.refuse_caption_key("token")
    found.unit = "line"
    for number, line in enumerate(text.lines(), 1):
        if match := _TOKEN_LINE.match(line):
            found.add(number, match[1], match[2])
        elif line.strip():
            found.issue(number, f"not name.jpg#0<TAB>caption: {quote(line.strip())}")
    return "token"


def _header(line: str, caption_key: str | None) -> tuple[str, list[str]] | None:
    """Return the delimiter that gives most known names in the first line, and the names; None for no table."""
    best: tuple[int, str, list[str]] = (0, "", [])
    for delimiter in ",\t;" if len(line) < _MAX_HEADER and "\r" not in line.rstrip() else "":
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
        num_known = len({*IMAGE_COLUMNS, *CAPTION_COLUMNS, caption_key}.intersection(names))
        if len(names) > 1 and num_known > best[0]:
            best = (num_known, delimiter, names)
    return best[1:] if best[0] else None


def _by_stem(found: Records, folder: Path, part: str, endings: frozenset[str]) -> dict[str, str | None]:
    """Return the files below folder/part by their path without ending, sorted; None where several clash.

    Names that differ only by case clash too: they are one file on some file systems.
    """
    clashing: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(_files_below(folder / part)):
        name = path.relative_to(folder / part)
        if path.suffix.lower() in endings and path.is_file():
            stem = unicodedata.normalize("NFC", name.with_suffix("").as_posix())
            clashing.setdefault(stem.casefold(), []).append((stem, f"{part}/{name.as_posix()}"))
    by_stem: dict[str, str | None] = {}
    for files in clashing.values():
        if len(files) > 1:
            found.issue(files[0][1], f"clashes with {', '.join(file for _, file in files[1:])}")
        by_stem |= {stem: file if len(files) == 1 else None for stem, file in files}
    return by_stem


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield what lies below a folder, in linked folders too; nothing hidden, and no link back to a folder above."""
    above = {
        str(folder): [os.path.realpath(folder)]
    }  # of each folder, the real paths of it and of those it was found in
    for root, folders, names in os.walk(folder, followlinks=True):
        yield from (Path(root, name) for name in names if not name.startswith("."))
        found = above.pop(root)
        for name in [*folders]:
            path = os.path.join(root, name)  # noqa: PTH118
            real = os.path.realpath(path)
            if name.startswith(".") or any(f"{other}/".startswith(f"{real.rstrip('/')}/") for other in found):
                folders.remove(name)
            else:
                above[path] = [*found, real]


def _caption_lines(found: Records, folder: Path, name: str) -> list[str]:
    """Return the captions of one text file; blank lines are no captions."""
    try:
        lines = list(TextFile(folder / name).lines())
    except ValueError as error:
        found.issue(name, str(error).removeprefix(f"{folder / name}: "))
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
    return shorten(", ".join(path.name for path in paths))
