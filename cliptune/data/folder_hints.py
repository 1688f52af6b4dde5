"""What a folder resembles that no data set is found in, and the smallest change that makes it one."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from cliptune.data.folders import CAPTION_ENDINGS, INDEX_ENDINGS, index_files, list_folder, stem_and_ending
from cliptune.preprocess.image_formats import IMAGE_ENDINGS
from cliptune.runtime.messages import count, first_few, shorten

_WAYS_OUT = {
    ".xlsx": "save the workbook as CSV (UTF-8)",
    ".xls": "save the workbook as CSV (UTF-8)",
    ".ods": "save the workbook as CSV (UTF-8)",
    ".arrow": "write it as Parquet: datasets.load_from_disk(FOLDER).to_parquet(FILE)",
    ".feather": "write it as Parquet",
    ".pkl": "write it as JSON or CSV",
    ".npy": "write the images as files, and an index",
    ".npz": "write the images as files, and an index",
    ".h5": "write the images as files, and an index",
    ".hdf5": "write the images as files, and an index",
    ".tfrecord": "write it as WebDataset shards (tar)",
    ".mdb": "write it as WebDataset shards (tar)",
    ".xml": "write the captions as CSV with a header image,caption",
    ".zip": "unpack it",
    ".rar": "unpack it",
    ".7z": "unpack it",
    ".gz": "unpack it",
    ".tgz": "unpack it",
    ".bz2": "unpack it",
    ".xz": "unpack it",
    ".zst": "unpack it",
}
LOOKED_FOR = (
    "looked for train.*, val.*, test.*, data.json, data.parquet, metadata.*, one file *.json, *.jsonl, *.csv, *.tsv, "
    "*.txt or *.parquet, images/ with captions/, folders train/, val/, test/, and images with .txt, .caption or .json "
    "beside them"
)
MAX_FOLDERS = 100


def resemblance(folder: Path, files: dict[str, list[str]]) -> str:
    """Say what a folder without a data set holds and what to do.

    Args:
        folder: as it was named.
        files: what lies below it, by their ending in small letters.
    """
    images = sorted(name for ending in IMAGE_ENDINGS & files.keys() for name in files[ending])
    if images:
        return f"{folder}: {count(len(images), 'image')} and no captions: {_caption_advice(folder, images, files)}"
    if tars := sorted(files.get(".tar", ())):
        return f"{folder}: {count(len(tars), 'tar file')}, which are shards: {_shard_advice(folder, tars)}"
    for ending, way_out in _WAYS_OUT.items():
        if ending in files:
            return f"{folder}: no data set: it holds {first_few(sorted(files[ending]), 1)}: {way_out}"
    if indexes := _indexes_below(folder, files):
        return f"{folder}: no data set here, but {first_few(indexes)}: name one with --data_dir FILE"
    found = Counter({ending or "without ending": len(names) for ending, names in files.items()})
    held = ", ".join(f"{number:,} {ending}" for ending, number in found.most_common(5)) or "no files"
    return f"{folder}: no data set: it holds {held}; {LOOKED_FOR}; `python data_loader.py` makes sample data"


def _caption_advice(folder: Path, images: list[str], files: dict[str, list[str]]) -> str:
    example = shorten(images[0])
    stems = {stem_and_ending(os.path.basename(name))[0] for name in images}  # noqa: PTH119
    apart = [name for ending in CAPTION_ENDINGS for name in files.get(ending, ()) if Path(name).stem in stems]
    if apart:
        first = min(apart)
        place = shorten(os.path.dirname(first)) or "."  # noqa: PTH120
        example = next(name for name in images if Path(name).stem == Path(first).stem)
        return (
            f"{shorten(first)} may be the captions of {example}: put such files beside the images, or name the two "
            f"folders images and captions (now: {shorten(os.path.dirname(example)) or '.'}, {place})"  # noqa: PTH120
        )
    if indexes := _indexes_below(folder, files):
        return f"{first_few(indexes)} may be the index: --data_dir FILE --image_dir FOLDER"
    inside = os.path.dirname(example)  # noqa: PTH120
    named = f" (here {os.path.basename(inside)!r})" if inside else ""  # noqa: PTH119
    return (
        f"write them to {stem_and_ending(example)[0]}.txt beside {example}, or to a file metadata.csv with the header "
        f"file_name,caption, or take them from names: --captions_from folder{named} or --captions_from filename"
    )


def _indexes_below(folder: Path, files: dict[str, list[str]]) -> list[str]:
    """Return the paths of some files below a folder that may be index files."""
    names = (name for ending in INDEX_ENDINGS & files.keys() for name in files[ending])
    folders = sorted({os.path.dirname(name) for name in names})  # noqa: PTH120
    found = [str(path) for inside in folders[:MAX_FOLDERS] for path in index_files(list_folder(folder / inside))]
    return sorted(found, key=lambda path: "caption" not in path.rpartition("/")[2].lower())


def _shard_advice(folder: Path, tars: list[str]) -> str:
    """Name the shards as braces do: {00000..00099}.tar where they are numbered so."""
    train = [name for name in tars if os.path.basename(name).startswith("train")] or tars  # noqa: PTH119
    val = next((name for name in tars if os.path.basename(name).startswith(("val", "dev"))), None)  # noqa: PTH119
    pattern = shorten(os.path.join(folder, _braces(train)))  # noqa: PTH118
    return f"--data_dir '{pattern}'" + (f" --val_data {folder / val}" if val else ", and --val_data to train on them")


def _braces(tars: list[str]) -> str:
    stems = [name.removesuffix(".tar") for name in tars]
    if len(stems) == 1:
        return tars[0]
    prefix = stems[0].rstrip("0123456789")
    if not all(stem.startswith(prefix) for stem in stems):
        prefix = ""
    numbers = [stem[len(prefix) :] for stem in stems]
    width = len(numbers[0])
    if all(number.isdecimal() and len(number) == width for number in numbers):
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == len(numbers):
            return f"{prefix}{{{numbers[0]}..{numbers[-1]}}}.tar"
    return f"{prefix}{{{','.join(numbers)}}}.tar"
