"""Generators that are seeded, and which of them are left alone."""

import random

import pytest
import torch

from cliptune.runtime.rng import seeded


def test_a_samples_random_numbers_are_its_seeds_and_no_others_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of a GPU either, which the next step draws from."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(5)
    random.seed(5)
    assert seeds == [5]
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    seeds.clear()
    with seeded(7):
        drawn = torch.rand(3)
    assert seeds == []
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(7)), drawn)
