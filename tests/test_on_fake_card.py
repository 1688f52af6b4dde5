"""What the toolkit does on a CUDA device, on one that is not there: every operation fits, and no step waits for it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from clip_model import CLIPModel, ContrastiveLoss, MultimodalTrainer, SigmoidLoss
from cliptune.data.loaders import Batch, pinned
from cliptune.features.ranks import retrieval_ranks
from cliptune.model import attention
from cliptune.model.lora import add_lora
from cliptune.preprocess import transforms
from cliptune.runtime.device import resolve_precision
from cliptune.training.meters import EpochTotals
from cliptune.training.optim import build_optimizer, build_scheduler
from tests.helpers.fake_card import CARD, CardError, FakeCard, fake_card
from tests.helpers.models import make_batch, make_model, small_architectures

__all__ = ["small_architectures"]

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="fake tensors are PyTorch's own affair: this knows those of 2.14"
)


@pytest.fixture(autouse=True)
def _nothing_of_a_card_is_left() -> Iterator[None]:
    yield
    transforms._moments.cache_clear()
    attention.can_attend_packed.cache_clear()


@dataclass
class Case:
    """How a run trains."""

    model: str = "ViT-Mini"
    precision: str = "bf16"
    size: int | None = None
    loss: Any = ContrastiveLoss
    freeze_tower: str | None = None
    lora: bool = False
    checkpointed: bool = False
    capability: tuple[int, int] = (9, 0)
    """Of an H100; 7.5 is a T4's, on which packed attention does not run."""


CASES = {
    "packed": Case(),
    "padded": Case(capability=(7, 5), precision="fp16"),
    "fp32 in micro-batches": Case(precision="fp32", size=3),
    "fp16 in micro-batches": Case(precision="fp16", size=3, loss=lambda: ContrastiveLoss(positives="caption")),
    "ResNet": Case(model="RN-Ti", size=3),
    "sigmoid": Case(model="RN-Ti", precision="fp16", loss=SigmoidLoss),
    "LoRA, checkpointed": Case(lora=True, checkpointed=True, size=4, loss=lambda: ContrastiveLoss(positives="caption")),
    "frozen image tower": Case(freeze_tower="image", size=3),
    "frozen text tower": Case(freeze_tower="text"),
}


def make_trainer(case: Case, card: FakeCard) -> MultimodalTrainer:
    model, loss = make_model(case.model, holds_batchnorm=False, freeze_tower=case.freeze_tower), case.loss()
    if case.lora:
        add_lora(model, 2)
    if loss.needs_bias:
        model.learn_bias()
    if case.checkpointed:
        model.checkpoint_gradients()
    with card.waiting():
        model.to(CARD)
        model.train()
    optimizer = build_optimizer(model, learning_rate=0.1, backbone_lr_scale=None, weight_decay=0.1)
    return MultimodalTrainer(
        model, loss, optimizer, build_scheduler(optimizer, total_steps=9, warmup_fraction=0.2),
        precision=resolve_precision(case.precision, CARD), micro_batch_size=case.size, seed=1, ema=0.9,
    )  # fmt: skip


def batches(model: CLIPModel, case: Case) -> Iterator[Batch]:
    images, tokens, ids = make_batch(model, 8)
    outputs = torch.randn(8, model.architecture.embed_dim)
    images = outputs if case.freeze_tower == "image" else images
    tokens = outputs if case.freeze_tower == "text" else tokens
    for number in range(3):  # the last one is smaller
        own = slice(0, 8 if number < 2 else 5)
        yield pinned(Batch(images[own], tokens[own], ids[own], [], torch.arange(8)[own] // 2, torch.arange(8)[own]))


FAST = {"padded", "frozen text tower"}


@pytest.mark.parametrize("name", [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES
])  # fmt: skip
def test_a_step_waits_for_no_card(name: str) -> None:
    case = CASES[name]
    with fake_card(capability=case.capability) as card:
        trainer = make_trainer(case, card)
        steps, totals = trainer.steps(trainer.fed(batches(trainer.model, case))), EpochTotals(CARD)
        for number in range(3):
            # the first one makes what is made once: colours' means, a try of packed attention, a scale of the loss
            with card.waiting() if number == 0 else nullcontext():
                result = next(steps).result
            totals.add(result)
        assert result is not None
        assert result.values.device == CARD
        with card.waiting():
            assert next(steps, None) is None
            trainer.settle()
            state = trainer.state_dict()
    assert state["micro_batch_size"] == case.size
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter.device == CARD
            assert all(value.device == CARD for value in trainer.optimizer.state[parameter].values())


def test_what_waits_for_a_card_is_found() -> None:
    with fake_card() as card:
        x = torch.ones(3, 4, device=CARD)
        ways: dict[str, list[Callable[[], object]]] = {
            "reads a value": [lambda: x.sum().item(), lambda: bool(x[0, 0] > 0), x.tolist],
            "from the card": [x.cpu, lambda: torch.zeros(3, 4).copy_(x)],
            "to the card": [
                lambda: torch.zeros(3).to(CARD),
                lambda: torch.tensor([1.0, 2.0], device=CARD),
                lambda: torch.zeros(2**17).to(CARD, non_blocking=True),
            ],
            "of the CPU beside": [lambda: x[torch.tensor([0, 2])], lambda: x + torch.ones(3, 4)],
        }
        for message, calls in ways.items():
            for call in calls:
                with pytest.raises(CardError, match=message):
                    call()
        with pytest.raises(RuntimeError):
            x[x > 0]  # as many as are true
        assert torch.zeros(2**17).pin_memory().to(CARD, non_blocking=True).is_cuda
        with card.waiting():
            assert (x.cpu().tolist(), x.sum().item()) == (3 * [4 * [0.0]], 1.0)


def test_a_card_casts_as_a_real_one_does() -> None:
    with fake_card(), torch.autocast("cuda", torch.bfloat16):
        x = torch.ones(2, 4, device=CARD, requires_grad=True)
        linear, norm = (
            torch.nn.Linear(4, 4).to(CARD, non_blocking=True),
            torch.nn.LayerNorm(4).to(CARD, non_blocking=True),
        )
        assert linear(x).dtype == (x @ x.T).dtype == torch.bfloat16
        assert norm(linear(x)).dtype == x.sum().dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert linear(x).dtype == torch.float32
        linear(x).float().sum().backward()
        assert x.grad is not None
        assert (x.grad.device, x.grad.dtype) == (CARD, torch.float32)


@pytest.mark.parametrize("counting", ["flags", "signs"])
def test_ranks_wait_no_longer_for_many_blocks_than_for_one(counting: str) -> None:
    images, texts, waits = torch.randn(600, 8), torch.randn(900, 8), []
    for blocks in ((600, 900), (256, 256)):
        with fake_card() as card, card.waiting():
            found = retrieval_ranks(
                images, texts, torch.arange(900) % 600, device=CARD, blocks=blocks, counting=counting
            )
            waits.append(card.waits)
        assert (found.i2t.device.type, len(found.i2t), len(found.t2i)) == ("cpu", 600, 900)
    assert waits[0] == waits[1] != []
