"""What is the same to a model: texts of the same tokens, images of the same bytes. Each is encoded once."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cliptune.data.pairs import Pairs
from cliptune.data.repeats import image_kinds
from cliptune.data.table import IntArray, Strings
from cliptune.preprocess.tokens import tokenize
from cliptune.runtime.logs import progress_bar

CHUNK = 16384  # texts that are tokenised at once

Tokens = NDArray[np.uint16]
"""`[N, L]`; L is that of the longest. A quarter of the memory of int64, and CLIP's vocabulary fits."""


class Distinct(NamedTuple):
    """Which texts and images of a data set are there more than once."""

    tokens: Tokens
    """Of each distinct text, `[T, L]`."""
    text_rows: IntArray
    """Row of `tokens` of each caption, `[M]`."""
    first_captions: IntArray
    """The first caption of each distinct text, `[T]`."""
    image_kinds: IntArray
    """Index of the first image with each one's bytes, `[N]`."""


_KNOWN: WeakKeyDictionary[Pairs, dict[int, Distinct]] = WeakKeyDictionary()
"""By context length: a run evaluates the same pairs after each epoch."""


def distinct(pairs: Pairs, context_length: int) -> Distinct:
    """Return which captions and images of a data set are the same to a model, found once for all evaluations.

    Args:
        pairs: images with their captions.
        context_length: L of the model: texts that differ behind it are the same.
    """
    known = _KNOWN.setdefault(pairs, {})
    if context_length not in known:
        known[context_length] = _find(pairs, context_length)
    return known[context_length]


def tokens_of(texts: Strings, context_length: int) -> Tokens:
    """Tokenise texts, as long as the longest of them."""
    parts: list[Any] = []
    for start in progress_bar(range(0, len(texts), CHUNK), desc="tokenise"):
        tokens = tokenize(texts[start : start + CHUNK], context_length)[0].numpy().astype(np.uint16)
        parts.append(tokens[:, : tokens.argmax(1).max() + 1])  # a text ends with the highest token there is
    length = max((part.shape[1] for part in parts), default=0)
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, length - part.shape[1]))) for part in parts] or [np.zeros((0, 0), dtype=np.uint16)]
    )


def _find(pairs: Pairs, context_length: int) -> Distinct:
    # equal captions need be tokenised once; different ones may be equal tokens: "A cat" and "a  cat"
    first = pairs.captions.first_equal()
    captions, row_of_caption = np.unique(first, return_inverse=True)
    tokens = tokens_of(pairs.captions.take(captions), context_length)
    rows, row_of_row = np.unique(_first_equal_rows(tokens), return_inverse=True)
    text_rows = row_of_row.reshape(-1)[row_of_caption.reshape(-1)]
    return Distinct(tokens[rows], text_rows, captions[rows], image_kinds(pairs.paths))


def _first_equal_rows(tokens: Tokens) -> IntArray:
    """Return the index of the first row that equals each one, `[N]`."""
    content = np.ascontiguousarray(tokens)
    ends = np.arange(len(content) + 1, dtype=np.int64) * (content.shape[1] * content.itemsize)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(content)]
    return Strings(pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(content), buffers)).first_equal()
