"""Lists of names beside an index that are its splits: Flickr8k's `Flickr_8k.trainImages.txt`, or `train.txt`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from posixpath import basename, splitext

import numpy as np

from cliptune.data.index import SPLITS as SPLIT_OF_WORD
from cliptune.data.index import Index
from cliptune.data.table import NO_SPLIT, SPLITS, CodeArray
from cliptune.data.text_stream import TextFile
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

_NAME = re.compile(
    r"(?:.*[._-])?(train|training|val|valid|validation|dev|test|testing)(?:[._-]?(?:images?|list|ids|split))*\.txt",
    re.IGNORECASE,
)


def with_split_lists(index: Index, path: Path) -> Index:
    """Give an index that declares no split those of the lists beside it; without such lists it stays as it is.

    A list holds a name of an image a line, with or without its ending. It counts if the index has most of its names.
    What stands in two lists does not train. What stands in none trains; if a list says what trains, it tests; if others
    say that, too, it is left out.
    """
    if (index.rows.splits != NO_SPLIT).any() or _NAME.fullmatch(path.name):
        return index
    lists = sorted(file for file in path.parent.glob("*.[tT][xX][tT]") if _NAME.fullmatch(file.name) and file != path)
    if not lists:
        return index
    code_of = _codes(lists)
    codes = np.array([_code(image, code_of) for image in index.rows.images], dtype=np.int8)
    num_listed = int((codes != NO_SPLIT).sum())
    if 2 * num_listed < len({splitext(name)[0] for name in code_of}):
        return index
    return _with_splits(index, codes, lists)


def _with_splits(index: Index, codes: CodeArray, lists: list[Path]) -> Index:
    train, test = SPLITS.index("train"), SPLITS.index("test")
    unlisted, rows, rest = codes == NO_SPLIT, index.rows, ""
    if unlisted.any():
        # what stands in no list of three is in no split; where only the test's list is missing, it is the rest
        is_left_out = (codes == train).any() and (codes == test).any()
        others = train if not (codes == train).any() else test
        what = "left out" if is_left_out else f"taken as {SPLITS[others]}"
        rest = f"; {count(int(unlisted.sum()), 'image')} in none of them {what}"
        kept = np.flatnonzero(~unlisted if is_left_out else np.ones_like(unlisted))
        rows, codes = rows.take(kept), np.where(unlisted, others, codes).astype(np.int8)[kept]
    found = [f"{name} {int((codes == code).sum()):,}" for code, name in enumerate(SPLITS)]
    names = ", ".join(file.name for file in lists)
    logger.info("%s: the splits are those of %s: %s images%s", lists[0].parent, names, ", ".join(found), rest)
    return index._replace(rows=replace(rows, splits=codes))


def _codes(lists: list[Path]) -> dict[str, int]:
    """Return the split of each name in the lists, as its index in `SPLITS`; of two the later one."""
    codes: dict[str, int] = {}
    num_twice = 0
    for file in lists:
        match = _NAME.fullmatch(file.name)
        code = SPLITS.index(SPLIT_OF_WORD[match[1].lower()]) if match else NO_SPLIT
        for name in _names(file):
            num_twice += codes.get(name, code) != code
            codes[name] = max(codes.get(name, code), code)
    if num_twice:
        names = ", ".join(file.name for file in lists)
        logger.warning("%s: %s in two of them; what validates or tests does not train", names, count(num_twice, "name"))
    return codes


def _names(file: Path) -> Iterator[str]:
    """Yield the names of a list; nothing for a file of something else."""
    try:
        for line in TextFile(file).lines():
            if line.strip():
                yield line.strip()
    except ValueError:
        return


def _code(image: str, code_of: dict[str, int]) -> int:
    name = basename(image)
    for key in (image, name, splitext(name)[0]):
        if key in code_of:
            return code_of[key]
    return NO_SPLIT
