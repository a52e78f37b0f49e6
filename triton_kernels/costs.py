"""What a layer takes at best in each way there is: its bytes and operations over the ceilings of a GPU's data sheet.

It decides which way a layer goes until times are known. Every tensor is taken to come from memory and every ceiling to
be reached, so these are bounds, of which only the order matters.
"""

from __future__ import annotations

from math import inf

from ..ceilings import BY_GENERATION, H100, Ceilings
from .conv_direct import loads
from .conv_forward import held_rows, means_moved
from .geometry import Layer
from .launch import Device


def ceilings_of(device: Device) -> Ceilings:
    return BY_GENERATION.get(device.capability // 10, H100)


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
