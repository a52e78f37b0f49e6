"""The shapes of convolutions that are timed."""

from __future__ import annotations

from deepcontrol_cuda.timing import Shape


def _resnet50_stages() -> list[tuple[list[Shape], list[Shape]]]:
    """Of each stage (arXiv 1512.03385, table 1) its 3x3 and its expanding 1x1 convolution, then all it has.

    The stride of a stage is in its first 3x3 convolution, as torchvision has it.
    """
    stages = []
    channels = 64
    for width, size, stride in ((64, 56, 1), (128, 28, 2), (256, 14, 2), (512, 7, 2)):
        before, wide = size * stride, 4 * width
        spatial, expand = Shape(width, width, 3, size), Shape(width, wide, 1, size)
        first_block = [
            Shape(channels, width, 1, before),
            Shape(width, width, 3, before, stride),
            expand,
            Shape(channels, wide, 1, before, stride),
        ]
        stages.append(([spatial, expand], [*first_block, Shape(wide, width, 1, size), spatial]))
        channels = wide
    return stages


def _mobilenet_v2() -> list[Shape]:
    """Every convolution of MobileNetV2 (arXiv 1801.04381, table 2), in order."""
    shapes = [Shape(3, 32, 3, 224, 2)]
    channels, size = 32, 112
    for expansion, out_channels, blocks, first_stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for stride in (first_stride, *[1] * (blocks - 1)):
            hidden = expansion * channels
            if expansion > 1:
                shapes.append(Shape(channels, hidden, 1, size))
            shapes.append(Shape(hidden, hidden, 3, size, stride, groups=hidden))
            size //= stride
            shapes.append(Shape(hidden, out_channels, 1, size))
            channels = out_channels
    return [*shapes, Shape(320, 1280, 1, 7)]


def _vgg16() -> list[Shape]:
    """Every convolution of VGG-16 (arXiv 1409.1556, table 1, D), in order."""
    shapes = []
    channels, size = 3, 224
    for width, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            shapes.append(Shape(channels, width, 3, size))
            channels = width
        size //= 2
    return shapes


def _resnet20() -> list[Shape]:
    """Every convolution of ResNet-20 for CIFAR-10 (arXiv 1512.03385, section 4.2), in order."""
    shapes = [Shape(3, 16, 3, 32)]
    channels, size = 16, 32
    for width in (16, 32, 64):
        stride = width // channels
        shapes += [Shape(channels, width, 3, size, stride), *[Shape(width, width, 3, size // stride)] * 5]
        channels, size = width, size // stride
    return shapes


_STAGES = _resnet50_stages()
_EIGHT = tuple(shape for few, _ in _STAGES for shape in few)
_REST = (Shape(3, 64, 7, 224, 2), *(shape for _, every in _STAGES for shape in every))

SETS: dict[str, tuple[Shape, ...]] = {
    "resnet50": _EIGHT,
    "resnet50_all": tuple(dict.fromkeys((*_EIGHT, *_REST))),
    "mobilenet_v2": tuple(dict.fromkeys(_mobilenet_v2())),
    "vgg16": tuple(dict.fromkeys(_vgg16())),
    "resnet20": tuple(dict.fromkeys(_resnet20())),
}
"""``resnet50`` is the eight shapes of the targets; ``resnet50_all`` adds the others of the network, so that anyone can
see whether the eight were picked for their result. Every shape is timed with ReLU, whatever follows it in its network.
"""
