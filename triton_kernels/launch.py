"""Where kernels run: the current device, its limits, and whether there is one at all or Triton interprets them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1: kernels are played by NumPy on CPU tensors. Triton reads it when it is imported."""


class Device(NamedTuple):
    """What plans of blocks depend on."""

    capability: int
    """90 for compute capability 9.0."""
    processors: int
    shared_memory: int
    """Bytes that one block may have."""


# An H100: what is planned for where there is none.
_NO_DEVICE = Device(90, 132, 227 * 1024)


def device_of(tensor: Tensor) -> Device:
    """The GPU that ``tensor`` is on."""
    return _NO_DEVICE if INTERPRETED else device_at(tensor.device.index)


@cache
def device_at(index: int | None) -> Device:
    """The GPU of an index; for None what is planned for where there is none."""
    if index is None:
        return _NO_DEVICE
    properties = torch.cuda.get_device_properties(index)
    return Device(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``tensor`` the current one: Triton launches there, on PyTorch's current stream."""
    if INTERPRETED or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def ceil_divide(a: int, b: int) -> int:
    return -(-a // b)
