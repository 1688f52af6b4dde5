"""The model that a run trains: its weights found, built as the settings say, brought to its device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cliptune.model.architectures import known_architecture
from cliptune.model.depth import train_last_layers
from cliptune.model.lora import add_lora, is_adapter
from cliptune.model.parallel import parallel_model
from cliptune.model.positions import resized
from cliptune.model.weights import NAMED_WEIGHTS, Weights, find_weights, own_weights
from cliptune.runs.compiling import chooses_to_compile, runs_no_tower
from cliptune.runs.loss import settle_bias
from cliptune.runs.start import Resumed
from cliptune.runtime.device import Precision, wants_exact_products
from cliptune.runtime.distributed import world_size
from cliptune.runtime.messages import one_line
from cliptune.settings import DEFAULT_MODEL_NAME, Config
from cliptune.training.memory import fitting_size

logger = logging.getLogger(__name__)

M = TypeVar("M")


def find_run_weights(config: Config, given: dict[str, Any], resumed: Resumed | None) -> str | Weights:
    """Read the weights' file if one is named; else check the model's name, and leave the download for later."""
    settings = config.model
    if resumed is not None:  # the checkpoint holds architecture and weights; nothing else is needed
        return own_weights(resumed.content, resumed.path)
    if settings.pretrained in NAMED_WEIGHTS:
        resized(known_architecture(settings.name), **settings.sizes())
        return settings.pretrained
    chosen = "model_name" in given or settings.name != DEFAULT_MODEL_NAME
    name = settings.name if chosen else None  # which a file may contradict without a warning
    weights = find_weights(name, settings.pretrained, activation=settings.activation)
    if weights is not None:
        resized(weights.architecture, **settings.sizes())
    return weights or settings.pretrained


def make_model(config: Config, weights: str | Weights, resumed: Resumed | None, *, model_class: Callable[..., M]) -> M:
    """Build the model that a run trains, with the weights that `find_run_weights` found.

    Args:
        config: of the run.
        weights: a name, or what was read.
        resumed: what the run goes on from.
        model_class: `clip_model.CLIPModel`.
    """
    settings = config.model
    model: Any = model_class(
        settings.name, settings.projection_dim, settings.freeze_backbone, weights,
        activation=settings.activation, freeze_tower=settings.freeze_tower,
        **settings.sizes(),
    )  # fmt: skip
    if settings.lora_rank is not None:
        add_lora(model, settings.lora_rank, alpha=settings.lora_alpha, layers=settings.lora_layers)
    if settings.train_layers is not None:
        train_last_layers(model, settings.train_layers)
    settle_bias(config, model)
    if resumed is not None:
        model.starts_random = resumed.content["starts_random"]
        model.holds_batchnorm = resumed.content["holds_batchnorm"]
        _go_on_with_weights(model, resumed)
    return model  # type: ignore[no-any-return]


def _go_on_with_weights(model: Any, resumed: Resumed) -> None:
    """Load the weights that were trained where the checkpoint's model is another: averaged, or with adapters merged."""
    own = resumed.content.get("weights_state_dict", {})
    missing = [name for name in model.state_dict() if is_adapter(name) and name not in own]
    reason = f"no {missing[0]}" if missing else ""
    if own and not missing:
        try:
            # the model's tensors are the checkpoint's own, and its average lies in the same memory
            average = resumed.content.get("average_state_dict", {})
            resumed.content["average_state_dict"] = {name: value.clone() for name, value in average.items()}
            model.load_state_dict({**resumed.content["model_state_dict"], **own})
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = one_line(error)
    if reason:
        raise ValueError(f"{resumed.path}: damaged, or written by other means than this toolkit: {reason}")


def place_model(
    config: Config,
    model: Any,
    *,
    precision: Precision,
    device: torch.device,
    num_samples: int,
    texts: Callable[[], Tensor | None] = lambda: None,
    resumed: Resumed | None = None,
) -> tuple[nn.Module | None, int | None]:
    """Bring the model to its device, or its shards to their ranks; decide whether it is compiled.

    Args:
        config: of the run.
        model: a `CLIPModel`.
        precision: of its towers.
        device: this rank's.
        num_samples: of an epoch.
        texts: of the data, see `fitting_size`.
        resumed: what the run goes on from.

    Returns:
        What runs it in several ranks, and how many pairs a rank has in memory at once; None: all of its part.
    """
    _tell_unused(config, model)
    if precision.dtype is None and device.type == "cuda" and not wants_exact_products():
        logger.info("precision fp32: in training, products in the towers round their factors to TF32, of 10 bits")
    began = None if resumed is None else resumed.content.get("compiled")
    if chooses_to_compile(config, model, device=device, num_samples=num_samples, began=began):
        model.compile_towers()
    if config.training.gradient_checkpointing:
        model.checkpoint_gradients()
    if config.run.parallel != "fsdp" or world_size() == 1:  # a device may have no room for all of a sharded model
        model.to(device)
        model.train(model.training)  # which programs it has depends on its device and its checkpointing
    size: Any = config.training.micro_batch_size
    if size == "auto":
        own_pairs = -(-config.training.batch_size // world_size())
        has_average = config.training.ema is not None
        size = None if runs_no_tower(config, model) else fitting_size(
            model, precision=precision, most=own_pairs, device=device, has_average=has_average, texts=texts
        )  # fmt: skip
    runner = parallel_model(model, config.run.parallel, device)
    model.train(model.training)  # and on its being sharded
    return runner, size


def _tell_unused(config: Config, model: Any) -> None:
    """Say which settings change nothing in this run."""
    settings = config.training
    if config.run.parallel == "fsdp" and world_size() == 1:
        logger.info("--parallel fsdp: there is one rank, so nothing is sharded; torchrun starts several")
    if settings.backbone_lr_scale is not None and len(model.frozen_towers) == 2:
        logger.info(
            "--backbone_lr_scale %g: both towers are frozen, so nothing trains at its rate", settings.backbone_lr_scale
        )
    if settings.gradient_checkpointing and runs_no_tower(config, model):
        logger.info(
            "--gradient_checkpointing: both towers are frozen and their outputs cached, so no step runs a layer"
        )
