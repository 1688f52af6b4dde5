"""A step that a signal gives up before it has updated anything."""

import os
import signal
import time
from typing import Any

import pytest
import torch

from clip_model import MultimodalTrainer
from cliptune.runtime.signals import StopSignals
from cliptune.runtime.stopping import Stopped
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.optim import build_optimizer
from tests.helpers.models import FP32, make_batch, make_model, small_architectures
from tests.helpers.runs import assert_same

__all__ = ["small_architectures"]


def trainer_of() -> MultimodalTrainer:
    model = make_model("RN-Ti", holds_batchnorm=False)
    optimizer = build_optimizer(model, learning_rate=1e-2, backbone_lr_scale=1.0, weight_decay=0.1)
    return MultimodalTrainer(
        model, ContrastiveLoss(), optimizer, precision=FP32, micro_batch_size=4, ema=0.9, seed=3, gradient_clip_norm=1
    )


def everything(trainer: MultimodalTrainer) -> dict[str, Any]:
    state = {**trainer.state_dict(), **trainer.model.state_dict(), "step": trainer.global_step}
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_as_if_it_had_not_begun(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, whole = trainer_of(), trainer_of()
    batch = make_batch(trainer.model, 8)
    run_text_tower, is_slow = trainer.model.run_text_tower, [True]

    def slow(*arguments: Any) -> Any:
        if is_slow:  # the images have been through their tower, whose statistics have moved
            os.kill(os.getpid(), number)
            time.sleep(60)
        return run_text_tower(*arguments)

    monkeypatch.setattr(trainer.model, "run_text_tower", slow)
    before, start = everything(trainer), time.monotonic()
    with StopSignals(step_seconds=0.1) as stop:
        trainer.interruptible = stop.within_step
        with pytest.raises(Stopped, match=number.name):
            next(trainer.steps([batch]))
    assert time.monotonic() - start < 10
    assert_same(everything(trainer), before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    is_slow.clear()
    for each in (trainer, whole):
        each.interruptible = StopSignals().within_step
        next(each.steps([batch]))
    assert_same(everything(trainer), everything(whole))


def test_a_compiler_is_interrupted() -> None:
    def slow_backend(graph: Any, _: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return graph.forward

    function = torch.compile(lambda x: 2 * x, backend=slow_backend)
    with StopSignals(step_seconds=0.1) as stop, pytest.raises(Stopped), stop.within_step():
        function(torch.ones(3))
