"""The schedule as it is drawn is the one that is used."""

import pytest
import torch

from cliptune.training.optim import build_scheduler, schedule_points


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
