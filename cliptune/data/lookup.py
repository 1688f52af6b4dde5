"""Where the images of an index are: their real paths, also where the disk has them under other names."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from posixpath import splitext
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

import numpy as np

from cliptune.data.issues import Issue, Issues
from cliptune.data.table import IntArray, Rows, Strings
from cliptune.preprocess.decode import archive_of
from cliptune.preprocess.image_formats import IMAGE_ENDINGS

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
DRIVE = re.compile(r"[a-z]:[\\/]", re.IGNORECASE)

FILE_URL, SLASHES, FOLDERS = "file:// taken as a path", "backslashes taken as slashes", "--image_dir taken as folder"
ESCAPES = "%20 and the like taken as the characters that they stand for"
ALIKE = "found in another case or Unicode form"
ENDING = "without an ending, which the one image of that name has"
INSIDE = "found in the one folder of --image_dir that has it"

LONGEST_PATH = 4096
_MAX_FOLDERS = 64
_MAX_INSIDE = 16
"""Folders of --image_dir that each image is looked for in: COCO has train2017/, val2017/ and some more."""
_MAX_LISTED = 1_000_000
"""Names of files that are remembered at once."""


class ImageFinder:
    """Finds the files of images, as they are named or else by rules that each file proves.

    Args:
        root: folder that paths are relative to.
        replaces_folders: `root` may also take the place of the folders that a path begins with: a person named it.

    Attributes:
        taken: how many paths were found by each rule.
    """

    def __init__(self, root: Path, *, replaces_folders: bool) -> None:
        self.root = str(root)
        self.replaces_folders = replaces_folders
        self.taken: Counter[str] = Counter()
        self._real_folder = lru_cache(maxsize=1 << 16)(os.path.realpath)
        self._container = lru_cache(maxsize=1 << 12)(self._container_path)
        self._folder = lru_cache(maxsize=1 << 16)(self._find_folder)
        self._listings = _Listings()
        self._inside = _folders_in(self.root) if replaces_folders else []

    def resolve(self, rows: Rows) -> tuple[Rows, Issues]:
        """Give each row its image's resolved path; those that are not files become issues."""
        found, issues, moved = np.zeros(len(rows), dtype=bool), Issues(), array("q")

        def resolved() -> Iterator[str]:
            for row, image in enumerate(rows.images):
                try:
                    path = self._resolve(os.path.join(self.root, image))  # noqa: PTH118  (see _resolve)
                except (OSError, ValueError) as error:
                    reason = getattr(error, "strerror", None) or str(error)
                    rules, path = self._look_for(image)
                    if not path:
                        reason = _no_path(image) or reason
                        issues.add(Issue(f"image {image}: {reason}", image=image, location=rows.location(row)))
                        continue
                    self.taken.update(rules)
                    if FOLDERS in rules:
                        moved.append(row)
                found[row] = True
                yield path

        paths = Strings.of(resolved())
        rows = rows if found.all() else rows.take(np.flatnonzero(found))
        rows = replace(rows, images=paths)
        if not len(moved):
            return rows, issues
        return _refuse_clashes(rows, (np.cumsum(found) - 1)[np.asarray(moved)], issues)

    def _resolve(self, image: str) -> str:
        """Return the real path of an image's file; os.path, because pathlib is several times as slow.

        Raises:
            OSError, ValueError: there is no such file.
        """
        if "@" in image and (container := archive_of(image)) is not None:
            return self._container(container) + image[len(container) :]
        folder, name = os.path.split(image)
        path = os.path.join(self._real_folder(folder), name)  # noqa: PTH118
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            path = os.path.realpath(path, strict=True)
            mode = os.stat(path).st_mode  # noqa: PTH116
        if not stat.S_ISREG(mode):
            raise ValueError("not a file")
        return path

    def _container_path(self, path: str) -> str:
        """Return where a file is that holds images. It keeps its name, by which it is known, though it be a link."""
        self._resolve(path)
        folder, name = os.path.split(path)
        return os.path.join(self._real_folder(folder), name)  # noqa: PTH118

    def find(self, image: str) -> str:
        """Return the real path of an image; nothing if it is not found."""
        try:
            return self._resolve(os.path.join(self.root, image))  # noqa: PTH118  (see _resolve)
        except (OSError, ValueError):
            return self._look_for(image)[1]

    def _look_for(self, image: str) -> tuple[tuple[str, ...], str]:
        """Return the rules by which an image that is not where it is said to be was found, and its real path, or ""."""
        candidates = list(self._candidates(image))
        for find in (lambda path: ("", path), self._alike):
            for rules, path in candidates:
                rule, alike = find(path)
                try:
                    real = self._resolve(alike) if alike else ""
                except (OSError, ValueError):
                    continue
                if real:
                    return (*rules, rule) if rule else rules, real
        return self._look_inside(image)

    def _look_inside(self, image: str) -> tuple[tuple[str, ...], str]:
        """Return an image that one of the folders in `root` has and no other, as train2017/ and val2017/ lie in coco/.

        The whole path has to be there: of /old/1.jpg nothing is left out.
        """
        if os.path.isabs(image) or _no_path(image):  # noqa: PTH117
            return (), ""
        paths = (os.path.join(folder, image) for folder in self._inside)  # noqa: PTH118
        found = {self._resolve(path) for path in paths if os.path.isfile(path)}  # noqa: PTH113
        return ((INSIDE,), found.pop()) if len(found) == 1 else ((), "")

    def _candidates(self, image: str) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield where an image may be, the nearest to what is written first, and the rules that lead there."""
        forms: list[tuple[tuple[str, ...], str]] = [((), image)]
        if image[:5].lower() == "file:":
            forms = [((FILE_URL,), url2pathname(urlparse(image).path))]
        elif _no_path(image):
            return
        elif "\\" in image:
            forms.append(((SLASHES,), image.replace("\\", "/")))
        elif (plain := unquote(image)) != image:
            forms.append(((ESCAPES,), plain))
        for rules, path in forms:
            yield rules, os.path.join(self.root, path)  # noqa: PTH118
        for rules, path in forms if self.replaces_folders else ():
            # a/../b/c.jpg: what stands before .. names other folders than these
            parts = [part for part in path.rpartition("../")[2].split("/") if part not in {"", "."}][-_MAX_FOLDERS:]
            for begin in range(len(parts)):
                yield (*rules, FOLDERS), os.path.join(self.root, *parts[begin:])  # noqa: PTH118

    def _alike(self, path: str) -> tuple[str, str]:
        """Return the file that differs from a path in Unicode form or case, or has an ending, and the rule; or ""."""
        folder, name = os.path.split(path)
        folder = self._folder(folder)
        rule, found = self._listings.match(folder, name) if folder else ("", "")
        return (rule, os.path.join(folder, found)) if found else ("", "")  # noqa: PTH118

    def _find_folder(self, path: str) -> str:
        """Return a folder, which may be named in another Unicode form or case; or ""."""
        if os.path.isdir(path):  # noqa: PTH112
            return path
        above, name = os.path.split(path)
        above = self._folder(above) if name else ""
        found = self._listings.match(above, name)[1] if above else ""
        path = os.path.join(above, found)  # noqa: PTH118
        return path if found and os.path.isdir(path) else ""  # noqa: PTH112


class _Listings:
    """Names in the folders that were looked at last, by what they have in common with names that are alike."""

    def __init__(self) -> None:
        self._folders: OrderedDict[str, dict[str, list[str]]] = OrderedDict()

    def match(self, folder: str, name: str) -> tuple[str, str]:
        """Return the one name in a folder that is most like another, and by which rule; two empty strings for none."""
        by_stem = self._of(folder)
        stem, ending = splitext(name)
        names = by_stem.get(folded(stem), [])
        same = unicodedata.normalize("NFC", name)
        # img.7: an ending, or a name without one
        whole = [other for other in by_stem.get(folded(name), []) if splitext(other)[1].lower() in IMAGE_ENDINGS]
        for rule, alike in (
            (ALIKE, [other for other in names if unicodedata.normalize("NFC", other) == same]),
            (ALIKE, [other for other in names if _is_alike(other, stem, ending)]),
            (ALIKE, [other for other in names if folded(other) == folded(name)]),
            (ENDING, [other for other in whole if _is_alike(other, name, splitext(other)[1])]),
            (ENDING, whole),
        ):
            if alike:
                return (rule, alike[0]) if len(alike) == 1 else ("", "")
        return "", ""

    def _of(self, folder: str) -> dict[str, list[str]]:
        if folder in self._folders:
            self._folders.move_to_end(folder)
            return self._folders[folder]
        by_stem: dict[str, list[str]] = {}
        try:
            names = os.listdir(folder)  # noqa: PTH208  (names are all that is asked for)
        except (OSError, ValueError):  # the latter of a name that no folder can have
            names = []
        for name in names:
            by_stem.setdefault(folded(splitext(name)[0]), []).append(name)
        self._folders[folder] = by_stem
        while sum(map(len, self._folders.values())) > _MAX_LISTED and len(self._folders) > 1:
            self._folders.popitem(last=False)
        return by_stem


def _folders_in(root: str) -> list[str]:
    """Return the paths of the folders in a folder; none where they are many, as classes are."""
    try:
        with os.scandir(root) as entries:
            found = [entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError:
        return []
    return sorted(found) if len(found) <= _MAX_INSIDE else []


def _no_path(image: str) -> str:
    """Say why a text is no path; nothing if it may be one."""
    if len(image) > LONGEST_PATH:
        return "too long for a path (an image in base64 must be written to a file)"
    return "an address, not a file" if ADDRESS.match(image) else ""


def folded(name: str) -> str:
    """Return what names that differ only in case and Unicode form have in common."""
    return unicodedata.normalize("NFC", name).casefold()


def _is_alike(name: str, stem: str, ending: str) -> bool:
    """Tell whether a name has a stem, in whatever Unicode form, and an ending, in whatever case."""
    own_stem, own_ending = splitext(name)
    same = unicodedata.normalize("NFC", own_stem) == unicodedata.normalize("NFC", stem)
    return same and own_ending.lower() == ending.lower()


def _refuse_clashes(rows: Rows, moved: IntArray, issues: Issues) -> tuple[Rows, Issues]:
    """Skip images of different folders that --image_dir would make one: /a/1.jpg and /b/1.jpg, where it has a 1.jpg."""
    first = moved[rows.images.take(moved).first_equal()]
    clashing = np.flatnonzero(np.bincount(first, minlength=len(rows)) > 1)
    skipped = moved[np.isin(first, clashing)]
    for row in skipped.tolist():
        image = rows.images[row]
        issues.add(Issue(f"several paths of the index end at {image}", image=image, location=rows.location(row)))
    return rows.take(np.setdiff1d(np.arange(len(rows)), skipped)) if len(skipped) else rows, issues
