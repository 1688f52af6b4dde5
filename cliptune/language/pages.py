"""A finished page in another language: the texts between its tags, and those that only some readers are told."""

from __future__ import annotations

import html
import json
from html.parser import HTMLParser
from typing import Any

from cliptune.language.catalogue import Language

SAID = {"aria-label", "aria-valuetext", "title", "placeholder", "alt", "data-said"}
"""Attributes that a person reads or is read."""
STOPS = "data-stops"
"""JSON, `[x, text, ys]` each: what a chart says at a place."""
VOID = {"meta", "link", "input", "img", "br", "wbr", "hr"}
RAW = {"script", "style"}


def say_page(page: str, language: Language) -> str:
    """Say a page in a language, but for what stands in an element of `translate="no"`: data, names, commands.

    Args:
        page: HTML as a template gave it, in English, every element closed.
        language: of the result; its `lang` is set.
    """
    if language.name == "en":
        return page
    reader = _Reader(language)
    reader.feed(page)
    reader.close()
    return "".join(reader.said)


class _Reader(HTMLParser):
    """Repeats what it reads, and says texts and attributes as it does so."""

    def __init__(self, language: Language) -> None:
        super().__init__(convert_charrefs=True)
        self._language = language
        self._held = 0
        """Elements that are open since, and with, one that is not to be translated."""
        self._raw = False
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open(tag, attrs, is_open=tag not in VOID)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open(tag, attrs, is_open=False)

    def _open(self, tag: str, attrs: list[tuple[str, str | None]], *, is_open: bool) -> None:
        held = bool(self._held) or ("translate", "no") in attrs
        source = self.get_starttag_text() or ""
        for name, value in attrs:
            said = self._attribute(tag, name, value or "", held=held)
            # as Jinja2 escapes it, which wrote it
            source = source.replace(f'{name}="{_escape(value or "")}"', f'{name}="{_escape(said)}"', 1)
        self._held += is_open and held
        self._raw = is_open and tag in RAW
        self.said.append(source)

    def _attribute(self, tag: str, name: str, value: str, *, held: bool) -> str:
        if tag == "html" and name == "lang":
            return self._language.html
        if name == STOPS:
            stops = json.loads(value)
            return json.dumps([[x, self._language.say(text), ys] for x, text, ys in stops], ensure_ascii=False)
        return self._language.say(value) if name in SAID and not held else value

    def handle_endtag(self, tag: str) -> None:
        self._held -= self._held > 0
        self._raw = False
        self.said.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self._raw:
            self.said.append(data)
            return
        self.said.append(html.escape(data if self._held else self._language.say(data), quote=False))

    def handle_decl(self, decl: str) -> None:
        self.said.append(f"<!{decl}>")

    def handle_comment(self, data: str) -> None:
        self.said.append(f"<!--{data}-->")

    def unknown_decl(self, data: str) -> Any:
        self.said.append(f"<![{data}]>")


def _escape(text: str) -> str:
    return html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
