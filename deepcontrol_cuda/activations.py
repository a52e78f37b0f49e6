"""The activations that the ops fuse, and what each must keep for its derivative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The derivative takes two values only, so one bit an element is all that backward needs.
PIECEWISE = ("relu", "leaky_relu", "relu6")
# The derivative is a function of the pre-activation, which is kept whole.
SMOOTH = ("silu", "gelu", "hardswish")
ACTIVATIONS = ("identity", *PIECEWISE, *SMOOTH)


def apply(pre: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    """``activation(pre)`` in plain PyTorch, same shape and dtype.

    Raises ``ValueError`` for a name that is not in ``ACTIVATIONS``.
    """
    if activation == "identity":
        return pre
    if activation == "relu":
        return F.relu(pre)
    if activation == "leaky_relu":
        return F.leaky_relu(pre, negative_slope)
    if activation == "relu6":
        return F.relu6(pre)
    if activation == "silu":
        return F.silu(pre)
    if activation == "gelu":
        return F.gelu(pre)
    if activation == "hardswish":
        return F.hardswish(pre)
    raise unknown(activation)


def unknown(activation: object) -> ValueError:
    return ValueError(f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")


def derivative(pre: Tensor, activation: str) -> Tensor:
    """``activation'(pre)`` for the smooth activations, itself differentiable."""
    if activation == "silu":
        s = torch.sigmoid(pre)
        return s * (1 + pre * (1 - s))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(pre * 0.5**0.5))
        pdf = torch.exp(-0.5 * pre * pre) * (0.5 / torch.pi) ** 0.5
        return cdf + pre * pdf
    if activation == "hardswish":
        # d/dp of clamp(p + 3, 0, 6) * p / 6, with PyTorch's choice of side at the two kinks.
        inside = pre / 3 + 0.5
        return torch.where(pre <= -3, torch.zeros_like(pre), torch.where(pre < 3, inside, torch.ones_like(pre)))
    raise ValueError(f"activation: {activation!r} has no derivative in the pre-activation here, wanted one of {SMOOTH}")
