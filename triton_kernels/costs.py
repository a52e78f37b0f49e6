"""What a layer takes at best in each way there is: its bytes and operations over the ceilings of a GPU's data sheet.

It decides which way a layer goes until times are known. Every tensor is taken to come from memory and every ceiling to
be reached, so these are bounds, of which only the order matters.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from .conv_direct import loads
from .conv_forward import held_rows, means_moved
from .geometry import Layer
from .launch import Device


class Ceilings(NamedTuple):
    """Bytes a second from memory and from first-level caches, and operations a second on 16-bit numbers (two for a
    multiply-add)."""

    name: str
    bytes: float
    cached: float
    operations: float


# NVIDIA's data sheets, without sparsity, by the first digit of the compute capability; caches give 128 bytes a clock
# and multiprocessor.
_CEILINGS = {
    8: Ceilings("A100 SXM 80GB", 2.039e12, 108 * 128 * 1.41e9, 312e12),
    9: Ceilings("H100 SXM", 3.35e12, 132 * 128 * 1.83e9, 989.4e12),
}
H100 = _CEILINGS[9]


def ceilings_of(device: Device) -> Ceilings:
    return _CEILINGS.get(device.capability // 10, H100)


def seconds(layer: Layer, ceilings: Ceilings) -> dict[str, float]:
    """Least seconds of the bare ``convolution``, and of the layer forward, centred and with relu, in each of
    ``conv_center.ALGORITHMS``."""
    windows, itemsize = layer.windows, layer.itemsize
    input, output = (n * itemsize for n in (layer.input_rows * layer.channels, layer.rows * layer.filters))
    weights = layer.filters * layer.group_channels * windows.taps
    bits = layer.rows * layer.filters / 8
    multiply_adds = layer.samples * windows.pixels * weights
    # Twice as many clocks for TF32.
    compute = 2 * multiply_adds / ceilings.operations * itemsize / 2
    moved = input + weights * itemsize + output
    held = held_rows(windows)
    convolution = max(moved / ceilings.bytes, compute)
    product = max((moved + bits) / ceilings.bytes, compute)
    return {
        "convolution": convolution,
        "two passes": convolution + (2 * output + bits) / ceilings.bytes,
        "fused": product + means_moved(layer) / ceilings.bytes,
        "held": max((moved + bits) / ceilings.bytes, compute * held / windows.pixels) if held else inf,
        "direct": max((moved + bits) / ceilings.bytes, loads(layer) * itemsize / ceilings.cached),
    }
