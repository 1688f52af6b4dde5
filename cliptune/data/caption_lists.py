"""Lists of captions that are written as text, as tables have them in one cell."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

# pandas writes lists as Python does, with commas, and arrays as NumPy does, with blanks and line ends
_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_ELEMENT = re.compile(rf"\s*(?:({_TEXT})|(None|nan))\s*(,|(?=[\s'\"\]]))", re.DOTALL)


def caption_list(text: str) -> list[Any] | str:
    """Return the values of a JSON, Python or NumPy list with at least one text in it; any other text as it is."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return text
    try:
        values = json.loads(stripped)
    except (ValueError, RecursionError):
        values = _python_list(stripped[1:-1])
    is_list = isinstance(values, list) and (not values or any(isinstance(value, str) for value in values))
    return values if is_list else text


def _python_list(text: str) -> list[Any] | None:
    """Return the elements between the brackets of a list of texts and None; None for anything else."""
    values: list[Any] = []
    position = 0
    while position < len(text.rstrip()):
        match = _ELEMENT.match(f"{text}]", position)
        if match is None:
            return None
        values.append(None if match[2] else _text(match[1]))
        position = match.end()
    return values


def _text(literal: str) -> str:
    if "\\" not in literal:
        return literal[1:-1]
    try:
        with warnings.catch_warnings():  # an escape that Python does not know stays as it is
            warnings.simplefilter("ignore")
            return str(ast.literal_eval(literal))
    except (ValueError, SyntaxError):  # a line end inside, or half an escape
        return literal[1:-1]
