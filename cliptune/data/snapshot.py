"""What a run's data is, in a few bytes an image, and how other data differs from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cliptune.data.identity import Hashes, file_identities, text_hashes
from cliptune.data.pairs import Pairs
from cliptune.data.shards import Shards
from cliptune.data.table import NO_SPLIT, SPLITS, CodeArray, Strings
from cliptune.runtime.messages import count

TRAIN, VAL = SPLITS.index("train"), SPLITS.index("val")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The images of one split, in their order.

    Attributes:
        paths: hash of each image's path relative to the root of its data, uint64 `[N]`.
        files: identity of each image's file, uint64 `[N]`.
        captions: hash of all captions, each with its image, whatever their order.
        what: an "image" or a "shard". Of shards it is the names, and the sizes and numbers of samples.
    """

    paths: Hashes
    files: Hashes
    captions: int = 0
    what: str = "image"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""
        hashes = {name: torch.from_numpy(getattr(self, name).view(np.int64)) for name in ("paths", "files")}
        return {**hashes, "captions": self.captions, "what": self.what}

    def copy(self) -> Snapshot:
        """Return one in memory of its own: what is read may be mapped from a file."""
        return replace(self, paths=self.paths.copy(), files=self.files.copy())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Snapshot:
        """Build what `to_dict` described.

        Raises:
            ValueError: these are other values.
        """
        columns = [values.get(name) for name in ("paths", "files")]
        captions, what = values.get("captions"), values.get("what")
        hashes = [
            column.numpy().view(np.uint64)
            for column in columns
            if isinstance(column, torch.Tensor) and column.dtype == torch.int64 and column.dim() == 1
        ]
        if len({len(column) for column in hashes}) != 1 or len(hashes) != 2 or not isinstance(captions, int):
            raise ValueError("the checkpoint's record of its data is damaged")
        paths, files = hashes
        return cls(paths, files, captions=captions, what="shard" if what == "shard" else "image")


Snapshots = dict[str, Snapshot]
"""A snapshot for each split: train, val and test."""


def take_snapshots(splits: Mapping[str, Pairs | Shards], *, cache_file: Path | None = None) -> Snapshots:
    """Take a snapshot of each split.

    Args:
        splits: by their names.
        cache_file: remembers the identities of files, see `file_identities`.
    """
    pairs = {split: data for split, data in splits.items() if isinstance(data, Pairs)}
    # one call, so that the cache holds all of them
    files = file_identities(Strings.concatenate([data.paths for data in pairs.values()]), cache_file=cache_file)
    ends = np.cumsum([len(data) for data in pairs.values()])
    files_of = dict(zip(pairs, np.split(files, ends[:-1]), strict=True))
    main_root = getattr(splits["train"], "root", "")
    return {
        split: _of_pairs(data, files_of[split], seed=_seed(data, main_root))
        if isinstance(data, Pairs)
        else of_shards(data)
        for split, data in splits.items()
    }


def describe_change(before: Snapshots, now: Snapshots) -> str:
    """Say in a line how data differs from what it was; nothing if it is the same, in whatever order.

    An image is the same if its path is, within its split; else one of the same file, as after renaming.
    """
    found = [
        text for what in ("shard", "image") for text in _changes(_of_kind(before, what), _of_kind(now, what), what)
    ]
    if not found:
        splits = [split for split in SPLITS if before.get(split, EMPTY).captions != now.get(split, EMPTY).captions]
        found = [f"other captions in {split}" for split in splits]
    return ", ".join(found)


def is_reordered(before: Snapshots, now: Snapshots) -> bool:
    """Tell whether the same images come in another order, so that batches are others."""
    return not np.array_equal(before["train"].files, now["train"].files)


def restore_sides(pairs: Pairs, main_root: str, before: Snapshots, *, cache_file: Path | None = None) -> Pairs:
    """Give images whose split is not declared the one that they had, so that no split is drawn anew.

    Args:
        pairs: a data set before it is split.
        main_root: `root` of the data that is trained on; a validation set may have another.
        before: what a run had.
        cache_file: see `file_identities`.
    """
    had = _sides(pairs, main_root, before, cache_file=cache_file)
    return replace(pairs, splits=np.where(pairs.splits == NO_SPLIT, had, pairs.splits))


def keep_sides(pairs: Pairs, main_root: str, before: Snapshots, *, cache_file: Path | None = None) -> Pairs:
    """Let images stay on the side of the split that they were on before.

    An image whose split is not declared gets the one that it had. One that is declared to be on the other side is left
    out: what was trained on does not validate, and what validated is not trained on.

    Args:
        pairs, main_root, before, cache_file: as `restore_sides` has them.
    """
    had = _sides(pairs, main_root, before, cache_file=cache_file)
    splits = np.where(pairs.splits == NO_SPLIT, had, pairs.splits)
    crossed = ((splits == TRAIN) & (had == VAL)) | ((splits == VAL) & (had == TRAIN))
    return replace(pairs, splits=splits).select(np.flatnonzero(~crossed))


def _sides(pairs: Pairs, main_root: str, before: Snapshots, *, cache_file: Path | None) -> CodeArray:
    """Return the split that each image had, int8 `[N]`: by its path, else by its file; `NO_SPLIT` for a new one."""
    now = _of_pairs(pairs, file_identities(pairs.paths, cache_file=cache_file), seed=_seed(pairs, main_root))
    had = np.full(len(pairs), NO_SPLIT, dtype=pairs.splits.dtype)
    # of a file that was copied, what validated is not trained on; where both copies are still there, each is known
    for same in (
        (lambda old: np.isin(now.files, old.files) & (now.files != 0)),
        lambda old: np.isin(now.paths, old.paths),
    ):
        for split in ("train", "test", "val"):
            had[same(before.get(split, EMPTY))] = SPLITS.index(split)
    return had


def validates_on_trained(now: Snapshots, before: Snapshots) -> bool:
    """Tell whether validation images were drawn from those that were trained on, since none of the old ones is left."""
    val = now["val"].files
    was_val, was_train = (np.isin(val, before.get(split, EMPTY).files).any() for split in ("val", "train"))
    return bool(was_train and not was_val)


EMPTY = Snapshot(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint64))


def _of_kind(snapshots: Snapshots, what: str) -> Snapshots:
    return {split: snapshot for split, snapshot in snapshots.items() if snapshot.what == what}


def _changes(before: Snapshots, now: Snapshots, what: str) -> Iterator[str]:
    """Yield how many images, or shards, differ in which way."""
    num_changed = 0
    gone_files, new_files, gone_splits, new_splits = [], [], [], []
    for code, split in enumerate(SPLITS):
        old, new = before.get(split, EMPTY), now.get(split, EMPTY)
        _, in_old, in_new = np.intersect1d(old.paths, new.paths, return_indices=True)
        num_changed += int((old.files[in_old] != new.files[in_new]).sum())
        gone_files.append(np.delete(old.files, in_old))
        new_files.append(np.delete(new.files, in_new))
        gone_splits.append(np.full(len(gone_files[-1]), code))
        new_splits.append(np.full(len(new_files[-1]), code))
    all_gone, all_new = (_numbered(np.concatenate(files)) for files in (gone_files, new_files))
    # of another path, but the same file: renamed, or on the other side now
    _, in_gone, in_new = np.intersect1d(all_gone, all_new, return_indices=True)
    crossed = np.concatenate(gone_splits)[in_gone] != np.concatenate(new_splits)[in_new]
    for number, how in (
        (len(all_new) - len(in_new), "new"),
        (len(all_gone) - len(in_gone), "gone"),
        (num_changed, "changed"),
        (int(crossed.sum()), "on another side of the split"),
    ):
        if number:
            yield f"{count(number, what)} {how}"


def _numbered(files: Hashes) -> Hashes:
    """Tell equal hashes apart by how many of them come before: of a copied file one of two may be gone."""
    order = np.argsort(files, kind="stable")
    begins = np.append(True, files[order][1:] != files[order][:-1])[: len(files)]
    before = np.arange(len(files)) - np.maximum.accumulate(np.where(begins, np.arange(len(files)), 0))
    numbered: Hashes = files.copy()
    numbered[order] += before.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return numbered


def _seed(pairs: Pairs, main_root: str) -> int:
    """Return what is mixed into the hashes of paths: a validation set of its own may have the same relative paths."""
    return int(pairs.root != main_root)


def _of_pairs(pairs: Pairs, files: Hashes, *, seed: int) -> Snapshot:
    paths = text_hashes(pairs.paths, prefix=f"{pairs.root}/", seed=seed)
    # a sum, so that the order of images and captions does not count; each caption's hash is mixed with its image's
    captions = text_hashes(pairs.captions) * (2 * np.repeat(files, np.diff(pairs.starts)) + 1)
    return Snapshot(paths, files, captions=int(captions.sum()) & 0x7FFFFFFFFFFFFFFF)


def of_shards(shards: Shards) -> Snapshot:
    """Take a snapshot of shards: of their names, and their sizes and numbers of samples."""
    names = text_hashes(Strings.of(shard.name for shard in shards.shards))
    contents = text_hashes(Strings.of(f"{shard.num_bytes} {shard.num_samples}" for shard in shards.shards))
    return Snapshot(names, contents, what="shard")
