"""The sliced loss against plain loops and PyTorch's own gradient."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cliptune.training.loss import POSITIVES, ContrastiveLoss
from tests.helpers.losses import reference_loss, some_ids


def features(batch: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, size, generator=generator), dim=-1)


def loop_loss(images: Tensor, texts: Tensor, scale: float, ids: list[int] | None = None) -> float:
    total, size = 0.0, len(images)
    for i in range(size):
        kept = [j for j in range(size) if j == i or ids is None or ids[j] != ids[i]]
        for queries, keys in ((images, texts), (texts, images)):
            scores = [scale * float(queries[i] @ keys[j]) for j in kept]
            top = max(scores)
            total += top + math.log(sum(math.exp(s - top) for s in scores)) - scale * float(queries[i] @ keys[i])
    return total / (2 * size)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_loss_equals_a_double_loop(temperature: float) -> None:
    images, texts = features(7, 16, 1), features(7, 16, 2)
    assert ContrastiveLoss(temperature)(images, texts).item() == pytest.approx(
        loop_loss(images, texts, 1 / temperature), rel=1e-5
    )
    logit_scale = torch.tensor(1.5)
    expected = loop_loss(images, texts, math.exp(1.5))
    assert ContrastiveLoss()(images, texts, logit_scale).item() == pytest.approx(expected, rel=1e-5)


def test_pairs_of_one_image_are_no_negatives() -> None:
    images, texts, ids = features(5, 16, 1), features(5, 16, 2), [0, 1, 0, 2, 1]
    got = ContrastiveLoss()(images, texts, torch.tensor(2.0), image_ids=torch.tensor(ids)).item()
    assert got == pytest.approx(loop_loss(images, texts, math.exp(2.0), ids), rel=1e-5)
    assert got < ContrastiveLoss()(images, texts, torch.tensor(2.0)).item()


def test_loss_properties() -> None:
    loss, images, texts = ContrastiveLoss(), features(8, 16, 1), features(8, 16, 2)
    order = torch.randperm(8)
    assert torch.allclose(loss(images, texts), loss(images[order], texts[order]), atol=1e-6)
    assert torch.allclose(loss(images, texts), loss(texts, images), atol=1e-6)
    collapsed = features(1, 16, 0).expand(8, 16)
    assert loss(collapsed, collapsed).item() == pytest.approx(math.log(8), rel=1e-5)
    loss(images, texts).backward()
    assert loss.logit_scale.grad is not None
    with pytest.raises(ValueError, match="temperature must be positive"):
        ContrastiveLoss(0.0)
    with pytest.raises(ValueError, match="two equal"):
        loss(images, texts[:3])


def plain_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, ids: Tensor | None) -> Tensor:
    logits = logit_scale.exp() * (images @ texts.T)
    if ids is not None:
        same = ids[:, None] == ids[None, :]
        logits = logits.masked_fill(same.fill_diagonal_(False), -math.inf)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize("slice_logits", [1, 37 * 17, 2**22])
@pytest.mark.parametrize("with_ids", [False, True])
def test_slices_give_pytorchs_own_loss_and_gradient(slice_logits: int, with_ids: bool) -> None:
    images, texts = features(37, 24, 1), features(37, 24, 2)
    texts = F.normalize(images + texts, dim=-1)
    ids = torch.arange(37) % 30 if with_ids else None
    for value in (0.0, 2.66, math.log(100)):
        inputs = (images.clone(), texts.clone(), torch.tensor(value))
        for each in inputs:
            each.requires_grad_()
        expected = plain_loss(inputs[0].double(), inputs[1].double(), inputs[2].double(), ids)
        wanted = torch.autograd.grad(expected, inputs)
        got = ContrastiveLoss(slice_logits=slice_logits)(*inputs, image_ids=ids)
        found = torch.autograd.grad(3 * got, inputs)
        assert got.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        for have, want in zip(found, wanted, strict=True):
            assert (have - 3 * want).norm() <= 1e-4 * (3 * want).norm()


def test_no_slice_is_larger_than_its_budget() -> None:
    class Products(TorchDispatchMode):
        """Notes the largest product of images and texts."""

        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and result.shape[1] == 64:
                self.largest = max(self.largest, result.numel())
            return result

    images = features(64, 16, 1).requires_grad_()
    with Products() as products:
        ContrastiveLoss(slice_logits=20 * 64)(images, features(64, 16, 2)).backward()
    assert 0 < products.largest <= 20 * 64
    with Products() as products:
        ContrastiveLoss()(images, features(64, 16, 2)).backward()
    assert products.largest == 64 * 64


@pytest.mark.parametrize("slice_logits", [1, 2**22])
def test_in_batch_accuracy(slice_logits: int) -> None:
    def accuracy(images: Tensor, texts: Tensor) -> float:
        return ContrastiveLoss(slice_logits=slice_logits).with_accuracy(images, texts)[1].item()

    rows = features(40, 16, 0)
    assert accuracy(rows, rows) == 1
    assert accuracy(rows, rows.roll(1, 0)) == 0
    half = torch.cat([rows[:20], rows[20:].roll(1, 0)])
    assert accuracy(rows, half) == 0.5
    collapsed = rows[:1].expand(40, 16)
    assert accuracy(collapsed, collapsed) == pytest.approx(1 / 40)
    noisy = F.normalize(rows + features(40, 16, 1), dim=-1)
    scores = rows @ noisy.T
    hits = [(scores.argmax(side) == torch.arange(40)).float().mean().item() for side in (0, 1)]
    assert accuracy(rows, noisy) == pytest.approx(sum(hits) / 2)


@pytest.mark.parametrize("slice_logits", [1, 37 * 17, 2**22])
@pytest.mark.parametrize("positives", POSITIVES)
def test_what_is_a_positive_gives_the_loss_and_gradient_of_its_definition(positives: str, slice_logits: int) -> None:
    images, texts = features(37, 24, 1), features(37, 24, 2)
    texts = F.normalize(images + texts, dim=-1)
    image_ids, caption_ids = some_ids(37)
    loss = ContrastiveLoss(positives=positives, slice_logits=slice_logits)
    for ids in ({"image_ids": image_ids, "caption_ids": caption_ids}, {"caption_ids": caption_ids}, {}):
        for value in (0.0, 2.66, math.log(100)):
            inputs = [each.clone().requires_grad_() for each in (images, texts, torch.tensor(value))]
            expected = reference_loss("infonce", positives, *inputs, **ids)
            wanted = torch.autograd.grad(expected, inputs)
            got = loss(*inputs, **ids)
            assert got.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
            for have, want in zip(torch.autograd.grad(got, inputs), wanted, strict=True):
                # a logit of 100 is rounded to 8e-6, and so is what a probability near 1 lacks
                assert (have - want).norm() <= 1e-4 * want.norm() + 1e-5


def test_where_nothing_repeats_all_positives_are_the_same_loss() -> None:
    images, texts = features(40, 16, 1), features(40, 16, 2)
    ids = {"image_ids": torch.randperm(40), "caption_ids": 2**62 - torch.randperm(40)}
    found = []
    for positives in POSITIVES:
        inputs = [each.clone().requires_grad_() for each in (images, texts, torch.tensor(math.log(100)))]
        loss, accuracy = ContrastiveLoss(positives=positives).with_accuracy(*inputs, **ids)
        found.append((loss, accuracy, *torch.autograd.grad(loss, inputs)))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


def test_the_least_loss_of_repeated_captions_and_its_accuracy() -> None:
    classes = torch.arange(32) % 4  # eight pairs of each class: a perfect model has ln 8, and every pair is a hit
    perfect = torch.eye(4)[classes]
    loss = ContrastiveLoss(temperature=0.01, positives="caption")
    found, accuracy = loss.with_accuracy(perfect, perfect, caption_ids=classes)
    assert found.item() == pytest.approx(math.log(8), rel=1e-5)
    assert accuracy.item() == 1
    assert ContrastiveLoss(0.01, positives="pair").with_accuracy(perfect, perfect)[1].item() == pytest.approx(4 / 32)


def test_a_positive_that_scores_highest_is_a_hit() -> None:
    rows = features(40, 16, 0)
    texts, ids = rows.roll(1, 0), torch.arange(40) // 2  # 0 0 1 1 ...: of two neighbours the second finds the first's
    for slice_logits in (1, 2**22):
        loss = ContrastiveLoss(positives="caption", slice_logits=slice_logits)
        assert loss.with_accuracy(rows, texts, caption_ids=ids)[1].item() == 0.5
    assert ContrastiveLoss(positives="image").with_accuracy(rows, texts, image_ids=ids)[1].item() < 0.5


def test_unknown_positives_are_refused() -> None:
    with pytest.raises(ValueError, match="positives must be one of pair, image, caption, got 'text'"):
        ContrastiveLoss(positives="text")
