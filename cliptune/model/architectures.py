"""What CLIP models look like: the sizes of the known ones, and the description that a checkpoint stores."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, replace
from typing import Any

DEFAULT_MODEL_NAME = "ViT-B/32"
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
        if isinstance(self.vision_layers, tuple):
            values["vision_layers"] = list(self.vision_layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: keys are missing or unknown, or a value is none that an architecture can have.
        """
        try:
            layers = values["vision_layers"]
            read = cls(**{**values, "vision_layers": tuple(layers) if isinstance(layers, list) else layers})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not the description of an architecture: {error}") from None
        sizes = {key: value for key, value in vars(read).items() if key not in {"name", "activation", "vision_layers"}}
        counts = read.vision_layers if isinstance(read.vision_layers, tuple) else (read.vision_layers,)
        patch = [] if sizes.pop("vision_patch_size") is None else [read.vision_patch_size]
        for size in (*sizes.values(), *counts, *patch):
            if type(size) is not int or size < 1:
                raise ValueError(f"not the description of an architecture: {size!r} is no size")
        if not isinstance(read.name, str):
            raise ValueError("not the description of an architecture: its name is no text")
        if read.transformer_width % read.transformer_heads or (read.is_vit and read.vision_width % read.vision_heads):
            raise ValueError("not the description of an architecture: its heads do not divide its width")
        if read.activation not in {QUICK_GELU, GELU}:
            raise ValueError(f"not the description of an architecture: activation {read.activation!r}")
        return read

    def same_tensors(self, other: Architecture) -> bool:
        """Tell whether weights of one fit the other (names and activations aside)."""
        return replace(self, name="", activation="") == replace(other, name="", activation="")


def _vit(
    name: str, embed_dim: int, resolution: int, patch: int, *, image: tuple[int, int], text: tuple[int, int]
) -> Architecture:
    """Describe a ViT by the width and the number of layers of both towers."""
    return Architecture(
        name=name,
        embed_dim=embed_dim,
        image_resolution=resolution,
        vision_layers=image[1],
        vision_width=image[0],
        vision_patch_size=patch,
        vision_heads=image[0] // 64,
        context_length=77,
        vocab_size=49408,
        transformer_width=text[0],
        transformer_heads=text[0] // 64,
        transformer_layers=text[1],
    )


def _resnet(
    name: str, embed_dim: int, resolution: int, layers: tuple[int, ...], *, width: int, text_width: int
) -> Architecture:
    """Describe a ResNet by its blocks a stage and its width; its text tower has 12 layers."""
    vit = _vit(name, embed_dim, resolution, 1, image=(width, 0), text=(text_width, 12))
    # the last stage gives 32 x width channels, which attention pooling splits into heads of 64
    return replace(vit, vision_layers=layers, vision_patch_size=None, vision_heads=width // 2)


_ARCHITECTURES = (
    _resnet("RN50", 1024, 224, (3, 4, 6, 3), width=64, text_width=512),
    _resnet("RN101", 512, 224, (3, 4, 23, 3), width=64, text_width=512),
    _resnet("RN50x4", 640, 288, (4, 6, 10, 6), width=80, text_width=640),
    _resnet("RN50x16", 768, 384, (6, 8, 18, 8), width=96, text_width=768),
    _resnet("RN50x64", 1024, 448, (3, 15, 36, 10), width=128, text_width=1024),
    _vit("ViT-B/32", 512, 224, 32, image=(768, 12), text=(512, 12)),
    _vit("ViT-B/16", 512, 224, 16, image=(768, 12), text=(512, 12)),
    _vit("ViT-L/14", 768, 224, 14, image=(1024, 24), text=(768, 12)),
    _vit("ViT-L/14@336px", 768, 336, 14, image=(1024, 24), text=(768, 12)),
    # no published weights: small enough to be trained from random ones on a laptop; the second learns photos better,
    # since a patch of its smaller image holds a quarter of the numbers
    _vit("ViT-Ti/32", 256, 224, 32, image=(192, 6), text=(192, 3)),
    _vit("ViT-Ti/16@112px", 256, 112, 16, image=(192, 6), text=(192, 3)),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _ARCHITECTURES}


def known_architecture(name: str) -> Architecture:
    """Look a model name up.

    Raises:
        ValueError: no such model; lists those that there are.
    """
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        meant = f" did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown model name {name!r};{meant} known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def describe_architecture(architecture: Architecture) -> str:
    """Name an architecture that has no name, by its sizes."""
    if architecture.is_vit:
        return f"ViT-{architecture.vision_width}x{architecture.vision_layers}/{architecture.vision_patch_size}"
    return f"RN-{architecture.vision_width}x{'-'.join(map(str, architecture.vision_layers))}"  # type: ignore[arg-type]
