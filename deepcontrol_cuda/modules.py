"""The ops as ``torch.nn`` modules, drop-in for BatchNorm and for convolution + BatchNorm (+ activation)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from . import activations, functional

__all__ = [
    "DeepControl1d",
    "DeepControl2d",
    "DeepControl3d",
    "DeepControlConv1d",
    "DeepControlConv2d",
    "DeepControlConv3d",
]


def _register_control(
    module: nn.Module, features: int, gain: bool, mean_scale: bool | float, bias: bool, shared: bool, **where
) -> None:
    """Create the parameters gain (init 1), mean_scale (init 1) and bias (init 0), each None where it is not learned."""
    size = 1 if shared else features
    module.register_parameter("gain", Parameter(torch.ones(size, **where)) if gain else None)
    if isinstance(mean_scale, bool):
        module.fixed_mean_scale = None if mean_scale else 1.0
    else:
        module.fixed_mean_scale = float(mean_scale)
    learned = module.fixed_mean_scale is None
    module.register_parameter("mean_scale", Parameter(torch.ones(size, **where)) if learned else None)
    module.register_parameter("bias", Parameter(torch.zeros(features, **where)) if bias else None)


def _reset_control(module: nn.Module) -> None:
    for parameter, value in ((module.gain, 1.0), (module.mean_scale, 1.0), (module.bias, 0.0)):
        if parameter is not None:
            nn.init.constant_(parameter, value)


def _control_repr(module: nn.Module) -> str:
    parts = []
    if module.gain is None:
        parts.append("gain=False")
    if module.fixed_mean_scale is not None:
        parts.append(f"mean_scale={module.fixed_mean_scale:g}")
    if module.shared:
        parts.append("shared=True")
    if module.activation != "identity":
        parts.append(f"activation={module.activation!r}")
    if module.activation == "leaky_relu":
        parts.append(f"negative_slope={module.negative_slope:g}")
    if module.backend is not None:
        parts.append(f"backend={module.backend!r}")
    return "".join(f", {part}" for part in parts)


class _DeepControl(nn.Module):
    spatial_rank: int

    def __init__(
        self,
        num_features: int,
        *,
        gain: bool = True,
        mean_scale: bool | float = True,
        bias: bool = True,
        shared: bool = False,
        activation: str = "identity",
        negative_slope: float = 0.01,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not isinstance(num_features, int) or num_features < 1:
            raise ValueError(f"num_features: got {num_features!r}, wanted a positive integer")
        if activation not in activations.ACTIVATIONS:
            raise activations.unknown(activation)
        self.num_features = num_features
        self.shared = shared
        self.activation = activation
        self.negative_slope = negative_slope
        self.backend = backend
        _register_control(self, num_features, gain, mean_scale, bias, shared, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        _reset_control(self)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if input.dim() != self.spatial_rank + 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"input: got shape {tuple(input.shape)}, "
                f"wanted (N, {self.num_features}, *spatial) with {self.spatial_rank} spatial dimensions"
            )
        mean_scale = self.mean_scale if self.fixed_mean_scale is None else self.fixed_mean_scale
        return functional.deep_control(
            input, self.gain, mean_scale, self.bias, residual=residual, activation=self.activation,
            negative_slope=self.negative_slope, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.num_features}" + ("" if self.bias is not None else ", bias=False") + _control_repr(self)


_NORM_DOC = """Deep Control of {shape} maps: drop-in for ``torch.nn.BatchNorm{rank}d`` on maps, behind any layer.

    ``act(gain * (input - mean_scale * mean(input)) + bias + residual)``; the mean is per sample and per map, so there
    are no running statistics and no difference between training and evaluation (arXiv 1706.03907, abstract).

    Args:
        num_features: C.
        gain: learn a gain (initially 1); False fixes it at 1.
        mean_scale: True learns it (initially 1); a float fixes it, 0.0 leaves the mean in; False fixes 1.
        bias: learn a bias (initially 0).
        shared: one gain and one mean_scale for all channels in place of one each.
        activation, negative_slope, backend: as in ``functional.deep_control``.

    ``forward(input, residual=None)`` takes and returns {shape}; errors as in ``functional.deep_control``.
    """


class DeepControl1d(_DeepControl):
    __doc__ = _NORM_DOC.format(rank=1, shape="(N, C, L)")
    spatial_rank = 1


class DeepControl2d(_DeepControl):
    __doc__ = _NORM_DOC.format(rank=2, shape="(N, C, H, W)")
    spatial_rank = 2


class DeepControl3d(_DeepControl):
    __doc__ = _NORM_DOC.format(rank=3, shape="(N, C, D, H, W)")
    spatial_rank = 3


class _DeepControlConv:
    """What the three convolutions add to ``torch.nn.Conv1d/2d/3d``."""

    _functional = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        gain: bool = True,
        mean_scale: bool | float = True,
        shared: bool = False,
        activation: str = "identity",
        negative_slope: float = 0.01,
        projection: float = 0.0,
        backend: str | None = None,
    ) -> None:
        if activation not in activations.ACTIVATIONS:
            raise activations.unknown(activation)
        functional.check_fraction("projection", projection)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode,
            device, dtype,
        )  # fmt: skip
        self.shared = shared
        self.activation = activation
        self.negative_slope = negative_slope
        self.projection = projection
        self.backend = backend
        _register_control(self, out_channels, gain, mean_scale, bias, shared, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        bias, self.bias = self.bias, None
        super().reset_parameters()
        self.bias = bias
        if "fixed_mean_scale" in self.__dict__:
            _reset_control(self)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        mean_scale = self.mean_scale if self.fixed_mean_scale is None else self.fixed_mean_scale
        return type(self)._functional(
            input, self.weight, self.gain, mean_scale, self.bias, self.stride, padding, self.dilation, self.groups,
            residual=residual, activation=self.activation, negative_slope=self.negative_slope,
            projection=self.projection, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        projection = f", projection={self.projection:g}" if self.projection else ""
        return super().extra_repr() + _control_repr(self) + projection


_CONV_DOC = """Convolution with Deep Control: drop-in for ``torch.nn.Conv{rank}d`` + BatchNorm (+ activation).

    ``act(gain * (z - mean_scale * mean(z)) + bias + residual)`` with ``z = conv{rank}d(input, weight)``; the mean is
    per sample and per map (arXiv 1706.03907, abstract). ``bias`` is added behind the gain, as BatchNorm's is.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            ``torch.nn.Conv{rank}d``; the kernel is initialised like it.
        gain: learn a gain (initially 1); False fixes it at 1.
        mean_scale: True learns it (initially 1); a float fixes it, 0.0 leaves the mean in; False fixes 1.
        shared: one gain and one mean_scale for the whole layer in place of one a filter.
        activation, negative_slope, projection, backend: as in ``functional.deep_control_conv{rank}d``.

    ``forward(input, residual=None)`` maps {shape} to the shape of the convolution's output; ``residual`` has that
    shape. Errors as in ``functional.deep_control_conv{rank}d``.
    """


class DeepControlConv1d(_DeepControlConv, nn.Conv1d):
    __doc__ = _CONV_DOC.format(rank=1, shape="(N, C, L)")
    _functional = staticmethod(functional.deep_control_conv1d)


class DeepControlConv2d(_DeepControlConv, nn.Conv2d):
    __doc__ = _CONV_DOC.format(rank=2, shape="(N, C, H, W)")
    _functional = staticmethod(functional.deep_control_conv2d)


class DeepControlConv3d(_DeepControlConv, nn.Conv3d):
    __doc__ = _CONV_DOC.format(rank=3, shape="(N, C, D, H, W)")
    _functional = staticmethod(functional.deep_control_conv3d)
