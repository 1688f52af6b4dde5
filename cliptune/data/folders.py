"""Which index files, or folders of images with their captions, a folder holds."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cliptune.data.base64_images import images_beside, split_of_texts
from cliptune.data.delimited import MAX_HEADER, header
from cliptune.data.index import SPLITS
from cliptune.data.token_lines import IMAGE_NAME, TOKEN_LINE
from cliptune.preprocess.image_formats import IMAGE_ENDINGS
from cliptune.runtime.messages import first_few, shorten

logger = logging.getLogger(__name__)

INDEX_ENDINGS = frozenset((".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet"))
CAPTION_ENDINGS = (".json", ".txt", ".caption")
"""Of the files beside an image that may hold its captions, the preferred one first."""

# what lies in data sets beside index and captions; img2dataset has 00000_stats.json
_NO_INDEX = re.compile(
    r"(readme|licen[cs]e|citation|changelog)\b|(state|config|package|shardindex|dataset_infos?|dataset_dict|(.*[_-])?stats"
    r")\.json$",
    re.IGNORECASE,
)
NO_CAPTIONS = re.compile(
    r"(readme|licen[cs]e|citation|changelog)\b|(requirements|classes|labels|tags|notes|log|(sample_)?prompts|train|val|test)\.txt$",
    re.IGNORECASE,
)
"""Names of texts beside images that are captions of none."""
_FIRST_LINE = re.compile(r"\s*([^\n]*)")
# train-00000-of-00003, as the Hub writes it (with a hash behind it in older sets), part-00000, 0000
_NUMBERED = re.compile(r"(?:(.+?)[-_])?(\d+)(?:-of-(\d+)(?:-[0-9a-f]{8,})?)?")
_MAX_DEPTH = 8
_MAX_SEEN = 1000


class Part(NamedTuple):
    """What a data set or one of its splits is read from."""

    split: str | None
    """`train`, `val` or `test`; None: what the index says."""
    path: Path
    """An index file, or a folder of images with their captions."""


class Listing(NamedTuple):
    """What lies in a folder itself; nothing hidden."""

    folder: Path
    folders: list[str]
    files: list[str]

    @property
    def has_images(self) -> bool:
        """Whether an image is among the files."""
        return any(stem_and_ending(name)[1] in IMAGE_ENDINGS for name in self.files)

    @property
    def captioned_folders(self) -> tuple[str, str] | None:
        """Names of images/ and captions/, whatever their case, if both are there."""
        known = {name.lower(): name for name in self.folders}
        return (known["images"], known["captions"]) if {"images", "captions"} <= known.keys() else None


def stem_and_ending(name: str) -> tuple[str, str]:
    """Return `a/b.c` and `.png` of `a/b.c.PNG`; pathlib is several times as slow."""
    stem, ending = os.path.splitext(name)  # noqa: PTH122
    return stem, ending.lower()


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is none of the data: hidden, or of macOS or a file server."""
    return name.startswith(".") or name in {"__MACOSX", "@eaDir"}


def list_folder(folder: Path) -> Listing:
    """Return the names of folders and files, sorted; links count as what they lead to."""
    found = Listing(folder, [], [])
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads to itself
                is_folder = False
            (found.folders if is_folder else found.files).append(entry.name)
    found.folders.sort()
    found.files.sort()
    return found


def find_index(folder: Path, *, captions_from: str | None = None, depth: int = 0) -> list[Part]:
    """Decide what a data set is read from.

    Args:
        folder: that holds it, or an index file.
        captions_from: `json`, `txt`, `caption`, `folder` or `filename`: no index file is looked for.
        depth: in folders that hold nothing but one folder.

    Returns:
        In this order: the index files of the splits if there is a train file (each one file, or all of
        `train-00000-of-00003.parquet`, ...); data.json; data.parquet; metadata.csv, .jsonl or .parquet; the only index
        file; the folder itself if it has images/ and captions/; each of its folders train/, val/, test/ by the same
        rules; the only folder in it by the same rules; itself.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: several files could be meant; the message names them.
    """
    if folder.is_file():
        if captions_from is not None:
            raise ValueError(f"{folder}: captions_from {captions_from} is for a folder of images, and this is a file")
        return [Part(None, folder)]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder; `python data_loader.py` makes sample data")
    listing = list_folder(folder)
    if captions_from is None and (parts := _index_files(listing)):
        return parts
    if listing.captioned_folders and captions_from not in {"folder", "filename"}:
        return [Part(None, folder)]
    if splits := split_folders(listing.folders):
        unread = [f"{name}/" for name in listing.folders if name not in splits.values()]
        if unread:
            logger.info("%s: the splits %s are read, not %s", folder, ", ".join(splits.values()), first_few(unread))
        parts = []
        for split, name in splits.items():
            inside = find_index(folder / name, captions_from=captions_from, depth=depth + 1)
            parts += [Part(part.split or split, part.path) for part in inside]
        return parts
    only = _only_folder(listing, captions_from)
    if only is None or depth >= _MAX_DEPTH:  # a link may lead back
        return [Part(None, folder)]
    logger.info("%s: its folder %s is read", folder, only)
    return find_index(folder / only, captions_from=captions_from, depth=depth + 1)


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Return the folders that are splits by their split; none where these may be classes, as boat/, car/, train/.

    Raises:
        ValueError: two folders are one split.
    """
    names = list(names)
    splits: dict[str, list[str]] = {}
    for name in names:
        if name.lower() in SPLITS and name.lower() != "restval":
            splits.setdefault(SPLITS[name.lower()], []).append(name)
    if len(splits) < 2 and len(splits) < len(names):
        return {}
    for split, found in splits.items():
        if len(found) > 1:
            raise ValueError(f"several {split} folders: {', '.join(found)}; name one with --data_dir FOLDER")
    return {split: splits[split][0] for split in ("train", "val", "test") if split in splits}


def index_files(listing: Listing) -> list[Path]:
    """Return the files of a folder that may be index files, sorted."""
    images = {stem.casefold() for stem, ending in map(stem_and_ending, listing.files) if ending in IMAGE_ENDINGS}
    # img2dataset describes 00000/ or 00000.tar in 00000.parquet
    described = {name for name in listing.folders if name.isdecimal()}
    described |= {stem for stem, ending in map(stem_and_ending, listing.files) if ending == ".tar"}
    found, beside = [], False
    for name in listing.files:
        stem, ending = stem_and_ending(name)
        if ending not in INDEX_ENDINGS or _NO_INDEX.match(name) or stem in described:
            continue
        if ending in CAPTION_ENDINGS and stem.casefold() in images:
            beside = True
        elif _may_be_index(listing.folder / name):
            found.append(listing.folder / name)
    held = set(map(images_beside, found))  # images in base64, beside the file of their captions
    # img2dataset has 000000007.json of an image that could not be downloaded
    lost = {path for path in found if beside and path.suffix.lower() == ".json" and path.stem.isdecimal()}
    return [path for path in found if path not in held | lost]


def _index_files(listing: Listing) -> list[Part]:
    """Choose the index files of a folder; none if there is none, or if captions beside the images come first.

    Raises:
        ValueError: several could be meant.
    """
    candidates = index_files(listing)
    if not candidates:
        return []
    captioned = _seems_captioned(listing)
    splits = _of_splits(listing.folder, candidates)
    chosen = splits
    if all(part.split != "train" for part in splits):
        likely = candidates
        if len(candidates) > 1 or captioned:
            likely = [path for path in candidates if _names_images(path)]
            # no name of an image has an ending that is known: only captions beside images tell that none is an index
            likely = likely if likely or captioned else candidates
        chosen = [Part(None, path) for path in _preferred(likely)]
        if not chosen and likely and not listing.captioned_folders:
            if len(splits) != len(candidates):
                names = _names(likely)
                raise ValueError(f"{listing.folder}: several index files: {names}; name one with --data_dir FILE")
            chosen = splits
    _tell_choice(listing.folder, [part.path for part in chosen], candidates, captioned=captioned)
    return chosen


def _tell_choice(folder: Path, chosen: list[Path], candidates: list[Path], *, captioned: bool) -> None:
    """Say what is read of a folder that fits two forms, and how the other one would be."""
    taken = _names(chosen) or "captions beside the images"
    if unread := [path for path in candidates if path not in chosen]:
        logger.info("%s: read: %s, not %s: --data_dir FILE takes another one", folder, taken, _names(unread))
    if chosen and captioned:
        other = "not the captions beside the images: --captions_from txt (or caption, json) takes these"
        logger.info("%s: read: %s, %s", folder, taken, other)


def _preferred(candidates: list[Path]) -> list[Path]:
    """Return the files of the one index that comes first, by name or because it is the only one."""
    indexes: dict[str, list[Path]] = {}
    for path in candidates:
        indexes.setdefault(f"{_base(path)}{path.suffix.lower()}", []).append(path)
    for name in ("data.json", "data.parquet"):
        if name in indexes:
            return _complete(indexes[name])
    metadata = [name for name in indexes if re.fullmatch(r"metadata\.(csv|jsonl|parquet)", name)]
    only = metadata or list(indexes)
    return _complete(indexes[only[0]]) if len(only) == 1 else []


def _of_splits(folder: Path, candidates: list[Path]) -> list[Part]:
    """Return the files that are named as splits, and may be several of one; none may be there in two forms."""
    splits: dict[str, dict[str, list[Path]]] = {}
    for path in candidates:
        base = _base(path).lower()
        if base in SPLITS and base != "restval":
            splits.setdefault(SPLITS[base], {}).setdefault(f"{base}{path.suffix.lower()}", []).append(path)
    parts = []
    for split in ("train", "val", "test"):
        forms = list(splits.get(split, {}).values())
        if len(forms) > 1:
            names = _names(sorted(path for form in forms for path in form))
            raise ValueError(f"{folder}: several {split} files: {names}; name one with --data_dir FILE")
        parts += [Part(split, path) for form in forms for path in _complete(form)]
    return parts


def _base(path: Path) -> str:
    """Return an index file's name without ending and, where it is one of several, without its number."""
    match = _NUMBERED.fullmatch(path.stem)
    if match is None:
        return split_of_texts(path) or path.stem
    # flickr_30.parquet is an index of its own
    is_one_of_several = match[3] or (path.suffix.lower() == ".parquet" and (not match[1] or len(match[2]) > 4))
    return match[1] or "" if is_one_of_several else path.stem


def _complete(paths: list[Path]) -> list[Path]:
    """Check that of files `...-00000-of-00003` all are there."""
    numbered = [match for path in paths if (match := _NUMBERED.fullmatch(path.stem)) and match[3]]
    for match in numbered:
        missing = set(range(int(match[3]))) - {int(other[2]) for other in numbered if other[3] == match[3]}
        if missing or len(numbered) != int(match[3]):
            what = f"number {min(missing)} is missing" if missing else "some stand twice"
            raise ValueError(f"{paths[0].parent}: {_names(paths)} are {len(paths)} of {int(match[3])} files: {what}")
    return paths


def _only_folder(listing: Listing, captions_from: str | None) -> str | None:
    """Return the one folder that a data set must be in: the only one, or data/ if that has an index, as on the Hub."""
    if listing.has_images:
        return None
    if len(listing.folders) != 1:
        has_index = "data" in listing.folders and index_files(list_folder(listing.folder / "data"))
        return "data" if has_index and captions_from is None else None
    inside = list_folder(listing.folder / listing.folders[0])
    # images in it may be of one class, and are found from here as well
    is_around = not inside.has_images or (captions_from is None and index_files(inside))
    return listing.folders[0] if is_around else None


def _seems_captioned(listing: Listing) -> bool:
    """Tell whether images have captions beside them, by the first files of this folder and those in it."""
    if listing.captioned_folders:
        return True
    for folder in [listing.folder, *(listing.folder / name for name in listing.folders[:20])]:
        with suppress(OSError), os.scandir(folder) as entries:  # lost+found is root's
            names = [stem_and_ending(entry.name.casefold()) for entry in islice(entries, _MAX_SEEN)]
            images = {stem for stem, ending in names if ending in IMAGE_ENDINGS}
            if any(ending in CAPTION_ENDINGS and stem in images for stem, ending in names):
                return True
    return False


def _may_be_index(path: Path) -> bool:
    """Tell whether a file of an index's ending is a file; of a text, whether it begins as an index does."""
    if not path.is_file() or path.suffix.lower() != ".txt":
        return path.is_file()
    first = _FIRST_LINE.match(_head(path))
    return first is not None and (TOKEN_LINE.match(first[1]) or header(first[1], None)) is not None


def _names_images(path: Path) -> bool:
    holds_images = path.suffix.lower() == ".parquet" or split_of_texts(path) is not None
    return holds_images or IMAGE_NAME.search(_head(path)) is not None


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_HEADER).decode("utf-8", errors="replace").removeprefix("\ufeff")


def _names(paths: list[Path]) -> str:
    return shorten(", ".join(path.name for path in paths))
