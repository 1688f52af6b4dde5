"""How far features have moved: what overlap and cosine say, and what they are measured on."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cliptune.features.drift import Drift, ProbeFeatures, drift_between, encode_probes, generic_texts, neighbour_overlap
from cliptune.features.encode import Encoder
from data_loader import ImageTextDataset
from tests.helpers.models import FP32, SMALL_VIT, make_model, small_architectures  # noqa: F401


def random_features(num: int, seed: int, size: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(num, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_overlap_is_that_of_sets_of_neighbours() -> None:
    before, after = random_features(30, 1), random_features(30, 2)

    def nearest(features: torch.Tensor, item: int) -> set[int]:
        order = sorted(range(30), key=lambda other: -float(features[item] @ features[other]))
        return set([other for other in order if other != item][:4])

    shares = [len(nearest(before, item) & nearest(after, item)) / 4 for item in range(30)]
    assert neighbour_overlap(before, after, k=4) == pytest.approx(100 * sum(shares) / 30)


def test_features_that_are_turned_as_a_whole_keep_their_neighbours_and_not_their_cosines() -> None:
    before = random_features(40, 1)
    turned = before @ torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
    drift = drift_between(ProbeFeatures(before, before), ProbeFeatures(turned, before))
    assert drift.text_overlap == drift.image_overlap == 100
    assert drift.image_cosine == pytest.approx(1)
    assert abs(drift.text_cosine) < 0.5


@pytest.mark.parametrize(("overlap", "word"), [(95.0, "hardly anything"), (75.0, "part of what"), (40.0, "much of")])
def test_the_line_says_what_the_lower_overlap_means(overlap: float, word: str) -> None:
    line = Drift(99.0, overlap, 0.9, 0.8, 200, 32, 5).describe()
    assert f"{overlap:.0f}% among 32 drawn scenes" in line
    assert word in line


def test_the_generic_texts_are_distinct() -> None:
    texts = generic_texts()
    assert len(set(texts)) == len(texts) == 200
    assert all(text == text.strip() and text for text in texts)


@pytest.mark.slow
@pytest.mark.usefixtures("small_architectures")
def test_batches_do_not_matter_and_a_model_that_is_another_has_moved() -> None:
    model = make_model(SMALL_VIT.name).eval()
    encoder = Encoder(model, ImageTextDataset, precision=FP32, batch_size=64)
    probes = encode_probes(encoder)
    assert probes.texts.shape == (200, 64)
    assert probes.images.shape == (32, 64)
    others = encode_probes(replace(encoder, batch_size=17))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(probes, others, strict=True))
    same = drift_between(probes, probes)
    assert same.text_overlap == same.image_overlap == 100
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    moved = drift_between(probes, encode_probes(encoder))
    assert moved.text_overlap < 60
    assert moved.text_cosine < 0.9
