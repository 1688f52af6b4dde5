"""The schedule as it is drawn is the one that is used."""

import logging

import pytest
import torch

from cliptune.training.optim import build_scheduler, load_scheduler_state, schedule_points


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
