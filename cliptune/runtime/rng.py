"""Random numbers that depend on seed, epoch and item alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

IntArray = np.ndarray[Any, np.dtype[np.int64]]
BitArray = np.ndarray[Any, np.dtype[np.uint64]]

STEP_STREAM = 2
"""Of `draw_bits`; data sets draw captions from stream 0 and augmentations from stream 1."""
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (model initialisation draws from them)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of a step, such as dropout's, depend on seed, step and rank alone."""
    bits = draw_bits(seed, step, np.array([rank]), stream=STEP_STREAM)
    torch.manual_seed(int(bits[0] >> np.uint64(1)))


def draw_bits(seed: int, round_number: int, items: IntArray, *, stream: int = 0) -> BitArray:
    """Draw 64 random bits for each item that depend on the four arguments alone, for any number of items at once.

    SplitMix64 (Steele, Lea, Flood 2014) over seed, stream and round gives a start, and over start and item the bits.
    """
    state = np.zeros(1, dtype=np.uint64)
    for value in (seed, stream, round_number):
        state = _split_mix(state + np.uint64(value % 2**64))
    # a counter in place of a state: item 7 has the same bits whoever draws it, in any order, however many are drawn
    return _split_mix(state + items.astype(np.uint64) * _GOLDEN_GAMMA)


def _split_mix(state: BitArray) -> BitArray:
    z = state + _GOLDEN_GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: BitArray = z ^ (z >> np.uint64(31))
    return mixed


class RandomState:
    """The states of all generators that a model or a transform draws from: Python's, PyTorch's, the device's.

    Args:
        device: whose generator counts as well; the CPU's always does.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._python = random.getstate()
        self._cpu = torch.get_rng_state()
        self._of_device: torch.Tensor | None = None
        if device is not None and device.type == "cuda":
            self._of_device = torch.cuda.get_rng_state(device)
        elif device is not None and device.type == "mps":
            self._of_device = torch.mps.get_rng_state()

    def restore(self) -> None:
        """Put all of them back."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        if self._device is None or self._of_device is None:
            return
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._of_device, self._device)
        else:
            torch.mps.set_rng_state(self._of_device)


class seeded:  # noqa: N801  (used as a function)
    """Seed the CPU's generator and `random` for one sample's transform, and put their states back."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self._before = RandomState()
        torch.default_generator.manual_seed(self.seed)  # `torch.manual_seed` seeds a GPU's as well
        random.seed(self.seed)

    def __exit__(self, *_: object) -> None:
        self._before.restore()
