"""Real processes over gloo against one: losses, weights, optimiser state, features."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from clip_model import CLIPModel
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.parallel import can_shard, clip_gradient, parallel_model
from cliptune.preprocess.tokens import tokenize
from tests.helpers.launch import run_ranks
from tests.helpers.models import SMALL_RESNET, SMALL_VIT, assert_same_gradients, make_model, small_architectures
from tests.helpers.worker import train, train_adapted

__all__ = ["small_architectures"]


@pytest.fixture(scope="module")
def one_process() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        for shape in (SMALL_RESNET, SMALL_VIT):
            patch.setitem(ARCHITECTURES, shape.name, shape)
        yield {name: train(name, "ddp", None) for name in ("ViT-Mini", "RN-Ti")}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_train_as_one_does(world_size: int, one_process: dict[str, Any], tmp_path: Path) -> None:
    """DDP and FSDP2, in micro-batches (and there with a whole state taken over half-way) and without."""
    done = run_ranks(world_size, "tests/helpers/worker.py", "train", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == (6 if can_shard() else 3)
    for file in files:
        got, expected = torch.load(file), one_process[file.stem.split("-", 1)[1].rsplit("-", 2)[0]]
        tolerance = 1e-5 if "ViT" in file.stem else 1e-4
        assert_same_gradients(got["gradients"], expected["gradients"], tolerance)
        assert got["losses"] == pytest.approx(expected["losses"], abs=1e-5), file.name
        assert got["weights"].keys() == expected["weights"].keys()
        for name, want in expected["weights"].items():
            if want.is_floating_point() and not is_key_bias(name):
                assert (got["weights"][name] - want).norm() <= 2e-4 * want.norm(), (file.name, name)
        moments, wanted = (result["optimizer"]["state"] for result in (got, expected))
        assert [value["exp_avg"].shape for value in moments.values()] == [
            value["exp_avg"].shape for value in wanted.values()
        ]
        for ours, theirs in zip(got["features"], expected["features"], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
def test_processes_train_adapters_as_one_does(tmp_path: Path) -> None:
    """With rates by layer; with DDP an average as well, which shards go without."""
    done = run_ranks(2, "tests/helpers/worker.py", "adapted", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == (2 if can_shard() else 1)
    for file in files:
        got, expected = torch.load(file), train_adapted("ViT-Mini", file.stem, None)
        assert got.keys() == expected.keys()
        moved = make_model("ViT-Mini").state_dict()
        for name, want in expected.items():
            if want.is_floating_point():
                assert (got[name] - want).norm() <= 2e-4 * want.norm(), (file.name, name)
        assert not torch.equal(
            expected["backbone.visual.transformer.resblocks.0.mlp.c_fc.weight"],
            moved["backbone.visual.transformer.resblocks.0.mlp.c_fc.weight"],
        )


@pytest.mark.slow
def test_losses_over_processes_are_those_of_their_definition(tmp_path: Path) -> None:
    """With every kind of positives, some of them in other ranks; under DDP and FSDP2."""
    done = run_ranks(3, "tests/helpers/worker.py", "losses", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_losses_are_scaled_in_several_processes(tmp_path: Path) -> None:
    done = run_ranks(2, "tests/helpers/worker.py", "scaled", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


def is_key_bias(name: str) -> bool:
    """Tell biases whose true gradient is zero, and which AdamW moves all the same, by rounding."""
    return name.endswith(("in_proj_bias", "k_proj.bias"))


@pytest.mark.parametrize("device_norm", [0.5, 5.0])
def test_clipping_is_pytorchs(device_norm: float) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), ())]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad *= device_norm / norm
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    clip_gradient(parameters, 1.0)
    ours = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for got, parameter in zip(ours, parameters, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(got, parameter.grad, rtol=1e-5)


@pytest.mark.skipif(not can_shard(), reason="PyTorch 2.7 or later shards")
def test_a_sharded_model_still_packs_its_texts() -> None:
    """FSDP's own hooks are no reason to run on all positions."""
    model = CLIPModel("ViT-Mini", pretrained="none")
    tokens, _ = tokenize(["a dog", "a cat"])
    with torch.no_grad():
        expected = model.encode_text(tokens)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with mock.patch("cliptune.model.parallel.world_size", lambda: 2):  # of one alone, which shards nothing
            parallel_model(model, "fsdp", torch.device("cpu"))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert torch.allclose(model.encode_text(tokens), expected, atol=1e-6)
    finally:
        dist.destroy_process_group()
    shape = model.architecture
    # 12 products of width x width a layer, in the last but two for the pooled rows alone
    rows = int((tokens != 0).sum())
    most = 2 * shape.transformer_width**2 * 12 * rows * shape.transformer_layers
    assert 0 < counter.get_total_flops() < most
