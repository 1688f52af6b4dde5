"""How many pairs fit: the estimate, and a memory that really is full."""

import subprocess
import sys

import pytest
import torch

from clip_model import CLIPModel
from cliptune.model.depth import train_last_layers
from cliptune.model.lora import add_lora
from cliptune.training.memory import FREE_MEMORY_FRACTION, LiveTensors, fitting_size, peak_bytes
from tests.helpers.launch import ROOT
from tests.helpers.models import FP32, make_model, small_architectures

__all__ = ["small_architectures"]


def test_live_tensors_are_counted_while_they_live() -> None:
    live = LiveTensors()
    with live:
        first = torch.ones(1000)
        view = first.view(10, 100)
        assert live.peak == 4000
        for _ in range(5):
            first = first + 1  # the next is made while the last one lives, and `view` holds the very first
        del view
        second = torch.zeros(500, dtype=torch.float64)
    assert live.peak == 12000
    assert len(second) == 500


def test_as_many_pairs_fit_as_memory_allows() -> None:
    model, device = make_model("ViT-Mini"), torch.device("cpu")
    parameters = 3 * sum(parameter.nbytes for parameter in model.parameters())
    pair_bytes = (peak_bytes(model, FP32, 16) - peak_bytes(model, FP32, 8)) / 8

    def fitting(num_pairs: float, most: int = 64) -> int | None:
        free = int((parameters + num_pairs * pair_bytes) / FREE_MEMORY_FRACTION)
        return fitting_size(model, precision=FP32, most=most, device=device, free_bytes=free)

    state = torch.get_rng_state()
    assert fitting(1e6) is None
    assert [fitting(number) for number in (-1e6, 20, 44)] == [1, 16, 32]
    assert fitting(44, most=40) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    deep = CLIPModel("ViT-Ti/32")
    plain = peak_bytes(deep, FP32, 4)
    deep.checkpoint_gradients()
    assert peak_bytes(deep, FP32, 4) < 0.5 * plain


def test_what_is_held_below_adapters_and_last_layers_is_counted_as_it_runs() -> None:
    """Adapters stand in every layer, so the backward pass goes through all; above held layers it ends."""
    sizes = []
    for change in (lambda model: None, lambda model: add_lora(model, 2), lambda model: train_last_layers(model, 1)):
        model = CLIPModel("ViT-Ti/32")
        change(model)
        sizes.append((peak_bytes(model, FP32, 8) - peak_bytes(model, FP32, 4)) / 4)
        assert all(parameter.grad is None for parameter in model.parameters())
    whole, with_lora, last = sizes
    assert 0.5 * whole < with_lora < 1.3 * whole
    assert last < 0.7 * whole


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the address space")
def test_memory_that_really_is_full_is_recognised() -> None:
    code = """
import resource, torch
from cliptune.runtime.device import is_out_of_memory
resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2**33, -1))
try:
    torch.ones(2**40)
except Exception as error:
    assert is_out_of_memory(error), error
else:
    raise SystemExit("it fits")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
