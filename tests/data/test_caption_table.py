import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cliptune.data import caption_table as module
from cliptune.data.caption_table import CaptionTable, caption_table, typical_texts
from cliptune.data.loaders import caption_id
from cliptune.data.pairs import load_pairs
from cliptune.data.shards import Shards
from cliptune.data.table import Strings
from cliptune.preprocess.tokens import tokenize

CAPTIONS = ["a dog", "", "zwei Hunde \U0001f415 \u732b", "a  DOG", "word " * 300]


@pytest.mark.parametrize("length", [77, 8])
def test_captions_are_tokenised_once_and_as_ever(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, asked = CaptionTable(Strings.of(CAPTIONS), length), []
    monkeypatch.setattr(module, "tokenize", lambda texts, length: asked.append(texts) or tokenize(texts, length))  # type: ignore[func-returns-value]
    for indices in ([4, 0, 0], [1, 2, 3, 4], [0, 1]):
        tokens, ids = table.tokens(np.array(indices)), table.ids(np.array(indices))
        texts = [CAPTIONS[index] for index in indices]
        assert torch.equal(tokens, tokenize(texts, length)[0])
        assert (tokens.dtype, ids.dtype) == (torch.int64, torch.int64)
        assert ids.tolist() == [caption_id(text) for text in texts]
    assert [sorted(set(texts)) for texts in asked] == [sorted({CAPTIONS[4], CAPTIONS[0]}), sorted(CAPTIONS[1:4])]


def test_all_who_ask_share_a_table(sample_dir: Path) -> None:
    pairs = load_pairs(sample_dir)
    assert caption_table(pairs, 77) is caption_table(pairs, 77)
    assert caption_table(pairs, 8) is not caption_table(pairs, 77)
    assert caption_table(pairs.select(range(3)), 77) is not caption_table(pairs, 77)


def test_typical_texts_are_from_all_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    captions = [f"kite {number}" for number in range(12)]
    records = [{"image_path": f"{number}.jpg", "caption": text} for number, text in enumerate(captions)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for number in range(12):
        (tmp_path / f"{number}.jpg").touch()
    pairs = load_pairs(tmp_path / "data.json")
    monkeypatch.setattr(module, "NUM_TYPICAL", 5)
    found = typical_texts(pairs, 77)
    assert found is not None
    assert torch.equal(found, tokenize([captions[number] for number in (0, 2, 4, 7, 9)])[0])
    assert typical_texts(Shards.__new__(Shards), 77) is None
