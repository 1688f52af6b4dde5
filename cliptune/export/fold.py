"""Projection layers multiplied into the towers' own projections, so that other libraries need no class of ours."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cliptune.model.weights import Weights


def fold_projections(weights: Weights) -> Weights:
    """Return weights without projection layers that give the same features.

    A tower ends in a linear map M and the layer after it is a linear map P without a bias, so both are one: P (M x) is
    (P M) x. The product is taken in float64 and rounded once.

    Args:
        weights: in OpenAI's names, those of a ViT or a ResNet.
    """
    if not weights.projections:
        return weights
    image, text = (weights.projections[f"{tower}_projection.weight"] for tower in ("image", "text"))  # [D, embed_dim]
    tensors = {**weights.tensors, "text_projection": _product(weights.tensors["text_projection"], text.T)}
    if weights.architecture.is_vit:
        tensors["visual.proj"] = _product(weights.tensors["visual.proj"], image.T)  # [width, D]
    else:  # a ResNet ends in a Linear, with a bias
        for part in ("weight", "bias"):
            name = f"visual.attnpool.c_proj.{part}"
            tensors[name] = _product(image, weights.tensors[name])
    return weights._replace(
        architecture=replace(weights.architecture, embed_dim=len(image)), tensors=tensors, projections={}
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    return (left.double() @ right.double()).float().contiguous()
