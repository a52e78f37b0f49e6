"""Gradients around the dispatcher ops of ``csrc/ops.cpp`` in the namespace of a backend.

In eager mode ``csrc/autograd/functions.cpp`` records a call, which takes a fifth of the time that it takes here. The
autograd.Functions below stand in for it under torch.compile, which traces what is written in Python, and where there is
no extension and Triton runs without it. Second derivatives are the formulas below for both.

The map mean and what the activation keeps are outputs of the Functions, not only saved tensors: so autograd can send
gradients into them, and the second derivative follows from the formulas without keeping bias or residual.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _ops, activations, backends
from .reference import ProjectedInBackward, per_map, project, spatial


def center(
    input: Tensor,
    gain: Tensor | None,
    mean_scale: Tensor | float | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    backend: str,
) -> Tensor:
    """``functional.deep_control`` on checked arguments, through the compiled ops of ``backend``."""
    mean_scale, constant = _split(mean_scale)
    ops = backends.ops[backend]
    if _nodes is not None and not torch.compiler.is_compiling():
        return _nodes.center(input, gain, mean_scale, constant, bias, residual, activation, slope, ops.namespace)
    residual = _distinct(residual, input)
    if _recording(input, gain, mean_scale, bias, residual):
        return _Center.apply(input, gain, mean_scale, bias, residual, constant, activation, slope, ops)[0]
    return ops.center(input, gain, mean_scale, constant, bias, residual, activation, slope, False)[0]


def conv_center(
    input: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    mean_scale: Tensor | float | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    activation: str,
    slope: float,
    projection: float,
    backend: str,
) -> Tensor:
    """``functional.deep_control_conv*`` on checked arguments, through the compiled ops of ``backend``."""
    mean_scale, constant = _split(mean_scale)
    ops = backends.ops[backend]
    if _nodes is not None and not torch.compiler.is_compiling():
        return _nodes.conv_center(
            input, weight, gain, mean_scale, constant, bias, residual, stride, padding, dilation, groups, activation,
            slope, projection, ops.namespace,
        )  # fmt: skip
    residual = _distinct(residual, input)
    geometry = (stride, padding, dilation, groups)
    if _recording(input, weight, gain, mean_scale, bias, residual):
        constants = (constant, geometry, activation, slope, projection, ops)
        return _ConvCenter.apply(input, weight, gain, mean_scale, bias, residual, constants)[0]
    return ops.conv_center(
        input, weight, gain, mean_scale, constant, bias, residual, *geometry, activation, slope, False
    )[0]


def _split(mean_scale: Tensor | float | None) -> tuple[Tensor | None, float]:
    """The tensor, or None and the constant that stands for it."""
    if mean_scale is None:
        return None, 1.0
    if isinstance(mean_scale, Tensor):
        return mean_scale, 1.0
    return None, float(mean_scale)


def _distinct(residual: Tensor | None, input: Tensor) -> Tensor | None:
    """torch.compile takes no autograd.Function that is given one tensor twice, as in the shortest residual block."""
    return input.view_as(input) if residual is input else residual


def _recording(*tensors: Tensor | None) -> bool:
    """Whether the op goes through its Function: for backward, or to refuse forward-mode derivatives."""
    if forward_ad._current_level >= 0:
        return True
    # An exported program holds the op without its Function, so what backward needs would be of no use there.
    if not torch.is_grad_enabled() or backends.is_exporting():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Center(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, gain, mean_scale, bias, residual, constant, activation, slope, ops):
        output, map_mean, saved = ops.center(
            input, gain, mean_scale, constant, bias, residual, activation, slope, True
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, gain, mean_scale, map_mean, saved)
        ctx.like = (output.shape, output.dtype, _ops.memory_format(output))
        ctx.constants = (constant, activation, slope, ops)
        return output, map_mean, saved

    @staticmethod
    def backward(ctx, grad_output, grad_mean, grad_saved):
        input, gain, mean_scale, map_mean, saved = ctx.saved_tensors
        constant, activation, slope, ops = ctx.constants
        needs = ctx.needs_input_grad[:5]
        if _differentiable(grad_mean, grad_saved):
            grads = center_derivatives(
                _dense(grad_output, saved, *ctx.like), grad_mean, grad_saved, input, gain, mean_scale, constant,
                map_mean, saved, activation, slope, needs,
            )  # fmt: skip
        elif grad_output is None:
            grads = (None,) * 5
        else:
            mask = [*needs[:4], needs[4] and activation != "identity"]
            grads = ops.center_backward(
                _dense(grad_output, saved, *ctx.like), input, gain, mean_scale, constant, map_mean, saved, activation,
                slope, mask,
            )  # fmt: skip
            if needs[4] and not mask[4]:
                grads = (*grads[:4], grad_output)
        return *grads, None, None, None, None


class _ConvCenter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, gain, mean_scale, bias, residual, constants):
        constant, geometry, activation, slope, _, ops = constants
        output, map_mean, saved = ops.conv_center(
            input, weight, gain, mean_scale, constant, bias, residual, *geometry, activation, slope, True
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, gain, mean_scale, map_mean, saved)
        ctx.like = (output.shape, output.dtype, _ops.memory_format(output))
        ctx.constants = constants
        return output, map_mean, saved

    @staticmethod
    def backward(ctx, grad_output, grad_mean, grad_saved):
        input, weight, gain, mean_scale, map_mean, saved = ctx.saved_tensors
        constant, geometry, activation, slope, projection, ops = ctx.constants
        needs = ctx.needs_input_grad[:6]
        if _differentiable(grad_mean, grad_saved):
            grads = conv_center_derivatives(
                _dense(grad_output, saved, *ctx.like), grad_mean, grad_saved, input, weight, gain, mean_scale, constant,
                map_mean, saved, *geometry, activation, slope, projection, needs,
            )  # fmt: skip
        elif grad_output is None:
            grads = (None,) * 6
        else:
            mask = [*needs[:5], needs[5] and activation != "identity"]
            grads = ops.conv_center_backward(
                grad_output, input, weight, gain, mean_scale, constant, map_mean, saved, *geometry, activation, slope,
                projection, mask,
            )  # fmt: skip
            if needs[5] and not mask[5]:
                grads = (*grads[:5], grad_output)
        return *grads, None


def _differentiable(*gradients_of_intermediates: Tensor | None) -> bool:
    """Whether backward must itself be differentiable, or is part of a second derivative.

    Never while compiling: torch.compile has no second derivative, and it traces backward with a gradient for every
    output, so that those of the intermediates, which are zero then, say nothing.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or any(g is not None for g in gradients_of_intermediates)


def _dense(grad_output: Tensor | None, like: Tensor, shape, dtype, format) -> Tensor:
    """The gradient of the output in its memory format, which is how bits are laid out; zeros if there is none."""
    if grad_output is None:
        grad_output = torch.zeros(shape, dtype=dtype, device=like.device)
    return grad_output.contiguous(memory_format=format)


def center_derivatives(
    grad_output, grad_mean, grad_saved, input, gain, mean_scale, constant, map_mean, saved, activation, slope, mask
):
    """What center_backward returns, differentiably, with gradients of all that forward returns.

    Vectors' gradients are (C,) in the accumulation type; autograd sums and casts them to what the vectors are.
    """
    e = _through_activation(grad_output, grad_saved, saved, activation, slope)
    centred, sums = _center_error(e, mean_scale, constant)
    grad_input = centred if gain is None else centred * per_map(gain, e.dim())
    if grad_mean is not None and grad_mean.numel():
        grad_input = grad_input + per_map(grad_mean, e.dim()) / e.shape[2:].numel()
    grad_gain = grad_mean_scale = None
    if mask[1]:
        grad_gain = (input * centred).sum((0, *spatial(e)))
    if mask[2]:
        scaled = map_mean if gain is None else map_mean * gain
        grad_mean_scale = -(scaled * sums).sum(0)
    return grad_input.to(e.dtype), grad_gain, grad_mean_scale, sums.sum(0) if mask[3] else None, e if mask[4] else None


def conv_center_derivatives(
    grad_output, grad_mean, grad_saved, input, weight, gain, mean_scale, constant, map_mean, saved, stride, padding,
    dilation, groups, activation, slope, projection, mask,
):  # fmt: skip
    """What conv_center_backward returns, as ``center_derivatives`` does."""
    if projection:
        weight = ProjectedInBackward.apply(weight, projection)
    e = _through_activation(grad_output, grad_saved, saved, activation, slope)
    centred, sums = _center_error(e, mean_scale, constant)
    if grad_mean is not None and grad_mean.numel():
        centred = centred + per_map(grad_mean, e.dim()) / e.shape[2:].numel()
    per_filter = None if gain is None else gain.expand(weight.shape[0]).view(-1, *(1,) * (weight.dim() - 1))
    scaled_weight = (weight if gain is None else weight * per_filter).to(e.dtype)
    grad_input, grad_scaled, _ = torch.ops.aten.convolution_backward(
        centred.to(e.dtype), input, scaled_weight, None, stride, padding, dilation, False,
        [0] * len(stride), groups, [mask[0], mask[1] or mask[2], False],
    )  # fmt: skip
    grad_weight = grad_gain = grad_mean_scale = None
    if mask[1]:
        scaled = grad_scaled if gain is None else grad_scaled * per_filter
        grad_weight = project(scaled, projection).to(weight.dtype)
    if mask[2]:
        grad_gain = (weight * grad_scaled).flatten(1).sum(1)
    if mask[3]:
        grad_mean_scale = -(map_mean * sums).sum(0)
    grad_bias, grad_residual = sums.sum(0) if mask[4] else None, e if mask[5] else None
    return grad_input, grad_weight, grad_gain, grad_mean_scale, grad_bias, grad_residual


def _through_activation(
    grad_output: Tensor, grad_saved: Tensor | None, saved: Tensor, activation: str, slope: float
) -> Tensor:
    """The gradient in front of the activation, differentiably, from the dense one behind it."""
    if activation in activations.SMOOTH:
        e = grad_output * activations.derivative(saved, activation)
        return e if grad_saved is None else e + grad_saved
    if activation == "identity":
        return grad_output
    innermost = _ops.channels_innermost(grad_output.shape, _ops.memory_format(grad_output))
    kept = _ops.unpack_bits(saved, grad_output.shape, innermost)
    return torch.where(kept, grad_output, grad_output * slope if activation == "leaky_relu" else 0.0)


def _center_error(e: Tensor, mean_scale: Tensor | None, constant: float) -> tuple[Tensor, Tensor]:
    """``e - mean_scale * mean(e)`` and the sums of ``e`` over each map, (N, C)."""
    sums = e.sum(spatial(e), dtype=torch.float64 if e.dtype == torch.float64 else torch.float32)
    if mean_scale is None and constant == 0.0:
        return e, sums
    removed = sums / e.shape[2:].numel() * (constant if mean_scale is None else mean_scale)
    return e - per_map(removed, e.dim()), sums


# Without the extension None.
_nodes: _ops.Nodes | None = None
if _ops.unavailable is None:
    _nodes = _ops.Nodes(*(getattr(torch.ops.deepcontrol_autograd, name).default for name in _ops.Nodes._fields))
    # Registered for as long as it lives.
    _formulas = torch.library.Library("deepcontrol_autograd", "IMPL")
    for _formula in (center_derivatives, conv_center_derivatives):
        _formulas.impl(_formula.__name__, _formula, "CompositeImplicitAutograd")
