"""Layers counted from the top, and training of the last ones."""

import pytest
import torch

from clip_model import CLIPModel
from cliptune.model.depth import layers_above, train_last_layers
from tests.helpers.models import small_architectures

__all__ = ["small_architectures"]
EMBEDDINGS = {"visual.class_embedding", "visual.positional_embedding", "positional_embedding", "token_embedding.weight"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-Mini", {
            "visual.proj": 0, "visual.ln_post.weight": 0, "visual.transformer.resblocks.1.ln_1.bias": 1,
            "visual.transformer.resblocks.0.attn.in_proj_weight": 2, "visual.ln_pre.bias": 3,
            "visual.conv1.weight": 3, "visual.class_embedding": 3, "visual.positional_embedding": 3,
            "text_projection": 0, "ln_final.weight": 0, "transformer.resblocks.1.mlp.c_fc.weight": 1,
            "transformer.resblocks.0.mlp.c_proj.bias": 2, "token_embedding.weight": 3, "positional_embedding": 3,
        }),
        ("RN-Ti", {
            "visual.attnpool.c_proj.weight": 0, "visual.layer4.0.conv1.weight": 1, "visual.layer1.0.bn3.bias": 4,
            "visual.conv1.weight": 5, "visual.bn3.weight": 5, "transformer.resblocks.0.ln_1.weight": 2,
            "token_embedding.weight": 3,
        }),
    ],
)  # fmt: skip
def test_layers_are_counted_from_the_top(name: str, expected: dict[str, int]) -> None:
    above = layers_above(name for name, _ in CLIPModel(name).backbone.named_parameters())
    assert {name: above[name] for name in expected} == expected


@pytest.mark.parametrize(("name", "frozen"), [("ViT-Mini", None), ("ViT-Mini", "text"), ("RN-Ti", None)])
def test_the_last_layers_train_and_the_others_stay(name: str, frozen: str | None) -> None:
    model = CLIPModel(name, freeze_tower=frozen)
    train_last_layers(model, 1)
    before = {key: value.clone() for key, value in model.named_parameters()}
    images = torch.rand(3, 3, 64, 64)
    image, text = model(images, torch.tensor([[49406, 320 + n, 49407] for n in range(3)]))
    (image * text.roll(1, 0)).sum().backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    moved = {key.removeprefix("backbone.") for key, value in model.named_parameters() if not value.equal(before[key])}
    towers = {key for key in moved if key.startswith(("visual.", "transformer.", "text_projection", "ln_final."))}
    assert any(key.startswith(("visual.transformer.resblocks.1.", "visual.layer4.")) for key in towers)
    assert any(key.startswith("transformer.resblocks.1.") for key in towers) == (frozen is None)
    assert not [key for key in moved if ".resblocks.0." in key or key in EMBEDDINGS or "layer1" in key]
    assert "image_projection.weight" in moved


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="train_layers 3: the towers have 2 layers at most"):
        train_last_layers(CLIPModel("ViT-Mini"), 3)
