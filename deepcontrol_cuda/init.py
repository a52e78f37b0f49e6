"""Initialisation of kernels for Mean Shift Rejection (arXiv 1911.13173)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["zero_mean_unit_"]


@torch.no_grad()
def zero_mean_unit_(weight: Tensor, magnitude: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``weight`` in place with kernels of mean zero, each filter of Euclidean norm ``magnitude``.

    Drawn from U(-1, 1); then the mean over the taps is subtracted for each (filter, input channel), and where a kernel
    has one tap only, as in a 1x1 convolution or a linear layer, the mean over the input channels for each filter. A
    filter with one element keeps its sign alone. Uniform, because a normal draw has too many values near zero.
    Source: arXiv 1911.13173, abstract; ``InitUtil.py`` of the authors' code (taylorkangbeck/mean-shift-rejection).

    Args:
        weight: (O, C / groups, *kernel) or (O, C), any floating dtype.
        magnitude: norm of each filter, positive.
        generator: source of the draw; None is torch's default.

    Returns:
        ``weight``. Sums are zero to the rounding of its dtype; the draw is in float32, or float64 for float64.

    Raises:
        TypeError, ValueError: ``weight`` is no kernel of a floating dtype, or sharded; ``magnitude`` is not positive.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: got {given}, wanted a tensor of a floating dtype")
    if hasattr(weight, "placements"):
        raise TypeError("weight: got a DTensor, wanted a plain tensor: initialise before the model is sharded")
    if weight.dim() < 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted (O, C / groups, *kernel) or (O, C)")
    if not isinstance(magnitude, (int, float)) or not 0 < magnitude < math.inf:
        raise ValueError(f"magnitude: got {magnitude!r}, wanted a positive number")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    draw = torch.empty(weight.shape, dtype=dtype, device=weight.device).uniform_(-1, 1, generator=generator)
    taps = tuple(range(2, draw.dim()))
    axes = taps if draw.shape[2:].numel() > 1 else (1, *taps)
    if math.prod(draw.shape[axis] for axis in axes) > 1:
        draw -= draw.mean(axes, keepdim=True)
    draw *= magnitude / torch.linalg.vector_norm(draw, dim=(1, *taps), keepdim=True)
    return weight.copy_(draw)
