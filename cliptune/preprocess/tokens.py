"""Texts to tokens with CLIP's byte-pair encoding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cliptune.runtime.openai_clip import import_clip

CONTEXT_LENGTH = 77

_LONG_WORD = re.compile(r"(\S{4096})\S+")


def tokenize(texts: Sequence[str], context_length: int = CONTEXT_LENGTH) -> tuple[Tensor, int]:
    """Tokenise with CLIP's byte-pair encoding (`clip.tokenize` with `truncate=True`).

    Args:
        texts: any number of them.
        context_length: L, the model's; OpenAI's have 77.

    Returns:
        Tokens, int64 `[len(texts), L]`, padded with 0 after the end-of-text token, which a text that is too long keeps
        as its last; and how many texts were too long.
    """
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    num_truncated = 0
    for row, text in enumerate(texts):
        ids = _encode(text)
        if len(ids) > context_length:
            ids = [*ids[: context_length - 1], ids[-1]]
            num_truncated += 1
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, num_truncated


def count_tokens(text: str) -> int:
    """Count a text's tokens, start and end included; what is beyond the context length is truncated."""
    return len(_encode(text))


def _encode(text: str) -> list[int]:
    tokenizer = _tokenizer()
    encoder: dict[str, int] = tokenizer.encoder
    # a word's time grows with the square of its length (100,000 letters: minutes), and the context ends far before 4096
    text = _LONG_WORD.sub(r"\1", text)
    return [encoder["<|startoftext|>"], *tokenizer.encode(text), encoder["<|endoftext|>"]]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return import_clip().simple_tokenizer.SimpleTokenizer()
