"""Small models with random weights and batches for them; several tests share them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from clip_model import CLIPModel
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.towers import layers_of
from cliptune.preprocess.tokens import tokenize
from cliptune.runtime.device import Precision, resolve_precision
from cliptune.runtime.openai_clip import import_clip

FP32 = resolve_precision("fp32", torch.device("cpu"))
FP16 = Precision("fp16", torch.float16, scaled=True)
"""On the CPU only tests train like this."""


WORDS = (
    "red",
    "green",
    "blue",
    "big",
    "small",
    "round",
    "old",
    "new",
    "wet",
    "dry",
    "fast",
    "slow",
    "hot",
    "cold",
    "a",
    "b",
)


SMALL_RESNET = replace(
    ARCHITECTURES["RN50"], name="RN-Ti", embed_dim=64, image_resolution=64, vision_layers=(1, 1, 1, 1), vision_width=16,
    vision_heads=8, transformer_width=64, transformer_heads=1, transformer_layers=2,
)  # fmt: skip


SMALL_VIT = replace(
    ARCHITECTURES["ViT-Ti/32"],
    name="ViT-Mini",
    embed_dim=64,
    image_resolution=64,
    vision_layers=2,
    vision_width=64,
    vision_heads=2,
    transformer_width=16,  # of the vocabulary's 49,408 embeddings: most of what a small run computes and saves
    transformer_heads=2,
    transformer_layers=2,
)


TRAINED_VIT = replace(SMALL_VIT, name="ViT-Mini-64", vision_heads=1, transformer_width=64, transformer_heads=1)
"""Of `trained_dir`: with heads of 64 numbers, as OpenAI's models have, every form of export can hold it."""


@pytest.fixture(autouse=True)
def small_architectures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for shape in (SMALL_RESNET, SMALL_VIT, TRAINED_VIT):
        monkeypatch.setitem(ARCHITECTURES, shape.name, shape)
    yield


def make_model(
    name: str, *, holds_batchnorm: bool = True, dropout: bool = False, freeze_tower: str | None = None
) -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(name, freeze_tower=freeze_tower)
    model.holds_batchnorm = holds_batchnorm
    with torch.no_grad():  # a random start has norms of one, biases of zero and residual branches that end in zero
        for parameter in model.backbone.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    if dropout:
        for layer in layers_of(model.backbone):
            if hasattr(layer, "mlp"):
                cast(nn.Module, layer.mlp).add_module("dropout", nn.Dropout(0.3))
    return model.train()


def make_batch(model: CLIPModel, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (size, 3, model.image_resolution, model.image_resolution)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    texts = [" ".join(WORDS[(number * k) % 16] for k in range(1, 2 + number % 7)) for number in range(size)]
    return images, tokenize(texts)[0], torch.arange(size) % max(size - 2, 2)  # two images come twice


def plain_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, ids: Tensor) -> Tensor:
    same = ids[:, None] == ids[None, :]
    logits = (logit_scale.exp() * (images @ texts.T)).masked_fill(same.fill_diagonal_(False), float("-inf"))
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gradients_of(model: CLIPModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Differences within a share of that parameter's gradient, or 1e-6 of the whole; the temperature's within 1e-5."""
    assert found.keys() == wanted.keys()
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, want in wanted.items():
        limit = 1e-5 * want.norm() if name == "logit_scale" else max(tolerance * want.norm(), 1e-6 * whole)
        assert (found[name] - want).norm() <= limit, name


class FullMemory:
    """Fails like a full memory at the nth run of a tower with more than some pairs."""

    def __init__(
        self, model: CLIPModel, *, pairs: int, at: int, kind: type[Exception] = torch.OutOfMemoryError
    ) -> None:
        self.run, self.pairs, self.left, self.kind = model.run_image_tower, pairs, at, kind
        model.run_image_tower = self  # type: ignore[method-assign]

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) > self.pairs:
            self.left -= 1
            if self.left < 0:
                message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
                raise self.kind(message)
        return self.run(images)


def stir(backbone: Any) -> Any:
    """Move biases and norms, which start as 0 and 1 and would hide a mistake."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


class OpenAI(nn.Module):
    """OpenAI's own class with its own forward, and the weights of a backbone of ours."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        clip = import_clip().model
        visual, transformer = backbone.visual, backbone.transformer
        is_vit = hasattr(visual, "transformer")
        stages = () if is_vit else (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        self.clip = clip.CLIP(
            backbone.text_projection.shape[1],
            visual.input_resolution,
            visual.transformer.layers if is_vit else tuple(map(len, stages)),
            visual.transformer.width if is_vit else visual.bn3.num_features,
            visual.conv1.kernel_size[0] if is_vit else None,
            backbone.context_length,
            backbone.vocab_size,
            transformer.width,
            transformer.resblocks[0].attn.num_heads,
            transformer.layers,
        ).eval()  # fmt: skip
        self.clip.load_state_dict(backbone.state_dict(), strict=False)
        if is_vit:
            for block, ours in zip(self.clip.visual.transformer.resblocks, visual.transformer.resblocks, strict=True):
                block.attn.num_heads, block.attn.head_dim = ours.attn.num_heads, ours.attn.head_dim
        else:
            self.clip.visual.attnpool.num_heads = visual.attnpool.num_heads

    def forward(self, inputs: Tensor) -> Tensor:
        encode = self.clip.encode_image if inputs.is_floating_point() else self.clip.encode_text
        result: Tensor = encode(inputs)
        return result


def own_forward(backbone: Any, inputs: Tensor) -> Tensor:
    """What OpenAI's own forward gives for pixels or tokens, as a function of a backbone's parameters."""
    weights = {f"clip.{name}": value for name, value in (*backbone.named_parameters(), *backbone.named_buffers())}
    result: Tensor = functional_call(OpenAI(backbone), weights, inputs)
    return result
