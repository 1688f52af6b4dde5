"""The average of the weights, against its formula."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from clip_model import ContrastiveLoss, MultimodalTrainer
from cliptune.model import parallel
from cliptune.model.parallel import can_shard, parallel_model
from cliptune.training.average import WeightAverage
from cliptune.training.optim import build_optimizer
from tests.helpers.models import FP32, make_batch, make_model, small_architectures

__all__ = ["small_architectures"]
DECAY = 0.25


def trainer_with_average() -> MultimodalTrainer:
    model = make_model("ViT-Mini")
    optimizer = build_optimizer(model, learning_rate=1e-2, backbone_lr_scale=0.5, weight_decay=0.1)
    return MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=FP32, ema=DECAY)


def weights(trainer: MultimodalTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.slow
def test_the_average_is_the_formulas() -> None:
    """d is (1 + t) / (10 + t) until that is above the decay: 2/11, 3/12, and from the second step on 0.25."""
    trainer = trainer_with_average()
    expected = weights(trainer)
    for decay in (2 / 11, DECAY, DECAY, DECAY):
        trainer.train_step(*make_batch(trainer.model, 6))
        now = weights(trainer)
        expected = {name: decay * value + (1 - decay) * now[name] for name, value in expected.items()}
    assert trainer.average is not None
    assert not torch.equal(expected["logit_scale"], now["logit_scale"])
    for name, value in expected.items():
        assert torch.allclose(trainer.average.tensors[name], value, atol=1e-6), name
    with trainer.averaged():
        assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in weights(trainer).items())
        state = trainer.model_state()  # and not the other way round
    assert all(torch.equal(value, now[name]) for name, value in weights(trainer).items())
    assert all(torch.equal(state[name], now[name]) for name in now)
    assert all(torch.equal(trainer.model_state()[name], trainer.average.tensors[name]) for name in now)


def test_a_skipped_step_does_not_count_and_frozen_weights_are_not_averaged() -> None:
    trainer = trainer_with_average()
    average = trainer.average
    assert average is not None
    trainer.train_step(*make_batch(trainer.model, 6))
    before = {name: value.clone() for name, value in average.tensors.items()}
    images, *rest = make_batch(trainer.model, 6)
    trainer.train_step(images.float().fill_(torch.nan), *rest)
    assert trainer.global_step == 2
    assert all(torch.equal(value, before[name]) for name, value in average.tensors.items())
    model = make_model("ViT-Mini")
    model.backbone.requires_grad_(False)
    assert set(WeightAverage(model, 0.9).tensors) == {
        "logit_scale", "image_projection.weight", "text_projection.weight",
    }  # fmt: skip


def test_an_average_of_other_parameters_is_refused() -> None:
    average = WeightAverage(make_model("ViT-Mini"), 0.9)
    with pytest.raises(ValueError, match="other parameters"):
        average.load_state_dict({"logit_scale": torch.tensor(1.0)})


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process be the ranks of a run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("ranks")
@pytest.mark.skipif(not can_shard(), reason="needs PyTorch 2.7")
def test_an_average_of_shards_is_refused() -> None:
    model = make_model("ViT-Mini")
    parallel_model(model, "fsdp", torch.device("cpu"))
    optimizer = build_optimizer(model, learning_rate=1e-2, backbone_lr_scale=0.5, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"ema does not go with a sharded model \(FSDP\)"):
        MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=FP32, ema=DECAY)
    MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=FP32)
