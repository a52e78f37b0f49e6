"""conv_center and its backward: which of the kernels run for a layer, and what is the library's (cuDNN's).

``reference.deep_control_conv`` in one of four ways:

- fused: the implicit matrix product of ``conv_forward.py``, with means that are known before it runs;
- held: the same for maps that fit a tile, which takes the means of what it has;
- direct: for small groups, ``conv_direct.py``, which holds a map and centres it;
- two passes: the library's convolution, then ``center`` in place on its output.

Backward is center's on the gradient, the library's input gradient for weights times gain, and the weight gradient of
``conv_weight_grad.py`` or, where that cannot, the library's; gain, dgain and projection follow in one pass over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import activations
from .._ops import center_results, conv_memory_format, memory_format
from .center import Wanted, center_error, centre_maps, reduce_samples
from .conv_direct import convolve_groups, why_not_direct
from .conv_forward import MAX_ROWS, MAX_TAPS, convolve, has_tile
from .conv_weight_grad import weight_grad_partials
from .costs import ceilings_of, seconds
from .geometry import Layer
from .kernel_gradients import finish, finish_in_place, scale_filters
from .launch import INTERPRETED, device_at
from .tensors import (
    check_activation,
    check_device,
    check_dtype,
    check_grad_output,
    conv_windows,
    dense,
    residual_of,
    vectors_of,
)

ALGORITHMS = ("fused", "held", "direct", "two passes")
_preferred: str | None = None

# Of a group; with fewer a tile of the matrix product would be mostly padding.
_LEAST_GROUP = 16


@contextmanager
def prefer(algorithm: str) -> Iterator[None]:
    """One of ``ALGORITHMS`` for every layer inside that it takes, also where another one is predicted to be faster."""
    global _preferred
    before, _preferred = _preferred, algorithm
    try:
        yield
    finally:
        _preferred = before


class _Situation(NamedTuple):
    """What the choice for a layer depends on besides its numbers."""

    dtype: torch.dtype
    channels_last: bool
    """Whether kernels see the output as rows of channels."""
    tf32: bool
    gpu: int | None
    """Its index; None where there is none."""


def layer_of(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Layer:
    """Raises where the weight does not fit the input."""
    windows = conv_windows(input, weight, stride, padding, dilation, groups)
    return Layer(input.shape[0], input.shape[1], weight.shape[0], groups, windows, input.element_size())


def _situation(input: Tensor, weight: Tensor, layer: Layer) -> _Situation:
    format = conv_memory_format(input, weight)
    innermost = layer.windows.pixels == 1 or layer.filters > 1
    tf32 = input.dtype != torch.float32 or INTERPRETED or torch.backends.cudnn.conv.fp32_precision == "tf32"
    gpu = input.device.index if input.device.type == "cuda" else None
    return _Situation(input.dtype, innermost and format is not torch.contiguous_format, tf32, gpu)


@lru_cache(maxsize=4096)
def _why_no_product(layer: Layer, situation: _Situation) -> str | None:
    """Why the layer is none for the tensor cores' matrix products, or None."""
    if not situation.channels_last:
        return "the maps are not in channels_last"
    if situation.dtype == torch.float64:
        return "tensor cores take no float64"
    if not situation.tf32:
        return "float32 without TF32 (torch.backends.cudnn.allow_tf32) is none for tensor cores"
    smallest = min(layer.group_filters, layer.group_channels)
    if layer.groups > 1 and (smallest < _LEAST_GROUP or layer.group_filters % 8):
        return f"groups have fewer than {_LEAST_GROUP} channels or filters, or filters that are no multiple of 8"
    if layer.input_rows * layer.channels * layer.filters == 0:
        return "there is nothing to compute"
    if layer.windows.taps > MAX_TAPS:
        return f"the kernel has more than {MAX_TAPS} taps"
    if max(layer.rows, layer.input_rows) > MAX_ROWS:
        return f"input or output have more than {MAX_ROWS} pixels"
    if not has_tile(layer, False, device_at(situation.gpu)):
        return "the GPU has too little shared memory for a tile"
    return None


@lru_cache(maxsize=4096)
def _choose(layer: Layer, situation: _Situation, centred: bool, preferred: str | None) -> tuple[str, str]:
    no_product = _why_no_product(layer, situation)
    obstacles = {"fused": no_product, "held": no_product, "direct": why_not_direct(layer), "two passes": None}
    if no_product is None and not has_tile(layer, True, device_at(situation.gpu)):
        obstacles["held"] = "no tile holds a map"
    if not situation.channels_last:
        obstacles["direct"] = no_product
    possible = [name for name in ALGORITHMS if obstacles[name] is None]
    if preferred in possible:
        return preferred, "preferred"
    if not centred and "fused" in possible:
        return "fused", "nothing is centred"
    if layer.group_channels > 1 and "direct" in possible:
        # It gathers channels one by one; its time is not predicted.
        possible.remove("direct")
    if possible == ["two passes"]:
        return "two passes", no_product
    predicted = seconds(layer, ceilings_of(device_at(situation.gpu)))
    return min(possible, key=predicted.__getitem__), "predicted fastest from bytes and operations, not timed"


def algorithm(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[str, str]:
    """The one of ``ALGORITHMS`` that the forward pass of a centred layer takes, and why."""
    layer = layer_of(input, weight, stride, padding, dilation, groups)
    return _choose(layer, _situation(input, weight, layer), True, _preferred)


_WORDS = {
    "fused": "one fused pass",
    "held": "one fused pass that holds each map",
    "direct": "one direct pass",
    "two passes": "two passes, cuDNN's convolution and then center",
}


def describe(input: Tensor, weight: Tensor, *geometry: Sequence[int] | int) -> str:
    """``algorithm`` in words."""
    chosen, why = algorithm(input, weight, *geometry)
    return f"{_WORDS[chosen]} ({why})"


def conv_center(
    input, weight, gain, mean_scale, constant, bias, residual, stride, padding, dilation, groups, activation, slope,
    save,
):  # fmt: skip
    check_dtype(input)
    check_activation(activation)
    check_device(input, weight=weight)
    layer = layer_of(input, weight, stride, padding, dilation, groups)
    format = conv_memory_format(input, weight)
    vectors = vectors_of(input, weight.shape[0], gain, mean_scale, constant, bias)
    chosen, _ = _choose(layer, _situation(input, weight, layer), vectors.centred, _preferred)
    if chosen == "two passes":
        zeros = [0] * len(stride)
        z = torch.ops.aten.convolution(dense(input), weight, None, stride, padding, dilation, False, zeros, groups)
        z = z.contiguous(memory_format=format)
        map_mean, saved, _ = centre_maps(z, z, format, vectors, residual, activation, slope, save, mean_of_scaled=True)
        return z, map_mean, saved
    x, w = (tensor.contiguous(memory_format=format) for tensor in (input, weight))
    shape = (x.shape[0], w.shape[0], *layer.windows.output[5 - x.dim() :])
    residual = residual_of(residual, shape, x, format)
    output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format)
    _, map_mean, saved = center_results(output, format, vectors.centred, activation, save)
    bits = saved if save and activation in activations.PIECEWISE else None
    pre_activation = saved if save and activation in activations.SMOOTH else None
    arguments = (x, w, vectors, residual, layer, activation, slope, output, map_mean, bits, pre_activation)
    if chosen == "direct":
        convolve_groups(*arguments)
    else:
        convolve(*arguments, held=chosen == "held")
    return output, map_mean, saved


def conv_center_backward(
    grad_output, input, weight, gain, mean_scale, constant, map_mean, saved, stride, padding, dilation, groups,
    activation, slope, projection, mask,
):  # fmt: skip
    wants_input, wants_weight, wants_gain, wants_mean_scale, wants_bias, wants_residual = mask
    check_dtype(input)
    check_device(grad_output, input=input, weight=weight)
    layer = layer_of(input, weight, stride, padding, dilation, groups)
    check_grad_output(grad_output, input, weight, layer.windows)
    format = conv_memory_format(input, weight)
    vectors = vectors_of(input, weight.shape[0], gain, mean_scale, constant, None)
    through_weight = wants_weight or wants_gain
    wanted = Wanted(wants_input or through_weight, wants_residual, wants_mean_scale or wants_bias, False)
    error = center_error(grad_output, None, None, vectors, saved, activation, slope, format, wanted)
    own_product = through_weight and _preferred != "two passes"
    product = own_product and _why_no_product(layer, _situation(input, weight, layer)) is None

    grad_input = grad_weight = grad_gain = None
    if wants_input or (through_weight and not product):
        scaled = scale_filters(weight, vectors.gain) if wants_input and vectors.gain is not None else weight
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            error.grad_input, dense(input), scaled, None, stride, padding, dilation, False, [0] * len(stride), groups,
            [wants_input, through_weight and not product, False],
        )  # fmt: skip
    if wants_input:
        grad_input = grad_input.contiguous(memory_format=memory_format(input))
    factor, taken_off = (vectors.gain, projection) if wants_weight else (None, 0.0)
    if product:
        x = input.contiguous(memory_format=format)
        partials = weight_grad_partials(x, error.grad_input, layer)
        grad_weight, grad_gain = finish(partials, dense(weight), factor, taken_off, wants_gain)
    elif through_weight:
        grad_weight = grad_weight.contiguous(memory_format=memory_format(weight))
        grad_gain = finish_in_place(grad_weight, weight, factor, None, taken_off, wants_gain)
    grads = reduce_samples(error, map_mean, None, vectors, False, wants_mean_scale, wants_bias)
    if not wants_weight:
        grad_weight = None
    return grad_input, grad_weight, grad_gain, grads.mean_scale, grads.bias, error.grad_residual
