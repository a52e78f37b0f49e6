"""What the demo and the benchmark share: a convolution's shape, a step of a layer, its error, and a fair clock."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import backends


@dataclass(frozen=True)
class Shape:
    """A convolution of square maps of ``size`` pixels a side, padded by half its kernel."""

    in_channels: int
    out_channels: int
    kernel_size: int
    size: int
    stride: int = 1
    groups: int = 1

    @property
    def geometry(self) -> dict[str, int]:
        """The arguments of ``nn.Conv2d``, but the bias."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.kernel_size // 2,
            "groups": self.groups,
        }

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel_size // 2) - self.kernel_size) // self.stride + 1

    @property
    def reads_image(self) -> bool:
        """Whether this is a network's first layer, whose input needs no gradient."""
        return self.in_channels == 3

    def __str__(self) -> str:
        k = self.kernel_size
        parts = [f"{k}x{k}", f"{self.in_channels} to {self.out_channels}", f"{self.size}x{self.size}"]
        if self.stride > 1:
            parts.append(f"stride {self.stride}")
        if self.groups > 1:
            parts.append("depthwise" if self.groups == self.in_channels else f"{self.groups} groups")
        return ", ".join(parts)


class Step:
    """One call of ``layer``: forward without recording or, given ``grad_output``, forward and backward.

    Backward leaves gradients in the parameters and, unless ``input_grad`` is False, in the input.
    """

    def __init__(self, layer: nn.Module, x: Tensor, grad_output: Tensor | None = None, input_grad: bool = True) -> None:
        self.layer = layer
        self.grad_output = grad_output
        self.input_grad = input_grad
        self.x = x.detach().requires_grad_(grad_output is not None and input_grad)

    def __call__(self) -> Tensor:
        if self.grad_output is None:
            with torch.no_grad():
                return self.layer(self.x)
        output = self.layer(self.x)
        output.backward(self.grad_output)
        return output

    def clear_gradients(self) -> None:
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)

    def results(self) -> dict[str, Tensor]:
        """The output and, after a backward, every gradient."""
        self.clear_gradients()
        tensors = {"output": self().detach()}
        if self.x.requires_grad:
            tensors["gradient of input"] = self.x.grad
        if self.grad_output is not None:
            tensors |= {f"gradient of {name}": p.grad for name, p in self.layer.named_parameters()}
        self.clear_gradients()
        return tensors

    def errors(self) -> dict[str, float]:
        """Error of each of ``results`` against the same step of the reference in float64, relative.

        Of the output the largest deviation over the largest value, so that no element can be wrong unseen. Of a
        gradient the deviation's Euclidean norm over the gradient's. Where rounding puts an output on the other side of
        ReLU's kink than float64 does, two gradients that are both right differ by the whole of ``grad_output``; a few
        such elements would hide every other error in 16 bits, so ``grad_output`` is zero there, for both.
        """
        layer, x = copy.deepcopy(self.layer).double(), self.x.detach().double()
        grad_output = self.grad_output
        if grad_output is not None:
            with backends.use("reference"):
                exact_output = Step(layer, x)()
            grad_output = grad_output * ((Step(self.layer, self.x)() > 0) == (exact_output > 0))
        got = Step(self.layer, self.x, grad_output, self.input_grad).results()
        with backends.use("reference"):
            exact_grad_output = None if grad_output is None else grad_output.double()
            exact = Step(layer, x, exact_grad_output, self.input_grad).results()
        orders = {name: torch.inf if name == "output" else 2 for name in exact}
        return {name: _relative_error(got[name], exact[name], order) for name, order in orders.items()}


def _relative_error(got: Tensor, exact: Tensor, order: float) -> float:
    norm = torch.linalg.vector_norm
    return (norm(got.double() - exact, order) / norm(exact, order)).item()


@dataclass(frozen=True)
class Times:
    """Seconds that repeated calls took."""

    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        return (self.upper_quartile - self.lower_quartile) / self.median


def interleaved(
    steps: Mapping[str, Step], repeats: int, progress: Callable[[], object] = lambda: None
) -> dict[str, Times]:
    """Time every step ``repeats`` times (at least twice), all of them in every round; ``progress`` follows each round.

    A slow spell of the machine so falls on all alike. Gradients are dropped between the calls, off the clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step.clear_gradients()
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in range(repeats):
        # A new order every time, so that none always inherits the same neighbour's cache.
        shuffle(order)
        for name in order:
            step = steps[name]
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
            step.clear_gradients()
        progress()
    return {name: summarize(values) for name, values in seconds.items()}


def summarize(seconds: list[float]) -> Times:
    """Quartiles of at least two durations."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Times(median, lower, upper, min(seconds))
