"""What a run's numbers say about itself: each finding is one line with its remedy, or None."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDEST_INTERVAL = 5.0
"""Half-width of R@1's 95% interval, in points, beyond which a validation set is called small."""
STUCK_FRACTION, STUCK_EPOCHS = 0.02, 2
COLLAPSED_COSINE, NEAR_CHANCE = 0.99, 1.2
LOWEST_TOWER_RATE, HIGHEST_TOWER_RATE = 3e-7, 5e-5
PERFECT_RSUM = 600.0


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


def no_better_epoch(num_images: int) -> str:
    """Say what to do about a run whose best model is the one that was loaded."""
    if num_images == 1:
        return "1 validation image cannot tell epochs apart: the model as loaded counts as best; hold out more images"
    return "no epoch beat the model as loaded, which stays the best: lower --learning_rate"


def unusual_tower_rate(rate: float) -> str | None:
    """Find a rate of pretrained towers that they rarely gain from."""
    if LOWEST_TOWER_RATE <= rate <= HIGHEST_TOWER_RATE:
        return None
    return (
        f"pretrained towers rarely gain at a rate of {rate:.3g}; {LOWEST_TOWER_RATE:g} to {HIGHEST_TOWER_RATE:g} is "
        "usual: change --backbone_lr_scale"
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
        f"the training loss has stayed at {latest[-1]:.3f} for {STUCK_EPOCHS} epochs, and {chance:.3f} is chance: "
        "nothing is learned. Raise --learning_rate (or --backbone_lr_scale) if it is small, lower it if the loss was "
        "lower before, and check that captions and images belong together"
    )


def collapse(*, image_cosine: float, text_cosine: float, rsum: float, chance: float) -> str | None:
    """Find features that are all alike, so that every query brings the same answers.

    Args:
        image_cosine: mean cosine of two images.
        text_cosine: mean cosine of two texts.
        rsum: of the validation.
        chance: its chance level.
    """
    alike = [name for name, cosine in (("image", image_cosine), ("text", text_cosine)) if cosine > COLLAPSED_COSINE]
    if not alike or rsum > NEAR_CHANCE * chance or chance >= PERFECT_RSUM:  # a single image is always found
        return None
    return (
        f"the {' and '.join(alike)} features are all alike (mean cosine of two images {image_cosine:.3f}, of two texts "
        f"{text_cosine:.3f}) and retrieval is at chance: the model has collapsed. Start again from an earlier "
        "checkpoint, with a lower --learning_rate, a larger --warmup_fraction or a larger --batch_size"
    )
