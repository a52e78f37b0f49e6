"""Convolution layers on a GPU: ours in two passes against its peers, and the passes of the bare convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepcontrol_cuda import backends
from deepcontrol_cuda.timing import Shape, Step, Times

from . import peers, runner
from .cases import SETS
from .clock import Clock, race
from .runner import Accuracy, Setting

LAYERS = ("conv_relu", "conv_bn_relu", "ours")
# Where layers are only checked: every path of the ops is taken, with ends that are no whole vectors.
CHECKED = (Shape(16, 24, 3, 9), Shape(19, 33, 1, 7), Shape(8, 16, 3, 10, stride=2, groups=2))


@dataclass(frozen=True)
class Row:
    """Seconds by peer, and errors of ours by result, of one shape; ``conv...`` is cuDNN's convolution alone."""

    setting: Setting
    shape: str
    batch: int
    times: dict[str, Times]
    accuracies: dict[str, Accuracy]

    def ratio(self, peer: str, to: str) -> float:
        return self.times[peer].median / self.times[to].median


def timed() -> list[tuple[Shape, Setting]]:
    """What is timed, the required ones first."""
    required = Setting("bfloat16", "channels_last", "forward"), Setting("bfloat16", "channels_last", "training")
    found = [(shape, setting) for shape in SETS["resnet50_all"] for setting in required]
    others = [("float16", "channels_last"), ("float32", "channels_last"), ("bfloat16", "contiguous")]
    for dtype, layout in others:
        found += [(shape, Setting(dtype, layout, "training")) for shape in SETS["resnet50"]]
    return found


class _Operands:
    """Random input, gradient of the output, and layers with the same kernels."""

    def __init__(self, shape: Shape, setting: Setting, batch: int, device: str):
        self.shape, self.device = shape, device
        self.dtype = getattr(torch, setting.dtype)
        self.format = torch.channels_last if setting.layout == "channels_last" else torch.contiguous_format
        self.training = setting.mode == "training"
        self.batch = batch
        self.generator = torch.Generator(device).manual_seed(1)

    def maps(self, channels: int, size: int) -> Tensor:
        shape = (self.batch, channels, size, size)
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.to(self.dtype, memory_format=self.format)

    def input(self) -> Tensor:
        return self.maps(self.shape.in_channels, self.shape.size)

    def grad_output(self) -> Tensor | None:
        return self.maps(self.shape.out_channels, self.shape.out_size) if self.training else None

    def layer(self, name: str) -> nn.Module:
        layer = peers.build(name, self.shape, self.dtype, self.format).to(self.device)
        # Vectors beside float64 are float64 too.
        return layer.double() if self.dtype == torch.float64 else layer


def check(shape: Shape, setting: Setting, batch: int, backend: str, device: str) -> dict[str, Accuracy]:
    """Errors of ours against float64, with the budgets of ``runner.check``; raises ``WrongResultError``."""
    operands = _Operands(shape, setting, batch, device)
    step = Step(operands.layer("ours"), operands.input(), operands.grad_output(), not shape.reads_image)
    with backends.use(backend):
        return runner.check(step, f"ours at {shape}, {setting}")


def measure(shape: Shape, setting: Setting, batch: int, backend: str, clock: Clock, rounds: int) -> Row:
    """Check ours, then time it and its peers; raises ``WrongResultError``."""
    accuracies = check(shape, setting, batch, backend, clock.device)
    operands = _Operands(shape, setting, batch, clock.device)
    maps = shape.in_channels * shape.size**2 + shape.out_channels * shape.out_size**2
    sets = min(8, max(2, math.ceil(4 * clock.cache_bytes / (batch * maps * operands.dtype.itemsize))))
    inputs = [(operands.input(), operands.grad_output()) for _ in range(sets)]
    contestants = {name: list(_layer_calls(operands.layer(name), shape, inputs)) for name in LAYERS}
    contestants |= _bare_calls(operands.layer("conv").weight.detach(), shape, inputs)
    with (
        backends.use(backend),
        # Each convolution by cuDNN's fastest way, which it finds in the first, untimed calls.
        torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True),
    ):
        times = race(clock, contestants, rounds)
    return Row(setting, str(shape), batch, times, accuracies)


Inputs = list[tuple[Tensor, Tensor | None]]


def _layer_calls(layer: nn.Module, shape: Shape, inputs: Inputs) -> Iterator[Callable[[], object]]:
    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(x)

    def training(x: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
        leaves = [*layer.parameters(), *([] if shape.reads_image else [x])]
        output = layer(x)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    for x, grad_output in inputs:
        if grad_output is None:
            yield partial(forward, x)
        else:
            yield partial(training, x.detach().requires_grad_(not shape.reads_image), grad_output)


def _bare_calls(weight: Tensor, shape: Shape, inputs: Inputs) -> dict[str, list[Callable[[], object]]]:
    """cuDNN's convolution alone: forward, or the gradients of its input and of its weight."""
    stride, padding = shape.stride, shape.kernel_size // 2
    if inputs[0][1] is None:
        return {"conv": [partial(F.conv2d, x, weight, None, stride, padding, 1, shape.groups) for x, _ in inputs]}

    def backward(x: Tensor, grad_output: Tensor, mask: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], shape.groups, mask
        )

    masks = {"conv_weight_grad": [False, True, False]}
    if not shape.reads_image:
        masks["conv_input_grad"] = [True, False, False]
    return {name: [partial(backward, x, g, mask) for x, g in inputs] for name, mask in masks.items()}
