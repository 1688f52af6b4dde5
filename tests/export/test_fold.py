"""Projection layers multiplied into the towers: the same features."""

from dataclasses import replace

import pytest
import torch

from clip_model import CLIPModel, add_self_test
from cliptune.export.fold import fold_projections
from cliptune.model.weights import Weights, own_weights
from tests.helpers.models import make_batch, make_model, small_architectures

__all__ = ["small_architectures"]


def weights_of(model: CLIPModel) -> Weights:
    """As a checkpoint of it would give them."""
    state = {"model_state_dict": model.state_dict(), "architecture": model.architecture.to_dict()}
    return own_weights(add_self_test(state), "here")


def projected(name: str, size: int) -> CLIPModel:
    """A small model whose projection layers are no identity and differ."""
    model = make_model(name)
    model._make_projections(size, None)
    with torch.no_grad():
        for layer in (model.image_projection, model.text_projection):
            layer.weight.add_(0.05 * torch.randn_like(layer.weight))
    return model.eval()


@pytest.mark.parametrize("name", ["ViT-Mini", "RN-Ti"])
@pytest.mark.parametrize("size", [48, 64, 96])
def test_features_stay_and_the_layers_are_gone(name: str, size: int) -> None:
    model = projected(name, size)
    folded = fold_projections(weights_of(model))
    assert (folded.projections, folded.architecture.embed_dim) == ({}, size)
    plain = CLIPModel(pretrained=replace_self_test(folded)).eval()
    assert torch.equal(plain.image_projection.weight, torch.eye(size))
    images, tokens, _ = make_batch(model, 5)
    with torch.no_grad():
        for found, expected in zip(plain(images, tokens), model(images, tokens), strict=True):
            assert (found - expected).norm(dim=1).max() < 1e-6


def replace_self_test(weights: Weights) -> Weights:
    """Without the proof, so that the test alone decides."""
    return weights._replace(self_test=None)


def test_weights_without_layers_are_left_alone() -> None:
    weights = weights_of(projected("ViT-Mini", 64))
    bare = weights._replace(projections={}, architecture=replace(weights.architecture, name="x"))
    assert fold_projections(bare) is bare
