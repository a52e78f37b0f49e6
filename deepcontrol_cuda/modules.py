"""The ops as ``torch.nn`` modules, drop-in for BatchNorm and for convolution + BatchNorm (+ activation)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from . import activations, functional, init

__all__ = [
    "DeepControl1d",
    "DeepControl2d",
    "DeepControl3d",
    "DeepControlConv1d",
    "DeepControlConv2d",
    "DeepControlConv3d",
    "MapNoise",
    "MeanShiftConv1d",
    "MeanShiftConv2d",
    "MeanShiftConv3d",
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
    return "".join(f", {part}" for part in parts) + _activation_repr(module)


def _activation_repr(module: nn.Module) -> str:
    parts = []
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
        vectors = self.spatial_rank == 1 and input.dim() == 2
        if (not vectors and input.dim() != self.spatial_rank + 2) or not self._fits(input):
            raise ValueError(
                f"input: got shape {tuple(input.shape)}, "
                f"wanted (N, {self.num_features}, *spatial) with {self.spatial_rank} spatial dimensions"
            )
        mean_scale = self.mean_scale if self.fixed_mean_scale is None else self.fixed_mean_scale
        if vectors:
            if self.fixed_mean_scale != 0.0:
                raise ValueError(
                    f"input: got shape {tuple(input.shape)}, but vectors have no map whose mean could be taken; wanted "
                    f"(N, {self.num_features}, L), or a layer made with mean_scale=0.0"
                )
            input, residual = input.unsqueeze(-1), None if residual is None else residual.unsqueeze(-1)
        output = functional.deep_control(
            input, self.gain, mean_scale, self.bias, residual=residual, activation=self.activation,
            negative_slope=self.negative_slope, backend=self.backend,
        )  # fmt: skip
        return output.squeeze(-1) if vectors else output

    def _fits(self, input: Tensor) -> bool:
        # While tracing, sizes are tensors, and comparing one makes a constant of it and warns.
        return torch.jit.is_tracing() or input.shape[1] == self.num_features

    def extra_repr(self) -> str:
        return f"{self.num_features}" + ("" if self.bias is not None else ", bias=False") + _control_repr(self)


_NORM_DOC = """Deep Control of maps: drop-in for ``torch.nn.BatchNorm{rank}d`` on maps, behind any layer.

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
    __doc__ = _NORM_DOC.format(rank=1, shape="(N, C, L), and with a mean_scale of 0.0 (N, C) too")
    spatial_rank = 1


class DeepControl2d(_DeepControl):
    __doc__ = _NORM_DOC.format(rank=2, shape="(N, C, H, W)")
    spatial_rank = 2


class DeepControl3d(_DeepControl):
    __doc__ = _NORM_DOC.format(rank=3, shape="(N, C, D, H, W)")
    spatial_rank = 3


class _FusedConv:
    """What all fused convolutions add to ``torch.nn.Conv1d/2d/3d``; the bias is added behind the gain.

    ``_spatial_rank`` is that of its maps, ``_gain_and_mean_scale()`` gives the op's first two vectors.
    """

    def __init__(
        self, *geometry, activation: str, negative_slope: float, projection: float, backend: str | None, **options
    ) -> None:
        if activation not in activations.ACTIVATIONS:
            raise activations.unknown(activation)
        functional.check_fraction("projection", projection)
        super().__init__(*geometry, bias=False, **options)
        self.activation = activation
        self.negative_slope = negative_slope
        self.projection = projection
        self.backend = backend

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        gain, mean_scale = self._gain_and_mean_scale()
        return functional.deep_control_conv(
            self._spatial_rank, input, self.weight, gain, mean_scale, self.bias, self.stride, padding, self.dilation,
            self.groups, residual, self.activation, self.negative_slope, self.projection, self.backend,
        )  # fmt: skip


class _DeepControlConv(_FusedConv):
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
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode=padding_mode,
            device=device, dtype=dtype, activation=activation, negative_slope=negative_slope, projection=projection,
            backend=backend,
        )  # fmt: skip
        self.shared = shared
        _register_control(self, out_channels, gain, mean_scale, bias, shared, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        bias, self.bias = self.bias, None
        super().reset_parameters()
        self.bias = bias
        if "fixed_mean_scale" in self.__dict__:
            _reset_control(self)

    def _gain_and_mean_scale(self) -> tuple[Tensor | None, Tensor | float]:
        return self.gain, self.mean_scale if self.fixed_mean_scale is None else self.fixed_mean_scale

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
        mean_scale: True learns it (initially 1); a float fixes it, 0.0 leaves the mean in; False fixes 1. Of a map of
            one pixel, which is its own mean, nothing is left at 1: take 0.0 there.
        shared: one gain and one mean_scale for the whole layer in place of one a filter.
        activation, negative_slope, projection, backend: as in ``functional.deep_control_conv{rank}d``.

    ``forward(input, residual=None)`` maps {shape} to the shape of the convolution's output; ``residual`` has that
    shape. Errors as in ``functional.deep_control_conv{rank}d``.
    """


class DeepControlConv1d(_DeepControlConv, nn.Conv1d):
    __doc__ = _CONV_DOC.format(rank=1, shape="(N, C, L)")
    _spatial_rank = 1


class DeepControlConv2d(_DeepControlConv, nn.Conv2d):
    __doc__ = _CONV_DOC.format(rank=2, shape="(N, C, H, W)")
    _spatial_rank = 2


class DeepControlConv3d(_DeepControlConv, nn.Conv3d):
    __doc__ = _CONV_DOC.format(rank=3, shape="(N, C, D, H, W)")
    _spatial_rank = 3


class _MeanShiftConv(_FusedConv):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        scaling: str | None = "exp",
        initial_scale: float = 0.8,
        shared: bool = False,
        scaling_noise: float = 0.0,
        projection: float = 0.9,
        activation: str = "identity",
        negative_slope: float = 0.01,
        backend: str | None = None,
    ) -> None:
        if scaling not in ("exp", "linear", None):
            raise ValueError(f"scaling: got {scaling!r}, wanted 'exp', 'linear' or None")
        if not isinstance(initial_scale, (int, float)) or not 0 < initial_scale < math.inf:
            raise ValueError(f"initial_scale: got {initial_scale!r}, wanted a positive number")
        functional.check_fraction("scaling_noise", scaling_noise)
        self.scaling = scaling
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode=padding_mode,
            device=device, dtype=dtype, activation=activation, negative_slope=negative_slope, projection=projection,
            backend=backend,
        )  # fmt: skip
        self.initial_scale = initial_scale
        self.shared = shared
        self.scaling_noise = scaling_noise
        where = {"device": device, "dtype": dtype}
        size = 1 if shared else out_channels
        if scaling is not None:
            self.register_parameter(self._scale_name, Parameter(torch.empty(size, **where)))
        self.register_parameter("bias", Parameter(torch.empty(out_channels, **where)) if bias else None)
        self._reset_vectors()

    @property
    def _scale_name(self) -> str:
        return "log_scale" if self.scaling == "exp" else "scale"

    def reset_parameters(self) -> None:
        init.zero_mean_unit_(self.weight)
        if "initial_scale" in self.__dict__:
            self._reset_vectors()

    def _reset_vectors(self) -> None:
        if self.scaling == "exp":
            nn.init.constant_(self.log_scale, math.log(self.initial_scale))
        elif self.scaling == "linear":
            nn.init.constant_(self.scale, self.initial_scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _gain_and_mean_scale(self) -> tuple[Tensor | None, Tensor | float]:
        scale = None if self.scaling is None else self.log_scale.exp() if self.scaling == "exp" else self.scale
        if self.scaling_noise and self.training:
            like = self.weight if scale is None else scale
            # In 16 bits uniform draws have ties and can reach the open end.
            dtype = torch.promote_types(like.dtype, torch.float32)
            noise = torch.empty(self.out_channels, dtype=dtype, device=like.device)
            noise = noise.uniform_(1 - self.scaling_noise, 1 + self.scaling_noise).to(like.dtype)
            scale = noise if scale is None else scale * noise
        return scale, 0.0

    def extra_repr(self) -> str:
        parts = [f"scaling={self.scaling!r}", *(["shared=True"] if self.shared else [])]
        if self.scaling_noise:
            parts.append(f"scaling_noise={self.scaling_noise:g}")
        parts.append(f"projection={self.projection:g}")
        return super().extra_repr() + "".join(f", {part}" for part in parts) + _activation_repr(self)


_MEAN_SHIFT_DOC = """Convolution by scaled kernels of mean zero, where conv + BatchNorm (+ activation) stood.

    ``act(conv{rank}d(input, s * weight) + bias + residual)``, one learned scale ``s`` a filter: Mean Shift Rejection.
    The weight starts as ``init.zero_mean_unit_`` makes it, and backward subtracts from its gradient ``projection``
    times the gradient's mean over the taps, for each filter and input channel; kernels with one tap are not projected.
    Nothing depends on the batch; training and evaluation differ only in ``scaling_noise``. Sources: arXiv 1911.13173,
    abstract; ``ConvScalingLayer.py`` and the recorded command line of the authors' code
    (taylorkangbeck/mean-shift-rejection), which the defaults follow. There residual blocks see ``MapNoise``, weights
    have ``unity_decay``, and only the first convolution, which is not projected, and the classifier have a bias.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in
            ``torch.nn.Conv{rank}d``.
        bias: learn a bias (initially 0), added behind the scale.
        scaling: "exp" learns ``log_scale`` and scales by its exponential, which stays positive; "linear" learns
            ``scale``; None has none.
        initial_scale: what ``s`` starts as, positive.
        shared: one scale for the layer in place of one a filter.
        scaling_noise: in training each filter's scale is multiplied by a draw from U(1 - a, 1 + a), one a forward;
            from 0 to 1.
        projection: weight of the mean that backward subtracts, from 0 to 1.
        activation, negative_slope, backend: as in ``functional.deep_control_conv{rank}d``.

    ``forward(input, residual=None)`` maps {shape} to the shape of the convolution's output; ``residual`` has that
    shape. Errors as in ``functional.deep_control_conv{rank}d``.
    """


class MeanShiftConv1d(_MeanShiftConv, nn.Conv1d):
    __doc__ = _MEAN_SHIFT_DOC.format(rank=1, shape="(N, C, L)")
    _spatial_rank = 1


class MeanShiftConv2d(_MeanShiftConv, nn.Conv2d):
    __doc__ = _MEAN_SHIFT_DOC.format(rank=2, shape="(N, C, H, W)")
    _spatial_rank = 2


class MeanShiftConv3d(_MeanShiftConv, nn.Conv3d):
    __doc__ = _MEAN_SHIFT_DOC.format(rank=3, shape="(N, C, D, H, W)")
    _spatial_rank = 3


class MapNoise(nn.Module):
    """Scales every map of every sample by a draw of its own from U(1 - scale, 1 + scale), in training only.

    ``functional.map_noise``; in evaluation the identity. Mean Shift Rejection has it at the input of each residual
    block, ahead of the split (arXiv 1911.13173, abstract; the authors' code, taylorkangbeck/mean-shift-rejection).

    Args:
        scale, shift: as in ``functional.map_noise``.
        generator: source of the draws, on the input's device; None is torch's default, which ``torch.manual_seed``
            sets, ``torch.utils.checkpoint`` replays and ``torch.compile`` needs.

    ``forward(input)`` keeps the shape, dtype and memory format of (N, C, *spatial).
    """

    def __init__(self, scale: float = 0.1, shift: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        functional.check_noise(scale, shift)
        self.scale = scale
        self.shift = shift
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        return functional.map_noise(input, self.scale, self.shift, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, shift={self.shift:g}"
