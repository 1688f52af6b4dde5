"""An index's images with their captions: found, identified, split."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from annotations import find_index, read_directory, read_index
from config import DEFAULT_DATA_DIR, MAX_BAD_SHARE, DataSettings
from entries import Index
from rows import MAX_PROBLEMS, NO_SPLIT, SPLITS, CodeArray, IntArray, Problem, Problems, Rows, Strings, take_runs
from sample_data import UNFINISHED
from shards import is_shards, read_rows

logger = logging.getLogger(__name__)

MAX_VAL_IMAGES = 5000
MIN_PAIRS = 50


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images with their captions, fixed and compact.

    Attributes:
        paths: resolved path of each image, which is its identity.
        captions: every caption, image by image.
        starts: int64 `[N + 1]`: image i has captions `starts[i]` to `starts[i + 1]`.
        groups: unit of the split of each image; its path where the index names none.
        splits: int8 `[N]`: position in `SPLITS` of the split that the index declares for each image, or -1.
        problems: the entries of the index that were left out, the same for every selection.
    """

    paths: Strings
    captions: Strings
    starts: IntArray
    groups: Strings
    splits: CodeArray
    problems: Problems = field(default_factory=Problems)

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

    def select(self, images: IntArray | Sequence[int]) -> Pairs:
        """Return some of the images, by their numbers `[M]` and in their order; the text is shared."""
        images = np.asarray(images, dtype=np.int64)
        captions, starts = take_runs(self.starts, images)
        paths = self.paths.take(images)
        return Pairs(
            paths=paths,
            captions=self.captions.take(captions),
            starts=starts,
            groups=paths if self.groups is self.paths else self.groups.take(images),
            splits=self.splits[images],
            problems=self.problems,
        )

    def find(self, paths: Sequence[str]) -> IntArray:
        """Return the numbers of images, `[len(paths)]`; -1 for a path that is not here."""
        return self.paths.find(Strings.of(paths))

    def declared(self) -> set[str]:
        """Return the splits that the index declares."""
        return {split for code, split in enumerate(SPLITS) if (self.splits == code).any()}


def holds_only_placeholders(folder: Path) -> bool:
    """Tell whether a folder is missing, holds nothing but hidden files and empty folders, or unfinished sample data."""
    if (folder / UNFINISHED).is_dir():
        return True
    return not any(not path.name.startswith(".") and not path.is_dir() for path in folder.rglob("*"))


def load_pairs(
    data_dir: str | Path,
    *,
    image_dir: str | Path | None = None,
    caption_key: str | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Pairs:
    """Read a data set: its index, the identity of its images, and which of them are there.

    Args:
        data_dir: folder, index file or shards (`path/{00000..00099}.tar`), whose pictures stay where they are.
        image_dir: folder that image paths are relative to; None: the index file's.
        caption_key: column that holds the captions.
        max_bad_share: share of the entries that may be bad; they are left out.

    Raises:
        FileNotFoundError: nothing there; mentions the stage that makes sample data.
        ValueError: an index that cannot be read, or too many of its entries are bad; lists the first.
    """
    path = Path(data_dir)
    if is_shards(data_dir):
        rows, problems = read_rows(str(data_dir), caption_key=caption_key)
    else:
        rows, problems = _read_files(path, image_dir=image_dir, caption_key=caption_key)
    _judge(problems, num_good=len(rows), max_bad_share=max_bad_share, path=path)
    return Pairs(
        paths=rows.images,
        captions=rows.captions,
        starts=rows.starts,
        groups=rows.groups.filled(rows.images),
        splits=rows.splits,
        problems=problems,
    )


def _read_files(path: Path, *, image_dir: str | Path | None, caption_key: str | None) -> tuple[Rows, Problems]:
    """Read the images of a folder or an index file, each once, and what is wrong with some."""
    if not path.exists() or (path.is_dir() and holds_only_placeholders(path)):
        what = "holds no data" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; `python data_loader.py` makes sample data in {DEFAULT_DATA_DIR}")
    if image_dir is not None and not Path(image_dir).is_dir():
        raise FileNotFoundError(f"--image_dir: no such folder: {image_dir}")
    rows, problems = _read_rows(path, image_dir=image_dir, caption_key=caption_key)
    rows, repeated = _merge(rows)
    problems.extend(repeated)
    return rows, problems


def split_pairs(pairs: Pairs, *, val_split: float = 0.1, seed: int = 42) -> dict[str, Pairs]:
    """Split by group: no group is on both sides, and the same seed gives the same split on every machine.

    Splits that the index declares are honoured. If it declares no `val`, groups are drawn from what is left until they
    hold `val_split` of its images, at most 5,000.

    Returns:
        `train`, `val` and `test`; those that there are not hold no image.
    """
    train, val = SPLITS.index("train"), SPLITS.index("val")
    splits = np.where(pairs.splits == NO_SPLIT, train, pairs.splits)
    if not (splits == val).any():
        pool = np.flatnonzero(splits == train)
        splits[_choose_validation(pairs, pool, val_split=val_split, seed=seed)] = val
    return {split: pairs.select(np.flatnonzero(splits == code)) for code, split in enumerate(SPLITS)}


def training_pairs(settings: DataSettings, *, seed: int) -> dict[str, Pairs]:
    """Return a run's `train` and `val` pairs, checked to be enough.

    Raises:
        ValueError: fewer than 2 training images or 1 validation image.
    """
    pairs = load_pairs(
        settings.data_dir,
        image_dir=settings.image_dir,
        caption_key=settings.caption_key,
        max_bad_share=settings.allowed_bad_share,
    )
    if settings.val_data is None:
        splits = split_pairs(pairs, val_split=settings.val_split, seed=seed)
    else:
        own = pairs.select(np.flatnonzero((pairs.splits == NO_SPLIT) | (pairs.splits == SPLITS.index("train"))))
        splits = {"train": own, "val": separate_validation(settings)}
    train, val = _without_shared_images(splits["train"], splits["val"]), splits["val"]
    if len(train) < 2 or len(val) < 1:
        found = f"{len(train)} training and {len(val)} validation image(s)"
        raise ValueError(f"{settings.data_dir}: {found}; at least 2 and 1 are needed")
    num_pairs = train.num_pairs + val.num_pairs
    if num_pairs < MIN_PAIRS:
        logger.warning("only %d pairs: at least %d are needed for more than a try-out", num_pairs, MIN_PAIRS)
    return {"train": train, "val": val}


def separate_validation(settings: DataSettings) -> Pairs:
    """Return the pairs of a run's `val_data`.

    Raises:
        ValueError: too many of its entries are bad, or it cannot be read.
    """
    assert settings.val_data is not None
    return evaluation_pairs(
        settings.val_data,
        split=None,
        image_dir=settings.image_dir,
        caption_key=settings.caption_key,
        max_bad_share=settings.allowed_bad_share,
    )


def evaluation_pairs(
    data_dir: str | Path,
    *,
    split: str | None,
    image_dir: str | Path | None = None,
    caption_key: str | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Pairs:
    """Return the pairs to evaluate on: a declared split, `all`, or (None) `val` if declared, else everything.

    Raises:
        ValueError: the data set declares no such split.
    """
    pairs = load_pairs(data_dir, image_dir=image_dir, caption_key=caption_key, max_bad_share=max_bad_share)
    declared = pairs.declared()
    if split is None:
        split = "val" if "val" in declared else "all"
    if split == "all":
        return pairs
    if split not in declared:
        known = ", ".join(sorted(declared)) or "none"
        raise ValueError(f"{data_dir} has no split {split!r} (declared: {known}); use --split all for everything")
    return pairs.select(np.flatnonzero(pairs.splits == SPLITS.index(split)))


def _index_paths(path: Path) -> list[tuple[Path, str | None]]:
    found = find_index(path) if path.is_dir() else path
    if isinstance(found, dict):
        return [(index_path, split) for split, index_path in found.items()]
    return [(found, None)]


def _report_columns(index: Index, path: Path) -> None:
    if index.ignored_columns:
        columns = ", ".join(f"{name} ({count})" for name, count in index.ignored_columns.items())
        logger.info("%s: columns ignored (rows): %s", path, columns)


def _read_rows(path: Path, *, image_dir: str | Path | None, caption_key: str | None) -> tuple[Rows, Problems]:
    """Read the indexes of a data set, with the images resolved and the splits that the files are."""
    parts: list[Rows] = []
    problems = Problems()
    for index_path, declared in _index_paths(path):
        is_folder = index_path.is_dir()
        index = read_directory(index_path) if is_folder else read_index(index_path, caption_key=caption_key)
        _report_columns(index, index_path)
        root = Path(image_dir) if image_dir is not None else index_path if is_folder else index_path.parent
        rows, missing = _resolve_images(index.rows, root)
        parts.append(replace(rows, splits=np.full_like(rows.splits, SPLITS.index(declared))) if declared else rows)
        problems.extend(index.problems)
        problems.extend(missing)
    return Rows.concatenate(parts), problems


def _resolve_images(rows: Rows, root: Path) -> tuple[Rows, Problems]:
    """Give each row its image's resolved path; those that are not files become problems."""
    real_folder = lru_cache(maxsize=1 << 16)(os.path.realpath)
    found, problems = np.zeros(len(rows), dtype=bool), Problems()

    def resolved() -> Iterator[str]:
        for number, image in enumerate(rows.images):
            try:
                path = _resolve(os.path.join(root, image), real_folder)  # noqa: PTH118  (see _resolve)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                problems.add(Problem(f"image {image}: {reason}", image=image, place=rows.place(number)))
            else:
                found[number] = True
                yield path

    paths = Strings.of(resolved())
    kept = rows if found.all() else rows.take(np.flatnonzero(found))
    return replace(kept, images=paths), problems


def _resolve(image: str, real_folder: Callable[[str], str]) -> str:
    """Return the real path of an image's file; os.path, because pathlib is several times as slow.

    Raises:
        OSError, ValueError: there is no such file.
    """
    folder, name = os.path.split(image)
    path = os.path.join(real_folder(folder), name)  # noqa: PTH118
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        path = os.path.realpath(path, strict=True)
        mode = os.stat(path).st_mode  # noqa: PTH116
    if not stat.S_ISREG(mode):
        raise ValueError("not a file")
    return path


def _merge(rows: Rows) -> tuple[Rows, Problems]:
    """Join rows that turn out to be the same file; those of another split than its first row are left out."""
    first = rows.images.find(rows.images)
    agrees = rows.splits == rows.splits[first]
    problems = Problems()
    if not agrees.all():
        conflicts = np.flatnonzero(~agrees)
        for row in conflicts[:MAX_PROBLEMS].tolist():
            here, there = rows.split_name(row), rows.split_name(first[row])
            image, first_place = rows.images[row], rows.place(first[row])
            reason = f"{image} is in {here} here and in {there} at {first_place}"
            problems.add(Problem(reason, image=image, place=rows.place(row)))
        problems.count = len(conflicts)
        rows, first = rows.take(np.flatnonzero(agrees)), (np.cumsum(agrees) - 1)[first[agrees]]
    return rows.joined(first), problems


def _judge(problems: Problems, *, num_good: int, max_bad_share: float, path: Path) -> None:
    """Say which entries are left out; too many of them are an error."""
    if not problems.count:
        return
    shown = "; ".join(map(str, problems.first[:10])) + (
        f"; and {problems.count - 10} more" if problems.count > 10 else ""
    )
    if problems.count > max_bad_share * (num_good + problems.count):
        raise ValueError(
            f"{path}: {problems.count} bad entries beside {num_good} good images: {shown} "
            f"(allowed is a share of {max_bad_share:g}: --max_bad_share; data_loader.py --check lists all)"
        )
    logger.warning("%s: %d bad entries are left out: %s", path, problems.count, shown)


def _choose_validation(pairs: Pairs, pool: IntArray, *, val_split: float, seed: int) -> IntArray:
    """Draw whole groups from the pool of images; returns their images' numbers."""
    ranks = _ranks(pairs.groups.take(pool))
    sizes = np.bincount(ranks)
    # RandomState's stream is frozen for good, the newer generators' is not
    order = np.random.RandomState(seed % 2**32).permutation(len(sizes))
    target = min(max(round(val_split * len(pool)), 1), MAX_VAL_IMAGES)
    chosen: list[int] = []
    num_images = 0
    for group in order[:-1]:  # one group at least stays for training
        if not chosen or num_images + sizes[group] <= target:
            chosen.append(group)
            num_images += sizes[group]
        if num_images >= target:
            break
    return pool[np.isin(ranks, chosen)]


def _ranks(groups: Strings) -> IntArray:
    """Return the position of each group among the different ones in sorted order, int64 `[N]`."""
    first = groups.find(groups)
    heads = np.flatnonzero(first == np.arange(len(first)))
    heads = heads[groups.take(heads).sorted_order()]
    ranks = np.empty_like(first)
    ranks[heads] = np.arange(len(heads))
    return ranks[first]


def _without_shared_images(train: Pairs, val: Pairs) -> Pairs:
    kept = np.flatnonzero(val.paths.find(train.paths) < 0)
    if len(kept) == len(train):
        return train
    logger.warning("%d image(s) of the validation set were left out of training", len(train) - len(kept))
    return train.select(kept)
