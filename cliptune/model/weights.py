"""Weights files of every published kind, read and converted to the names of OpenAI's classes.

No file is trusted to run code: TorchScript archives are read as plain tensors, `.pt` files with `weights_only=True`,
the rest through safetensors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cliptune.model.architectures import (
    ARCHITECTURES,
    DEFAULT_MODEL_NAME,
    GELU,
    QUICK_GELU,
    Architecture,
    describe_architecture,
    known_architecture,
)
from cliptune.model.bounds import check_size_on_disk
from cliptune.model.checkpoint_file import is_checkpoint, load_tensors
from cliptune.model.published import ARCHIVES, published_weights
from cliptune.model.torchscript import is_torchscript, read_torchscript

logger = logging.getLogger(__name__)

NAMED_WEIGHTS = ("auto", "openai", "none")
"""OpenAI's where published, OpenAI's, random ones."""
# open_clip's largest ViTs have heads that are not 64 wide: image width -> number of heads
_UNUSUAL_VISION_HEADS = {1280: 16, 1408: 16, 1664: 16}
# several times those of the largest CLIP: of narrow layers, a few MB could be weights for any size of input
MAX_RESOLUTION, MAX_PATCHES, MAX_CONTEXT_LENGTH = 4096, 16_384, 4096
MAX_SETTINGS_BYTES = 2**24


class Weights(NamedTuple):
    """Weights as read from a file: tensors by the names of OpenAI's `CLIP`, float32."""

    architecture: Architecture
    tensors: dict[str, Tensor]
    projections: dict[str, Tensor]
    """`image_projection.weight`, `text_projection.weight` of a checkpoint of this toolkit; else empty."""
    self_test: Any = None
    """What a checkpoint of this toolkit is checked by."""
    source: str = ""
    """Where they come from."""


def find_weights(
    model_name: str | None, pretrained: str | Path | Weights, *, activation: str | None = None
) -> Weights | None:
    """Read the weights that `--pretrained` names; None: random ones.

    Args:
        model_name: for which `auto`, `openai` or `none` is meant; None: the default's.
        pretrained: one of these, a file or folder (see `read_weights`), or weights that are read already.
        activation: `quick_gelu` or `gelu`, for files that do not tell.

    Raises:
        ValueError: an unknown model name, or weights that cannot be used.
        OSError: there are none; says how to get them.
    """
    if isinstance(pretrained, Weights):
        return pretrained
    name = model_name or DEFAULT_MODEL_NAME
    if str(pretrained) not in NAMED_WEIGHTS:
        weights = read_weights(Path(pretrained), activation=activation)
        if model_name not in {None, weights.architecture.name}:
            message = "%s holds a %s, and the file decides: the model name %s is not used"
            logger.warning(message, pretrained, weights.architecture.name, model_name)
        return weights
    known_architecture(name)  # a wrong name is told before anything is looked for
    if pretrained == "none" or (pretrained == "auto" and name not in ARCHIVES):
        return None
    return read_published(name, activation=activation)


def read_published(name: str, *, activation: str | None = None) -> Weights:
    """Find or download OpenAI's weights for a model name, and read them.

    Raises:
        ValueError: nothing was published under that name, or it was made for another activation than the one asked for.
        OSError: they cannot be had; says why and how to get them.
    """
    # told here, since the settings that hubs keep beside these files do not all say it
    return read_weights(published_weights(name), activation=activation, told=QUICK_GELU)


def read_weights(path: Path, *, activation: str | None = None, told: str | None = None) -> Weights:
    """Read CLIP weights from a file, or a folder as published on a model hub; its content tells the format.

    Formats: OpenAI's TorchScript archive; a state dict in OpenAI's names, bare or inside a training checkpoint
    (open_clip's `.pt`); open_clip's and Hugging Face's safetensors; a checkpoint of this toolkit.

    Args:
        path: the file; in a folder, its weights file is looked for.
        activation: `quick_gelu` or `gelu`, for files that do not tell.
        told: the activation that the weights are known to have, whatever stands beside the file.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, of another kind of model, or its activation is not known.
    """
    path = _weights_file(path)
    if is_torchscript(path):
        tensors, told = read_torchscript(path), QUICK_GELU
    else:
        content = _read_safetensors(path) if _is_safetensors(path) else load_tensors(path)
        if is_checkpoint(content):
            weights = own_weights(content, path)
            _agree_activation(path, asked=activation, told=weights.architecture.activation)
            return weights
        tensors = _unwrap(content, path)
        if "input_resolution" in tensors:  # only OpenAI's archives have it, and the state dict of a loaded archive
            told = QUICK_GELU
    settings = _settings_beside(path)
    told = told or _activation_from_settings(settings)
    activation = _agree_activation(path, asked=activation, told=told)
    tensors = _to_openai_names(tensors, path)
    architecture = _architecture_of(tensors, path, activation=activation, vision_heads=_vision_heads(settings))
    return Weights(architecture, {name: tensor.float() for name, tensor in tensors.items()}, {}, source=str(path))


def own_weights(content: dict[str, Any], source: str | Path) -> Weights:
    """Take the weights out of a checkpoint of this toolkit, without a copy.

    Args:
        content: of the checkpoint; its tensors may be on any device.
        source: where it comes from.

    Raises:
        ValueError: its parts do not fit each other.
    """
    try:
        architecture = Architecture.from_dict(content["architecture"])
        state = {name: value.detach().cpu() for name, value in content["model_state_dict"].items()}
        uses_quick_gelu = bool(state.pop("_extra_state"))
        tensors = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
        tensors["logit_scale"] = state["logit_scale"].reshape(())
        projections = {name: state[name] for name in ("image_projection.weight", "text_projection.weight")}
        sizes = {tuple(weight.shape) for weight in projections.values()}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{source}: damaged checkpoint ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise ValueError(f"{source}: damaged checkpoint: {error}") from None
    # what the tensors' shapes say must be what the checkpoint says: nothing is built of sizes that nobody can hold
    found = _architecture_of(
        tensors, Path(source), activation=architecture.activation, vision_heads=architecture.vision_heads
    )
    fits = len(sizes) == 1 and {size[1:] for size in sizes} == {(architecture.embed_dim,)}
    found = replace(found, transformer_heads=architecture.transformer_heads)  # which no tensor tells
    if not (fits and found.same_tensors(architecture)) or uses_quick_gelu != (architecture.activation == QUICK_GELU):
        raise ValueError(f"{source}: damaged checkpoint: its tensors are not those of its architecture")
    return Weights(architecture, tensors, projections, content.get("self_test"), str(source))


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        # open_clip's first: beside it timm keeps a model.safetensors of the image tower alone
        names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no weights file in this folder; looked for {', '.join(names)}")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"--pretrained: no such file: {path}; or one of {', '.join(NAMED_WEIGHTS)}")
    return path


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file  # noqa: PLC0415  (only where such a file is read)

    check_size_on_disk(path)
    try:
        # copies: what was read is a view of the file, which may change
        tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{path}: damaged safetensors file: {error}") from None
    return tensors


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors by name")
    for prefix in ("module.", "_orig_mod.", "text."):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _settings_beside(path: Path) -> dict[str, Any]:
    """Read the settings file that hubs keep beside weights, if there is one: open_clip's or Hugging Face's."""
    for name in ("open_clip_config.json", "config.json"):
        beside = path.parent / name
        try:
            if not beside.is_file() or beside.stat().st_size > MAX_SETTINGS_BYTES:
                continue
            settings = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(settings, dict) and ("model_cfg" in settings or "text_config" in settings):
            return settings
    return {}


def _activation_from_settings(settings: dict[str, Any]) -> str | None:
    if isinstance(settings.get("model_cfg"), dict):
        return QUICK_GELU if settings["model_cfg"].get("quick_gelu", False) else GELU
    # Hugging Face writes only what differs from its defaults, and its default is quick_gelu
    parts = [settings.get(key) for key in ("text_config", "vision_config")]
    told = {str(part.get("hidden_act", QUICK_GELU)) for part in parts if isinstance(part, dict)}
    return told.pop() if len(told) == 1 else None


def _vision_heads(settings: dict[str, Any]) -> int | None:
    try:
        if "model_cfg" in settings:
            vision = settings["model_cfg"]["vision_cfg"]
            return int(vision["width"]) // int(vision.get("head_width", 64))
        heads = settings["vision_config"].get("num_attention_heads")
        return None if heads is None else int(heads)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError):
        return None


def _agree_activation(path: Path, *, asked: str | None, told: str | None) -> str:
    if told is not None and told not in {QUICK_GELU, GELU}:
        raise ValueError(f"{path}: activation {told!r} is not supported; known: {QUICK_GELU}, {GELU}")
    if asked is not None and told is not None and asked != told:
        raise ValueError(f"{path}: made for activation {told}, not {asked}")
    activation = asked or told
    if activation is None:
        raise ValueError(
            f"{path} does not tell its activation, and the wrong one changes results silently; "
            f"pass --activation {QUICK_GELU} (OpenAI's weights and those trained from them) or "
            f"--activation {GELU} (most of open_clip's others)"
        )
    return activation


def _to_openai_names(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if "vision_model.embeddings.patch_embedding.weight" in tensors:
        tensors = _from_hugging_face(tensors)
    dropped = {"input_resolution", "context_length", "vocab_size", "attn_mask"}
    tensors = {name: value for name, value in tensors.items() if name not in dropped}
    needed = {"visual.conv1.weight", "text_projection", "positional_embedding", "token_embedding.weight", "logit_scale"}
    missing = sorted(needed - tensors.keys())
    if missing:
        raise ValueError(f"{path}: not the weights of a CLIP that OpenAI's classes can hold; no {', '.join(missing)}")
    return tensors


_HUGGING_FACE_NAMES = (
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def _from_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' `CLIPModel`; its separate query, key and value maps become one."""
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids") or ".k_proj." in name or ".v_proj." in name:
            continue
        new = name
        for old, openai in _HUGGING_FACE_NAMES:
            new = new.replace(old, openai)
        if ".q_proj." in name:  # OpenAI's one in_proj is [q; k; v], stacked along the output
            parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            new = new.replace(".self_attn.q_proj.", ".attn.in_proj_")
            converted[new] = torch.cat(parts)
        elif name == "visual_projection.weight":  # x @ proj there, a Linear's x @ weight.T here
            converted["visual.proj"] = tensor.T.contiguous()
        elif name == "text_projection.weight":
            converted["text_projection"] = tensor.T.contiguous()
        else:
            converted[new] = tensor
    return converted


def _architecture_of(
    tensors: dict[str, Tensor], path: Path, *, activation: str, vision_heads: int | None
) -> Architecture:
    """Derive the architecture from the tensors' shapes (as OpenAI's `build_model` does) and name it if known."""
    try:
        vision = _vit_shape(tensors) if "visual.proj" in tensors else _resnet_shape(tensors)
        text_width = tensors["ln_final.weight"].shape[0]
        found = Architecture(
            name="",
            embed_dim=tensors["text_projection"].shape[1],
            **vision,
            context_length=tensors["positional_embedding"].shape[0],
            vocab_size=tensors["token_embedding.weight"].shape[0],
            transformer_width=text_width,
            transformer_heads=text_width // 64,
            transformer_layers=_count(tensors, "transformer.resblocks."),
            activation=activation,
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: not the weights of a ViT or ResNet CLIP; no {error}") from None
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not the weights of a ViT or ResNet CLIP: {error}") from None
    if vision_heads is not None and found.is_vit:
        found = replace(found, vision_heads=vision_heads)
    _check_sizes(found, path)
    same = [name for name, known in ARCHITECTURES.items() if known.same_tensors(found)]
    return replace(found, name=same[0] if same else describe_architecture(found))


def _check_sizes(found: Architecture, path: Path) -> None:
    side = found.image_resolution // (found.vision_patch_size or 32)
    for what, size, limit in (
        ("image resolution", found.image_resolution, MAX_RESOLUTION),
        ("number of patches", side * side, MAX_PATCHES),
        ("context length", found.context_length, MAX_CONTEXT_LENGTH),
    ):
        if not 1 <= size <= limit:
            raise ValueError(f"{path}: its {what} would be {size:,}; at most {limit:,} is supported")
    if found.is_vit and (found.vision_heads < 1 or found.vision_width % found.vision_heads):
        raise ValueError(f"{path}: {found.vision_heads} heads do not divide the image tower's width")


def _vit_shape(tensors: dict[str, Tensor]) -> dict[str, Any]:
    width, _, _, patch = tensors["visual.conv1.weight"].shape  # [width, 3, patch, patch]
    # one position a patch, and one for the class token
    grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_resolution": patch * grid,
        "vision_layers": _count(tensors, "visual.transformer.resblocks."),
        "vision_width": width,
        "vision_patch_size": patch,
        "vision_heads": _UNUSUAL_VISION_HEADS.get(width, width // 64),
    }


def _resnet_shape(tensors: dict[str, Tensor]) -> dict[str, Any]:
    width = tensors["visual.layer1.0.conv1.weight"].shape[0]
    # the stem and the four stages shrink an image 32-fold; attention pooling has one position a cell, and one of all
    grid = round((tensors["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_resolution": grid * 32,
        "vision_layers": tuple(_count(tensors, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
        "vision_width": width,
        "vision_patch_size": None,
        "vision_heads": width * 32 // 64,
    }


def _count(names: Iterable[str], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
