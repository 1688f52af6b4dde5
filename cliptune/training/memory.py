"""What the gradient of a pair takes of memory, and how many pairs therefore fit into it."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.random import fork_rng
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cliptune.model.batchnorm import held_statistics
from cliptune.model.depth import layers_above
from cliptune.runtime.device import Precision, autocast, free_memory, tf32
from cliptune.runtime.distributed import all_min, world_size

logger = logging.getLogger(__name__)

FREE_MEMORY_FRACTION = 0.6
"""Of the free memory that is planned with: what allocators, other processes and later steps take is the rest."""


def fitting_size(
    model: Any, *, precision: Precision, most: int, device: torch.device, free_bytes: int | None = None
) -> int | None:
    """Estimate how many pairs fit into memory at once, from what the gradient of few of them takes.

    Args:
        model: a `CLIPModel`; on another device than `device`, if it will be sharded over the ranks.
        precision: of the towers.
        most: pairs of this rank's part of a batch.
        device: whose memory it is.
        free_bytes: how much of it there is; None: what is free now.

    Returns:
        A power of two; None if all fit. The smallest of all ranks'.
    """
    # peak(n) is a line: 2 pairs 10 MB and 4 pairs 16 MB are 3 MB a pair, and 4 MB whatever the batch
    few, more = (peak_bytes(model, precision, num_pairs) for num_pairs in (2, 4))
    pair_bytes = max((more - few) / 2, 1)
    fixed_bytes = few - 2 * pair_bytes
    # gradient and two moments of each trained parameter, which the first step will make
    parameter_bytes = 3 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    if model.device.type != device.type:
        parameter_bytes = (parameter_bytes + sum(value.nbytes for value in model.parameters())) / world_size()
    free = free_memory(device) if free_bytes is None else free_bytes
    room = FREE_MEMORY_FRACTION * free - fixed_bytes - parameter_bytes
    fitting = int(all_min(torch.tensor(max(int(room / pair_bytes), 1))).item())
    if fitting >= most:
        return None
    size: int = 2 ** (fitting.bit_length() - 1)
    logger.info("micro-batches of %d of %d pairs: a pair takes up to %.1f MB of memory", size, most, pair_bytes / 1e6)
    return size


def peak_bytes(model: Any, precision: Precision, num_pairs: int) -> int:
    """Return the most bytes that the gradient of `num_pairs` pairs takes, but for the gradient itself."""
    size, length = model.image_resolution, model.architecture.context_length
    images = torch.zeros(num_pairs, 3, size, size, dtype=torch.uint8, device=model.device)
    tokens = torch.ones(num_pairs, length, dtype=torch.int64)
    end = model.architecture.end_token
    tokens[:, -1] = model.architecture.vocab_size - 1 if end is None else end  # texts as long as can be
    live = LiveTensors()
    devices = [model.device] if model.device.type == "cuda" else []
    with fork_rng(devices), held_statistics(model), torch.compiler.set_stance("force_eager"), live:
        with tf32(model.device), autocast(model.device, precision):
            features = model(images, tokens)
        # through all layers to the first parameters, and to no others: beside their gradients, which a batch of any
        # size has once, the memory of so few pairs would not show
        projections = (model.image_projection.weight, model.text_projection.weight)
        wanted = [parameter for parameter in (*_first_trained(model), *projections) if parameter.requires_grad]
        torch.autograd.grad(features, wanted, [torch.ones_like(feature) for feature in features])
    return live.peak


def _first_trained(model: Any) -> list[Tensor]:
    """Return a small parameter of each tower: of its inputs or, where those are held, of the first that trains."""
    inputs = (model.backbone.visual.conv1.weight, model.backbone.positional_embedding)
    if model.lora is None and all(parameter.requires_grad for parameter in inputs):
        return list(inputs)
    trained = {name: value for name, value in model.backbone.named_parameters() if value.requires_grad}
    above = layers_above(trained)
    towers = ([name for name in trained if name.startswith("visual.") == image] for image in (True, False))
    return [trained[max(names, key=lambda name: (above[name], -trained[name].numel()))] for names in towers if names]


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered, as long as they live.

    Attributes:
        peak: most bytes that lived at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {self._key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        # a view or an operation in place returns the storage of its argument, which has been counted or was there
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._key(tensor) not in given | self._alive:
                self._add(tensor.untyped_storage())
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        key: int = tensor.untyped_storage()._cdata
        return key

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._bytes -= size
