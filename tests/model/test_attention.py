"""Attention on packed rows, by a plain stand-in for the operation that only a GPU has; its shapes."""

import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_model import CLIPModel, ContrastiveLoss
from cliptune.model import attention, modules
from cliptune.model.lora import add_lora
from cliptune.training.gradcache import GradCache
from tests.helpers.models import (
    FP32,
    assert_same_gradients,
    gradients_of,
    make_batch,
    make_model,
    small_architectures,
)

__all__ = ["small_architectures"]

Calls = list[tuple[int, int]]


def has_kernel() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    varlen = importlib.import_module("torch.nn.attention.varlen")
    return "window_size" in inspect.signature(varlen.varlen_attn).parameters


NEEDS_KERNEL = pytest.mark.skipif(not has_kernel(), reason="PyTorch 2.11 or later has packed attention")


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Attention of one sequence after another, with the checks that PyTorch's kernel makes."""
    assert query.ndim == key.ndim == value.ndim == 3
    assert query.dtype == key.dtype == value.dtype
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k)
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    mixed = []
    for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        assert 0 < b - a <= max_q and 0 < d - c <= max_k
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) / query.shape[2] ** 0.5
        if window_size == (-1, 0):
            scores = scores.masked_fill(torch.ones(b - a, d - c, dtype=torch.bool).triu(1), float("-inf"))
        mixed.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[c:d]))
    return torch.cat(mixed)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Let attention run packed here; notes the longest query and key that each call names."""
    calls: Calls = []

    def varlen(*given: Any, **options: Any) -> Tensor:
        assert not any(starts.is_inference() for starts in given[3:5])  # PyTorch's saves them for its backward pass
        calls.append(given[5:7])
        return plain_varlen(*given, **options)

    monkeypatch.setattr(attention, "_varlen_attn", varlen)
    monkeypatch.setattr(modules, "can_attend_packed", lambda *_: True)
    return calls


def gradients(model: CLIPModel, *, size: int | None = None) -> dict[str, Tensor]:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    cache = GradCache(model, ContrastiveLoss(), precision=FP32, size=size, parallel=None, scaler=scaler)
    images, tokens, ids = make_batch(model, 10)
    assert cache.backward(images, tokens, ids) is not None
    return gradients_of(model)


def adapt(model: CLIPModel) -> None:
    torch.manual_seed(5)
    add_lora(model, 4)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("kind", ["plain", "lora", "checkpointed"])
def test_packed_attention_gives_what_padded_gives(
    kind: str, size: int | None, packed: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("ViT-Mini")
    if kind == "lora":
        adapt(model)
    if kind == "checkpointed":
        model.checkpoint_gradients()
    found = gradients(model, size=size)
    assert packed
    with torch.no_grad():
        features = model.encode_text(make_batch(model, 10)[1])
    monkeypatch.setattr(modules, "can_attend_packed", lambda *_: False)
    packed.clear()
    assert_same_gradients(found, gradients(model), tolerance=1e-5)
    with torch.no_grad():
        assert torch.allclose(features, model.encode_text(make_batch(model, 10)[1]), atol=1e-6)
    assert not packed


@pytest.mark.parametrize("change", [{"causal": False}, {"text_pooling": "last"}, {"text_pooling": "first"}])
def test_other_text_towers_are_right_where_attention_runs_packed(
    change: dict[str, Any], packed: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("ViT-Mini")
    backbone = model.backbone
    backbone.text_pooling = change.get("text_pooling", "largest")
    if "causal" in change:
        for module in (backbone.transformer, *backbone.transformer.resblocks):
            module.attn_mask = None
    tokens = make_batch(model, 5)[1]
    with torch.no_grad():
        found = model.encode_text(tokens)
        assert bool(packed) == ("causal" not in change)  # nothing can be left out of a text that sees all positions
        monkeypatch.setattr(modules, "can_attend_packed", lambda *_: False)
        assert torch.allclose(found, model.encode_text(tokens), atol=1e-6)


def random_tokens(size: int, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(3, 78, (size,), generator=generator)
    tokens = torch.randint(1, 400, (size, 77), generator=generator)
    positions = torch.arange(77)
    tokens[positions == lengths[:, None] - 1] = 49407
    return tokens.where(positions < lengths[:, None], 0)


def batches(number: int, size: int) -> Iterator[Tensor]:
    """Texts of random lengths, the last batch of them smaller."""
    generator = torch.Generator().manual_seed(0)
    for index in range(number):
        yield random_tokens(size if index < number - 1 else size // 2, generator)


def test_packed_attention_sees_one_shape_whatever_the_lengths(packed: Calls) -> None:
    model = make_model("ViT-Mini")
    with torch.no_grad():
        for tokens in batches(50, 4):
            model.backbone.encode_text(tokens)
    assert set(packed) == {(77, 77), (1, 77)}  # of all layers but the last, and of the last


@NEEDS_KERNEL
def test_packed_attention_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [torch.device("cpu"), torch.float32, 32]
    assert not attention.can_attend_packed(*asked)
    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    monkeypatch.setattr(attention, "_varlen_attn", None)
    monkeypatch.setattr(attention, "try_packed_attention", lambda *_: True)
    check = attention.can_attend_packed.__wrapped__
    cuda = torch.device("cuda", 0)
    assert check(cuda, torch.bfloat16, 64)
    assert attention._varlen_attn is not None
    assert check(cuda, torch.float16, 80)
    assert not check(cuda, torch.float32, 64)
    assert not check(cuda, torch.bfloat16, 60)
    assert not check(cuda, torch.bfloat16, 136)
    capability[0] = (7, 5)
    assert not check(cuda, torch.float16, 64)


@NEEDS_KERNEL
def test_packed_attention_that_fails_is_said_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def broken(*_: Any) -> bool:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(attention, "try_packed_attention", broken)
    attention.can_attend_packed.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert not attention.can_attend_packed(torch.device("cuda", 0), torch.bfloat16, 64)
    attention.can_attend_packed.cache_clear()
    assert caplog.text.count("packed attention does not work here (no kernel image is available") == 1


@pytest.mark.parametrize("is_there", [False, True])
def test_packed_attention_names_the_pytorch_that_it_needs(
    is_there: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def of_2_10(*given: Any, is_causal: bool = False, return_aux: Any = None) -> Tensor:
        raise AssertionError("not to be called")

    older = types.ModuleType("torch.nn.attention.varlen")
    older.varlen_attn = of_2_10  # type: ignore[attr-defined]
    # a None there is what `import` finds no module for
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", older if is_there else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "_varlen_attn", None)
    with caplog.at_level("INFO"):
        check = attention.can_attend_packed.__wrapped__
        assert not check(torch.device("cuda", 0), torch.bfloat16, 64)
    assert attention._varlen_attn is None
    needed = f"it needs PyTorch 2.11 or later, this is {torch.__version__}"
    assert f"texts are padded for attention: packed attention does not work here ({needed})" in caplog.text


def test_packed_attention_is_tried_before_it_is_used(packed: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            assert attention.try_packed_attention(torch.device("cpu"), dtype, 16)

    def wrong(*given: Any, window_size: tuple[int, int]) -> Tensor:
        return plain_varlen(*given)  # not causal

    monkeypatch.setattr(attention, "_varlen_attn", wrong)
    assert not attention.try_packed_attention(torch.device("cpu"), torch.float32, 16)
