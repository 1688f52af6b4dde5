"""The towers against OpenAI's own forward: values and gradients, over all text positions and every layer."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cliptune.model.architectures import ARCHITECTURES, Architecture
from cliptune.model.attention import QuickGELU
from cliptune.model.towers import build_backbone
from cliptune.preprocess.tokens import tokenize
from tests.helpers.models import own_forward, stir

TEXTS = ["a dog", "a much longer text about a dog and a cat, on a mat", "word " * 90, "a", "two red circles"]


def shallow(name: str, *, vision_layers: int = 2) -> Architecture:
    """The widths and sizes of a known model, with two layers a tower: the arithmetic of one layer is that of all."""
    shape = ARCHITECTURES[name]
    layers = vision_layers if shape.is_vit else (1, 1, 1, 1)
    return replace(shape, transformer_layers=2, vision_layers=layers, vocab_size=49408)


def build(shape: Architecture, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return stir(build_backbone(shape)).eval()


def assert_same(got: Tensor, expected: Tensor, parameters: list[nn.Parameter]) -> None:
    """Values within rounding; each gradient within 1e-5 of its norm, or 1e-6 of the whole gradient's."""
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * target).sum(), parameters)
    found = torch.autograd.grad((got * target).sum(), parameters)
    whole = torch.stack([gradient.norm() for gradient in wanted]).norm()
    for have, want in zip(found, wanted, strict=True):
        assert (have - want).norm() <= max(1e-5 * want.norm(), 1e-6 * whole)


FAST = {"ViT-Ti/32", "ViT-Ti/16@112px", "ViT-B/32", "RN50"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "ViT-Ti/32" else [pytest.mark.slow]) for name in ARCHITECTURES]
)
def test_texts_cut_to_their_length_equal_all_positions(name: str) -> None:
    shape = ARCHITECTURES[name]
    # the image tower has no part in it
    backbone = build(replace(shallow("ViT-Ti/32"), embed_dim=shape.embed_dim, transformer_width=shape.transformer_width,
                             transformer_heads=shape.transformer_heads))  # fmt: skip
    parameters = [p for key, p in backbone.named_parameters() if not key.startswith("visual")]
    tokens, _ = tokenize(TEXTS)
    for rows in (tokens, tokens[[0, 3]], tokens[2:3], tokens[[4, 4]]):
        assert_same(backbone.encode_text(rows), own_forward(backbone, rows), parameters)


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("ViT-B/16", "ViT-L/14", "RN101")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(FAST), *LARGE])
def test_images_equal_the_module(name: str) -> None:
    backbone = build(shallow(name))
    pixels = torch.randn(2, 3, *[backbone.visual.input_resolution] * 2)
    parameters = list(backbone.visual.parameters())
    assert_same(backbone.encode_image(pixels), own_forward(backbone, pixels), parameters)


def test_a_module_put_into_a_layer_takes_part() -> None:
    backbone = build(shallow("ViT-Ti/32"))
    before = backbone.encode_image(torch.ones(1, 3, 224, 224)), backbone.encode_text(tokenize(["a"])[0])
    for block in (*backbone.visual.transformer.resblocks, *backbone.transformer.resblocks):
        block.mlp.add_module("dropout", nn.Dropout(0.9))
    backbone.train()
    after = backbone.encode_image(torch.ones(1, 3, 224, 224)), backbone.encode_text(tokenize(["a"])[0])
    assert not torch.allclose(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.slow
def test_low_precision_differs_no_more_than_the_module_does() -> None:
    backbone = build(shallow("ViT-B/32", vision_layers=4))
    pixels, (tokens, _) = torch.randn(4, 3, 224, 224), tokenize(TEXTS)
    for tower, own, inputs in (
        (lambda b, x: b.encode_image(x), own_forward, pixels),
        (lambda b, x: b.encode_text(x), own_forward, tokens),
    ):
        exact = tower(backbone, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = tower(backbone, inputs), own(backbone, inputs)
        assert ours.requires_grad
        assert (ours - exact).norm() <= 1.3 * (theirs - exact).norm()


def flops(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.slow
def test_what_nobody_reads_is_not_computed() -> None:
    backbone = build(ARCHITECTURES["ViT-Ti/32"])
    tokens, _ = tokenize(["a dog", "a", "a cat on the mat", "word " * 30])
    fraction = (tokens != 0).float().mean().item()
    own = flops(lambda: own_forward(backbone, tokens).sum().backward())
    assert flops(lambda: backbone.encode_text(tokens).sum().backward()) < 1.05 * fraction * own
    pixels = torch.randn(2, 3, 224, 224)
    own = flops(lambda: own_forward(backbone, pixels).sum().backward())
    assert flops(lambda: backbone.encode_image(pixels).sum().backward()) < 0.92 * own


def test_quick_gelu_is_its_formula() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(QuickGELU()(x), x * torch.sigmoid(1.702 * x))
    assert torch.autograd.gradcheck(QuickGELU(), x)
    assert torch.isfinite(QuickGELU()(torch.tensor([-1e4, 1e4]))).all()
