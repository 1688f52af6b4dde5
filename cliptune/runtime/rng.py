"""Random numbers that depend on seed, epoch and item alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (model initialisation draws from them)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


IntArray = np.ndarray[Any, np.dtype[np.int64]]


BitArray = np.ndarray[Any, np.dtype[np.uint64]]


def draw_bits(seed: int, round_number: int, items: IntArray, *, stream: int = 0) -> BitArray:
    """Draw 64 random bits for each item that depend on the four arguments alone, for any number of items at once.

    SplitMix64 (Steele, Lea, Flood 2014) over seed, stream and round gives a start, and over start and item the bits.
    """
    state = np.zeros(1, dtype=np.uint64)
    for number in (seed, stream, round_number):
        state = _split_mix(state + np.uint64(number % 2**64))
    return _split_mix(state + items.astype(np.uint64) * _GOLDEN_GAMMA)


def _split_mix(state: BitArray) -> BitArray:
    z = state + _GOLDEN_GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: BitArray = z ^ (z >> np.uint64(31))
    return mixed


class seeded:  # noqa: N801  (used as a function)
    """Seed `torch` and `random` for one sample's transform, and put their states back."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.states = torch.get_rng_state(), random.getstate()
        torch.manual_seed(self.seed)
        random.seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.states[0])
        random.setstate(self.states[1])
