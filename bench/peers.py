"""What is compared: layers with the same kernels, gains and biases, networks with other norms, ways to run ours."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import cache, partial

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import deepcontrol_cuda as dc
from deepcontrol_cuda import DeepControlConv2d, backends
from deepcontrol_cuda.timing import Shape, Step

from .rows import Setting

Way = Callable[[], AbstractContextManager]


def _conv(shape: Shape) -> nn.Module:
    return nn.Conv2d(**shape.geometry, bias=False)


def _conv_relu(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), nn.ReLU())


def _conv_relu_in_place(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), nn.ReLU(inplace=True))


def _conv_bn_relu(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), nn.BatchNorm2d(shape.out_channels), nn.ReLU())


def _conv_sync_bn_relu(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), nn.SyncBatchNorm(shape.out_channels), nn.ReLU())


def _conv_instance_norm_relu(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), nn.InstanceNorm2d(shape.out_channels, affine=True), nn.ReLU())


def _conv_group_norm_relu(shape: Shape) -> nn.Module:
    return nn.Sequential(_conv(shape), _group_norm(shape.out_channels), nn.ReLU())


def _group_norm(channels: int) -> nn.GroupNorm:
    # 32 groups as in arXiv 1803.08494, or as many as divide the channels.
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _conv_inplace_abn(shape: Shape) -> nn.Module:
    # arXiv 1712.02616; its activation must have an inverse, so it is leaky.
    norm = importlib.import_module("inplace_abn").InPlaceABN
    return nn.Sequential(_conv(shape), norm(shape.out_channels, activation="leaky_relu", activation_param=0.01))


def _ours(shape: Shape) -> nn.Module:
    return DeepControlConv2d(**shape.geometry, activation="relu")


_LAYERS: dict[str, Callable[[Shape], nn.Module]] = {
    "conv": _conv,
    "conv_relu": _conv_relu,
    "conv_relu_": _conv_relu_in_place,
    "conv_bn_relu": _conv_bn_relu,
    "conv_bn_relu_compiled": _conv_bn_relu,
    "conv_bn_relu_folded": _conv_bn_relu,
    "conv_sync_bn_relu": _conv_sync_bn_relu,
    "conv_instance_norm_relu": _conv_instance_norm_relu,
    "conv_group_norm_relu": _conv_group_norm_relu,
    "conv_inplace_abn": _conv_inplace_abn,
    "ours": _ours,
}
PEERS = tuple(_LAYERS)
MAIN = ("conv_relu", "conv_bn_relu", "ours")
"""The peers of the verdicts, which no run goes without."""
MEAN_SHIFT_REJECTION = "ours, mean shift rejection"
_WORDS = {
    "conv": "the bare convolution",
    "conv_relu": "convolution and ReLU; of a network the same one without its norms",
    "conv_relu_": "convolution and ReLU in place",
    "conv_bn_relu": "convolution, Batch Norm with the batch's statistics, ReLU",
    "conv_bn_relu_compiled": "convolution, Batch Norm, ReLU through torch.compile",
    "conv_bn_relu_folded": "convolution that Batch Norm's running statistics are folded into, ReLU; inference alone",
    "conv_sync_bn_relu": "convolution, SyncBatchNorm, ReLU",
    "conv_instance_norm_relu": "convolution, Instance Norm, ReLU",
    "conv_group_norm_relu": "convolution, Group Norm of 32 groups or as many as divide the channels, ReLU",
    "conv_inplace_abn": "convolution and InPlace-ABN (arXiv 1712.02616), whose activation is leaky",
    "ours": "this package's layer, network or kernel, by the backend and algorithm that it chooses",
    "ours, reference": "this package's layer in plain PyTorch",
    MEAN_SHIFT_REJECTION: "this package's network with Mean Shift Rejection in place of its norms",
    "copy": "a copy of as many bytes as the kernel moves",
    "step": "backward and optimizer of a training step",
    "projection": "the projection of kernel gradients between the two",
    "not projected": "a training step whose backward does not project kernel gradients",
    "projected": "the same step with the projection",
}
ALGORITHMS = "algorithms"
"""Stands for ours by every backend and algorithm, in a list of peers."""


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
    return compiled(layer) if name == "conv_bn_relu_compiled" else layer


def compiled(module: nn.Module) -> nn.Module:
    # Else the limit of recompilations of one function would be reached after some shapes.
    torch.compiler.reset()
    return torch.compile(module, dynamic=False)


_NETWORKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "conv_relu": lambda network: _with_norm(network, lambda channels: nn.Identity()),
    "conv_bn_relu": copy.deepcopy,
    "conv_bn_relu_compiled": lambda network: compiled(copy.deepcopy(network)),
    "conv_bn_relu_folded": lambda network: _folded(network),
    "conv_sync_bn_relu": lambda network: nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)),
    "conv_instance_norm_relu": lambda network: _with_norm(network, _instance_norm_like(network)),
    "conv_group_norm_relu": lambda network: _with_norm(network, _group_norm),
    "conv_inplace_abn": lambda network: _with_norm(
        network, partial(importlib.import_module("inplace_abn").InPlaceABN, activation="identity")
    ),
    "ours": lambda network: dc.replace_conv_bn(network).model,
    MEAN_SHIFT_REJECTION: lambda network: dc.replace_conv_bn(network, "mean_shift_rejection").model,
}
NETWORK_PEERS = tuple(_NETWORKS)


def convert(name: str, network: nn.Module) -> nn.Module:
    """A copy of a network of convolutions, Batch Norm and ReLU with what ``name`` has in place of these."""
    return _NETWORKS[name](network)


def _with_norm(network: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, make(child.num_features))
    return network


def _instance_norm_like(network: nn.Module) -> Callable[[int], nn.Module]:
    norm = next(module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    kind = nn.InstanceNorm3d if isinstance(norm, nn.BatchNorm3d) else nn.InstanceNorm2d
    return partial(kind, affine=True)


def _folded(network: nn.Module) -> nn.Module:
    """The evaluated network with each Batch Norm in the convolution in front of it, as its modules are listed."""
    network = copy.deepcopy(network).eval()
    before: tuple[nn.Module, str] | None = None
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.conv._ConvNd):
                before = parent, name
            elif isinstance(child, nn.modules.batchnorm._BatchNorm):
                owner, conv = before
                setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), child))
                setattr(parent, name, nn.Identity())
    return network


def ways(device: str) -> dict[str, Way]:
    """How ours can be run besides the automatic choice, by the peer's name: contexts to call it in."""
    found: dict[str, Way] = {"ours, reference": partial(backends.use, "reference")}
    names = ("cpu",) if device == "cpu" else ("cuda", "triton")
    for backend in (name for name in names if backends.available()[name] is None):
        prefix = "ours, " if device == "cpu" else f"ours, {backend}, "
        algorithms = backends.ALGORITHMS.get(backend, ())
        found |= {prefix + algorithm: partial(_by, backend, algorithm) for algorithm in algorithms}
        if not algorithms and device != "cpu":
            found[prefix.rstrip(", ")] = partial(backends.use, backend)
    return found


def describe(peer: str) -> str:
    """What a peer of a run is, in a line."""
    if peer in _WORDS:
        return _WORDS[peer]
    way, _, algorithm = peer.removeprefix("ours, ").rpartition(", ")
    words = backends.ALGORITHMS.get(way or "cpu", {}).get(algorithm)
    if words is not None:
        return f"this package's layer by backend {way or 'cpu'!r}: {words}"
    return f"this package's layer by backend {algorithm!r}" if algorithm in backends.BACKENDS else "of another version"


def _by(backend: str, algorithm: str) -> AbstractContextManager:
    stack = ExitStack()
    stack.enter_context(backends.use(backend))
    stack.enter_context(backends.prefer(algorithm, backend))
    return stack


def why_not(name: str, setting: Setting, device: str = "cpu") -> str | None:
    """The reason why the peer ``name`` cannot be timed in a setting here, or None if it can."""
    if name == "conv_bn_relu_folded" and setting.mode == "training":
        return "Batch Norm cannot be folded while it trains"
    if name == "conv_bn_relu_compiled":
        if setting.mode == "forward" or setting.layout != "channels_last":
            return "compiled in channels_last and training only, since compiling takes longer than all timing"
        return _why_not_compile()
    if name == "conv_sync_bn_relu":
        return _why_not_sync(device)
    if name == "conv_inplace_abn":
        return _why_not_inplace_abn()
    return None


@cache
def _why_not_inplace_abn() -> str | None:
    try:
        importlib.import_module("inplace_abn").InPlaceABN  # noqa: B018
    except Exception as error:  # a broken build can raise anything; the other peers can be timed
        return f"inplace_abn cannot be imported: {_first_line(error)}"
    return None


def _why_not_sync(device: str) -> str | None:
    if device == "cpu":
        return "SyncBatchNorm takes tensors on GPUs only"
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return "SyncBatchNorm needs processes of torch.distributed; this is a single one"
    return None


def _why_not_compile() -> str | None:
    # Asked for each row, but a function that was replaced in between is another one.
    return _why_compile_fails(torch.compile)


@cache
def _why_compile_fails(compile: Callable) -> str | None:
    shape = Shape(8, 8, 1, 4)
    x = torch.randn(1, shape.in_channels, shape.size, shape.size)
    try:
        Step(build("conv_bn_relu_compiled", shape, x.dtype, torch.contiguous_format), x, torch.randn_like(x))()
    except Exception as error:  # whatever fails in there (no compiler, no headers), the other peers can be timed
        return f"torch.compile fails: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
