"""Records with named columns, one at a time: which column holds the image, which the captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from cliptune.data.index import Records, kind, quote


def read_rows(found: Records, form: str, rows: Callable[[], Iterator[tuple[int, Any]]], *, unit: str) -> str:
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


def refuse_repeated(found: Records, names: list[str]) -> None:
    """Raise if two columns have one name: either could be meant."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{found.path}: column {quote(twice[0])} stands twice in the header")
