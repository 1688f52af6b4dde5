"""The sigmoid loss against its definition, where its bias begins, and what it is by chance."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliptune.training.loss import POSITIVES
from cliptune.training.sigmoid_loss import SigmoidLoss
from tests.helpers.losses import reference_loss, some_ids


def features(batch: int, size: int, seed: int, *, common: float = 0.0) -> Tensor:
    """Random directions; `common`: all near one, as those of a model are."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, size, generator=generator)
    rows[:, 0] += common
    return F.normalize(rows, dim=-1)


@pytest.mark.parametrize("slice_logits", [1, 37 * 17, 2**22])
@pytest.mark.parametrize("positives", POSITIVES)
def test_loss_and_gradient_are_those_of_the_definition(positives: str, slice_logits: int) -> None:
    images = features(37, 24, 1)
    texts = F.normalize(images + features(37, 24, 2), dim=-1)
    image_ids, caption_ids = some_ids(37)
    loss = SigmoidLoss(positives=positives, slice_logits=slice_logits)
    for value, bias in ((0.0, 0.0), (2.3, -10.0), (math.log(100), -40.0)):
        start = (images, texts, torch.tensor(value), torch.tensor(bias))
        inputs = [each.clone().requires_grad_() for each in start]
        expected = reference_loss("siglip", positives, *inputs, image_ids=image_ids, caption_ids=caption_ids)
        wanted = torch.autograd.grad(expected, inputs)
        got, accuracy = loss.with_accuracy(*inputs, image_ids=image_ids, caption_ids=caption_ids)
        assert got.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        assert 0 < accuracy.item() <= 1
        for have, want in zip(torch.autograd.grad(3 * got, inputs), wanted, strict=True):
            assert (have - 3 * want).norm() <= 1e-4 * (3 * want).norm() + 1e-7


def test_it_is_the_published_one() -> None:
    open_clip_loss = pytest.importorskip("open_clip.loss")
    images, texts = features(12, 16, 1), features(12, 16, 2)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    expected = open_clip_loss.SigLipLoss()(images, texts, scale, bias)
    assert SigmoidLoss()(images, texts).item() == pytest.approx(expected.item(), rel=1e-5)
    assert SigmoidLoss()(images, texts, scale.log(), bias).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("common", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("value", [math.log(10), math.log(100)])
def test_the_bias_begins_where_the_mean_probability_is_one_of_the_batch(value: float, common: float) -> None:
    images, texts = features(64, 32, 1, common=common), features(64, 32, 2, common=common)
    scale = torch.tensor(value)
    bias = torch.tensor(SigmoidLoss(slice_logits=64 * 20).initial_bias(images, texts, scale)).requires_grad_()
    probabilities = (scale.exp() * images @ texts.T + bias).sigmoid()
    assert probabilities.mean().item() == pytest.approx(1 / 64, rel=1e-3)
    negatives = probabilities.masked_select(~torch.eye(64, dtype=torch.bool))
    assert negatives.mean().item() == pytest.approx(1 / 64, rel=0.1)
    (gradient,) = torch.autograd.grad(SigmoidLoss()(images, texts, scale, bias), bias)
    assert abs(gradient) < 1e-3


def test_the_bias_begins_at_the_fraction_of_positives() -> None:
    images, texts, ids = features(40, 32, 1), features(40, 32, 2), torch.arange(40) % 10
    for loss, options in (
        (SigmoidLoss(positives="caption"), {"caption_ids": ids}),
        (SigmoidLoss(), {"image_ids": ids}),
    ):
        bias = torch.tensor(loss.initial_bias(images, texts, torch.tensor(2.0), **options)).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(images, texts, torch.tensor(2.0), bias, **options), bias)
        assert abs(gradient) < 1e-3
    same = features(1, 32, 1).expand(6, 32)  # all captions equal: there is no negative
    one = SigmoidLoss(positives="caption").initial_bias(
        same, same, torch.tensor(4.0), caption_ids=torch.zeros(6).long()
    )
    assert math.isfinite(one)


def test_chance_is_the_loss_of_features_that_tell_nothing() -> None:
    same, ids, scale = features(1, 16, 0).expand(24, 16), torch.arange(24) % 8, torch.tensor(3.0)
    for positives, caption_ids in (("pair", None), ("image", ids), ("caption", ids), ("caption", None)):
        loss = SigmoidLoss(positives=positives)
        bias = torch.tensor(loss.initial_bias(same, same, scale, caption_ids=caption_ids))
        found = loss(same, same, scale, bias, caption_ids=caption_ids).item()
        assert found == pytest.approx(loss.chance(24, caption_ids=caption_ids), rel=1e-4)
        assert loss(same, same, scale, bias + 1, caption_ids=caption_ids).item() > found
    assert SigmoidLoss().chance(4096) == pytest.approx(math.log(4096) + 1, rel=1e-3)
