"""An index's images with their captions: found, identified, split."""

from __future__ import annotations

import logging
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from annotations import Index, Row, find_index, read_directory, read_index
from config import DEFAULT_DATA_DIR, DataSettings
from sample_data import UNFINISHED
from shards import is_shards, read_rows

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
MAX_VAL_IMAGES = 5000
MIN_PAIRS = 50
MAX_BAD_SHARE = 0.01


class Strings(Sequence[str]):
    """Many strings in two arrays: worker processes share them, where a list of strings is copied page by page."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")


class Pairs:
    """Images with their captions, fixed and compact.

    Attributes:
        paths: resolved path of each image, which is its identity.
        captions: every caption, image by image.
        starts: int64 `[N + 1]`: image i has captions `starts[i]` to `starts[i + 1]`.
        groups: unit of the split of each image.
        splits: the split that the index declares for each image, or an empty string.
    """

    def __init__(self, records: Sequence[Row]) -> None:
        self.paths = Strings(record.image for record in records)
        self.captions = Strings(caption for record in records for caption in record.captions)
        self.starts = np.cumsum([0, *(len(record.captions) for record in records)], dtype=np.int64)
        self.groups = Strings(record.group or record.image for record in records)
        self.splits = Strings(record.split or "" for record in records)

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

    def captions_of(self, image: int) -> list[str]:
        """Return one image's captions."""
        captions: list[str] = self.captions[int(self.starts[image]) : int(self.starts[image + 1])]
        return captions

    def select(self, images: Iterable[int]) -> Pairs:
        """Return some of the images, in the order given."""
        return Pairs(
            [Row(self.paths[i], tuple(self.captions_of(i)), self.splits[i] or None, self.groups[i], "") for i in images]
        )

    def declared(self) -> set[str]:
        """Return the splits that the index declares."""
        return set(self.splits) - {""}


def holds_only_placeholders(folder: Path) -> bool:
    """Tell whether a folder is missing, holds nothing but hidden files and empty folders, or unfinished sample data."""
    if (folder / UNFINISHED).is_dir():
        return True
    return not any(not path.name.startswith(".") and not path.is_dir() for path in folder.rglob("*"))


def load_pairs(data_dir: str | Path, *, image_dir: str | Path | None = None, caption_key: str | None = None) -> Pairs:
    """Read a data set: its index, the identity of its images, and which of them are there.

    Args:
        data_dir: folder, index file or shards (`path/{00000..00099}.tar`), whose pictures stay where they are.
        image_dir: folder that image paths are relative to; None: the index file's.
        caption_key: column that holds the captions.

    Raises:
        FileNotFoundError: nothing there; mentions the stage that makes sample data.
        ValueError: an index that cannot be read, or more than 1% of its entries are bad; lists them.
    """
    path = Path(data_dir)
    if is_shards(data_dir):
        rows, bad = read_rows(str(data_dir), caption_key=caption_key)
        _judge(bad, num_good=len(rows), path=path)
        return Pairs(rows)
    if not path.exists() or (path.is_dir() and holds_only_placeholders(path)):
        what = "holds no data" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; `python data_loader.py` makes sample data in {DEFAULT_DATA_DIR}")
    if image_dir is not None and not Path(image_dir).is_dir():
        raise FileNotFoundError(f"--image_dir: no such folder: {image_dir}")
    records: list[Row] = []
    problems: list[str] = []
    for index_path, declared in _index_paths(path):
        is_folder = index_path.is_dir()
        index = read_directory(index_path) if is_folder else read_index(index_path, caption_key=caption_key)
        _report_columns(index, index_path)
        root = Path(image_dir) if image_dir is not None else index_path if is_folder else index_path.parent
        found, missing = _resolve_images(index.rows, root)
        records += [row._replace(split=declared) for row in found] if declared else found
        problems += index.problems + missing
    records, repeated = _merge(records)
    _judge(problems + repeated, num_good=len(records), path=path)
    return Pairs(records)


def split_pairs(pairs: Pairs, *, val_split: float = 0.1, seed: int = 42) -> dict[str, Pairs]:
    """Split by group: no group is on both sides, and the same seed gives the same split on every machine.

    Splits that the index declares are honoured. If it declares no `val`, groups are drawn from what is left until they
    hold `val_split` of its images, at most 5,000.

    Returns:
        `train`, `val` and `test`; those that there are not hold no image.
    """
    splits = np.array(list(pairs.splits), dtype=object)
    splits[splits == ""] = "train"
    if "val" not in pairs.declared():
        pool = np.flatnonzero(splits == "train")
        splits[_choose_validation(pairs, pool, val_split=val_split, seed=seed)] = "val"
    return {split: pairs.select(np.flatnonzero(splits == split).tolist()) for split in SPLITS}


def training_pairs(settings: DataSettings, *, seed: int) -> dict[str, Pairs]:
    """Return a run's `train` and `val` pairs, checked to be enough.

    Raises:
        ValueError: fewer than 2 training images or 1 validation image.
    """
    options = {"image_dir": settings.image_dir, "caption_key": settings.caption_key}
    pairs = load_pairs(settings.data_dir, **options)
    if settings.val_data is None:
        splits = split_pairs(pairs, val_split=settings.val_split, seed=seed)
    else:
        held = [i for i, split in enumerate(pairs.splits) if split not in {"val", "test"}]
        splits = {"train": pairs.select(held), "val": evaluation_pairs(settings.val_data, split=None, **options)}
    train, val = _without_shared_images(splits["train"], splits["val"]), splits["val"]
    if len(train) < 2 or len(val) < 1:
        found = f"{len(train)} training and {len(val)} validation image(s)"
        raise ValueError(f"{settings.data_dir}: {found}; at least 2 and 1 are needed")
    num_pairs = train.num_pairs + val.num_pairs
    if num_pairs < MIN_PAIRS:
        logger.warning("only %d pairs: at least %d are needed for more than a try-out", num_pairs, MIN_PAIRS)
    return {"train": train, "val": val}


def evaluation_pairs(
    data_dir: str | Path,
    *,
    split: str | None,
    image_dir: str | Path | None = None,
    caption_key: str | None = None,
) -> Pairs:
    """Return the pairs to evaluate on: a declared split, `all`, or (None) `val` if declared, else everything.

    Raises:
        ValueError: the data set declares no such split.
    """
    pairs = load_pairs(data_dir, image_dir=image_dir, caption_key=caption_key)
    declared = pairs.declared()
    if split is None:
        split = "val" if "val" in declared else "all"
    if split == "all":
        return pairs
    if split not in declared:
        known = ", ".join(sorted(declared)) or "none"
        raise ValueError(f"{data_dir} has no split {split!r} (declared: {known}); use --split all for everything")
    return pairs.select(i for i, own in enumerate(pairs.splits) if own == split)


def _index_paths(path: Path) -> list[tuple[Path, str | None]]:
    found = find_index(path) if path.is_dir() else path
    if isinstance(found, dict):
        return [(index_path, split) for split, index_path in found.items()]
    return [(found, None)]


def _report_columns(index: Index, path: Path) -> None:
    if index.ignored_columns:
        columns = ", ".join(f"{name} ({count})" for name, count in index.ignored_columns.items())
        logger.info("%s: columns ignored (rows): %s", path, columns)


def _resolve_images(rows: Sequence[Row], root: Path) -> tuple[list[Row], list[str]]:
    """Give each row its image's resolved path; those that are not files become problems."""
    folders: dict[str, str] = {}
    found, problems = [], []
    for row in rows:
        folder, name = os.path.split(os.path.join(root, row.image))  # noqa: PTH118  (a million times faster matters)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], name)  # noqa: PTH118
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                path = os.path.realpath(path, strict=True)
                mode = os.stat(path).st_mode  # noqa: PTH116
            reason = None if stat.S_ISREG(mode) else "not a file"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if reason is None:
            found.append(row._replace(image=path))
        else:
            problems.append(f"{row.place}: image {row.image}: {reason}")
    return found, problems


def _merge(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Join rows that turn out to be the same file."""
    merged: dict[str, Row] = {}
    problems = []
    for row in rows:
        first = merged.get(row.image)
        if first is None:
            merged[row.image] = row
        elif first.split != row.split:
            problems.append(f"{row.place}: {row.image} is in {row.split} here and in {first.split} at {first.place}")
        else:
            merged[row.image] = first._replace(captions=first.captions + row.captions, group=first.group or row.group)
    return list(merged.values()), problems


def _judge(problems: list[str], *, num_good: int, path: Path) -> None:
    """Say which entries are left out; too many of them are an error."""
    if not problems:
        return
    shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    if len(problems) > MAX_BAD_SHARE * (num_good + len(problems)):
        raise ValueError(f"{path}: {len(problems)} bad entries beside {num_good} good images: {shown}")
    logger.warning("%s: %d bad entries are left out: %s", path, len(problems), shown)


def _choose_validation(pairs: Pairs, pool: np.ndarray[Any, Any], *, val_split: float, seed: int) -> list[int]:
    members: dict[str, list[int]] = defaultdict(list)
    for image in pool.tolist():
        members[pairs.groups[image]].append(image)
    groups = sorted(members)
    # RandomState's stream is frozen for good, the newer generators' is not
    order = np.random.RandomState(seed % 2**32).permutation(len(groups))
    target = min(max(round(val_split * len(pool)), 1), MAX_VAL_IMAGES)
    chosen: list[int] = []
    for number in order[:-1].tolist():  # one group at least stays for training
        images = members[groups[number]]
        if not chosen or len(chosen) + len(images) <= target:
            chosen += images
        if len(chosen) >= target:
            break
    return chosen


def _without_shared_images(train: Pairs, val: Pairs) -> Pairs:
    shared = set(val.paths)
    kept = [image for image, path in enumerate(train.paths) if path not in shared]
    if len(kept) == len(train):
        return train
    logger.warning("%d image(s) of the validation set were left out of training", len(train) - len(kept))
    return train.select(kept)
