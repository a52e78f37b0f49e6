"""The ops as functions: argument checks, autocast, choice of backend. Conventions of ``torch.nn.functional``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import activations, autograd, backends, reference

__all__ = ["deep_control", "deep_control_conv1d", "deep_control_conv2d", "deep_control_conv3d", "map_noise"]


def deep_control(
    input: Tensor,
    gain: Tensor | None = None,
    mean_scale: Tensor | float | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """Automatic gain control of every map: ``act(gain * (input - mean_scale * mean(input)) + bias + residual)``.

    The mean is over the spatial dimensions, per sample and per channel; nothing depends on the batch or on
    ``train()`` / ``eval()``. Source: arXiv 1706.03907, abstract.

    Args:
        input: (N, C, *spatial), one to three spatial dimensions; float32, float64, bfloat16 or float16.
        gain: (C,) or (1,), or None for 1.
        mean_scale: (C,) or (1,), or a float, or None for 1. The float 0.0 skips the mean.
        bias: (C,) or (1,), or None for 0.
        residual: same shape and dtype as ``input``, added before the activation.
        activation: identity, relu, leaky_relu, relu6, silu, gelu or hardswish.
        negative_slope: slope of leaky_relu below zero.
        backend: a name of ``backends.available()``, or None for automatic choice.

    Vectors have the dtype of ``input``, or float32 beside a 16-bit ``input``.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was given and what is wanted.
        RuntimeError: the backend asked for cannot run.
    """
    _check_tensors(input=input, residual=residual)
    if residual is not None and _autocasting(input):
        residual = residual.to(input.dtype)
    if torch.jit.is_tracing():
        return _traced(reference.deep_control, input, backend)(
            input, gain, mean_scale, bias, residual=residual, activation=activation, negative_slope=negative_slope
        )
    _check_input(input, None)
    _check_vectors(input, input.shape[1], gain, mean_scale, bias)
    _check_residual(input, residual, input.shape)
    _check_activation(activation)
    backend = backends.choose(input, backend, "center")
    if backend == "reference":
        return reference.deep_control(
            input, gain, mean_scale, bias, residual=residual, activation=activation, negative_slope=negative_slope
        )
    try:
        return autograd.center(input, gain, mean_scale, bias, residual, activation, negative_slope, backend)
    except RuntimeError:
        _refuse_transforms(backend, 0.0)
        raise


def deep_control_conv(
    rank: int,
    input: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    mean_scale: Tensor | float | None,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    projection: float,
    backend: str | None,
) -> Tensor:
    """``deep_control_conv1d``, ``2d`` or ``3d`` by rank: modules call it without one more frame."""
    _check_tensors(input=input, weight=weight, residual=residual)
    weight_dtype = input.dtype
    if _autocasting(input):
        input, residual = _autocast(input), _autocast(residual)
        weight_dtype = input.dtype
        if weight.dtype == torch.float32 and weight_dtype.itemsize == 2 and not torch.jit.is_tracing():
            weight_dtype = torch.float32  # the backend is not chosen yet, and some round it themselves
        else:
            weight = _autocast(weight)
    if torch.jit.is_tracing():
        return _traced(reference.deep_control_conv, input, backend)(
            input, weight, gain, mean_scale, bias, stride, padding, dilation, groups,
            residual=residual, activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
    _check_input(input, rank)
    stride = _tuple("stride", stride, rank, 1)
    dilation = _tuple("dilation", dilation, rank, 1)
    _check_weight(input, weight, rank, groups, weight_dtype)
    _check_vectors(input, weight.shape[0], gain, mean_scale, bias)
    _check_activation(activation)
    check_fraction("projection", projection)
    input, padding = _resolve_padding(input, weight, padding, stride, dilation, rank)
    out_shape = _output_shape(input, weight, stride, padding, dilation)
    _check_residual(input, residual, out_shape)
    backend = backends.choose(input, backend, "conv_center", weight, stride)
    if backends.tune is not False and backend == "cpu" and not torch.compiler.is_compiling():
        backends.time_layer(input, weight, (stride, padding, dilation, groups))
    if weight_dtype != input.dtype and backend not in backends.ROUND_WEIGHTS:
        weight = weight.to(input.dtype)
    try:
        if backend == "reference":
            return reference.deep_control_conv(
                input, weight, gain, mean_scale, bias, stride, padding, dilation, groups,
                residual=residual, activation=activation, negative_slope=negative_slope,
                projection=0.0 if backends.is_exporting() else projection,
            )  # fmt: skip
        return autograd.conv_center(
            input, weight, gain, mean_scale, bias, residual, stride, padding, dilation, groups, activation,
            negative_slope, projection, backend,
        )  # fmt: skip
    except RuntimeError:
        _refuse_transforms(backend, projection)
        raise


def deep_control_conv1d(
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
    backend: str | None = None,
) -> Tensor:
    """``deep_control(conv1d(input, weight), ...)`` on (N, C, L); see ``deep_control_conv2d``."""
    return deep_control_conv(
        1, input, weight, gain, mean_scale, bias, stride, padding, dilation, groups, residual, activation,
        negative_slope, projection, backend,
    )  # fmt: skip


def deep_control_conv2d(
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
    backend: str | None = None,
) -> Tensor:
    """Convolution with automatic gain control in every filter, residual and activation as one op.

    ``act(gain * (z - mean_scale * mean_hw(z)) + bias + residual)`` with ``z = conv2d(input, weight)``; the mean is
    per sample and per map. Source: arXiv 1706.03907, abstract.

    Args:
        input: (N, C, H, W); float32, float64, bfloat16 or float16; contiguous and channels_last are both native.
        weight: (O, C / groups, kH, kW), dtype of ``input``.
        gain: (O,) or (1,), or None for 1.
        mean_scale: (O,) or (1,), or a float, or None for 1. The float 0.0 skips the mean.
        bias: (O,) or (1,), or None for 0.
        stride, dilation, groups: as in ``torch.nn.functional.conv2d``.
        padding: an int, one int a dimension, "valid" or "same" (stride 1 only).
        residual: (N, O, P, Q), dtype of ``input``, added before the activation.
        activation: identity, relu, leaky_relu, relu6, silu, gelu or hardswish.
        negative_slope: slope of leaky_relu below zero.
        projection: weight from 0 to 1 of the mean over a kernel's taps that backward subtracts from the gradient of
            ``weight`` (Mean Shift Rejection, arXiv 1911.13173, abstract); kernels of one tap are left alone.
        backend: a name of ``backends.available()``, or None for automatic choice.

    Vectors have the dtype of ``input``, or float32 beside a 16-bit ``input``. Under autocast ``input``, ``weight``
    and ``residual`` are cast like a convolution's operands and the vectors stay as they are; backend "cpu" rounds a
    float32 ``weight`` as it reads it, so that no copy is kept for backward and its gradient is not rounded.

    Returns:
        (N, O, P, Q), dtype of ``input``; channels_last if ``input`` or ``weight`` is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was given and what is wanted.
        RuntimeError: the backend asked for cannot run.
    """
    return deep_control_conv(
        2, input, weight, gain, mean_scale, bias, stride, padding, dilation, groups, residual, activation,
        negative_slope, projection, backend,
    )  # fmt: skip


def deep_control_conv3d(
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
    backend: str | None = None,
) -> Tensor:
    """``deep_control(conv3d(input, weight), ...)`` on (N, C, D, H, W); see ``deep_control_conv2d``."""
    return deep_control_conv(
        3, input, weight, gain, mean_scale, bias, stride, padding, dilation, groups, residual, activation,
        negative_slope, projection, backend,
    )  # fmt: skip


def map_noise(
    input: Tensor,
    scale: float = 0.1,
    shift: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Scale and shift every map at random: ``(input - e) * d``, one ``e`` and one ``d`` for each sample and channel.

    ``d ~ U(1 - scale, 1 + scale)`` and ``e ~ U(-shift, shift)`` are constant over a map and get no gradient. It stands
    in for the noise that a minibatch's statistics bring with them. Sources: arXiv 1911.13173, abstract;
    ``PerMapRandomScalingLayer.py`` of the authors' code (taylorkangbeck/mean-shift-rejection), where 0.1 and 0 are
    used, at the input of each residual block ahead of the split.

    Args:
        input: (N, C, *spatial) or (N, C), any floating dtype.
        scale: half the width of the factor's range, from 0 to 1.
        shift: half the width of the offset's range, in the units of ``input``, at least 0.
        training: False returns ``input`` itself.
        generator: source of the draw, on the device of ``input``; None is torch's default.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``; draws are rounded to that dtype. One generator
        state gives the same draws in every memory format.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    _check_tensors(input=input)
    if not input.is_floating_point():
        raise TypeError(f"input: got dtype {input.dtype}, wanted a floating dtype")
    if input.dim() < 2:
        raise ValueError(f"input: got shape {tuple(input.shape)}, wanted (N, C, *spatial)")
    check_noise(scale, shift)
    if not training or scale == shift == 0:
        return input
    size = (*input.shape[:2], *(1,) * (input.dim() - 2))

    def draw(low: float, high: float) -> Tensor:
        # At least float32: uniform draws in 16 bits have ties and can reach the open end.
        values = torch.empty(size, dtype=torch.promote_types(input.dtype, torch.float32), device=input.device)
        return values.uniform_(low, high, generator=generator)

    factor = draw(1 - scale, 1 + scale)
    if shift == 0:
        return input * factor.to(input.dtype)
    offset = draw(-shift, shift) * factor
    return torch.addcmul(-offset.to(input.dtype), input, factor.to(input.dtype))


def _traced(formula: Callable[..., Tensor], input: Tensor, backend: str | None) -> Callable[..., Tensor]:
    """``formula``, for torch.jit.trace; or a refusal, if a compiled backend is asked for.

    It stands ahead of the checks: while tracing, sizes are tensors, and each comparison of them makes a constant of one
    and warns.
    """
    backends.choose(input, backend)
    return formula


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of gain, mean_scale and bias, by that of the input.
_VECTOR_DTYPES = {dtype: (dtype,) if dtype.itemsize > 2 else (torch.float32, dtype) for dtype in _FLOATING}


def _autocasting(input: Tensor) -> bool:
    device = input.device.type
    return (device == "cpu" or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def _autocast(tensor: Tensor | None) -> Tensor | None:
    """What autocast does to an operand of a convolution: floating tensors but float64 go to the autocast dtype."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def check_fraction(name: str, value: float) -> None:
    """Raise unless ``value`` is a number from 0 to 1."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, wanted a number from 0 to 1")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value!r}, wanted a number from 0 to 1")


def check_noise(scale: float, shift: float) -> None:
    """Raise unless the two can be ``map_noise``'s."""
    check_fraction("scale", scale)
    if not isinstance(shift, (int, float)):
        raise TypeError(f"shift: got {shift!r}, wanted a number of at least 0")
    if not 0.0 <= shift < math.inf:
        raise ValueError(f"shift: got {shift!r}, wanted a number of at least 0")


def _refuse_transforms(backend: str, projection: float) -> None:
    """Raise with what works instead, if it is torch.func or a forward-mode derivative that a call failed in."""
    functorch = torch._C._functorch
    kinds = {interpreter.key() for interpreter in functorch.get_interpreter_stack() or ()}
    derivatives = kinds & {functorch.TransformType.Grad, functorch.TransformType.Jvp}
    if backend != "reference" and (derivatives or forward_ad._current_level >= 0):
        raise RuntimeError(
            f"backend {backend!r}: its ops take no forward-mode derivatives and none of torch.func's transforms but "
            f"vmap; backend='reference' takes them{', with projection=0.0' if projection else ''}"
        )
    if backend == "reference" and kinds and projection:
        raise RuntimeError(
            f"projection: got {projection!r}, wanted 0.0 in torch.func's transforms, which take no projected gradient"
        )


def _check_tensors(**arguments: Tensor | None) -> None:
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor) and not (argument is None and name == "residual"):
            raise TypeError(f"{name}: got {type(argument).__name__}, wanted a tensor")


def _check_input(input: Tensor, rank: int | None) -> None:
    if input.dtype not in _FLOATING:
        raise TypeError(f"input: got dtype {input.dtype}, wanted float32, float64, bfloat16 or float16")
    spatial = input.dim() - 2
    if rank is None and not 1 <= spatial <= 3:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, wanted (N, C, *spatial) with 1 to 3 spatial dimensions"
        )
    if rank is None and 0 in input.shape[2:]:
        raise ValueError(f"input: got an empty map, shape {tuple(input.shape)}, wanted at least one pixel")
    if rank is not None and spatial != rank:
        axes = ("L", "H, W", "D, H, W")[rank - 1]
        raise ValueError(f"input: got shape {tuple(input.shape)}, wanted (N, C, {axes})")


def _check_companion(name: str, tensor: Tensor, input: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted {wanted} beside an input of {input.dtype}")
    if tensor.device != input.device:
        raise ValueError(f"{name}: is on {tensor.device}, wanted the device of input, {input.device}")


def _check_vectors(
    input: Tensor, channels: int, gain: Tensor | None, mean_scale: Tensor | float | None, bias: Tensor | None
) -> None:
    dtypes, device = _VECTOR_DTYPES[input.dtype], input.device
    for name, vector in (("gain", gain), ("mean_scale", mean_scale), ("bias", bias)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            if name == "mean_scale" and isinstance(vector, (int, float)):
                continue
            kinds = "a tensor, a float or None" if name == "mean_scale" else "a tensor or None"
            raise TypeError(f"{name}: got {type(vector).__name__}, wanted {kinds}")
        shape = vector.shape
        if len(shape) != 1 or (shape[0] != channels and shape[0] != 1):
            raise ValueError(f"{name}: got shape {tuple(shape)}, wanted ({channels},) or (1,)")
        if vector.dtype not in dtypes or vector.device != device:
            _check_companion(name, vector, input, dtypes)


def _check_weight(input: Tensor, weight: Tensor, rank: int, groups: int, dtype: torch.dtype) -> None:
    if weight.dim() != rank + 2:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, wanted {rank + 2} dimensions (O, C / groups, *kernel)"
        )
    _check_companion("weight", weight, input, (dtype,))
    if 0 in weight.shape:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted at least one filter, channel and tap")
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: got {groups!r}, wanted a positive divisor of the {weight.shape[0]} filters")
    if weight.shape[1] * groups != input.shape[1]:
        raise ValueError(
            f"weight: got {weight.shape[1]} input channels a group and {groups} groups, so "
            f"{weight.shape[1] * groups}, wanted {input.shape[1]}, the channels of input"
        )


def _check_residual(input: Tensor, residual: Tensor | None, shape: Sequence[int]) -> None:
    if residual is None:
        return
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, wanted the output's, {tuple(shape)}")
    _check_companion("residual", residual, input, (input.dtype,))


def _check_activation(activation: str) -> None:
    if activation not in activations.ACTIVATIONS:
        raise activations.unknown(activation)


def _tuple(name: str, value: int | Sequence[int], rank: int, least: int) -> tuple[int, ...]:
    # Modules bring tuples of plain integers; this runs for every call of every layer.
    if type(value) is tuple and len(value) == rank:
        for v in value:
            if type(v) is not int or v < least:
                break
        else:
            return value
    if isinstance(value, (int, torch.SymInt)):
        values = (value,) * rank
    elif isinstance(value, (tuple, list)):
        values = tuple(value) * (rank if len(value) == 1 else 1)
    else:
        raise TypeError(f"{name}: got {value!r}, wanted one or {rank} integers of at least {least}")
    if not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise TypeError(f"{name}: got {value!r}, wanted one or {rank} integers of at least {least}")
    if len(values) != rank or min(values) < least:
        raise ValueError(f"{name}: got {value!r}, wanted one or {rank} integers of at least {least}")
    return values


def _resolve_padding(
    input: Tensor,
    weight: Tensor,
    padding: str | int | Sequence[int],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    rank: int,
) -> tuple[Tensor, tuple[int, ...]]:
    """Padding as one int a dimension; where "same" is uneven, ``input`` comes back padded on its far side."""
    if not isinstance(padding, str):
        return input, _tuple("padding", padding, rank, 0)
    if padding == "valid":
        return input, (0,) * rank
    if padding != "same":
        raise ValueError(f"padding: got {padding!r}, wanted integers, 'valid' or 'same'")
    if any(s != 1 for s in stride):
        raise ValueError(f"padding: got 'same' with stride {stride}, wanted stride 1")
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    if any(total % 2 for total in totals):
        input = F.pad(input, [p for total in reversed(totals) for p in (0, total % 2)])
    return input, tuple(total // 2 for total in totals)


def _output_shape(
    input: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    samples, _, *sizes = input.shape
    filters, _, *kernel = weight.shape
    out = [samples, filters]
    for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation):
        pixels = (size + 2 * p - d * (k - 1) - 1) // s + 1
        if pixels < 1 or size < 1:
            raise ValueError(
                f"input: got maps of {tuple(sizes)}, which leave an empty output under kernel {tuple(kernel)}, stride "
                f"{stride}, padding {padding}, dilation {dilation}; wanted larger maps"
            )
        out.append(pixels)
    return tuple(out)
