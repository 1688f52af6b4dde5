"""Towers that are compiled: how often, what they give, and where they are not."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.compilers import nop
from torch.nn.attention import sdpa_kernel

from clip_model import CLIPModel
from cliptune.model import attention, modules, programs, towers
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.lora import add_lora
from cliptune.model.modules import VisionTransformer
from cliptune.runtime.device import compiler_issue, is_out_of_memory
from cliptune.training.memory import _try_step
from tests.helpers.models import FP32, gradients_of, make_batch, make_model, small_architectures
from tests.model.test_attention import plain_varlen, random_tokens

__all__ = ["small_architectures"]

CPU = torch.device("cpu")


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile whole towers here, as on a GPU."""
    monkeypatch.setattr(towers, "WHOLE_ON", {"cpu"})


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compile with a backend that runs what it is given, and counts."""
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()

    @cache
    def program(function: Callable[..., Tensor], *, dynamic: bool | None = None) -> Any:
        return torch.compile(function, dynamic=dynamic, backend=counter)

    monkeypatch.setattr(programs, "_program", program)
    yield counter
    torch.compiler.reset()


def run(model: CLIPModel, tokens: Tensor, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return features and gradients of images of noise and these texts."""
    model.zero_grad()
    size = model.image_resolution
    generator = torch.Generator().manual_seed(len(tokens))
    images = torch.randint(0, 256, (len(tokens), 3, size, size), generator=generator, dtype=torch.uint8)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        image, text = model(images, tokens)
    logits = 10 * image @ text.T
    torch.nn.functional.cross_entropy(logits, torch.arange(len(tokens))).backward()
    return {"image": image.detach(), "text": text.detach(), **gradients_of(model)}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Features within the tolerance; gradients within that part of their own norm, or of a part of the whole's."""
    assert found.keys() == wanted.keys()
    gradients = [value for name, value in wanted.items() if name not in {"image", "text"}]
    whole = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for name, want in wanted.items():
        difference = (found[name] - want).norm()
        if name in {"image", "text"}:
            assert difference <= tolerance * want.norm(), name
        else:
            assert difference <= max(tolerance * want.norm(), 0.1 * tolerance * whole), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
@pytest.mark.usefixtures("whole")
def test_a_tower_is_compiled_once_whatever_comes(name: str, counter: Any) -> None:
    model = make_model(name)
    generator = torch.Generator().manual_seed(0)
    # an epoch has a smaller last batch, and of some batches an image cannot be read
    batches = [random_tokens({9: 3, 17: 5, 28: 1, 29: 2}.get(index, 6), generator) for index in range(30)]
    wanted = [run(model, tokens) for tokens in batches[-2:]]
    model.compile_towers()
    found = [run(model, tokens) for tokens in batches]
    assert counter.frame_count == 2  # one of images, one of texts
    for got, want in zip(found[-2:], wanted, strict=True):
        assert_close(got, want, 1e-5)
    equally_long = random_tokens(1, generator).repeat(6, 1)
    run(model, equally_long)
    assert counter.frame_count == 2
    with torch.no_grad():  # as micro-batches run for the first time
        for tokens in batches[:5]:
            model(torch.zeros(len(tokens), 3, 64, 64, dtype=torch.uint8), tokens)
    assert counter.frame_count == 4
    model.eval()
    with torch.no_grad():
        model(torch.zeros(6, 3, 64, 64, dtype=torch.uint8), batches[0])
    assert counter.frame_count == 4  # features of one model do not depend on a compiler


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
@pytest.mark.usefixtures("whole")
def test_a_trial_of_micro_batches_compiles_what_the_run_then_uses(name: str, counter: Any) -> None:
    model = make_model(name, holds_batchnorm=False)
    model.compile_towers()
    generator = torch.Generator().manual_seed(0)
    texts = random_tokens(5, generator)
    for num_pairs in (4, 6):
        _try_step(model, FP32, num_pairs, texts)
    assert counter.frame_count == 2
    run(model, random_tokens(3, generator))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.usefixtures("whole")
def test_packed_attention_is_compiled_once_and_adapters_too(counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in_for_pytorchs_operation(monkeypatch)
    model = make_model("ViT-Mini")
    add_lora(model, 4)
    for parameter in (p for name, p in model.named_parameters() if name.endswith("lora_B")):
        torch.nn.init.normal_(parameter, std=0.1)
    generator = torch.Generator().manual_seed(0)
    batches = [random_tokens(3 if index == 6 else 4, generator) for index in range(8)]
    packed = [run(model, tokens) for tokens in batches[-2:]]
    monkeypatch.setattr(modules, "can_attend_packed", lambda *_: False)
    padded = [run(model, tokens) for tokens in batches[-2:]]
    monkeypatch.setattr(modules, "can_attend_packed", lambda *_: True)
    model.compile_towers()
    compiled = [run(model, tokens) for tokens in batches][-2:]
    assert counter.frame_count == 2
    for want, *others in zip(padded, packed, compiled, strict=True):
        for got in others:
            assert_close(got, want, 1e-4)


def use_stand_in_for_pytorchs_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `varlen_attn` itself run on the CPU, which has no kernel for it, with all it does around its kernel."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, starts_q, starts_k, max_q, max_k, causal = given[:8]
        window = (-1, 0) if causal else (-1, -1)
        mixed = plain_varlen(query, key, value, starts_q, starts_k, max_q, max_k, window_size=window)
        lse = torch.zeros(query.shape[1], len(query))
        return mixed, lse, torch.zeros(2, dtype=torch.uint64)

    def backward(*given: Any) -> tuple[Tensor, ...]:
        gradient, query, key, value, _, _, starts_q, starts_k, _, _, causal = given[:11]
        parts: list[tuple[Tensor, ...]] = []
        for (a, b), (c, d) in zip(*(starts.unfold(0, 2, 1).tolist() for starts in (starts_q, starts_k)), strict=True):
            g, q, k, v = (x.transpose(0, 1) for x in (gradient[a:b], query[a:b], key[c:d], value[c:d]))  # [heads, L, d]
            scores = q @ k.mT / q.shape[2] ** 0.5
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(1) if causal else torch.zeros(b - a, d - c).bool()
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            of_weights = g @ v.mT
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) / q.shape[2] ** 0.5
            parts.append(tuple(x.transpose(0, 1) for x in (of_scores @ k, of_scores.mT @ q, weights.mT @ g)))
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
    monkeypatch.setattr(attention, "_varlen_attn", varlen.varlen_attn)
    monkeypatch.setattr(modules, "can_attend_packed", lambda *_: True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
@pytest.mark.usefixtures("whole")
def test_compiled_towers_give_what_others_give(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT by the compiler's own machine code; a ResNet by what comes before it, since that takes minutes."""
    if compiler_issue(CPU) is not None:
        pytest.skip("no C++ compiler")
    torch.compiler.reset()
    shape = ARCHITECTURES[name]
    depth = {"vision_layers": 1, "transformer_layers": 1} if shape.is_vit else {"vision_layers": (1, 1, 1, 1)}
    monkeypatch.setitem(ARCHITECTURES, name, replace(shape, **depth))
    if not shape.is_vit:
        program = cache(partial(torch.compile, backend="aot_eager_decomp_partition"))
        monkeypatch.setattr(programs, "_program", program)
    model = make_model(name)
    _, tokens, _ = make_batch(model, 6)
    if name == "RN-Ti":  # its text tower is a ViT's: outputs in its place
        tokens = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    exact = run(model, tokens)
    eager = run(model, tokens, dtype=dtype)
    model.compile_towers()
    compiled = run(model, tokens, dtype=dtype)
    if dtype == torch.float32:
        assert_close(compiled, exact, 1e-4)
    else:  # rounded elsewhere, but not more than what runs layer by layer
        for key, want in exact.items():
            allowed = 2 * (eager[key] - want).norm() + 0.01 * want.norm() + 1e-4
            assert (compiled[key] - want).norm() <= allowed, key


@pytest.mark.slow
@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("cause", ["checkpointing", "device"])
def test_some_are_compiled_block_by_block(cause: str, counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("ViT-Mini")
    tokens = random_tokens(4, torch.Generator().manual_seed(0))
    wanted = run(model, tokens)
    if cause == "checkpointing":
        model.checkpoint_gradients()
    else:
        monkeypatch.setattr(towers, "WHOLE_ON", {"cuda"})
    model.compile_towers()
    assert not model.backbone.compiled
    assert_close(run(model, tokens), wanted, 1e-5)
    assert counter.frame_count == 2  # all but the last of each tower, which has two


@pytest.mark.usefixtures("whole")
def test_towers_that_are_sharded_or_touched_are_not_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("ViT-Mini")
    model.compile_towers()
    assert model.backbone.compiled
    ran: list[Any] = []
    monkeypatch.setattr(programs, "_run_compiled", lambda function, module, *given: ran.append(module))
    handle = model.backbone.visual.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    model.run_image_tower(torch.zeros(2, 3, 64, 64))
    assert not ran
    handle.remove()
    model.run_image_tower(torch.zeros(2, 3, 64, 64))
    assert isinstance(ran[0], VisionTransformer)
    model.eval()
    assert not model.backbone.compiled
    model.backbone.transformer.resblocks[0].unshard = lambda: None  # as FSDP gives it one
    model.train()
    assert not model.backbone.compiled
    assert model.backbone.transformer.compiled


@pytest.mark.slow
def test_the_choice_of_kernels_is_part_of_a_program() -> None:
    def attend(query: Tensor) -> Tensor:
        with sdpa_kernel(attention.GPU_KERNELS):
            return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    torch.compiler.reset()
    query = torch.randn(2, 2, 5, 8)
    # a graph break would split a tower at every layer
    assert torch.allclose(torch.compile(attend, backend="aot_eager", fullgraph=True)(query), attend(query), atol=1e-6)


EXTENTS = ("towers", "blocks", "checkpointed blocks")


def about_to_be_compiled(extent: str, monkeypatch: pytest.MonkeyPatch) -> tuple[CLIPModel, Tensor, dict[str, Tensor]]:
    """Return a model whose next run is compiled, texts, and what it gives without."""
    monkeypatch.setattr(towers, "WHOLE_ON", {"cpu"} if extent == "towers" else {"cuda"})
    model = make_model("ViT-Mini")
    tokens = random_tokens(3, torch.Generator().manual_seed(0))
    wanted = run(model, tokens)
    if extent == "checkpointed blocks":
        model.checkpoint_gradients()
    model.compile_towers()
    return model, tokens, wanted


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_compiler_that_fails_is_said_once_and_left(
    extent: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokens, wanted = about_to_be_compiled(extent, monkeypatch)

    def broken(*_: Any) -> Any:
        raise torch._dynamo.exc.InternalTorchDynamoError("Triton is missing\nmore")

    monkeypatch.setattr(programs, "_program", lambda *_, **__: broken)
    assert model.is_compiled
    for _ in range(2):
        assert_close(run(model.train(), tokens), wanted, 1e-6)  # a run calls `train` after each evaluation
    assert caplog.text.count("the compiler fails on this model (Triton is missing") == 1
    assert not model.is_compiled


@pytest.mark.parametrize("extent", EXTENTS)
def test_memory_that_is_full_while_a_program_is_compiled_does_not_end_compiling(
    extent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller micro-batch is tried, compiled as well."""
    model, tokens, _ = about_to_be_compiled(extent, monkeypatch)

    def full(*_: Any) -> Any:
        raise torch._dynamo.exc.InternalTorchDynamoError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(programs, "_program", lambda *_, **__: full)
    with pytest.raises(RuntimeError) as error:
        run(model, tokens)
    assert is_out_of_memory(error.value)
    assert model.is_compiled


def test_a_checkpointed_block_runs_again_as_it_ran_before_the_compiler_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise torch._dynamo.exc.InternalTorchDynamoError("Triton is missing")

    def program(block: Any, rows: Tensor, layout: Any) -> Tensor:
        ran.append(torch.is_grad_enabled())
        return modules._run_block(block, rows, layout)

    ran: list[bool] = []
    model, tokens, wanted = about_to_be_compiled("checkpointed blocks", monkeypatch)
    # that of the image tower comes first, and has sizes of its own
    monkeypatch.setattr(programs, "_program", lambda _, *, dynamic: broken if dynamic else program)
    assert_close(run(model, tokens), wanted, 1e-6)
    assert len(ran) == 2
    assert not model.is_compiled


@pytest.mark.slow
@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.skipif(
    not hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"), reason="PyTorch compiles it later"
)
def test_a_backward_pass_that_cannot_be_compiled_is_left_as_well(
    extent: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokens, wanted = about_to_be_compiled(extent, monkeypatch)

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of resource: shared memory")

    backend = aot_autograd(fw_compiler=nop, bw_compiler=broken)
    monkeypatch.setattr(programs, "_program", lambda function, **_: torch.compile(function, backend=backend))
    torch.compiler.reset()
    assert_close(run(model, tokens), wanted, 1e-6)
    assert caplog.text.count("the compiler fails on this model") == 1
