"""What a run's numbers say about itself: each finding is one line with its remedy, or None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDEST_INTERVAL = 5.0
"""Half-width of R@1's 95% interval, in points, beyond which a validation set is called small."""
STUCK_FRACTION, STUCK_EPOCHS = 0.02, 2
COLLAPSED_COSINE, NEAR_CHANCE = 0.99, 1.2
LOWEST_TOWER_RATE, HIGHEST_TOWER_RATE = 3e-7, 5e-5
FAR_ABOVE_CHANCE = 1.1
"""Of a validation loss, as a multiple of chance."""
PERFECT_RSUM = 600.0
SAME_COSINE = 0.9999
"""Of features that are not only alike, but of the same inputs."""
LOOK_AT_PAIRS = (
    "look at a few images with their captions: do they belong together, or was one column sorted or shifted?"
)


def small_validation(num_images: int) -> str | None:
    """Find a validation set too small for its recall to mean much.

    The interval is the binomial one at a recall of 50%, where it is widest: 1.96 * sqrt(0.25 / n).
    """
    if num_images == 1:
        return (
            "1 validation image says nothing: its recall is 100% whatever the model does, and no epoch is better than "
            "another; hold out more (--val_split, --val_data)"
        )
    half_width = 100 * 1.96 * math.sqrt(0.25 / num_images)
    if half_width <= WIDEST_INTERVAL:
        return None
    enough = math.ceil(0.25 * (100 * 1.96 / WIDEST_INTERVAL) ** 2)
    return (
        f"{num_images} validation images tell an R@1 of 50% to within {half_width:.1f} points only, and epochs that "
        f"differ by less are alike: {enough} or more tell it to within {WIDEST_INTERVAL:g} (--val_split, --val_data)"
    )


def is_at_chance(rsum: float, chance: Mapping[str, float], *, num_images: int) -> bool:
    """Tell whether random ranks give such an RSum, within about two standard deviations.

    The recalls of a direction rise and fall together, so their deviations are added up; the directions are two draws.

    Args:
        rsum: of the validation.
        chance: the recalls that random ranks give, and their `rsum`.
        num_images: that were ranked.
    """
    if chance["rsum"] >= PERFECT_RSUM:  # a single image is always found
        return False
    variance = 0.0
    for direction in ("i2t", "t2i"):
        found = [chance[key] / 100 for key in chance if key.startswith(direction)]
        variance += sum(100 * math.sqrt(max(part * (1 - part), 0.0) / num_images) for part in found) ** 2
    return rsum <= chance["rsum"] + 2 * math.sqrt(variance)


def no_better_epoch(num_images: int, *, at_chance: bool = False) -> str:
    """Say what to do about a run whose best model is the one that was loaded.

    Args:
        num_images: of the validation.
        at_chance: its RSum is, so that no rate would help.
    """
    if num_images == 1:
        return "1 validation image cannot tell epochs apart: the model as loaded counts as best; hold out more images"
    if at_chance:
        return f"no epoch beat the model as loaded, and that is at chance: {LOOK_AT_PAIRS}"
    return "no epoch beat the model as loaded, which stays the best: lower --learning_rate"


def unusual_tower_rate(rate: float) -> str | None:
    """Find a rate of pretrained towers that they rarely gain from."""
    if LOWEST_TOWER_RATE <= rate <= HIGHEST_TOWER_RATE:
        return None
    return (
        f"pretrained towers rarely gain at a rate of {rate:.3g}; {LOWEST_TOWER_RATE:g} to {HIGHEST_TOWER_RATE:g} is "
        "usual: change --backbone_lr_scale"
    )


def held_random_start(*, starts_random: bool, is_held: bool) -> str | None:
    """Find a model of random weights of which a part is held, as is right for pretrained ones."""
    if not (starts_random and is_held):
        return None
    return (
        "the model starts from random weights, and what lora_rank or train_layers hold of it stays random: train "
        "all of it, or name weights with --pretrained"
    )


def long_warmup(*, warmup_steps: int, total_steps: int, patience_steps: int) -> str | None:
    """Find a warm-up that outlasts the run, or most of it.

    Args:
        warmup_steps: over which the rates rise.
        total_steps: of the whole run.
        patience_steps: after which the run may stop early; 0: it does not.
    """
    if patience_steps and warmup_steps > patience_steps:
        return (
            f"the rates rise for {warmup_steps} steps, but the run may stop after {patience_steps} without a better "
            "RSum: lower --warmup_fraction or raise --early_stopping_patience"
        )
    if warmup_steps > total_steps / 2:
        return (
            f"the rates rise for {warmup_steps} of the {total_steps} steps, and most of the run is below its peak: "
            "lower --warmup_fraction or raise --num_epochs"
        )
    return None


def chance_loss(num_pairs: int, batch_size: int) -> float:
    """Return the contrastive loss of features that tell nothing, in nats: ln(size) of each batch, averaged over pairs.

    Args:
        num_pairs: of an epoch.
        batch_size: of all batches but the last; a single pair that is left joins the batch before.
    """
    batches, rest = divmod(num_pairs, batch_size)
    # 97 pairs in batches of 32: [32, 32, 32, 1] becomes [32, 32, 33]
    sizes = [batch_size] * batches + ([rest] if rest else [])
    if rest == 1 and batches:
        sizes[-2:] = [batch_size + 1]
    return sum(size * math.log(size) for size in sizes) / num_pairs


def stuck_loss(losses: Sequence[float], chance: float) -> str | None:
    """Find a training loss that stays at chance.

    Args:
        losses: means of the epochs after the warm-up, in nats.
        chance: see `chance_loss`.
    """
    latest = losses[-STUCK_EPOCHS:]
    if len(latest) < STUCK_EPOCHS or not chance or min(latest) < (1 - STUCK_FRACTION) * chance:
        return None
    return (
        f"the training loss has not come below chance ({chance:.3f}) for {STUCK_EPOCHS} epochs: it is "
        f"{latest[-1]:.3f}, and nothing is learned. Raise --learning_rate (or --backbone_lr_scale) if it is small, "
        f"lower it if the loss was lower before, and {LOOK_AT_PAIRS}"
    )


def nothing_carries_over(
    losses: Sequence[float], val_losses: Sequence[float], *, chance: float, val_chance: float
) -> str | None:
    """Find a training that learns its pairs by heart, while the validation stays at chance.

    Args:
        losses: of the training, means of the epochs after the warm-up, in nats.
        val_losses: of the same epochs, whose RSums are all at chance.
        chance, val_chance: see `chance_loss`.
    """
    if len(losses) < STUCK_EPOCHS or not chance or not val_chance:
        return None
    if losses[-1] >= (1 - STUCK_FRACTION) * chance or min(val_losses) < (1 - STUCK_FRACTION) * val_chance:
        return None
    return (
        f"the training loss falls ({losses[-1]:.3f}, chance {chance:.3f}), but nothing of it carries over: after "
        f"{len(losses)} epochs the validation is at chance (loss {val_losses[-1]:.3f}, chance {val_chance:.3f}). "
        f"Captions may not belong to their images: {LOOK_AT_PAIRS} If they do, there are too few of them for this model"
    )


def overfitted_temperature(
    history: Sequence[Mapping[str, Any]], chance: Mapping[str, float], *, num_images: int
) -> str | None:
    """Find a validation loss that tells of the temperature, not of the model: it rises while retrieval does not fall.

    Args:
        history: records of the epochs, the model as loaded first.
        chance: of the validation.
        num_images: of the validation.
    """
    last, least = history[-1], min(history, key=lambda record: record["val_loss"])
    val_chance, at = chance.get("val_loss", math.inf), f"{least['rsum']:.1f} at epoch {least['epoch']}"
    far_above = last["val_loss"] > FAR_ABOVE_CHANCE * val_chance
    if not far_above or last["rsum"] < least["rsum"] or is_at_chance(last["rsum"], chance, num_images=num_images):
        return None
    return (
        f"the validation loss ({last['val_loss']:.3f}) is far above chance ({val_chance:.3f}), but RSum has not fallen "
        f"({last['rsum']:.1f}; it was {at}, where the loss was least): the temperature has been fitted to the training "
        "pairs, so wrong answers are given with too much confidence, while their order is no worse. Go by RSum, as the "
        "choice of the best model does"
    )


def pretrained_at_chance(rsum: float, chance: Mapping[str, float], *, num_images: int) -> str | None:
    """Find data of which a pretrained model knows nothing before the first step."""
    if not is_at_chance(rsum, chance, num_images=num_images):
        return None
    return (
        f"the pretrained model finds no more than chance (RSum {rsum:.1f}, chance {chance['rsum']:.1f}) before any "
        f"training. Captions may not belong to their images: {LOOK_AT_PAIRS} Or it has never seen their language, or "
        "images of this kind"
    )


def collapse(
    *, image_cosine: float, text_cosine: float, rsum: float, chance: float, start: tuple[float, float] = (0.0, 0.0)
) -> str | None:
    """Find features that are all alike, so that every query brings the same answers.

    Args:
        image_cosine: mean cosine of two images.
        text_cosine: mean cosine of two texts.
        rsum: of the validation.
        chance: its chance level.
        start: both cosines of the model as loaded.
    """
    alike = [name for name, cosine in (("image", image_cosine), ("text", text_cosine)) if cosine > COLLAPSED_COSINE]
    if not alike or rsum > NEAR_CHANCE * chance or chance >= PERFECT_RSUM:  # a single image is always found
        return None
    if max(start) > SAME_COSINE:
        what = "images" if start[0] > start[1] else "captions"
        return (
            f"the features of all {what} were the same before the first step, so no rate will tell them apart: the "
            f"{what} are the same to the model (of a caption it reads the first tokens; `data_loader.py --check` looks "
            "for that), or --projection_dim is 1"
        )
    return (
        f"the {' and '.join(alike)} features are all alike (mean cosine of two images {image_cosine:.3f}, of two texts "
        f"{text_cosine:.3f}) and retrieval is at chance: the model has collapsed. If it does not recover, start again "
        "from an earlier checkpoint, with a lower --learning_rate, a larger --warmup_fraction or a larger --batch_size"
    )
