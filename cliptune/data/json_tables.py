"""JSON objects that hold a table: as pandas writes it, or as a list of records under some key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from cliptune.data.index import SPLITS, Records, count_columns, kind
from cliptune.data.token_lines import IMAGE_NAME
from cliptune.runtime.messages import shorten

logger = logging.getLogger(__name__)

Rows = Callable[[], Iterator[Any]]
"""Gives the rows from the first one on, as often as it is called; one that is none is its ValueError."""


def table_rows(found: Records, document: dict[str, Any]) -> Rows | None:
    """Return the rows of a JSON object that holds a table.

    The ways to write one, those of pandas by the name of their `orient`:

        {"columns": ["image", "caption"], "data": [["a.jpg", "a cat"]]}     split
        {"image": {"0": "a.jpg"}, "caption": {"0": "a cat"}}                columns; also with lists
        {"0": {"image": "a.jpg", "caption": "a cat"}}                       index
        {"schema": {...}, "data": [{"image": "a.jpg", "caption": "a cat"}]} table, or any key with a list of records
        {"train": [{"image": "a.jpg", "caption": "a cat"}], "val": [...]}   the keys are splits

    Returns:
        None if the object is no table.

    Raises:
        ValueError: several lists could be meant.
    """
    header, data = document.get("columns"), document.get("data")
    if isinstance(header, list) and isinstance(data, list) and all(isinstance(name, str) for name in header):
        return lambda: (_row(header, cells) for cells in data)
    if _is_table(found, document):
        image = document[str(found.column_names.columns(document).image)]
        if isinstance(image, dict):
            return lambda: _rows_of_columns(
                {name: cells for name, cells in document.items() if isinstance(cells, dict)}
            )
        if isinstance(image, list):
            lists = {name: dict(enumerate(cells)) for name, cells in document.items() if isinstance(cells, list)}
            return lambda: _rows_of_columns(lists)
        return None
    if all(isinstance(row, dict) for row in document.values()) and _is_table(found, count_columns(document.values())):
        return lambda: iter(document.values())
    return _listed_rows(found, document)


def _listed_rows(found: Records, document: dict[str, Any]) -> Rows | None:
    """Return the records of the lists that are splits, or of the only list that has records."""
    splits = {key: rows for key, value in document.items() if key.lower() in SPLITS and (rows := _records(value))}
    if splits:
        return lambda: (_with_split(row, key.lower()) for key, rows in splits.items() for row in rows)
    lists = {key: rows for key, rows in document.items() if isinstance(rows, list) and any(map(_is_object, rows))}
    tables = [key for key, rows in lists.items() if _is_table(found, count_columns(rows))]
    if len(tables) > 1:
        keys = ", ".join(map(shorten, tables[:10]))
        raise ValueError(
            f"{found.path}: several keys hold records: {keys}; keep one list, or name them train, val, test"
        )
    key = next(iter(tables or (lists if len(lists) == 1 else ())), None)
    if key is None:
        return None
    logger.info("%s: the records of its key %s are read", found.path, shorten(key))
    return lambda: iter(lists[key])


def _records(value: Any) -> list[Any]:
    """Return the records of one split: a list of them, or a mapping of file names to captions."""
    if isinstance(value, dict) and any(IMAGE_NAME.search(name) for name in value):
        return [
            {**captions, "image_path": name}
            if isinstance(captions, dict)
            else {"image_path": name, "caption": captions}
            for name, captions in value.items()
        ]
    return value if isinstance(value, list) and any(map(_is_object, value)) else []


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_table(found: Records, names: Iterable[str]) -> bool:
    chosen = found.column_names.columns(names)
    return chosen.image is not None and bool(chosen.captions)


def _row(header: list[str], cells: Any) -> dict[str, Any] | ValueError:
    if not isinstance(cells, list):
        return ValueError(f"expected a list of cells, found {kind(cells)}")
    if len(cells) != len(header):
        return ValueError(f"{len(cells)} cells, the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _rows_of_columns(columns: dict[str, dict[Any, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of cells by column and by the row's name."""
    for key in dict.fromkeys(chain.from_iterable(columns.values())):
        yield {name: cells[key] for name, cells in columns.items() if key in cells}


def _with_split(row: Any, split: str) -> Any:
    return (
        {**{name: row[name] for name in row if name.strip().lower() != "split"}, "split": split}
        if _is_object(row)
        else row
    )
