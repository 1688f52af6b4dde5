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

from cliptune.model.towers import held_statistics
from cliptune.runtime.device import Precision, autocast, free_memory, tf32
from cliptune.runtime.distributed import all_min, world_size

logger = logging.getLogger(__name__)

SHARE_OF_FREE_MEMORY = 0.6


def fitting_size(model: Any, *, precision: Precision, most: int, device: torch.device) -> int | None:
    """Estimate how many pairs fit into memory at once, from what the gradient of few of them takes.

    Args:
        model: a `CLIPModel`; on another device than `device`, if it will be sharded over the processes.
        precision: of the towers.
        most: pairs of this process's part of a batch.
        device: whose memory it is.

    Returns:
        A power of two; None if all fit. The smallest of all processes'.
    """
    few, more = (_peak_bytes(model, precision, num_pairs) for num_pairs in (2, 4))
    a_pair = max((more - few) / 2, 1)
    parameters = 3 * sum(each.nbytes for each in model.parameters() if each.requires_grad)  # gradient and moments
    if model.device.type != device.type:
        parameters = (parameters + sum(each.nbytes for each in model.parameters())) / world_size()
    room = SHARE_OF_FREE_MEMORY * free_memory(device) - (few - 2 * a_pair) - parameters
    fitting = int(all_min(torch.tensor(max(int(room / a_pair), 1))).item())
    if fitting >= most:
        return None
    size: int = 2 ** (fitting.bit_length() - 1)
    logger.info("micro-batches of %d of %d pairs: a pair takes up to %.1f MB of memory", size, most, a_pair / 1e6)
    return size


def _peak_bytes(model: Any, precision: Precision, num_pairs: int) -> int:
    """Return the most bytes that the gradient of some pairs takes, but for the gradient itself."""
    size, length = model.image_resolution, model.architecture.context_length
    images = torch.zeros(num_pairs, 3, size, size, dtype=torch.uint8, device=model.device)
    tokens = torch.ones(num_pairs, length, dtype=torch.int64)
    tokens[:, -1] = model.architecture.vocab_size - 1  # texts as long as can be
    live = LiveTensors()
    devices = [model.device] if model.device.type == "cuda" else []
    with fork_rng(devices), held_statistics(model), torch.compiler.set_stance("force_eager"), live:
        with tf32(model.device), autocast(model.device, precision):
            features = model(images, tokens)
        # through all layers to the first parameters: with the others' gradients few pairs would not show
        small = (model.backbone.visual.conv1.weight, model.backbone.positional_embedding)
        projections = (model.image_projection.weight, model.text_projection.weight)
        wanted = [parameter for parameter in (*small, *projections) if parameter.requires_grad]
        torch.autograd.grad(features, wanted, [torch.ones_like(each) for each in features])
    return live.peak


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
        given = {self._key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
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
