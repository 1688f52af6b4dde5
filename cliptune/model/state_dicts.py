"""State dicts of others: unwrapped, and by the names of OpenAI's classes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cliptune.model.architectures import GELU, QUICK_GELU, Architecture
from cliptune.runtime.messages import count, first_few, shown

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema")
"""Keys under which training checkpoints hold a state dict; the first that is there counts."""
_WRAPPING_MODULES = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DDP, `torch.compile`, FSDP and activation checkpointing put into names, at the beginning or between."""
_IMAGE_ANCHORS = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
_TEXT_ANCHOR = "token_embedding.weight"
_OWN = ("image_projection.weight", "text_projection.weight")
_KINDS = (
    ("visual.trunk.", "with an image tower of timm's"),
    ("bert.", "with BERT as its text tower"),
    ("text.transformer.embeddings.", "with a text tower of transformers'"),
    ("text_decoder.", "a CoCa"),
    ("word_embeddings.", "with a text tower of another kind, such as BERT"),
)
"""Parts of names by which models with other towers are told."""


class OtherModelError(ValueError):
    """A file that is whole, and holds something else than both towers of a CLIP."""


class StateDict(NamedTuple):
    """Tensors of a CLIP by the names of its own project."""

    tensors: dict[str, Tensor]
    own: dict[str, Tensor]
    """What `CLIPModel.state_dict` has beside its backbone: projections, `logit_scale`, `logit_bias` if there is one,
    `_extra_state`; else empty."""

    @property
    def is_hugging_face(self) -> bool:
        """Tell the names of transformers from OpenAI's, which open_clip has, too."""
        return _IMAGE_ANCHORS[1] in self.tensors


def find_model(content: Any, path: Path) -> StateDict:
    """Find a CLIP in the content of a file: under a key, under a prefix, beside other modules.

    Raises:
        ValueError: there is none, or several; an `OtherModelError` where the file is one of something else.
    """
    named = _unwrap(content, path)
    names = {".".join(part for part in name.split(".") if part not in _WRAPPING_MODULES): name for name in named}
    tensors = {name: named[old] for name, old in names.items()}
    if any(".lora_" in name for name in tensors):
        raise OtherModelError(
            f"{path}: not the weights of a CLIP but adapters of peft, or a model with them: merge them into the model "
            "(merge_and_unload), and save that"
        )
    prefixes = sorted({name.removesuffix(anchor) for anchor in _IMAGE_ANCHORS for name in tensors if _is(name, anchor)})
    has_text = any(_is(name, _TEXT_ANCHOR) for name in tensors)
    if not prefixes or not has_text:
        raise OtherModelError(f"{path}: {_describe(tensors, has_image=bool(prefixes), has_text=has_text)}")
    if len(prefixes) > 1 and "" not in prefixes:
        raise ValueError(f"{path}: holds {len(prefixes)} models, {', '.join(map(shown, prefixes))}: save one of them")
    prefix = prefixes[0]
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    outer = prefix.removesuffix("backbone.")
    if outer != prefix and all(outer + name in tensors for name in _OWN):
        own = {name.removeprefix(outer): value for name, value in tensors.items() if not name.startswith(prefix)}
        return StateDict(found, own)
    others = [shown(name) for name in tensors if not name.startswith(prefix) and name not in _NO_WEIGHTS]
    if others:
        logger.warning("%s: the model is taken from %s; not used: %s", path, shown(prefix), first_few(others))
    # open_clip's CustomTextCLIP has the text tower in a module of its own
    return StateDict({name.removeprefix("text."): value for name, value in found.items()}, {})


def to_openai_names(state: StateDict, path: Path) -> dict[str, Tensor]:
    """Rename and reshape where needed; leave out what features do not depend on.

    Raises:
        ValueError: tensors are missing, or there are some that OpenAI's classes have no place for.
    """
    try:
        tensors = _from_hugging_face(state.tensors) if state.is_hugging_face else dict(state.tensors)
        if "positional_embedding_res" in tensors:  # Long-CLIP trains all positions but the first 20 anew, in another
            rest = tensors.pop("positional_embedding_res")
            tensors["positional_embedding"] = torch.cat([tensors["positional_embedding"][:20], rest[20:]])
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: not the weights of a CLIP that OpenAI's classes can hold; no {error}") from None
    bias = tensors.pop("logit_bias", None)
    if bias is not None and bias.numel() == 1:
        tensors["logit_bias"] = bias.reshape(())
    elif bias is not None:
        logger.warning("%s: its logit_bias of %s is not used: one is supported", path, count(bias.numel(), "value"))
    tensors = {name: value for name, value in tensors.items() if name not in _NO_WEIGHTS}
    missing = sorted({"visual.conv1.weight", "text_projection", *_TEXT_PARTS} - tensors.keys())
    if missing:
        raise OtherModelError(
            f"{path}: not the weights of a CLIP that OpenAI's classes can hold; no {', '.join(missing)}"
        )
    unknown = [shown(name) for name in tensors if not _OPENAI_NAMES.fullmatch(name)]
    if unknown:
        raise OtherModelError(
            f"{path}: not the weights of a CLIP that OpenAI's classes can hold; they have no place for "
            f"{first_few(unknown)}"
        )
    return tensors


def to_hugging_face_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a ViT from OpenAI's names to those of transformers' `CLIPModel`, as they are read here."""
    converted: dict[str, Tensor] = {}
    outer = sorted(_HUGGING_FACE_NAMES, key=lambda names: -len(names[1]))  # `visual.transformer.` before `transformer.`
    for name, tensor in tensors.items():
        new = name
        theirs, ours = next(((a, b) for a, b in outer if b[:1] != "." and name.startswith(b)), ("", ""))
        new = theirs + name.removeprefix(ours)
        for inner, openai in _HUGGING_FACE_NAMES:
            new = new.replace(openai, inner) if openai[:1] == "." else new
        if ".attn.in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[new.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = rows.contiguous()
        elif name in _PROJECTIONS:
            converted[_PROJECTIONS[name]] = tensor.T.contiguous()
        elif name != "logit_bias":  # which their class has not
            converted[new] = tensor
    return converted


def extra_state(architecture: Architecture) -> Tensor:
    """Return what no tensor shows as a tensor, for a state dict: the bytes of JSON, uint8 `[n]`.

    Plain values would not pass through everything that state dicts pass through, such as shards and `clone`.
    """
    unseen = {"context_length": architecture.context_length, **architecture.unseen()}
    return torch.tensor(list(json.dumps(unseen).encode()), dtype=torch.uint8)


def read_extra_state(state: Tensor) -> dict[str, Any]:
    """Read what `extra_state` gave, now or when it was a boolean: is it QuickGELU?

    A mean of several equal ones, in any type, is one of them.

    Raises:
        ValueError: it is none of these.
    """
    if state.ndim == 0:
        return {"activation": QUICK_GELU if bool(state) else GELU}
    try:
        values = json.loads(bytes(state.detach().cpu().round().to(torch.uint8).tolist()))
        if not isinstance(values, dict):
            raise TypeError
    except (ValueError, TypeError, RuntimeError, RecursionError):
        raise ValueError("its _extra_state cannot be read; of a mean of models, take that of one of them") from None
    values.pop("context_length", None)  # which the tensors show
    return values


_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask", "n_averaged"}
_TEXT_PARTS = ("positional_embedding", "token_embedding.weight", "logit_scale")
_BLOCKS = (
    r"transformer\.resblocks\.\d+\.((ln_1|ln_2|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
    r"|attn\.in_proj_(weight|bias))"
)
_OPENAI_NAMES = re.compile(
    rf"visual\.(class_embedding|positional_embedding|proj|conv1\.weight|ln_(pre|post)\.(weight|bias)|{_BLOCKS})"
    r"|visual\.(conv[23]\.weight|bn[123]\.\w+|layer[1-4]\..*|attnpool\..*)"
    rf"|positional_embedding|text_projection|logit_(scale|bias)|token_embedding\.weight|ln_final\.(weight|bias)|{_BLOCKS}"
)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, dict):
        keys = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
        if not keys:
            break
        if len(keys) > 1:
            logger.info("%s: its %s is taken, not %s", path, keys[0], ", ".join(keys[1:]))
        content = content[keys[0]]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        keys = [shown(key) for key in content] if isinstance(content, dict) else []
        holds = f"; it holds {first_few(keys)}" if keys else ""
        raise ValueError(
            f"{path}: holds no tensors by name{holds}. A state dict is looked for bare or under {', '.join(WRAPPERS)}"
        )
    return tensors


def _is(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _describe(names: Iterable[str], *, has_image: bool, has_text: bool) -> str:
    """Say what weights are instead of both towers of a CLIP."""
    names = list(names)
    kinds = [kind for part, kind in _KINDS if any(part in name for name in names)]
    if kinds and (has_image or has_text):
        return f"not the weights of a CLIP that OpenAI's classes can hold: {kinds[0]}"
    # an image tower alone has no `visual.` before its names, or transformers' without `vision_model.`
    has_image = has_image or {"conv1.weight", "class_embedding", "proj"} <= set(names)
    has_image = has_image or any(_is(name, "embeddings.patch_embedding.weight") for name in names)
    if has_image != has_text:
        found, missing = ("text", "image") if has_text else ("image", "text")
        return (
            f"not the weights of a CLIP but of one tower: its {found} tower, without the {missing} tower. Name "
            "the file or folder of the whole model that it comes from"
        )
    return (
        f"not the weights of a CLIP: none of its {count(len(names), 'tensor')} is {_IMAGE_ANCHORS[0]} or "
        f"{_TEXT_ANCHOR}; they are {first_few([shown(name) for name in names])}"
    )


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


_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
"""x @ proj here, a Linear's x @ weight.T there."""


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
        else:
            converted[new] = tensor
    for openai, theirs in _PROJECTIONS.items():
        if theirs in converted:
            converted[openai] = converted.pop(theirs).T.contiguous()
    return converted
