"""What a data set holds more than once: files of the same bytes, equal texts, and how far they let recall rise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from cliptune.data.identity import file_identities
from cliptune.data.table import IntArray, Strings
from cliptune.preprocess.decode import read_bytes
from cliptune.results import RECALLS
from cliptune.runtime.distributed import gather_rows, rank_slice


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


def standard_ceiling(owners: IntArray, text_kinds: IntArray, num_images: int) -> dict[str, float]:
    """Return recalls (percent) that no model exceeds by the standard protocol, since equal texts cannot be told apart.

    Image to text: an own text has the very score of the equal texts of other images, which count as wrong and as half
    of a place each. 60 images of one caption: rank 1 + 59/2. The own text with the fewest others is taken.
    Text to image: a text orders the images in one way, whichever image it is asked for, so of 60 images with the same
    caption one stands first: R@1 is 1/60, R@5 5/60.

    Args:
        owners: image of each text, int64 `[M]`.
        text_kinds: of each text, int64 `[M]`: equal texts have equal numbers.
        num_images: N.

    Returns:
        `i2t_r1` to `t2i_r10`, and `rsum`, their sum.
    """
    _, kinds = np.unique(text_kinds, return_inverse=True)
    # an image may have a text twice: each (text, image) once, with how often
    edges, times = np.unique(kinds.reshape(-1) * num_images + owners, return_counts=True)
    texts, images = np.divmod(edges, num_images)
    copies = np.bincount(texts, times)
    best = np.full(num_images, np.inf)
    np.minimum.at(best, images, 1 + (copies[texts] - times) / 2)
    best = best[np.isfinite(best)]
    order = np.lexsort((-times, texts))  # the images that most queries ask for first
    starts = np.r_[0, np.cumsum(np.bincount(texts))][texts[order]]
    places = np.arange(len(edges)) - starts + 1
    ceiling = {f"i2t_r{k}": 100 * float((best <= k).mean()) for k in RECALLS}
    ceiling |= {f"t2i_r{k}": 100 * float(times[order][places <= k].sum()) / len(owners) for k in RECALLS}
    return {**ceiling, "rsum": sum(ceiling.values())}
