"""From tensors to what kernels are given: checks, dense layouts, vectors in the accumulation type.

The rules are those of ``csrc/tensors.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import activations
from .._ops import accumulation, bits_shape, channels_innermost, memory_format

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Maps(NamedTuple):
    """A dense (N, C, *spatial) tensor as rows: of channels, one a pixel (channels_last), or of pixels, one a map."""

    samples: int
    channels: int
    pixels: int
    channels_innermost: bool

    @property
    def elements(self) -> int:
        return self.samples * self.channels * self.pixels


def maps_of(tensor: Tensor, format: torch.memory_format) -> Maps:
    """How kernels see a tensor that is dense in ``format``."""
    shape = tensor.shape
    return Maps(shape[0], shape[1], shape[2:].numel(), channels_innermost(shape, format))


def dense(tensor: Tensor) -> Tensor:
    """Without gaps, in the memory format that is nearest: other strides are copied once."""
    return tensor.contiguous(memory_format=memory_format(tensor))


def check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"got dtype {tensor.dtype}, wanted float32, float64, bfloat16 or float16")


def check_device(like: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name}: is on {tensor.device}, wanted the device of the other tensors, {like.device}")


def vector_of(vector: Tensor | None, channels: int, like: Tensor, name: str) -> Tensor | None:
    """A (C,) vector in the accumulation type of ``like``, dense; None if absent."""
    if vector is None:
        return None
    check_device(like, **{name: vector})
    if vector.dim() != 1 or vector.shape[0] not in (channels, 1):
        raise ValueError(f"{name}: got shape {list(vector.shape)}, wanted ({channels},) or (1,)")
    return vector.to(accumulation(like)).expand(channels).contiguous()


class Vectors(NamedTuple):
    """(C,) each, or None: a gain of 1, a mean_scale of 1 if ``centred`` else 0, no bias."""

    gain: Tensor | None
    mean_scale: Tensor | None
    bias: Tensor | None
    centred: bool


def vectors_of(
    like: Tensor, channels: int, gain: Tensor | None, mean_scale: Tensor | None, constant: float, bias: Tensor | None
) -> Vectors:
    scale = vector_of(mean_scale, channels, like, "mean_scale")
    if scale is None and constant not in (0.0, 1.0):
        # Rare; a kernel that took numbers would take them in float32.
        scale = like.new_full((channels,), constant, dtype=accumulation(like))
    return Vectors(
        vector_of(gain, channels, like, "gain"),
        scale,
        vector_of(bias, channels, like, "bias"),
        scale is not None or constant != 0.0,
    )


def check_activation(activation: str) -> None:
    if activation not in activations.ACTIVATIONS:
        raise activations.unknown(activation)


def check_saved(saved: Tensor, grad: Tensor, format: torch.memory_format, activation: str) -> None:
    """Raises unless ``saved`` is what forward kept for an output like ``grad``, which is dense in ``format``."""
    check_activation(activation)
    check_device(grad, saved=saved)
    if activation in activations.PIECEWISE:
        shape = bits_shape(grad.shape, channels_innermost(grad.shape, format))
        if saved.dtype != torch.uint8 or saved.shape != shape or not saved.is_contiguous():
            raise ValueError(f"saved: got {saved.dtype} {list(saved.shape)}, wanted the bits that forward returned")
    elif activation in activations.SMOOTH:
        alike = saved.shape == grad.shape and saved.dtype == grad.dtype
        if not alike or not saved.is_contiguous(memory_format=format):
            raise ValueError(
                f"saved: got {saved.dtype} {list(saved.shape)}, wanted the pre-activation that forward returned"
            )


def residual_of(
    residual: Tensor | None, shape: Sequence[int], like: Tensor, format: torch.memory_format
) -> Tensor | None:
    """The residual dense in ``format``, checked against an output of ``shape`` and the dtype and device of ``like``."""
    if residual is None:
        return None
    check_device(like, residual=residual)
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual: got shape {list(residual.shape)}, wanted {list(shape)}")
    if residual.dtype != like.dtype:
        raise TypeError(f"residual: got dtype {residual.dtype}, wanted {like.dtype}")
    return residual.contiguous(memory_format=format)


def check_same(name: str, tensor: Tensor, like: Tensor) -> None:
    """Shape, dtype and device of ``tensor`` are those of ``like``."""
    check_device(like, **{name: tensor})
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name}: got {tensor.dtype} {list(tensor.shape)}, wanted {like.dtype} {list(like.shape)}")


def mark_changed(tensor: Tensor) -> None:
    """What autograd's own in-place ops do, so that it notices a change of what it has saved."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def check_geometry(
    input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    rank = input.dim() - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"input: got shape {list(input.shape)}, wanted 1 to 3 spatial dimensions")
    for name, values in {
        "kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation,
    }.items():  # fmt: skip
        least = 0 if name == "padding" else 1
        if len(values) != rank or min(values) < least:
            raise ValueError(f"{name}: got {list(values)}, wanted {rank} integers of at least {least}")


class Windows(NamedTuple):
    """Which pixels each tap of a kernel sees. Spatial sizes, outermost first, with leading dimensions of one."""

    size: tuple[int, int, int]
    output: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    @property
    def pixels(self) -> int:
        """Of the output."""
        return self.output[0] * self.output[1] * self.output[2]

    @property
    def is_pointwise(self) -> bool:
        """Whether each output pixel sees the input pixel of the same place and no other."""
        return self.taps == 1 and self.stride == (1, 1, 1) and self.padding == (0, 0, 0)


def windows_of(
    input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Windows:
    """Raises ``ValueError`` for a geometry that is none, or that leaves an empty output."""
    check_geometry(input, kernel_size, stride, padding, dilation)
    missing = 5 - input.dim()

    def three(values: Sequence[int], fill: int) -> tuple[int, int, int]:
        return (*(fill,) * missing, *values)

    size, kernel = three(input.shape[2:], 1), three(kernel_size, 1)
    strides, paddings, dilations = three(stride, 1), three(padding, 0), three(dilation, 1)
    output = tuple((size[d] + 2 * paddings[d] - dilations[d] * (kernel[d] - 1) - 1) // strides[d] + 1 for d in range(3))
    if min(output) <= 0:
        raise ValueError(f"input: got shape {list(input.shape)}, which leaves an empty output")
    return Windows(size, output, kernel, strides, paddings, dilations)


def conv_windows(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Windows:
    """The geometry of a convolution; raises where the weight (O, C / groups, *kernel) does not fit the input."""
    fits = weight.dim() == input.dim() >= 3 and groups >= 1
    if not fits or weight.shape[1] * groups != input.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"weight: got shape {list(weight.shape)} for input {list(input.shape)} and {groups} groups, wanted "
            "(O, C / groups, *kernel) for an input (N, C, *spatial), O and C multiples of groups"
        )
    if weight.dtype != input.dtype:
        raise TypeError(f"weight: got dtype {weight.dtype}, wanted {input.dtype} as input is")
    return windows_of(input, weight.shape[2:], stride, padding, dilation)


def check_grad_output(grad_output: Tensor, input: Tensor, weight: Tensor, windows: Windows) -> None:
    """Raises unless ``grad_output`` belongs to the output of a convolution."""
    wanted = [input.shape[0], weight.shape[0], *windows.output[5 - input.dim() :]]
    if list(grad_output.shape) != wanted:
        raise ValueError(f"grad_output: got shape {list(grad_output.shape)}, wanted the output's, {wanted}")
    if grad_output.dtype != input.dtype:
        raise TypeError(f"grad_output: got dtype {grad_output.dtype}, wanted {input.dtype}")
