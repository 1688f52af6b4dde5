"""What CLIP models look like: the sizes of the known ones, and the description that a checkpoint stores."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from cliptune.preprocess.moments import CLIP_MEAN, CLIP_STD, Triple

DEFAULT_MODEL_NAME = "ViT-B/32"
QUICK_GELU, GELU, GELU_TANH = "quick_gelu", "gelu", "gelu_tanh"
# several times those of the largest CLIP: of narrow layers, a few MB could be weights for any size of input
MAX_RESOLUTION, MAX_PATCHES, MAX_CONTEXT_LENGTH = 4096, 16_384, 4096
ACTIVATIONS = (QUICK_GELU, GELU, GELU_TANH)
"""x * sigmoid(1.702 x), as OpenAI's; the exact one; its approximation by tanh."""
IMAGE_POOLINGS = ("class", "average", "average_of_normed")
"""The class token; `ln_post` of the patches' mean; the mean of `ln_post` of each patch."""
TEXT_POOLINGS = ("largest", "end", "first", "last")
"""The position of the largest id, as OpenAI's; the first one of `end_token`; the first or last of the whole context."""


@dataclass(frozen=True)
class Architecture:
    """What OpenAI's `CLIP` class needs to be built, and what its features depend on and no tensor shows.

    Attributes:
        vision_mlp_width: hidden units of the MLPs of a ViT; None: four times its width. `text_mlp_width` likewise.
        vision_eps: of the image tower's LayerNorms; `text_eps` likewise.
        causal: whether a text's tokens see only what stands before them; else all of the context, padding included.
        image_pooling: of a ViT, one of `IMAGE_POOLINGS`.
        text_pooling: one of `TEXT_POOLINGS`; `end` alone has an `end_token`.
        mean: of the pixels, red, green and blue as fractions of 255, which are brought to 0; `std` to 1.
    """

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
    vision_mlp_width: int | None = None
    text_mlp_width: int | None = None
    vision_eps: float = 1e-5
    text_eps: float = 1e-5
    causal: bool = True
    image_pooling: str = "class"
    text_pooling: str = "largest"
    end_token: int | None = None
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD

    @property
    def is_vit(self) -> bool:
        """Tell a Vision Transformer from a ResNet."""
        return self.vision_patch_size is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as a checkpoint stores them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Read what `to_dict` wrote, now or before there were all of today's keys.

        Raises:
            ValueError: keys are missing or unknown, or a value is none that an architecture can have.
        """
        try:
            plain: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            read = cls(**plain)
            fault = next(read._faults(), None)
        except TypeError as error:
            fault = str(error)
        if fault:
            raise ValueError(f"not the description of an architecture: {fault}")
        return read

    def unseen(self) -> dict[str, Any]:
        """Return what the features depend on and no tensor shows, as plain values: a part of `to_dict`."""
        values = self.to_dict()
        return {key: values[key] for key in _UNSEEN}

    def with_unseen(self, values: dict[str, Any]) -> Architecture:
        """Return this architecture with what `unseen` gave for another, or some of it.

        Raises:
            ValueError: as `from_dict`.
        """
        return Architecture.from_dict({**self.to_dict(), **{key: values[key] for key in _UNSEEN if key in values}})

    def same_tensors(self, other: Architecture) -> bool:
        """Tell whether weights of one fit the other, whatever they are named and no tensor shows."""
        return all(getattr(self, key) == getattr(other, key) for key in _SEEN)

    def _faults(self) -> Iterator[str]:
        """Say what is wrong with values that anyone may have written, the first of them first."""
        counts = self.vision_layers if isinstance(self.vision_layers, tuple) else (self.vision_layers,)
        optional = (self.vision_patch_size, self.vision_mlp_width, self.text_mlp_width)
        given = [size for size in optional if size is not None]
        for size in (*(getattr(self, key) for key in _SIZES), *counts, *given):
            if type(size) is not int or size < 1:
                yield f"{size!r} is no size"
        if not isinstance(self.name, str):
            yield "its name is no text"
        if self.transformer_width % self.transformer_heads or (self.is_vit and self.vision_width % self.vision_heads):
            yield "its heads do not divide its width"
        for key, known in _CHOICES.items():
            if getattr(self, key) not in known:
                yield f"{key} {getattr(self, key)!r}"
        if (self.text_pooling == "end") != (type(self.end_token) is int and 0 <= self.end_token < self.vocab_size):
            yield f"text_pooling {self.text_pooling!r} with end_token {self.end_token!r}"
        numbers = (self.vision_eps, self.text_eps, *self.mean, *self.std)
        if not all(type(number) in {int, float} and 0 <= number < 1e6 for number in numbers):
            yield f"an eps, mean or std among {numbers}"
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            yield f"mean {self.mean} and std {self.std}"


_CHOICES = {
    "activation": ACTIVATIONS,
    "image_pooling": IMAGE_POOLINGS,
    "text_pooling": TEXT_POOLINGS,
    "causal": (True, False),
}
_UNSEEN = (
    "activation", "vision_heads", "transformer_heads", "vision_eps", "text_eps", "causal", "image_pooling",
    "text_pooling", "end_token", "mean", "std",
)  # fmt: skip
_SEEN = tuple(field.name for field in fields(Architecture) if field.name not in {*_UNSEEN, "name"})
_SIZES = (
    "embed_dim", "image_resolution", "vision_width", "vision_heads", "context_length", "vocab_size",
    "transformer_width", "transformer_heads", "transformer_layers",
)  # fmt: skip


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


def name_of(architecture: Architecture, *, default: str = "") -> str:
    """Return the known name of an architecture, else `default`, else a description of its sizes."""
    heads = architecture.vision_heads, architecture.transformer_heads
    for name, known in ARCHITECTURES.items():
        if known.same_tensors(architecture) and (known.vision_heads, known.transformer_heads) == heads:
            return name
    return default or describe_architecture(architecture)


def check_sizes(found: Architecture, source: object) -> None:
    """Refuse sizes that no CLIP has.

    Raises:
        ValueError: names the source and the size.
    """
    side = found.image_resolution // (found.vision_patch_size or 32)
    for what, size, limit in (
        ("image resolution", found.image_resolution, MAX_RESOLUTION),
        ("number of patches", side * side, MAX_PATCHES),
        ("context length", found.context_length, MAX_CONTEXT_LENGTH),
    ):
        if not 1 <= size <= limit:
            raise ValueError(f"{source}: its {what} would be {size:,}; at most {limit:,} is supported")
