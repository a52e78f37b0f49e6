"""Residual networks (He et al., arXiv 1512.03385) made from a layer that the caller chooses; so no norm is special.

A layer is what stands for convolution, norm, sum and activation: ``layer(in_channels, out_channels, kernel_size,
stride, activation)`` makes a module whose ``forward(x, residual=None)`` maps (N, C, H, W) to (N, O, ceil(H / stride),
ceil(W / stride)); ``activation`` is "relu" or "identity"; ``residual``, of the output's shape, is added ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Layer = Callable[[int, int, int, int, str], nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 layers and a shortcut; ``noise`` acts on what both of them take."""

    expansion = 1

    def __init__(self, layer: Layer, in_channels: int, channels: int, stride: int, noise: nn.Module) -> None:
        super().__init__()
        self.noise = noise
        self.first = layer(in_channels, channels, 3, stride, "relu")
        self.second = layer(channels, channels, 3, 1, "relu")
        self.shortcut = _shortcut(layer, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.noise(x)
        return self.second(self.first(x), residual=self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 layers to ``4 * channels``, and a shortcut; ``noise`` as above."""

    expansion = 4

    def __init__(self, layer: Layer, in_channels: int, channels: int, stride: int, noise: nn.Module) -> None:
        super().__init__()
        self.noise = noise
        self.first = layer(in_channels, channels, 1, 1, "relu")
        self.second = layer(channels, channels, 3, stride, "relu")
        self.third = layer(channels, self.expansion * channels, 1, 1, "relu")
        self.shortcut = _shortcut(layer, in_channels, self.expansion * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.noise(x)
        return self.third(self.second(self.first(x)), residual=self.shortcut(x))


def _shortcut(layer: Layer, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    changes_shape = stride != 1 or in_channels != out_channels
    return layer(in_channels, out_channels, 1, stride, "identity") if changes_shape else nn.Identity()


@dataclass(frozen=True)
class Architecture:
    """A residual network without its layers.

    Args:
        block: what the stages are made of.
        widths: channels of each stage's 3x3 layers; each stage after the first is at half the resolution.
        blocks: blocks of each stage.
        large_images: the input layer is 7x7 at stride 2 and a max pooling follows, as for ImageNet; else it is 3x3.
    """

    block: type[BasicBlock] | type[Bottleneck]
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    large_images: bool = False


NETWORKS = {
    "resnet10": Architecture(BasicBlock, (16, 32), (2, 2)),
    "resnet20": Architecture(BasicBlock, (16, 32, 64), (3, 3, 3)),
    "resnet110": Architecture(BasicBlock, (16, 32, 64), (18, 18, 18)),
    "resnet50": Architecture(Bottleneck, (64, 128, 256, 512), (3, 4, 6, 3), large_images=True),
}


class ResNet(nn.Module):
    """The network of an ``Architecture``: images (N, channels, H, W) to logits (N, classes).

    Args:
        architecture: one of ``NETWORKS`` or another.
        layer: makes every convolutional layer but the first.
        input_layer: makes the first; None: ``layer`` does.
        noise: makes the module at the input of each block, ahead of the split into layers and shortcut.
        channels, classes: of the images, of the logits.
    """

    def __init__(
        self,
        architecture: Architecture,
        layer: Layer,
        input_layer: Layer | None = None,
        noise: Callable[[], nn.Module] = nn.Identity,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        width = architecture.widths[0]
        kernel_size, stride = (7, 2) if architecture.large_images else (3, 1)
        self.input = (input_layer or layer)(channels, width, kernel_size, stride, "relu")
        self.pool = nn.MaxPool2d(3, 2, 1) if architecture.large_images else nn.Identity()
        blocks = []
        for stage, (channels, count) in enumerate(zip(architecture.widths, architecture.blocks, strict=True)):
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(architecture.block(layer, width, channels, stride, noise()))
                width = channels * architecture.block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.pool(self.input(images))).mean((2, 3)))
