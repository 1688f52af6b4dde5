"""Weights files of every published kind, read and converted to the names of OpenAI's classes.

No file is trusted to run code: TorchScript archives are read as plain tensors, `.pt` files with `weights_only=True`,
the rest through safetensors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cliptune.model.architectures import (
    DEFAULT_MODEL_NAME,
    GELU,
    QUICK_GELU,
    Architecture,
    check_sizes,
    known_architecture,
    name_of,
)
from cliptune.model.checkpoint_file import is_checkpoint
from cliptune.model.hub_files import read_hub_file, weights_files, whole_file
from cliptune.model.hub_settings import HubSettings, check_refused, read_settings, settings_path
from cliptune.model.published import ARCHIVES, published_weights
from cliptune.model.state_dicts import OtherModelError, StateDict, find_model, read_extra_state, to_openai_names
from cliptune.model.torchscript import is_torchscript, read_torchscript
from cliptune.model.towers import build_backbone
from cliptune.preprocess.tokens import VOCABULARY_SIZE
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

NAMED_WEIGHTS = ("auto", "openai", "none")
"""OpenAI's where published, OpenAI's, random ones."""
# open_clip's largest ViTs have heads that are not 64 wide: image width -> number of heads
_UNUSUAL_VISION_HEADS = {1280: 16, 1408: 16, 1664: 16}
MAX_ADDED_TOKENS = 16_384
"""Behind CLIP's own; a vocabulary of more is another tokeniser's."""


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
        _check_heads(weights.architecture, weights.source)
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

    Formats: OpenAI's TorchScript archive; a state dict in the names of OpenAI, open_clip or transformers, bare or
    inside a training checkpoint, as `torch.save` or safetensors, whole or in shards; a checkpoint of this toolkit or
    its model's state dict. Settings beside it count if they are its own: of a folder, or of the file that the folder
    would be read from, and of the sizes that the tensors have.

    Args:
        path: the file; of a folder, the first weights file that holds a whole model.
        activation: `quick_gelu`, `gelu` or `gelu_tanh`, for files that do not tell; believed where only a settings file
            beside them says otherwise.
        told: the activation that the weights are known to have, whatever stands beside the file.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, of another kind of model, built in a way that is not supported, or its activation is not
            known.
    """
    if path.is_dir():
        partial: list[OtherModelError] = []
        for file in weights_files(path):
            try:
                return _read_file(file, activation=activation, told=told, of_hub=True)
            except OtherModelError as error:
                partial.append(error)
        raise partial[0]
    if not path.is_file():
        raise FileNotFoundError(f"--pretrained: no such file: {path}; or one of {', '.join(NAMED_WEIGHTS)}")
    path = whole_file(path)
    return _read_file(path, activation=activation, told=told, of_hub=told is None and _is_of_hub(path))


def _read_file(path: Path, *, activation: str | None, told: str | None, of_hub: bool) -> Weights:
    content = read_torchscript(path) if is_torchscript(path) else read_hub_file(path)
    if is_checkpoint(content):
        weights = own_weights(content, path)
        _agree_activation(path, asked=activation, told=weights.architecture.activation, certain=True)
        return weights
    state = find_model(content, path)
    if state.own:
        return _own_state(state, path, activation=activation)
    if "input_resolution" in state.tensors:  # only OpenAI's archives have it, and the state dict of a loaded archive
        told = QUICK_GELU
    tensors = to_openai_names(state, path)
    found = _architecture_of(tensors, path)
    settings = None if told else _settings_beside(path, state, found, of_hub=of_hub)
    if settings is not None:
        try:
            found = found.with_unseen(settings.unseen)
        except ValueError as error:
            raise ValueError(f"{settings.path}: {error}") from None
    _check_vocabulary(found, path)
    by_file = found.activation if settings is not None else None
    if not (activation or told or by_file) and found.transformer_heads and found.vision_heads:
        build_backbone(found, tensors, source=str(path))  # weights that do not fit are told before anything is asked
    chosen = _agree_activation(path, asked=activation, told=told or by_file, certain=told is not None)
    tensors["logit_scale"] = _log_scale(tensors["logit_scale"], path)
    found = replace(found, activation=chosen)
    return Weights(replace(found, name=name_of(found)), _finite(tensors, path), {}, source=str(path))


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
        unseen = read_extra_state(state.pop("_extra_state"))
        tensors = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
        tensors |= _scalars(state)
        projections = {name: state[name] for name in ("image_projection.weight", "text_projection.weight")}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{source}: damaged checkpoint ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise ValueError(f"{source}: damaged checkpoint: {error}") from None
    # what the tensors' shapes say must be what the checkpoint says: nothing is built of sizes that nobody can hold
    fits = _architecture_of(tensors, Path(source)).same_tensors(architecture)
    if not fits or not unseen.items() <= architecture.unseen().items():
        raise ValueError(f"{source}: damaged checkpoint: its tensors are not those of its architecture")
    _check_projections(projections, architecture, source)
    return Weights(architecture, tensors, projections, content.get("self_test"), str(source))


def _is_of_hub(path: Path) -> bool:
    """Tell whether a file that was named is the one that its folder would be read from, as whose settings lie there."""
    try:
        return path in weights_files(path.parent)
    except OSError:
        return False


def _settings_beside(path: Path, state: StateDict, found: Architecture, *, of_hub: bool) -> HubSettings | None:
    """Read the settings that hubs keep beside weights, if they are those of these weights."""
    if not of_hub:
        beside = settings_path(path.parent, hugging_face=state.is_hugging_face)
        if beside.is_file():
            logger.warning("%s is not used: %s is not the file that its folder would be read from", beside, path.name)
        return None
    settings = read_settings(path.parent, hugging_face=state.is_hugging_face)
    if settings is None:
        return None
    if contradiction := settings.check_fit(found):
        logger.warning("%s is not used: it describes another model (%s)", settings.path, contradiction)
        return None
    check_refused(settings)
    return settings


def _agree_activation(path: Path, *, asked: str | None, told: str | None, certain: bool) -> str:
    if asked is not None and told is not None and asked != told:
        if certain:
            raise ValueError(f"{path}: made for activation {told}, not {asked}")
        logger.warning("%s: activation %s as asked for, though the settings beside it say %s", path, asked, told)
    activation = asked or told
    if activation is None:
        raise ValueError(
            f"{path} does not tell its activation, and the wrong one changes results silently; "
            f"pass --activation {QUICK_GELU} (OpenAI's weights and those trained from them) or "
            f"--activation {GELU} (most of open_clip's others)"
        )
    return activation


def _finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return float32 tensors; weights that are not finite give features that are not, or none where nobody looks."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise ValueError(f"{path}: {name} is of {tensor.dtype}: quantised weights are not supported")
    converted = {name: tensor.float() for name, tensor in tensors.items()}
    for name, tensor in converted.items():
        if tensor.sum().isfinite():  # one pass; a sum of finite values that is not finite is looked at once more
            continue
        if num_bad := tensor.numel() - int(tensor.isfinite().sum()):
            raise ValueError(
                f"{path}: {count(num_bad, 'value')} of {name} are not finite (NaN or infinite): damaged, or of a run "
                "that diverged; take an earlier checkpoint"
            )
    return converted


def _log_scale(value: Tensor, path: Path) -> Tensor:
    """Return the logarithm of the scale, 0 dimensions; a scale or a temperature in its place is converted and said.

    ln 100 = 4.6 is where CLIP's ends, and ln(1 / 0.07) = 2.7 where it begins: 100, 0.07 and ln 0.07 are something else.
    """
    if value.numel() != 1:
        raise ValueError(f"{path}: logit_scale has {value.numel():,} values; one is supported")
    number = value.item()
    if number == 0 or 0.5 <= number <= 6:
        return value.reshape(())
    if not -6 <= number <= 1000:
        raise ValueError(f"{path}: logit_scale {number:g} is neither the logarithm of a scale nor a scale")
    what, scale = ("the scale itself", number) if number > 6 else ("the temperature", 1 / number if number > 0 else 0)
    converted = math.log(scale) if scale else -number
    what = what if scale else "the logarithm of the temperature"
    logger.warning("%s: logit_scale %g is no logarithm of a scale: taken as %s", path, number, what)
    return torch.tensor(converted)


def _own_state(state: StateDict, path: Path, *, activation: str | None) -> Weights:
    """Take weights from `CLIPModel.state_dict()`, saved without a checkpoint around it."""
    extra = state.own.get("_extra_state")
    if extra is None:
        raise ValueError(f"{path}: a state dict of this toolkit without its _extra_state: save model.state_dict()")
    try:
        unseen = read_extra_state(extra)
        tensors = {**state.tensors, **_scalars(state.own)}
        architecture = _architecture_of(tensors, path).with_unseen(unseen)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: a damaged state dict of this toolkit: {error}") from None
    _agree_activation(path, asked=activation, told=architecture.activation, certain=True)
    projections = {name: state.own[name].float() for name in ("image_projection.weight", "text_projection.weight")}
    _check_projections(projections, architecture, path)
    return Weights(
        replace(architecture, name=name_of(architecture)),
        _finite(tensors, path),
        _finite(projections, path),
        source=str(path),
    )


def _scalars(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the temperature, and the bias of the logits if there is one."""
    bias = {"logit_bias": state["logit_bias"].reshape(())} if "logit_bias" in state else {}
    return {"logit_scale": state["logit_scale"].reshape(()), **bias}


def _check_projections(projections: dict[str, Tensor], architecture: Architecture, source: str | Path) -> None:
    sizes = {tuple(weight.shape) for weight in projections.values()}
    if len(sizes) != 1 or {size[1:] for size in sizes} != {(architecture.embed_dim,)}:
        raise ValueError(f"{source}: damaged checkpoint: its tensors are not those of its architecture")


def _architecture_of(tensors: dict[str, Tensor], path: Path) -> Architecture:
    """Derive the architecture from the tensors' shapes (as OpenAI's `build_model` does); the rest is OpenAI's."""
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
            transformer_heads=_heads(text_width),
            transformer_layers=_count(tensors, "transformer.resblocks."),
            text_mlp_width=_mlp_width(tensors, "transformer.", text_width),
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: not the weights of a ViT or ResNet CLIP; no {error}") from None
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not the weights of a ViT or ResNet CLIP: {error}") from None
    check_sizes(found, path)
    return found


def _check_vocabulary(found: Architecture, path: Path) -> None:
    if not 0 <= found.vocab_size - VOCABULARY_SIZE <= MAX_ADDED_TOKENS:
        raise ValueError(
            f"{path}: a vocabulary of {found.vocab_size:,} tokens is another tokeniser's; CLIP's own, the one that is "
            f"supported, has {VOCABULARY_SIZE:,}"
        )


def _check_heads(found: Architecture, source: str) -> None:
    """Refuse a number of attention heads that nothing tells."""
    image, text = (found.vision_width, found.vision_heads), (found.transformer_width, found.transformer_heads)
    for tower, (width, heads) in (("image", image), ("text", text)):
        if not heads:
            raise ValueError(
                f"{source}: its {tower} tower is {width} wide, and nothing tells how many heads that is: put its "
                "open_clip_config.json or config.json beside it, and name the folder"
            )


def _heads(width: int) -> int:
    """Return how many heads OpenAI's models of that width have; 0: nobody knows."""
    return _UNUSUAL_VISION_HEADS.get(width, 0 if width % 64 else width // 64)


def _mlp_width(tensors: dict[str, Tensor], prefix: str, width: int) -> int | None:
    """Return a transformer's MLP width, or None where it is the usual one."""
    found = len(tensors[f"{prefix}resblocks.0.mlp.c_fc.weight"])
    return None if found == 4 * width else found


def _vit_shape(tensors: dict[str, Tensor]) -> dict[str, Any]:
    width, _, _, patch = tensors["visual.conv1.weight"].shape  # [width, 3, patch, patch]
    # one position a patch, and one for the class token
    grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_resolution": patch * grid,
        "vision_layers": _count(tensors, "visual.transformer.resblocks."),
        "vision_width": width,
        "vision_patch_size": patch,
        "vision_heads": _heads(width),
        "vision_mlp_width": _mlp_width(tensors, "visual.transformer.", width),
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
