"""The records of one index while it is read: checked, and joined by image at the end."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cliptune.data.caption_lists import caption_list
from cliptune.data.column_names import CAPTION_COLUMNS, IMAGE_COLUMNS, ColumnNames, Columns, hint
from cliptune.data.issues import MAX_ISSUES, Issue, Issues, first_issues
from cliptune.data.table import NO_SPLIT, IntArray, RowBuffer, Rows, first_given
from cliptune.runtime.messages import count, first_few, nearest, shorten

logger = logging.getLogger(__name__)

SPLITS = {
    "train": "train", "training": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip


KNOWN_FORMS = (
    'known forms: a JSON list or JSON lines of {"image_path", "caption"}; CSV, TSV or bars with a header such as '
    "image,caption; Parquet with such columns; COCO captions; Karpathy; a JSON mapping {file name: [captions]}; lines "
    "of name.jpg#0<TAB>caption; a folder with images/ and captions/"
)


FORM_NAMES = {
    "json": "a JSON list", "jsonl": "JSON lines", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet",
    "chinese-clip": "Chinese-CLIP's texts", "coco": "COCO captions", "karpathy": "Karpathy's JSON",
    "mapping": "a JSON mapping", "token": "token lines", "directory": "images/ with captions/",
    "beside": "images with their captions beside them", "folder": "images with the names of their folders as captions",
    "filename": "images with their names as captions",
}  # fmt: skip
"""What the forms are called in messages."""


class NoCaptionsError(ValueError):
    """An index, or a folder of images, that holds no caption at all, as contests hand out a test set."""


class Index(NamedTuple):
    """What an index file holds.

    `form` is one of `FORM_NAMES`; `ignored_columns` tells in how many
    objects each unused key stood; `issues` are those of single records.
    """

    rows: Rows
    form: str
    ignored_columns: dict[str, int]
    issues: Issues


class Records:
    """What has been read so far of one index: records and issues."""

    def __init__(self, path: Path, caption_key: str | None, image_key: str | None = None) -> None:
        self.path = path
        self.name = path.name
        self.caption_key = caption_key
        self.column_names = ColumnNames(image_key, caption_key)
        self.texts_hold_lists = False  # as cells of a table do, which have no other way, and what is made of tables
        self.unit = ""
        self.ignored: Counter[str] = Counter()
        self.restart()

    def restart(self) -> None:
        """Forget all records and issues."""
        self.records = RowBuffer()
        self.issues: list[tuple[int, Issue]] = []  # the first ones, each with the number of records before it
        self.num_issues = 0
        self.num_uncaptioned = 0  # of the issues: those of an image with no or an empty caption

    def location(self, number: int, unit: str | None = None) -> str:
        """Return where a record stands, as `data.json: row 17`."""
        return f"{self.name}: {unit or self.unit} {number}"

    def issue(
        self, location: int | str, message: str, *, image: Any = "", num_before: int | None = None, num_records: int = 1
    ) -> None:
        """Note an issue at a source location, or of the record of a number; it comes behind `num_before` records."""
        self.num_issues += num_records
        if len(self.issues) < MAX_ISSUES:
            where = location if isinstance(location, str) else self.location(location)
            position = len(self.records) if num_before is None else num_before
            name = shorten(image) if isinstance(image, str) else ""
            self.issues.append((position, Issue(shorten(message), name, shorten(where), num_records)))

    def captions(self, location: int | str, values: Any, *, image: Any = "") -> list[str]:
        """Return the usable captions of one record; the others become issues."""
        usable = []
        if self.texts_hold_lists and not (isinstance(values, str) and "[" not in values):
            values = _without_list_cells(values)
        for value in values if isinstance(values, list) else [values]:
            try:
                usable.append(check_caption(value, is_cell=self.texts_hold_lists and value is values))
            except ValueError as error:
                self.issue(location, str(error), image=image)
                self.num_uncaptioned += value is None or (isinstance(value, str) and not value.strip())
        if values == []:
            self.issue(location, "no caption", image=image)
            self.num_uncaptioned += 1
        return usable

    def add(self, location: int | str, image: Any, captions: Any, split: Any = None, group: Any = None) -> None:
        """Take one record; what is wrong with it becomes an issue."""
        usable = self.captions(location, captions, image=image)
        try:
            image, split, group = check_text("image", image), check_split(split), check_group(group)
        except ValueError as error:
            self.issue(location, str(error), image=image)
            return
        if usable:
            number = location if isinstance(location, int) else 0
            self.records.append(image, usable, split=split, group=group, number=number)

    def index(self, form: str) -> Index:
        """Join the records of each image; none at all is a ValueError that quotes the first issues."""
        if not len(self.records):
            reasons = first_issues([issue for _, issue in self.issues], 3, total=self.num_issues) or "it has no records"
            error = NoCaptionsError if self.num_uncaptioned == self.num_issues > 0 else ValueError
            raise error(f"{self.path}: no image with a caption: {reasons}")
        rows = self.records.rows(f"{self.name}: {self.unit}" if self.unit else "")
        first = rows.images.first_equal()
        self.note_conflicts(rows, first)
        issues = Issues([issue for _, issue in self.issues], self.num_issues)
        return Index(rows.joined(first), form, dict(self.ignored), issues)

    def note_conflicts(self, rows: Rows, first: IntArray) -> None:
        """Note the records whose split or group is another than an earlier record of their image gave."""
        split_given, group_given = rows.splits != NO_SPLIT, ~rows.groups.empty
        split_of, group_of = first_given(split_given, first), first_given(group_given, first)
        # rows of one image with splits train, none, val: only the third differs from the first that is given
        differs = split_given & (rows.splits != rows.splits[split_of])
        repeats = group_given & (group_of != np.arange(len(rows)))
        earlier, self.issues = self.issues, []
        for row in map(int, np.flatnonzero(differs | repeats)):  # one by one: a list of millions would be large
            split, group = rows.split_name(split_of[row]), rows.groups[group_of[row]]
            for name, value, before in (("split", rows.split_name(row), split), ("group", rows.groups[row], group)):
                if value and value != before:
                    said = f"{name} {quote(value)}, but {quote(before)} at {rows.location(first[row])}"
                    image = rows.images[row]
                    self.issue(rows.location(row), f"{quote(image)}: {said}", image=image, num_before=row)
        # issues of reading and these, in the order of the records that they stand behind
        self.issues = sorted([*earlier, *self.issues], key=itemgetter(0))[:MAX_ISSUES]

    def choose_columns(self, columns: Counter[str]) -> Columns:
        """Return the columns to read, and note the others; raise if there are none of images or none of captions."""
        image, captions = self.choose_image(columns), self.choose_captions(columns)
        chosen = self.column_names.columns(columns)._replace(image=image, captions=captions)
        self.ignore(columns, (image, *captions, chosen.split, chosen.group))
        return chosen

    def choose_image(self, columns: Counter[str], preferred: tuple[str, ...] = ()) -> str:
        """Return the column of the images; raise if there is none."""
        images = self.column_names.images(columns, preferred)
        if not images:
            key = self.column_names.image_key
            raise ValueError(self._missing_column(columns, "image", key, (*preferred, *IMAGE_COLUMNS)))
        self._tell_choice("image", [(name,) for name in images])
        return images[0]

    def choose_captions(self, columns: Counter[str], preferred: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Return the columns of the captions; raise if there are none."""
        captions = self.column_names.captions(columns, preferred)
        missing = self.column_names.missing(columns) if self.caption_key is not None else None
        if not captions or missing in self.column_names.caption_keys:
            key = missing if missing in self.column_names.caption_keys else self.caption_key
            raise NoCaptionsError(self._missing_column(columns, "caption", key, (*preferred, *CAPTION_COLUMNS)))
        self._tell_choice("caption", captions)
        return captions[0]

    def _missing_column(self, columns: Counter[str], what: str, key: str | None, known: Iterable[str]) -> str:
        present = [shorten(name) for name, _ in columns.most_common(20)]
        if key is not None:
            return f"{self.path}: no row has {what}_key {quote(key)}{nearest(key, present)}"
        reason = hint(columns, what) or f"; known: {', '.join([*known][:6])}, ...; name it with --{what}_key"
        return f"{self.path}: no {what} column: found {', '.join(present) or 'no keys'}{reason}"

    def _tell_choice(self, what: str, candidates: list[tuple[str, ...]]) -> None:
        """Say which columns are taken where there are several, or others that are as good."""
        taken, *others = [", ".join(map(shorten, names)) for names in candidates]
        if len(candidates[0]) > 1 or others:
            flags = f"; --{what}_key takes another: {'; '.join(others[:5])}" if others else ""
            logger.info("%s: %ss are taken from %s%s", self.path, what, shorten(taken), flags)

    def ignore(self, columns: Counter[str], used: Iterable[str | None]) -> None:
        """Count the columns that are not used."""
        self.ignored.update({name: count for name, count in columns.items() if name not in set(used)})

    def refuse_caption_key(self, form: str) -> None:
        """Raise if a column is asked for in a form that has none."""
        if self.caption_key is not None:
            raise ValueError(f"{self.path}: caption_key {quote(self.caption_key)}: the {form} form has no columns")

    def objects(self, values: Any, unit: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the objects of a JSON list with their numbers; other values become issues."""
        for number, value in enumerate(values, 1):
            if isinstance(value, dict):
                yield number, value
            else:
                self.issue(self.location(number, unit), f"expected an object, found {kind(value)}")

    def uncaptioned(self, numbers: list[int]) -> None:
        """Note the images that no caption belongs to; many of them in one line."""
        self.num_uncaptioned += len(numbers)
        if len(numbers) > 5:
            first = ", ".join(f"{self.unit} {number}" for number in numbers[:3])
            message = f"{count(len(numbers), 'image')} have no caption ({first}, ...)"
            self.issue(self.name, message, num_records=len(numbers))
        else:
            for number in numbers:
                self.issue(number, "no caption")


def count_columns(rows: Iterable[Any]) -> Counter[str]:
    """Return in how many of the objects each key stands."""
    return Counter(chain.from_iterable(row for row in rows if isinstance(row, dict)))


def _without_list_cells(values: Any) -> Any:
    """Return captions with those that are texts of lists in their place."""
    if isinstance(values, str):
        return caption_list(values)
    if not isinstance(values, list):
        return values
    lists = (caption_list(value) if isinstance(value, str) else [value] for value in values)
    return list(chain.from_iterable([value] if isinstance(value, str) else value for value in lists))


def check_caption(value: Any, *, is_cell: bool = False) -> str:
    """Return a caption as a stripped text; of an object the one in it: `{"text": "a cat", "id": 7}`.

    Args:
        value: the caption.
        is_cell: it is all of a cell of a table, in which an inner key may name one of several texts.

    Raises:
        ValueError: no text, or an object in which no key, or several, may hold a caption.
    """
    if not isinstance(value, dict):
        return check_text("caption", value)
    found = list(chain.from_iterable(ColumnNames(None, None).captions(value)))
    if len(found) != 1:
        keys = first_few(list(map(shorten, value))) or "no keys"
        if is_cell and value:
            raise ValueError(
                f"caption is an object of {keys}: name the text that is meant, as in --caption_key "
                f"COLUMN.{shorten(next(iter(value)))}, or write it in its place"
            )
        raise ValueError(f"caption is an object of {keys}: write the text that is meant in its place")
    return check_text("caption", value[found[0]])


def check_text(what: str, value: Any) -> str:
    """Return a stripped text; one that is empty, or no text that can be stored, is a ValueError."""
    if not isinstance(value, str):
        if (
            what == "caption"
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
        ):
            return str(value)  # a caption 7 is meant as the text "7"
        raise ValueError(f"{what} is {kind(value)}, not text")
    text: str = value.strip()
    if not text:
        raise ValueError(f"empty {what}")
    if "\0" in text or (not text.isascii() and re.search("[\ud800-\udfff]", text)):
        raise ValueError(f"{what} holds a NUL byte or half a character")
    return text


def check_split(value: Any) -> str | None:
    """Return train, val, test or None; an unknown split, such as a number, is a ValueError."""
    if value is None or value == "":
        return None
    split = SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        if not isinstance(value, str) or value.strip().isdecimal():
            raise ValueError(
                f"unknown split {quote(value)}; write train, val or test in its place, or name the column otherwise if "
                "it is no split"
            )
        raise ValueError(f"unknown split {quote(value)}; known: train, val, test")
    return split


def check_group(value: Any) -> str | None:
    """Return a group as text, or None; what is no name or number is a ValueError."""
    if value is None or value == "":
        return None
    # a number is a name, too: groups 7 and "7" are the same
    return str(value) if is_id(value) and not isinstance(value, str) else check_text("group", value)


def is_id(value: Any) -> bool:
    """Tell whether a value can identify an image."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def kind(value: Any) -> str:
    """Name the JSON type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float | str):
        number = "NaN" if isinstance(value, float) and math.isnan(value) else "a number"
        return {bool: "a boolean", str: "text"}.get(type(value), number)
    return "a list" if isinstance(value, list) else "an object"


def quote(value: Any) -> str:
    """Show a value in a message: a text or number itself, the kind of anything else."""
    return repr(shorten(value, 60)) if isinstance(value, str) else str(value) if is_id(value) else kind(value)
