"""What helps where no image of an index is found: what their paths have in common, and the folder that has them."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from posixpath import basename, commonpath, dirname, join, splitext

from cliptune.data.lookup import ADDRESS, DRIVE, LONGEST_PATH, ImageFinder, folded
from cliptune.data.table import Strings
from cliptune.preprocess.image_formats import IMAGE_ENDINGS
from cliptune.runtime.messages import count, shorten

_SAMPLE = 1000
_LOOKED_FOR = 5
_MAX_LISTED = 200_000
_MAX_DEPTH = 3
_PACKED = (".zip", ".rar", ".7z", ".tar", ".tgz", ".tar.gz")


def explain_missing(images: Strings, index_path: Path, root: Path) -> str:
    """Say that no image of an index is found, and what would help.

    Args:
        images: paths as the index has them, at least one.
        index_path: file that they stand in.
        root: folder that they were looked for in.
    """
    sample = [images[row] for row in range(0, len(images), -(-len(images) // _SAMPLE))]
    none = f"{index_path}: none of its {count(len(images), 'image')} is found"
    if all(map(ADDRESS.match, sample)):
        return (
            f"{none}: they are addresses, such as {shorten(sample[0])}. Download them first, for example with "
            "img2dataset --output_format webdataset, and name its shards with --data_dir"
        )
    is_absolute = DRIVE.match(sample[0]) or sample[0][:1] in {"/", "\\"}
    first = shorten(sample[0])
    facts = [f"{first} is not there" if is_absolute else f"{first} is not in {root}", *_in_common(sample)]
    places = [index_path.parent, root, index_path.absolute().parent.parent]
    return f"{none} ({'; '.join(facts)}): {_way_out(sample[:: -(-len(sample) // _LOOKED_FOR)], places)}"


def _way_out(paths: Sequence[str], places: Sequence[Path]) -> str:
    """Say which folder near some places holds images of these paths."""
    folder = _likely_folder(paths, places)
    finder = ImageFinder(Path(folder), replaces_folders=True)
    number = sum(bool(finder.find(path)) for path in paths) if folder else 0
    if number == len(paths):
        return f"try --image_dir {folder}, which holds them"
    if number:
        return f"try --image_dir {folder}, which holds {number} of the {len(paths)} looked for"
    if folder:
        return f"{folder} has files of such names, but with other endings: the index must have those"
    for path in sorted(places[0].iterdir()):
        if path.name.lower().endswith(_PACKED):
            return f"{path} may hold them: unpack it, and name the folder with --image_dir"
    return "--image_dir FOLDER names the folder that holds them, and takes the place of those of the paths"


def _in_common(paths: Sequence[str]) -> Iterator[str]:
    """Yield what all paths have in common."""
    if all(len(path) > LONGEST_PATH for path in paths):
        yield "these are no paths, but perhaps images in base64, which must be written to files"
        return
    if all(map(DRIVE.match, paths)):
        yield "these are paths of Windows"
    plain = [path.replace("\\", "/") for path in paths]
    folders = [dirname(path) for path in plain]
    folder = commonpath(folders) if len({path.startswith("/") for path in folders}) == 1 else ""
    if folder.strip("/"):
        yield f"all lie in {shorten(folder)}"
    if not any(splitext(path)[1] for path in plain):
        yield "none has an ending such as .jpg"


def _likely_folder(paths: Sequence[str], starts: Sequence[Path]) -> str:
    """Return the folder below one of `starts` that has most files named like some images; nothing if there is none."""
    wanted = {folded(_stem(path)): path.replace("\\", "/") for path in paths}
    found: Counter[str] = Counter()
    for start in starts:
        for folder, names in _folders(start):
            images = (name for name in names if splitext(name)[1].lower() in IMAGE_ENDINGS)
            for stem in set(map(folded, map(_stem, images))) & wanted.keys():
                found[_without(folder, wanted[stem])] += 1
        if found:
            return found.most_common(1)[0][0]
    return ""


def _folders(start: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield folders and the names of their files, those nearest to the start first; a bounded number of them."""
    waiting, num_listed = deque([(str(start), 0)]), 0
    while waiting and num_listed < _MAX_LISTED:
        folder, depth = waiting.popleft()
        try:
            with os.scandir(folder) as entries:
                listed = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
        except OSError:
            continue
        num_listed += len(listed)
        yield folder, [name for name, is_folder in listed if not is_folder]
        if depth < _MAX_DEPTH:
            waiting += [(join(folder, name), depth + 1) for name, is_folder in sorted(listed) if is_folder]


def _without(folder: str, path: str) -> str:
    """Return the folder that a path is relative to if it ends in `folder`: data/img and img/1.jpg give data."""
    parts = dirname(path).split("/")
    while parts and parts[-1] and basename(folder) == parts[-1]:
        folder, parts = dirname(folder), parts[:-1]
    return folder


def _stem(path: str) -> str:
    return splitext(path.replace("\\", "/").rpartition("/")[2])[0]
