"""The language that a command asks for, also where its settings cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


def language_asked(words: Sequence[str], config: Path | None) -> str:
    """Return the language that a command line names, or else its config file, whatever else is wrong with them.

    Args:
        words: the command line's, without the program's name.
        config: the config file that is read without `--config`.
    """
    flags = {"--language": "", "--config": "" if config is None else str(config)}
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word == "--":  # behind which no word is a flag
            break
        flag, is_one_word, value = word.partition("=")
        if flag in flags:
            flags[flag] = value if is_one_word else after
    return flags["--language"] or (_language_of(Path(flags["--config"])) if flags["--config"] else "en")


def _language_of(config: Path) -> str:
    """Return what a config file says, a run's or one of the stage's own keys; English where nobody can tell."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        values = json.loads(config.read_text(encoding="utf-8-sig"))
        return str(values.get("language") or values.get("run", {}).get("language") or "en")
    return "en"


def say_in(name: str) -> Callable[[str], str]:
    """Return what says a text in a language; in English where there is no such language."""
    if name == "en":
        return str
    from cliptune.language.catalogue import NAMES, language_of  # noqa: PLC0415  (English starts without it)

    return language_of(name).say if name in NAMES else str
