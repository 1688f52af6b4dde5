import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cliptune.data.pairs import Pairs, load_pairs
from cliptune.features.distinct import distinct
from cliptune.features.encode import Encoder, encode_pairs
from data_loader import ImageTextDataset
from tests.helpers.datasets import make_images, make_index
from tests.helpers.models import FP32, SMALL_VIT, WORDS, make_model, small_architectures

__all__ = ["small_architectures"]


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """61 images with three captions each, of which many are equal to the model, and two images are copies."""
    names = [f"{number:02}.png" for number in range(61)]
    make_images(tmp_path, *names)
    (tmp_path / "07.png").write_bytes((tmp_path / "50.png").read_bytes())
    texts = [" ".join(WORDS[(number * k) % 16] for k in range(1, 2 + number % 9)) for number in range(61)]
    rows = [
        {"image_path": name, "caption": [texts[number], texts[number % 7].upper(), f"{texts[-1 - number]}  again"]}
        for number, name in enumerate(names)
    ]
    make_index(tmp_path, rows)
    return load_pairs(tmp_path)


def encoder_of(batch_size: int) -> Encoder:
    return Encoder(make_model(SMALL_VIT.name), ImageTextDataset, precision=FP32, batch_size=batch_size, num_workers=0)


@pytest.mark.slow
def test_float32_numbers_do_not_move_with_the_batch_size(pairs: Pairs) -> None:
    encoder = encoder_of(7)
    found, *others = (encode_pairs(replace(encoder, batch_size=size), pairs) for size in (7, 32, 100, 512))
    for other in others:
        assert torch.equal(other.image_features, found.image_features)
        assert torch.equal(other.text_features, found.text_features)


def test_each_distinct_text_and_image_runs_once_and_copies_have_its_features(pairs: Pairs, monkeypatch: Any) -> None:
    encoder, num_run = encoder_of(64), {"image": 0, "text": 0}
    for tower in num_run:
        run = getattr(encoder.model, f"encode_{tower}")

        def counted(rows: torch.Tensor, tower: str = tower, run: Any = run) -> torch.Tensor:
            num_run[tower] += len(rows)
            result: torch.Tensor = run(rows)
            return result

        monkeypatch.setattr(encoder.model, f"encode_{tower}", counted)
    encoded = encode_pairs(encoder, pairs)
    normal = [" ".join(caption.lower().split()) for caption in pairs.captions]
    assert num_run == {"image": 60, "text": len(set(normal))}
    assert encoded.text_kinds.tolist() == [normal.index(caption) for caption in normal]
    same = np.flatnonzero(encoded.image_kinds.numpy() != np.arange(61))
    assert len(same) == 1
    assert torch.equal(encoded.image_features[same[0]], encoded.image_features[encoded.image_kinds[same[0]]])
    assert torch.equal(encoded.text_features, encoded.text_features[encoded.text_kinds])
    # as each by itself
    model: Any = encoder.model
    alone = model.encode_image(list(pairs.paths)).detach()
    assert torch.allclose(encoded.image_features, alone, atol=1e-5)
    alone = model.encode_text(list(pairs.captions)).detach()
    assert torch.allclose(encoded.text_features, alone, atol=1e-5)


def test_copies_of_an_unreadable_image_are_issues_of_their_own(pairs: Pairs) -> None:
    broken = [pairs.paths[index] for index in (3, 20, 40)]
    for path in broken:
        Path(path).write_text("broken")
    issues: list[Any] = []
    encoded = encode_pairs(encoder_of(64), pairs, on_unreadable_image=issues.append)
    assert sorted(issue.image for issue in issues) == sorted(broken)
    assert encoded.image_indices.tolist() == [index for index in range(61) if index not in {3, 20, 40}]
    assert len(encoded.text_features) == 3 * 58


def test_texts_that_differ_behind_the_context_are_the_same(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png", "c.png")
    long = " ".join(["red"] * 90)
    captions = [f"{long} one", f"{long} two", "!"]
    make_index(
        tmp_path,
        json.loads(
            json.dumps([{"image_path": f"{n}.png", "caption": c} for n, c in zip("abc", captions, strict=True)])
        ),
    )
    pairs = load_pairs(tmp_path)
    same = distinct(pairs, 77)
    rows = {captions.index(caption): row for caption, row in zip(pairs.captions, same.text_rows.tolist(), strict=True)}
    assert rows[0] == rows[1] != rows[2]
    assert distinct(pairs, 120).text_rows.tolist() == [0, 1, 2]
    assert distinct(pairs, 77) is same
