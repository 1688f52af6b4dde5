"""A step waits for no device; what a checkpoint says of how it was computed."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_model import ContrastiveLoss, MultimodalTrainer, SigmoidLoss
from cliptune.model.parallel import clip_gradient
from tests.helpers.models import FP32, make_batch, make_model, small_architectures

__all__ = ["small_architectures"]

META = torch.device("meta")


class Optimizer(torch.optim.SGD):
    """Takes the answer to whether it may step as a tensor, as fused optimisers do, which the meta device has not."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.defaults["fused"] = True

    found_inf: Tensor

    def step(self, closure: Any = None) -> Any:
        """Step as if the gradient were finite."""
        assert self.found_inf.device == META
        del self.found_inf
        super().step(closure)
        self.found_inf = torch.zeros((), device=META)


@pytest.mark.parametrize(
    "make_loss",
    [
        pytest.param(ContrastiveLoss, id="infonce"),
        pytest.param(lambda: ContrastiveLoss(positives="caption"), id="caption", marks=pytest.mark.slow),
        pytest.param(SigmoidLoss, id="sigmoid", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("size", [pytest.param(None, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", ["ViT-Mini", pytest.param("RN-Ti", marks=pytest.mark.slow)])
def test_a_step_reads_no_number_from_its_device(
    name: str, size: int | None, make_loss: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a tensor on "meta" has a shape and no values: whoever asks for one, and would wait for a GPU, gets an error
    model, loss = make_model(name, holds_batchnorm=False), make_loss()
    images, tokens, ids = make_batch(model, 8)
    if loss.needs_bias:
        model.learn_bias()
    model.to(META)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the device has not
    optimizer = Optimizer(model.parameters(), lr=0.1)
    trainer = MultimodalTrainer(
        model, loss, optimizer, precision=FP32, micro_batch_size=size, gradient_clip_norm=1.0, seed=1, ema=0.9
    )
    batch = (images, tokens, ids, torch.arange(8) // 2)
    for _ in range(2):
        result = trainer.train_step(*batch)
    assert result is not None
    assert result.values.device == META
    with pytest.raises(RuntimeError, match="meta"):  # what the others would have met
        bool(result.values.isfinite().all())


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
