"""An export for OpenAI's `clip` package: a state dict, from whose shapes its builder derives everything else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from cliptune.model.architectures import QUICK_GELU, Architecture
from cliptune.model.weights import Weights
from cliptune.preprocess.moments import CLIP_MEAN, CLIP_STD
from cliptune.runtime.files import atomic_writer

FILE = "model.pt"


def refusals(shape: Architecture) -> Iterator[str]:
    """Yield what the package takes for granted and is otherwise here."""
    if shape.activation != QUICK_GELU:
        yield f"activation {shape.activation}, and it has QuickGELU alone"
    image_heads = shape.vision_width // 64 if shape.is_vit else shape.vision_width * 32 // 64
    for tower, heads, usual in (
        ("image", shape.vision_heads, image_heads),
        ("text", shape.transformer_heads, shape.transformer_width // 64),
    ):
        if heads != usual:
            yield f"{heads} heads in the {tower} tower, and its heads are 64 wide"
    if (shape.vision_mlp_width, shape.text_mlp_width) != (None, None):
        yield "MLPs that are not four times as wide as the tower"
    if (shape.vision_eps, shape.text_eps) != (1e-5, 1e-5):
        yield "another eps of the norms"
    if not shape.causal or (shape.image_pooling, shape.text_pooling) != ("class", "largest"):
        yield f"image_pooling {shape.image_pooling}, text_pooling {shape.text_pooling}, causal {shape.causal}"
    if (shape.mean, shape.std) != (CLIP_MEAN, CLIP_STD):
        yield "another mean and std of the pixels"


def write(weights: Weights, folder: Path) -> None:
    """Write weights without projection layers; the builder rounds them to float16 when it loads them."""
    tensors = {name: value for name, value in weights.tensors.items() if name != "logit_bias"}
    # what OpenAI's archives have as well, and their builder leaves out: readers tell by it that this is QuickGELU
    shape = weights.architecture
    sizes = {
        "input_resolution": shape.image_resolution, "context_length": shape.context_length,
        "vocab_size": shape.vocab_size,
    }  # fmt: skip
    with atomic_writer(folder / FILE) as file:
        torch.save({**tensors, **{name: torch.tensor(value) for name, value in sizes.items()}}, file)
