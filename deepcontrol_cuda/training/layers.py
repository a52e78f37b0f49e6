"""Times layers of a ResNet-50, each as convolution + ReLU, with Batch Norm between them and with Deep Control."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import backends
from ..modules import DeepControlConv2d

LAYERS = ("conv + ReLU", "conv + BN + ReLU", "conv + Deep Control + ReLU")
PASSES = ("inference", "training")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shape:
    in_channels: int
    out_channels: int
    kernel_size: int
    size: int

    def __str__(self) -> str:
        k = self.kernel_size
        return f"{k}x{k}, {self.in_channels} to {self.out_channels}, {self.size}x{self.size}"


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
    to float64.
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
        grad = torch.randn((batch_size, shape.out_channels, *size[2:]), generator=generator)
        grad = grad.to(memory_format=torch.channels_last)
        step = _inference if mode == "inference" else _training
        for layer in layers.values():
            layer.train(mode == "training")
        errors = {name: _error(layer, x, grad, step) for name, layer in layers.items()}
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise RuntimeError(f"{name} at {shape} ({mode}): error {error:.1e}, wanted at most {TOLERANCE:.0e}")
        calls = {name: partial(step, layer, x, grad) for name, layer in layers.items()}
        yield Timing(str(shape), mode, *_medians_and_spreads(calls, rounds), errors)


def _layers(shape: Shape) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    geometry = (shape.in_channels, shape.out_channels, shape.kernel_size)
    padding = shape.kernel_size // 2
    conv = nn.Conv2d(*geometry, padding=padding, bias=False)
    deep_control = DeepControlConv2d(*geometry, padding=padding, activation="relu")
    with torch.no_grad():
        deep_control.weight.copy_(conv.weight)
    modules = (
        nn.Sequential(conv, nn.ReLU()),
        nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(shape.out_channels), nn.ReLU()),
        deep_control,
    )
    return {n: m.to(memory_format=torch.channels_last) for n, m in zip(LAYERS, modules, strict=True)}


def _inference(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [layer(x)]


def _training(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad)]


def _error(layer: nn.Module, x: Tensor, grad: Tensor, step: Callable) -> float:
    """Largest relative error, in the Euclidean norm, of output and gradients against the same layer in float64."""
    exact_layer = copy.deepcopy(layer).double()
    with backends.use("reference"), torch.no_grad():
        exact_out = exact_layer(x.double())
    with torch.no_grad():
        # Where rounding puts an output on the other side of ReLU's kink the gradients differ by right.
        grad = grad * ((layer(x) > 0) == (exact_out > 0))
    with backends.use("reference"):
        exact = step(exact_layer, x.double(), grad.double())
    pairs = zip(step(layer, x, grad), exact, strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def _medians_and_spreads(
    calls: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for call in calls.values():
        call()
    for turn in range(rounds):
        # Each goes first equally often, so that none always inherits the same neighbour's cache.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    medians = {name: 1e3 * q[1] for name, q in quartiles.items()}
    return medians, {name: (q[2] - q[0]) / q[1] for name, q in quartiles.items()}
