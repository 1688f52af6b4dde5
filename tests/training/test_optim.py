"""The schedule as it is drawn is the one that is used."""

import logging

import pytest
import torch

from clip_model import CLIPModel
from cliptune.model.lora import add_lora
from cliptune.training.optim import (
    build_optimizer,
    build_scheduler,
    describe_rates,
    load_scheduler_state,
    rates_of,
    schedule_points,
)
from tests.helpers.models import small_architectures

__all__ = ["small_architectures"]


@pytest.mark.parametrize(("total_steps", "warmup_fraction"), [(12, 0.25), (5, 0.0), (1, 0.5), (3000, 0.1)])
def test_the_points_of_a_schedule_are_the_rates_of_its_steps(total_steps: int, warmup_fraction: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = build_scheduler(optimizer, total_steps=total_steps, warmup_fraction=warmup_fraction)
    used = []
    for _ in range(total_steps + 1):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    points = schedule_points(total_steps=total_steps, warmup_fraction=warmup_fraction, peaks=(2.0, 0.02))
    assert len(points) <= 502
    assert [step for step, *_ in points] == sorted({int(step) for step, *_ in points})
    for step, rate, tower_rate in points:
        assert rate == used[int(step)]
        assert tower_rate == pytest.approx(rate / 100)
    assert points[0][0] == 0
    assert points[-1] == (total_steps, 0, 0)
    assert max(rate for _, rate, _ in points) == max(used)


@pytest.mark.parametrize("total_steps", [50, 60, 200])
def test_a_run_that_is_resumed_takes_its_first_step_at_its_own_rate(
    total_steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The rate of a finished run is 0; with more epochs the next step has that of the longer course."""
    before, stored = _optimizer_at(50, total_steps=50)
    resumed = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = build_scheduler(resumed, total_steps=total_steps, warmup_fraction=0.1)
    resumed.load_state_dict(before.state_dict())
    with caplog.at_level(logging.INFO):
        load_scheduler_state(scheduler, stored.state_dict(), step=50)
    unbroken, _ = _optimizer_at(50, total_steps=total_steps)
    assert resumed.param_groups[0]["lr"] == unbroken.param_groups[0]["lr"]
    assert scheduler.get_last_lr() == [resumed.param_groups[0]["lr"]]
    said = f"0 0 to {unbroken.param_groups[0]['lr']:.3g}"
    assert (said in caplog.text) == (total_steps != 50)
    assert bool(caplog.text) == (total_steps != 50)


def _optimizer_at(step: int, *, total_steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = build_scheduler(optimizer, total_steps=total_steps, warmup_fraction=0.1)
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


def rates_by_name(model: CLIPModel, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(parameter): name.removeprefix("backbone.") for name, parameter in model.named_parameters()}
    return {names[id(each)]: group["lr"] for group in optimizer.param_groups for each in group["params"]}


def test_each_layer_has_a_fraction_of_the_rate_above_it() -> None:
    model = CLIPModel("ViT-Mini")
    optimizer = build_optimizer(model, learning_rate=1e-2, backbone_lr_scale=0.1, weight_decay=0.1, layer_decay=0.5)
    rates = rates_by_name(model, optimizer)
    assert rates.keys() == {name.removeprefix("backbone.") for name, _ in model.named_parameters()}
    expected = {
        "image_projection.weight": 1e-2, "logit_scale": 1e-2, "visual.proj": 1e-3, "ln_final.bias": 1e-3,
        "visual.transformer.resblocks.1.ln_1.weight": 5e-4, "transformer.resblocks.1.mlp.c_fc.weight": 5e-4,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 2.5e-4, "transformer.resblocks.0.ln_2.bias": 2.5e-4,
        "visual.conv1.weight": 1.25e-4, "token_embedding.weight": 1.25e-4,
    }  # fmt: skip
    assert {name: rates[name] for name in expected} == pytest.approx(expected)
    assert {group["weight_decay"] for group in optimizer.param_groups if group["name"] == "backbone"} == {0.0, 0.1}
    assert rates_of(optimizer) == pytest.approx({"projection": 1e-2, "backbone": 1e-3})
    said = describe_rates(optimizer)
    assert "projection layers 0.01" in said
    assert "towers 0.001, 0.0005, 0.00025, 0.000125 from the top layer down" in said


def test_without_layer_decay_there_are_the_groups_of_before() -> None:
    """So a run of before can be resumed: its optimiser's state is of the same groups in the same order."""
    optimizer = build_optimizer(CLIPModel("ViT-Mini"), learning_rate=1e-2, backbone_lr_scale=0.1, weight_decay=0.1)
    found = [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [
        ("projection", 1e-2, 0.0), ("backbone", 1e-3, 0.1), ("backbone", 1e-3, 0.0), ("projection", 1e-2, 0.1),
    ]  # fmt: skip


@pytest.mark.parametrize(("scale", "expected"), [(None, 2e-4), (5.0, 5e-4)])
def test_adapters_have_a_rate_of_their_own(scale: float | None, expected: float) -> None:
    model = CLIPModel("ViT-Mini")
    add_lora(model, 2)
    optimizer = build_optimizer(model, learning_rate=1e-4, backbone_lr_scale=scale, weight_decay=0.1)
    assert rates_of(optimizer) == pytest.approx({"projection": 1e-4, "lora": expected})
    assert f"LoRA {expected:.3g}" in describe_rates(optimizer)
