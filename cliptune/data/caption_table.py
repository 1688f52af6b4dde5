"""What a batch needs of a data set's captions, found once: a caption comes again in later epochs."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from cliptune.data.loaders import caption_id
from cliptune.data.pairs import Pairs
from cliptune.data.shards import Shards
from cliptune.data.table import IntArray, Strings
from cliptune.preprocess.tokens import tokenize

NUM_TYPICAL = 4096
"""Captions that stand for all."""
_KNOWN: WeakKeyDictionary[Pairs, dict[int, CaptionTable]] = WeakKeyDictionary()
"""By context length."""


def caption_table(pairs: Pairs, context_length: int) -> CaptionTable:
    """Return the table of a data set's captions, the same one whoever asks."""
    known = _KNOWN.setdefault(pairs, {})
    if context_length not in known:
        known[context_length] = CaptionTable(pairs.captions, context_length)
    return known[context_length]


def typical_texts(data: Pairs | Shards, context_length: int) -> Tensor | None:
    """Return the tokens of captions from all over a data set, int64 `[n, L]`.

    None: it is shards, whose captions have not been read yet.
    """
    if not isinstance(data, Pairs):
        return None
    number = len(data.captions)
    spread = np.linspace(0, number, min(number, NUM_TYPICAL), endpoint=False).astype(np.int64)
    return caption_table(data, context_length).tokens(spread)


class CaptionTable:
    """Tokens and ids of captions, by their indices; tokenised when they are first asked for.

    Args:
        captions: of the data set.
        context_length: L, the model's.
    """

    def __init__(self, captions: Strings, context_length: int) -> None:
        self._captions, self._context_length = captions, context_length
        # pages that nobody has written to take no memory; CLIP's vocabulary fits into 16 bits
        self._tokens = np.zeros((len(captions), context_length), dtype=np.uint16)
        self._is_known = np.zeros(len(captions), dtype=bool)
        self._ids = np.full(len(captions), -1, dtype=np.int64)

    def tokens(self, indices: IntArray) -> Tensor:
        """Return the tokens of captions, int64 `[len(indices), L]`, as `tokenize` does; threads may ask at once."""
        new = indices[~self._is_known[indices]]
        if len(new):
            texts = [self._captions[index] for index in new.tolist()]
            self._tokens[new] = tokenize(texts, self._context_length)[0].numpy()
            self._is_known[new] = True  # last: another thread that sees it finds the tokens
        return torch.from_numpy(self._tokens[indices].astype(np.int64))

    def ids(self, indices: IntArray) -> Tensor:
        """Return the `caption_id` of captions, int64 `[len(indices)]`; threads may ask at once."""
        new = indices[self._ids[indices] < 0]
        self._ids[new] = [caption_id(self._captions[index]) for index in new.tolist()]
        return torch.from_numpy(self._ids[indices])
