"""Loads the compiled extension, or keeps the reason why it cannot be loaded.

After import, ``torch.ops.deepcontrol`` holds the ops of ``csrc/ops.cpp`` if and only if ``unavailable`` is None. The
shape functions for ``torch.compile`` (fakes) are registered by ``bind``, for ops that exist and for no others.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format

from . import activations
from ._version import __version__

_REBUILD = "rebuild it with: pip install --no-build-isolation --no-deps --force-reinstall . (in a checkout: make build)"


def _build_info() -> dict[str, str | None]:
    """What the build wrote beside the extension; empty if there is none."""
    package = importlib.import_module(__package__)
    files = [Path(folder) / "_build_info.json" for folder in package.__path__]
    return next((json.loads(file.read_text()) for file in files if file.exists()), {})


def _load(info: dict[str, str | None]):
    """The extension module and None, or None and the reason."""
    if not info:
        return None, "the compiled extension is not built (was there a C++ compiler when the package was installed?)"
    built, running = (version.split("+")[0].rsplit(".", 1)[0] for version in (info["torch"], torch.__version__))
    if built != running:
        return (
            None,
            f"the compiled extension was built for torch {info['torch']} and this is {torch.__version__}; {_REBUILD}",
        )
    if info["version"] != __version__:
        return None, f"the compiled extension is of version {info['version']}, the package is {__version__}; {_REBUILD}"
    try:
        return importlib.import_module("._C", __package__), None
    except (ImportError, OSError) as error:
        return None, f"the compiled extension does not load: {error}; {_REBUILD}"


_info = _build_info()
extension, unavailable = _load(_info)
kernels: str = _info.get("kernels") or ""
"""Digest of the CUDA sources that were built."""


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The memory format of a tensor, by the rule of ``format_of`` in ``csrc/tensors.cpp``."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if channels_last is not None and tensor.is_contiguous(memory_format=channels_last):
        return channels_last
    return suggest_memory_format(tensor)


def channels_innermost(shape: torch.Size, format: torch.memory_format) -> bool:
    """Whether the kernels see a dense (N, C, *spatial) tensor as rows of channels rather than as rows of pixels."""
    return shape[2:].numel() == 1 or (shape[1] > 1 and format is not torch.contiguous_format)


def bits_shape(shape: torch.Size, channels_are_innermost: bool) -> tuple[int, int, int]:
    """Shape of the uint8 tensor that keeps one bit an element: rows padded to whole bytes, lowest bit first."""
    samples, channels, pixels = shape[0], shape[1], shape[2:].numel()
    if channels_are_innermost:
        return (samples, pixels, (channels + 7) // 8)
    return (samples, channels, (pixels + 7) // 8)


def unpack_bits(bits: Tensor, shape: torch.Size, channels_are_innermost: bool) -> Tensor:
    """The bool tensor of ``shape`` (N, C, *spatial) that ``bits`` keeps."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    rows = ((bits.unsqueeze(-1) >> places) & 1).bool().flatten(-2)
    if channels_are_innermost:
        rows = rows[..., : shape[1]].transpose(1, 2)
    else:
        rows = rows[..., : shape[2:].numel()]
    return rows.reshape(shape)


def conv_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's output."""
    for tensor in (input, weight):
        if (format := memory_format(tensor)) is not torch.contiguous_format:
            return format
    return torch.contiguous_format


def accumulation(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and map means."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def center_results(output: Tensor, format: torch.memory_format, centred: bool, activation: str, save: bool):
    """(output, map_mean, saved) as the kernels return them for an output like ``output``."""
    map_mean = output.new_empty(output.shape[:2] if centred else (0,), dtype=accumulation(output))
    if save and activation in activations.PIECEWISE:
        innermost = channels_innermost(output.shape, format)
        saved = output.new_empty(bits_shape(output.shape, innermost), dtype=torch.uint8)
    elif save and activation in activations.SMOOTH:
        saved = torch.empty_like(output)
    else:
        saved = output.new_empty((0,))
    return output, map_mean, saved


def _vector_grads(channels: int, like: Tensor, wanted) -> list[Tensor | None]:
    return [like.new_empty((channels,), dtype=accumulation(like)) if want else None for want in wanted]


def _dense_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=memory_format(tensor))


class Ops(NamedTuple):
    """The ops of one namespace that Python calls."""

    center: OpOverload
    center_backward: OpOverload
    conv_center: OpOverload
    conv_center_backward: OpOverload
    project_kernel_gradients_: OpOverload
    namespace: str


class Nodes(NamedTuple):
    """The ops of ``csrc/autograd/functions.cpp``, which record a call of another namespace for backward."""

    center: OpOverload
    conv_center: OpOverload


_bound: dict[str, Ops] = {}


def bind(namespace: str) -> Ops:
    """The ops of a namespace with the schemas of ``csrc/ops.cpp``; registers their fakes the first time."""
    if namespace not in _bound:
        _register_fakes(namespace)
        library = getattr(torch.ops, namespace)
        _bound[namespace] = Ops(*(getattr(library, name).default for name in Ops._fields[:-1]), namespace)
    return _bound[namespace]


def _register_fakes(namespace: str) -> None:
    library = getattr(torch.ops, namespace)

    def fake(name: str):
        exists = hasattr(library, name)
        return torch.library.register_fake(f"{namespace}::{name}") if exists else lambda function: function

    @fake("center")
    def _(input, gain, mean_scale, constant, bias, residual, activation, slope, save):
        centred = mean_scale is not None or constant != 0.0
        return center_results(_dense_like(input), memory_format(input), centred, activation, save)

    @fake("center_with_mean")
    def _(input, gain, mean_scale, constant, bias, residual, activation, slope, save):
        centred = mean_scale is not None or constant != 0.0
        output, map_mean, saved = center_results(_dense_like(input), memory_format(input), centred, activation, save)
        return output, map_mean, saved, input.new_empty(input.shape[:2], dtype=accumulation(input))

    @fake("center_backward")
    def _(grad_output, input, gain, mean_scale, constant, map_mean, saved, activation, slope, mask):
        grads = _vector_grads(grad_output.shape[1], grad_output, mask[1:4])
        like = [_dense_like(grad_output) if want else None for want in (mask[0], mask[4])]
        return like[0], *grads, like[1]

    @fake("conv_center")
    def _(input, weight, gain, mean_scale, constant, bias, residual, stride, padding, dilation, groups, activation,
          slope, save):  # fmt: skip
        zeros = [0] * len(stride)
        narrow = weight.to(input.dtype)
        z = torch.ops.aten.convolution(input, narrow, None, stride, padding, dilation, False, zeros, groups)
        format = conv_memory_format(input, weight)
        output = torch.empty_like(z, memory_format=format)
        return center_results(output, format, mean_scale is not None or constant != 0.0, activation, save)

    @fake("conv_center_backward")
    def _(grad_output, input, weight, gain, mean_scale, constant, map_mean, saved, stride, padding, dilation, groups,
          activation, slope, projection, mask):  # fmt: skip
        operands = [_dense_like(t) if want else None for t, want in zip((input, weight), mask)]
        vectors = _vector_grads(weight.shape[0], input, mask[2:5])
        grad_residual = torch.empty_like(grad_output, memory_format=conv_memory_format(input, weight))
        return *operands, *vectors, grad_residual if mask[5] else None

    @fake("window_mean")
    def _(input, kernel_size, stride, padding, dilation):
        return input.new_empty((*input.shape[:2], *kernel_size))

    @fake("project_kernel_gradients_")
    def _(gradients, weight):
        return None

    @fake("finish_weight_grad_")
    def _(grad_weight, weight, gain, scale, projection):
        return _vector_grads(weight.shape[0], weight, (True,))[0]
