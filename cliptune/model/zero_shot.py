"""Which of some names an image shows, by a model that was not trained on them (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize


def class_probabilities(
    model: Any, images: Any, names: Sequence[str], templates: str | Sequence[str]
) -> list[dict[str, float]]:
    """Return the probability of each name for each image, the most likely first; see `CLIPModel.classify`."""
    templates = [templates] if isinstance(templates, str) else list(templates)
    _check(names, templates)
    texts = [template.replace("{}", name) for name in names for template in templates]
    features = model.encode_text(texts).unflatten(0, (len(names), -1))  # [names, templates, D]
    logits = logits_of(model, model.encode_image(images), normalize(features.mean(1), dim=-1))  # [images, names]
    rows = [dict(zip(names, row, strict=True)) for row in logits.softmax(-1).tolist()]
    return [dict(sorted(row.items(), key=lambda pair: -pair[1])) for row in rows]


def logits_of(model: Any, image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return features' similarities on the model's own scale, and with its bias if it has one: `[images, texts]`."""
    logits: Tensor = model.logit_scale.exp() * image_features @ text_features.T
    return logits if model.logit_bias is None else logits + model.logit_bias


def _check(names: Sequence[str], templates: Sequence[str]) -> None:
    if isinstance(names, str) or not names or not templates:
        raise ValueError("classify needs a list of names, at least one, and at least one template")
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"names: {twice!r} occurs twice, so neither could be told from the other: name it once")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"templates: {template!r} has no {{}}, which stands for a name")
