"""A text file piece by piece: its lines, or the values of a JSON list."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from cliptune.runtime.messages import shorten

_BLOCK = 1 << 20
_NUL_MARK = "\udc00"  # cannot come from UTF-8; the csv and json modules refuse a file for one NUL byte
_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*(?=[^ \t\n\r])")
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_LONGEST_TOKEN = 16  # more than -Infinity or the escapes of a surrogate pair


class TextFile:
    """A text, read from its start as often as needed; a byte order mark is dropped, a NUL is U+DC00.

    It is UTF-8, or what its byte order mark says: UTF-16 or UTF-32.

    Lines end at line feeds, or at carriage returns where there is no line feed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError (from every method): the file is not in its encoding; tells at which byte.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.path = path
        start = next(self._bytes(), b"")
        self._encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
        self._newline = "\n" if any(b"\n" in block for block in self._bytes()) else None

    def read(self) -> str:
        """Return the whole text."""
        with self._open() as file:
            return file.read().replace("\0", _NUL_MARK)

    def lines(self) -> Iterator[str]:
        """Yield the lines with their ends; str.splitlines would also split at characters that captions may hold."""
        with self._open() as file:
            for line in file:
                yield line.replace("\0", _NUL_MARK)

    def line_blocks(self, *, after: int = 0, size: int = 1 << 16) -> Iterator[list[str]]:
        """Yield the lines behind the line of number `after`, as many at once as have about so many characters."""
        with self._open() as file:
            for _ in islice(file, after):
                pass
            while block := file.readlines(size):
                yield [line.replace("\0", _NUL_MARK) for line in block] if "\0" in "".join(block) else block

    def first_line(self, max_length: int, *, after: int = 0) -> tuple[int, str]:
        """Return number and text of the first line that is not blank, cut at a length; (1, "") if there is none.

        Lines up to the number `after` do not count.
        """
        with self._open() as file:
            for number, line in enumerate(iter(lambda: file.readline(max_length), ""), 1):
                if line.strip() and number > after:
                    return number, line.replace("\0", _NUL_MARK)
        return 1, ""

    def json_items(self, *, block: int = _BLOCK) -> Iterator[Any]:
        """Yield the values of the JSON list that the file holds; of its text a block and one value are in memory.

        Python's own decoder reads each value, so it is what `json.loads` gives. (ijson would be the library for this.
        Its fast parser makes a question mark of half a character without a word, and its paths need gigabytes for a
        file of a hundred thousand opening brackets.)

        Raises:
            ValueError: not valid JSON; tells line, column and reason.
        """
        with self._open() as file:
            try:
                yield from _JsonList(file, block)
            except UnicodeError:
                raise
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}: not valid JSON: {json_reason(error)}") from None

    @contextmanager
    def _open(self) -> Iterator[TextIO]:
        try:
            with self.path.open(encoding=self._encoding, newline=self._newline) as file:
                yield file
        except UnicodeError:
            name = self._encoding.removesuffix("-sig").upper()
            where = f"{self.path}: not {name} at byte {self._first_bad_byte()}"
            raise ValueError(f"{where}; save the file as UTF-8 (in Excel: CSV UTF-8)") from None

    def _first_bad_byte(self) -> int:
        decoder = codecs.getincrementaldecoder(self._encoding.removesuffix("-sig"))()
        num_bytes = 0
        try:
            for block in self._bytes():
                decoder.decode(block)
                num_bytes += len(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            # error.start counts from what the decoder still held of the blocks before
            return num_bytes - len(decoder.getstate()[0]) + error.start
        except UnicodeError:  # UTF-16 and UTF-32 without their mark
            return num_bytes
        return num_bytes

    def _bytes(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block


class _JsonList:
    """A JSON list read through a window on its text, which moves on value by value."""

    def __init__(self, file: TextIO, block: int) -> None:
        self.file, self.block = file, block
        self.decode = json.JSONDecoder().raw_decode
        self.text = ""
        self.position = 0
        self.num_lines = 0  # before the window
        self.line_start = 0  # of the window's first line, at or before its first character

    def __iter__(self) -> Iterator[Any]:
        self.next_character()
        self.position += 1
        closed = self.next_character() == "]"
        while not closed:
            yield self.value()
            comma = _COMMA.match(self.text, self.position)
            if comma is None:
                closed = self.next_character() == "]"
                if not closed:
                    self.expect_comma()
            else:
                self.position = comma.end()
        self.position += 1
        if self.next_character():
            raise self.error("Extra data", self.position)

    def value(self) -> Any:
        """Return the value that starts here and move behind it."""
        while True:
            try:
                value, end = self.decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _LONGEST_TOKEN
                if not (cut and self.more()):
                    raise self.error(error.msg, error.pos) from None
            else:
                if end + _LONGEST_TOKEN < len(self.text) or not self.more():  # a number may go on behind the window
                    self.position = end
                    return value

    def expect_comma(self) -> None:
        """Move from a comma to the value behind it."""
        if self.next_character() != ",":
            raise self.error("Expecting ',' delimiter", self.position)
        self.position += 1
        self.next_character()

    def next_character(self) -> str:
        """Move to the next character that is not white space and return it; an empty string at the end."""
        while True:
            space = _SPACE.match(self.text, self.position)
            self.position = space.end() if space else self.position
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def more(self) -> bool:
        """Drop the text before the position and read on, twice as far for a long value; False at the end."""
        rest = self.text[self.position :]
        block = self.file.read(max(self.block, len(rest))).replace("\0", _NUL_MARK)
        if not block:
            return False
        new_lines = self.text.count("\n", 0, self.position)
        if new_lines:
            self.num_lines += new_lines
            self.line_start = self.text.rindex("\n", 0, self.position) + 1
        self.line_start -= self.position
        self.text, self.position = rest + block, 0
        return True

    def error(self, message: str, position: int) -> ValueError:
        """Tell a mistake with its line and column in the file."""
        line = self.num_lines + self.text.count("\n", 0, position) + 1
        line_start = self.text.rfind("\n", 0, position) + 1 or self.line_start
        return ValueError(f"line {line}, column {position - line_start + 1}: {message}")


def json_reason(error: ValueError | RecursionError) -> str:
    """Say in a few words why a text is not valid JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return "nested too deeply" if isinstance(error, RecursionError) else shorten(str(error))
