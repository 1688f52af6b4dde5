"""Recipes: what trains, at which rates and for how long, from the size of the data, the batch and the model.

Each choice has its reason, with the source that it comes from. What no source speaks of is left at its default.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

FEW_IMAGES = 2000
RATE_AT_256, LOWEST_RATE, HIGHEST_RATE = 1e-5, 5e-7, 5e-5
HIGHEST_HEAD_RATE = 1e-3
LORA_RANK, LORA_RATE = 2, 2e-4
FEWEST_EPOCHS, MOST_EPOCHS, ENOUGH_STEPS = 3, 15, 2000
SHORT_RUN = 1000
"""Steps below which a twentieth of them is too short a warm-up."""

TRAINS = {"full": (), "lora": ("lora_rank",), "head": ("freeze_backbone",)}
"""What each recipe trains, by the settings that say so."""
SAYS_WHAT_TRAINS = ("freeze_backbone", "freeze_tower", "lora_rank", "train_layers")
GOES_WITH = {
    "full": {"freeze_tower", "train_layers"},
    "lora": {"lora_rank", "freeze_tower"},
    "head": {"freeze_backbone"},
}
"""Of those, the ones that a recipe can be told beside."""


class Situation(NamedTuple):
    """What a recipe goes by.

    Attributes:
        num_samples: of an epoch: training images, or pairs where every caption counts.
        batch_size: over all ranks.
        is_pretrained: whether there are weights to start from.
        is_vit: whether the image tower is a ViT.
        has_new_heads: whether the projection layers start as something else than the identity.
    """

    num_samples: int
    batch_size: int
    is_pretrained: bool = True
    is_vit: bool = True
    has_new_heads: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Return how many batches an epoch has."""
        return math.ceil(self.num_samples / self.batch_size)


class Choice(NamedTuple):
    """A setting that a recipe picks, by its flag's name, and why."""

    name: str
    value: Any
    reason: str


def settle_recipe(recipe: str, situation: Situation, own: dict[str, Any]) -> tuple[str, str]:
    """Return which recipe is meant, and why.

    Args:
        recipe: `auto`, `full`, `lora` or `head`.
        situation: see there.
        own: settings that were chosen otherwise, by their flags' names; they win.

    Raises:
        ValueError: what was chosen of what trains is not the recipe's, or there are no weights to adapt.
    """
    told = [name for name in SAYS_WHAT_TRAINS if own.get(name)]
    if recipe == "auto":
        meant, reason = _automatic(situation, told)
    else:
        meant, reason = recipe, "as asked for"
    odd = [name for name in told if name not in GOES_WITH[meant]]
    if odd:
        raise ValueError(f"recipe {recipe} does not go with {' and '.join(odd)}: leave one of them out")
    if meant != "full" and not situation.is_pretrained:
        raise ValueError(f"recipe {recipe} holds pretrained weights, and this model starts from random ones: use full")
    return meant, reason


def _automatic(situation: Situation, told: list[str]) -> tuple[str, str]:
    if not situation.is_pretrained:
        return "full", "there are no weights to keep"
    for meant, names in TRAINS.items():
        if set(names) & set(told):
            return meant, f"{' and '.join(names)} says so"
    if "train_layers" in told:
        return "full", "train_layers says what trains"
    if not situation.is_vit:
        return (
            "full",
            "LoRA reaches a ResNet's attention pool alone; ITRA's RN50: all 75, held towers 62 to 67",
        )
    if situation.num_samples < FEW_IMAGES:
        return "lora", f"fewer than {FEW_IMAGES:,} (our bound): what was tried on few-shot sets (CLIP-LoRA)"
    return "full", f"{FEW_IMAGES:,} or more (our bound): ITRA: all 75, held towers 62 to 67; CLIP-rsicd: 10,000 suffice"


def choose(meant: str, situation: Situation, own: dict[str, Any]) -> list[Choice]:
    """Return what a settled recipe picks, by itself; what is in `own` wins over it.

    A rate of the towers is stored as `backbone_lr_scale`, over the `learning_rate` that is used in the end.
    """
    if not situation.is_pretrained:
        return []  # of random weights the sources say nothing
    batch_size = min(situation.batch_size, situation.num_samples)
    towers = min(max(RATE_AT_256 * batch_size / 256, LOWEST_RATE), HIGHEST_RATE)
    factor = 100 if meant == "head" or situation.has_new_heads else 10
    heads = min(factor * towers, HIGHEST_HEAD_RATE)
    num_epochs = min(max(math.ceil(ENOUGH_STEPS / situation.steps_per_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
    num_steps = int(own.get("num_epochs", num_epochs)) * situation.steps_per_epoch
    return [
        *_what_trains(meant, rank=int(own.get("lora_rank") or LORA_RANK)),
        Choice(
            "learning_rate", _rounded(heads),
            f"of the projection layers: {factor} times {towers:.3g}; new heads took 10 to 100 times the towers' rate",
        ),
        *_tower_rate(meant, towers, learning_rate=float(own.get("learning_rate", _rounded(heads)))),
        Choice("num_epochs", num_epochs, f"about {ENOUGH_STEPS:,} steps within 3 to 15 epochs (ITRA 10, NegCLIP 5)"),
        Choice(
            "warmup_fraction", 0.1 if num_steps < SHORT_RUN else 0.05,
            f"5 to 10% of the steps, of which there are {num_steps:,}; an absolute number never peaks on small data",
        ),
        Choice("weight_decay", 0.01, "ITRA: 0.01 to 2.5 moved recall by less than 0.5"),
    ]  # fmt: skip


def _what_trains(meant: str, *, rank: int) -> list[Choice]:
    if meant == "head":
        return [Choice("freeze_backbone", True, "only the projection layers train; ITRA: 62 to 67 against 75 for all")]
    if meant == "lora":
        return [
            Choice("lora_rank", LORA_RANK, "CLIP-LoRA: one setting for all its few-shot sets"),
            Choice("lora_alpha", rank / 2, "CLIP-LoRA: alpha 1 beside rank 2"),
            Choice("lora_layers", "attention", "CLIP-LoRA: query, key and value of all layers; here their output, too"),
        ]
    return []


def _tower_rate(meant: str, towers: float, *, learning_rate: float) -> list[Choice]:
    if meant == "head":
        return []
    if meant == "lora":
        rate, reason = LORA_RATE, f"adapters train at {LORA_RATE:g}: CLIP-LoRA, whatever the batch"
    else:
        rate = towers
        reason = (
            f"towers train at {towers:.3g}: 1e-5 x batch / 256 (ITRA: 1e-5 is best at 256; Chinese-CLIP issue 28: "
            "2e-5 at 96 ends below the model as loaded)"
        )
    return [Choice("backbone_lr_scale", _rounded(rate / learning_rate), reason)]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
