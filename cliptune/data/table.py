"""Images with their captions as columns: a few arrays, however many rows there are."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
NO_SPLIT = -1
_BLOCK = 1 << 16
_BATCH = 1 << 12

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
CodeArray = NDArray[np.int8]


class Strings(Sequence[str]):
    """Many strings in one Arrow column: workers share its memory, where a list of strings is copied page by page.

    A selection holds row indices and shares the text.

    Args:
        column: the strings in UTF-8. File names need not be Unicode: Python has the odd byte as a half character
            (U+DC80 to U+DCFF), which is encoded like any other. So bytes compare as Python compares strings.
        rows: which strings of the column these are, int64 `[N]`; None: all of them.
    """

    def __init__(self, column: pa.LargeBinaryArray, rows: IntArray | None = None) -> None:
        self._column, self._rows = column, rows
        _, ends, text = column.buffers()
        # a Python slice of these is several times as fast as an Arrow scalar
        self._ends = np.frombuffer(ends, dtype=np.int64) if len(column) else np.zeros(1, dtype=np.int64)
        self._text = memoryview(text or b"")

    def __reduce__(self) -> Any:
        return Strings, (self._column, self._rows)

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """Return the given strings."""
        buffer = StringBuffer()
        buffer.extend(strings)
        return buffer.strings()

    @classmethod
    def concatenate(cls, parts: Sequence[Strings]) -> Strings:
        """Return the strings of all parts, one part after another."""
        return cls(pa.concat_arrays([part.column() for part in parts]))

    def __len__(self) -> int:
        return len(self._column) if self._rows is None else len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self) if self._rows is None else self._rows[index]
        return str(self._text[self._ends[row] : self._ends[row + 1]], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            for encoded in self.column(slice(start, start + _BLOCK)).to_pylist():
                yield str(encoded, "utf-8", "surrogatepass")

    @property
    def empty(self) -> BoolArray:
        """Which strings are empty, bool `[N]`."""
        empty: BoolArray = np.diff(self._ends) == 0
        return empty if self._rows is None else empty[self._rows]

    def take(self, indices: IntArray) -> Strings:
        """Return some of the strings, in the order given."""
        if len(indices) == len(self) and (indices == np.arange(len(self))).all():
            return self  # whose column needs no copy
        return Strings(self._column, indices if self._rows is None else self._rows[indices])

    def filled(self, others: Strings) -> Strings:
        """Return these strings with the empty ones replaced by the same of `others`."""
        empty = self.empty
        if empty.all():
            return others
        rows = np.arange(len(self))
        return Strings.concatenate([self, others]).take(np.where(empty, rows + len(self), rows))

    def find(self, wanted: Strings) -> IntArray:
        """Return the index of the first string that equals each one wanted, -1 where none does; `[len(wanted)]`."""
        found = pc.index_in(wanted.column(), value_set=self.column())
        indices: IntArray = pc.fill_null(found, -1).to_numpy().astype(np.int64)
        return indices

    def first_equal(self, *, block: int = _BLOCK) -> IntArray:
        """Return the index of the first string that equals each one, int64 `[N]`; its own where none is before it.

        As `find(self)`, but sorted instead of hashed: a hash table of all strings would hold the text once more.
        """
        order = self.sorted_order()
        first = np.empty_like(order)
        for start in range(0, len(self), block):
            rows = order[max(start - 1, 0) : start + block]  # from the last one of the block before
            strings = self.column(rows)
            begins_run = np.ones(len(rows), dtype=bool)
            begins_run[1:] = pc.not_equal(strings[1:], strings[:-1])
            # strings a a b b: runs begin at 0 and 2, so the heads are 0 0 2 2
            heads = np.maximum.accumulate(np.where(begins_run, np.arange(len(rows)), 0))
            # the order is stable, so each run of equal strings begins with the first of them
            first_of_run = rows[heads]
            if start:  # a run may have begun in the block before
                first_of_run[heads == 0] = first[rows[0]]
            first[rows] = first_of_run
        return first

    def sorted_order(self) -> IntArray:
        """Return the indices of the strings as Python sorts them; equal ones keep their order."""
        order: IntArray = pc.sort_indices(self.column()).to_numpy().view(np.int64)
        return order

    def column(self, indices: slice | IntArray | None = None) -> pa.LargeBinaryArray:
        """Return the strings, or some of them, as a column of their own."""
        rows = self._rows
        if indices is not None:
            rows = np.arange(len(self))[indices] if rows is None else rows[indices]
        return self._column if rows is None else self._column.take(pa.array(rows))


class StringBuffer:
    """Strings that are still being gathered."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])

    def extend(self, strings: Iterable[str]) -> None:
        """Add strings at the end."""
        remaining = iter(strings)
        while batch := list(islice(remaining, _BATCH)):
            encoded = [text.encode("utf-8", "surrogatepass") for text in batch]
            lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
            self._ends.frombytes((len(self._text) + lengths.cumsum()).tobytes())
            self._text += b"".join(encoded)

    def strings(self) -> Strings:
        """Return what was gathered without a copy; nothing can be added from then on."""
        buffers = [None, pa.py_buffer(self._ends), pa.py_buffer(self._text)]
        return Strings(pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self._ends) - 1, buffers))


class Row(NamedTuple):
    """One image of the index with its captions.

    `image` is the path as written (relative to the folder in the directory form), `captions` holds at least one,
    stripped, in order of appearance, `split` is "train", "val", "test" or None, and `location` tells where the image
    first appears ("data.json: row 17"; rows and lines count from 1).
    """

    image: str
    captions: tuple[str, ...]
    split: str | None
    group: str | None
    location: str


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """Rows in columns; a `Row` is made when it is asked for.

    Attributes:
        images: path of each image, `[N]`.
        captions: every caption, image by image.
        starts: int64 `[N + 1]`: row i has captions `starts[i]` to `starts[i + 1]`.
        splits: int8 `[N]`: index in `SPLITS`, or `NO_SPLIT`.
        groups: group of each image, or an empty string.
        numbers: int64 `[N]`: number of each row in its file.
        origins: int32 `[N]`: index in `units` of where each row is from.
        units: what a number counts ("data.json: row"), or an empty string where the image itself says it.
    """

    images: Strings
    captions: Strings
    starts: IntArray
    splits: CodeArray
    groups: Strings
    numbers: IntArray
    origins: NDArray[np.int32]
    units: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image, index = self.images[index], index % len(self)
        captions = tuple(self.captions[int(self.starts[index]) : int(self.starts[index + 1])])
        return Row(image, captions, self.split_name(index), self.groups[index] or None, self.location(index))

    def split_name(self, index: int) -> str | None:
        """Return the split of a row, or None."""
        code = int(self.splits[index])
        return None if code == NO_SPLIT else SPLITS[code]

    def location(self, index: int) -> str:
        """Tell where a row stands."""
        unit = self.units[self.origins[index]]
        return f"{unit} {self.numbers[index]}" if unit else str(self.images[index])

    def take(self, indices: IntArray) -> Rows:
        """Return some of the rows, in the order given."""
        captions, starts = take_runs(self.starts, indices)
        return replace(
            self,
            images=self.images.take(indices),
            captions=self.captions.take(captions),
            starts=starts,
            splits=self.splits[indices],
            groups=self.groups.take(indices),
            numbers=self.numbers[indices],
            origins=self.origins[indices],
        )

    def joined(self, first: IntArray) -> Rows:
        """Join the rows of one image: its captions in their order, the first split and the first group given.

        Args:
            first: number of the first row of each row's image, int64 `[N]`.
        """
        heads = np.flatnonzero(first == np.arange(len(self)))
        if len(heads) == len(self):
            return self
        # rows of cat, dog, cat (first = 0 1 0): in the order 0 2 1 a cat's captions are neighbours
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
        origins = [part.origins + np.int32(shift) for part, shift in zip(parts, num_units, strict=False)]
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
    """Rows that are still being gathered, a record each: several of them may be of one image."""

    def __init__(self, *, batch: int = _BATCH) -> None:
        self._batch = batch
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
        if len(self._new_images) == self._batch:
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
            origins=np.zeros(len(self), dtype=np.int32),
            units=(unit,),
        )


def take_runs(starts: IntArray, indices: IntArray) -> tuple[IntArray, IntArray]:
    """Return the positions in the runs `starts[i]:starts[i + 1]` of the `indices` i, and the starts of the new runs.

    With starts [0, 2, 3, 6] and indices [2, 0]: positions [3, 4, 5, 0, 1], new starts [0, 3, 5].
    """
    counts = starts[indices + 1] - starts[indices]
    new_starts = np.concatenate([[0], np.cumsum(counts)])
    return np.arange(new_starts[-1]) + np.repeat(starts[indices] - new_starts[:-1], counts), new_starts


def first_given(given: BoolArray, first: IntArray) -> IntArray:
    """Return for each row the first row of its image that is `given`, or the image's first row if none is."""
    # rows 0 1 2 of one image (first = 0 0 0), given = no yes yes -> 1 1 1; none given -> 0 0 0
    rows = np.flatnonzero(given)
    best = np.full(len(first), len(first), dtype=np.int64)
    np.minimum.at(best, first[rows], rows)
    return np.where(best[first] < len(first), best[first], first)
