"""The nearest of many features: exact up to a size, beyond it by faiss, with its recall measured."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cliptune.runtime.files import atomic_writer
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

EXACT_UP_TO = 1_000_000
"""Images: comparing a query with so many takes about as long as memory takes to be read once, 2 GB of it."""
SLICE = 1 << 25
"""Scores of exact comparisons that are held at once."""
LEAST_RECALL = 0.95
RECALL_AT = 10
NUM_SAMPLES = 200
LEAST_TRAINING, TRAINING_PER_LIST = 39, 64
"""Features for each list's centre: what faiss asks for, and what it gets of a large gallery."""


class Nearest(NamedTuple):
    """The best of each query, best first."""

    scores: Tensor
    """Cosines, float32 `[Q, top]`."""
    indices: Tensor
    """int64 `[Q, top]`; -1, with a score of -1, where an approximate look-up found fewer."""


class ExactLookup:
    """Compares a query with every feature.

    Args:
        features: unit-norm float32 `[N, D]`, in main memory.
    """

    note = "exact: every image is compared"

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self._equals = _equal_rows(features)
        self._later = torch.tensor([row for rows in self._equals.values() for row in rows[1:]], dtype=torch.int64)

    def nearest(self, queries: Tensor, top: int) -> Nearest:
        """Return the `top` nearest, at most N, of queries `[Q, D]`, unit norm; of equal features the first come first.

        Equal are those of the very same bits. They have one score, wherever they stand.
        """
        top = min(top, len(self.features))
        at_once = max(1, SLICE // len(self.features))
        found = [self._nearest(part, top) for part in queries.split(at_once)]
        return Nearest(torch.cat([part.scores for part in found]), torch.cat([part.indices for part in found]))

    def _nearest(self, queries: Tensor, top: int) -> Nearest:
        scores = queries @ self.features.T  # [q, N]
        # a product's last bit depends on the row, so that equal features would be in any order: the first stands for
        # all of them, 3 for rows 3, 8, 9, and they take its place
        scores.index_fill_(1, self._later, -torch.inf)
        scores, indices = scores.topk(min(top, len(self.features) - len(self._later)))  # [q, top]
        # topk puts scores that are the same in any order; it would change from one query to the next
        indices, order = indices.sort(dim=1)
        scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        found = Nearest(scores, indices.gather(1, order))
        return self._with_equals(found, top) if self._equals else found

    def _with_equals(self, found: Nearest, top: int) -> Nearest:
        """Return what is found with the equals of each behind it, cut at `top`."""
        rows = [[self._equals.get(index, [index]) for index in indices] for indices in found.indices.tolist()]
        indices = [list(islice(chain.from_iterable(each), top)) for each in rows]
        scores = [
            of_query.repeat_interleave(torch.tensor(list(map(len, each))))[:top]
            for of_query, each in zip(found.scores, rows, strict=True)
        ]
        return Nearest(torch.stack(scores), torch.tensor(indices))


class ApproximateLookup:
    """Looks only into the lists of features whose centres are nearest to a query (faiss, IVF).

    What it finds has its exact score. How many lists are looked into is what gives `LEAST_RECALL` of the best ten on a
    sample of queries, texts and images; the recall is part of `note`.

    Args:
        features: unit-norm float32 `[N, D]`, in main memory.
        texts: features of texts as people write them, `[Q, D]`, for the sample.
        cache_prefix: what the name of the file begins with that caches the lists; None: they are made anew.
    """

    def __init__(self, features: Tensor, texts: Tensor, *, cache_prefix: Path | None) -> None:
        self.features = features
        self._index = _load_or_build(features.numpy(), cache_prefix)
        self.note = self._settle(texts)

    def nearest(self, queries: Tensor, top: int) -> Nearest:
        """Return about the `top` nearest, at most N, of queries `[Q, D]`, unit norm."""
        top = min(top, len(self.features))
        _, found = self._index.search(np.ascontiguousarray(queries.numpy()), top)
        indices = torch.from_numpy(found)  # [Q, top]
        # the lists hold halves of floats, which are enough to choose by
        scores = torch.einsum("qd,qtd->qt", queries, self.features[indices.clamp(min=0)])
        scores = scores.masked_fill(indices < 0, -1.0)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return Nearest(scores, indices.gather(1, order))

    def _settle(self, texts: Tensor) -> str:
        """Look into twice as many lists until enough is found; say how much that is."""
        step = max(1, len(self.features) // NUM_SAMPLES)
        rows = torch.arange(0, len(self.features), step)[:NUM_SAMPLES]
        samples = {"texts": texts[:NUM_SAMPLES], "images": self.features[rows]}
        lookup = ExactLookup(self.features)
        exact = {name: lookup.nearest(queries, RECALL_AT + 1) for name, queries in samples.items()}
        num_lists, self._index.nprobe = self._index.nlist, 1
        while True:
            recalls = {
                "texts": _recall(self.nearest(texts[:NUM_SAMPLES], RECALL_AT).indices, exact["texts"].indices[:, :-1]),
                # an image finds itself, which is no merit
                "images": _recall(
                    self.nearest(samples["images"], RECALL_AT + 1).indices, exact["images"].indices, rows
                ),
            }
            if min(recalls.values()) >= LEAST_RECALL or self._index.nprobe >= num_lists:
                break
            self._index.nprobe = min(2 * self._index.nprobe, num_lists)
        told = ", ".join(f"{100 * recall:.1f}% for {name}" for name, recall in recalls.items())
        return (
            f"approximate: looks into {self._index.nprobe} of {num_lists} lists and finds of the best {RECALL_AT} "
            f"{told} ({NUM_SAMPLES} of each tried)"
        )


Lookup = ExactLookup | ApproximateLookup


def make_lookup(
    features: Tensor, *, sample: Callable[[], Tensor], cache_prefix: Path | None, exact_up_to: int = EXACT_UP_TO
) -> Lookup:
    """Return what finds the nearest of features `[N, D]`: exactly, or if they are many by faiss, where it is there.

    Args:
        features, cache_prefix: see `ApproximateLookup`.
        sample: gives its `texts`, if they are needed.
        exact_up_to: features that are compared one by one.
    """
    if len(features) <= exact_up_to:
        return ExactLookup(features)
    try:
        _faiss()
    except ImportError:
        logger.warning(
            "%s are looked through one by one; with pip install faiss-cpu a query takes less time",
            count(len(features), "image"),
        )
        return ExactLookup(features)
    return ApproximateLookup(features, sample(), cache_prefix=cache_prefix)


def _equal_rows(features: Tensor) -> dict[int, list[int]]:
    """Return the indices of equal rows, in their order, by the first of them; rows that equal no other are left out."""
    rows = features.numpy()
    # few rows have the first and the last number of another: those alone are compared as a whole
    ends = np.ascontiguousarray(rows[:, [0, -1]]).view(np.int64)[:, 0]  # [N]
    _, kinds, num_of_kind = np.unique(ends, return_inverse=True, return_counts=True)
    by_content: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(num_of_kind[kinds.reshape(-1)] > 1).tolist():
        content = hashlib.blake2b(rows[row].tobytes(), digest_size=16).digest()
        by_content.setdefault(content, []).append(row)
    return {equals[0]: equals for equals in by_content.values() if len(equals) > 1}


def _recall(found: Tensor, wanted: Tensor, own: Tensor | None = None) -> float:
    """Return which fraction of `wanted` `[Q, k]` is found; a query's own row, int64 `[Q]`, is not counted."""
    counts = torch.ones_like(wanted, dtype=torch.bool) if own is None else wanted != own[:, None]
    hits = (wanted[:, :, None] == found[:, None, :]).any(2) & counts
    return hits.sum().item() / max(counts.sum().item(), 1)


def _faiss() -> ModuleType:
    return importlib.import_module("faiss")  # which large galleries alone need


def _load_or_build(features: Any, cache_prefix: Path | None) -> Any:
    """Return faiss's index of features, from the cache if it was built for the very same ones."""
    faiss = _faiss()
    if cache_prefix is None:
        return _build(features)
    path = cache_prefix.with_name(f"{cache_prefix.name}-{hashlib.blake2b(features, digest_size=16).hexdigest()}.faiss")
    if path.is_file():
        try:
            return faiss.read_index(str(path))
        except RuntimeError as error:
            logger.warning("%s cannot be read and is made anew: %s", path, error)
    index = _build(features)
    try:
        for old in path.parent.glob(f"{cache_prefix.name}-*.faiss"):  # of the same folder before it changed
            old.unlink()
        with atomic_writer(path) as file:
            file.write(faiss.serialize_index(index).data)
    except OSError as error:
        logger.warning("%s cannot be written, so its lists are made anew each time: %s", path, error)
    return index


def _build(features: Any) -> Any:
    faiss = _faiss()
    num_features, size = features.shape
    num_lists = max(1, min(round(2 * num_features**0.5), num_features // LEAST_TRAINING))
    logger.info("sorting %s into %s; this is done once", count(num_features, "image"), count(num_lists, "list"))
    centres = faiss.IndexFlatIP(size)
    index = faiss.IndexIVFScalarQuantizer(
        centres, size, num_lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    rows = np.random.default_rng(0).permutation(num_features)[: TRAINING_PER_LIST * num_lists]
    index.train(features[np.sort(rows)])
    index.add(features)
    return index
