"""What a data set holds, and all that is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from cliptune.data.issues import Issue, Issues, image_issue
from cliptune.data.pairs import Pairs
from cliptune.data.table import Strings
from cliptune.data.workers import make_loader
from cliptune.preprocess.decode import read_bytes, size_of
from cliptune.preprocess.tokens import CONTEXT_LENGTH, count_tokens
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.device import num_cores
from cliptune.runtime.logs import progress_bar
from cliptune.runtime.messages import count, first_few

INPUT_SIZE = 224  # pixels, of most models
MAX_EXAMPLES = 5  # shown
ONE_COLOR = 5
"""Levels of 255 by which the pixels of an image that is nearly one colour deviate from their mean."""
MAX_WORKERS = 16


def describe_data(pairs: Pairs, splits: Mapping[str, Pairs], findings: Sequence[str] = ()) -> list[str]:
    """Say what a data set holds, a line a fact; then what was found to be odd about it."""
    lengths = np.array([count_tokens(caption) for caption in progress_bar(pairs.captions, desc="tokens")])
    occurrences = np.bincount(pairs.captions.first_equal())  # by the first caption of each wording
    repeated = int(occurrences[occurrences > 1].sum())
    fewest, most = (int(limit(np.diff(pairs.starts))) for limit in (np.min, np.max))
    per_image = count(most, "caption") if fewest == most else f"{fewest} to {count(most, 'caption')}"
    parts = ", ".join(f"{name} {len(part)}" for name, part in splits.items())
    return [
        f"images      {len(pairs)}, {count(pairs.num_pairs, 'pair')}, {per_image} an image",
        f"split       {parts} images ({'as declared' if pairs.declared() else 'by group'})",
        f"captions    {lengths.mean():.1f} tokens on average, longest {lengths.max()}",
        f"truncated   {count(int((lengths > CONTEXT_LENGTH).sum()), 'caption')} longer than {CONTEXT_LENGTH} tokens",
        f"repeated    {100 * repeated / pairs.num_pairs:.1f}% of the captions occur more than once",
        *(f"note        {finding}" for finding in findings),
    ]


class _Checked(NamedTuple):
    """What one image turned out to be."""

    issue: Issue | None
    shortest_side: int = 0
    digest: bytes = b""
    """Of the file."""
    is_one_color: bool = False


class _ImageFiles(Dataset[_Checked]):
    """The images of a data set, each read as training reads it."""

    def __init__(self, paths: Strings) -> None:
        self.paths = paths
        self.transform = clip_transform(INPUT_SIZE)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Checked:
        path = self.paths[index]
        try:
            content = read_bytes(path)
            image = self.transform.load(content)
            pixels = self.transform(image).float()  # [3, R, R]
        except (OSError, ValueError) as error:
            return _Checked(image_issue(path, error))
        is_one_color = bool(pixels.std(dim=(1, 2)).max() < ONE_COLOR)
        return _Checked(None, min(size_of(image)), hashlib.blake2b(content, digest_size=16).digest(), is_one_color)


@dataclass
class DataCheck:
    """What a check found: issues, and what is only odd."""

    num_images: int
    issues: Issues
    num_unreadable: int = 0
    num_small: int = 0
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """Images whose files are the same, byte by byte: the first and the other."""
    of_one_color: list[str] = field(default_factory=list)
    num_truncated: int = 0
    num_repeated: int = 0
    findings: Sequence[str] = ()
    """What is odd about the set as a whole."""

    def lines(self) -> Iterator[str]:
        """Say all of it: a line an issue, then what is odd, then the sum."""
        yield from map(str, self.issues.first)
        if self.issues.num_untold:
            yield f"... and {count(self.issues.num_untold, 'more issue')}"
        if self.num_truncated:
            yield f"note: {count(self.num_truncated, 'caption')} longer than {CONTEXT_LENGTH} tokens will be truncated"
        if self.num_repeated:
            yield f"note: {count(self.num_repeated, 'caption')} occurred before"
        if self.num_small:
            yield f"note: {count(self.num_small, 'image')} smaller than {INPUT_SIZE} pixels, the input of most models"
        if self.duplicates:
            yield f"note: {count(len(self.duplicates), 'image')} byte-identical to an earlier one"
            yield from (f"      {first} = {second}" for first, second in self.duplicates[:MAX_EXAMPLES])
        if self.of_one_color:
            yield (
                f"note: {count(len(self.of_one_color), 'image')} nearly of one colour: "
                f"{first_few(self.of_one_color, MAX_EXAMPLES)}"
            )
        yield from (f"note: {finding}" for finding in self.findings)
        num_readable = self.num_images - self.num_unreadable
        if self.issues.count:
            yield f"{count(self.issues.count, 'issue')}; {count(num_readable, 'image')} can be read"
        else:
            yield f"no issues; all {count(num_readable, 'image')} can be read"


def check_data(pairs: Pairs, findings: Sequence[str] = (), *, num_workers: int | None = None) -> DataCheck:
    """Decode every image as training does, and look at every caption.

    Args:
        pairs: the data set; what is wrong with its index stands in `pairs.issues`.
        findings: what is odd about it as a whole, see `data_findings`.
        num_workers: that decode; None: one a core, at most 16.
    """
    check = DataCheck(len(pairs), Issues(list(pairs.issues.first), pairs.issues.count), findings=findings)
    _check_images(pairs.paths, check, num_workers=num_workers)
    for caption in progress_bar(pairs.captions, desc="captions", unit="caption"):
        check.num_truncated += count_tokens(caption) > CONTEXT_LENGTH
    check.num_repeated = int((pairs.captions.first_equal() != np.arange(pairs.num_pairs)).sum())
    return check


def _check_images(paths: Strings, check: DataCheck, *, num_workers: int | None) -> None:
    workers = min(MAX_WORKERS, num_cores()) if num_workers is None else num_workers
    images = make_loader(_ImageFiles(paths), num_workers=workers)
    first_of: dict[bytes, int] = {}
    for index, image in enumerate(progress_bar(images, desc="images", unit="image")):
        if image.issue is not None:
            check.issues.add(image.issue)
            check.num_unreadable += 1
            continue
        check.num_small += image.shortest_side < INPUT_SIZE
        if image.is_one_color:
            check.of_one_color.append(paths[index])
        first = first_of.setdefault(image.digest, index)
        if first != index:
            check.duplicates.append((paths[first], paths[index]))
