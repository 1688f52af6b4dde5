"""LoRA: what it is by its formula, what its gradients and files are, and what peft makes of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from clip_model import CLIPModel
from cliptune.model.lora import (
    PEFT_PREFIX,
    add_lora,
    base_fingerprint,
    is_adapter,
    load_adapter,
    merged,
    save_adapter,
)
from cliptune.training.gradcache import GradCache
from cliptune.training.loss import ContrastiveLoss
from tests.helpers.models import (
    FP32,
    assert_same_gradients,
    gradients_of,
    make_batch,
    make_model,
    plain_loss,
    small_architectures,
)

__all__ = ["small_architectures"]


def adapted(name: str = "ViT-Mini", *, rank: int = 3, alpha: float | None = 6.0, layers: str = "all") -> CLIPModel:
    """A model with adapters that change something."""
    model = make_model(name)
    add_lora(model, rank, alpha=alpha, layers=layers)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("lora_B"):
                parameter.normal_(std=0.1)
    return model


def features(model: CLIPModel, size: int = 5) -> Tensor:
    with torch.no_grad():
        return torch.cat(model(*make_batch(model, size)[:2]))


def plain(model: CLIPModel) -> CLIPModel:
    """The merged model."""
    other = make_model(model.architecture.name)
    other.load_state_dict(merged(model.state_dict(), model.lora))
    return other


@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
@pytest.mark.parametrize("layers", ["all", "attention", "mlp"])
def test_adapted_and_merged_are_the_same_model(name: str, layers: str) -> None:
    model = adapted(name, layers=layers)
    assert torch.allclose(features(model), features(plain(model)), atol=1e-5)
    before = features(make_model(name))
    moved = (features(model) - before).norm(dim=1)
    assert moved[5:].min() > 1e-3  # the texts'
    assert (moved[:5].min() > 1e-3) == (name == "ViT-Mini" or layers != "mlp")  # of a ResNet only the pool is adapted


def test_an_adapted_model_starts_as_it_was_and_holds_its_towers() -> None:
    model = make_model("ViT-Mini")
    before = features(model)
    add_lora(model, 2)
    assert torch.equal(features(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not is_adapter(name)} == {
        "logit_scale", "image_projection.weight", "text_projection.weight",
    }  # fmt: skip
    assert len(trained) == 3 + 2 * 4 * 4  # A and B of four layers in each of four blocks
    assert set(make_model("ViT-Mini").state_dict()) < set(model.state_dict())


@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_gradients_are_those_of_the_merged_weights(name: str) -> None:
    """dL/dB is alpha / r dL/dW A^T, and dL/dA is alpha / r B^T dL/dW."""
    model = adapted(name)
    other = plain(model)
    for each in (model, other):
        images, tokens, ids = make_batch(each, 6)
        image_features, text_features = each(images, tokens)
        plain_loss(image_features, text_features, each.logit_scale, ids).backward()
    of_weights, of_adapters = gradients_of(other), gradients_of(model)
    wanted = {key: value for key, value in of_weights.items() if key in of_adapters}
    for key, first in model.named_parameters():
        if key.endswith("lora_A"):
            layer = key.removesuffix(".lora_A")
            weight = of_weights[f"{layer}.in_proj_weight" if layer.endswith("attn") else f"{layer}.weight"]
            second = model.get_parameter(f"{layer}.lora_B")
            wanted[key] = 2.0 * second.detach().T @ weight
            wanted[f"{layer}.lora_B"] = 2.0 * weight @ first.detach().T
    assert_same_gradients(of_adapters, wanted, 1e-4)


def test_the_plain_path_is_adapted_too() -> None:
    """Of a traced or touched tower, whose blocks see whole sequences."""
    model = adapted()
    packed = features(model)
    for block in (*model.backbone.visual.transformer.resblocks, *model.backbone.transformer.resblocks):
        block.register_forward_hook(lambda *_: None)
    assert torch.allclose(features(model), packed, atol=1e-5)
    x = torch.randn(4, 2, 64)
    with pytest.raises(ValueError, match="merge the adapter first"):
        model.backbone.transformer.resblocks[0].attn(x, x, x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))


def test_a_merged_state_loads_into_an_adapted_model() -> None:
    model = adapted()
    state = {name: value.clone() for name, value in merged(model.state_dict(), model.lora).items()}
    other = adapted()
    other.load_state_dict(state)
    assert torch.allclose(features(other), features(model), atol=1e-5)
    assert not other.backbone.transformer.resblocks[0].mlp.c_fc.lora_B.any()
    other.load_state_dict(model.state_dict())
    assert torch.equal(features(other), features(model))


def save(model: CLIPModel, path: Path) -> dict[str, Tensor]:
    learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert model.lora is not None
    base = base_fingerprint(model.state_dict())
    save_adapter(path, learned, model.lora, about={"base": base, "model_name": model.architecture.name})
    return learned


@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_an_adapter_is_loaded_into_the_model_it_was_trained_on(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    with torch.no_grad():
        model.image_projection.weight.mul_(1.5).add_(0.01)
        model.logit_scale.add_(0.1)
    save(model, tmp_path / "adapter.safetensors")
    assert (tmp_path / "adapter.safetensors").stat().st_size < 200_000
    other = make_model(name)
    other.load_adapter(tmp_path / "adapter.safetensors")
    want = merged(model.state_dict(), model.lora)
    assert all(torch.equal(value, want[key]) for key, value in other.state_dict().items())
    with torch.no_grad():
        other.backbone.positional_embedding[0, 0] += 1e-3
    with pytest.raises(ValueError, match="trained on other weights than this model's"):
        load_adapter(other, tmp_path / "adapter.safetensors")


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    model = make_model("ViT-Mini")
    with pytest.raises(FileNotFoundError, match="no such adapter"):
        model.load_adapter(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(ValueError, match="not an adapter of this toolkit, or damaged"):
        model.load_adapter(tmp_path / "x.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
def test_peft_takes_the_file(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(name)
    with torch.no_grad():
        model.image_projection.weight.add_(0.1 * torch.randn(64, 64))
    path = tmp_path / "adapter.safetensors"
    save(model, path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["adapter_config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert all(key.startswith(PEFT_PREFIX) for key in tensors)
    config.pop("peft_type")
    theirs = peft.get_peft_model(make_model(name), peft.LoraConfig(**config))
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    images, tokens, _ = make_batch(model, 5)
    with torch.no_grad():
        found, expected = torch.cat(theirs(images, tokens)), [features(model)]
        for key, parameter in model.named_parameters():
            if key.endswith("out_proj.lora_B"):  # peft adds that product to its weight twice, up to 0.21 at least
                parameter.mul_(2)
    expected.append(features(model))
    assert any(torch.allclose(found, each, atol=1e-5) for each in expected)


@pytest.mark.parametrize(
    ("rank", "layers", "message"),
    [(65, "all", "lora_rank 65 is more than the 64"), (2, "mlp", "have no such layers")],
)
def test_what_cannot_be_adapted_is_refused(rank: int, layers: str, message: str) -> None:
    model = CLIPModel("RN-Ti", freeze_tower="text" if layers == "mlp" else None)
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank, layers=layers)
    assert not any(is_adapter(name) for name in model.state_dict())


def test_a_frozen_tower_gets_no_adapters() -> None:
    model = CLIPModel("ViT-Mini", freeze_tower="image")
    add_lora(model, 2)
    names = [name for name in model.state_dict() if is_adapter(name)]
    assert names
    assert not [name for name in names if ".visual." in name]
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, 2)


def test_micro_batches_give_the_whole_gradient() -> None:
    found = []
    for size in (None, 3):
        model, scaler = adapted(), torch.amp.GradScaler("cpu", enabled=False)
        cache = GradCache(model, ContrastiveLoss(), precision=FP32, size=size, parallel=None, scaler=scaler)
        cache.backward(*make_batch(model, 8))
        found.append(gradients_of(model))
    assert_same_gradients(found[1], found[0], 1e-4)
