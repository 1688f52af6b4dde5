"""Tables in text, with a header: cells between commas, semicolons, tabs or bars."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Generator, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from cliptune.data.column_names import ColumnNames
from cliptune.data.columns import read_rows, refuse_repeated
from cliptune.data.index import Records
from cliptune.data.text_stream import TextFile
from cliptune.data.token_lines import IMAGE_NAME
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

MAX_HEADER = 65536
SEPARATOR_LINE = re.compile(r"sep=(.)", re.IGNORECASE)
"""What Excel writes before a header."""
_NUMBERED_WORD = re.compile(r"\w*\d\w*")


class Header(NamedTuple):
    """What the first line of a table says."""

    delimiter: str
    names: list[str]


def header(line: str, caption_key: str | None, image_key: str | None = None) -> Header | None:
    """Return the delimiter that gives most known names in the first line, and the names; None for no table."""
    best: tuple[int, Header | None] = (0, None)
    columns = ColumnNames(image_key, caption_key)
    for delimiter in ",\t;|" if len(line) < MAX_HEADER and "\r" not in line.rstrip() else "":
        names = header_names(line, delimiter)
        num_known = columns.num_known(names) if len(names) > 1 else 0
        if num_known > best[0]:
            best = (num_known, Header(delimiter, names))
    return best[1]


def header_names(line: str, delimiter: str) -> list[str]:
    """Return the names between delimiters."""
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    return [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]


def read_table(found: Records, text: TextFile, table: Header, *, line: int) -> str:
    """Take the rows below a header, which is the line of that number."""
    refuse_repeated(found, table.names)
    reader = _Table(text, table, line, found.column_names)
    form = read_rows(found, "tsv" if table.delimiter == "\t" else "csv", reader.rows, unit="line")
    if reader.num_lone:
        lines = count(reader.num_lone, "line")
        logger.warning(
            "%s: a quote mark that does not close with its cell is taken as text in %s, the first of them line %d",
            found.path, lines, reader.first_lone,
        )  # fmt: skip
    return form


class _Table:
    """The rows of a table, where a quote mark may be just text.

    A quoted cell may hold line ends. But where a line inside it looks like a record (as many cells as the header, and
    in the image's column a name like an image's), or where the quote never closes or closes inside a cell, the quote
    is text, and each line is a record by itself:

        a.jpg,"first line          one record of two lines
        second, and last line"
        b.jpg,"tis a kite          two records: c.jpg is the name of an image
        c.jpg,a boat 12" long

    A cell of more than 128 KB (`csv.field_size_limit`) is taken for one that never closes, which bounds what is read.
    """

    def __init__(self, text: TextFile, table: Header, line: int, columns: ColumnNames) -> None:
        self.text, self.names, self.delimiter, self.header_line = text, table.names, table.delimiter, line
        image = columns.columns(table.names).image
        self.image_index = None if image is None else table.names.index(image)
        delimiter = re.escape(table.delimiter)
        self.cell = re.compile(rf' *(?:"([^"]*(?:""[^"]*)*)" *(?={delimiter}|$)|([^{delimiter}]*))')
        self.num_lone = self.first_lone = 0

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield line number and cells by name of each row; instead of an invalid row its ValueError."""
        self.num_lone = 0
        number, lines = self.header_line + 1, list[str]()
        for block in chain(self.text.line_blocks(after=self.header_line), [None]):
            lines += block or ()
            start = yield from self.block_rows(lines, number, is_last=block is None)
            number += start
            del lines[:start]

    def block_rows(self, lines: list[str], number: int, *, is_last: bool) -> Generator[tuple[int, Any], None, int]:
        """Yield the rows of lines from that of a number on; return where a record begins that may go on behind them."""
        names, num_names, start = self.names, len(self.names), 0
        while start < len(lines):
            begin = start
            # strict: without it a quote that never closes would swallow the rows after it
            reader = csv.reader(
                islice(lines, begin, None), delimiter=self.delimiter, skipinitialspace=True, strict=True
            )
            try:
                for cells in reader:
                    end = begin + reader.line_num
                    if end - start > 1 and self.holds_record(lines[start:end], cells):
                        raise csv.Error("a quote that opens a cell does not close before the next record")
                    if len(cells) == num_names and any(cells):
                        yield number + start, dict(zip(names, cells, strict=True))
                    elif any(cells):
                        yield number + start, self.row(cells)
                    start = end
            except csv.Error as error:
                if begin + reader.line_num == len(lines) and not is_last:
                    return start
                yield number + start, self.lone_line(number + start, lines[start], error)
                start += 1
        return start

    def holds_record(self, lines: list[str], cells: list[str]) -> bool:
        """Tell whether one of the lines of a record with these cells is a record by itself."""
        of_lines = [index for index, cell in enumerate(cells) if "\n" in cell]
        if self.image_index is None or not of_lines:
            return False
        # in the first line all is as it should be up to the quoted cell, in the last line all behind it
        suspects = [line for line in lines[1:-1] if '"' not in line.replace('""', "")]
        suspects += lines[:1] if self.image_index > of_lines[0] else []
        suspects += lines[-1:] if self.image_index <= of_lines[-1] else []
        image = _shape(cells[self.image_index]) if self.image_index < len(cells) else ""
        return any(self.is_record(line, image) for line in suspects)

    def is_record(self, line: str, shape: str) -> bool:
        """Tell whether a line looks like a record of an image whose name has a shape."""
        cells = self.split(line)
        if self.image_index is None or len(cells) != len(self.names) or not cells[self.image_index].strip():
            return False
        image = cells[self.image_index].strip()
        ending = IMAGE_NAME.search(image)
        return (ending is not None and ending.end() == len(image)) or _shape(image) == shape

    def split(self, line: str) -> list[str]:
        """Return the cells of a line; a quote that does not enclose a cell is text."""
        line = line.rstrip("\r\n")
        cells, end = list[str](), -1
        while end < len(line):
            match = self.cell.match(line, end + 1)
            assert match is not None  # an empty cell matches anywhere
            cells.append(match[2] if match[1] is None else match[1].replace('""', '"'))
            end = match.end()
        return cells

    def lone_line(self, number: int, line: str, error: csv.Error) -> dict[str, str] | ValueError:
        """Return the row of one line whose quote marks are text, or why it is none."""
        cells = self.split(line)
        # a backslash means that this quote is inside of quotes, "\r" that a line ends here for another program
        if '\\"' in line or "\r" in line.rstrip("\r\n") or not any(cell.startswith('"') for cell in cells):
            return ValueError(f"not a valid row: {error} (a quote inside quotes is written twice)")
        row = self.row(cells)
        if isinstance(row, dict):
            self.first_lone = self.first_lone if self.num_lone else number
            self.num_lone += 1
        return row

    def row(self, cells: list[str]) -> dict[str, str] | ValueError:
        """Return a row's cells by name, or why they do not fit."""
        if len(cells) == len(self.names):
            return dict(zip(self.names, cells, strict=True))
        way_out = "cells that hold the delimiter need quotes"
        if any(cell.strip().startswith("'") for cell in cells):
            way_out += ": double ones, not single ones"
        return ValueError(f"{len(cells)} cells, the header has {len(self.names)} ({way_out})")


def _shape(name: str) -> str:
    """Return what is the same in names without an ending: img_001 and img_017 are alike."""
    return _NUMBERED_WORD.sub("0", name.strip())
