"""Blocks and networks with Batch Norm, from which those with other norms and ours are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """As it is mostly written: one ReLU module called three times, and a sum in place (arXiv 1512.03385, figure 5)."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != 4 * channels:
            conv = nn.Conv2d(in_channels, 4 * channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class InvertedResidual(nn.Module):
    """arXiv 1801.04381, figure 4: expand, depthwise, project; no activation behind the last."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, expansion: int = 6) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [] if expansion == 1 else _conv_bn_relu6(in_channels, hidden, 1)
        self.layers = nn.Sequential(
            *expand,
            *_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def _conv_bn_relu6(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True)]


def double_conv3d(in_channels: int, out_channels: int) -> nn.Sequential:
    """arXiv 1606.06650, figure 2: half the channels first."""
    layers: list[nn.Module] = []
    for before, after in ((in_channels, out_channels // 2), (out_channels // 2, out_channels)):
        layers += [nn.Conv3d(before, after, 3, padding=1, bias=False), nn.BatchNorm3d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """arXiv 1606.06650, figure 2, with half its channels and three levels of resolution."""

    def __init__(self, in_channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.down1, self.down2 = double_conv3d(in_channels, 32), double_conv3d(32, 64)
        self.bottom = double_conv3d(64, 128)
        self.up2, self.up1 = nn.ConvTranspose3d(128, 128, 2, 2), nn.ConvTranspose3d(64, 64, 2, 2)
        self.join2, self.join1 = double_conv3d(64 + 128, 64), double_conv3d(32 + 64, 32)
        self.pool = nn.MaxPool3d(2)
        self.classifier = nn.Conv3d(32, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(self.pool(fine))
        out = self.bottom(self.pool(middle))
        out = self.join2(torch.cat([middle, self.up2(out)], 1))
        return self.classifier(self.join1(torch.cat([fine, self.up1(out)], 1)))


def resnet50() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    width = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            layers.append(Bottleneck(width, 64 << stage, 2 if stage and not index else 1))
            width = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def mobilenet_v2() -> nn.Sequential:
    """arXiv 1801.04381, table 2, without dropout."""
    layers = _conv_bn_relu6(3, 32, 3, 2)
    width = 32
    for expansion, channels, count, first_stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for index in range(count):
            layers.append(InvertedResidual(width, channels, 1 if index else first_stride, expansion))
            width = channels
    layers += _conv_bn_relu6(320, 1280, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


@dataclass(frozen=True)
class Network:
    """What ``make`` makes takes (N, *input)."""

    name: str
    make: Callable[[], nn.Module]
    input: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}, {'x'.join(map(str, self.input))}"

    def build(self) -> nn.Module:
        """Batch Norm's model in ``train()``, He initialised, the same for every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.make()
            for module in network.modules():
                if isinstance(module, nn.modules.conv._ConvNd):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return network.train()

    def random_input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input, generator=torch.Generator().manual_seed(1))

    def memory_format(self, layout: str) -> torch.memory_format:
        if layout == "contiguous":
            return torch.contiguous_format
        return torch.channels_last_3d if len(self.input) == 4 else torch.channels_last


BLOCKS = (
    Network("bottleneck", lambda: Bottleneck(256, 64), (256, 56, 56)),
    Network("inverted residual", lambda: InvertedResidual(32, 32), (32, 28, 28)),
    Network("3D double convolution", lambda: double_conv3d(32, 64), (32, 16, 32, 32)),
)
"""The first bottleneck with a plain residual of ResNet-50, such a block of MobileNetV2, the second of a 3D U-Net."""


def models(size: int, depth: int) -> tuple[Network, ...]:
    """Of images of ``size`` pixels a side and volumes of ``depth`` voxels a side."""
    return (
        Network("ResNet-50", resnet50, (3, size, size)),
        Network("MobileNetV2", mobilenet_v2, (3, size, size)),
        Network("3D U-Net", UNet3d, (1, depth, depth, depth)),
    )


MODELS = tuple(network.name for network in models(224, 32))
