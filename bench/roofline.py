"""What this machine reaches at most: bytes moved by a copy, operations of the library's products and convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .clock import Clock, GpuClock, WallClock
from .rows import Ceilings

_ROUNDS = 8


def measure(device: str) -> Ceilings:
    """At torch's present number of threads; takes about a second."""
    clock = GpuClock() if device == "cuda" else WallClock()
    return Ceilings(
        torch.get_num_threads(), _copy(clock), _operations(clock, "float32"), _operations(clock, "bfloat16")
    )


def _copy(clock: Clock) -> float:
    # Larger than any cache by far.
    size = 2**31 if clock.device == "cuda" else 2**28
    # As float32, which PyTorch copies faster than single bytes.
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / _least(clock, lambda: target.copy_(source))


def _operations(clock: Clock, dtype: str) -> float:
    """The best of a square product and of a 3x3 convolution of ResNet-50 (arXiv 1512.03385, table 1)."""
    gpu = clock.device == "cuda"
    like = {"dtype": getattr(torch, dtype), "device": clock.device}
    side, batch = (8192, 256) if gpu else (1024, 8)
    a, b = (torch.randn(side, side, device=clock.device).to(**like) for _ in range(2))
    x = torch.randn(batch, 256, 14, 14, device=clock.device).to(**like, memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=clock.device).to(**like, memory_format=torch.channels_last)
    with torch.no_grad():
        product = 2 * side**3 / _least(clock, lambda: a @ b)
        convolution = 2 * x.numel() * weight[0].numel() / _least(clock, lambda: F.conv2d(x, weight, padding=1))
    return max(product, convolution)


def _least(clock: Clock, call: Callable[[], object]) -> float:
    prepared = clock.prepare([call])
    return min(clock.seconds(prepared) for _ in range(_ROUNDS))
