"""Images with their captions as columns: a few arrays, however many rows there are."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
NO_SPLIT = -1
_BLOCK = 1 << 16
_BATCH = 1 << 12
_PIVOTS_PER_BUCKET = 16
_MAX_PART = 1 << 19

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
CodeArray = NDArray[np.int8]


class Strings(Sequence[str]):
    """Many strings in a few arrays: worker processes share them, where a list of strings is copied page by page.

    String i is the UTF-8 (with surrogateescape) in `text[starts[i]:ends[i]]`. What `take` returns shares the text.
    """

    def __init__(self, text: NDArray[np.uint8], starts: IntArray, ends: IntArray) -> None:
        self._text, self._starts, self._ends = text, starts, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """Return the given strings."""
        buffer = StringBuffer()
        buffer.extend(strings)
        return buffer.strings()

    @classmethod
    def concatenate(cls, parts: Sequence[Strings]) -> Strings:
        """Return the strings of all parts, one part after another."""
        shifts = np.cumsum([0, *(len(part._text) for part in parts)])
        return cls(
            np.concatenate([part._text for part in parts]),
            np.concatenate([part._starts + shift for part, shift in zip(parts, shifts, strict=False)]),
            np.concatenate([part._ends + shift for part, shift in zip(parts, shifts, strict=False)]),
        )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _decode(self._encoded_at(int(index)))

    def __iter__(self) -> Iterator[str]:
        return map(_decode, self._encoded())

    @property
    def empty(self) -> BoolArray:
        """Which strings are empty, bool `[N]`."""
        empty: BoolArray = self._ends == self._starts
        return empty

    def take(self, numbers: IntArray) -> Strings:
        """Return some of the strings, in the order given."""
        return Strings(self._text, self._starts[numbers], self._ends[numbers])

    def filled(self, others: Strings) -> Strings:
        """Return these strings with the empty ones replaced by the same of `others`."""
        empty = self.empty
        if empty.all():
            return others
        numbers = np.arange(len(self))
        return Strings.concatenate([self, others]).take(np.where(empty, numbers + len(self), numbers))

    def find(self, wanted: Strings) -> IntArray:
        """Return the number of the first string that equals each one wanted, -1 where none does; `[len(wanted)]`.

        Hashes find the candidates, the bytes decide. It goes by parts of the hashes, for the sake of memory.
        """
        hashes = self._hashes()
        sought = hashes if wanted is self else wanted._hashes()
        found = np.full(len(wanted), -1, dtype=np.int64)
        num_parts = 1 << (len(self) // _MAX_PART).bit_length()
        for part in range(num_parts):
            own = _by_hash(hashes, np.flatnonzero(hashes & (num_parts - 1) == part))
            numbers = own if wanted is self else _by_hash(sought, np.flatnonzero(sought & (num_parts - 1) == part))
            if len(own):
                found[numbers] = self._find_sorted(own, hashes[own], wanted, numbers, sought[numbers])
        return found

    def _find_sorted(
        self, own: IntArray, hashes: IntArray, wanted: Strings, numbers: IntArray, sought: IntArray
    ) -> IntArray:
        """Find the strings `wanted[numbers]`, whose hashes are `sought`, among `self[own]`; all by hash."""
        runs = np.minimum(np.searchsorted(hashes, sought), len(own) - 1)
        found = np.where(hashes[runs] == sought, own[runs], -1)
        # of its own strings most are the first of their hash: there is nothing to compare
        candidates = np.flatnonzero((found >= 0) & ((found != numbers) if wanted is self else True))
        same = self._equal(found[candidates], wanted, numbers[candidates])
        for place in candidates[~same]:  # two strings of one hash
            encoded = wanted._encoded_at(numbers[place])
            run = own[runs[place] : np.searchsorted(hashes, sought[place], side="right")]
            found[place] = next((number for number in run if self._encoded_at(number) == encoded), -1)
        return found

    def _equal(self, numbers: IntArray, others: Strings, other_numbers: IntArray) -> BoolArray:
        """Tell which strings `self[numbers]` equal `others[other_numbers]`."""
        places = (
            self._starts[numbers],
            self._ends[numbers],
            others._starts[other_numbers],
            others._ends[other_numbers],
        )
        own, other = self._text.data, others._text.data
        equal = (own[start:end] == other[a:b] for start, end, a, b in zip(*map(each, places), strict=True))
        return np.fromiter(equal, dtype=np.bool_, count=len(numbers))

    def sorted_order(self) -> IntArray:
        """Return the numbers of the strings as Python sorts them; equal ones keep their order.

        Buckets are sorted one after another, so that only one of them is a list of strings at a time.
        """
        step = max(_BLOCK // _PIVOTS_PER_BUCKET, 1)
        pivots = sorted(self[i] for i in range(0, len(self), step))[::_PIVOTS_PER_BUCKET]
        bucket_of = np.fromiter((bisect_right(pivots, text) for text in self), dtype=np.int64, count=len(self))
        order = np.argsort(bucket_of, kind="stable")
        ends = np.cumsum(np.bincount(bucket_of)).tolist()
        for start, end in pairwise([0, *ends]):
            order[start:end] = sorted(order[start:end].tolist(), key=self.__getitem__)
        return order

    def _encoded_at(self, index: int) -> bytes:
        return self._text[self._starts[index] : self._ends[index]].tobytes()

    def _encoded(self) -> Iterator[bytes]:
        text = self._text.data
        for start, end in zip(each(self._starts), each(self._ends), strict=True):
            yield text[start:end].tobytes()

    def _hashes(self) -> IntArray:
        return np.fromiter(map(hash, self._encoded()), dtype=np.int64, count=len(self))


class StringBuffer:
    """Strings that are still being gathered."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])

    def extend(self, strings: Iterable[str]) -> None:
        """Add strings at the end."""
        remaining = iter(strings)
        while batch := list(islice(remaining, _BATCH)):
            text = "".join(batch)
            parts = batch if text.isascii() else [_encode(part) for part in batch]
            lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
            self._ends.frombytes((len(self._text) + lengths.cumsum()).tobytes())
            self._text += _encode(text)

    def strings(self) -> Strings:
        """Return what was gathered without a copy; nothing can be added from then on."""
        ends = np.frombuffer(self._ends, dtype=np.int64)
        return Strings(np.frombuffer(self._text, dtype=np.uint8), ends[:-1], ends[1:])


class Row(NamedTuple):
    """One image of the index with its captions.

    `image` is the path as written (relative to the folder in the directory form), `captions` holds at least one,
    stripped, in order of appearance, `split` is "train", "val", "test" or None, and `place` tells where the image
    first appears ("data.json: row 17"; rows and lines count from 1).
    """

    image: str
    captions: tuple[str, ...]
    split: str | None
    group: str | None
    place: str


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """Rows in columns; a `Row` is made when it is asked for.

    Attributes:
        images: path of each image, `[N]`.
        captions: every caption, image by image.
        starts: int64 `[N + 1]`: row i has captions `starts[i]` to `starts[i + 1]`.
        splits: int8 `[N]`: position in `SPLITS`, or `NO_SPLIT`.
        groups: group of each image, or an empty string.
        numbers: int64 `[N]`: number of each row in its file.
        origins: int8 `[N]`: position in `units` of where each row is from.
        units: what a number counts ("data.json: row"), or an empty string where the image itself is the place.
    """

    images: Strings
    captions: Strings
    starts: IntArray
    splits: CodeArray
    groups: Strings
    numbers: IntArray
    origins: CodeArray
    units: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image, index = self.images[index], index % len(self)
        captions = tuple(self.captions[int(self.starts[index]) : int(self.starts[index + 1])])
        return Row(image, captions, self.split_name(index), self.groups[index] or None, self.place(index))

    def split_name(self, index: int) -> str | None:
        """Return the split of a row, or None."""
        code = int(self.splits[index])
        return None if code == NO_SPLIT else SPLITS[code]

    def place(self, index: int) -> str:
        """Tell where a row stands."""
        unit = self.units[self.origins[index]]
        return f"{unit} {self.numbers[index]}" if unit else str(self.images[index])

    def take(self, numbers: IntArray) -> Rows:
        """Return some of the rows, in the order given."""
        captions, starts = take_runs(self.starts, numbers)
        return replace(
            self,
            images=self.images.take(numbers),
            captions=self.captions.take(captions),
            starts=starts,
            splits=self.splits[numbers],
            groups=self.groups.take(numbers),
            numbers=self.numbers[numbers],
            origins=self.origins[numbers],
        )

    def joined(self, first: IntArray) -> Rows:
        """Join the rows of one image: its captions in their order, the first split and the first group given.

        Args:
            first: number of the first row of each row's image, int64 `[N]`.
        """
        heads = np.flatnonzero(first == np.arange(len(self)))
        if len(heads) == len(self):
            return self
        captions, _ = take_runs(self.starts, np.argsort(first, kind="stable"))
        counts = np.zeros(len(self), dtype=np.int64)
        np.add.at(counts, first, np.diff(self.starts))
        return Rows(
            images=self.images.take(heads),
            captions=self.captions.take(captions),
            starts=np.concatenate([[0], np.cumsum(counts[heads])]),
            splits=self.splits[first_given(self.splits != NO_SPLIT, first)[heads]],
            groups=self.groups.take(first_given(~self.groups.empty, first)[heads]),
            numbers=self.numbers[heads],
            origins=self.origins[heads],
            units=self.units,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts, one part after another."""
        if len(parts) == 1:
            return parts[0]
        num_units = np.cumsum([0, *(len(part.units) for part in parts)]).tolist()
        num_captions = np.cumsum([0, *(len(part.captions) for part in parts)]).tolist()
        shifted = [part.starts[1:] + shift for part, shift in zip(parts, num_captions, strict=False)]
        origins = [part.origins + np.int8(shift) for part, shift in zip(parts, num_units, strict=False)]
        return cls(
            images=Strings.concatenate([part.images for part in parts]),
            captions=Strings.concatenate([part.captions for part in parts]),
            starts=np.concatenate([[0], *shifted]),
            splits=np.concatenate([part.splits for part in parts]),
            groups=Strings.concatenate([part.groups for part in parts]),
            numbers=np.concatenate([part.numbers for part in parts]),
            origins=np.concatenate(origins),
            units=tuple(unit for part in parts for unit in part.units),
        )


class RowBuffer:
    """Rows that are still being gathered, an entry each: several of them may be of one image."""

    def __init__(self) -> None:
        self._images, self._captions, self._groups = StringBuffer(), StringBuffer(), StringBuffer()
        self._starts = array("q", [0])
        self._splits = array("b")
        self._numbers = array("q")
        # the latest strings, not yet in their buffers: one by one they would take twice as long
        self._new_images: list[str] = []
        self._new_captions: list[str] = []
        self._new_groups: list[str] = []

    def append(self, image: str, captions: Sequence[str], *, split: str | None, group: str | None, number: int) -> None:
        """Add a row at the end."""
        self._new_images.append(image)
        self._new_captions += captions
        self._new_groups.append(group or "")
        self._starts.append(self._starts[-1] + len(captions))
        self._splits.append(NO_SPLIT if split is None else SPLITS.index(split))
        self._numbers.append(number)
        if len(self._new_images) == _BATCH:
            self._store()

    def __len__(self) -> int:
        return len(self._numbers)

    def _store(self) -> None:
        for buffer, new in (
            (self._images, self._new_images),
            (self._captions, self._new_captions),
            (self._groups, self._new_groups),
        ):
            buffer.extend(new)
            new.clear()

    def rows(self, unit: str) -> Rows:
        """Return what was gathered without a copy; nothing can be added from then on."""
        self._store()
        return Rows(
            images=self._images.strings(),
            captions=self._captions.strings(),
            starts=np.frombuffer(self._starts, dtype=np.int64),
            splits=np.frombuffer(self._splits, dtype=np.int8),
            groups=self._groups.strings(),
            numbers=np.frombuffer(self._numbers, dtype=np.int64),
            origins=np.zeros(len(self), dtype=np.int8),
            units=(unit,),
        )


def take_runs(starts: IntArray, numbers: IntArray) -> tuple[IntArray, IntArray]:
    """Return the positions in the runs `starts[i]:starts[i + 1]` of the numbers, and the starts of the new runs."""
    counts = starts[numbers + 1] - starts[numbers]
    new_starts = np.concatenate([[0], np.cumsum(counts)])
    return np.arange(new_starts[-1]) + np.repeat(starts[numbers] - new_starts[:-1], counts), new_starts


def first_given(given: BoolArray, first: IntArray) -> IntArray:
    """Return for each row the first row of its image that is `given`, or the image's first row if none is."""
    rows = np.flatnonzero(given)
    best = np.full(len(first), len(first), dtype=np.int64)
    np.minimum.at(best, first[rows], rows)
    return np.where(best[first] < len(first), best[first], first)


def _by_hash(hashes: IntArray, numbers: IntArray) -> IntArray:
    return numbers[np.argsort(hashes[numbers], kind="stable")]


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(encoded: bytes) -> str:
    return encoded.decode("utf-8", "surrogateescape")


def each(numbers: IntArray) -> Iterator[int]:
    """Yield Python integers, without a list of all of them."""
    for start in range(0, len(numbers), _BLOCK):
        yield from numbers[start : start + _BLOCK].tolist()
