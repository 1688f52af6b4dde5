"""Texts to tokens with CLIP's byte-pair encoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cliptune.runtime.openai_clip import import_clip

CONTEXT_LENGTH = 77
VOCABULARY_SIZE = 49_408
"""Tokens of CLIP's vocabulary; the last is the end of a text."""
LONG_WORD = 64
"""Bytes of a word from which on OpenAI's own merging, whose time grows with their square, is not used."""

MAX_LETTERS = 4096
"""Bytes of a word that are looked at: more than 76 tokens have, so what is cut off is beyond the context."""
MAX_TEXT = 2**16
"""Characters of a text that are looked at."""


def tokenize(texts: Sequence[str], context_length: int = CONTEXT_LENGTH) -> tuple[Tensor, int]:
    """Tokenise with CLIP's byte-pair encoding (`clip.tokenize` with `truncate=True`).

    Args:
        texts: any number of them.
        context_length: L, the model's; OpenAI's have 77.

    Returns:
        Tokens, int64 `[len(texts), L]`, padded with 0 after the end-of-text token, which a text that is too long keeps
        as its last; and how many texts were too long.
    """
    start, end = (_tokenizer().encoder[name] for name in ("<|startoftext|>", "<|endoftext|>"))
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    num_truncated = 0
    for row, text in enumerate(texts):
        ids = list(islice(_token_ids(text[:MAX_TEXT], MAX_LETTERS), context_length - 1))
        if len(ids) > context_length - 2:
            num_truncated += 1
            ids.pop()
        ids = [start, *ids, end]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, num_truncated


def count_tokens(text: str) -> int:
    """Count a text's tokens, start and end included; of a text or word beyond the limits above, those up to there."""
    return 2 + sum(1 for _ in _token_ids(text[:MAX_TEXT], MAX_LETTERS))


def vocabulary() -> dict[str, int]:
    """Return CLIP's vocabulary: the id of each token."""
    return _tokenizer().encoder  # type: ignore[no-any-return]


def merges() -> list[str]:
    """Return the pairs of tokens that CLIP's encoding merges, `l o`, in their order."""
    ranks = _tokenizer().bpe_ranks
    return [" ".join(pair) for pair in sorted(ranks, key=ranks.get)]


def _token_ids(text: str, max_letters: int) -> Iterator[int]:
    """Yield a text's tokens, as the tokeniser's own `encode` does for a whole text; of a long word the first ones."""
    tokenizer, module = _tokenizer(), import_clip().simple_tokenizer
    for word in tokenizer.pat.finditer(module.whitespace_clean(module.basic_clean(text)).lower()):
        letters = "".join(tokenizer.byte_encoder[byte] for byte in word[0].encode("utf-8")[:max_letters])
        is_long = len(letters) > LONG_WORD
        parts = merge(letters, tokenizer.bpe_ranks) if is_long else tokenizer.bpe(letters).split(" ")
        yield from (tokenizer.encoder[part] for part in parts)


def merge(letters: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge a word's letters into tokens, in n log n steps.

    Byte-pair encoding (Sennrich et al. 2016): of all pairs of neighbours the one of the lowest rank is merged, wherever
    it stands, from left to right; then the next. `l o w </w>` with (l, o) first and (lo, w) next is `lo w`, then `low`.

    Args:
        letters: of one word.
        ranks: of each pair of tokens that is merged.
    """
    parts = [*letters[:-1], f"{letters[-1]}</w>"]
    before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    pairs = [
        (ranks[pair], left) for left, pair in enumerate(zip(letters, parts[1:], strict=False)) if pair in ranks
    ]  # by rank, then place
    heapify(pairs)
    while pairs:
        # all places of this rank come first, whatever pairs they make: these may have a lower one
        rank, made = pairs[0][0], []
        while pairs and pairs[0][0] == rank:
            _, left = heappop(pairs)
            right = after[left]
            if right == len(parts) or ranks.get((parts[left], parts[right])) != rank:
                continue  # one of the two has been merged since
            parts[left], parts[right] = parts[left] + parts[right], ""
            after[left] = after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            made += [before[left], left]
        for left in made:
            if left >= 0 and after[left] < len(parts):
                pair = parts[left], parts[after[left]]
                if pair in ranks:
                    heappush(pairs, (ranks[pair], left))
    return [part for part in parts if part]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return import_clip().simple_tokenizer.SimpleTokenizer()
