"""An index file of any known form to rows of image and captions; images themselves are not looked at."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import nearest

IMAGE_KEYS = ("image_path", "image", "filepath", "file_name", "filename")
CAPTION_KEYS = ("caption", "captions", "title")
SPLIT_NAMES = {
    "train": "train", "training": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
INDEX_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
KNOWN_FORMS = (
    "a JSON list of {image_path, caption}, JSON lines, CSV or TSV with a header, COCO captions, Karpathy's JSON, "
    "a JSON mapping {file name: captions}, or lines of name#k<TAB>caption"
)
# Flickr8k's `name.jpg#0<TAB>caption`; its Chinese form has `name.jpg#zhm#0 caption`
_TOKEN_LINE = re.compile(r"^(?P<image>[^\t#]+)#(?:[^\s#]+#)?\d+[\t ]\s*(?P<caption>.*)$")


class Row(NamedTuple):
    """One image of an index with its captions."""

    image: str
    """Path as written in the index."""
    captions: tuple[str, ...]
    split: str | None
    """`train`, `val` or `test`, if the index declares one."""
    group: str | None
    """Unit of the split, if the index declares one."""
    place: str
    """Where it stands first, for messages."""


class Index(NamedTuple):
    """What an index file holds."""

    rows: list[Row]
    form: str
    ignored_columns: dict[str, int]
    """Further columns, and in how many rows they stand."""
    problems: list[str]
    """Entries that are left out, each with its place and the reason."""


class _Entry(NamedTuple):
    """One entry as it stands in a file, not yet checked."""

    place: str
    image: Any
    captions: Any
    split: Any = None
    group: Any = None


def read_index(path: Path, *, caption_key: str | None = None) -> Index:
    """Read an index file; its content, not its name, tells the form.

    Args:
        path: the file.
        caption_key: column that holds the captions, instead of `caption`, `captions` or `title`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be parsed, is of no known form, or holds no usable entry; names the place.
    """
    text = _read_text(path)
    ignored: Counter[str] = Counter()
    reader = _find_reader(text, path)
    form, entries = reader(text, path, caption_key, ignored)
    rows, problems = _collect(entries)
    if not rows:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        reason = "; ".join(problems[:3]) + more if problems else "it has no entries"
        raise ValueError(f"{path}: no image with a caption: {reason}")
    return Index(rows, form, dict(ignored), problems)


def read_directory(folder: Path) -> Index:
    """Read the directory form: `images/x.jpg` goes with `captions/x.txt`, one caption a line.

    Raises:
        ValueError: no image has captions.
    """
    images, captions = folder / "images", folder / "captions"
    stems: dict[str, list[Path]] = {}
    for path in _files(images):
        if path.suffix.lower() in IMAGE_ENDINGS:
            stems.setdefault(path.relative_to(images).with_suffix("").as_posix().lower(), []).append(path)
    entries, problems = [], []
    texts = {path.relative_to(captions).with_suffix("").as_posix().lower(): path for path in _files(captions)}
    for stem, paths in stems.items():
        text = texts.pop(stem, None)
        if len(paths) > 1:
            problems.append(f"clashing names: {', '.join(str(path) for path in paths)}")
        elif text is None:
            problems.append(f"{paths[0]}: no captions at {captions / stem}.txt")
        else:
            lines = [line for line in _read_text(text).splitlines() if line.strip()]
            entries.append(_Entry(str(text), paths[0].relative_to(folder).as_posix(), lines))
    problems += [f"{path}: no image of that name" for path in texts.values()]
    rows, more = _collect(entries)
    if not rows:
        raise ValueError(f"{folder}: no image with captions: {'; '.join((problems + more)[:3]) or 'both are empty'}")
    return Index(rows, "directory", {}, problems + more)


def find_index(folder: Path) -> dict[str, Path] | Path:
    """Find what a folder's data set is described by.

    Returns:
        `{split: file}` for `train.*` with `val.*` and `test.*`; or an index file; or the folder itself, for the
        directory form.

    Raises:
        ValueError: several candidates; names them.
        FileNotFoundError: none.
    """
    candidates = [path for path in sorted(folder.iterdir()) if _may_be_index(path)]
    splits: dict[str, list[Path]] = {}
    for path in candidates:
        if path.stem.lower() in {"train", "val", "test"}:
            splits.setdefault(path.stem.lower(), []).append(path)
    twice = [path.name for paths in splits.values() if len(paths) > 1 for path in paths]
    if "train" in splits and twice:
        raise ValueError(f"{folder}: several files for one split: {', '.join(twice)}")
    if "train" in splits:
        return {split: paths[0] for split, paths in splits.items()}
    if folder / "data.json" in candidates:
        return folder / "data.json"
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise ValueError(f"{folder}: several index files: {names}; name one with --data_dir FILE")
    if (folder / "images").is_dir() and (folder / "captions").is_dir():
        return folder
    raise FileNotFoundError(
        f"{folder}: no data set: looked for train.*, data.json, one index file, or images/ and captions/; "
        "`python data_loader.py` makes sample data"
    )


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _may_be_index(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith((".", "readme", "license", "requirements")) or not path.is_file():
        return False
    if path.suffix.lower() == ".txt":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            head = file.readline()
        return bool(_TOKEN_LINE.match(head.rstrip("\n"))) or _delimiter(head) is not None
    return path.suffix.lower() in INDEX_ENDINGS


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


Reader = Callable[[str, Path, "str | None", "Counter[str]"], tuple[str, Iterable[_Entry]]]


def _find_reader(text: str, path: Path) -> Reader:
    head = text.lstrip()
    first_line, _, rest = head.partition("\n")
    if not head:
        raise ValueError(f"{path}: the file is empty")
    if head[0] == "[" or (head[0] == "{" and not _is_json_lines(first_line, rest)):
        return _read_json
    if head[0] == "{":
        return _read_json_lines
    if _delimiter(first_line) is not None:
        return _read_table
    if _TOKEN_LINE.match(first_line.rstrip("\r")):
        return _read_tokens
    raise ValueError(f"{path}: of no known form; known are {KNOWN_FORMS}")


def _is_json_lines(first_line: str, rest: str) -> bool:
    """Tell JSON lines from one object: the first line is a whole object, and nothing or another one follows."""
    try:
        value = json.loads(first_line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and (rest.lstrip().startswith("{") or any(key in value for key in IMAGE_KEYS))


def _parse_json(text: str, path: Path, *, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: not valid JSON at {place}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def _read_json(text: str, path: Path, caption_key: str | None, ignored: Counter[str]) -> tuple[str, Iterable[_Entry]]:
    content = _parse_json(text, path)
    if isinstance(content, list):
        rows = ((f"{path.name}: row {number}", row) for number, row in enumerate(content, 1))
        return "json", _entries_of_rows(rows, _columns(content, path, caption_key), ignored)
    images = content.get("images")
    if isinstance(images, list) and isinstance(content.get("annotations"), list):
        return "coco", _coco_entries(content, path.name, caption_key or "caption")
    if isinstance(images, list):
        return "karpathy", _karpathy_entries(images, path.name)
    if content and all(isinstance(value, str | list) for value in content.values()):
        return "mapping", (_Entry(f"{path.name}: {key!r}", key, value) for key, value in content.items())
    raise ValueError(f"{path}: of no known form; known are {KNOWN_FORMS}")


def _read_json_lines(
    text: str, path: Path, caption_key: str | None, ignored: Counter[str]
) -> tuple[str, Iterable[_Entry]]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [(f"{path.name}: line {number}", _parse_json(line, path, line=number)) for number, line in lines]
    return "jsonl", _entries_of_rows(rows, _columns([row for _, row in rows], path, caption_key), ignored)


def _read_table(text: str, path: Path, caption_key: str | None, ignored: Counter[str]) -> tuple[str, Iterable[_Entry]]:
    delimiter = _delimiter(text.lstrip().partition("\n")[0]) or ","
    reader = csv.DictReader(io.StringIO(text.lstrip(), newline=""), delimiter=delimiter, restkey="(extra)")
    try:
        rows = [(f"{path.name}: line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}: not a table at line {reader.line_num}: {error}") from None
    names = [dict.fromkeys(reader.fieldnames or (), "")]
    return "tsv" if delimiter == "\t" else "csv", _entries_of_rows(rows, _columns(names, path, caption_key), ignored)


def _read_tokens(text: str, path: Path, caption_key: str | None, ignored: Counter[str]) -> tuple[str, Iterable[_Entry]]:
    def entries() -> Iterator[_Entry]:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                match = _TOKEN_LINE.match(line.rstrip("\r"))
                image, caption = (match["image"], match["caption"]) if match else (None, None)
                yield _Entry(f"{path.name}: line {number}", image, caption)

    return "token", entries()


def _delimiter(header: str) -> str | None:
    for delimiter in (",", "\t", ";"):
        names = [name.strip().strip('"').lower() for name in header.split(delimiter)]
        if len(names) > 1 and any(key in names for key in IMAGE_KEYS):
            return delimiter
    return None


def _columns(rows: list[Any], path: Path, caption_key: str | None) -> tuple[str, str]:
    """Choose the columns of image and captions, by the keys that stand in any row."""
    known = {str(key) for row in rows if isinstance(row, dict) for key in row}
    if caption_key is not None and caption_key not in known:
        raise ValueError(f"{path}: no column {caption_key!r} (--caption_key){nearest(caption_key, sorted(known))}")
    image = next((key for key in IMAGE_KEYS if key in known), None)
    caption = caption_key or next((key for key in CAPTION_KEYS if key in known), None)
    if rows and (image is None or caption is None):
        lacking = f"image ({'|'.join(IMAGE_KEYS)})" if image is None else f"captions ({'|'.join(CAPTION_KEYS)})"
        found = ", ".join(sorted(known)[:10]) or "no columns"
        raise ValueError(
            f"{path}: no column for the {lacking}; found {found}; --caption_key names another for captions"
        )
    return image or IMAGE_KEYS[0], caption or CAPTION_KEYS[0]


def _entries_of_rows(
    rows: Iterable[tuple[str, Any]], columns: tuple[str, str], ignored: Counter[str]
) -> Iterator[_Entry]:
    image_key, caption_key = columns
    used = {image_key, caption_key, "split", "group"}
    for place, row in rows:
        if not isinstance(row, dict):
            yield _Entry(place, row, None)
            continue
        if len(row) > 2:
            ignored.update(str(key) for key in row if key not in used)
        yield _Entry(place, row.get(image_key), row.get(caption_key), row.get("split"), row.get("group"))


def _coco_entries(content: dict[str, Any], name: str, caption_key: str) -> Iterator[_Entry]:
    files = {str(image.get("id")): image.get("file_name") for image in content["images"] if isinstance(image, dict)}
    without = dict(files)
    for number, annotation in enumerate(content["annotations"], 1):
        place = f"{name}: annotation {number}"
        annotation = annotation if isinstance(annotation, dict) else {}  # noqa: PLW2901
        key = str(annotation.get("image_id"))
        without.pop(key, None)
        yield _Entry(place, files.get(key), annotation.get(caption_key))
    if without:
        yield _Entry(
            f"{name}: {len(without)} images without a caption, the first {next(iter(without.values()))}", "?", []
        )


def _karpathy_entries(images: list[Any], name: str) -> Iterator[_Entry]:
    for number, image in enumerate(images, 1):
        place = f"{name}: image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            yield _Entry(place, None, None)
            continue
        sentences = image.get("sentences")
        captions = [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else None
        path = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
        yield _Entry(place, path, captions, image.get("split"))


def _collect(entries: Iterable[_Entry]) -> tuple[list[Row], list[str]]:
    """Check entries and join those of the same image."""
    rows: dict[str, tuple[list[str], str | None, str | None, str]] = {}
    problems: list[str] = []
    for entry in entries:
        captions = _checked_captions(entry, problems)
        if not captions:
            continue
        split = _checked_split(entry, problems)
        group = None if entry.group in {None, ""} else str(entry.group)
        first = rows.get(entry.image)
        if first is None:
            rows[entry.image] = (captions, split, group, entry.place)
        elif (first[1], first[2]) != (split, group):
            problems.append(f"{entry.place}: {entry.image} has another split or group at {first[3]}")
        else:
            first[0].extend(captions)
    found = [Row(image, tuple(texts), split, group, place) for image, (texts, split, group, place) in rows.items()]
    return found, problems


def _checked_captions(entry: _Entry, problems: list[str]) -> list[str]:
    if not isinstance(entry.image, str) or not entry.image.strip() or "\0" in entry.image:
        problems.append(f"{entry.place}: no image path, but {_short(entry.image)}")
        return []
    captions = entry.captions if isinstance(entry.captions, list) else [entry.captions]
    good = []
    for caption in captions or [""]:
        if isinstance(caption, str) and caption.strip() and "\0" not in caption:
            good.append(caption.strip())
        else:
            empty = isinstance(caption, str) and not caption.strip()
            problems.append(f"{entry.place}: {'empty caption' if empty else f'no caption, but {_short(caption)}'}")
    return good


def _checked_split(entry: _Entry, problems: list[str]) -> str | None:
    if entry.split in {None, ""} if isinstance(entry.split, str | None) else False:
        return None
    split = SPLIT_NAMES.get(str(entry.split).strip().lower())
    if split is None:
        problems.append(f"{entry.place}: unknown split {_short(entry.split)}; known: train, val, test")
    return split


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
