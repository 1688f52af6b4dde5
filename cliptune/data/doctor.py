"""What a data set holds, and all that is wrong with it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from cliptune.data.issues import Issue, Issues, image_issue
from cliptune.data.loaders import make_loader
from cliptune.data.pairs import Pairs
from cliptune.data.table import Strings
from cliptune.preprocess.decode import file_stamp, read_bytes, size_of
from cliptune.preprocess.tokens import CONTEXT_LENGTH, count_tokens
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.device import num_cores
from cliptune.runtime.logs import progress_bar

INPUT_SIZE = 224
MAX_TWINS = 5
MAX_WORKERS = 16


def describe_data(pairs: Pairs, splits: dict[str, Pairs]) -> list[str]:
    """Say what a data set holds, a line a fact."""
    lengths = np.array([count_tokens(caption) for caption in tqdm(pairs.captions, desc="tokens", disable=None)])
    same = np.bincount(pairs.captions.find(pairs.captions))
    repeated = int(same[same > 1].sum())
    declared = "as declared" if pairs.declared() else "by group"
    per_image = np.diff(pairs.starts)
    parts = ", ".join(f"{name} {len(part)}" for name, part in splits.items())
    twins = _identical_across(splits)
    return [
        f"images      {len(pairs)}, {pairs.num_pairs} pairs, {per_image.min()} to {per_image.max()} captions an image",
        f"split       {parts} images ({declared})",
        f"captions    {lengths.mean():.1f} tokens on average, longest {lengths.max()}",
        f"truncated   {int((lengths > CONTEXT_LENGTH).sum())} captions longer than {CONTEXT_LENGTH} tokens",
        f"repeated    {100 * repeated / pairs.num_pairs:.1f}% of the captions occur more than once",
        f"identical   {len(twins)} byte-identical pictures on both sides of the split",
        *(f"            {first} = {second}" for first, second in twins[:5]),
    ]


def _identical_across(splits: dict[str, Pairs]) -> list[tuple[str, str]]:
    """Find byte-identical files in different splits; only files of the same size are read."""
    by_size: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for split, pairs in splits.items():
        for path in pairs.paths:
            by_size[file_stamp(path)[0]].append((split, path))
    suspects = [same for same in by_size.values() if len({split for split, _ in same}) > 1]
    first_of: dict[tuple[int, bytes], tuple[str, str]] = {}
    twins = []
    for number, same in enumerate(tqdm(suspects, desc="identical pictures", disable=None)):
        for split, path in same:
            digest = hashlib.sha256(read_bytes(path)).digest()
            other_split, other = first_of.setdefault((number, digest), (split, path))
            if other_split != split:
                twins.append((other, path))
    return twins


class _Picture(NamedTuple):
    """What one picture turned out to be."""

    issue: Issue | None
    shortest_side: int = 0
    digest: bytes = b""
    """Of the file."""


class _Pictures(Dataset[_Picture]):
    """The pictures of a data set, each read as training reads it."""

    def __init__(self, paths: Strings) -> None:
        self.paths = paths
        self.transform = clip_transform(INPUT_SIZE)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Picture:
        path = self.paths[index]
        try:
            content = read_bytes(path)
            picture = self.transform.load(content)
            self.transform(picture)
        except (OSError, ValueError) as error:
            return _Picture(image_issue(path, error))
        return _Picture(None, min(size_of(picture)), hashlib.blake2b(content, digest_size=16).digest())


@dataclass
class DataCheck:
    """What a check found: issues, and what is only odd."""

    num_images: int
    issues: Issues
    num_unreadable: int = 0
    num_small: int = 0
    twins: list[tuple[str, str]] = field(default_factory=list)
    """Pictures whose files are the same, byte by byte: the first and the other."""
    num_truncated: int = 0
    num_repeated: int = 0

    def lines(self) -> Iterator[str]:
        """Say all of it: a line a issue, then what is odd, then the sum."""
        yield from map(str, self.issues.first)
        if self.issues.count > len(self.issues.first):
            yield f"... and {self.issues.count - len(self.issues.first)} more entries"
        if self.num_truncated:
            yield f"note: {self.num_truncated} captions are longer than {CONTEXT_LENGTH} tokens and are truncated"
        if self.num_repeated:
            yield f"note: {self.num_repeated} captions occurred before"
        if self.num_small:
            yield f"note: {self.num_small} pictures are smaller than {INPUT_SIZE} pixels, the input of most models"
        if self.twins:
            yield f"note: {len(self.twins)} pictures are byte-identical to an earlier one"
            yield from (f"      {first} = {second}" for first, second in self.twins[:MAX_TWINS])
        if self.issues.count:
            yield f"{self.issues.count} issues; {self.num_images - self.num_unreadable} pictures can be read"
        else:
            yield f"all {self.num_images} pictures can be read"


def check_data(pairs: Pairs, *, num_workers: int | None = None) -> DataCheck:
    """Decode every picture as training does, and look at every caption.

    Args:
        pairs: the data set; what is wrong with its index stands in `pairs.issues`.
        num_workers: loading processes; None: one a core, at most 16.
    """
    check = DataCheck(len(pairs), Issues(list(pairs.issues.first), pairs.issues.count))
    _check_pictures(pairs.paths, check, num_workers=num_workers)
    for caption in progress_bar(pairs.captions, desc="captions", unit="caption"):
        check.num_truncated += count_tokens(caption) > CONTEXT_LENGTH
    check.num_repeated = int((pairs.captions.find(pairs.captions) != np.arange(pairs.num_pairs)).sum())
    return check


def _check_pictures(paths: Strings, check: DataCheck, *, num_workers: int | None) -> None:
    workers = min(MAX_WORKERS, num_cores()) if num_workers is None else num_workers
    pictures = make_loader(_Pictures(paths), num_workers=workers, collate_fn=None)
    first_of: dict[bytes, int] = {}
    for number, picture in enumerate(progress_bar(pictures, desc="pictures", unit="picture")):
        if picture.issue is not None:
            check.issues.add(picture.issue)
            check.num_unreadable += 1
            continue
        check.num_small += picture.shortest_side < INPUT_SIZE
        first = first_of.setdefault(picture.digest, number)
        if first != number:
            check.twins.append((paths[first], paths[number]))
