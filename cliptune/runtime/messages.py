"""How words, numbers and values from files are shown in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MAX_LENGTH = 200
MAX_ITEM = 1000
MAX_MESSAGE = 4000
"""Characters of a whole message: ten issues and what to do about them; a text from a file in it may have millions."""


def shorten(text: str, limit: int = MAX_LENGTH) -> str:
    """Cut a text that is longer than `limit` characters, and show that it was."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def printable(text: str) -> str:
    """Escape what a terminal or a log would not show as itself: line ends, control characters, half characters.

    Marks that turn the direction of writing are among them: they would show `gpj.exe` as `exe.jpg`.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def shown(value: object, limit: int = MAX_LENGTH) -> str:
    """Show a value from a file as data, whatever is in it: cut where it is long, and printable."""
    return printable(shorten(str(value), limit))


def message_line(text: str) -> str:
    """Make one printable line of a message; of a very long one the middle is left out: its end says what to do."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
    return printable(text)


def one_line(error: BaseException) -> str:
    """Say an error in one line: its message, or the name of its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Say how many there are: `1 caption`, `2 captions`, `1,000 entries` (`plural` where it is not just an s)."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def first_few(items: Sequence[object], limit: int = 3, *, total: int | None = None) -> str:
    """List some items: `a; b; c; and 4 more`.

    Args:
        items: at least the first `limit` of them.
        limit: how many are shown.
        total: how many there are; None: `len(items)`.
    """
    first = [shorten(str(item), MAX_ITEM) for item in items[:limit]]
    more = (len(items) if total is None else total) - len(first)
    return "; ".join([*first, *([f"and {more:,} more"] if more > 0 else [])])


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which of `known` is meant, as the end of an error message; where none is close, list them."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"
