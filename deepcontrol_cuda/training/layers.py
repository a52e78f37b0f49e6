"""Times layers of a ResNet-50, each as convolution + ReLU, with Batch Norm between them and with Deep Control."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..modules import DeepControlConv2d
from ..timing import Shape, Step, interleaved

LAYERS = ("conv + ReLU", "conv + BN + ReLU", "conv + Deep Control + ReLU")
PASSES = ("inference", "training")
TOLERANCE = 1e-5

# The convolutions of the residual blocks of ResNet-50 (arXiv 1512.03385, table 1) at stride 1.
RESNET50 = (
    Shape(64, 64, 3, 56),
    Shape(64, 256, 1, 56),
    Shape(128, 128, 3, 28),
    Shape(256, 256, 3, 14),
    Shape(1024, 256, 1, 14),
    Shape(512, 2048, 1, 7),
)


@dataclass(frozen=True)
class Timing:
    """What one shape in one of ``PASSES`` gave, by the names in ``LAYERS``.

    ``milliseconds`` are medians, ``spreads`` the distances between the quartiles over the medians, ``errors`` relative
    to float64 (``Step.errors``), the largest of each layer.
    """

    shape: str
    mode: str
    milliseconds: dict[str, float]
    spreads: dict[str, float]
    errors: dict[str, float]


def measure(shape: Shape, batch_size: int, rounds: int) -> Iterator[Timing]:
    """Check, then time the layers in float32 and channels_last, one after the other in every round.

    "inference" is ``eval()`` without recording gradients; "training" is forward and backward in ``train()``, with
    gradients for the input and every parameter. Raises ``RuntimeError`` if a layer's error exceeds ``TOLERANCE``.
    """
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, shape.in_channels, shape.size, shape.size)
    x = torch.randn(size, generator=generator).to(memory_format=torch.channels_last)
    layers = _layers(shape)
    for mode in PASSES:
        grad = None
        if mode == "training":
            grad = torch.randn((batch_size, shape.out_channels, *size[2:]), generator=generator)
            grad = grad.to(memory_format=torch.channels_last)
        steps = {name: Step(layer.train(mode == "training"), x, grad) for name, layer in layers.items()}
        errors = {name: max(step.errors().values()) for name, step in steps.items()}
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise RuntimeError(f"{name} at {shape} ({mode}): error {error:.1e}, wanted at most {TOLERANCE:.0e}")
        times = interleaved(steps, rounds)
        milliseconds = {name: 1e3 * t.median for name, t in times.items()}
        yield Timing(str(shape), mode, milliseconds, {name: t.spread for name, t in times.items()}, errors)


def _layers(shape: Shape) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    conv = nn.Conv2d(**shape.geometry, bias=False)
    deep_control = DeepControlConv2d(**shape.geometry, activation="relu")
    with torch.no_grad():
        deep_control.weight.copy_(conv.weight)
    modules = (
        nn.Sequential(conv, nn.ReLU()),
        nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(shape.out_channels), nn.ReLU()),
        deep_control,
    )
    return {n: m.to(memory_format=torch.channels_last) for n, m in zip(LAYERS, modules, strict=True)}
