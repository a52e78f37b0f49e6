"""A small ResNet in plain ``torch.nn``, written as one would without knowing of this package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(out_channels)]


class BasicBlock(nn.Module):
    """``relu(conv_bn(relu(conv_bn(x))) + shortcut(x))``: (N, C, H, W) to (N, O, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_conv_bn(in_channels, out_channels, 3, stride), nn.ReLU())
        self.second = nn.Sequential(*_conv_bn(out_channels, out_channels, 3))
        changes_shape = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Sequential(*(_conv_bn(in_channels, out_channels, 1, stride) if changes_shape else []))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """Basic blocks in stages, each stage after the first at half the resolution (He et al., arXiv 1512.03385).

    Depth, counted as in that paper, is ``2 + 2 * blocks * len(widths)``.

    Args:
        widths: channels of each stage.
        blocks: basic blocks of each stage.
        classes: width of the output.

    ``forward`` maps images (N, 1, H, W) to logits (N, classes).
    """

    def __init__(self, widths: Sequence[int] = (16, 32), blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(1, widths[0], 3), nn.ReLU())
        layers = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(channels, width, stride=2 if stage and not block else 1))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
