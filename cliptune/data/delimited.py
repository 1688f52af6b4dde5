"""Tables in text: CSV and TSV with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from cliptune.data.columns import read_rows, refuse_repeated
from cliptune.data.index import CAPTION_COLUMNS, IMAGE_COLUMNS, Records
from cliptune.data.text_stream import TextFile

MAX_HEADER = 65536


def read_table(found: Records, text: TextFile, delimiter: str, names: list[str]) -> str:
    """Take the rows below a header of these names."""
    refuse_repeated(found, names)
    form = "tsv" if delimiter == "\t" else "csv"
    return read_rows(found, form, lambda: _table_rows(text, delimiter, names), unit="line")


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


def header(line: str, caption_key: str | None) -> tuple[str, list[str]] | None:
    """Return the delimiter that gives most known names in the first line, and the names; None for no table."""
    best: tuple[int, str, list[str]] = (0, "", [])
    for delimiter in ",\t;" if len(line) < MAX_HEADER and "\r" not in line.rstrip() else "":
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
        num_known = len({*IMAGE_COLUMNS, *CAPTION_COLUMNS, caption_key}.intersection(names))
        if len(names) > 1 and num_known > best[0]:
            best = (num_known, delimiter, names)
    return best[1:] if best[0] else None
