"""A recipe put into a run's settings: what it picks, what wins over it, both told."""

from __future__ import annotations

import logging
from typing import Any

from cliptune.cli import Started, flags_of, override
from cliptune.data.pairs import Pairs
from cliptune.model.architectures import known_architecture
from cliptune.model.published import ARCHIVES
from cliptune.model.weights import Weights
from cliptune.recipes import Situation, choose, settle_recipe
from cliptune.runs.data import Splits
from cliptune.settings import Config

logger = logging.getLogger("train")


def apply_recipe(
    config: Config, started: Started, *, splits: Splits, weights: str | Weights, is_resumed: bool
) -> Config:
    """Return the settings with what their recipe picks; flags win, and what the config file has at no default.

    Args:
        config: of the run.
        started: what it was started with.
        splits: of its data.
        weights: what `find_run_weights` returned.
        is_resumed: the settings are a resumed run's own, for which the recipe has picked already.

    Raises:
        ValueError: the recipe does not go with what was chosen, or with the model.
    """
    recipe = config.training.recipe
    if recipe is None or is_resumed:
        return config
    own = _chosen(config, started)
    situation = _situation(config, splits, weights)
    meant, reason = settle_recipe(recipe, situation, own)
    logger.info(
        "recipe %s for %d samples in batches of %d: %s", meant, situation.num_samples, situation.batch_size, reason
    )
    choices = choose(meant, situation, own)
    if not choices:
        logger.info("recipe %s: the defaults, since the model starts from random weights", meant)
    for choice in choices:
        value = str(choice.value).lower() if isinstance(choice.value, bool) else choice.value
        if choice.name in own:
            logger.info("recipe %s: %s %s stays, where it picks %s", meant, choice.name, own[choice.name], value)
        else:
            logger.info("recipe %s: %s %s: %s", meant, choice.name, value, choice.reason)
    return override(config, {choice.name: choice.value for choice in choices if choice.name not in own})


def _chosen(config: Config, started: Started) -> dict[str, Any]:
    """Return the settings that somebody chose, by their flags' names."""
    values = config.model_dump()
    chosen = {}
    for name, (group, key), field in flags_of(Config):
        in_file = started.file_values.get(group, {}).get(key, field.default)
        if name in started.given or in_file != field.default:
            chosen[name] = values[group][key]
    return chosen


def _situation(config: Config, splits: Splits, weights: str | Weights) -> Situation:
    train = splits["train"]
    is_file = isinstance(weights, Weights)
    architecture = weights.architecture if isinstance(weights, Weights) else known_architecture(config.model.name)
    size = config.model.projection_dim
    return Situation(
        num_samples=train.num_pairs if config.data.captions == "all" and isinstance(train, Pairs) else len(train),
        batch_size=config.training.batch_size,
        is_pretrained=is_file or (weights != "none" and config.model.name in ARCHIVES),
        is_vit=architecture.is_vit,
        has_new_heads=size is not None and size != architecture.embed_dim,
    )
