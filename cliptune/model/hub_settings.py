"""What the settings files beside weights say of a model: open_clip's, and those of transformers.

Every setting is known to change nothing, or is used, or is refused by its name and value: features of a model that was
built otherwise are wrong without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cliptune.model.architectures import ACTIVATIONS, GELU, GELU_TANH, QUICK_GELU, Architecture
from cliptune.model.hub_files import read_json
from cliptune.preprocess.tokens import VOCABULARY_SIZE, vocabulary
from cliptune.runtime.messages import first_few, shown


class HubSettings(NamedTuple):
    """One model's settings."""

    path: Path
    """The file."""
    sizes: dict[str, Any]
    """Fields of `Architecture` that tensors show as well."""
    unseen: dict[str, Any]
    """Fields of `Architecture` that they do not show."""
    refused: list[str]
    """Settings that change features and are not supported, with their values."""

    def check_fit(self, found: Architecture) -> str | None:
        """Say what contradicts the tensors; None: nothing does, so that these are their settings."""
        for key, value in self.sizes.items():
            if getattr(found, key) != value:
                return f"{key} {shown(value)} there, {getattr(found, key)} in the tensors"
        return None


def settings_path(folder: Path, *, hugging_face: bool) -> Path:
    """Return where a folder holds the settings of tensors with these names."""
    return folder / ("config.json" if hugging_face else "open_clip_config.json")


def read_settings(folder: Path, *, hugging_face: bool) -> HubSettings | None:
    """Read the settings in a folder that go with tensors of these names; None: there are none.

    Raises:
        ValueError: a setting's value is of no use.
    """
    path = settings_path(folder, hugging_face=hugging_face)
    content = read_json(path)
    try:
        if hugging_face and isinstance(content.get("vision_config", content.get("vision_config_dict")), dict):
            return _of_transformers(content, path)
        if not hugging_face and isinstance(content.get("model_cfg"), dict):
            return _of_open_clip(content, path)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{path}: a setting that is none: {error}") from None
    return None


def _of_open_clip(content: dict[str, Any], path: Path) -> HubSettings:
    model = content["model_cfg"]
    vision, text = _part(model, "vision_cfg"), _part(model, "text_cfg")
    prepared = _part(content, "preprocess_cfg")
    is_resnet = isinstance(vision.get("layers"), list)
    width = vision.get("width", 64 if is_resnet else 768)
    sizes = {
        "image_resolution": _square(vision.get("image_size", 224)),
        "vision_layers": tuple(vision["layers"]) if is_resnet else vision.get("layers", 12),
        "vision_width": width,
        "vision_patch_size": None if is_resnet else vision.get("patch_size", 16),
        "context_length": text.get("context_length", 77),
        "vocab_size": text.get("vocab_size", VOCABULARY_SIZE),
        "transformer_width": text.get("width", 512),
        "transformer_layers": text.get("layers", 12),
        **({"embed_dim": model["embed_dim"]} if "embed_dim" in model else {}),
    }
    activations = _open_clip_activations(model, vision, text)
    pools = text.get("pool_type", "argmax")
    image_pools = vision.get("pool_type", "tok"), bool(vision.get("final_ln_after_pool"))
    unseen = {
        "activation": activations[0],
        "vision_heads": (width * 32 if is_resnet else width) // vision.get("head_width", 64),
        "transformer_heads": text.get("heads", 8),
        "vision_eps": _eps(vision.get("norm_kwargs")),
        "text_eps": _eps(text.get("norm_kwargs")),
        "causal": not text.get("no_causal_mask"),
        "image_pooling": {"tok": "class", "avg": "average" if image_pools[1] else "average_of_normed"}.get(
            image_pools[0], image_pools[0]
        ),
        "text_pooling": {"argmax": "largest", "eos": "end"}.get(pools, pools),
        "end_token": text.get("eos_id", 2) if pools == "eos" else None,
        **_moments(prepared.get("mean"), prepared.get("std")),
    }
    refused = [
        *_unknown(model, _OPEN_CLIP_TOP),
        *_unknown(vision, _OPEN_CLIP_VISION),
        *_unknown(text, _OPEN_CLIP_TEXT),
        *_unlike(prepared, {"mode": {"RGB"}, "interpolation": {"bicubic"}, "resize_mode": {"shortest"}}),
        *_unlike(vision, {"pool_type": {"tok", "avg"}, "block_type": {None, "default"}}),
        *_unlike(text, {"pool_type": {"argmax", "eos", "first", "last"}, "proj_type": {"linear"}}),
        *(f"act_kwargs {one}" for one in activations if one not in ACTIVATIONS),
        *([f"act_kwargs of {' and '.join(activations)}"] if len(set(activations)) > 1 else []),
        *_unlike(text.get("tokenizer_kwargs") or {}, {"clean": {"lower"}}),
    ]
    if not str(text.get("hf_tokenizer_name") or "openai/clip-").startswith("openai/clip-"):
        refused.append(f"hf_tokenizer_name {text['hf_tokenizer_name']!r}")
    return HubSettings(path, sizes, unseen, [*refused, *_other_vocabulary(path.parent)])


def _of_transformers(content: dict[str, Any], path: Path) -> HubSettings:
    vision = _transformers_part(content, "vision_config", _VISION_DEFAULTS)
    text = _transformers_part(content, "text_config", _TEXT_DEFAULTS)
    processor = path.with_name("preprocessor_config.json")
    prepared = read_json(processor)
    prepared = prepared or _part(read_json(path.with_name("processor_config.json")), "image_processor")
    tokenizer = path.with_name("tokenizer_config.json")
    sizes = {
        "image_resolution": _square(vision["image_size"]),
        "vision_layers": vision["num_hidden_layers"],
        "vision_width": vision["hidden_size"],
        "vision_patch_size": vision["patch_size"],
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "transformer_width": text["hidden_size"],
        "transformer_layers": text["num_hidden_layers"],
    }
    activations = text["hidden_act"], vision["hidden_act"]
    is_largest = text["eos_token_id"] == 2 or (
        text["eos_token_id"] == VOCABULARY_SIZE - 1 and text["vocab_size"] == VOCABULARY_SIZE
    )  # 2 was wrong in transformers' early files, and means the largest id there to this day
    is_normed = prepared.get("do_normalize", True)
    unseen = {
        "activation": _TRANSFORMERS_ACTIVATIONS.get(activations[0], activations[0]),
        "vision_heads": vision["num_attention_heads"],
        "transformer_heads": text["num_attention_heads"],
        "vision_eps": vision["layer_norm_eps"],
        "text_eps": text["layer_norm_eps"],
        "text_pooling": "largest" if is_largest else "end",
        "end_token": None if is_largest else text["eos_token_id"],
        **_moments(*((prepared.get("image_mean"), prepared.get("image_std")) if is_normed else (0.0, 1.0))),
    }
    refused = [
        *_unlike(content, {"model_type": {"clip"}}),
        *(f"hidden_act {value!r}" for value in activations if value not in _TRANSFORMERS_ACTIVATIONS),
        *([f"hidden_act {activations[0]!r} and {activations[1]!r}"] if activations[0] != activations[1] else []),
        *_unknown(content, {*_TRANSFORMERS_TOP, *_CHANGES_NOTHING}),
        *_unknown(vision, {*_VISION_DEFAULTS, *_CHANGES_NOTHING}),
        *_unknown(text, {*_TEXT_DEFAULTS, *_CHANGES_NOTHING}),
        *(f"{one} ({processor.name})" for one in _other_processing(prepared, sizes["image_resolution"])),
        *(f"{one} ({tokenizer.name})" for one in _unlike(read_json(tokenizer), {"tokenizer_class": _CLIP_TOKENIZERS})),
        *_other_vocabulary(path.parent),
    ]
    return HubSettings(path, sizes, unseen, refused)


def check_refused(settings: HubSettings) -> None:
    """Refuse a model that was built as none is built here.

    Raises:
        ValueError: names the settings and their values.
    """
    if settings.refused:
        raise ValueError(
            f"{settings.path}: {first_few(list(map(shown, settings.refused)))}: not supported, and without it the "
            "features would be others"
        )


_OPEN_CLIP_TOP = {
    "embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "init_logit_bias",
    "nonscalar_logit_scale", "output_dict", "cast_dtype",
}  # fmt: skip
_OPEN_CLIP_VISION = {
    "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "pool_type", "final_ln_after_pool",
    "act_kwargs", "norm_kwargs", "patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads",
    "pos_embed_type", "block_type", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
    "timm_drop_path",
}  # fmt: skip
_OPEN_CLIP_TEXT = {
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type", "eos_id", "no_causal_mask",
    "act_kwargs", "norm_kwargs", "hf_tokenizer_name", "tokenizer_kwargs", "final_ln_after_pool", "output_tokens",
    "pad_id", "proj_type", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip
_VISION_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
"""Of transformers' `CLIPVisionConfig`: files need not hold what is as here."""
_TEXT_DEFAULTS = {
    "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77,
    "vocab_size": VOCABULARY_SIZE, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407,
}  # fmt: skip
_TRANSFORMERS_ACTIVATIONS = {
    "quick_gelu": QUICK_GELU, "gelu": GELU, "gelu_python": GELU, "gelu_new": GELU_TANH, "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH, "gelu_accurate": GELU_TANH,
}  # fmt: skip
_TRANSFORMERS_TOP = {
    "text_config", "vision_config", "text_config_dict", "vision_config_dict", "logit_scale_init_value", "eos_token_id",
}  # fmt: skip
_CLIP_TOKENIZERS = {"CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"}
_CHANGES_NOTHING = {
    # shown by the tensors, or of training alone
    "intermediate_size", "projection_dim", "num_channels", "attention_dropout", "dropout", "initializer_factor",
    "initializer_range", "tie_word_embeddings", "pruned_heads",
    # of files and of other tasks
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "torchscript", "use_bfloat16",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "return_dict",
    "output_attentions", "output_hidden_states", "use_cache", "use_return_dict", "tokenizer_class", "prefix",
    "bos_token_id", "pad_token_id", "sep_token_id", "chunk_size_feed_forward", "max_length", "min_length", "num_beams",
    "num_beam_groups", "num_return_sequences", "length_penalty", "repetition_penalty", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "early_stopping", "do_sample", "no_repeat_ngram_size",
    "is_composition", "is_encoder_decoder", "is_decoder", "gradient_checkpointing", "attn_implementation",
    "transformers.js_config", "unsloth_version",
}  # fmt: skip
_PREPARED = {
    "do_resize", "do_center_crop", "do_normalize", "do_rescale", "rescale_factor", "resample", "size", "crop_size",
    "image_mean", "image_std", "do_convert_rgb", "image_processor_type", "feature_extractor_type", "processor_class",
    "data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square",
}  # fmt: skip


def _part(values: dict[str, Any], key: str) -> dict[str, Any]:
    part = values.get(key) or {}
    if not isinstance(part, dict):
        raise TypeError(f"{key} {shown(part)}")
    return part


def _transformers_part(content: dict[str, Any], key: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return one tower's settings as transformers reads them: a `..._dict`, with its defaults, goes first."""
    part, first = _part(content, key), content.get(f"{key}_dict")
    return {**defaults, **part} if first is None else {**part, **defaults, **_part(content, f"{key}_dict")}


def _square(size: Any) -> int:
    sides = size if isinstance(size, list) else [size]
    if len(set(sides)) != 1 or type(sides[0]) is not int:
        raise ValueError(f"image_size {shown(size)}: images are squares here")
    return int(sides[0])


def _eps(options: Any) -> float:
    return 1e-5 if not options else options.get("eps", 1e-5)


def _moments(mean: Any, std: Any) -> dict[str, Any]:
    """Return mean and standard deviation, if the file has them: numbers for three channels, or one for all."""
    given = {"mean": mean, "std": std}
    return {
        key: tuple(map(float, value)) if isinstance(value, list) else (float(value),) * 3
        for key, value in given.items()
        if value is not None
    }


def _open_clip_activations(model: dict[str, Any], *parts: dict[str, Any]) -> list[str]:
    """Return the activation of each tower, or what it is instead of one that is supported."""
    if model.get("quick_gelu"):
        return [QUICK_GELU]
    options = [part.get("act_kwargs") or {"approximate": "none"} for part in parts]
    known = {"none": GELU, "tanh": GELU_TANH}
    return [
        known.get(str(option.get("approximate")), str(option)) if option.keys() == {"approximate"} else str(option)
        for option in options
    ]


def _unknown(values: dict[str, Any], known: Iterable[str]) -> Iterator[str]:
    """Yield settings that are not known; switched off (false, 0, none, empty) they change nothing."""
    yield from (f"{key} {value!r}" for key, value in values.items() if value and key not in known and key[:1] != "_")


def _unlike(values: dict[str, Any], wanted: dict[str, set[Any]]) -> Iterator[str]:
    """Yield settings that are there and have another value than is supported."""
    for key, allowed in wanted.items():
        if key in values and not any(values[key] == value for value in (*allowed, None)):
            yield f"{key} {values[key]!r}"


def _other_processing(prepared: dict[str, Any], resolution: int) -> Iterator[str]:
    """Yield what transformers' image processor does and CLIP's preprocessing does not."""
    yield from _unknown(prepared, _PREPARED)
    allowed: dict[str, set[Any]] = {
        "do_resize": {True},
        "do_center_crop": {True},
        "do_rescale": {True},
        "resample": {3, "bicubic"},
    }
    yield from _unlike(prepared, allowed)
    if not math.isclose(prepared.get("rescale_factor") or 1 / 255, 1 / 255, rel_tol=1e-5):
        yield f"rescale_factor {prepared['rescale_factor']!r}"
    size, crop = prepared.get("size"), prepared.get("crop_size", resolution)
    side = size.get("shortest_edge") if isinstance(size, dict) else size
    crop_sides = list(crop.values()) if isinstance(crop, dict) else [crop]
    # a processor for another resolution than the model's is no one's: the model decides
    if size is not None and crop_sides in ([resolution], [resolution] * 2) and side != resolution:
        yield f"size {size!r} for a crop of {resolution}"


def _other_vocabulary(folder: Path) -> Iterator[str]:
    """Yield the file of a vocabulary that is not CLIP's; added tokens behind it do no harm."""
    found = read_json(folder / "vocab.json")
    if not found:
        model = read_json(folder / "tokenizer.json").get("model")
        found = model.get("vocab", {}) if isinstance(model, dict) else {}
    is_clips = isinstance(found, dict) and sum(found.get(token) == index for token, index in vocabulary().items())
    if found and is_clips < 49_000:
        yield f"a vocabulary of {len(found):,} tokens in vocab.json or tokenizer.json that is not CLIP's"
