"""Micro-batches against the whole batch: the gradient of every parameter, and what happens when memory is full."""

import logging
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clip_model import CLIPModel, MultimodalTrainer
from cliptune.runtime.device import Precision, resolve_precision
from cliptune.runtime.rng import RandomState
from cliptune.training.gradcache import GradCache
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.optim import build_optimizer
from cliptune.training.sigmoid_loss import SigmoidLoss
from tests.helpers.losses import reference_loss
from tests.helpers.models import (
    FP16,
    FP32,
    FullMemory,
    assert_same_gradients,
    gradients_of,
    make_batch,
    make_model,
    plain_loss,
    small_architectures,
)

__all__ = ["small_architectures"]


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection goes through all that the other tests hold; what fails here is freed without."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def grad_cache(model: CLIPModel, loss: ContrastiveLoss, size: int | None) -> GradCache:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return GradCache(model, loss, precision=FP32, size=size, parallel=None, scaler=scaler)


def micro_batched(
    model: CLIPModel, batch: tuple[Tensor, ...], size: int | None, loss: ContrastiveLoss | None = None
) -> dict[str, Tensor]:
    assert grad_cache(model, loss or ContrastiveLoss(), size).backward(*batch) is not None
    return gradients_of(model)


def plain(
    model: CLIPModel, batch: tuple[Tensor, ...], chunk: int | None = None, *, wrong: str = ""
) -> dict[str, Tensor]:
    """PyTorch's own gradient of the whole batch, whose features come in chunks of a size if that matters (dropout)."""
    images, tokens, ids = batch
    model.zero_grad(set_to_none=True)
    rows = [slice(start, start + (chunk or len(ids))) for start in range(0, len(ids), chunk or len(ids))]
    features = [model(images[each], tokens[each]) for each in rows]
    if wrong == "negatives of the chunk alone":
        losses = [
            plain_loss(pair[0], pair[1], model.logit_scale, ids[each])
            for pair, each in zip(features, rows, strict=True)
        ]
        torch.stack(losses).mean().backward()
    else:
        images, texts = (torch.cat(side) for side in zip(*features, strict=True))
        plain_loss(images, texts, model.logit_scale, ids).backward()
    if wrong == "temperature k times":
        assert model.logit_scale.grad is not None
        model.logit_scale.grad *= len(rows)
    return gradients_of(model)


@pytest.mark.parametrize(("name", "tolerance"), [("ViT-Mini", 1e-5), ("RN-Ti", 1e-4)])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("size", [21, 11, 7, 3, 8])  # 1, 2, 3 and 7 micro-batches; a last one of 5 or 10 pairs
def test_the_gradient_is_the_whole_batchs(name: str, tolerance: float, dropout: bool, size: int) -> None:
    model = make_model(name, dropout=dropout)
    batch = make_batch(model, 21)
    torch.manual_seed(5)
    wanted = plain(model, batch, size if dropout else None)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert_same_gradients(micro_batched(model, batch, size), wanted, tolerance)
    assert torch.equal(torch.get_rng_state(), state)  # as if every micro-batch had run once


class NotedCopies:
    """Copies that are right once they are finished."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_waiting = 0

    def start(self, images: Tensor) -> tuple[Tensor, Any]:
        self.log.append(f"copy {len(images)}")
        self.num_waiting += 1
        return torch.zeros_like(images), images

    def finish(self, copied: Tensor, begun: Any) -> None:
        self.num_waiting -= 1
        copied.copy_(begun)

    def __call__(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self.log.append(f"run {len(inputs[0])}")


def test_the_pixels_of_the_next_micro_batch_are_copied_while_one_is_computed() -> None:
    model = make_model("ViT-Mini")
    batch = make_batch(model, 8)
    wanted = micro_batched(model, batch, 3)
    cache = grad_cache(model, ContrastiveLoss(), 3)
    assert cache.copier is None  # on the CPU nothing is copied
    cache.copier = copies = NotedCopies()
    model.backbone.visual.register_forward_pre_hook(copies)
    assert cache.backward(*batch) is not None
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients_of(model).items())
    first_pass = ["copy 3", "run 3", "copy 2", "run 3", "copy 3", "run 2"]
    assert copies.log == [*first_pass, "copy 3", "run 3", "run 3"]
    assert copies.num_waiting == 0
    FullMemory(model, pairs=2, at=1)  # with a copy on its way, of a size that does not come again
    assert cache.backward(*batch) is not None
    assert cache.size == 1
    assert_same_gradients(gradients_of(model), wanted, 1e-5)


@pytest.mark.parametrize("wrong", ["temperature k times", "negatives of the chunk alone"])
def test_known_mistakes_would_be_seen(wrong: str) -> None:
    model = make_model("ViT-Mini")
    batch = make_batch(model, 21)
    mistaken = plain(model, batch, 7, wrong=wrong)
    with pytest.raises(AssertionError):
        assert_same_gradients(mistaken, plain(model, batch), 1e-5)


def test_masks_of_dropout_that_are_not_replayed_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("ViT-Mini", dropout=True)
    batch = make_batch(model, 21)
    torch.manual_seed(5)
    wanted = plain(model, batch, 7)
    monkeypatch.setattr(RandomState, "restore", lambda self: None)
    torch.manual_seed(5)
    with pytest.raises(AssertionError):
        assert_same_gradients(micro_batched(model, batch, 7), wanted, 1e-5)


@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_checkpointed_gradients_are_the_same_bits(name: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = make_model(name, holds_batchnorm=False, dropout=True)
        if checkpointed:
            model.checkpoint_gradients()
        torch.manual_seed(5)
        statistics = [buffer.clone() for buffer in model.buffers()]
        found.append((micro_batched(model, make_batch(model, 12), 5), [buffer.clone() for buffer in model.buffers()]))
    for gradient_name, gradient in found[0][0].items():
        assert torch.equal(gradient, found[1][0][gradient_name]), gradient_name
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))
    assert (name == "RN-Ti") == any(not torch.equal(*pair) for pair in zip(statistics, found[0][1], strict=True))


def test_checkpointing_keeps_less() -> None:
    model = make_model("ViT-Mini-64")
    kept = []
    for checkpointed in (False, True):
        if checkpointed:
            model.checkpoint_gradients()
        images, tokens, _ = make_batch(model, 8)
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(images, tokens)
        kept.append(sum(sizes))
    assert kept[1] < 0.3 * kept[0]


def test_batch_statistics_are_counted_once_a_micro_batch() -> None:
    model, other = (make_model("RN-Ti", holds_batchnorm=False) for _ in range(2))
    batch = make_batch(model, 12)
    micro_batched(model, batch, 5)
    with torch.no_grad():
        for rows in (slice(0, 5), slice(5, 10), slice(10, 12)):
            other.encode_image(batch[0][rows])
    assert model.backbone.visual.bn1.num_batches_tracked == 3
    for (name, buffer), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(buffer, expected, rtol=1e-5), name


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
@pytest.mark.parametrize("positives", ["pair", "image", "caption"])
def test_micro_batches_know_all_positives_of_the_batch(kind: str, positives: str) -> None:
    model = make_model("ViT-Mini")
    if kind == "siglip":
        model.learn_bias()
    images, tokens, image_ids = make_batch(model, 21)
    ids = {"image_ids": image_ids, "caption_ids": torch.arange(21) % 6}
    image_features, text_features = model(images, tokens)
    reference_loss(
        kind, positives, image_features, text_features, model.logit_scale, model.logit_bias, **ids
    ).backward()
    wanted = gradients_of(model)
    assert ("logit_bias" in wanted) == (kind == "siglip")
    loss = {"infonce": ContrastiveLoss, "siglip": SigmoidLoss}[kind](positives=positives)
    for size in (21, 8, 3):
        assert_same_gradients(micro_batched(model, (images, tokens, *ids.values()), size, loss), wanted, 1e-4)


def test_of_texts_of_the_same_tokens_any_is_as_good_a_target_as_all() -> None:
    """What docs/TRAINING.md says of InfoNCE: they have one feature, so only the sum of their targets counts."""
    model = make_model("ViT-Mini")
    images, tokens, _ = make_batch(model, 21)
    classes = torch.arange(21) % 4
    batch = images, tokens[classes], torch.arange(21), classes
    wanted = micro_batched(model, batch, 21, ContrastiveLoss(positives="pair"))
    assert_same_gradients(micro_batched(model, batch, 21, ContrastiveLoss(positives="caption")), wanted, 1e-3)
    model.learn_bias()
    wanted = micro_batched(model, batch, 21, SigmoidLoss(positives="pair"))
    with pytest.raises(AssertionError):
        assert_same_gradients(micro_batched(model, batch, 21, SigmoidLoss(positives="caption")), wanted, 1e-1)


def test_a_loss_with_a_bias_needs_a_model_with_one() -> None:
    model = make_model("ViT-Mini")
    with pytest.raises(ValueError, match=r"needs a model with a logit_bias: call its learn_bias\(\)"):
        micro_batched(model, make_batch(model, 4), 4, SigmoidLoss())


@pytest.mark.parametrize("size", [21, 8])
def test_the_bias_begins_by_a_batch_and_nothing_else_moves(size: int) -> None:
    model = make_model("RN-Ti", holds_batchnorm=False)
    model.learn_bias()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    steps = grad_cache(model, SigmoidLoss(), size)
    images, tokens, ids = make_batch(model, 21)
    assert steps.start_bias(images, tokens, ids)
    assert torch.equal(torch.get_rng_state(), random)
    assert [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])] == ["logit_bias"]
    assert not steps.start_bias(images[:0], tokens[:0], ids[:0])
    result = steps.backward(images, tokens, ids)
    assert result is not None
    if size == 21:  # a BatchNorm that trains normalises a micro-batch the same way in both
        assert gradients_of(model)["logit_bias"].abs() < 1e-3


def trainer_of(model: CLIPModel, size: int | None, *, precision: Precision = FP32, **options: Any) -> MultimodalTrainer:
    optimizer = build_optimizer(model, learning_rate=1e-3, backbone_lr_scale=1.0, weight_decay=0.1)
    return MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=precision, micro_batch_size=size, **options)


def four_steps(model: CLIPModel, *, smaller_from: int | None = None) -> MultimodalTrainer:
    """Train on micro-batches of 8 pairs, from a step on of 4."""
    batch, trainer = make_batch(model, 24), trainer_of(model, 8)
    torch.manual_seed(3)
    for step in range(4):
        if step == smaller_from:
            trainer.grad_cache.size = 4
        trainer.train_step(*batch)
    return trainer


@cache
def weights_of_four_steps(smaller_from: int) -> dict[str, Tensor]:
    model = make_model("ViT-Mini", dropout=True)
    four_steps(model, smaller_from=smaller_from)
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("at", range(10, 17))
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_full_memory_halves_the_micro_batch_and_repeats_the_step(
    at: int, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """A step of 3 micro-batches runs 5 towers: the failure is in the third step's first or second pass, or after it."""
    wanted = weights_of_four_steps(at // 5)
    model = make_model("ViT-Mini", dropout=True)
    FullMemory(model, pairs=4, at=at, kind=kind)
    assert four_steps(model).grad_cache.size == 4
    assert "out of memory with micro-batches of 8 pairs: going on with 4" in caplog.text
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


class _Failing(torch.autograd.Function):
    """The identity, whose gradient `fail` may refuse."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, fail: Callable[[], None]) -> Tensor:
        ctx.fail = fail
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.fail()
        return gradients[0], None


class FullOnce:
    """Fails like a full memory at the nth call of a tower's forward or backward pass or of the loss, and never again.

    Attributes:
        kept: tensors that were alive when it failed, if they still are.
        num_kept: how many of them are alive at the next call.
    """

    def __init__(self, trainer: MultimodalTrainer, where: str, at: int) -> None:
        self.left, self.kept, self.num_kept = at, [], None  # type: int, list[weakref.ref[Tensor]], int | None
        model: Any = trainer.model
        loss: Any = trainer.grad_cache.loss
        run, compute = model.run_image_tower, loss.with_accuracy

        def tower(images: Tensor) -> Tensor:
            features = run(images)
            if where == "forward":
                self(features)
            return _Failing.apply(features, self) if where == "backward" else features  # type: ignore[no-any-return]

        def with_accuracy(*features: Tensor, **options: Any) -> Any:
            result = compute(*features, **options)
            if where == "loss":
                self(*features[:2])
            return result

        model.run_image_tower, loss.with_accuracy = tower, with_accuracy

    def __call__(self, *held: Tensor) -> None:
        if self.kept and self.num_kept is None:
            self.num_kept = sum(each() is not None for each in self.kept)
        self.left -= 1
        if self.left == -1:
            filled = torch.zeros(1000)  # in the frame of what fails
            self.kept = [weakref.ref(tensor) for tensor in (filled, *held)]
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("name", "precision", "where", "at"),
    [
        ("ViT-Mini", FP16, "backward", 3),
        ("ViT-Mini", FP16, "loss", 1),
        *(
            pytest.param(name, precision, where, at, marks=pytest.mark.slow)
            for name in ("ViT-Mini", "RN-Ti")
            for precision in (FP16, FP32)
            for where, at in [("forward", 4), ("forward", 5), ("backward", 2), ("backward", 3), ("loss", 1)]
        ),
    ],
)
def test_a_step_that_ran_out_of_memory_is_as_if_it_had_not(
    name: str, precision: Precision, where: str, at: int
) -> None:
    """The second of two steps fails, in its first or second pass, the backward pass or the loss: 2 parts, 3 runs."""
    wanted = state_of_two_steps(name, precision)
    trainer = trainer_without_steps(name, precision)
    batch, failing = make_batch(trainer.model, 8), FullOnce(trainer, where, at)
    torch.manual_seed(3)
    for _ in range(2):
        trainer.train_step(*batch)
    assert failing.num_kept == 0  # their memory was free when the step was repeated
    assert trainer.grad_cache.size == 2
    assert trainer.scaler.state_dict() == wanted[1]
    assert torch.equal(torch.get_rng_state(), wanted[2])
    assert all(torch.equal(value, wanted[0][key]) for key, value in trainer.model.state_dict().items())


def trainer_without_steps(name: str, precision: Precision) -> MultimodalTrainer:
    trainer = trainer_of(make_model(name, holds_batchnorm=False, dropout=True), 4, precision=precision)
    if precision.scaled:
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "growth_interval": 2})
    return trainer


@cache
def state_of_two_steps(name: str, precision: Precision) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Weights, scaler and random state after a step in parts of 4 pairs and one in parts of 2."""
    trainer = trainer_without_steps(name, precision)
    batch = make_batch(trainer.model, 8)
    torch.manual_seed(3)
    trainer.train_step(*batch)
    trainer.grad_cache.size = 2
    trainer.train_step(*batch)
    return trainer.model.state_dict(), trainer.scaler.state_dict(), torch.get_rng_state()


@pytest.mark.slow
def test_the_statistics_of_a_step_that_is_repeated_are_counted_once() -> None:
    model, other = (make_model("RN-Ti", holds_batchnorm=False) for _ in range(2))
    FullMemory(model, pairs=4, at=2)
    for each, size in ((model, 8), (other, 4)):
        micro_batched(each, make_batch(each, 24), size)
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), other.buffers(), strict=True))


def test_one_pair_that_does_not_fit_is_an_error_with_ways_out(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("ViT-Mini")
    FullMemory(model, pairs=0, at=0)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(MemoryError, match=r"one pair does not fit.*gradient_checkpointing"),
    ):
        trainer_of(model, None).train_step(*make_batch(model, 8))
    assert [line.rsplit(" ", 1)[1] for line in caplog.messages] == ["4", "2", "1"]


def test_other_errors_are_not_taken_for_full_memory() -> None:
    model = make_model("ViT-Mini")

    def broken(images: Tensor) -> Any:
        raise RuntimeError("shapes do not fit")

    model.run_image_tower = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer_of(model, None).train_step(*make_batch(model, 8))


def test_low_precision_comes_through_as_well() -> None:
    """The copies of the weights that the pass without a graph leaves behind must not be used by the pass with one."""
    model = make_model("ViT-Mini")
    batch = make_batch(model, 12)
    precision = resolve_precision("bf16", torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for size in (None, 5):
        steps = GradCache(model, ContrastiveLoss(), precision=precision, size=size, parallel=None, scaler=scaler)
        steps.backward(*batch)
        found.append(gradients_of(model))
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 0.1 * gradient.norm() + 1e-4, name


class Casts(TorchDispatchMode):
    """Counts the casts of a tensor to another type."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.place, self.number = tensor.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.place
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_micro_batches_share_the_casts_of_the_weights(checkpointed: bool) -> None:
    model = make_model("ViT-Mini")
    if checkpointed:
        model.checkpoint_gradients()
    weight = model.backbone.transformer.resblocks[0].mlp.c_fc.weight
    scaler, precision = torch.amp.GradScaler("cpu", enabled=False), resolve_precision("bf16", torch.device("cpu"))
    found, numbers = [], []
    for each_by_itself in (False, True):
        cache = GradCache(model, ContrastiveLoss(), precision=precision, size=2, parallel=None, scaler=scaler)
        cache.towers_are_collective = each_by_itself  # as it is for shards
        with Casts(weight) as casts:
            assert cache.backward(*make_batch(model, 10)) is not None
        found.append(gradients_of(model))
        numbers.append(casts.number)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
    # the first four without a graph, the last, three replays, and the one that adds up all ranks' gradients
    assert numbers[0] == (6 if checkpointed else 4)
    assert numbers[1] > numbers[0]


def test_scaled_losses_give_the_gradient_and_a_step_that_overflows_changes_nothing() -> None:
    half = Precision("fp16", torch.float16, scaled=True)
    model = make_model("ViT-Mini")
    batch = make_batch(model, 8)
    wanted = micro_batched(model, batch, None)
    trainer = MultimodalTrainer(
        model, ContrastiveLoss(), build_optimizer(model, learning_rate=1e-3, backbone_lr_scale=None, weight_decay=0.1),
        precision=half, micro_batch_size=3, gradient_clip_norm=0,
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    overflowing = trainer.train_step(*batch)
    assert overflowing is not None
    assert not overflowing.values.isfinite().all()
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**10})
    assert trainer.train_step(*batch) is not None
    found = gradients_of(model)  # unscaled
    difference = torch.stack([(found[name] - want).norm() for name, want in wanted.items()]).norm()
    assert difference < 0.02 * torch.stack([want.norm() for want in wanted.values()]).norm()
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
