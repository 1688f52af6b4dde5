"""Small random models of other projects, saved as their hubs have them, and their features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from clip_model import CLIPModel
from cliptune.runtime.openai_clip import import_clip

TEXTS = ["a diagram", "a dog on a mat", "a cat"]
VISION = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


def stir(model: Any) -> Any:
    """Make biases and norms other than 0 and 1, so that a mistake shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = {0: 0.0, 1: 0.3}.get(parameter.ndim, 0.05)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class OpenClip:
    """open_clip's `CLIP`, with its settings as its hub folders have them."""

    def __init__(
        self, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, *, quick_gelu: bool = True,
        **more: Any,
    ) -> None:  # fmt: skip
        open_clip = pytest.importorskip("open_clip")
        torch.manual_seed(0)
        parts = {"vision_cfg": {**VISION, **(vision or {})}, "text_cfg": {**TEXT, **(text or {})}}
        self.model = stir(open_clip.model.CLIP(64, **parts, quick_gelu=quick_gelu, **more))
        self.settings: dict[str, Any] = {
            "model_cfg": {"embed_dim": 64, "quick_gelu": quick_gelu, **parts},
            "preprocess_cfg": {},
        }

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in self.model.state_dict().items()}

    def save(self, folder: Path, name: str = "open_clip_model.safetensors") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state, folder / name)
        (folder / "open_clip_config.json").write_text(json.dumps(self.settings))
        return folder

    def features(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.model.encode_image(images, normalize=True), self.model.encode_text(tokens, normalize=True)


class HuggingFace:
    """transformers' `CLIPModel`."""

    def __init__(self, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **more: Any) -> None:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        shared = {"num_hidden_layers": 2, "hidden_act": "quick_gelu", "projection_dim": 64, **more}
        config = transformers.CLIPConfig(
            text_config={
                "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, **shared, **(text or {}),
            },
            vision_config={
                "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "image_size": 64,
                "patch_size": 32, **shared, **(vision or {}),
            },
            projection_dim=64,
        )  # fmt: skip
        self.model = stir(transformers.CLIPModel(config))

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in self.model.state_dict().items()}

    def save(self, folder: Path, **options: Any) -> Path:
        self.model.save_pretrained(folder, **options)
        return folder

    def features(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            image = self.model.visual_projection(self.model.vision_model(pixel_values=images).pooler_output)
            text = self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)
        return normalize(image, dim=-1), normalize(text, dim=-1)


def assert_same_features(model: CLIPModel, peer: OpenClip | HuggingFace, *, tokens: Tensor | None = None) -> None:
    """Features of normalised pixels and of tokens, to 1e-5 of a unit vector."""
    side = model.image_resolution
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(3))
    length = model.architecture.context_length
    tokens = import_clip().tokenize(TEXTS, context_length=length).long() if tokens is None else tokens
    image, text = peer.features(images, tokens)
    with torch.no_grad():
        model.eval()
        assert (model.encode_image(images) - image).norm(dim=-1).max() < 1e-5
        assert (model.encode_text(tokens) - text).norm(dim=-1).max() < 1e-5
