"""The layers that are compared, all with the same kernels, gains and biases."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deepcontrol_cuda import DeepControlConv2d
from deepcontrol_cuda.timing import Shape, Step


def _conv(shape: Shape) -> nn.Conv2d:
    return nn.Conv2d(**shape.geometry, bias=False)


def _conv_relu(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), nn.ReLU())


def _conv_relu_in_place(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), nn.ReLU(inplace=True))


def _conv_bn_relu(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), nn.BatchNorm2d(shape.out_channels), nn.ReLU())


def _conv_instance_norm_relu(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), nn.InstanceNorm2d(shape.out_channels, affine=True), nn.ReLU())


def _conv_group_norm_relu(shape: Shape) -> nn.Module:
    # 32 groups as in arXiv 1803.08494, or as many as divide the channels.
    groups = math.gcd(32, shape.out_channels)
    return nn.Sequential(_conv(shape), nn.GroupNorm(groups, shape.out_channels), nn.ReLU())


def _ours(shape: Shape) -> nn.Module:
    return DeepControlConv2d(**shape.geometry, activation="relu")


_LAYERS: dict[str, Callable[[Shape], nn.Module]] = {
    "conv": _conv,
    "conv_relu": _conv_relu,
    "conv_relu_": _conv_relu_in_place,
    "conv_bn_relu": _conv_bn_relu,
    "conv_bn_relu_compiled": _conv_bn_relu,
    "conv_bn_relu_folded": _conv_bn_relu,
    "conv_instance_norm_relu": _conv_instance_norm_relu,
    "conv_group_norm_relu": _conv_group_norm_relu,
    "ours": _ours,
}
PEERS = tuple(_LAYERS)
ALWAYS = ("conv_relu", "ours")
"""The peers that no run goes without: every ratio is to ``conv_relu``."""


def build(name: str, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format) -> nn.Module:
    """The layer ``name`` with kernels in ``dtype`` and ``memory_format``; vectors stay float32 beside 16 bits.

    Batch Norm normalises with the batch's statistics, but for ``conv_bn_relu_folded``, which is what is left of it at
    inference. The values are random, and the same for every name.
    """
    generator = torch.Generator().manual_seed(0)
    layer = _LAYERS[name](shape)
    vectors = {
        "gain": torch.rand(shape.out_channels, generator=generator) + 0.5,
        "bias": torch.randn(shape.out_channels, generator=generator) * 0.2,
        "mean_scale": torch.rand(shape.out_channels, generator=generator) + 0.5,
    }
    with torch.no_grad():
        for path, parameter in layer.named_parameters():
            if parameter.dim() == 4:
                deviation = parameter[0].numel() ** -0.5
                values = torch.randn(parameter.shape, generator=generator) * deviation
                parameter.data = values.to(dtype=dtype, memory_format=memory_format)
            else:
                # A norm's weight is what gain is here.
                own_name = path.rpartition(".")[2]
                parameter.copy_(vectors["gain" if own_name == "weight" else own_name])
    if name == "conv_bn_relu_folded":
        conv, norm, relu = layer.eval()
        return nn.Sequential(fuse_conv_bn_eval(conv, norm), relu)
    if name == "conv_bn_relu_compiled":
        # Else the limit of recompilations of one function would be reached after some shapes.
        torch.compiler.reset()
        return torch.compile(layer, dynamic=False)
    return layer


def why_not(name: str, mode: str) -> str | None:
    """The reason why the peer ``name`` cannot be timed in ``mode`` here, or None if it can."""
    if name == "conv_bn_relu_folded" and mode == "training":
        return "Batch Norm cannot be folded while it trains"
    if name == "conv_bn_relu_compiled":
        return _why_not_compile()
    return None


def _why_not_compile() -> str | None:
    shape = Shape(8, 8, 1, 4)
    x = torch.randn(1, shape.in_channels, shape.size, shape.size)
    try:
        Step(build("conv_bn_relu_compiled", shape, x.dtype, torch.contiguous_format), x, torch.randn_like(x))()
    except Exception as error:  # whatever fails in there (no compiler, no headers), the other peers can be timed
        return f"torch.compile fails: {str(error).strip().splitlines()[0]}"
    return None
