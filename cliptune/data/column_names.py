"""Which columns hold images and captions, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

IMAGE_COLUMNS = (
    "image_path", "image", "filepath", "file_name", "filename", "image_file", "image_filename", "image_name",
    "img_path", "img_file", "img_name", "img", "file", "path", "picture", "photo",
)  # fmt: skip
"""Known names of the image column, the preferred one first; case, blanks, `_` and `-` make no difference."""
IMAGE_IDS = ("image_id",)
"""Names of a column that may hold the images, where there is no other."""
CAPTION_COLUMNS = (
    "caption", "captions", "title", "text", "texts", "sentence", "sentences", "raw", "comment", "description", "prompt",
    "alt_text", "alt",
)  # fmt: skip
"""Known names of the caption column, the preferred one first; numbered ones (`caption_0`, `caption_1`) go together."""
LIKE_SPLITS = ("phase", "set", "subset", "partition", "fold", "usage", "data_split", "dataset_split", "split_name")
"""Names of a column that may tell training from validation, but that is not read."""

_NO_IMAGES = {
    "url": "it holds addresses: download the images first, for example with img2dataset, and name its files",
    "imageurl": "it holds addresses: download the images first, for example with img2dataset, and name its files",
    "imgurl": "it holds addresses: download the images first, for example with img2dataset, and name its files",
}
_NO_CAPTIONS = {
    "conversations": "it holds dialogues, as LLaVA has them: write the answer that is the caption to a key caption",
    "messages": "it holds dialogues: write the answer that is the caption to a key caption",
    "bbox": "these are COCO's boxes, not its captions: take captions_*.json",
    "label": "it holds classes: write a caption of each to a column caption, such as a photo of a LABEL",
}


class Columns(NamedTuple):
    """The columns that are read; None or nothing where there is no such column."""

    image: str | None
    captions: tuple[str, ...]
    split: str | None
    group: str | None


def squeezed(name: str) -> str:
    """Return a name without what makes no difference: `Image Path`, `image_path` and `imagePath` are one."""
    return re.sub(r"[\s_-]", "", name).casefold()


_NUMBERED = re.compile(r"(.*\D)(\d{1,9})", re.DOTALL)
_KNOWN = frozenset(map(squeezed, (*IMAGE_COLUMNS, *IMAGE_IDS, *CAPTION_COLUMNS, "split", "group")))


class ColumnNames:
    """Which columns are meant, by their names and the keys that a person gave.

    Args:
        image_key: column of the images; None: the first known one.
        caption_key: column of the captions, or several of them: `caption_en,caption_de`; None: the first known ones.

    Attributes:
        inner_keys: of the caption's keys those that may name a value of an object in a column, as `caption.en` names
            that of `{"caption": {"en": "a cat", "de": "eine Katze"}}`, each with the names of column and value.
    """

    def __init__(self, image_key: str | None, caption_key: str | None) -> None:
        self.image_key, self.caption_key = image_key, caption_key
        self.caption_keys = [part.strip() for part in (caption_key or "").split(",") if part.strip()]
        parts = {key: key.partition(".") for key in self.caption_keys}
        self.inner_keys = {key: (column, inner) for key, (column, _, inner) in parts.items() if column and inner}
        keys = (key for key in (image_key, caption_key, *self.caption_keys) if key is not None)
        self._squeezed = _KNOWN.union(map(squeezed, keys))

    def matters(self, name: str) -> bool:
        """Tell whether the choice of columns depends on one of this name."""
        squeezed_name = squeezed(name)
        numbered = _NUMBERED.fullmatch(squeezed_name)
        return squeezed_name in self._squeezed or (numbered is not None and numbered[1] in _KNOWN)

    def columns(self, names: Iterable[str]) -> Columns:
        """Choose among columns."""
        names = list(names)
        images, captions = self.images(names), self.captions(names)
        split, group = ((*_Spellings(names).of(key), None)[0] for key in ("split", "group"))
        return Columns(images[0] if images else None, captions[0] if captions else (), split, group)

    def spread(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with columns of the inner keys in the place of the objects that hold them."""
        found, taken = {}, set()
        for key, (column, inner) in self.inner_keys.items():
            cell = row.get(column)
            if key not in row and isinstance(cell, dict) and inner in cell:
                found[key] = cell[inner]
                taken.add(column)
        return {**{name: cell for name, cell in row.items() if name not in taken}, **found} if found else row

    def images(self, names: Iterable[str], preferred: tuple[str, ...] = ()) -> list[str]:
        """Return the columns that may hold the images, the preferred one first."""
        spellings = _Spellings(names)
        known = (*preferred, *IMAGE_COLUMNS) if self.image_key is None else (self.image_key,)
        taken = set(() if self.caption_key is None else chain(*self.captions(spellings.names)))
        for keys in (known, IMAGE_IDS if self.image_key is None else ()):
            found = dict.fromkeys(name for key in keys for name in spellings.of(key) if name not in taken)
            if found:
                return list(found)
        return []

    def captions(self, names: Iterable[str], preferred: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        """Return the columns that may hold the captions, the preferred ones first: several may hold some each."""
        spellings = _Spellings(names)
        if self.caption_key is not None:
            # a,b are two columns unless there is one of this very name
            keys = [self.caption_key] if spellings.of(self.caption_key) else self.caption_keys
            columns = tuple(dict.fromkeys(name for key in keys for name in spellings.of(key)[:1]))
            return [columns] if columns else []
        taken = set(() if self.image_key is None else self.images(spellings.names))
        groups = (spellings.group(key) for key in (*preferred, *CAPTION_COLUMNS))
        return list(dict.fromkeys(group for group in chain(*groups) if group and taken.isdisjoint(group)))

    def missing(self, names: Iterable[str]) -> str | None:
        """Return the first of the keys given that no column has; None if all are there."""
        spellings = _Spellings(names)
        keys = [self.image_key] if self.image_key is not None else []
        if self.caption_key is not None:
            keys += [self.caption_key] if spellings.of(self.caption_key) else self.caption_keys or [self.caption_key]
        return next((key for key in keys if not spellings.of(key)), None)

    def num_known(self, names: Iterable[str]) -> int:
        """Count the columns whose names tell that these are names of columns."""
        names = list(names)
        plain = ColumnNames(None, None)
        captions = (*self.captions(names), *plain.captions(names))
        return len({*self.images(names), *plain.images(names), *chain(*captions)})


class _Spellings:
    """Names of columns by what is left of them without case, blanks, `_` and `-`."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._by_squeezed: dict[str, list[str]] = {}
        self._numbered: dict[str, list[tuple[int, str]]] = {}
        for name in self.names:
            squeezed_name = squeezed(name)
            self._by_squeezed.setdefault(squeezed_name, []).append(name)
            if match := _NUMBERED.fullmatch(squeezed_name):
                self._numbered.setdefault(match[1], []).append((int(match[2]), name))

    def of(self, key: str) -> list[str]:
        """Return the columns of a name, first the one that is spelt the same."""
        return sorted(self._by_squeezed.get(squeezed(key), ()), key=lambda name: name != key)

    def group(self, key: str) -> list[tuple[str, ...]]:
        """Return the column of a name with the numbered ones, by their number; then its other spellings."""
        plain = self.of(key)
        numbered = [name for _, name in sorted(self._numbered.get(squeezed(key), ()))]
        return [(*plain[:1], *numbered), *((name,) for name in plain[1:])]


def hint(names: Iterable[str], what: str) -> str:
    """Say why a column that is there is not the one, as the end of a message; nothing where there is nothing to say."""
    hints = _NO_IMAGES if what == "image" else _NO_CAPTIONS
    return next((f"; {name}: {hints[squeezed(name)]}" for name in names if squeezed(name) in hints), "")


def like_splits(names: Iterable[str]) -> list[str]:
    """Return the columns that may have been meant as the split."""
    known = set(map(squeezed, LIKE_SPLITS))
    return [name for name in names if squeezed(name) in known]
