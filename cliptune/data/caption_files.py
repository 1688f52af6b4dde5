"""Images whose captions stand in files beside them, or in the names of folders and files."""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cliptune.data.folder_hints import resemblance
from cliptune.data.folders import CAPTION_ENDINGS, NO_CAPTIONS, is_hidden, list_folder, split_folders, stem_and_ending
from cliptune.data.index import Index, NoCaptionsError, Records
from cliptune.data.lookup import folded
from cliptune.data.text_stream import TextFile, json_reason
from cliptune.preprocess.decode import read_bytes
from cliptune.preprocess.image_formats import COMMON_ENDINGS, IMAGE_ENDINGS
from cliptune.runtime.messages import count, first_few, shorten

logger = logging.getLogger(__name__)

TEMPLATES = {"folder": "a photo of a {}", "filename": "{}"}
"""What is said of the name of a folder or of a file, unless one says."""
MAX_TEXT_BYTES = 1 << 24
"""Of a file of captions, as in a shard."""


Names = dict[str, list[str]]
"""Paths of files below a folder by their ending in small letters."""


def read_directory(
    folder: Path,
    *,
    caption_key: str | None = None,
    captions_from: str | None = None,
    caption_template: str | None = None,
) -> Index:
    """Read the images below a folder with their captions.

    With images/ and captions/, images/a/b.png has those of captions/a/b.txt; else a/b.png has those of a/b.txt. The
    caption's file ends in .json (captions by their key), .txt or .caption (one a line); the first that has any counts.
    Where there is no a/b.txt or a/b.caption, a/b.png has those of a/b.png.txt or a/b.png.caption.

    Args:
        folder: that holds the images.
        caption_key: of the captions in a JSON file.
        captions_from: `json`, `txt` or `caption`: files of that ending alone; `folder` or `filename`: the name of the
            folder that the image is in, or of its file.
        caption_template: in which `{}` stands for that name; None: as in `TEMPLATES`.

    Raises:
        FileNotFoundError: no image is there.
        ValueError: no image has a caption; the message says what the folder resembles.
    """
    found = Records(folder, caption_key)
    files = names_below(folder)
    images = sorted((name for ending in IMAGE_ENDINGS & files.keys() for name in files[ending]), key=_parts)
    if not images:
        raise FileNotFoundError(resemblance(folder, files))
    if captions_from in TEMPLATES:
        _take_names(found, images, captions_from, caption_template or TEMPLATES[captions_from])
        return found.index(captions_from)
    endings = CAPTION_ENDINGS if captions_from is None else (f".{captions_from}",)
    return _CaptionFiles(found, files, endings).read(images)


class _CaptionFiles:
    """The captions below a folder, by the folded path of their image without ending: IMG_1.JPG has those of img_1.txt.

    No two files differ by case alone that count: they clash, since on some file systems they are one.
    """

    def __init__(self, found: Records, files: Names, endings: Sequence[str]) -> None:
        self.found, self.folder, self.files = found, found.path, files
        known = {ending: sorted(files.get(ending, ()), key=_parts) for ending in endings}
        apart = list_folder(self.folder).captioned_folders or ("", "")
        of_captions = {ending: [name for name in known[ending] if name.startswith(f"{apart[1]}/")] for ending in known}
        self.is_apart = any(of_captions.values()) and apart[1] != ""
        self.image_root, self.text_root = (f"{name}/" if self.is_apart else "" for name in apart)
        known = of_captions if self.is_apart else known
        self.texts = {ending: self.by_stem(names, self.text_root) for ending, names in known.items()}
        self.passed: Counter[tuple[str, str]] = Counter()  # how many images have captions of the first, and the other
        self.num_alike = 0  # images whose captions are in a file of another case or Unicode form
        self.num_whole = 0  # images whose captions are in a file that is named by their whole name, 0.jpg.txt

    def read(self, images: list[str]) -> Index:
        """Take the images that have captions; what has no counterpart becomes an issue."""
        inside = [name for name in images if name.startswith(self.image_root)]
        by_stem = self.by_stem(inside, self.image_root)
        self.take_whole_names(by_stem)
        if not self.is_apart and not any(stem in texts for texts in self.texts.values() for stem in by_stem):
            raise NoCaptionsError(resemblance(self.folder, self.files))
        relative = [name[len(self.image_root) :] for name in inside]
        tops = {name.partition("/")[0] for name in relative if "/" in name}
        splits = {folder: split for split, folder in split_folders(tops).items()} if len(tops) > 1 else {}
        for stem, image in by_stem.items():
            if image is not None:
                self.take(stem, image, splits.get(image[len(self.image_root) :].partition("/")[0]))
        self.note_orphans(by_stem)
        self.tell_unread(len(images) - len(inside))
        return self.found.index("directory" if self.is_apart else "beside")

    def take_whole_names(self, images: dict[str, str | None]) -> None:
        """Let 0.jpg, where it has no text of its own, have that of 0.jpg.txt, as some captioning tools name it.

        A 0.jpg.json is left alone: albums write what they know of a photo there, and its title is no caption.
        """
        texts_of = [texts for ending, texts in self.texts.items() if ending != ".json"]
        for stem, image in images.items():
            if image is None or any(stem in texts for texts in texts_of):
                continue
            whole = folded(image[len(self.image_root) :])
            for texts in texts_of:
                if whole in texts and whole not in images:  # 0.jpg.txt may be that of 0.jpg.png
                    texts[stem] = texts.pop(whole)

    def tell_unread(self, num_outside: int) -> None:
        """Say what else could have been read."""
        if num_outside:
            logger.info(
                "%s: %s outside %s not read", self.folder, count(num_outside, "image is", "images are"), self.image_root
            )
        if self.is_apart and any(
            name.startswith(self.image_root) for ending in self.texts for name in self.files.get(ending, ())
        ):
            other = f"--data_dir {self.folder / self.image_root} takes those beside the images"
            logger.info("%s: captions are read from %s: %s", self.folder, self.text_root, other)
        if self.num_alike:
            alike = count(self.num_alike, "image")
            logger.info("%s: %s: captions found in another case or Unicode form", self.folder, alike)
        if self.num_whole:
            whole = count(self.num_whole, "image")
            logger.info("%s: %s: captions found behind the whole name, as of a.jpg in a.jpg.txt", self.folder, whole)
        for (taken, other), number in self.passed.items():
            both = f"captions of {taken}, not of {other}: --captions_from {other[1:]} takes these"
            logger.info("%s: %s: %s", self.folder, count(number, "image"), both)

    def take(self, stem: str, image: str, split: str | None) -> None:
        """Take an image with the captions of the first of its files that has any."""
        beside = [(ending, texts[stem]) for ending, texts in self.texts.items() if stem in texts]
        looked_for = ".txt" if ".txt" in self.texts else next(iter(self.texts))
        own_stem = _stem(image, self.image_root)
        reason = f"no captions (no {shorten(self.text_root + own_stem)}{looked_for})"
        # as in shards: a JSON file's key `caption`, then the texts, then its other keys that may hold captions
        others = beside[:1] if beside and beside[0][0] == ".json" else []
        for position, (ending, name) in enumerate(beside + others):
            if name is None:
                return  # it clashes with another one, which is an issue
            try:
                captions = self.captions(name, any_known=position >= len(beside))
            except (ValueError, OSError) as error:
                reason = f"{shorten(name)}: {_reason(error, self.folder / name)}"
                continue
            if captions:
                self.found.add(image, image, captions, split)
                text_stem = _stem(name, self.text_root)
                is_whole = folded(text_stem) != stem
                self.num_whole += is_whole
                self.num_alike += not is_whole and text_stem != own_stem
                self.passed.update((ending, other) for other, _ in beside[position + 1 :])
                return
            if position < len(beside):
                reason = f"no caption in {shorten(name)}"
        self.found.issue(image, reason, image=image)
        self.found.num_uncaptioned += 1

    def captions(self, name: str, *, any_known: bool = False) -> list[Any]:
        """Return the captions in a file: of JSON what a key holds, of a text the lines that are not blank.

        Args:
            name: of the file.
            any_known: a JSON file's key may be any name of captions, where none is named by the caption key.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        if stem_and_ending(name)[1] != ".json":
            lines = [line.strip() for line in _text_lines(self.folder / name)]
            numbered = ((number, line) for number, line in enumerate(lines, 1) if line)
            return [text for number, line in numbered for text in self.found.captions(f"{name}: line {number}", line)]
        values = self.json_object(name)
        known = [(key,) for key in ("caption", "captions") if key in values]
        for names in self.found.column_names.captions(values) if any_known or self.found.caption_key else known:
            found = [values[name] for name in names if values[name]]
            if found:
                return [text for value in found for text in (value if isinstance(value, list) else [value])]
        return []

    def json_object(self, name: str) -> dict[str, Any]:
        """Return what a JSON file holds, nothing if it is no object; raises as `captions` does."""
        try:
            values = json.loads(_content(self.folder / name))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {json_reason(error)}") from None
        return self.found.column_names.spread(values) if isinstance(values, dict) else {}

    def note_orphans(self, images: Collection[str]) -> None:
        """Note the captions whose image is not there."""
        orphans: dict[str, list[str]] = {}
        for texts in self.texts.values():
            for stem, text in texts.items():
                if text is not None and stem not in images:
                    orphans.setdefault(stem, []).append(text)
        others = self.other_files(orphans)
        folders = None if self.is_apart else {stem.rpartition("/")[0] for stem in images}
        elsewhere = []
        for stem, texts_of in orphans.items():
            name = self.promise(texts_of)
            if name is not None and folders is not None and stem.rpartition("/")[0] not in folders:
                elsewhere.append(name)
            elif name is not None:
                there = others.get(stem)
                wanted = self.image_root + _stem(name, self.text_root)
                missing = f"{shorten(there)} is no image" if there else f"no {shorten(wanted)}.*"
                self.found.issue(name, f"captions without an image ({missing})")
        if elsewhere:
            what = count(len(elsewhere), "file is", "files are")
            logger.warning("%s: %s not read, in folders without images: %s", self.folder, what, first_few(elsewhere))

    def promise(self, names: list[str]) -> str | None:
        """Return which of the files of one stem are captions of an image; None: they are not."""
        promising = [name for name in names if not NO_CAPTIONS.match(name.rpartition("/")[2])]
        for name in [name for name in promising if stem_and_ending(name)[1] == ".json"]:
            with suppress(ValueError, OSError):
                if self.json_object(name).get("status", "success") != "success":
                    return None  # img2dataset could not download it: there never was an image
                if self.captions(name, any_known=True):
                    continue
            promising.remove(name)  # some other JSON
        return promising[0] if promising else None

    def other_files(self, stems: Container[str]) -> dict[str, str]:
        """Return the files of these stems that are neither images nor captions, by stem."""
        if not stems:
            return {}
        known = IMAGE_ENDINGS.union(CAPTION_ENDINGS)
        names = (name for ending in self.files.keys() - known for name in self.files[ending])
        by_stem = ((folded(_stem(name.removeprefix(self.image_root), "")), name) for name in names)
        return {stem: name for stem, name in by_stem if stem in stems}

    def by_stem(self, names: list[str], root: str) -> dict[str, str | None]:
        """Return files by their folded path below `root` without ending, in their order; None where several clash."""
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(folded(_stem(name, root)), []).append(name)
        by_stem: dict[str, str | None] = {}
        for stem, files in alike.items():
            common = [name for name in files if stem_and_ending(name)[1] in COMMON_ENDINGS]
            files = common if len(common) == 1 else files  # noqa: PLW2901  (a.jpg is meant beside a.psd)
            if len(files) > 1:
                self.found.issue(files[0], f"clashes with {', '.join(files[1:])}")
            by_stem[stem] = files[0] if len(files) == 1 else None
        return by_stem


def _stem(name: str, root: str) -> str:
    """Return a file's path below `root` without ending, in the Unicode form that all are compared in."""
    return unicodedata.normalize("NFC", stem_and_ending(name[len(root) :])[0])


def names_below(folder: Path) -> Names:
    """Return what lies below a folder, in linked folders too; nothing hidden, and no link back to a folder above."""
    found: Names = defaultdict(list)
    start = len(os.path.join(folder, ""))  # noqa: PTH118  (pathlib is several times as slow)
    above = {
        str(folder): [os.path.realpath(folder)]
    }  # of each folder, the real paths of it and of those it was found in
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_tell_error):
        prefix = os.path.join(root, "")[start:].replace(os.sep, "/")  # noqa: PTH118
        for name in names:
            if not is_hidden(name):
                found[stem_and_ending(name)[1]].append(prefix + name)
        parents = above.pop(root)
        for name in [*folders]:
            path = os.path.join(root, name)  # noqa: PTH118
            real = os.path.realpath(path)
            if is_hidden(name) or any(f"{other}/".startswith(f"{real.rstrip('/')}/") for other in parents):
                folders.remove(name)
            else:
                above[path] = [*parents, real]
    return dict(found)


def _tell_error(error: OSError) -> None:
    logger.warning("%s is not read: %s", error.filename, error.strerror)


def _parts(name: str) -> list[str]:
    return name.split("/")


def _take_names(found: Records, images: list[str], captions_from: str, template: str) -> None:
    """Take each image with what the name of its folder, or its own, says."""
    for image in images:
        *folders, file = image.split("/")
        if captions_from == "folder":
            # CUB-200 has 001.Black_footed_Albatross, kohya's trainer 10_kite
            name = re.sub(r"^\d+[._](?=.*[^\W\d])", "", folders[-1]) if folders else ""
        else:
            name = stem_and_ending(file)[0]
        words = " ".join(re.sub("[_-]", " ", unicodedata.normalize("NFC", name)).split())
        if captions_from == "folder" and not words:
            found.issue(image, "in no folder that names its class", image=image)
        elif captions_from == "filename" and not any(map(str.isalpha, words)):
            found.issue(image, "its file's name says nothing", image=image)
        else:
            found.add(image, image, template.replace("{}", words))


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"a file of {size:,} bytes; at most {MAX_TEXT_BYTES:,} are read")
    return read_bytes(path)


def _text_lines(path: Path) -> Iterable[str]:
    """Return the lines of a text file; of one that is plain UTF-8 in a fraction of the time that others take."""
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        return TextFile(path).lines()  # how such a file is read, or refused, is told there
    return TextFile(path).lines() if "\0" in text or "\r" in text else text.split("\n")


def _reason(error: Exception, path: Path) -> str:
    return getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ")
