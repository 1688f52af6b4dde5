"""Records with named columns, one at a time: which column holds the image, which the captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from cliptune.data.column_names import Columns
from cliptune.data.index import Records, kind, quote

_EARLY_STARTS = 4


def read_rows(found: Records, form: str, rows: Callable[[], Iterator[tuple[int, Any]]], *, unit: str) -> str:
    """Take numbered objects with an image column and a caption column; one that could not be parsed is its ValueError.

    All rows have a say in which columns are meant, and they pass by one at a time. So they are read with the choice
    that the names seen so far give, and from the start again should a new name change it: at once the first times,
    then when all names are known, so that a file whose every row has a new name is not read without end.
    """
    found.unit = unit
    found.texts_hold_lists = True
    names: dict[str, None] = {}
    columns, num_starts = None, 0
    while columns is None:
        found.restart()
        num_starts += 1
        columns = _take_rows(found, _spread(found, rows()), names, to_end=num_starts > _EARLY_STARTS)
    if columns:
        found.choose_columns(columns)
    return form


def _spread(found: Records, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Return the rows with columns of the inner keys, if there are such keys."""
    names = found.column_names
    if not names.inner_keys:
        return rows
    return ((number, names.spread(row) if isinstance(row, dict) else row) for number, row in rows)


def _take_rows(
    found: Records, rows: Iterator[tuple[int, Any]], names: dict[str, None], *, to_end: bool
) -> Counter[str] | None:
    """Take the rows with the columns that `names` give, and add the names that matter to it.

    Returns:
        In how many rows each name stands; None if a row has names that give other columns: at once, or with `to_end`
        when `names` has those of all rows.
    """
    chosen = found.column_names.columns(names)
    image, captions, split, group = chosen
    caption = captions[0] if len(captions) == 1 else None
    is_chosen = True
    # millions of rows have a few shapes: ("image", "caption") 999,990 times, ("image", "caption", "split") 10 times
    shapes: dict[tuple[str, ...], int] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            found.issue(number, str(row) if isinstance(row, ValueError) else _no_object(row))
            continue
        shape = tuple(row)
        num_before = shapes.get(shape, 0)
        shapes[shape] = num_before + 1
        if not num_before:
            new = [name for name in shape if name not in names and found.column_names.matters(name)]
            names.update(dict.fromkeys(new))
            if new and is_chosen and found.column_names.columns(names) != chosen:
                is_chosen = False
                if not to_end:
                    return None
        if not is_chosen:
            continue
        if caption in row and image in row:  # as nearly all are: a call of `take_row` for each would be felt
            found.add(number, row[image], row[caption], row.get(split), row.get(group))
        else:
            take_row(found, number, row, chosen)
    columns: Counter[str] = Counter()
    for shape, num_rows in shapes.items():
        columns.update(dict.fromkeys(shape, num_rows))
    return columns if is_chosen else None


def take_row(found: Records, number: int, row: dict[str, Any], columns: Columns) -> None:
    """Take a row, or note which columns it lacks."""
    image, captions, split, group = columns
    if image in row and len(captions) == 1 and captions[0] in row:
        found.add(number, row[image], row[captions[0]], row.get(split), row.get(group))  # type: ignore[arg-type]
    elif image in row and not row.keys().isdisjoint(captions):
        found.add(number, row[image], caption_cells(row, captions), row.get(split), row.get(group))  # type: ignore[arg-type]
    elif image is None and not captions:
        found.issue(number, "no image and no caption")
    else:
        found.issue(number, f"no {', '.join(captions) if image in row else image}")


def caption_cells(row: dict[str, Any], columns: tuple[str, ...]) -> Any:
    """Return what the caption's column holds; of several columns the captions of those that are not empty."""
    if len(columns) == 1:
        return row.get(columns[0])
    cells = (row.get(name) for name in columns)
    filled = (cell for cell in cells if cell is not None and (not isinstance(cell, str) or cell.strip()))
    return [caption for cell in filled for caption in (cell if isinstance(cell, list) else [cell])]


def _no_object(value: Any) -> str:
    way_out = ' (pandas names the columns with to_json(orient="records"))' if isinstance(value, list) else ""
    return f"expected an object, found {kind(value)}{way_out}"


def refuse_repeated(found: Records, names: list[str]) -> None:
    """Raise if two columns have one name: either could be meant."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{found.path}: column {quote(twice[0])} stands twice in the header")
