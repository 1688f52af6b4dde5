"""How deep in its tower a parameter lies, counted from the top: for rates by layer, and to train the last layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from cliptune.runtime.messages import count

_BLOCK = re.compile(r"(?P<tower>visual\.)?transformer\.resblocks\.(?P<block>\d+)\.")
_STAGE = re.compile(r"visual\.layer(?P<stage>[1-4])\.")
_TOP = ("visual.ln_post.", "visual.proj", "visual.attnpool.", "ln_final.", "text_projection")
NUM_STAGES = 4


def layers_above(names: Iterable[str]) -> dict[str, int]:
    """Return how many layers each parameter of a backbone has above itself in its tower, or its own layer counts.

    A layer is a block of a transformer, or one of a ResNet's four stages. At the top, 0, are the final norm and the
    map into the shared space, or attention pooling; then the last layer, 1, down to the first; below it patches, tokens
    and positions. As in BEiT's fine-tuning (Bao et al. 2021), for both towers of CLIP.

    Args:
        names: of all parameters of the backbone.
    """
    names = list(names)
    blocks = dict.fromkeys((None, "visual."), 0)
    for name in names:
        if found := _BLOCK.match(name):
            blocks[found["tower"]] = max(blocks[found["tower"]], int(found["block"]) + 1)
    return {name: _above(name, blocks) for name in names}


def _above(name: str, blocks: dict[str | None, int]) -> int:
    if name.startswith(_TOP):
        return 0
    if found := _BLOCK.match(name):
        return blocks[found["tower"]] - int(found["block"])
    if found := _STAGE.match(name):
        return NUM_STAGES + 1 - int(found["stage"])
    if name.startswith("visual."):
        return (blocks["visual."] or NUM_STAGES) + 1
    return blocks[None] + 1


def train_last_layers(model: Any, num_layers: int) -> None:
    """Hold each tower but for its last layers, see `layers_above`, and what stands above them.

    Args:
        model: a `CLIPModel`; a tower that is frozen stays so.
        num_layers: of each tower.

    Raises:
        ValueError: no tower has so many.
    """
    parameters = dict(model.backbone.named_parameters())
    above = layers_above(parameters)
    deepest = max(above.values()) - 1
    if num_layers > deepest:
        raise ValueError(f"train_layers {num_layers}: the towers have {deepest} layers at most")
    for name, parameter in parameters.items():
        parameter.requires_grad_(parameter.requires_grad and above[name] <= num_layers)
    model.trained_part = f"the last {count(num_layers, 'layer')} of each tower"
