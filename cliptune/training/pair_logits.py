"""The logits of a batch over all ranks, slice by slice: which pairs are positives, and whether these score highest.

Logit s_ij is scale * cosine(image i, text j). Text i is image i's own. What the other texts are to an image is
`positives`' choice:

- `pair`: negatives, all of them.
- `image`: negatives, but for those of pairs of the same image, which are left out.
- `caption`: positives where the pair has the same image or the same caption, else negatives.

Being positives is a relation of two pairs and no more. Chains do not join it: of "a dog" with image 1, "a pet" with
image 1 and "a pet" with image 2, the first and the last share nothing. Were they joined, one caption as common as "a
photo" would make a whole batch positives of each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cliptune.runtime.distributed import all_max, all_min, all_sum, gather_rows, gather_sizes, rank, world_size

POSITIVES = ("pair", "image", "caption")
SLICE_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits held at once, by the type of device: 16 MiB and 512 MiB."""
MIN_ROWS = 16


class Pairs(NamedTuple):
    """What is known of this rank's pairs beside their features, and how their logits are computed."""

    positives: str
    """One of `POSITIVES`."""
    image_ids: Tensor | None
    """int64 `[b]`; None: no image comes twice."""
    caption_ids: Tensor | None
    """int64 `[b]`, the same for captions that say the same; None: no caption comes twice."""
    across_ranks: bool
    """The batch is all ranks' pairs; False: this rank's alone, and no collective runs."""
    num_logits: int | None = None
    """Held at once; None: what suits the device."""

    def ids(self) -> Tensor | None:
        """Return the ids that count, int64 `[b, K]`: two pairs are of a kind if one of the K is equal; None: none is.

        Raises:
            ValueError: `positives` that there are not.
        """
        if self.positives not in POSITIVES:
            raise ValueError(f"positives must be one of {', '.join(POSITIVES)}, got {self.positives!r}")
        known = {"pair": [], "image": [self.image_ids], "caption": [self.image_ids, self.caption_ids]}[self.positives]
        ids = [column for column in known if column is not None]
        return torch.stack(ids, 1) if ids else None


class PairLogits:
    """Slices of the logits of this rank's images `[b, D]` with all ranks' texts `[B, D]`, float32."""

    def __init__(self, images: Tensor, texts: Tensor, scale: Tensor, pairs: Pairs) -> None:
        self.images, self.scale, self.ids = images.detach(), scale, pairs.ids()
        self.across_ranks = pairs.across_ranks and world_size() > 1
        self.texts, self.all_ids, self.offset = texts.detach(), self.ids, 0
        if self.across_ranks:
            sizes = gather_sizes(len(images))
            self.texts = gather_rows(texts, sizes)  # [B, D]
            self.all_ids = None if self.ids is None else gather_rows(self.ids, sizes)  # [B, K]
            self.offset = sum(sizes[: rank()])
        self.has_more_positives = pairs.positives == "caption" and self.ids is not None
        # this rank's columns among all texts: image i of this rank matches text offset + i
        self.own = slice(self.offset, self.offset + len(images))
        num_logits = pairs.num_logits or SLICE_LOGITS.get(images.device.type, SLICE_LOGITS["cpu"])
        self.rows_at_once = max(num_logits // max(len(self.texts), 1), MIN_ROWS)
        self._only: Tensor | None = None

    def slices(self, *, last: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of images with their logits, `[rows, B]`; if there is one slice, it is computed once.

        Args:
            last: this is the last time, and the logits may be overwritten.
        """
        for start in range(0, len(self.images), self.rows_at_once):
            rows = slice(start, min(start + self.rows_at_once, len(self.images)))
            logits = self._compute(rows) if self._only is None else self._only
            if len(self.images) <= self.rows_at_once:
                self._only = None if last else logits
            yield rows, logits

    def _compute(self, rows: slice) -> Tensor:
        logits = (self.scale * self.images[rows]) @ self.texts.T
        if self.ids is not None and not self.has_more_positives:
            # another caption of the same image is no negative: exp(-inf) = 0 takes it out of both sums
            same = self.alike(rows)
            self.matches(same, rows).fill_(False)
            logits.masked_fill_(same, -math.inf)
        return logits

    def alike(self, rows: slice) -> Tensor:
        """Tell which pairs of a slice have an id in common, bool `[rows, B]`; each has with itself."""
        assert self.ids is not None
        assert self.all_ids is not None
        columns = zip(self.ids[rows].unbind(1), self.all_ids.unbind(1), strict=True)
        same, *others = (own[:, None] == every for own, every in columns)
        for other in others:
            same |= other
        return same

    def matches(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the logits of the matching pairs in a slice, `[rows]`: a view."""
        return logits.diagonal(self.offset + rows.start)

    def num_positives(self) -> Tensor:
        """Count the positives of each of all pairs, with itself: int64 `[B]`."""
        if not self.has_more_positives or self.all_ids is None:
            return torch.ones(len(self.texts), dtype=torch.int64, device=self.texts.device)
        numbers = sum(_num_equal(column) for column in self.all_ids.unbind(1))
        if self.all_ids.shape[1] == 2:  # of the same image and the same caption: counted twice
            image, caption = (_first_equal(column) for column in self.all_ids.unbind(1))
            numbers = numbers - _num_equal(image * len(image) + caption)
        assert isinstance(numbers, Tensor)
        return numbers

    def are_positives(self, one: Tensor, other: Tensor) -> Tensor:
        """Tell which pairs are positives of which, bool `[n]`, by their indices among all, int64 `[n]` each."""
        same = one == other
        if self.has_more_positives and self.all_ids is not None:
            same |= (self.all_ids[one] == self.all_ids[other]).any(1)
        return same

    def total(self, values: Tensor) -> Tensor:
        """Add up all ranks' tensors, in place."""
        return all_sum(values) if self.across_ranks else values


class Hits:
    """Counts the images and texts of which a positive scores highest; of equal scores the first counts.

    Args:
        logits: whose slices are added one after another.
    """

    def __init__(self, logits: PairLogits) -> None:
        self.logits, num_pairs, device = logits, len(logits.texts), logits.texts.device
        self.highest = logits.texts.new_full((num_pairs,), -math.inf)
        # a column's winner is found slice by slice: only a higher score takes over, so of equal ones the first counts
        self.winners = torch.full((num_pairs,), num_pairs, device=device)
        self.of_rows = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, rows: slice, values: Tensor) -> None:
        """Take in a slice of logits `[rows, B]`."""
        first_row = self.logits.offset + rows.start
        in_slice, first = values.max(0)
        self.winners = torch.where(in_slice > self.highest, first + first_row, self.winners)
        self.highest = torch.maximum(self.highest, in_slice)
        own = torch.arange(first_row, first_row + len(values), device=values.device)
        self.of_rows += self.logits.are_positives(own, values.argmax(1)).sum()

    def count(self) -> Tensor:
        """Count this rank's images and texts; a collective."""
        winners, own, num_pairs = self.winners, self.logits.own, len(self.winners)
        if self.logits.across_ranks:  # of the ranks' winners the first that scores highest of all
            top = all_max(self.highest.clone())
            winners = all_min(torch.where(self.highest == top, winners, num_pairs))
        columns = torch.arange(num_pairs, device=winners.device)[own]
        # a column of NaN has no winner
        return self.of_rows + self.logits.are_positives(columns, winners[own].clamp(max=num_pairs - 1)).sum()


def _num_equal(values: Tensor) -> Tensor:
    """Count how many values equal each one, int64 `[B]`; no device is waited for, as `unique` would."""
    values = values.contiguous()
    ordered = values.sort().values
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)


def _first_equal(values: Tensor) -> Tensor:
    """Return a small number for each value, the same for equal ones: `[7, 9, 7]` is `[0, 2, 0]`."""
    return torch.searchsorted(values.sort().values, values.contiguous())
