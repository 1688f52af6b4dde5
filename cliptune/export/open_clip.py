"""An export for open_clip: a folder that it loads as `local-dir:FOLDER`, and a hub as `hf-hub:NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cliptune.model.architectures import GELU_TANH, QUICK_GELU, Architecture
from cliptune.model.weights import Weights
from cliptune.runtime.files import write_json


def refusals(shape: Architecture) -> Iterator[str]:
    """Yield what the library's class has no place for."""
    for tower, hidden, width in (
        ("image", shape.vision_mlp_width, shape.vision_width),
        ("text", shape.text_mlp_width, shape.transformer_width),
    ):
        if hidden is not None and int(width * (hidden / width)) != hidden:  # it is told the ratio alone
            yield f"an MLP of {hidden} in the {tower} tower, {width} wide"


def write(weights: Weights, folder: Path) -> None:
    """Write weights without projection layers, and the settings that the library builds its model of."""
    from safetensors.torch import save_file  # noqa: PLC0415  (slow to import)

    tensors = {name: value.contiguous() for name, value in weights.tensors.items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    shape = weights.architecture
    write_json(folder / "open_clip_config.json", {
        "model_cfg": _model(weights),
        "preprocess_cfg": {
            "size": shape.image_resolution, "mode": "RGB", "mean": list(shape.mean), "std": list(shape.std),
            "interpolation": "bicubic", "resize_mode": "shortest",
        },
    })  # fmt: skip


def _model(weights: Weights) -> dict[str, Any]:
    shape = weights.architecture
    is_quick = shape.activation == QUICK_GELU
    act = {"act_kwargs": {"approximate": "tanh"}} if shape.activation == GELU_TANH else {}
    vision: dict[str, Any] = {
        "image_size": shape.image_resolution, "width": shape.vision_width,
        "layers": list(shape.vision_layers) if isinstance(shape.vision_layers, tuple) else shape.vision_layers,
        # of a ResNet's attention pooling, which sees 32 times its width
        "head_width": shape.vision_width * (1 if shape.is_vit else 32) // shape.vision_heads,
    }  # fmt: skip
    if shape.is_vit:
        vision |= {"patch_size": shape.vision_patch_size, "norm_kwargs": {"eps": shape.vision_eps}, **act}
        vision |= {"mlp_ratio": (shape.vision_mlp_width or 4 * shape.vision_width) / shape.vision_width}
        if shape.image_pooling != "class":
            vision |= {"pool_type": "avg", "final_ln_after_pool": shape.image_pooling == "average"}
    text: dict[str, Any] = {
        "context_length": shape.context_length, "vocab_size": shape.vocab_size, "width": shape.transformer_width,
        "heads": shape.transformer_heads, "layers": shape.transformer_layers, "norm_kwargs": {"eps": shape.text_eps},
        "mlp_ratio": (shape.text_mlp_width or 4 * shape.transformer_width) / shape.transformer_width, **act,
        "pool_type": {"largest": "argmax", "end": "eos"}.get(shape.text_pooling, shape.text_pooling),
        **({} if shape.causal else {"no_causal_mask": True}),
        **({} if shape.end_token is None else {"eos_id": shape.end_token}),
    }  # fmt: skip
    bias = weights.tensors.get("logit_bias")
    more = {} if bias is None else {"init_logit_bias": bias.item()}
    return {"embed_dim": shape.embed_dim, "quick_gelu": is_quick, "vision_cfg": vision, "text_cfg": text, **more}
