"""What the networks can be trained with: the layers they are made of, their start, and what acts on their training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import deepcontrol_cuda as dc

from .networks import NETWORKS, Architecture, Layer, ResNet

CALIBRATION_IMAGES = 256


class _ConvNorm(nn.Module):
    """``act(norm(conv(x)) + residual)``; without a norm the convolution has a bias."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] | None,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        activation: str,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=norm is None)
        self.norm = nn.Identity() if norm is None else norm(out_channels)
        self.activation = nn.ReLU() if activation == "relu" else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.norm(self.conv(x))
        return self.activation(x if residual is None else x + residual)


def _group_norm(channels: int) -> nn.Module:
    # Eight groups: the 32 of arXiv 1803.08494 would leave the narrow networks here with groups of one channel.
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


def _deep_control(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, activation: str, **options
) -> nn.Module:
    return dc.DeepControlConv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, activation=activation, **options
    )


def _mean_shift(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, activation: str, **options
) -> nn.Module:
    return dc.MeanShiftConv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, activation=activation, **options
    )


def _kaiming_(kernel: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu", generator=generator)


def _zero_mean_(kernel: Tensor, generator: torch.Generator) -> None:
    dc.init.zero_mean_unit_(kernel, generator=generator)


@torch.no_grad()
def _uniform_(kernel: Tensor, generator: torch.Generator) -> None:
    """What ``zero_mean_unit_`` does, but for the mean."""
    kernel.uniform_(-1, 1, generator=generator)
    kernel /= torch.linalg.vector_norm(kernel.flatten(1), dim=1).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Method:
    """One way to train the networks. With one seed all methods of the same ``kernel_init`` start from the same kernels.

    Args:
        label: the name that readers see.
        layer, input_layer, noise: as ``networks.ResNet`` takes them.
        kernel_init: fills a kernel (O, C, kh, kw) from a generator.
        calibrated: ``prepare`` sets the gains, or the scales of the kernels, from a batch.
        centralized: Gradient Centralization (arXiv 2004.01461) of every weight of two or more dimensions.
        unity_decay: weight of the decay of kernels to norm 1, which takes the place of their L2 decay.
        bias_rate: learning rate of biases and of the classifier over that of all others.
    """

    label: str
    layer: Layer
    input_layer: Layer | None = None
    noise: Callable[[], nn.Module] = nn.Identity
    kernel_init: Callable[[Tensor, torch.Generator], None] = _kaiming_
    calibrated: bool = False
    centralized: bool = False
    unity_decay: float = 0.0
    bias_rate: float = 1.0

    def build(self, network: str | Architecture, channels: int, classes: int, seed: int) -> ResNet:
        """The network on the CPU in float32, before ``prepare``; the global generator is left as it was."""
        architecture = NETWORKS[network] if isinstance(network, str) else network
        # What the layers draw on their own is thrown away: how much they draw differs from method to method.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            model = ResNet(architecture, self.layer, self.input_layer, self.noise, channels, classes)
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                self.kernel_init(module.weight, generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.kaiming_uniform_(model.classifier.weight, math.sqrt(5), generator=generator)
        nn.init.zeros_(model.classifier.bias)
        return model

    def prepare(self, model: ResNet, images: Tensor) -> None:
        """What is done once, between ``build`` and the first step; ``images`` (N, C, H, W) as for training."""
        if self.calibrated:
            dc.calibrate_gain_(model, images[:CALIBRATION_IMAGES])

    def parameter_groups(self, model: ResNet, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for an optimizer. Only weights of two or more dimensions decay, and no kernel under unity decay."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            slow = name.startswith("classifier.") or name.endswith(".bias")
            decays = parameter.dim() > 1 and not (self.unity_decay and parameter.dim() == 4)
            key = (learning_rate * (self.bias_rate if slow else 1), weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def attach(self, model: ResNet, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        """Hooks that act on gradients ahead of every step; ``handle.remove()`` undoes one."""
        if not self.centralized:
            return []
        weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        return [optimizer.register_step_pre_hook(partial(_centralize, weights))]

    def penalty(self, model: ResNet) -> Tensor | None:
        """What is added to the loss; None for nothing."""
        if not self.unity_decay:
            return None
        return dc.unity_decay([p for p in model.parameters() if p.dim() == 4], self.unity_decay)


@torch.no_grad()
def _centralize(weights: list[Tensor], *_) -> None:
    for weight in weights:
        if weight.grad is not None:
            weight.grad -= weight.grad.mean(tuple(range(1, weight.dim())), keepdim=True)


def _deep_control_mean_shift(*arguments, **options) -> nn.Module:
    layer = _deep_control(*arguments, **options)
    nn.init.constant_(layer.gain, 0.8)
    return layer


def _mean_shift_rejection(
    label: str,
    *,
    zero_mean: bool = True,
    projection: float = 0.9,
    noise: float = 0.1,
    scaling: str | None = "exp",
    unity_decay: float = 5e-4,
    calibrated: bool = False,
) -> Method:
    """The authors' recipe (code of arXiv 1911.13173): its defaults are what their recorded command line sets.

    The input layer alone has a bias, and its gradient keeps its mean. Biases and the classifier learn at a quarter of
    the rate of kernels and scales.
    """
    layer = partial(_mean_shift, scaling=scaling)
    return Method(
        label,
        partial(layer, projection=projection),
        partial(layer, projection=0.0, bias=True),
        partial(dc.MapNoise, noise) if noise else nn.Identity,
        _zero_mean_ if zero_mean else _uniform_,
        calibrated=calibrated,
        unity_decay=unity_decay,
        bias_rate=0.25,
    )


METHODS = {
    "none": Method("no norm", partial(_ConvNorm, None)),
    "batch_norm": Method("Batch Norm", partial(_ConvNorm, nn.BatchNorm2d)),
    "group_norm": Method("Group Norm", partial(_ConvNorm, _group_norm)),
    "instance_norm": Method("Instance Norm", partial(_ConvNorm, _instance_norm)),
    "gradient_centralization": Method("Gradient Centralization", partial(_ConvNorm, None), centralized=True),
    "deep_control": Method("Deep Control", _deep_control, calibrated=True),
    "deep_control_uncalibrated": Method("Deep Control, not calibrated", _deep_control),
    # Both at once: the kernels, gradients, noise and rates of the one in the layers of the other.
    "deep_control_mean_shift": replace(
        _mean_shift_rejection("Deep Control + MSR"),
        layer=partial(_deep_control_mean_shift, projection=0.9),
        input_layer=_deep_control_mean_shift,
    ),
    "mean_shift_rejection": _mean_shift_rejection("Mean Shift Rejection"),
    "mean_shift_rejection_calibrated": _mean_shift_rejection("MSR, calibrated", calibrated=True),
    "mean_shift_rejection_zero_mean_off": _mean_shift_rejection("MSR, start not zero-mean", zero_mean=False),
    "mean_shift_rejection_projection_off": _mean_shift_rejection("MSR, gradients not projected", projection=0.0),
    "mean_shift_rejection_noise_off": _mean_shift_rejection("MSR, no noise", noise=0.0),
    "mean_shift_rejection_scaling_off": _mean_shift_rejection("MSR, kernels not scaled", scaling=None),
    "mean_shift_rejection_unity_decay_off": _mean_shift_rejection("MSR, no unity decay", unity_decay=0.0),
    # What small kernels alone do: their start and scale, and nothing against the mean.
    "mean_shift_rejection_all_off": _mean_shift_rejection(
        "scaled kernels alone", zero_mean=False, projection=0.0, noise=0.0, unity_decay=0.0
    ),
}
# Those of the package and what they are compared with; the rest are for the comparison of ingredients.
MAIN_METHODS = ("batch_norm", "deep_control", "mean_shift_rejection", "none")
