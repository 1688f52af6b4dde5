"""What captions and images that occur more than once cost: the highest recalls, the lowest loss, false negatives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cliptune.data.identity import file_identities
from cliptune.data.pairs import Pairs
from cliptune.data.table import IntArray, Strings
from cliptune.preprocess.decode import read_bytes
from cliptune.runtime.distributed import gather_rows, rank_slice
from cliptune.runtime.rng import draw_bits

KS = (1, 5, 10)
MAX_DRAWN = 2**18
"""Pairs of the batches that are drawn."""
MAX_EPOCHS = 100
"""That are drawn of a small set, where one tells little: of 40 images an epoch has one batch of 32."""


def image_kinds(paths: Strings) -> IntArray:
    """Return the index of the first file that has each one's bytes, int64 `[N]`; its own where none is before it.

    Files are compared by size and ends, and those that agree by all their bytes. One that cannot be read equals none.
    Each rank of a run reads a part, and all get the same.
    """
    identities = _over_ranks(np.arange(len(paths)), lambda part: file_identities(paths.take(part)).view(np.int64))
    _, codes, sizes = np.unique(identities, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero((sizes[codes] > 1) & (identities != 0))
    contents = np.zeros(len(paths), dtype=np.int64)
    contents[suspects] = _over_ranks(
        suspects, lambda part: np.array([_content(paths[i]) for i in part], dtype=np.int64)
    )
    kinds = np.arange(len(paths))
    alike = suspects[contents[suspects] != 0]
    _, first, of_kind = np.unique(
        np.stack([identities[alike], contents[alike]]), axis=1, return_index=True, return_inverse=True
    )
    kinds[alike] = alike[first[of_kind.reshape(-1)]]
    return kinds


def _over_ranks(indices: IntArray, compute: Callable[[IntArray], IntArray]) -> IntArray:
    """Let each rank compute its part of the values; all get all of them."""
    part = torch.from_numpy(np.ascontiguousarray(compute(indices[rank_slice(len(indices))])))
    values: IntArray = gather_rows(part).numpy()
    return values


def _content(path: str) -> int:
    """Return a hash of all bytes of a file; 0 if it cannot be read."""
    try:
        content = read_bytes(path)
    except (OSError, ValueError):
        return 0
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True) or 1


def perfect_recalls(wordings: IntArray, owners: IntArray, files: IntArray) -> dict[str, float]:
    """Return the highest recalls that any model can have, by the standard protocol with ties half-counted.

    Equal texts have equal features, and so have images of equal files; all else a perfect model tells apart. What it
    cannot know is which of the images that a text fits it was written for, so it puts them in some order: of n images
    with the text "a kite" one is the first. Of images the own caption that the fewest others have counts, which ties
    with theirs: with m equal texts of other images its rank is 1 + m / 2.

    Where files are equal, the order taken is the small sets of ties first: the best for R@1, and close to it beyond.

    Args:
        wordings: which text each caption is, int `[M]`: equal texts have equal numbers.
        owners: image of each caption, int `[M]`.
        files: which file each image is, `[N]`; all different where that is not known.

    Returns:
        `i2t_r1` to `t2i_r10` in percent of the queries, and their sum `rsum`.
    """
    wordings, files = (np.unique(values, return_inverse=True)[1].reshape(-1) for values in (wordings, files))
    copies = np.bincount(files)
    of_caption = files[owners]
    found = {"t2i": _recalls(wordings, of_caption, copies[of_caption])}
    # of an image's own captions that say the same none is a negative of the other
    own = np.unique(np.stack([owners, wordings]), axis=1, return_inverse=True, return_counts=True)
    num_negatives = np.bincount(wordings)[wordings] - own[2][own[1].reshape(-1)]
    order = np.lexsort((num_negatives, owners))
    best = order[np.unique(owners[order], return_index=True)[1]]
    found["i2t"] = _recalls(of_caption[best], wordings[best], 1 + num_negatives[best])
    recalls = {f"{direction}_r{k}": found[direction][at] for direction in ("i2t", "t2i") for at, k in enumerate(KS)}
    return recalls | {"rsum": sum(recalls.values())}


def _recalls(queries: IntArray, targets: IntArray, sizes: IntArray) -> list[float]:
    """Return recalls in percent where equal queries have one ranking, in which each set of ties takes its size.

    A text whose targets are sets of 1 and 3 images: ranks 1 for the first, and 1 + 1 + (3 - 1) / 2 = 3 for the others.
    """
    entries, weights = np.unique(np.stack([queries, sizes, targets]), axis=1, return_counts=True)
    query, size, _ = entries  # sorted: within a query the small sets first
    of_equal = np.lexsort((-weights, size, query))
    query, size, weights = query[of_equal], size[of_equal], weights[of_equal]
    taken = np.cumsum(size) - size
    begins = np.append(True, query[1:] != query[:-1])
    before = taken - np.maximum.accumulate(np.where(begins, taken, 0))
    ranks = before + 1 + (size - 1) / 2
    return [float(100 * weights[ranks <= k].sum() / len(queries)) for k in KS]


class BatchCost(NamedTuple):
    """What equal captions and images mean for batches as they are drawn."""

    batch_size: int
    loss_floor: float
    """Lowest contrastive loss that any model can have, in nats, mean over batches."""
    num_false: float
    """Pairs of a batch that meet their caption, or a copy of their image, with another image; mean over batches."""
    num_copies: float
    """Those of them that meet a copy of their image."""


def batch_cost(pairs: Pairs, wordings: IntArray, files: NDArray[Any], *, batch_size: int) -> BatchCost:
    """Draw batches as training does, one caption an image, and look at what is equal in them.

    k pairs of a batch with one caption cannot be told apart: each has the probability 1 / k at best, so that the loss
    of each is ln k or more. In a batch of 32 from 4 classes, 8 of each, that is ln 8. Nor can k copies of one image
    with captions of their own: each text may have been any one's, which is ln k again. Training takes copies for
    different images, whatever `--positives` says.

    Of a pair whose caption m pairs of the batch have, and whose image n, and both c, all n images give the m captions
    the probability c / n at best, 1 / m of it each: the loss is ln (m n / c), and so it is from text to image. With
    equal captions as positives of each other the mean is the same.

    Args:
        pairs: that are trained on.
        wordings: which text each caption is, int64 `[M]`.
        files: which file each image is, `[N]`.
        batch_size: pairs a step.
    """
    random = np.random.RandomState(0)
    batch_size = min(batch_size, len(pairs))
    num_batches = min(len(pairs) // batch_size, max(MAX_DRAWN // batch_size, 1))  # an epoch
    epochs = range(min(MAX_EPOCHS, max(MAX_DRAWN // len(pairs), 1)))
    drawn = [random.permutation(len(pairs))[: num_batches * batch_size] for _ in epochs]
    draws = [draw_bits(0, epoch, items) for epoch, items in enumerate(drawn)]
    images = np.concatenate(drawn)
    first, end = pairs.starts[images], pairs.starts[images + 1]
    captions = first + (np.concatenate(draws) % (end - first).astype(np.uint64)).astype(np.int64)
    batches = np.repeat(np.arange(len(images) // batch_size), batch_size)
    equal = _num_equal(batches, wordings[captions])
    copies = _num_equal(batches, files[images])
    both = _num_equal(batches, wordings[captions], files[images])
    is_false = (equal > 1) | (copies > 1)
    return BatchCost(
        batch_size, float(np.log(equal * copies / both).mean()), float(batch_size * is_false.mean()),
        float(batch_size * (copies > 1).mean()),
    )  # fmt: skip


def _num_equal(*keys: NDArray[Any]) -> IntArray:
    """Return how many rows have the keys of each, itself included."""
    codes = np.zeros(len(keys[0]), dtype=np.int64)
    for key in keys:
        key_codes = np.unique(key, return_inverse=True)[1].reshape(-1)
        codes = np.unique(codes * (key_codes.max() + 1) + key_codes, return_inverse=True)[1].reshape(-1)
    return np.bincount(codes)[codes]
