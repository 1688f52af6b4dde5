"""What a person reads on a page, and what of it is still English."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from cliptune.language.pages import RAW, SAID, STOPS, VOID

WORDS = re.compile(r"[A-Za-z][A-Za-z'’-]*(?:[\s,]+[A-Za-z][A-Za-z'’-]*)*")


def english(text: str, *, num_words: int = 3) -> list[str]:
    """Return the runs of so many English words or more, after flags, code in backquotes, paths and names of files."""
    text = re.sub(r"`[^`]*`|--\w+|\S*[\\/_.=@]\w\S*", "·", text)
    # a caption of the tests repeats a word
    return [found for found in WORDS.findall(text) if len(set(found.split())) >= num_words]


class Texts(HTMLParser):
    """The texts of a page that are not somebody's data (`translate="no"`), those of its attributes among them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._held = self._raw = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = bool(self._held) or ("translate", "no") in attrs
        self._held += held and tag not in VOID
        self._raw = tag in RAW
        for name, value in attrs:
            if name in SAID and not held:
                self.found.append(value or "")
            if name == STOPS:
                self.found += [text for _, text, _ in json.loads(value or "[]")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = self._held
        self.handle_starttag(tag, attrs)
        self._held = held

    def handle_endtag(self, tag: str) -> None:
        self._held -= self._held > 0
        self._raw = 0

    def handle_data(self, data: str) -> None:
        if data.strip() and not (self._held or self._raw):
            self.found.append(data.strip())
