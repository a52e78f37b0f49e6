"""Makes the layers that take the place of convolution and Batch Norm, and gives them their first values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .. import init, modules
from .norms import Norm
from .sites import Site

METHODS = ("deep_control", "mean_shift_rejection")
INITIALIZATIONS = ("fresh", "folded", "calibrated")
_NORMS = (modules.DeepControl1d, modules.DeepControl1d, modules.DeepControl2d, modules.DeepControl3d)
_CONVOLUTIONS = {
    "deep_control": {
        nn.Conv1d: modules.DeepControlConv1d,
        nn.Conv2d: modules.DeepControlConv2d,
        nn.Conv3d: modules.DeepControlConv3d,
    },
    "mean_shift_rejection": {
        nn.Conv1d: modules.MeanShiftConv1d,
        nn.Conv2d: modules.MeanShiftConv2d,
        nn.Conv3d: modules.MeanShiftConv3d,
    },
}
# What the authors of Mean Shift Rejection project with (arXiv 1911.13173, their code).
_PROJECTION = 0.9


def make(site: Site, conv: nn.Module | None, norm: Norm, method: str, initialization: str, first: bool) -> nn.Module:
    """The layer for a site. It holds the very kernel of ``conv``; vectors are 1 and biases 0.

    ``first``: ``conv`` is the one that sees the input, which Mean Shift Rejection does not project.
    """
    options = {"activation": site.activation.name, "negative_slope": site.activation.negative_slope}
    found = (norm.weight, None if conv is None else conv.weight, norm.module.running_var, torch.empty(0))
    like = next(tensor for tensor in found if tensor is not None)
    learned = norm.weight is None or norm.weight.requires_grad
    if conv is None:
        # Vectors and maps of one pixel are their own mean, of which nothing would be left.
        keeps_mean = site.rank == 0 or site.one_pixel or method != "deep_control"
        layer = _NORMS[site.rank](norm.features, mean_scale=0.0 if keeps_mean else True, device="meta", **options)
    elif method == "deep_control":
        layer = _convolution(conv, method, mean_scale=0.0 if site.one_pixel else True, **options)
    else:
        # The recipe of the authors has a bias at the input alone; trained weights need theirs everywhere.
        bias = first or initialization != "fresh"
        layer = _mean_shift(conv, initialization, first, bias=bias, **options)
    _materialize(layer, like, learned)
    return layer.train(norm.module.training)


def make_kernel(conv: nn.Module, initialization: str) -> nn.Module:
    """``conv`` as a layer of Mean Shift Rejection, for one that has no norm behind it; bias and kernel are the same."""
    layer = _mean_shift(conv, initialization, first=False, bias=False)
    _materialize(layer, conv.weight, conv.weight.requires_grad)
    layer.bias = conv.bias
    return layer.train(conv.training)


def _convolution(conv: nn.Module, method: str, **options) -> nn.Module:
    layer = _CONVOLUTIONS[method][type(conv)](
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        padding_mode=conv.padding_mode, device="meta", **options,
    )  # fmt: skip
    layer.weight = conv.weight
    return layer


def _mean_shift(conv: nn.Module, initialization: str, first: bool, **options) -> nn.Module:
    # A trained norm may have gains of zero and below, which an exponential cannot be.
    scaling = "exp" if initialization == "fresh" else "linear"
    projection = 0.0 if first else _PROJECTION
    return _convolution(conv, "mean_shift_rejection", scaling=scaling, projection=projection, **options)


def _materialize(layer: nn.Module, like: Tensor, learned: bool) -> None:
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.is_meta and name != "weight":
            vector = torch.ones(parameter.shape, dtype=like.dtype, device=like.device)
            setattr(layer, name, Parameter(vector, requires_grad=learned))
    if isinstance(layer, modules._MeanShiftConv):
        with torch.no_grad():
            layer._reset_vectors()
    elif layer.bias is not None:
        nn.init.zeros_(layer.bias)


def vector_names(layer: nn.Module) -> tuple[str, str]:
    """Names of the parameters that hold gain and bias."""
    return layer._scale_name if isinstance(layer, modules._MeanShiftConv) else "gain", "bias"


@torch.no_grad()
def fold_(layer: nn.Module, conv_bias: Tensor | None, norm: Norm | None, exclusive: bool) -> None:
    """Give ``layer``, which has the convolution's kernel, what Batch Norm computes in evaluation.

    Args:
        norm: None if there is none behind the convolution.
        exclusive: nothing else uses the kernel.

    Raises:
        ValueError: the layer has no parameter that could hold it.
    """
    gain, bias = (None, conv_bias) if norm is None else norm.as_affine()
    if gain is not None and conv_bias is not None:
        bias = bias + gain * conv_bias.to(gain.dtype)
    if bias is not None and layer.bias is None:
        raise ValueError("the layer has no bias for the norm's; convert with initialization='folded'")
    if isinstance(layer, modules._MeanShiftConv):
        _fold_scale_(layer, gain, exclusive)
    else:
        layer.gain.copy_(gain)
        if layer.mean_scale is not None:
            layer.mean_scale.zero_()
    if bias is not None:
        layer.bias.copy_(bias)


def _fold_scale_(layer: nn.Module, gain: Tensor | None, exclusive: bool) -> None:
    scale = _take_norms_(layer, exclusive)
    if gain is not None:
        scale = scale * gain
    if layer.scaling == "linear":
        layer.scale.copy_(scale)
        return
    if not exclusive or (scale == 0).any():
        raise ValueError("an exponential cannot hold its scales; convert with initialization='folded'")
    layer.weight.mul_(_per_filter(scale.sign(), layer.weight))
    layer.log_scale.copy_(scale.abs().log())


def _take_norms_(layer: nn.Module, exclusive: bool) -> Tensor:
    """Divide each filter by its norm, as Mean Shift Rejection has them, and return the norms, (O,).

    Left at 1 where another module uses the kernel, and in 16 bits, where the rounded kernel would be another.
    """
    norms = torch.linalg.vector_norm(layer.weight.flatten(1), dim=1)
    if not exclusive or layer.weight.dtype.itemsize < 4:
        return torch.ones_like(norms)
    norms = torch.where(norms > 0, norms, 1.0)
    layer.weight.div_(_per_filter(norms, layer.weight))
    return norms


def _per_filter(vector: Tensor, weight: Tensor) -> Tensor:
    return vector.to(weight.dtype).view(-1, *(1,) * (weight.dim() - 1))


@torch.no_grad()
def start_(layer: nn.Module, initialization: str, exclusive: bool) -> None:
    """What "fresh" begins with, and "calibrated" before it sees the batch."""
    if not isinstance(layer, modules._MeanShiftConv):
        return
    if initialization == "fresh":
        init.zero_mean_unit_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    else:
        _fold_scale_(layer, None, exclusive)
