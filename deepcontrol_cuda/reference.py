"""Every op of the package in plain PyTorch: the oracle of tests and benchmarks, and the last fallback.

Shapes: ``input`` (N, C, *spatial) with one to three spatial dimensions, ``weight`` (O, C / groups, *kernel),
vectors ``gain``, ``mean_scale``, ``bias`` (C,) or (1,) for ``deep_control`` and (O,) or (1,) for the convolution.
Any floating dtype; the result has the dtype of ``input``. The functions differentiate through autograd to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations


def per_map(vector: Tensor, rank: int) -> Tensor:
    """View a (C,) vector as (1, C, 1, ...) and an (N, C) matrix as (N, C, 1, ...), ``rank`` dimensions in all."""
    lead = (1, -1) if vector.dim() == 1 else tuple(vector.shape)
    return vector.view(*lead, *(1,) * (rank - 2))


def spatial(tensor: Tensor) -> tuple[int, ...]:
    """The spatial dimensions of a (N, C, *spatial) tensor."""
    return tuple(range(2, tensor.dim()))


def deep_control(
    input: Tensor,
    gain: Tensor | None = None,
    mean_scale: Tensor | float | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
) -> Tensor:
    """``act(gain * (input - mean_scale * mean(input)) + bias + residual)``, the mean over each sample's each map.

    Source: arXiv 1706.03907, abstract.
    """
    rank = input.dim()
    out = input
    if isinstance(mean_scale, Tensor):
        out = out - per_map(mean_scale, rank) * input.mean(spatial(input), keepdim=True)
    elif mean_scale is None:
        out = out - input.mean(spatial(input), keepdim=True)
    elif mean_scale != 0.0:
        out = out - mean_scale * input.mean(spatial(input), keepdim=True)
    if gain is not None:
        out = out * per_map(gain, rank)
    if bias is not None:
        out = out + per_map(bias, rank)
    if residual is not None:
        out = out + residual
    return activations.apply(out, activation, negative_slope).to(input.dtype)


def deep_control_conv(
    input: Tensor,
    weight: Tensor,
    gain: Tensor | None = None,
    mean_scale: Tensor | float | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    projection: float = 0.0,
) -> Tensor:
    """``deep_control(conv(input, weight), ...)``; backward projects the gradient of ``weight`` if asked.

    Sources: arXiv 1706.03907, abstract; ``projection`` arXiv 1911.13173, abstract.
    """
    if projection:
        weight = ProjectedInBackward.apply(weight, projection)
    conv = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    z = conv(input, weight, None, stride, padding, dilation, groups)
    return deep_control(
        z, gain, mean_scale, bias, residual=residual, activation=activation, negative_slope=negative_slope
    )


def project(gradient: Tensor, weight: float) -> Tensor:
    """``gradient - weight * mean`` over the taps of each (filter, input channel) kernel; kernels of one tap stay.

    ``gradient`` (O, C / groups, *kernel). Source: arXiv 1911.13173, abstract, and the authors' code
    (taylorkangbeck/mean-shift-rejection), where a kernel of one tap is left alone as well.
    """
    if gradient.dim() < 3 or prod(gradient.shape[2:]) == 1:
        return gradient
    return gradient - weight * gradient.mean(spatial(gradient), keepdim=True)


class ProjectedInBackward(torch.autograd.Function):
    """Identity whose backward projects; linear, so double backward projects again."""

    @staticmethod
    def forward(ctx, weight: Tensor, projection: float) -> Tensor:
        ctx.projection = projection
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return project(grad, ctx.projection), None


def window_mean(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """(N, C, *kernel_size): the mean, over all output positions, of the input that each kernel tap sees.

    ``sum_{c, taps} weight * window_mean(input)`` is the map mean of ``conv(input, weight)``, since both are linear.
    """
    pads = [p for size in reversed(padding) for p in (size, size)]
    padded = F.pad(input, pads)
    taps = []
    for tap in product(*(range(k) for k in kernel_size)):
        view = padded
        for i, offset in enumerate(tap):
            dim = i + 2
            span = dilation[i] * (kernel_size[i] - 1) + 1
            count = (padded.shape[dim] - span) // stride[i] + 1
            first = offset * dilation[i]
            view = view[(slice(None),) * dim + (slice(first, first + (count - 1) * stride[i] + 1, stride[i]),)]
        taps.append(view.mean(spatial(view)))
    return torch.stack(taps, -1).reshape(*input.shape[:2], *kernel_size)


def finish_weight_grad(
    grad_weight: Tensor, weight: Tensor, gain: Tensor | None, scale: Tensor | None, projection: float
) -> tuple[Tensor, Tensor]:
    """From ``scale * dw'`` to ``(dw, dgain)``, where ``dw' = conv_weight_grad(input, dz')``.

    ``dw = project(gain * dw')`` (O, C / groups, *kernel) and ``dgain = sum(weight * dw')`` (O,). ``scale`` (O,) is
    what the gradient was multiplied by before the convolution's backward, None for 1.
    """
    shape = (-1, *(1,) * (weight.dim() - 1))
    unscaled = grad_weight if scale is None else grad_weight / scale.expand(weight.shape[0]).view(shape)
    dgain = (weight * unscaled).flatten(1).sum(1)
    if gain is not None:
        unscaled = unscaled * gain.expand(weight.shape[0]).view(shape)
    return project(unscaled, projection), dgain
