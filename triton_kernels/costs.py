"""What a layer takes at best in each way there is: its bytes and operations over the ceilings of a GPU's data sheet.

It decides which way a layer goes until times are known. Every tensor is taken to come from memory and every ceiling to
be reached, so these are bounds, of which only the order matters.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from torch import Tensor

from .conv_forward import held_rows, means_moved
from .launch import device_of
from .tensors import Windows


class Ceilings(NamedTuple):
    """Bytes a second from memory, and operations a second on 16-bit numbers (two for a multiply-add)."""

    name: str
    bytes: float
    operations: float


# NVIDIA's data sheets, without sparsity, by the first digit of the compute capability.
_CEILINGS = {8: Ceilings("A100 SXM 80GB", 2.039e12, 312e12), 9: Ceilings("H100 SXM", 3.35e12, 989.4e12)}
H100 = _CEILINGS[9]


def ceilings_of(tensor: Tensor) -> Ceilings:
    """Of a GPU like the one that ``tensor`` is on; an H100's where it is on none."""
    capability = device_of(tensor).capability if tensor.device.type == "cuda" else 90
    return _CEILINGS.get(capability // 10, H100)


class Layer(NamedTuple):
    """A convolution with centring and relu."""

    samples: int
    channels: int
    filters: int
    groups: int
    windows: Windows
    itemsize: int


def seconds(layer: Layer, ceilings: Ceilings) -> dict[str, float]:
    """Least seconds of the bare ``convolution``, and of the layer forward in each of ``conv_center.ALGORITHMS``."""
    samples, channels, filters, groups, windows, itemsize = layer
    depth, height, width = windows.size
    input = samples * channels * depth * height * width * itemsize
    output = samples * filters * windows.pixels * itemsize
    weights = filters * channels // groups * windows.taps
    bits = samples * filters * windows.pixels / 8
    # Twice as many clocks for TF32.
    compute = 2 * samples * windows.pixels * weights / ceilings.operations * itemsize / 2
    moved = input + weights * itemsize + output
    held = held_rows(windows)
    convolution = max(moved / ceilings.bytes, compute)
    product = max((moved + bits) / ceilings.bytes, compute)
    return {
        "convolution": convolution,
        "two passes": convolution + (2 * output + bits) / ceilings.bytes,
        "fused": product + means_moved(*layer) / ceilings.bytes,
        "held": max((moved + bits) / ceilings.bytes, compute * held / windows.pixels) if held else inf,
        "direct": (moved + bits) / ceilings.bytes,
    }
