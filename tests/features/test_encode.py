import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cliptune.data import kept_workers
from cliptune.data.kept_workers import KeptWorkers
from cliptune.data.pairs import Pairs, load_pairs
from cliptune.features import encode
from cliptune.features.encode import Encoder, encode_images
from cliptune.preprocess.transforms import PixelTransform
from data_loader import ImageTextDataset
from tests.helpers.models import FP32, SMALL_RESNET, SMALL_VIT, make_model, small_architectures

__all__ = ["small_architectures"]


@pytest.fixture
def pairs(sample_dir: Path) -> Pairs:
    return load_pairs(sample_dir)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(make_model(SMALL_VIT.name).eval(), ImageTextDataset, precision=FP32, batch_size=16, num_workers=0)


def children() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


def note_workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let loaders give nothing; return how many workers each has."""
    asked: list[int] = []

    def make_loader(*_: Any, num_workers: int, **__: Any) -> list[Any]:
        asked.append(num_workers)
        return []

    for module in (encode, kept_workers):
        monkeypatch.setattr(module, "make_loader", make_loader)
    return asked


def test_evaluations_share_workers_and_give_the_same_features(encoder: Encoder, pairs: Pairs) -> None:
    want, before = encode_images(encoder, pairs)[0], children()
    watched = pairs.select(range(10, 50))
    kept = replace(encoder, num_workers=2, kept=KeptWorkers())
    seen = []
    for _ in range(3):
        assert torch.equal(encode_images(kept, pairs)[0], want)
        assert torch.equal(encode_images(replace(kept, model=encoder.model), watched)[0], want[10:50])
        seen.append(children() - before)
    assert [len(pids) for pids in seen] == [2, 2, 2]
    assert seen[0] == seen[1] == seen[2]
    del kept
    assert children() == before


@pytest.mark.parametrize(("num_images", "kept", "expected"), [(20, None, 0), (60, None, 0), (60, KeptWorkers(), 3)])
def test_few_images_are_no_work_for_workers(
    num_images: int, kept: KeptWorkers | None, expected: int, encoder: Encoder, pairs: Pairs, monkeypatch: Any
) -> None:
    asked = note_workers(monkeypatch)
    with pytest.raises(ValueError, match="none of the images could be read"):
        encode_images(replace(encoder, num_workers=8, kept=kept), pairs.select(range(num_images)))
    assert asked == [expected]


def test_a_hundred_images_start_few_workers_and_many_start_all(encoder: Encoder, monkeypatch: Any) -> None:
    asked = note_workers(monkeypatch)
    for number in (60, 100, 200, 5000):
        batches = [list(range(start, min(start + 16, number))) for start in range(0, number, 16)]
        replace(encoder, num_workers=8)._loaded(ImageTextDataset.__new__(ImageTextDataset), batches)
    assert asked == [0, 3, 6, 8]


def test_once_images_are_cached_no_worker_loads_and_nothing_is_decoded(
    encoder: Encoder, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, before = encode_images(encoder, pairs), children()
    kept = replace(encoder, num_workers=2, image_cache_dir=tmp_path, kept=KeptWorkers())
    for number in range(3):
        got = encode_images(kept, pairs)
        assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
        assert len(children() - before) == (0 if number else 2)
        monkeypatch.setattr(PixelTransform, "load", lambda *_: pytest.fail("an image is decoded"))
    assert torch.equal(encode_images(replace(kept, kept=None), pairs)[0], want[0])


@pytest.mark.parametrize("name", [SMALL_VIT.name, SMALL_RESNET.name])
def test_pixels_with_their_channels_last_give_the_same_features(name: str) -> None:
    model = make_model(name).eval()
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        want = model.encode_image(images)
        assert torch.equal(model.encode_image(images.contiguous(memory_format=torch.channels_last)), want)
