"""Bytes that a chain of layers keeps for backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from deepcontrol_cuda import backends
from deepcontrol_cuda.memory import saved_bytes
from deepcontrol_cuda.timing import Shape

from . import peers

CHAINS = {
    "three layers of 64 channels": (Shape(64, 64, 3, 28),) * 3,
    "three layers from an image": (Shape(3, 64, 3, 28), *(Shape(64, 64, 3, 28),) * 2),
}
LAYERS = ("ours", "conv_bn_relu")


@dataclass(frozen=True)
class Saved:
    """Bytes kept for backward by a chain, by the names in ``LAYERS``."""

    chain: str
    dtype: str
    layout: str
    bytes: dict[str, int]

    @property
    def ratio(self) -> float:
        return self.bytes["ours"] / self.bytes["conv_bn_relu"]


def measure(chain: str, dtype_name: str, layout: str, batch: int) -> Saved:
    dtype = getattr(torch, dtype_name)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    shapes = CHAINS[chain]
    size = (batch, shapes[0].in_channels, shapes[0].size, shapes[0].size)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype, memory_format=memory_format)
    x.requires_grad_(not shapes[0].reads_image)
    kept = {}
    with backends.use("cpu"):
        for name in LAYERS:
            layers = nn.Sequential(*(peers.build(name, shape, dtype, memory_format) for shape in shapes))
            kept[name] = saved_bytes(layers, x)
    return Saved(chain, dtype_name, layout, kept)
