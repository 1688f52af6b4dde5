"""Tokens are OpenAI's, in bounded time."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cliptune.preprocess import tokens
from cliptune.preprocess.tokens import count_tokens, merge, tokenize
from cliptune.runtime.openai_clip import import_clip

clip = import_clip()
SimpleTokenizer = clip.simple_tokenizer.SimpleTokenizer


def test_tokens_are_those_of_clip() -> None:
    texts = ["a dog", "Ein Hund &amp; <b>", "  spaces\tand\n lines ", "四 猫", "", "word " * 100, "naïve café"]
    tokens, num_truncated = tokenize(texts)
    assert torch.equal(tokens, clip.tokenize(texts, truncate=True).long())
    assert num_truncated == 1
    assert tokens[5, -1] == 49407


def letters(count: int, alphabet: str = "abcdefghijklmnopqrstuvwxyz", seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=count))


@pytest.mark.slow
def test_a_word_without_end_has_the_first_tokens_of_clip() -> None:
    words = [letters(5000), "猫" * 5000, "a" * 5000, "!?" * 3000, "1" * 5000]
    found, num_truncated = tokenize(words)
    assert torch.equal(found, clip.tokenize(words, truncate=True).long())
    assert num_truncated == 5


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    # few letters, so that pairs come many times, overlap and are made of one another
    st.text(st.sampled_from("aaehtin"), min_size=1, max_size=300)
    | st.text(st.sampled_from("aestlrnoicdmpghbyfvkwzxjqu" * 3 + "é"), min_size=1, max_size=200)
)
def test_a_long_word_is_merged_as_clip_does(word: str) -> None:
    tokenizer = tokens._tokenizer()
    encoded = "".join(tokenizer.byte_encoder[byte] for byte in word.encode())
    assert merge(encoded, tokenizer.bpe_ranks) == SimpleTokenizer.bpe(tokenizer, encoded).split(" ")


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("abc"), min_size=1, max_size=40), st.permutations([a + b for a in "abc" for b in "abc"]))
def test_merging_is_that_of_clip_whatever_the_ranks(word: str, pairs: list[str]) -> None:
    """Also where a pair's token has a lower rank than the pair itself, as merges made in two ways may have."""
    merges = [(pair[0], pair[1]) for pair in pairs]
    merges[::2] = [(a + b, c) for (a, b), (c, _) in zip(merges[::2], merges[1:] + merges, strict=False)]
    tokenizer = SimpleTokenizer.__new__(SimpleTokenizer)
    tokenizer.cache, tokenizer.bpe_ranks = {}, {pair: rank for rank, pair in enumerate(dict.fromkeys(merges))}
    expected = [word + "</w>"] if len(word) == 1 else tokenizer.bpe(word).split(" ")
    assert merge(word, tokenizer.bpe_ranks) == expected


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=200) | st.sampled_from([" " * 70, "&amp;", "<|endoftext|>", "x" * 100]), max_size=20))
def test_any_text_has_the_tokens_of_clip(parts: list[str]) -> None:
    text = " ".join(parts)
    assert torch.equal(tokenize([text])[0], clip.tokenize([text], truncate=True).long())
    assert count_tokens(text) == 2 + len(tokens._tokenizer().encode(text))


@pytest.mark.parametrize(
    "text",
    [
        " ".join(letters(4000, seed=seed) for seed in range(30)),
        letters(100_000) * 100,  # drawn whenever tests are collected
        "word " * 1_000_000,
        " " * 30_000 + "&nbsp;" * 4_000 + "a" + "\n" * 10_000 + "dog",
        "a" * 4_000_000,
        "猫" * 1_000_000,
    ],
)
def test_a_caption_without_end_takes_no_time_without_end(text: str) -> None:
    """Each epoch tokenises it anew. OpenAI's own code takes 22 s for the first of these, and days for the second."""
    found, _ = tokenize([text])
    assert found[0].argmax() == (found[0] > 0).sum() - 1
    if text.endswith("dog"):
        assert torch.equal(found, tokenize(["a dog"])[0])
    assert count_tokens(text) < 500_000
