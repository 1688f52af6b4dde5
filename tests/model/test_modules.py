"""The towers as modules: hooks, adapters, modules that others put in, traces, exports, transforms, types, copies."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

from clip_model import CLIPModel
from cliptune.model import attention
from cliptune.model.attention import GPU_KERNELS, QuickGELU, attend
from cliptune.model.towers import build_backbone, layers_of
from cliptune.preprocess.tokens import tokenize
from cliptune.runtime.openai_clip import import_clip
from tests.helpers.models import SMALL_RESNET, SMALL_VIT, OpenAI, own_forward, small_architectures, stir

__all__ = ["small_architectures"]

TOKENS, _ = tokenize(["a dog", "a much longer text about a dog and a cat, on a mat", "a"])
LONGER, _ = tokenize(["a photo of an old man who looks at the sea", "word " * 90, "b", "c", "two red circles"])
PIXELS = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
MORE_PIXELS = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
BATCH = torch.export.Dim("batch", max=2**20)
"""A free batch size. PyTorch 2.6 refuses one without a bound, since it guards against the largest integer."""


def make(name: str = "ViT-Mini", **options: Any) -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(name, pretrained="none", **options)
    stir(model.backbone)
    with torch.no_grad():  # a ResNet's branches start as zero
        for key, buffer in model.named_buffers():
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model.eval()


class Norms(TorchFunctionMode):
    """Notes the dimensions of what LayerNorms see."""

    def __init__(self) -> None:
        super().__init__()
        self.dimensions: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm:
            self.dimensions.append(args[0].ndim)
        return func(*args, **(kwargs or {}))


def is_plain(model: CLIPModel, tower: str) -> bool:
    """Tell by what the norms of blocks see: sequences of all positions, or rows."""
    with torch.no_grad(), Norms() as norms:
        model.backbone.encode_image(PIXELS) if tower == "image" else model.backbone.encode_text(TOKENS)
    return bool(norms.dimensions[1] == 3)  # an image has one before its first block


def shapes_seen(root: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[Any, ...]]:
    seen, handles = {}, []
    for name, module in root.named_modules():

        def note(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
            seen[name] = tuple(
                tuple(value.shape) for value in (*given, *(output if isinstance(output, tuple) else (output,)))
                if isinstance(value, Tensor)
            )  # fmt: skip

        handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_hooks_see_what_they_see_in_openais_class(name: str) -> None:
    model = make(name)
    backbone, own = model.backbone, OpenAI(model.backbone).clip
    for encode, inputs in (("encode_image", PIXELS), ("encode_text", TOKENS)):
        expected = shapes_seen(own, lambda: getattr(own, encode)(inputs))  # noqa: B023
        found = shapes_seen(backbone, lambda: getattr(backbone, encode)(inputs))  # noqa: B023
        assert found.keys() >= expected.keys()
        assert {key: found[key] for key in expected} == expected
        extra = {key.split(".")[-1] for key in found.keys() - expected.keys()}  # OpenAI's does not call these
        assert extra <= {"out_proj", "q_proj", "k_proj", "v_proj", "c_proj"}
    assert not is_plain(model, "text")  # hooks that are gone leave nothing behind


def hook_a_block(tower: Any) -> Any:
    tower.transformer.resblocks[0].register_forward_hook(lambda module, given, output: output * 0.5)


def hook_attention(tower: Any) -> Any:
    # reads the output as a tuple, as PyTorch's attention gives it
    tower.transformer.resblocks[-1].attn.register_forward_hook(lambda module, given, output: (output[0] * 2, output[1]))


def hook_before_a_norm(tower: Any) -> Any:
    def shift(module: nn.Module, given: Any) -> Any:
        assert given[0].ndim == 3
        return (given[0].roll(1, 0),)  # from position to position

    tower.transformer.resblocks[-1].ln_1.register_forward_pre_hook(shift)


def hook_all_blocks(tower: Any) -> Any:
    tower.transformer.resblocks.register_forward_hook(lambda module, given, output: output.flip(0))


def put_in_a_block(tower: Any) -> Any:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(0, keepdim=True)  # [L, B, D]

    tower.transformer.resblocks[1] = nn.Sequential(tower.transformer.resblocks[1], Mean())


def put_in_an_mlp(tower: Any) -> Any:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.roll(1, 0)

    tower.transformer.resblocks[0].mlp.add_module("shift", Shift())


def put_a_forward_on_attention(tower: Any) -> Any:
    attn = tower.transformer.resblocks[0].attn
    attn.forward = lambda query, key, value, **options: (value.cumsum(0), None)


def put_another_attention_method(tower: Any) -> Any:
    block = tower.transformer.resblocks[0]
    block.attention = lambda x: x.mean(0, keepdim=True).expand_as(x)


def mask_an_image_block(tower: Any) -> Any:
    length = len(tower.positional_embedding)
    mask = torch.zeros(length, length)
    mask[:, 1] = -torch.inf
    for block in tower.transformer.resblocks:
        block.attn_mask = mask


def prune_weights(tower: Any) -> Any:
    prune.random_unstructured(tower.transformer.resblocks[0].mlp.c_fc, "weight", amount=0.5)


def parametrize_weights(tower: Any) -> Any:
    parametrizations.weight_norm(tower.transformer.resblocks[0].mlp.c_proj)


def parametrize_attention(tower: Any) -> Any:
    nn.utils.parametrize.register_parametrization(tower.transformer.resblocks[0].attn, "in_proj_weight", Halved())


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


CHANGES = [
    hook_a_block, hook_attention, hook_before_a_norm, hook_all_blocks, put_in_a_block, put_in_an_mlp,
    put_a_forward_on_attention, put_another_attention_method, mask_an_image_block, prune_weights, parametrize_weights,
    parametrize_attention,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_what_others_do_to_a_tower_does_what_it_does_to_openais(change: Callable[[Any], Any], tower: str) -> None:
    model = make()
    backbone, own = model.backbone, OpenAI(model.backbone).clip
    encode, inputs = ("encode_image", PIXELS) if tower == "image" else ("encode_text", TOKENS)
    with torch.no_grad():
        before = getattr(backbone, encode)(inputs)
        for clip in (backbone, own):
            torch.manual_seed(3)
            change(clip.visual if tower == "image" else clip)
        expected, found = (getattr(clip, encode)(inputs) for clip in (own, backbone))
        other, others = ("encode_text", TOKENS) if tower == "image" else ("encode_image", PIXELS)
    assert torch.allclose(found, expected, atol=1e-5)
    is_same = change is parametrize_weights  # which only splits length and direction
    assert torch.allclose(found, before, atol=1e-4) == is_same
    assert torch.allclose(getattr(backbone, other)(others), getattr(own, other)(others), atol=1e-5)


def test_one_touched_tower_leaves_the_other_packed() -> None:
    model = make()
    assert not is_plain(model, "image")
    assert not is_plain(model, "text")
    handle = model.backbone.transformer.resblocks[1].ln_2.register_full_backward_hook(lambda *given: None)
    assert is_plain(model, "text")
    assert not is_plain(model, "image")
    handle.remove()
    assert not is_plain(model, "text")
    handle = model.backbone.visual.register_forward_hook(lambda *given: None)  # sees pixels and outputs, no positions
    assert not is_plain(model, "image")
    handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *given: None)
    assert is_plain(model, "image")
    everywhere.remove()
    assert not is_plain(copy.deepcopy(model), "text")
    assert not is_plain(pickle.loads(pickle.dumps(model)), "text")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_row_wise_layers_leave_a_tower_packed() -> None:
    model = make()
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not (is_plain(small, "image") or is_plain(small, "text"))
    with torch.no_grad():
        assert torch.allclose(small.encode_text(TOKENS), model.encode_text(TOKENS), atol=0.05)
    peft = pytest.importorskip("peft")
    for targets, expected in ((["c_fc", "c_proj", "out_proj"], False), (["attn"], True)):
        adapted = copy.deepcopy(model)
        peft.get_peft_model(adapted, peft.LoraConfig(target_modules=targets))
        assert is_plain(adapted, "image") == is_plain(adapted, "text") == expected


def test_attention_weights_are_to_be_had() -> None:
    model = make()
    own = OpenAI(model.backbone).clip
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    for index, clip in enumerate((own, model.backbone)):
        attn = clip.transformer.resblocks[0].attn
        attn.register_forward_pre_hook(lambda m, a, options: (a, {**options, "need_weights": True}), with_kwargs=True)
        attn.register_forward_hook(lambda m, a, output, index=index: found[index].append(output[1]))
        with torch.no_grad():
            clip.encode_text(TOKENS)
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert found[0][0].shape == (3, 77, 77)


@pytest.mark.parametrize("arguments", [
    {"need_weights": True}, {"need_weights": True, "average_attn_weights": False}, {"need_weights": False},
    {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu_(1)}, {"key_padding_mask": torch.eye(2, 5).bool()},
    {"attn_mask": torch.randn(5, 5), "need_weights": False},
])  # fmt: skip
def test_attention_is_pytorchs(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = attention.Attention(16, 4)
    theirs = nn.MultiheadAttention(16, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 16)
    for got, want in zip(ours(x, x, x, **arguments), theirs(x, x, x, **arguments), strict=True):
        assert (got is None and want is None) or torch.allclose(got, want, atol=1e-6)


TARGETS = [["attn"], ["out_proj"], ["c_fc", "c_proj"], ["attn", "c_fc", "c_proj"], ["conv1"], ["token_embedding"]]


@pytest.mark.slow
@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_adapters_move_features_get_gradients_and_merge(name: str, targets: list[str], checkpointed: bool) -> None:
    peft = pytest.importorskip("peft")
    base = make(name)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    if checkpointed:
        adapted.checkpoint_gradients()
    image, text = adapted(PIXELS, TOKENS)
    (-(image * text).sum()).backward()
    adapters = {key: p for key, p in adapted.named_parameters() if "lora_" in key}
    assert adapters
    assert not [key for key, p in adapters.items() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        before = base(PIXELS, TOKENS)
        merged = adapted.merge_and_unload()(PIXELS, TOKENS)
    touched = {
        "image": any(".visual." in key for key in adapters),
        "text": any(".visual." not in key for key in adapters),
    }
    for is_touched, new, old, same in zip(touched.values(), (image, text), before, merged, strict=True):
        assert torch.allclose(new, old, atol=1e-4) != is_touched
        assert torch.allclose(new, same, atol=1e-5)


class Part(nn.Module):
    """A method of a model, as what is exported."""

    def __init__(self, model: CLIPModel, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = getattr(self.model, self.method)(inputs)
        return result


PARTS = [("encode_text", TOKENS, LONGER), ("encode_image", PIXELS, MORE_PIXELS)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "example", "other"), PARTS)
@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_a_trace_is_right_for_other_batches(name: str, method: str, example: Tensor, other: Tensor) -> None:
    part = Part(make(name), method)
    with torch.no_grad():
        traced = torch.jit.trace(part, (example,))
        for inputs in (example, other, other[:1]):
            assert torch.allclose(traced(inputs), part(inputs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "example", "other"), PARTS)
@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_an_export_is_right_for_other_batches(name: str, method: str, example: Tensor, other: Tensor) -> None:
    part = Part(make(name), method)
    with torch.no_grad():
        program = torch.export.export(part, (example,), dynamic_shapes={"inputs": {0: BATCH}})
        for inputs in (example, other):
            assert torch.allclose(program.module()(inputs), part(inputs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(("method", "example", "other"), PARTS)
def test_an_onnx_file_is_right_for_other_batches(
    method: str, example: Tensor, other: Tensor, dynamo: bool, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    part = Part(make(), method)
    shapes: dict[str, Any] = {"dynamic_shapes": {"inputs": {0: "batch"}}} if dynamo else {
        "dynamic_axes": {"inputs": {0: "batch"}, "features": {0: "batch"}}
    }  # fmt: skip
    names: dict[str, Any] = {"input_names": ["inputs"], "output_names": ["features"]}
    torch.onnx.export(part, (example,), tmp_path / "x.onnx", dynamo=dynamo, **names, **shapes)
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    with torch.no_grad():
        for inputs in (example, other):
            (found,) = session.run(None, {"inputs": inputs.numpy()})
            assert np.abs(found - part(inputs).numpy()).max() < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_both_towers_are_traced_and_exported_and_uint8_pixels_leave_no_trace() -> None:
    model = make()
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(model, (pixels, TOKENS), dynamic_shapes=({0: BATCH}, {0: BATCH})).module()
        traced = torch.jit.trace(model, (pixels, TOKENS))
        expected = model(pixels.repeat(2, 1, 1, 1)[:5], LONGER)
        for made in (program, traced):
            for got, want in zip(made(pixels.repeat(2, 1, 1, 1)[:5], LONGER), expected, strict=True):
                assert torch.allclose(got, want, atol=1e-5)
    # and not of a stand-in that the export has left in a cache
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.architecture.mean, model.architecture.std))
    with torch.no_grad():
        own = model.encode_image((pixels / 255 - mean) / std)
        assert torch.allclose(model.encode_image(pixels), own, atol=1e-5)


@pytest.mark.slow
def test_a_whole_model_is_one_graph() -> None:
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for pixels, tokens in ((PIXELS, TOKENS), (MORE_PIXELS, LONGER)):
            for got, want in zip(compiled(pixels, tokens), model(pixels, tokens), strict=True):
                assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.half, 0.02), (torch.bfloat16, 0.1), (torch.double, 1e-5)])
def test_a_model_of_another_type_takes_what_the_float32_one_takes(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = make(name)
    other = copy.deepcopy(model).to(dtype)
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    with torch.no_grad():
        for given in (image, PIXELS, PIXELS.to(dtype), PIXELS.double()):
            found = other.encode_image(given)
            assert found.dtype == torch.float32
            assert torch.allclose(found, model.encode_image(given), atol=tolerance)
        assert torch.allclose(other.encode_text(TOKENS), model.encode_text(TOKENS), atol=tolerance)
        outputs = model.run_image_tower(PIXELS), model.run_text_tower(TOKENS)  # float32, of the other model
        assert torch.allclose(other(*outputs)[0], model(*outputs)[0], atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_changes_no_model(dtype: torch.dtype) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    expected = make()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = CLIPModel("ViT-Mini", projection_dim=80, pretrained="none")
        with torch.no_grad():
            features = made.encode_image(image), made.encode_text("a dog")
            same = expected.encode_image(image)
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for value in made.parameters()} == {torch.float32}
    assert [value.dtype for value in features] == [torch.float32] * 2
    with torch.no_grad():
        assert torch.allclose(expected.encode_image(image), same, atol=1e-6)


@pytest.mark.parametrize("prepare", ["compile_towers", "checkpoint_gradients"])
def test_prepared_models_are_copied_pickled_and_saved(prepare: str, tmp_path: Path) -> None:
    model = make()
    getattr(model, prepare)()
    torch.save(model, tmp_path / "model.pt")
    copies = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    )
    with torch.no_grad():
        expected = model(PIXELS, TOKENS)
        for other in copies:
            assert all(torch.equal(*pair) for pair in zip(other(PIXELS, TOKENS), expected, strict=True))
            assert other.is_compiled == model.is_compiled
            flags = [layer.checkpointed for layer in layers_of(other.backbone)]
            assert all(flags) == any(flags) == (prepare == "checkpoint_gradients")


def test_quick_gelu_has_two_derivatives() -> None:
    x = torch.linspace(-4, 4, 23, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(QuickGELU(), x)


@pytest.mark.parametrize("inputs", [PIXELS, TOKENS], ids=["image", "text"])
def test_second_derivatives_are_openais(inputs: Tensor) -> None:
    backbone = make().backbone
    own = OpenAI(backbone).clip
    penalties = []
    for clip in (own, backbone):
        tower = "image" if inputs.is_floating_point() else "text"
        parameters = [p for key, p in clip.named_parameters() if key.startswith("visual.") == (tower == "image")]
        parameters = [p for p in parameters if p is not getattr(clip, "logit_scale", None)]
        with sdpa_kernel(SDPBackend.MATH):  # without it OpenAI's has none
            output = clip.encode_image(inputs) if tower == "image" else clip.encode_text(inputs)
        gradients = torch.autograd.grad(output.square().sum(), parameters, create_graph=True)
        seconds = torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), parameters)
        penalties.append(torch.cat([second.flatten() for second in seconds]))
    assert (penalties[0] - penalties[1]).norm() < 1e-4 * penalties[0].norm()


@pytest.mark.slow
def test_transforms_give_what_autograd_gives() -> None:
    model = make()
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        image, text = functional_call(model, parameters, (PIXELS, TOKENS))
        product: Tensor = (image * text).sum()
        return product

    image, text = model(PIXELS, TOKENS)
    (image * text).sum().backward()
    found = grad(loss)(parameters)
    for key, value in model.named_parameters():
        if value.grad is not None:
            assert torch.allclose(found[key], value.grad, atol=1e-5 + 1e-4 * float(value.grad.abs().max())), key
    with torch.no_grad():
        one_by_one = vmap(lambda pixels: model.encode_image(pixels[None])[0])(PIXELS)
        assert torch.allclose(one_by_one, model.encode_image(PIXELS), atol=1e-5)
        one_by_one = vmap(lambda tokens: model.encode_text(tokens[None])[0])(TOKENS)
        assert torch.allclose(one_by_one, model.encode_text(TOKENS), atol=1e-5)
    direction = torch.randn(PIXELS.shape, generator=torch.Generator().manual_seed(2))
    moved = jvp(model.encode_image, (PIXELS,), (direction,))[1]
    pixels = PIXELS.clone().requires_grad_()
    target = torch.randn(moved.shape, generator=torch.Generator().manual_seed(3))
    (model.encode_image(pixels) * target).sum().backward()
    assert pixels.grad is not None
    assert float((moved * target).sum().detach()) == pytest.approx(float((pixels.grad * direction).sum()), rel=1e-3)


SETTINGS: list[dict[str, Any]] = [
    {"image_pooling": "average"}, {"image_pooling": "average_of_normed"}, {"causal": False}, {"text_pooling": "first"},
    {"text_pooling": "last"}, {"text_pooling": "end", "end_token": 320}, {"causal": False, "text_pooling": "first"},
    {"vision_eps": 0.1, "text_eps": 0.2}, {"vision_mlp_width": 48, "text_mlp_width": 80}, {"activation": "gelu_tanh"},
    {"vision_heads": 4, "transformer_heads": 1},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_packed_rows_are_whole_sequences_whatever_the_settings(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    usual = stir(build_backbone(SMALL_VIT)).eval()
    backbone = stir(build_backbone(replace(SMALL_VIT, **settings))).eval()
    if not any("mlp_width" in key for key in settings):
        backbone.load_state_dict(usual.state_dict())
    plain = copy.deepcopy(backbone)
    for block in (*plain.visual.transformer.resblocks, *plain.transformer.resblocks):
        block.register_forward_hook(lambda *given: None)
    towers = "encode_image", "encode_text"
    for encode, inputs in zip(towers, (PIXELS, TOKENS), strict=True):
        got, want = (getattr(each, encode)(inputs) for each in (backbone, plain))
        assert torch.allclose(got, want, atol=1e-5)
        gradients = [
            torch.autograd.grad(output.sum(), list(each.parameters()), allow_unused=True)
            for output, each in ((got, backbone), (want, plain))
        ]
        for mine, theirs in zip(*gradients, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.allclose(mine, theirs, atol=1e-4 * max(1.0, float(theirs.abs().max())))
    changed = [not torch.allclose(getattr(backbone, e)(x), getattr(usual, e)(x), atol=1e-4)
               for e, x in zip(towers, (PIXELS, TOKENS), strict=True)]  # fmt: skip
    assert any(changed)


def test_whole_sequences_of_another_type_leave_the_blocks_as_they_were_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(self: Any, x: Tensor) -> Tensor:  # of OpenAI's repository
        self.attn_mask = None if self.attn_mask is None else self.attn_mask.to(dtype=x.dtype, device=x.device)
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]  # type: ignore[no-any-return]

    monkeypatch.setattr(import_clip().model.ResidualAttentionBlock, "attention", attention)
    backbone = stir(build_backbone(SMALL_VIT)).eval()
    expected = backbone.encode_text(TOKENS)
    backbone.double()
    handle = backbone.transformer.resblocks[0].register_forward_hook(lambda *given: None)
    assert not backbone.transformer.is_as_built()
    assert torch.allclose(backbone.encode_text(TOKENS).float(), expected, atol=1e-5)
    handle.remove()
    assert backbone.transformer.is_as_built()


def test_a_block_that_is_traced_takes_sequences_of_any_length() -> None:
    block = build_backbone(SMALL_VIT).transformer.resblocks[0]
    longer, shorter = torch.randn(9, 2, SMALL_VIT.transformer_width), torch.randn(5, 2, SMALL_VIT.transformer_width)
    traced = torch.jit.trace(block, longer, check_trace=False)
    assert torch.allclose(traced(shorter), block(shorter), atol=1e-6)


def test_texts_cut_behind_their_end_are_the_same_texts() -> None:
    for settings in ({}, {"causal": False}, {"text_pooling": "last"}):
        torch.manual_seed(0)
        backbone = build_backbone(replace(SMALL_VIT, **settings)).eval()
        with torch.no_grad():
            assert torch.allclose(backbone.encode_text(TOKENS[:, :20]), backbone.encode_text(TOKENS), atol=1e-6)


def test_lengths_are_rounded_up_to_a_few() -> None:
    model = make()
    generator = torch.Generator().manual_seed(0)
    seen: dict[int, set[tuple[int, ...]]] = {1: set(), 8: set()}
    for _ in range(50):
        lengths = torch.randint(3, 78, (2,), generator=generator)
        tokens = torch.randint(1, 1000, (2, 77), generator=generator) * (torch.arange(77) < lengths[:, None])
        tokens[torch.arange(2), lengths - 1] = 49407
        outputs: list[Tensor] = []
        for multiple, shapes in seen.items():
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():

                def note(query: Tensor, key: Tensor, value: Tensor, shapes: Any = shapes, **options: Any) -> Tensor:
                    shapes.add((*query.shape[-2:-1], *key.shape[-2:-1]))
                    return attend(query, key, value, **options)

                patch.setattr(attention, "attend", note)
                outputs.append(model.backbone.encode_text(tokens, length_multiple=multiple))
        assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert len(seen[8]) <= 2 * 10 < len(seen[1])
    assert max(length for _, length in seen[8]) <= 77


def test_no_image_and_no_text_have_features_of_their_size() -> None:
    for name in ("ViT-Mini", "RN-Ti"):
        model = make(name)
        image, text = model.backbone.encode_image(PIXELS[:0]), model.backbone.encode_text(TOKENS[:0])
        assert image.shape == text.shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_never_takes_cudnns_kernel(dtype: torch.dtype) -> None:
    model = make().cuda().train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            image, text = model(PIXELS, TOKENS)
        (image * text).sum().backward()
        torch.cuda.synchronize()
    assert not [
        event.key for event in profile.key_averages() if "cudnn" in event.key.lower() and "sdpa" in event.key.lower()
    ]
    expected = make()(PIXELS, TOKENS)
    for got, want in zip((image, text), expected, strict=True):
        assert torch.allclose(got.cpu(), want, atol=1e-4 if dtype == torch.float32 else 0.05)


def test_the_gpus_kernels_are_all_but_cudnns() -> None:
    assert SDPBackend.CUDNN_ATTENTION not in GPU_KERNELS
    assert {SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION} <= set(GPU_KERNELS)


@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_a_model_is_openais_class_with_its_names(name: str) -> None:
    shape = {"ViT-Mini": SMALL_VIT, "RN-Ti": SMALL_RESNET}[name]
    backbone = make(name).backbone
    own = OpenAI(backbone).clip
    assert isinstance(backbone, type(own))
    assert list(backbone.state_dict()) == [key for key in own.state_dict() if key != "logit_scale"]
    ours, theirs = ([type(module) for _, module in each.named_modules()] for each in (backbone, own))
    gelu = {"QuickGELU"}
    assert all(issubclass(a, b) for a, b in zip(ours, theirs, strict=True) if b.__name__ not in gelu)
    with torch.no_grad():
        pixels = torch.randn(2, 3, shape.image_resolution, shape.image_resolution)
        assert torch.allclose(backbone.encode_image(pixels), own_forward(backbone, pixels), atol=1e-5)
