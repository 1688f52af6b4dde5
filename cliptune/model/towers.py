"""OpenAI's `CLIP` with its two towers, built as an `Architecture` says; what each module does is in `modules`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cliptune.model.architectures import GELU_TANH, QUICK_GELU, Architecture
from cliptune.model.attention import QuickGELU
from cliptune.runtime.openai_clip import import_clip

WHOLE_ON = {"cuda"}
"""Devices for which a whole tower is compiled: a CPU has no launches to save, and its compiler takes minutes."""
CLASS_ARGUMENTS = (
    "embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size", "context_length",
    "vocab_size", "transformer_width", "transformer_heads", "transformer_layers",
)  # fmt: skip
"""Fields of `Architecture` that OpenAI's class takes."""


def build_backbone(
    architecture: Architecture, tensors: Mapping[str, Tensor] | None = None, *, source: str = "given tensors"
) -> Any:
    """Build OpenAI's `CLIP`, float32, without `logit_scale` and `logit_bias`, which are `CLIPModel`'s.

    Args:
        architecture: its sizes and activation.
        tensors: weights in OpenAI's names, which become the backbone's without a copy; None: random ones.
        source: where they come from.

    Raises:
        ValueError: weights that do not fit.
    """
    # imported here because this imports OpenAI's package, which reads its vocabulary
    from cliptune.model.modules import OWN_CLASSES  # noqa: PLC0415
    from cliptune.model.programs import Compiler  # noqa: PLC0415

    sizes = {key: getattr(architecture, key) for key in CLASS_ARGUMENTS}
    with torch.device("cpu" if tensors is None else "meta"):  # no random weights where they are given
        backbone = _make_clip(sizes, architecture)
        _set_mlp_widths(backbone, architecture)
    del backbone.logit_scale
    for module in backbone.modules():
        module.__class__ = OWN_CLASSES.get(type(module), type(module))
    backbone.compiler = Compiler()
    for transformer in _transformers(backbone):
        transformer.compiler = backbone.compiler
    if tensors is not None:
        weights = {name: value for name, value in tensors.items() if name not in {"logit_scale", "logit_bias"}}
        try:
            backbone.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise ValueError(f"{source}: weights that do not fit a {architecture.name}: {reason[:300]}") from None
    if not architecture.is_vit:
        backbone.visual.to(memory_format=torch.channels_last)  # what convolutions are fastest in
    apply_settings(backbone, architecture)
    return backbone.float()


def apply_settings(backbone: Any, architecture: Architecture) -> None:
    """Put what the features depend on and no tensor shows (`Architecture.unseen`) into a backbone, new or in use."""
    visual = backbone.visual
    image_blocks = visual.transformer.resblocks if architecture.is_vit else ()
    for blocks, heads in (
        (image_blocks, architecture.vision_heads),
        (backbone.transformer.resblocks, architecture.transformer_heads),
    ):
        for block in blocks:
            block.attn.num_heads, block.attn.head_dim = heads, block.attn.embed_dim // heads
    if architecture.is_vit:
        visual.pooling = architecture.image_pooling
    else:
        visual.attnpool.num_heads = architecture.vision_heads
    backbone.text_pooling, backbone.end_token = architecture.text_pooling, architecture.end_token
    mask = backbone.build_attention_mask() if architecture.causal else None
    for module in (backbone.transformer, *backbone.transformer.resblocks):
        module.attn_mask = mask
    for name, module in backbone.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = architecture.vision_eps if name.startswith("visual.") else architecture.text_eps
        if hasattr(module, "mlp") and hasattr(module.mlp, "gelu"):
            module.mlp.gelu = _make_activation(architecture.activation)


def layers_of(backbone: Any) -> list[nn.Module]:
    """List the layers that are checkpointed and sharded: residual blocks of transformers and ResNets."""
    visual = backbone.visual
    if hasattr(visual, "transformer"):
        return [*visual.transformer.resblocks, *backbone.transformer.resblocks]
    stages = visual.layer1, visual.layer2, visual.layer3, visual.layer4
    return [*(layer for stage in stages for layer in stage), *backbone.transformer.resblocks]


def set_compiled(backbone: Any, compiled: bool) -> None:
    """Let both towers run by `torch.compile`, or no longer.

    A tower is one program on `WHOLE_ON`; elsewhere, and where checkpointing or FSDP has to do something between layers,
    each block of a transformer but the last is one, the same for all, and a ResNet is none.
    """
    by_layer = compiled and (
        backbone.text_projection.device.type not in WHOLE_ON
        or any(layer.checkpointed or hasattr(layer, "unshard") for layer in layers_of(backbone))
    )
    backbone.compiled = compiled and not by_layer
    for transformer in _transformers(backbone):
        transformer.compiled = by_layer


def _transformers(backbone: Any) -> list[Any]:
    return [tower.transformer for tower in (backbone.visual, backbone) if hasattr(tower, "transformer")]


def _make_activation(name: str) -> nn.Module:
    return QuickGELU() if name == QUICK_GELU else nn.GELU(approximate="tanh" if name == GELU_TANH else "none")


def _make_clip(sizes: dict[str, Any], architecture: Architecture) -> Any:
    """Make OpenAI's `CLIP`, whose image tower has a head for every 64 of its width: below it cannot be made by it."""
    openai = import_clip().model
    if not architecture.is_vit or architecture.vision_width >= 64:
        return openai.CLIP(**sizes)
    backbone = openai.CLIP(**{**sizes, "vision_layers": 0})
    width, layers, heads = architecture.vision_width, architecture.vision_layers, architecture.vision_heads
    backbone.visual.transformer = openai.Transformer(width, layers, heads)
    return backbone


def _set_mlp_widths(backbone: Any, architecture: Architecture) -> None:
    for tower, hidden in (
        (backbone.visual, architecture.vision_mlp_width),
        (backbone, architecture.text_mlp_width),
    ):
        if hidden is None or not hasattr(tower, "transformer"):
            continue
        width = tower.transformer.width
        for block in tower.transformer.resblocks:  # OpenAI's class makes them four times as wide
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)


def shared_projection(backbone: Any, size: int) -> Tensor:
    """Return the common start of the projection layers on both towers, `[size, embed_dim]`.

    Both layers start as the same map P, so that similarities start as the backbone's: (P x) . (P y) = x . y where P's
    columns are orthonormal, which needs a size of at least embed_dim. A smaller space keeps the directions in which
    both towers' outputs can differ most.

    Raises:
        ValueError: a size below 2.
    """
    if size < 2:
        raise ValueError(f"projection_dim {size}: a unit vector of one number is 1 or -1, and tells nothing")
    visual = backbone.visual
    image_map = visual.proj if hasattr(visual, "proj") else visual.attnpool.c_proj.weight.T  # [width, embed_dim]
    embed_dim = image_map.shape[1]
    if size == embed_dim:
        return torch.eye(embed_dim, dtype=torch.float32)
    if size > embed_dim:
        generator = torch.Generator().manual_seed(0)
        return cast(Tensor, torch.linalg.qr(torch.randn(size, embed_dim, generator=generator, dtype=torch.float32)).Q)
    stacked = torch.cat([image_map, backbone.text_projection]).detach().float()
    return cast(Tensor, torch.linalg.svd(stacked, full_matrices=False).Vh[:size])
