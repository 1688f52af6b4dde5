import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliptune.data.caption_lists import caption_list

TEXTS = st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5)


@given(TEXTS)
def test_lists_of_json_and_python_are_read_back(texts: list[str]) -> None:
    assert caption_list(json.dumps(texts)) == texts
    assert caption_list(json.dumps(texts, ensure_ascii=False, indent=1)) == texts
    assert caption_list(f" {texts!r} ") == texts


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        (str(np.array(["a red kite", "it's a boat", "x" * 80], dtype=object)), ["a red kite", "it's a boat", "x" * 80]),
        (str(np.array(["a", "b"])), ["a", "b"]),
        ('["a", null, 7]', ["a", None, 7]),
        ("['a', None, nan]", ["a", None, None]),
        ("['a','b',]", ["a", "b"]),
        (r"['an \escape', 'one \\ two']", ["an \x1bscape", "one \\ two"]),
        ("[]", []),
    ],
)
def test_other_lists(text: str, captions: list[Any]) -> None:
    text = text.replace("\\e", "\\x1b")
    assert caption_list(text) == captions


@pytest.mark.parametrize(
    "text",
    [
        "[sic] a dog", "[a dog]", "[a dog] and [a cat]", "a dog", "[", "]", "['a dog'", "['it's a dog']", "[1, 2, 3]",
        "['a' + 'b']", "[open('x')]", "[['a'], 'b'", "[None]", "[null]", "[" * 10_000 + "]" * 10_000, '["a" "b"', "[,]",
    ],
)  # fmt: skip
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert caption_list(text) == text
