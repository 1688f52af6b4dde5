"""An export for transformers: its `CLIPModel`, with the tokenizer and the image processor as its hub has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cliptune.model.architectures import GELU, GELU_TANH, QUICK_GELU, Architecture
from cliptune.model.state_dicts import to_hugging_face_names
from cliptune.model.weights import Weights
from cliptune.preprocess.tokens import VOCABULARY_SIZE, merges, vocabulary
from cliptune.runtime.files import write_json, write_text

START, END = VOCABULARY_SIZE - 2, VOCABULARY_SIZE - 1
_ACTIVATIONS = {QUICK_GELU: "quick_gelu", GELU: "gelu", GELU_TANH: "gelu_pytorch_tanh"}


def refusals(shape: Architecture) -> Iterator[str]:
    """Yield what the library's class has no place for."""
    if not shape.is_vit:
        yield "its image tower is a ResNet, and the library's CLIP has a ViT alone"
    if shape.image_pooling != "class":
        yield f"image_pooling {shape.image_pooling}"
    if not shape.causal:
        yield "a text tower that is not causal"
    if shape.text_pooling not in {"largest", "end"} or shape.end_token == _LARGEST:
        yield f"text_pooling {shape.text_pooling}"


def write(weights: Weights, folder: Path) -> None:
    """Write weights without projection layers, their settings, tokenizer and image processor."""
    from transformers import CLIPModel  # noqa: PLC0415  (an extra)
    from transformers.utils import logging  # noqa: PLC0415

    with torch.device("meta"):
        model = CLIPModel(_config(weights.architecture))
    model.load_state_dict(to_hugging_face_names(weights.tensors), assign=True)
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if was_shown:
        logging.enable_progress_bar()
    write_processor(weights.architecture, folder)
    write_tokenizer(weights.architecture, folder)


def write_processor(shape: Architecture, folder: Path) -> None:
    """Write CLIP's preprocessing as the library reads it."""
    side = shape.image_resolution
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,  # Pillow's bicubic
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(shape.mean), "image_std": list(shape.std),
    })  # fmt: skip


def write_tokenizer(shape: Architecture, folder: Path) -> None:
    """Write CLIP's vocabulary, from the `clip` package, as the library reads it."""
    start, end = (_names()[index] for index in (START, END))
    write_json(folder / "vocab.json", vocabulary())
    write_text(folder / "merges.txt", "#version: 0.2\n" + "\n".join(merges()) + "\n")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": shape.context_length, "do_lower_case": True,
        "add_prefix_space": False, "errors": "replace", **special,
    })  # fmt: skip


_LARGEST = 2
"""The `eos_token_id` by which the library pools at the largest id, as OpenAI's models do."""


def _names() -> dict[int, str]:
    return {index: name for name, index in vocabulary().items()}


def _config(shape: Architecture) -> Any:
    from transformers import CLIPConfig  # noqa: PLC0415  (an extra)

    shared = {"hidden_act": _ACTIVATIONS[shape.activation], "projection_dim": shape.embed_dim}
    width = shape.vision_width
    vision = {
        "hidden_size": width, "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads, "intermediate_size": shape.vision_mlp_width or 4 * width,
        "image_size": shape.image_resolution, "patch_size": shape.vision_patch_size,
        "layer_norm_eps": shape.vision_eps, **shared,
    }  # fmt: skip
    width = shape.transformer_width
    text = {
        "hidden_size": width, "num_hidden_layers": shape.transformer_layers,
        "num_attention_heads": shape.transformer_heads, "intermediate_size": shape.text_mlp_width or 4 * width,
        "max_position_embeddings": shape.context_length, "vocab_size": shape.vocab_size,
        "layer_norm_eps": shape.text_eps, "bos_token_id": START, "pad_token_id": END,
        "eos_token_id": _LARGEST if shape.end_token is None else shape.end_token, **shared,
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.embed_dim)
