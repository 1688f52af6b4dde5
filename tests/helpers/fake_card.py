"""A CUDA device that is not there: tensors on it have shapes and no values, and whoever waits for it gets an error.

PyTorch's fake tensors say that they are on a device, and Python goes by that; autocast does not, see `autocast`.
Tensors of the CPU stay real, since the toolkit reads them: lengths of texts, ids of images. What on a card would fail,
or make the CPU wait until the card has done all that it was given, is an error here:

- a value that is read (`item`, `bool`, `tolist`, a mask as an index);
- a copy to the card or from it that is not `non_blocking`, or is of more than 64 KB in memory that is not pinned;
- an operation with tensors of both: PyTorch refuses most, and others copy one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
STAGED_BYTES = 2**16
"""Of a copy from memory that is not pinned, up to which CUDA does not wait."""
_TO, _INTO = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
_SCALAR, _EQUAL = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default


class CardError(Exception):
    """The CPU would wait for the card, or the card gets what it cannot use."""


class FakeCard(FakeTensorMode):
    """See the module.

    Attributes:
        waits: what was waited for where that is allowed, in its order.
    """

    avoid_device_init = True  # there is none

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._may_wait = False
        self._pinned: dict[int, Tensor] = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let what runs inside wait for the card, where each value that is read is 1, and copied 0."""
        self._may_wait = True
        try:
            yield
        finally:
            self._may_wait = False

    def pin(self, tensor: Tensor) -> Tensor:
        """Let a tensor of the CPU lie in what counts as pinned memory."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its address is not used again
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies in it."""
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # what C++ takes from a fake tensor's own options is "meta", see `fake_card`
        kwargs = {
            name: CARD if isinstance(value, torch.device) and value.type in {"meta", "cuda"} else value
            for name, value in (kwargs or {}).items()
        }
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        if len(on_cpu) == len(tensors) and kwargs.get("device") != CARD:
            is_pinned = kwargs.pop("pin_memory", False)
            made = func(*args, **kwargs)
            return self.pin(made) if is_pinned else made
        if func is _TO and kwargs.get("device", args[0].device) != args[0].device:
            return self._move(func, args, kwargs, source=args[0], target=None)
        if func is _INTO and args[0].device != args[1].device:
            return self._move(func, args, kwargs, source=args[1], target=args[0])
        if func in {_SCALAR, _EQUAL}:
            self._wait(f"{func} reads a value of the card")
            return func is _EQUAL or torch.ones((), dtype=tensors[0].dtype).item()
        for tensor in on_cpu:
            if tensor.ndim:  # one number goes to a kernel as an argument of its own
                raise CardError(f"{func} takes a tensor {list(tensor.shape)} of the CPU beside the card's")
        return self._run(func, args, kwargs)

    def _move(self, func: Any, args: Any, kwargs: Any, *, source: Tensor, target: Tensor | None) -> Any:
        to_card = source.device.type == "cpu"
        is_asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        on_cpu = source if to_card else target
        is_staged = on_cpu is not None and on_cpu.nbytes > STAGED_BYTES and not self.is_pinned(on_cpu)
        if not is_asynchronous or is_staged:
            self._wait(f"a copy {list(source.shape)} {'to' if to_card else 'from'} the card is waited for")
        if to_card:
            return self._run(func, args, kwargs)
        if target is not None:
            return target.zero_()
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _wait(self, what: str) -> None:
        if not self._may_wait:
            raise CardError(what)
        self.waits.append(what)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(
            lambda value: (
                self.from_tensor(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value
            ),
            (args, kwargs),
        )
        return super().__torch_dispatch__(func, (), args, kwargs)


_NARROW = (
    (F, "linear"), (F, "conv2d"), (F, "scaled_dot_product_attention"), (torch, "matmul"), (torch, "mm"),
    (Tensor, "__matmul__"),
)  # fmt: skip
_WIDE = (F, "layer_norm"), (F, "normalize"), (F, "softmax"), (Tensor, "softmax"), (torch, "logsumexp")
"""What a card's autocast takes to the chosen type, and to float32, of the operations that the towers have."""


def autocast(function: Any, wide: bool) -> Any:
    """Cast the tensors that a function gets as autocast does: in C++ it casts those of a real card alone."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cuda"):
            return function(*args, **kwargs)
        dtype = torch.float32 if wide else torch.get_autocast_dtype("cuda")

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, FakeTensor) and value.is_floating_point() else value

        return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run


class Stream:
    """Stands in for `torch.cuda.Stream` and its events."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self) -> Stream:
        """Return an event."""
        return Stream()

    def wait_event(self, event: Any) -> None:
        """Order nothing."""


@contextmanager
def fake_card(*, capability: tuple[int, int] = (9, 0), memory: int = 80 * 10**9) -> Iterator[FakeCard]:
    """Have a card of that compute capability, and that much memory in bytes."""
    card, make_subclass = FakeCard(), torch.Tensor._make_subclass
    state = torch.zeros(16, dtype=torch.uint8)
    nothing = SimpleNamespace(total_memory=memory)

    def on_meta(cls: Any, elem: Tensor, requires_grad: bool, **options: Any) -> Any:
        # autograd asks the driver for the streams of what C++ takes for a CUDA tensor; so only Python does
        options.pop("dispatch_device", None)
        return make_subclass(cls, elem, requires_grad, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "_make_subclass", on_meta)
        patch.setattr(FakeTensor, "is_cuda", property(lambda tensor: tensor.fake_device.type == "cuda"), raising=False)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: card.pin(tensor.clone()))
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor, *_: card.is_pinned(tensor))
        patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        for wide, functions in ((False, _NARROW), (True, _WIDE)):
            for owner, name in functions:
                patch.setattr(owner, name, autocast(getattr(owner, name), wide))
        for name, value in {
            "Stream": Stream,
            "stream": lambda _: nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda *_: None,
            "get_rng_state": lambda *_: state.clone(),
            "set_rng_state": lambda *_: None,
            "empty_cache": lambda: None,
            "is_bf16_supported": lambda *_, **__: capability >= (8, 0),
            "get_device_capability": lambda *_: capability,
            "get_device_properties": lambda *_: nothing,
            "mem_get_info": lambda *_: (memory, memory),
            "memory_reserved": lambda *_: 0,
            "memory_allocated": lambda *_: 0,
        }.items():
            patch.setattr(torch.cuda, name, value)
        with card, torch.autograd.set_multithreading_enabled(False):
            yield card
