"""One autograd.Function per op, around the dispatcher ops of ``csrc/ops.cpp`` in the namespace of a backend.

The map mean and what the activation keeps are outputs of the Functions, not only saved tensors: so autograd can send
gradients into them, and the second derivative follows from the formulas below without keeping bias or residual.
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
    residual = _distinct(residual, input)
    if _recording(input, gain, mean_scale, bias, residual):
        return _Center.apply(input, gain, mean_scale, bias, residual, constant, activation, slope, backend)[0]
    return backends.ops[backend].center(input, gain, mean_scale, constant, bias, residual, activation, slope, False)[0]


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
    residual = _distinct(residual, input)
    geometry = (stride, padding, dilation, groups)
    if _recording(input, weight, gain, mean_scale, bias, residual):
        constants = (constant, geometry, activation, slope, projection, backend)
        return _ConvCenter.apply(input, weight, gain, mean_scale, bias, residual, constants)[0]
    output, _, _ = backends.ops[backend].conv_center(
        input, weight, gain, mean_scale, constant, bias, residual, *geometry, activation, slope, False
    )
    return output


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
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _differentiable(*gradients_of_intermediates: Tensor | None) -> bool:
    """Whether backward must itself be differentiable, or is part of a second derivative.

    Never while compiling: torch.compile has no second derivative, and it traces backward with a gradient for every
    output, so that those of the intermediates, which are zero then, say nothing.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or any(g is not None for g in gradients_of_intermediates)


class _Center(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, gain, mean_scale, bias, residual, constant, activation, slope, backend):
        output, map_mean, saved = backends.ops[backend].center(
            input, gain, mean_scale, constant, bias, residual, activation, slope, True
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, gain, mean_scale, map_mean, saved)
        ctx.like = (output.shape, output.dtype)
        ctx.format = _ops.memory_format(output)
        ctx.vectors = [None if v is None else (v.shape[0], v.dtype) for v in (gain, mean_scale, bias)]
        ctx.constants = (constant, activation, slope, backend)
        return output, map_mean, saved

    @staticmethod
    def backward(ctx, grad_output, grad_mean, grad_saved):
        input, gain, mean_scale, map_mean, saved = ctx.saved_tensors
        constant, activation, slope, backend = ctx.constants
        needs = ctx.needs_input_grad
        if not _differentiable(grad_mean, grad_saved):
            if grad_output is None:
                return (None,) * 9
            passes_through = activation == "identity"
            mask = [needs[0], needs[1], needs[2], needs[3], needs[4] and not passes_through]
            grads = backends.ops[backend].center_backward(
                grad_output.contiguous(memory_format=ctx.format), input, gain, mean_scale, constant, map_mean, saved,
                activation, slope, mask,
            )  # fmt: skip
            vectors = _fold(grads[1:4], ctx.vectors)
            return grads[0], *vectors, grad_output if needs[4] and passes_through else grads[4], None, None, None, None

        e = _through_activation(grad_output, grad_saved, saved, *ctx.like, ctx.format, activation, slope)
        centred, sums = _center_error(e, mean_scale, constant)
        rank = len(ctx.like[0])
        grad_input = centred if gain is None else centred * per_map(gain, rank)
        if grad_mean is not None and grad_mean.numel():
            grad_input = grad_input + per_map(grad_mean, rank) / e.shape[2:].numel()
        grad_gain = grad_mean_scale = None
        if needs[1]:
            grad_gain = (input * centred).sum((0, *spatial(e)))
        if needs[2]:
            scaled = map_mean if gain is None else map_mean * gain
            grad_mean_scale = -(scaled * sums).sum(0)
        vectors = _fold((grad_gain, grad_mean_scale, sums.sum(0) if needs[3] else None), ctx.vectors)
        return grad_input.to(e.dtype), *vectors, e if needs[4] else None, None, None, None, None


class _ConvCenter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, gain, mean_scale, bias, residual, constants):
        constant, geometry, activation, slope, _, backend = constants
        output, map_mean, saved = backends.ops[backend].conv_center(
            input, weight, gain, mean_scale, constant, bias, residual, *geometry, activation, slope, True
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, gain, mean_scale, map_mean, saved)
        ctx.like = (output.shape, output.dtype)
        ctx.vectors = [None if v is None else (v.shape[0], v.dtype) for v in (gain, mean_scale, bias)]
        ctx.constants = constants
        return output, map_mean, saved

    @staticmethod
    def backward(ctx, grad_output, grad_mean, grad_saved):
        input, weight, gain, mean_scale, map_mean, saved = ctx.saved_tensors
        constant, geometry, activation, slope, projection, backend = ctx.constants
        needs = ctx.needs_input_grad
        if not _differentiable(grad_mean, grad_saved):
            if grad_output is None:
                return (None,) * 7
            passes_through = activation == "identity"
            mask = [*needs[:5], needs[5] and not passes_through]
            grads = backends.ops[backend].conv_center_backward(
                grad_output, input, weight, gain, mean_scale, constant, map_mean, saved, *geometry, activation, slope,
                projection, mask,
            )  # fmt: skip
            vectors = _fold(grads[2:5], ctx.vectors)
            grad_residual = grad_output if needs[5] and passes_through else grads[5]
            return *grads[:2], *vectors, grad_residual, None

        stride, padding, dilation, groups = geometry
        if projection:
            weight = ProjectedInBackward.apply(weight, projection)
        format = _ops.conv_memory_format(input, weight)
        e = _through_activation(grad_output, grad_saved, saved, *ctx.like, format, activation, slope)
        centred, sums = _center_error(e, mean_scale, constant)
        if grad_mean is not None and grad_mean.numel():
            centred = centred + per_map(grad_mean, e.dim()) / e.shape[2:].numel()
        per_filter = None if gain is None else gain.expand(weight.shape[0]).view(-1, *(1,) * (weight.dim() - 1))
        scaled_weight = (weight if gain is None else weight * per_filter).to(e.dtype)
        grad_input, grad_scaled, _ = torch.ops.aten.convolution_backward(
            centred.to(e.dtype), input, scaled_weight, None, stride, padding, dilation, False,
            [0] * len(stride), groups, [needs[0], needs[1] or needs[2], False],
        )  # fmt: skip
        grad_weight = grad_gain = grad_mean_scale = None
        if needs[1]:
            scaled = grad_scaled if gain is None else grad_scaled * per_filter
            grad_weight = project(scaled, projection).to(weight.dtype)
        if needs[2]:
            grad_gain = (weight * grad_scaled).flatten(1).sum(1)
        if needs[3]:
            grad_mean_scale = -(map_mean * sums).sum(0)
        vectors = _fold((grad_gain, grad_mean_scale, sums.sum(0) if needs[4] else None), ctx.vectors)
        return grad_input, grad_weight, *vectors, e if needs[5] else None, None


def _fold(gradients, vectors):
    """Gradients of the vectors from (C,) to the size and dtype that each was given with."""
    folded = []
    for gradient, vector in zip(gradients, vectors):
        if gradient is not None:
            size, dtype = vector
            if gradient.shape[0] != size:
                gradient = gradient.sum(0, keepdim=True)
            if gradient.dtype != dtype:
                gradient = gradient.to(dtype)
        folded.append(gradient)
    return folded


def _through_activation(
    grad_output, grad_saved, saved, shape, dtype, memory_format, activation: str, slope: float
) -> Tensor:
    """The gradient in front of the activation, differentiably; shape, dtype and memory format are the output's."""
    if activation in activations.SMOOTH:
        e = 0 if grad_output is None else grad_output * activations.derivative(saved, activation)
        return e if grad_saved is None else e + grad_saved
    if grad_output is None:
        grad_output = torch.zeros(shape, dtype=dtype, device=saved.device)
    if activation == "identity":
        return grad_output
    kept = _ops.unpack_bits(saved, shape, _ops.channels_innermost(shape, memory_format))
    return torch.where(kept, grad_output, grad_output * slope if activation == "leaky_relu" else 0.0)


def _center_error(e: Tensor, mean_scale: Tensor | None, constant: float) -> tuple[Tensor, Tensor]:
    """``e - mean_scale * mean(e)`` and the sums of ``e`` over each map, (N, C)."""
    sums = e.sum(spatial(e), dtype=torch.float64 if e.dtype == torch.float64 else torch.float32)
    if mean_scale is None and constant == 0.0:
        return e, sums
    removed = sums / e.shape[2:].numel() * (constant if mean_scale is None else mean_scale)
    return e - per_map(removed, e.dim()), sums
