"""What a folder holds: index files, or images with their captions beside them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from cliptune.data.base64_images import images_beside, texts_of_images
from cliptune.data.delimited import MAX_HEADER, header
from cliptune.data.index import SPLITS, Index, Records
from cliptune.data.text_stream import TextFile
from cliptune.data.token_lines import TOKEN_LINE
from cliptune.preprocess.decode import IMAGE_ENDINGS
from cliptune.runtime.messages import shorten

INDEX_ENDINGS = frozenset((".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet"))

_FIRST_LINE = re.compile(r"\s*([^\n]*)")


def read_directory(folder: Path) -> Index:
    """Read images/a/b.png with its captions from captions/a/b.txt, one a line; pairs go by the path without ending.

    Raises:
        FileNotFoundError: images/ or captions/ is not there.
        ValueError: there is no usable pair.
    """
    for part in ("images", "captions"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder}: no folder {part}/; the directory form needs images/ and captions/")
    found = Records(folder, None)
    images = _by_stem(found, folder, "images", IMAGE_ENDINGS)
    texts = _by_stem(found, folder, "captions", frozenset((".txt",)))
    for stem, image in images.items():
        text = texts.get(stem)
        if image is not None and stem not in texts:
            found.issue(image, f"no captions (no captions/{shorten(stem)}.txt)", image=image)
        elif image is not None and text is not None:
            found.add(image, image, _caption_lines(found, folder, text))
    for stem, text in texts.items():
        if text is not None and stem not in images:
            found.issue(text, f"captions without an image (no images/{shorten(stem)}.*)")
    return found.index("directory")


def find_index(folder: Path) -> dict[str, Path] | Path:
    """Decide which index a folder holds.

    Returns:
        The files of the splits ({"train": ..., "val": ...}) if there is a train file, else data.json, else
        data.parquet, else the only index file, else the folder itself if it has images/ and captions/; a `folder` that
        is a file is returned.

    Raises:
        FileNotFoundError: there is no such folder, or no index in it.
        ValueError: several files could be meant; the message names them.
    """
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder; `python data_loader.py` makes sample data")
    candidates = sorted(path for path in folder.iterdir() if _is_candidate(path))
    texts = texts_of_images(candidates)
    candidates = [path for path in candidates if path not in map(images_beside, texts)]
    splits: dict[str, list[Path]] = {}
    for path in candidates:
        stem = texts.get(path, path.stem).lower()
        if stem in SPLITS and stem != "restval":
            splits.setdefault(SPLITS[stem], []).append(path)
    if "train" in splits:
        return _one_for_each(folder, splits)
    for name in ("data.json", "data.parquet"):
        if folder / name in candidates:
            return folder / name
    if len(candidates) == 1:
        return candidates[0]
    if (folder / "images").is_dir() and (folder / "captions").is_dir():
        return folder
    if candidates and len(candidates) == sum(map(len, splits.values())):
        return _one_for_each(folder, splits)
    if candidates:
        raise ValueError(f"{folder}: several index files: {_names(candidates)}; name one with --data_dir FILE")
    raise FileNotFoundError(
        f"{folder}: no data set: looked for train.*, val.*, test.*, data.json, data.parquet, one file *.json, *.jsonl, "
        "*.csv, *.tsv, *.txt or *.parquet, and images/ with captions/; `python data_loader.py` makes sample data"
    )


def _by_stem(found: Records, folder: Path, part: str, endings: frozenset[str]) -> dict[str, str | None]:
    """Return the files below folder/part by their path without ending, sorted; None where several clash.

    Names that differ only by case clash too: they are one file on some file systems.
    """
    clashing: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(_files_below(folder / part)):
        name = path.relative_to(folder / part)
        if path.suffix.lower() in endings and path.is_file():
            stem = unicodedata.normalize("NFC", name.with_suffix("").as_posix())
            clashing.setdefault(stem.casefold(), []).append((stem, f"{part}/{name.as_posix()}"))
    by_stem: dict[str, str | None] = {}
    for files in clashing.values():
        if len(files) > 1:
            found.issue(files[0][1], f"clashes with {', '.join(file for _, file in files[1:])}")
        by_stem |= {stem: file if len(files) == 1 else None for stem, file in files}
    return by_stem


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield what lies below a folder, in linked folders too; nothing hidden, and no link back to a folder above."""
    above = {
        str(folder): [os.path.realpath(folder)]
    }  # of each folder, the real paths of it and of those it was found in
    for root, folders, names in os.walk(folder, followlinks=True):
        yield from (Path(root, name) for name in names if not name.startswith("."))
        found = above.pop(root)
        for name in [*folders]:
            path = os.path.join(root, name)  # noqa: PTH118
            real = os.path.realpath(path)
            if name.startswith(".") or any(f"{other}/".startswith(f"{real.rstrip('/')}/") for other in found):
                folders.remove(name)
            else:
                above[path] = [*found, real]


def _caption_lines(found: Records, folder: Path, name: str) -> list[str]:
    """Return the captions of one text file; blank lines are no captions."""
    try:
        lines = list(TextFile(folder / name).lines())
    except ValueError as error:
        found.issue(name, str(error).removeprefix(f"{folder / name}: "))
        return []
    captions: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            captions += found.captions(f"{name}: line {number}", line)
    return captions


def _is_candidate(path: Path) -> bool:
    if path.name.lower().startswith((".", "readme", "license")) or path.suffix.lower() not in INDEX_ENDINGS:
        return False
    if not path.is_file() or path.suffix.lower() != ".txt":
        return path.is_file()
    with path.open("rb") as file:
        head = file.read(MAX_HEADER).decode("utf-8", errors="replace").removeprefix("\ufeff")
    first = _FIRST_LINE.match(head)
    return first is not None and (TOKEN_LINE.match(first[1]) or header(first[1], None)) is not None


def _one_for_each(folder: Path, splits: dict[str, list[Path]]) -> dict[str, Path]:
    for split, paths in splits.items():
        if len(paths) > 1:
            raise ValueError(f"{folder}: several {split} files: {_names(paths)}; name one with --data_dir FILE")
    order = [split for split in ("train", "val", "test") if split in splits]
    return {split: splits[split][0] for split in order}


def _names(paths: list[Path]) -> str:
    return shorten(", ".join(path.name for path in paths))
