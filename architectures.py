"""What CLIP models look like: the sizes of the known ones, and the description that a checkpoint stores."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from config import nearest

QUICK_GELU, GELU = "quick_gelu", "gelu"


@dataclass(frozen=True)
class Architecture:
    """What OpenAI's `CLIP` class needs to be built, and the activation, which its tensors do not show."""

    name: str
    embed_dim: int
    image_resolution: int
    vision_layers: int | tuple[int, ...]
    vision_width: int
    vision_patch_size: int | None
    vision_heads: int
    context_length: int
    vocab_size: int
    transformer_width: int
    transformer_heads: int
    transformer_layers: int
    activation: str = QUICK_GELU

    @property
    def is_vit(self) -> bool:
        """Tell a Vision Transformer from a ResNet."""
        return self.vision_patch_size is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as a checkpoint stores them."""
        values = asdict(self)
        values["vision_layers"] = list(self.vision_layers) if not self.is_vit else self.vision_layers
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: keys are missing or unknown.
        """
        layers = values.get("vision_layers")
        try:
            return cls(**{**values, "vision_layers": tuple(layers) if isinstance(layers, list) else layers})
        except TypeError as error:
            raise ValueError(f"not the description of an architecture: {error}") from None

    def same_tensors(self, other: Architecture) -> bool:
        """Tell whether weights of one fit the other (names and activations aside)."""
        return replace(self, name="", activation="") == replace(other, name="", activation="")


def _vit(name: str, embed: int, resolution: int, patch: int, vision: tuple[int, int], text: tuple[int, int]) -> Architecture:  # fmt: skip
    (width, layers), (text_width, text_layers) = vision, text
    heads, text_heads = width // 64, text_width // 64
    return Architecture(
        name, embed, resolution, layers, width, patch, heads, 77, 49408, text_width, text_heads, text_layers
    )


def _resnet(name: str, embed: int, resolution: int, layers: tuple[int, ...], width: int, text_width: int) -> Architecture:  # fmt: skip
    return Architecture(
        name, embed, resolution, layers, width, None, width // 2, 77, 49408, text_width, text_width // 64, 12
    )


_ARCHITECTURES = (
    _resnet("RN50", 1024, 224, (3, 4, 6, 3), 64, 512),
    _resnet("RN101", 512, 224, (3, 4, 23, 3), 64, 512),
    _resnet("RN50x4", 640, 288, (4, 6, 10, 6), 80, 640),
    _resnet("RN50x16", 768, 384, (6, 8, 18, 8), 96, 768),
    _resnet("RN50x64", 1024, 448, (3, 15, 36, 10), 128, 1024),
    _vit("ViT-B/32", 512, 224, 32, (768, 12), (512, 12)),
    _vit("ViT-B/16", 512, 224, 16, (768, 12), (512, 12)),
    _vit("ViT-L/14", 768, 224, 14, (1024, 24), (768, 12)),
    _vit("ViT-L/14@336px", 768, 336, 14, (1024, 24), (768, 12)),
    # no published weights: small enough to be trained from random ones on a laptop
    _vit("ViT-Ti/32", 256, 224, 32, (192, 6), (192, 3)),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _ARCHITECTURES}


def known_architecture(name: str) -> Architecture:
    """Look a model name up.

    Raises:
        ValueError: no such model; names the nearest one.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown model name {name!r}{nearest(name, list(ARCHITECTURES))}")
    return ARCHITECTURES[name]


def describe_architecture(architecture: Architecture) -> str:
    """Name an architecture that has no name, by its sizes."""
    if architecture.is_vit:
        return f"ViT-{architecture.vision_width}x{architecture.vision_layers}/{architecture.vision_patch_size}"
    return f"RN-{architecture.vision_width}x{'-'.join(map(str, architecture.vision_layers))}"  # type: ignore[arg-type]
