"""How words and values are shown in messages."""

from __future__ import annotations

import difflib


def nearest(word: str, known: list[str]) -> str:
    """Say which of `known` is meant, as the end of an error message."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
