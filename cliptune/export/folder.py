"""The folder of an export: seen whole and verified, or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cliptune.runtime.files import TEMPORARY_SUFFIX

MARKER = "cliptune_export.json"
"""A file that every export has: what was exported, and how it was verified."""


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder in which something lies that would be lost.

    Raises:
        ValueError: it is no export, or one that was not to be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MARKER).is_file():  # of a file, too, which has nothing below it
        raise ValueError(f"{folder} is there and is no export of this toolkit: name another folder")
    if not overwrite:
        raise ValueError(f"{folder} holds an export: --overwrite replaces it, with what was written into its README.md")


@contextmanager
def new_export(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which takes its name and place once the block is through.

    If the block raises, it is removed, and what was there stays.
    """
    folder = folder.resolve()  # behind a link, whose name stays
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    temporary.mkdir()
    try:
        yield temporary
        before = temporary.with_name(f"{temporary.name}.before")
        is_there = folder.exists()
        if is_there:
            folder.rename(before)
        temporary.rename(folder)
        if is_there:
            shutil.rmtree(before)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
