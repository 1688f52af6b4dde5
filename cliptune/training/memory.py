"""What the gradient of a pair takes of memory, and how many pairs therefore fit into it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.random import fork_rng
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cliptune.model.batchnorm import held_statistics
from cliptune.model.depth import layers_above
from cliptune.runtime.device import Precision, autocast, free_memory, is_out_of_memory, release_memory, tf32
from cliptune.runtime.distributed import all_min, world_size
from cliptune.training.pair_logits import MIN_ROWS, SLICE_LOGITS

logger = logging.getLogger(__name__)

FREE_MEMORY_FRACTION = 0.6
"""Of the free memory that is planned with: what allocators, other processes and later steps take is the rest."""
CARD_FRACTION = 0.9
"""The same of a GPU, whose allocator's own need the trial step shows: what fragments over many steps is the rest."""
MAX_TRIALS = 6
WORTH_A_TRIAL = 1.1
"""Times as many pairs: what a larger size must promise."""
TRIAL_MULTIPLE = 8
"""Of a GPU's micro-batches: the tiles of its matrix products stay whole."""
LOSS_FLOATS = 6.5
"""Of each logit of a slice that the loss holds at once. InfoNCE takes 3.5 and less: a slice, its weights, and those of
the slice before or what a sum takes; with `positives` `caption` 4.5, since the targets are a matrix, too. A sigmoid
loss takes 5.5, since it adds up in float64, and 6.5 with the mask of `caption`."""


class Card(Protocol):
    """A GPU's memory, as planning sees it."""

    def free(self) -> int:
        """Return how many bytes are free for this process."""

    def reset_peak(self) -> None:
        """Give back what is cached, and begin to watch."""

    def peak(self) -> int:
        """Return the most bytes that have been held since `reset_peak`, but for those that were held then."""


class CudaCard:
    """The memory of a CUDA device, with what its allocator holds beside the tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, 0

    def free(self) -> int:
        """Return how many bytes are free for this process."""
        return free_memory(self.device)

    def reset_peak(self) -> None:
        """Give back what is cached, and begin to watch."""
        release_memory(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Return the most bytes that have been held since `reset_peak`, but for those that were held then."""
        return torch.cuda.max_memory_reserved(self.device) - self._before


class Line(NamedTuple):
    """Bytes that a step of n pairs takes: `fixed` + n * `pair`."""

    fixed: float
    pair: float

    def fitting(self, room: float) -> int:
        """Return how many pairs fit into so many bytes, at least one."""
        return max(int((room - self.fixed) / max(self.pair, 1)), 1)


def fitting_size(
    model: Any,
    *,
    precision: Precision,
    most: int,
    device: torch.device,
    free_bytes: int | None = None,
    has_average: bool = False,
    texts: Callable[[], Tensor | None] = lambda: None,
) -> int | None:
    """Find how many pairs fit into memory at once, from what the gradient of few of them takes.

    On a CUDA device a step is tried at the estimated size, and the size adjusted by what it took: of black images and
    texts as they come. Elsewhere all texts are taken to be as long as can be.

    Args:
        model: a `CLIPModel`; on another device than `device`, if it will be sharded over the ranks.
        precision: of the towers.
        most: pairs of this rank's part of a batch.
        device: whose memory it is.
        free_bytes: how much of it there is; None: what is free now.
        has_average: an average of the weights will be held, too.
        texts: returns tokens of typical texts, `[n, L]`; None: all are as long as can be.

    Returns:
        A power of two, or of what is tried the least number of equal parts; None if all fit. The smallest of all
        ranks'.
    """
    # peak(n) is a line: 2 pairs 10 MB and 4 pairs 16 MB are 3 MB a pair, and 4 MB whatever the batch
    few, more = (peak_bytes(model, precision, num_pairs) for num_pairs in (2, 4))
    pair_bytes = max((more - few) / 2, 1)
    line = Line(few - 2 * pair_bytes, pair_bytes)
    trained_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    if device.type == "cuda" and model.device.type == device.type and free_bytes is None:
        # two moments of each trained parameter, which the first step will make; and what DDP adds up gradients in,
        # which are tensors beside it where they come from several micro-batches
        copies = 2 + has_average + (world_size() > 1)
        held = copies * trained_bytes + loss_bytes(most * world_size(), most, device)
        tokens = _mixed(texts())
        size = fitting_on_card(
            CudaCard(device),
            lambda num_pairs: _try_step(model, precision, num_pairs, tokens),
            line=line._replace(fixed=line.fixed + trained_bytes),  # the trial makes gradients
            held_bytes=held,
            most=most,
        )
        if size is not None:
            logger.info("micro-batches of %d of %d pairs, as a trial step was found to fit", size, most)
        return size
    # gradient and two moments of each trained parameter, which the first step will make
    parameter_bytes: float = 3 * trained_bytes
    if model.device.type != device.type:
        parameter_bytes = (parameter_bytes + sum(value.nbytes for value in model.parameters())) / world_size()
    free = free_memory(device) if free_bytes is None else free_bytes
    fitting = int(all_min(torch.tensor(line.fitting(FREE_MEMORY_FRACTION * free - parameter_bytes))).item())
    if fitting >= most:
        return None
    size = 1 << (fitting.bit_length() - 1)
    logger.info("micro-batches of %d of %d pairs: a pair takes up to %.1f MB of memory", size, most, pair_bytes / 1e6)
    return size


def loss_bytes(num_pairs: int, num_rows: int, device: torch.device) -> int:
    """Return what the loss of a batch takes beside the graph of its last micro-batch, in bytes.

    Args:
        num_pairs: B, of all ranks.
        num_rows: images of this rank.
        device: by whose type slices are sized, see `pair_logits`.
    """
    slice_logits = max(SLICE_LOGITS.get(device.type, SLICE_LOGITS["cpu"]), MIN_ROWS * num_pairs)
    return int(4 * LOSS_FLOATS * min(num_rows * num_pairs, slice_logits))


def fitting_on_card(
    card: Card, try_step: Callable[[int], None], *, line: Line, held_bytes: int, most: int
) -> int | None:
    """Find how many pairs fit into a GPU's memory at once, by trying.

    Args:
        card: the GPU's memory.
        try_step: makes the gradient of so many pairs, and drops it.
        line: estimate of what it takes.
        held_bytes: what a real step holds beside that.
        most: pairs of this rank's part of a batch.

    Returns:
        The least number of equal parts that fit, in pairs of one; None if all fit. The smallest of all ranks'.
    """
    card.reset_peak()
    room = CARD_FRACTION * card.free() - held_bytes
    size = equal_part(most, line.fitting(room))
    best, too_many = 0, most + 1
    known: tuple[int, float] | None = None
    for _ in range(MAX_TRIALS):
        taken = _taken(card, try_step, size)
        if taken is not None and taken <= room:
            best = size
        else:
            too_many = size
        if taken is None:
            fitting = (best + size) // 2 if best else size // 4
        else:  # a line through what was measured last, at first with the estimate of what none would take
            others, others_taken = known or (0, min(line.fixed, taken / 2))
            pair = (taken - others_taken) / (size - others)
            known = size, taken
            fitting = Line(taken - size * pair, pair).fitting(room)
        size = equal_part(most, min(fitting, too_many - 1))
        if too_many == 1 or (best and size < WORTH_A_TRIAL * best):
            break
    card.reset_peak()  # so that the run's own peak is what it says
    fitting = int(all_min(torch.tensor(best or max(too_many // 2, 1))).item())
    return None if fitting >= most else equal_part(most, fitting)


def equal_part(most: int, fitting: int) -> int:
    """Divide pairs into the least number of equal parts that fit: of 512 with room for 300 two of 256.

    Parts of eight pairs and more are multiples of eight.
    """
    if fitting >= most:
        return most
    if fitting < TRIAL_MULTIPLE:
        return max(fitting, 1)
    whole = fitting // TRIAL_MULTIPLE * TRIAL_MULTIPLE
    num_parts = -(-most // whole)
    return -(-most // (num_parts * TRIAL_MULTIPLE)) * TRIAL_MULTIPLE


def _taken(card: Card, try_step: Callable[[int], None], num_pairs: int) -> int | None:
    """Return what a step takes of the card, in bytes; None: more than it has."""
    card.reset_peak()
    try:
        try_step(num_pairs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        full = True
    else:
        full = False
    if full:  # below the handler, which holds on to the tensors of what failed
        gc.collect()
        return None
    return card.peak()


def _mixed(texts: Tensor | None) -> Tensor | None:
    """Shuffle texts, so that some of them are like all, but put the longest first: any batch may have it."""
    if texts is None or not len(texts):
        return None
    texts = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))]
    return texts.roll(-int((texts != 0).sum(1).argmax()), 0)


def _try_step(model: Any, precision: Precision, num_pairs: int, texts: Tensor | None = None) -> None:
    """Make the gradient of black images and texts, which may come several times, as a step does, and drop it."""
    images, tokens = _blank_pairs(model, num_pairs)
    if texts is not None:
        tokens = texts[torch.arange(num_pairs) % len(texts)]
    try:
        # for several ranks it must be compiled within DDP, which parts it so that gradients are sent meanwhile
        with _undisturbed(model), torch.compiler.set_stance("force_eager" if world_size() > 1 else "default"):
            with tf32(model.device), autocast(model.device, precision):
                features = [feature for feature in model(images, tokens) if feature.requires_grad]
            torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])
    finally:
        model.zero_grad(set_to_none=True)


def _blank_pairs(model: Any, num_pairs: int) -> tuple[Tensor, Tensor]:
    """Make black images, and texts as long as can be."""
    size, length = model.image_resolution, model.architecture.context_length
    images = torch.zeros(num_pairs, 3, size, size, dtype=torch.uint8, device=model.device)
    tokens = torch.ones(num_pairs, length, dtype=torch.int64)
    end = model.architecture.end_token
    tokens[:, -1] = model.architecture.vocab_size - 1 if end is None else end
    return images, tokens


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Leave random numbers and running statistics as they are."""
    devices = [model.device] if model.device.type == "cuda" else []
    with fork_rng(devices), held_statistics(model):
        yield


def peak_bytes(model: Any, precision: Precision, num_pairs: int) -> int:
    """Return the most bytes that the gradient of `num_pairs` pairs takes, but for the gradient itself."""
    images, tokens = _blank_pairs(model, num_pairs)
    live = LiveTensors()  # which sees no operation of a compiled program
    with _undisturbed(model), torch.compiler.set_stance("force_eager"), live:
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
