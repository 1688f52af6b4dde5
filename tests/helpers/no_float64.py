"""A device without float64, as Apple's GPUs are."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoFloat64(TorchDispatchMode):
    """Fails where a float64 tensor is made on a device that stands in for one that has none.

    Args:
        device_type: of the stand-in.
        but: an operation that may, since the real one would do it in main memory.
    """

    def __init__(self, device_type: str, *, but: Any = None) -> None:
        super().__init__()
        self.device_type, self.but = device_type, but

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            is_wide = isinstance(value, Tensor) and value.dtype == torch.float64
            if is_wide and value.device.type == self.device_type and func is not self.but:
                raise TypeError(f"{func}: the device has no float64")
        return found
