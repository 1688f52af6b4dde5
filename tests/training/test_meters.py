"""A step whose loss or gradient is not finite changes nothing, is named, and ends the run or is left out."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_model import MultimodalTrainer
from cliptune.model.lora import add_lora
from cliptune.model.parallel import clip_gradient
from cliptune.runtime.device import resolve_precision
from cliptune.training.gradcache import GradCache
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.meters import OVERFLOWS_IN_A_ROW, EpochTotals, StepResult, StepWatch
from cliptune.training.optim import build_optimizer, build_scheduler, load_scaler_state
from cliptune.training.sigmoid_loss import SigmoidLoss
from tests.helpers.models import FP16, make_batch, make_model, small_architectures
from tests.helpers.no_float64 import NoFloat64

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)
FINE, NO_LOSS, NO_GRADIENT = (1.0, 0.5, 2.0, 14.0), (math.nan, 0.0, math.nan, 14.0), (1.0, 0.5, math.inf, 14.0)
__all__ = ["small_architectures"]


def make_trainer(name: str = "ViT-Mini", **settings: Any) -> MultimodalTrainer:
    model = make_model(name, holds_batchnorm=name == "ViT-Mini")
    optimizer = build_optimizer(model, learning_rate=1e-3, backbone_lr_scale=0.3, weight_decay=0.1)
    scheduler = build_scheduler(optimizer, total_steps=10, warmup_fraction=0)
    return MultimodalTrainer(model, ContrastiveLoss(), optimizer, scheduler, precision=FP32, **settings)


def batches(trainer: MultimodalTrainer, *, bad: set[int], num_batches: int = 4) -> Iterator[tuple[Tensor, ...]]:
    for step in range(1, num_batches + 1):
        images, tokens, ids = make_batch(trainer.model, 6)
        yield (images.float() * math.nan if step in bad else images), tokens, ids + 100 * step


def everything(trainer: MultimodalTrainer) -> list[Tensor]:
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [value.clone() for value in (*trainer.model.parameters(), *trainer.model.buffers(), *moments)]


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_a_bad_step_changes_no_weight_no_moment_no_statistic(name: str, fused: bool, clip: float) -> None:
    trainer = make_trainer(name, gradient_clip_norm=clip)
    if not fused:
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3)
    first, second, third = batches(trainer, bad={2}, num_batches=3)
    trainer.train_step(*first)
    before = everything(trainer)
    trainer.train_step(*second)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True))
    assert trainer.global_step == 2
    trainer.train_step(*third)
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], everything(trainer)[:3], strict=True))
    assert all(value.isfinite().all() for value in everything(trainer))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["ViT-Mini", pytest.param("RN-Ti", marks=pytest.mark.slow)])
def test_an_overflow_in_fp16_costs_a_step_and_halves_the_scale(name: str, fused: bool) -> None:
    """With clipping, adapters and an average, which must not see a gradient that is still scaled, or not finite."""
    model = make_model(name, holds_batchnorm=name == "ViT-Mini")
    add_lora(model, 4)
    optimizer = build_optimizer(model, learning_rate=1e-3, backbone_lr_scale=0.3, weight_decay=0.1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not fused:
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
    watch = StepWatch(scaled=True)
    trainer = MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=FP16, watch=watch, ema=0.9)
    batch = make_batch(model, 6)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**60})
    assert trainer.average is not None
    before = [value.clone() for value in (*everything(trainer), *trainer.average.tensors.values())]
    skipped = next(trainer.steps([batch])).result
    assert skipped is not None
    assert skipped.loss.isfinite()
    assert not skipped.values[2].isfinite()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert not any(moment.any() for moment in moments)
    after = [*model.parameters(), *model.buffers(), *trainer.average.tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.scaler.get_scale() == 2.0**59
    norms = []
    for scale in (2.0**4, 2.0**8):  # what is trained with does not depend on it
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale})
        result = trainer.grad_cache.backward(*batch)
        trainer.scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item())
        trainer.scaler.update()
        assert result is not None
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert next(trainer.steps([batch])).result is not None
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=False))
    assert [math.isfinite(record.gradient_norm) for record in watch.take()] == [False, True]  # it is counted
    assert watch.num_skipped == 1


def test_a_run_that_goes_on_counts_on_the_steps_that_it_has_skipped() -> None:
    trainer, resumed = (make_trainer(watch=StepWatch(skip=1)) for _ in range(2))
    taken = [step.result for step in trainer.steps(batches(trainer, bad={2, 4}))]
    assert len(taken) == 4
    assert [record.is_skipped for record in trainer.watch.take()] == [False, True, False, True]
    state = trainer.state_dict()
    assert state["num_skipped_steps"] == 2
    resumed.load_state_dict({**state, "global_step": 4})
    list(resumed.steps(batches(resumed, bad={2}, num_batches=2)))
    assert resumed.watch.num_skipped == 3
    del state["num_skipped_steps"], state["num_skipped_in_a_row"]  # as runs of before they were counted have it
    resumed.load_state_dict({**state, "global_step": 4})
    assert (resumed.watch.num_skipped, resumed.watch.num_in_a_row) == (0, 0)


def test_steps_in_a_row_are_those_before_and_after_a_run_goes_on() -> None:
    trainer, resumed = (make_trainer(watch=StepWatch(skip=2)) for _ in range(2))
    list(trainer.steps(batches(trainer, bad={3, 4})))
    resumed.load_state_dict({**trainer.state_dict(), "global_step": 4})
    with pytest.raises(FloatingPointError, match="step 5"):
        list(resumed.steps(batches(resumed, bad={1}, num_batches=1)))


def test_a_run_that_goes_on_in_fp16_begins_with_a_scale_of_its_own() -> None:
    state = make_trainer().state_dict()["scaler_state_dict"]
    scaler = torch.amp.GradScaler("cpu")
    load_scaler_state(scaler, state)
    assert scaler.get_scale() == 2.0**16
    load_scaler_state(scaler, {**scaler.state_dict(), "scale": 4.0})
    assert scaler.get_scale() == 4.0
    with pytest.raises(ValueError, match="loss scale that is no number"):
        load_scaler_state(scaler, {**scaler.state_dict(), "scale": math.nan})
    load_scaler_state(torch.amp.GradScaler("cpu", enabled=False), scaler.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("make_loss", [
    ContrastiveLoss, lambda: ContrastiveLoss(positives="caption"), SigmoidLoss,
], ids=["infonce", "caption", "sigmoid"])  # fmt: skip
def test_a_step_needs_no_float64(make_loss: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device is in the place of the GPU."""
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # it does not know this device
    model, loss = make_model("ViT-Mini"), make_loss()
    images, tokens, ids = make_batch(model, 8)
    if loss.needs_bias:
        model.learn_bias()
    steps = GradCache(
        model.to("meta"), loss, precision=FP32, size=3, parallel=None, scaler=torch.amp.GradScaler("cpu", enabled=False)
    )
    batch = (images, tokens, ids, torch.arange(8) // 2)
    with NoFloat64("meta"), pytest.raises(TypeError, match="no float64"):  # it would be seen
        steps.backward(*batch)
    monkeypatch.setattr("cliptune.runtime.device._WITHOUT_FLOAT64", {"meta"})
    with NoFloat64("meta"):
        assert steps.backward(*batch) is not None
        clip_gradient(model.parameters(), 1.0)


def test_a_gradient_that_is_not_finite_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    backward = trainer.grad_cache.backward

    def overflow(*batch: Any) -> Any:
        result = backward(*batch)
        assert trainer.model.image_projection.weight.grad is not None
        trainer.model.image_projection.weight.grad[0, 0] = math.inf
        return result

    monkeypatch.setattr(trainer.grad_cache, "backward", overflow)
    before = everything(trainer)
    with pytest.raises(FloatingPointError, match=r"a loss of \d\.\d+ and a gradient of norm inf"):
        trainer.train_epoch(batches(trainer, bad=set()))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=False))


def test_the_run_stops_and_says_where() -> None:
    trainer = make_trainer(watch=StepWatch(name_samples=lambda ids: [f"{index}.jpg" for index in ids.tolist()]))
    with pytest.raises(FloatingPointError) as error:
        trainer.train_epoch(batches(trainer, bad={2, 3}))
    rates = "rates: projection 0.000976, backbone 0.000293"
    assert str(error.value).startswith("step 2 has a loss of nan and a gradient of norm nan (" + rates)
    for part in ("scale of the logits: 14.", "and 3 more) and changed no weight", "--skip_nonfinite", "untouched"):
        assert part in str(error.value)
    ids = [*batches(trainer, bad=set())][1][2][:3].tolist()
    assert "samples: " + ", ".join(f"{index}.jpg" for index in ids) in str(error.value)


@pytest.mark.slow
def test_steps_in_a_row_are_left_out_as_if_they_were_not_there(caplog: pytest.LogCaptureFixture) -> None:
    trainer, plain = make_trainer(watch=StepWatch(skip=2)), make_trainer()
    trainer.scheduler = plain.scheduler = None  # which counts every step
    result = trainer.train_epoch(batches(trainer, bad={2, 3}))
    first, *_, last = batches(plain, bad=set())
    expected = plain.train_epoch([first, last])
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True))
    assert [record.getMessage()[:25] for record in caplog.records] == [
        "skipped (1 in a row): ste", "skipped (2 in a row): ste",
    ]  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step 7 has"):
        trainer.train_epoch(batches(trainer, bad={1, 2, 3}))
    trainer.watch = StepWatch(skip=2)
    trainer.train_epoch(batches(trainer, bad={1, 2, 4}))


def test_an_epoch_without_a_finite_loss_is_no_epoch() -> None:
    with pytest.raises(FloatingPointError, match="no loss of the epoch is finite"):
        trainer = make_trainer(watch=StepWatch(skip=9))
        trainer.train_epoch(batches(trainer, bad={1, 2}, num_batches=2))


def test_the_totals_of_an_epoch_leave_non_finite_steps_out() -> None:
    totals = EpochTotals(CPU)
    for values in (FINE, NO_LOSS, (4.0, 0.2, 1.0, 14.0)):
        totals.add(result_of(1, values))
    totals.add(None)
    assert (totals.num_batches, totals.num_pairs) == (4, 18)
    assert totals.mean().loss == pytest.approx(2.5)
    assert totals.mean().accuracy == pytest.approx(35)


def result_of(step: int, values: tuple[float, ...], device: str = "cpu") -> StepResult:
    return StepResult(step, 6, {"projection": 1e-4}, torch.tensor(values, device=device))


def test_every_step_is_read_with_its_numbers() -> None:
    watch = StepWatch()
    watch.add(result_of(3, FINE), None, seconds=0.5)
    assert watch.take() == [(3, 1.0, 0.5, 2.0, 14.0, {"projection": 1e-4}, 6, 0.5)]
    assert watch.take() == []


def test_another_device_is_read_now_and_then_and_at_the_end() -> None:
    class Slow(torch.Tensor):
        """Says that it is on another device, which a read waits for."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    watch = StepWatch(interval=3)

    def add(step: int, values: tuple[float, ...] = FINE) -> None:
        result = result_of(step, values)
        watch.add(result._replace(values=result.values.as_subclass(Slow)), torch.arange(4))

    taken = []
    for step in (1, 2, 3, 4, 5):
        add(step)
        taken.append(len(watch.take()))
    assert taken == [0, 0, 3, 0, 0]
    watch.read()
    assert [record.step for record in watch.take()] == [4, 5]
    add(7)
    add(8, NO_LOSS)
    with pytest.raises(FloatingPointError, match=r"step 8 .*samples: 4\)"):
        add(9)


@pytest.mark.parametrize(("scaled", "values"), [(True, NO_LOSS), (False, NO_GRADIENT), (False, NO_LOSS)])
def test_what_is_no_overflow_of_scaling_stops_at_once(scaled: bool, values: tuple[float, ...]) -> None:
    with pytest.raises(FloatingPointError):
        StepWatch(scaled=scaled).add(result_of(1, values), None)


def test_overflows_of_scaled_gradients_are_how_the_scale_is_found(caplog: pytest.LogCaptureFixture) -> None:
    watch = StepWatch(scaled=True)
    with caplog.at_level(logging.INFO):
        for step in range(OVERFLOWS_IN_A_ROW):
            watch.add(result_of(step, NO_GRADIENT), None)
    assert not caplog.records
    with pytest.raises(FloatingPointError):
        watch.add(result_of(99, NO_GRADIENT), None)
