"""Texts in another language: whole, or by the template that they were made from.

A catalogue is a flat JSON object, an English template to its translation. The values that were filled into a text are
`{0}`, `{1}`, ... in the order in which they stand in the English one:

    "{0}: expected a number, got {1}": "{0}：应为数字，得到的是 {1}"

A value is itself translated where it is a phrase of ours (two words or more), and stays where it is not: a path, a
name, a number. In the translation `{0:w}` also translates a value of one word, `{0:r}` leaves a value as it is whatever
it says, and `{0:x}` says nothing (the ending of a plural); in the English text `{0:n}` is a number alone, so that
`{0:n} images` is no folder called `my images`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.resources import files
from string import Formatter
from typing import NamedTuple

NAMES = ("en", "zh")
_LETTER = re.compile("[A-Za-z]")
_NUMBER = re.compile(r"[-+−]?\d([\d.,]*\d)?(e[-+]?\d+)?%?")
_CELL = re.compile(r"(-> )?(\S+(?: \S+)*)")
"""Of a table: words with single spaces between them, and the arrow of an advice."""
_HAS_CELLS = re.compile(r"\S {2,}\S|^ *-> ")
MAX_DEPTH = 8
"""Of texts inside texts: a message that quotes itself a thousand times is not taken apart."""
MAX_CACHED = 4096
MAX_TRIED = 4
"""Templates that a text is filled into, of which the best is taken."""
MAX_PLACE = 1000
"""Characters that a place in a file may have, before what is wrong there."""
SEPARATORS = (("\n", "\n"), ("; ", "；"), (". ", "。"), (" · ", " · "), (", ", "，"), (" and ", "和"))
"""At which a text is taken apart that is not known whole, and what joins its parts in Chinese."""
ENDS = {".": "。", ":": "：", ";": "；", ",": "，"}
WIDE_MARKS = (*ENDS.values(), "？")
_HAN = re.compile("[\u4e00-\u9fff]")
_BEGINS_LATIN = re.compile(r"""[\w'"`/.<+−-]""", re.ASCII)
_ENDS_LATIN = re.compile(r"""[\w'"`/>%]""", re.ASCII)
_NAMES = re.compile(r"'[\w.-]*'(?:(?:, | or )'[\w.-]*')+")
"""What a setting may be, as pydantic lists it."""
OWN = {"\n", " · "}
"""Separators that we alone write: their parts are texts of their own, which may be one word."""
NEEDS_ALL = {", ", " and "}
"""Separators that stand in names as well: nothing is said of such a text unless all of its parts are known."""


class Value(NamedTuple):
    """A value within a translation."""

    place: int
    kind: str
    """`w`, `r`, `x` or nothing."""


class Template(NamedTuple):
    """A text with values in it."""

    literals: tuple[str, ...]
    """What stands before, between and behind its values."""
    is_number: tuple[bool, ...]
    said: tuple[str | Value, ...]

    @property
    def num_letters(self) -> int:
        """Characters that must be there."""
        return sum(map(len, self.literals))

    @property
    def is_phrase(self) -> bool:
        """Tell whether it is recognised within another text, where a name may stand as well."""
        is_named = bool(self.literals[0]) and any(each.endswith(": ") for each in self.literals)  # known: {0}
        return all(self.is_number) or is_named or len(re.findall(r"[A-Za-z]+", " ".join(self.literals))) > 1

    @property
    def moves_first(self) -> bool:
        """Tell whether the translation does not begin with the first value."""
        first = next(each for each in self.said if each)
        return isinstance(first, str) or first.place > 0

    def match(self, text: str) -> list[str] | None:
        """Return the values of a text that was made from it, each as short as can be; None: it was not.

        Each literal is taken where it first comes, which needs no way back: "{0} of {1}" of "1 of 2 of 3" is 1 and
        "2 of 3". So a text costs its length, whatever is in it.
        """
        first, *between, last = self.literals
        end = len(text) - len(last)
        if end < len(first) or not (text.startswith(first) and text.endswith(last)):
            return None
        values, start = [], len(first)
        for literal in between:
            found = text.find(literal, start, end)
            if found < 0:
                return None
            values.append(text[start:found])
            start = found + len(literal)
        values.append(text[start:end])
        fits = (_NUMBER.fullmatch(each) or not number for each, number in zip(values, self.is_number, strict=True))
        return values if all(fits) else None


class Language:
    """Says texts in a language.

    Args:
        name: one of `NAMES`.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"unknown language {name!r}; known: {', '.join(NAMES)}")
        self.name = name
        self._known = lru_cache(MAX_CACHED)(self._look_up)

    @property
    def html(self) -> str:
        """Its name on a page."""
        return {"zh": "zh-CN"}.get(self.name, self.name)

    def say(self, text: str) -> str:
        """Return a text in this language; what no catalogue knows stays as it is.

        Args:
            text: English; of several lines or sentences it is looked up whole, then part by part.
        """
        if self.name == "en" or not _LETTER.search(text):
            return text
        # a page makes a sentence of a recorded reason: "There is nothing ..." of "there is nothing ..."
        return self._said(text, 0) or self._said(text[:1].lower() + text[1:], 0) or text

    def say_lines(self, text: str) -> str:
        """Return printed lines in this language. Cells of a table, two spaces or more apart, keep their columns."""
        if self.name == "en":
            return text
        return "\n".join(
            self._say_cells(line) if _HAS_CELLS.search(line) else self.say(line) for line in text.split("\n")
        )

    def _say_cells(self, line: str) -> str:
        said = ""
        for cell in _CELL.finditer(line):
            arrow, words = cell[1] or "", cell[2]
            text = arrow + self.say(words)
            # a heading ends above the numbers below it; a name or a sentence starts where it did
            is_heading = cell.start() > 2 and not re.match(r"[\d(-]", cell[0]) and len(words.split()) < 4
            column = cell.end() - _width(text) if is_heading and text != cell[0] else cell.start()
            said += " " * max(column - _width(said), 1 if said else 0) + text
        return said

    def _said(self, text: str, depth: int) -> str | None:
        """Return a text in this language, with what stands around it; None: nothing in it is known."""
        core = text.strip()
        if depth > MAX_DEPTH or not _LETTER.search(core):
            return None
        said = self._known(core, depth)
        if said is None:
            return None
        start = text.find(core)
        after = text[start + len(core) :]
        # a wide mark brings its own space
        return text[:start] + said + (after.lstrip(" ") if said.endswith(WIDE_MARKS) else after)

    def _look_up(self, text: str, depth: int) -> str | None:
        exact = self._catalogue[0]
        if text in exact and (not depth or " " in text):
            return exact[text]
        if _NAMES.fullmatch(text):
            return text.replace(", ", "、").replace(" or ", " 或 ")
        # a template may take what stands around a text as a value of its own: of several the one that leaves the least
        # English is right, and of equal ones the first
        if said := [*self._as_place(text, depth), *self._as_list(text, depth), *self._as_whole(text, depth)]:
            return min(said, key=lambda each: len(_LETTER.findall(each)))
        for separator, joined in SEPARATORS:
            if separator in text:
                inner = depth + (separator not in OWN)
                parts = self._say_parts(text.split(separator), joined, inner, needs_all=separator in NEEDS_ALL)
                if parts is not None:
                    return parts
        head, colon, tail = text.partition(": ")
        if colon and (parts := self._say_parts([head, tail], "：", depth + 1, needs_all=False)) is not None:
            return parts
        end = ENDS.get(text[-1:])
        core = None if end is None else self._said(text[:-1], depth)
        return None if core is None else f"{core}{end}"

    def _as_whole(self, text: str, depth: int) -> list[str]:
        """Say a text that is known, or as the first few templates that it may have been made from."""
        exact, templates = self._catalogue
        if text in exact and (not depth or " " in text):
            return [exact[text]]
        found: list[str] = []
        for literal, template in templates:
            if literal not in text:  # most of them, so without a call
                continue
            if (values := template.match(text)) is not None and (not depth or template.is_phrase):
                found.append(self._fill(template, values, depth))
                if len(found) == MAX_TRIED:
                    break
        return found

    def _as_list(self, text: str, depth: int) -> list[str]:
        """Say a list of texts all of which are known."""
        parts = self._say_parts(text.split("; "), "；", depth, needs_all=True) if "; " in text else None
        return [] if parts is None else [parts]

    def _as_place(self, text: str, depth: int) -> list[str]:
        """Say where something stands, and what is wrong there: `data.csv: line 3: ` and a text that is known whole."""
        start = text.find(": ")
        while start >= 0 and "; " not in text[:start]:
            if found := self._as_whole(text[start + 2 :], depth + 1):
                where = self._said(text[:start], depth + 1) or text[:start]
                return [f"{where}：{each}" for each in found]
            start = text.find(": ", start + 2, MAX_PLACE)
        return []

    def _fill(self, template: Template, values: list[str], depth: int) -> str:
        where = ""
        if not template.literals[0] and template.moves_first:  # "data.csv: row 3: 5 cells" begins with a place
            place, colon, values[0] = values[0].rpartition(": ")
            where = f"{self._said(place, depth + 1) or place}：" if colon else ""
        pieces = []
        for each in template.said:
            said = each if isinstance(each, str) else self._say_value(values[each.place], each.kind, depth)
            pieces.append((said, isinstance(each, str) or said != values[each.place]))
        return where + _joined(pieces)

    def _say_parts(self, parts: Sequence[str], joined: str, depth: int, *, needs_all: bool) -> str | None:
        said = [self._said(part, depth) for part in parts]
        if not any(said) or (needs_all and not all(said)):
            return None
        pieces = [(joined, True)]
        for old, new in zip(parts, said, strict=True):
            pieces += [(old if new is None else new, new is not None), (joined, True)]
        return _joined(pieces[1:-1])

    def _say_value(self, value: str, kind: str, depth: int) -> str:
        if kind in {"r", "x"}:
            return value if kind == "r" else ""
        word = self._catalogue[0].get(value.strip()) if kind == "w" else None
        return word or self._said(value, depth + 1) or value

    @cached_property
    def _catalogue(self) -> tuple[dict[str, str], list[tuple[str, Template]]]:
        """What is known, read at the first text: whole texts, and templates, the most particular first.

        Before each template stands its longest literal, since a report has thousands of texts to look up.
        """
        exact, templates = {}, []
        for subject in sorted(files("cliptune.language").joinpath(self.name).iterdir(), key=lambda file: file.name):
            for key, said in json.loads(subject.read_text(encoding="utf-8")).items():
                template = make_template(key, said)
                if len(template.literals) == 1:
                    exact[template.literals[0]] = "".join(str(each) for each in template.said)
                elif _LETTER.search("".join(template.literals)):  # else it would be any text
                    templates.append(template)
        templates.sort(key=lambda each: (-each.num_letters, each.literals))
        return exact, [(max(each.literals, key=len), each) for each in templates]


@lru_cache
def language_of(name: str) -> Language:
    """Return a language by its name; see `Language`."""
    return Language(name)


def make_template(key: str, said: str) -> Template:
    """Read an entry of a catalogue, both of whose texts are written as for `str.format`.

    Raises:
        ValueError: values that are not `{0}`, `{1}`, ... in their order, or others in the translation.
    """
    literals: list[str] = [""]
    is_number: list[bool] = []
    for literal, name, spec, _ in Formatter().parse(key):
        literals[-1] += literal
        if name is not None:
            if name != str(len(is_number)) or spec not in {"", "n"}:
                raise ValueError(f"{key!r}: expected {{{len(is_number)}}}, got {{{name}:{spec}}}")
            is_number.append(spec == "n")
            literals.append("")
    parts: list[str | Value] = []
    for literal, name, spec, _ in Formatter().parse(said):
        parts.append(literal)
        if name is not None:
            if not name.isdecimal() or int(name) >= len(is_number) or spec not in {"", "w", "r", "x"}:
                raise ValueError(f"{said!r}: {{{name}:{spec}}} is no value of {key!r}")
            parts.append(Value(int(name), spec or ""))
    return Template(tuple(literals), tuple(is_number), tuple(parts))


def _joined(pieces: Sequence[tuple[str, bool]]) -> str:
    """Join pieces of a text, each with whether we wrote it: what a person wrote stays as it is.

    Our Chinese keeps a space from Latin letters beside it, and none after a wide mark: `应为 'auto'`, `；你`.
    """
    text, was_ours = "", False
    for piece, is_ours in pieces:
        added = piece.lstrip(" ") if is_ours and text.endswith(WIDE_MARKS) else piece
        is_after = was_ours and _HAN.match(text[-1:]) and _BEGINS_LATIN.match(added)
        is_before = is_ours and _HAN.match(added) and _ENDS_LATIN.match(text[-1:])
        text += f" {added}" if is_after or is_before else added
        was_ours = is_ours if added else was_ours
    return text


def _width(text: str) -> int:
    """Return the columns of a terminal that a text takes."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)
