"""A data set in memory: images with their captions, split and group, in columns."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cliptune.data.caption_files import TEMPLATES, read_directory
from cliptune.data.column_names import like_splits
from cliptune.data.folders import find_index, split_folders
from cliptune.data.formats import read_index
from cliptune.data.index import FORM_NAMES, Index, NoCaptionsError
from cliptune.data.issues import MAX_ISSUES, Issue, Issues, first_issues
from cliptune.data.lookup import ImageFinder
from cliptune.data.missing import explain_missing
from cliptune.data.sample_data import UNFINISHED
from cliptune.data.shards import folder_of, is_shards, read_rows
from cliptune.data.table import NO_SPLIT, SPLITS, BoolArray, CodeArray, IntArray, Rows, Strings, take_runs
from cliptune.runtime.messages import count, first_few, shorten

logger = logging.getLogger(__name__)

MIN_PAIRS = 50
MAX_COLUMNS = 10  # shown


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images with their captions, fixed and compact.

    Attributes:
        paths: resolved path of each image, which is its identity.
        captions: every caption, image by image.
        starts: int64 `[N + 1]`: image i has captions `starts[i]` to `starts[i + 1]`.
        groups: unit of the split of each image; its path where the index names none.
        splits: int8 `[N]`: index in `SPLITS` of the split that the data set declares for each image, or -1.
        issues: why records of the index were skipped, the same for every selection.
        root: real path of the folder that images lie in, unless they are outside of it.
    """

    paths: Strings
    captions: Strings
    starts: IntArray
    groups: Strings
    splits: CodeArray
    issues: Issues = field(default_factory=Issues)
    root: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_pairs(self) -> int:
        """Number of captions, each with its image."""
        return len(self.captions)

    @property
    def text_to_image(self) -> Tensor:
        """Image row of each caption, int64 `[num_pairs]`."""
        return torch.from_numpy(np.repeat(np.arange(len(self)), np.diff(self.starts)))

    @property
    def query_groups(self) -> dict[str, IntArray]:
        """Group of each query: of the images, `i2t` `[N]`, and of the captions, `t2i` `[num_pairs]`; a number each."""
        groups = self.groups.first_equal()
        return {"i2t": groups, "t2i": np.repeat(groups, np.diff(self.starts))}

    def captions_of(self, image: int) -> list[str]:
        """Return one image's captions."""
        captions: list[str] = self.captions[int(self.starts[image]) : int(self.starts[image + 1])]
        return captions

    def select(self, images: IntArray | Sequence[int]) -> Pairs:
        """Return some of the images, by their indices `[M]` and in that order; the text is shared."""
        images = np.asarray(images, dtype=np.int64)
        captions, starts = take_runs(self.starts, images)
        paths = self.paths.take(images)
        return Pairs(
            paths=paths,
            captions=self.captions.take(captions),
            starts=starts,
            groups=paths if self.groups is self.paths else self.groups.take(images),
            splits=self.splits[images],
            issues=self.issues,
            root=self.root,
        )

    def without(self, is_out: BoolArray) -> Pairs:
        """Return the pairs but for some captions, bool `[num_pairs]`; an image without one left is gone."""
        left = np.bincount(self.text_to_image.numpy(), ~is_out, len(self)).astype(np.int64)
        rest = self.select(np.flatnonzero(left))
        starts = np.concatenate([[0], np.cumsum(left[left > 0])])
        return replace(rest, captions=self.captions.take(np.flatnonzero(~is_out)), starts=starts)

    @classmethod
    def concatenate(cls, parts: Sequence[Pairs]) -> Pairs:
        """Return the images of data sets that share none, one set after another; the root is the first one's."""
        issues = Issues()
        for part in parts:
            issues.extend(part.issues)
        ends = np.cumsum([part.num_pairs for part in parts[:-1]])
        starts = [parts[0].starts, *(part.starts[1:] + end for part, end in zip(parts[1:], ends, strict=True))]
        columns = {name: [getattr(part, name) for part in parts] for name in ("paths", "captions", "groups")}
        return cls(
            **{name: Strings.concatenate(column) for name, column in columns.items()},
            starts=np.concatenate(starts),
            splits=np.concatenate([part.splits for part in parts]),
            issues=issues,
            root=parts[0].root,
        )

    def find(self, paths: Sequence[str]) -> IntArray:
        """Return the indices of images, `[len(paths)]`; -1 for a path that is not here."""
        return self.paths.find(Strings.of(paths))

    def declared(self) -> set[str]:
        """Return the splits that the index declares."""
        return {split for code, split in enumerate(SPLITS) if (self.splits == code).any()}


def holds_only_placeholders(folder: Path) -> bool:
    """Tell whether a folder is missing, holds nothing but hidden files and empty folders, or unfinished sample data."""
    if (folder / UNFINISHED).is_dir():
        return True
    # a link is somebody's data, though the walk leads to no file: images/ may be on another disk
    paths = (Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files))
    return not any(not path.name.startswith(".") and (path.is_symlink() or not path.is_dir()) for path in paths)


@dataclass(frozen=True)
class DataSource:
    """Where a data set lies and how its index is read.

    Attributes:
        data_dir: folder, index file or shards (`path/{00000..00099}.tar`), whose images stay where they are.
        image_dir: folder that image paths are relative to; None: the index file's.
        caption_key: column that holds the captions, or several: `caption_en,caption_de`; None: the known ones.
        max_skipped_fraction: how many of the records may be skipped, in [0, 1].
        image_key: column that holds the image paths; None: a known one.
        captions_from: where the captions of a folder of images are: `json`, `txt` or `caption` files, or the names:
            `folder` or `filename`; None: found by what the folder holds.
        caption_template: caption in which `{}` stands for such a name; None: "a photo of a {}", or the file's name.
        may_run_commands: `data_dir` may be a `pipe:` address, whose command is run; only what a person has typed.
    """

    data_dir: str | Path
    image_dir: str | Path | None = None
    caption_key: str | None = None
    max_skipped_fraction: float = 0.01
    image_key: str | None = None
    captions_from: str | None = None
    caption_template: str | None = None
    may_run_commands: bool = False

    def __post_init__(self) -> None:
        if self.captions_from not in {None, "json", "txt", "caption", *TEMPLATES}:
            raise ValueError(f"captions_from {self.captions_from!r}: known are json, txt, caption, folder, filename")
        if self.captions_from is not None and is_shards(self.data_dir):
            raise ValueError(f"{self.data_dir}: captions_from {self.captions_from} is for a folder, not for shards")
        if self.caption_template is not None and "{}" not in self.caption_template:
            raise ValueError(f"caption_template {self.caption_template!r} has no {{}}, where the name is put")
        if self.caption_template is not None and self.captions_from not in TEMPLATES:
            raise ValueError("caption_template is for names: it needs captions_from folder or captions_from filename")

    def at(self, data_dir: str) -> DataSource:
        """Return how another data set is read; what is said of a folder of images does not count for other forms."""
        if Path(data_dir).is_dir():
            return replace(self, data_dir=data_dir, may_run_commands=False)
        return replace(self, data_dir=data_dir, may_run_commands=False, captions_from=None, caption_template=None)


class MissingImagesError(ValueError):
    """None of a data set's images is found."""


def load_pairs(source: DataSource | str | Path) -> Pairs:
    """Read a data set: its index, the identity of its images, and which of them are there.

    Raises:
        FileNotFoundError: nothing there; mentions the stage that makes sample data.
        ValueError: an index that cannot be read, or too many of its records have issues; lists the first.
    """
    source = source if isinstance(source, DataSource) else DataSource(source)
    if is_shards(source.data_dir):
        rows, issues = read_rows(str(source.data_dir), caption_key=source.caption_key)
        forms = ["shards"]
    else:
        rows, issues, forms = _read_files(source)
    _judge(issues, num_images=len(rows), source=source)
    if Path(source.data_dir).is_dir():
        logger.info("%s: read as %s", source.data_dir, first_few(forms))
    return Pairs(
        paths=rows.images,
        captions=rows.captions,
        starts=rows.starts,
        groups=rows.groups.filled(rows.images),
        splits=rows.splits,
        issues=issues,
        root=os.path.realpath(_root(source)),
    )


def _root(source: DataSource) -> Path:
    if is_shards(source.data_dir):
        return folder_of(str(source.data_dir))
    data_dir = Path(source.data_dir)
    if source.image_dir is not None:
        return Path(source.image_dir)
    return data_dir if data_dir.is_dir() else data_dir.parent


def _read_files(source: DataSource) -> tuple[Rows, Issues, list[str]]:
    """Read the images of a folder or an index file, each once, and what is wrong with some; and the forms they had."""
    path = Path(source.data_dir)
    if not path.exists() or (path.is_dir() and holds_only_placeholders(path)):
        what = f"{path} holds no data" if path.exists() else f"{path} does not exist"
        raise FileNotFoundError(f"{what}; `python data_loader.py` makes sample data in ./data")
    if source.image_dir is not None and not Path(source.image_dir).is_dir():
        raise FileNotFoundError(f"--image_dir: no such folder: {source.image_dir}")
    rows, issues, forms = _read_rows(path, source)
    rows, repeated = _merge(rows)
    issues.extend(repeated)
    return rows, issues, forms


def _read_rows(path: Path, source: DataSource) -> tuple[Rows, Issues, list[str]]:
    """Read the indexes of a data set, with the images resolved and the splits that the files are."""
    parts: list[Rows] = []
    forms: list[str] = []
    issues, missing = Issues(), []
    found = find_index(path, captions_from=source.captions_from)
    for declared, index_path in found:
        try:
            index = _read_part(index_path, path, source)
        except NoCaptionsError as error:
            if declared != "test" or all(split == "test" for split, _ in found):
                raise
            logger.warning("%s is left out: it has no captions (%s)", index_path, error)
            continue
        is_folder = index_path.is_dir()
        inside = "" if index_path == path else f"{index_path.relative_to(path).as_posix()}: "
        forms.append(f"{inside}{FORM_NAMES.get(index.form, index.form)}")
        if index.ignored_columns:
            columns = [f"{shorten(name)} ({num_rows})" for name, num_rows in index.ignored_columns.items()]
            logger.info("%s: columns ignored (rows): %s", index_path, first_few(columns, MAX_COLUMNS))
        if declared is None and (index.rows.splits == NO_SPLIT).all() and (names := like_splits(index.ignored_columns)):
            logger.warning(
                "%s: the column %s is no split: if it says which images train and which validate, call it split, with "
                "train, val or test in it",
                index_path,
                first_few(names, 1),
            )
        beside = index_path if is_folder else index_path.parent
        root = beside if source.image_dir is None else Path(source.image_dir)
        finder = ImageFinder(root, replaces_folders=source.image_dir is not None)
        rows, not_found = finder.resolve(index.rows)
        for rule, number in finder.taken.items():
            logger.info("%s: %s: %s", index_path, count(number, "image path"), rule)
        if not len(rows):
            missing.append(explain_missing(index.rows.images, index_path, root))
        parts.append(replace(rows, splits=np.full_like(rows.splits, SPLITS.index(declared))) if declared else rows)
        issues.extend(index.issues)
        issues.extend(not_found)
    if len(missing) == len(parts):
        raise MissingImagesError(missing[0])
    for message in missing:
        logger.warning("%s", message)
    return Rows.concatenate(parts), issues, forms


def _read_part(index_path: Path, data_dir: Path, source: DataSource) -> Index:
    """Read an index file, or a folder of images with their captions; locations name the folder that it is in."""
    if index_path.is_dir():
        index = read_directory(
            index_path, caption_key=source.caption_key, captions_from=source.captions_from,
            caption_template=source.caption_template,
        )  # fmt: skip
        inside = index_path
    else:
        index, inside = (
            read_index(index_path, caption_key=source.caption_key, image_key=source.image_key),
            index_path.parent,
        )
    if index_path.stem == "metadata":  # as the Hub's image folders have it
        index = index._replace(rows=_split_by_folder(index.rows))
    if not data_dir.is_dir() or inside == data_dir:
        return index
    prefix = f"{inside.relative_to(data_dir).as_posix()}/"
    issues = [issue._replace(location=f"{prefix}{issue.location}") for issue in index.issues.first]
    units = tuple(f"{prefix}{unit}" if unit else "" for unit in index.rows.units)
    return index._replace(rows=replace(index.rows, units=units), issues=Issues(issues, index.issues.count))


def _split_by_folder(rows: Rows) -> Rows:
    """Return rows that declare no split with those that the folders of the images are, as `train/a.jpg`."""
    if (rows.splits != NO_SPLIT).any():
        return rows
    tops = [image.partition("/")[0] for image in rows.images]
    splits = {folder: SPLITS.index(split) for split, folder in split_folders(set(tops)).items()}
    return replace(rows, splits=np.array([splits.get(top, NO_SPLIT) for top in tops], dtype=np.int8))


def _merge(rows: Rows) -> tuple[Rows, Issues]:
    """Join rows that turn out to be the same file; those of another split than its first row are skipped."""
    first = rows.images.first_equal()
    agrees = rows.splits == rows.splits[first]
    issues = Issues()
    if not agrees.all():
        conflicts = np.flatnonzero(~agrees)
        for row in conflicts[:MAX_ISSUES].tolist():
            here, there = rows.split_name(row), rows.split_name(first[row])
            image, first_location = rows.images[row], rows.location(first[row])
            reason = f"{image} is in {here} here and in {there} at {first_location}"
            issues.add(Issue(reason, image=image, location=rows.location(row)))
        issues.count = len(conflicts)
        rows, first = rows.take(np.flatnonzero(agrees)), (np.cumsum(agrees) - 1)[first[agrees]]
    return rows.joined(first), issues


def _judge(issues: Issues, *, num_images: int, source: DataSource) -> None:
    """Say which records are skipped; too many of them are an error."""
    if not issues.count:
        return
    total, shown = issues.count + num_images, first_issues(issues.first, 10, total=issues.count)
    if issues.count > source.max_skipped_fraction * total:
        raise ValueError(
            f"{source.data_dir}: {issues.count:,} of {count(total, 'record')} cannot be used: {shown}. At most "
            f"{source.max_skipped_fraction:g} of all may be skipped: mend them, or try a larger --max_skipped_fraction "
            "(data_loader.py --check lists all)"
        )
    if not num_images:  # where all may be skipped, as for a check
        raise ValueError(f"{source.data_dir}: none of its {count(total, 'record')} can be used: {shown}")
    logger.warning("%s: skipped %s: %s", source.data_dir, count(issues.count, "record"), shown)
