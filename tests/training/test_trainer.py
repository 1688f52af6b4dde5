"""What a step's numbers hold, how its gradient is clipped; what a checkpoint says of how it was computed."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_model import ContrastiveLoss, MultimodalTrainer, SigmoidLoss
from cliptune.model.parallel import clip_gradient
from cliptune.training.meters import EpochTotals
from tests.helpers.models import FP32, make_batch, make_model, small_architectures

__all__ = ["small_architectures"]

META = torch.device("meta")


@pytest.mark.parametrize("make_loss", [
    ContrastiveLoss, lambda: ContrastiveLoss(positives="caption"), SigmoidLoss,
], ids=["infonce", "caption", "sigmoid"])  # fmt: skip
def test_the_numbers_of_a_step_hold_nothing_else_of_it(make_loss: Callable[..., Any]) -> None:
    model, loss = make_model("ViT-Mini"), make_loss()
    if loss.needs_bias:
        model.learn_bias()
    trainer = MultimodalTrainer(model, loss, torch.optim.SGD(model.parameters(), lr=0.01), precision=FP32)
    features: list[weakref.ref[Tensor]] = []
    with_accuracy = loss.with_accuracy

    def watched(*given: Tensor, **ids: Any) -> Any:
        features.extend(map(weakref.ref, given[:2]))
        return with_accuracy(*given, **ids)

    loss.with_accuracy = watched
    totals = EpochTotals(model.device)
    for _ in range(2):
        result = trainer.train_step(*make_batch(model, 8))
        totals.add(result)
    gc.collect()
    assert [feature() for feature in features] == 4 * [None]
    assert result is not None
    assert not result.values.requires_grad


def test_clipping_waits_for_no_device_and_is_what_it_is_on_the_cpu() -> None:
    gradients = [torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4)]

    def clipped(device: str, max_norm: float) -> tuple[Tensor, list[Tensor]]:
        parameters = [torch.zeros(gradient.shape, device=device) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(device, copy=True)
        norm = clip_gradient(parameters, max_norm)
        return norm, [parameter.grad for parameter in parameters if parameter.grad is not None]

    norm, scaled = clipped("cpu", 1.0)
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    assert torch.allclose(norm, whole.norm())
    assert torch.allclose(torch.cat([gradient.flatten() for gradient in scaled]), whole / whole.norm())
    norm, scaled = clipped("meta", 1.0)
    assert norm.device == scaled[0].device == META


def test_a_checkpoint_tells_whether_the_towers_were_compiled() -> None:
    model = make_model("ViT-Mini")
    trainer = MultimodalTrainer(model, ContrastiveLoss(), torch.optim.SGD(model.parameters()), precision=FP32)
    assert trainer.state_dict()["compiled"] is False
    model.compile_towers()
    assert trainer.state_dict()["compiled"] is True
