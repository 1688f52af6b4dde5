"""Frozen towers' outputs for a data set: on disk, checked when they are read, computed anew where they are damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cliptune.data.issues import Issue
from cliptune.data.row_store import Keys, Rows, RowStore
from cliptune.data.table import BoolArray
from cliptune.runtime.messages import count
from cliptune.runtime.rng import IntArray

logger = logging.getLogger(__name__)

Compute = Callable[[IntArray], Iterator[tuple[IntArray, Tensor]]]
"""Computes the outputs for some indices; yields those that it has, `[B]` and `[B, embed_dim]`."""


class TowerOutputs:
    """A frozen tower's output for the images or captions of a data set.

    They lie on disk, and each is compared with its checksum whenever it is read. What is not as it was written is
    computed anew; what the disk does not take, or does not give back, is held in memory.

    Args:
        store: where they lie.
        rows: int64 `[N]`: row of each in the store, -1 where it has no output.
        keys: of each in the store, `[N]`.
        issues: why it has none, by index.
        compute: gives outputs anew; where it cannot, it adds to `issues`.
    """

    def __init__(
        self, store: RowStore, rows: IntArray, *, keys: Keys, issues: dict[int, Issue], compute: Compute
    ) -> None:
        self.store = store
        self.rows = rows
        self.keys = keys
        self.issues = issues
        self.compute = compute
        self._held: dict[int, Rows] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: IntArray) -> Tensor:
        """Return the outputs of some, float32 `[len(indices), embed_dim]`.

        Raises:
            IndexError: one of them has none.
            OSError: one was damaged, and what it was computed from can no longer be read.
        """
        rows = self.rows[indices]
        if (rows < 0).any():
            raise IndexError(f"no tower output is cached for index {int(np.asarray(indices)[rows < 0][0])}")
        try:
            content, whole = self.store.read(rows, self.keys[indices])
        except OSError as error:
            self._warn(error)
            content = np.zeros((len(rows), self.store.row_bytes), dtype=np.uint8)
            whole = np.zeros(len(rows), dtype=bool)
        if not whole.all():
            self._hold(indices[~whole])
            content[~whole] = [self._held[row] for row in rows[~whole].tolist()]
        return torch.from_numpy(content.view("<f4"))

    def has(self, indices: IntArray) -> BoolArray:
        """Tell which of some need not be computed, bool `[len(indices)]`; outputs that are not finite do."""
        rows = self.rows[indices]
        held = np.isin(rows, list(self._held))
        try:
            return held | self.store.holds(rows, self.keys[indices], valid=_finite)
        except OSError as error:
            self._warn(error)
            return held

    def put(self, indices: IntArray, outputs: Tensor) -> None:
        """Store the outputs of some, `[len(indices), embed_dim]`."""
        content, rows = _as_rows(outputs), self.rows[indices]
        try:
            self.store.write(rows, self.keys[indices], content)
        except OSError as error:
            self._warn(error)
            self._held.update(zip(rows.tolist(), content, strict=True))

    def _hold(self, lost: IntArray) -> None:
        """Compute outputs that are not on the disk, unless they are in memory."""
        _, first = np.unique(self.rows[lost], return_index=True)
        new = np.array([index for index in lost[first].tolist() if int(self.rows[index]) not in self._held], dtype=int)
        if not len(new):
            return
        logger.warning("%s.rows: %s damaged or gone, computed anew", self.store.path, count(len(new), "row"))
        for indices, outputs in self.compute(new):
            self.put(indices, outputs)
            self._held.update(zip(self.rows[indices].tolist(), _as_rows(outputs), strict=True))
        for index in new.tolist():
            if int(self.rows[index]) not in self._held:
                raise OSError(
                    f"{self.store.path}: an output is damaged, and cannot be computed: {self.issues.get(index)}"
                )

    def _warn(self, error: OSError) -> None:
        if not self.store.failed:
            self.store.failed = True
            logger.warning("the cache of tower outputs fails, so they are held in memory: %s", error)


def _as_rows(outputs: Tensor) -> Rows:
    rows: Rows = outputs.float().cpu().numpy().astype("<f4", copy=False).view(np.uint8)
    return rows


def _finite(rows: Rows) -> BoolArray:
    finite: BoolArray = np.isfinite(rows.view("<f4")).all(1)
    return finite


class PairOutputs(NamedTuple):
    """Frozen towers' outputs for all images and captions of a data set; None for a tower that is trained."""

    images: TowerOutputs | None
    texts: TowerOutputs | None
