"""One model in several ranks, whole in each (DDP) or in shards (FSDP2); its state on disk is the same.

`model` is a `CLIPModel` throughout. Sharding takes a third of a second to import, so that comes where it is needed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from cliptune.model.towers import layers_of
from cliptune.runtime.distributed import all_sum, copy_weights, world_size

ENTRIES = ("encode_image", "encode_text", "run_image_tower", "run_text_tower", "project_image", "project_text")
"""Methods of a model that use its weights, beside `forward`."""


def parallel_model(model: Any, how: str, device: torch.device) -> nn.Module | None:
    """Prepare a model for training in several ranks, before its optimiser is made.

    Args:
        model: on any device; it comes to `device`, or its shards do.
        how: `ddp`: every rank holds the whole model, and gradients are added up while they are computed.
            `fsdp`: each holds a shard of every parameter, gradient and optimiser state, and gathers a layer's weights
            when it runs.
        device: this rank's.

    Returns:
        What runs the model in training; None where there is one rank.

    Raises:
        ValueError: a PyTorch that cannot shard the model.
    """
    if world_size() == 1:
        model.to(device)
        return None
    copy_weights(model)
    if how == "fsdp":
        _shard(model, device)
        return model  # type: ignore[no-any-return]
    model.to(device)
    # BatchNorm statistics are averaged after an epoch; by default DDP would copy rank 0's before every forward pass
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    own_buffers: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    # DDP averages the gradient of what requires one now. Those of temperature and bias come from the loss over the
    # batch of all ranks, and are the whole ones in each of them already
    scalars = [parameter for parameter in _scalars(model) if parameter.requires_grad]
    for parameter in scalars:
        parameter.requires_grad_(False)
    wrapper = DistributedDataParallel(model, gradient_as_bucket_view=True, **own_buffers)
    for parameter in scalars:
        parameter.requires_grad_(True)
    return wrapper


def is_sharded(model: nn.Module) -> bool:
    """Tell whether running the model is a collective, which every rank must take part in."""
    return hasattr(model, "unshard")


def can_shard() -> bool:
    """Tell whether this PyTorch, 2.7 or later, can leave scalars out of sharding."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    return "ignored_params" in inspect.signature(fully_shard).parameters


def whole(state: Any) -> Any:
    """Put the shards in a state dict together, in every rank; a collective if there are any."""
    return tree_map(lambda value: value.full_tensor() if _is_shard(value) else value, state)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole optimiser state; of a sharded parameter's, each rank takes its shard.

    Raises:
        ValueError: a state of other parameters, or numbers that an optimiser cannot have.
        KeyError: a part of it is missing.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = _checked_groups(optimizer.state_dict()["param_groups"], state["param_groups"])
    _check_moments(optimizer, parameters, state["state"])

    def shard(parameter: Any, value: Any) -> Any:
        # moments have their parameter's shape; the count of steps is a scalar, and whole in each rank
        if _is_shard(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape:
            from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    states = {
        index: {name: shard(parameters[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _checked_groups(own: list[dict[str, Any]], stored: Any) -> list[dict[str, Any]]:
    """Take numbers, such as rates, from what was stored; what else a group holds is as the optimiser was built."""
    if [group["params"] for group in stored] != [group["params"] for group in own]:
        raise ValueError("other parameters")
    groups = []
    for mine, theirs in zip(own, stored, strict=True):
        numbers = {key: theirs[key] for key, value in mine.items() if type(value) in {int, float} and key in theirs}
        numbers["lr"] = theirs["lr"]
        for key, value in numbers.items():
            if type(value) not in {int, float} or not 0 <= value < math.inf:
                raise ValueError(f"{key} of {value!r:.50}")
        groups.append({**mine, **numbers})
    return groups


def _check_moments(optimizer: torch.optim.Optimizer, parameters: list[Any], states: dict[Any, dict[str, Any]]) -> None:
    """Refuse what would be found out in the middle of a step, or never: PyTorch compares neither shapes nor numbers."""
    if states and isinstance(optimizer, torch.optim.AdamW) and sorted(states) != list(range(len(parameters))):
        raise ValueError("moments of other parameters")
    for index, values in states.items():
        if isinstance(optimizer, torch.optim.AdamW) and values.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"moments of parameter {index}: {', '.join(sorted(map(str, values)))[:100]}")
        for name, value in values.items():
            is_tensor = isinstance(value, Tensor)
            if is_tensor and not (value.ndim == 0 or value.shape == parameters[index].shape):
                raise ValueError(f"{name} of parameter {index} has the shape {list(value.shape)}")
            if is_tensor and not value.isfinite().all():
                raise ValueError(f"{name} of parameter {index} is not finite")


def unscale_gradient(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Divide all gradients by the scale of the loss, and let the scaler note whether any, in any rank, is not finite.

    It takes no shards together with tensors that are whole, so it gets each kind as the parameters of an optimiser.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kinds = [[parameter for parameter in parameters if _is_shard(parameter) == sharded] for sharded in (True, False)]
    if not all(kinds):
        scaler.unscale_(optimizer)
        return
    parts: list[Any] = [SimpleNamespace(param_groups=[{"params": kind}]) for kind in kinds]
    for part in parts:
        scaler.unscale_(part)


def clip_gradient(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`; 0: leave them as they are.

    Returns:
        The norm as it was, a scalar, the same in every rank.
    """
    gradients: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if _is_shard(gradient)]
    rest = [gradient for gradient in gradients if not _is_shard(gradient)]
    norm = _norm(rest)
    if shards:  # squares add up over disjoint shards; what is whole in each rank counts once
        norm = (norm.square() + all_sum(_norm(shards).square())).sqrt()
    # on a GPU the comparison would wait for the device; on the CPU it is free, and saves a pass over all gradients
    if max_norm == 0 or (norm.device.type == "cpu" and norm <= max_norm):
        return norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(shards + rest, factor)
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    if gradients and gradients[0].device.type == "cpu":  # the norms of rows run on all cores, and sum more exactly
        gradients = [torch.linalg.vector_norm(g, dim=-1) if g.ndim > 1 else g for g in gradients]
    return torch.nn.utils.get_total_norm(gradients)


def _is_shard(value: Any) -> bool:
    """Tell a DTensor from a tensor."""
    return hasattr(value, "full_tensor")


def _scalars(model: Any) -> list[nn.Parameter]:
    """List the parameters of the loss, which belong to no layer."""
    return [parameter for parameter in (model.logit_scale, model.logit_bias) if parameter is not None]


def _shard(model: Any, device: torch.device) -> None:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    if not can_shard():
        raise ValueError(f"--parallel fsdp needs PyTorch 2.7 or later, this is {torch.__version__}; use --parallel ddp")
    model.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers_of(model.backbone):
        fully_shard(layer, mesh=mesh)
    # a scalar cannot be sharded
    fully_shard(model, mesh=mesh, ignored_params=set(_scalars(model)))
    for parameter in _scalars(model):
        parameter.data = parameter.data.to(device)
    for name in ENTRIES:
        _gather_around(model, name)


def _gather_around(model: Any, name: str) -> None:
    """Let a method gather the weights it uses, unless it is called by one that has.

    `encode_image` calls `project_image`: gathering in both would free the weights when the inner one returns, in the
    middle of the outer one.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method  # noqa: PLC0415

    plain: Callable[..., Any] = getattr(model, name)
    register_fsdp_forward_method(model, name)
    gathering: Callable[..., Any] = getattr(model, name)

    @wraps(plain)
    def method(*arguments: Any, **options: Any) -> Any:
        inside = model._get_fsdp_state()._training_state.name == "FORWARD"
        return (plain if inside else gathering)(*arguments, **options)

    setattr(model, name, method)
