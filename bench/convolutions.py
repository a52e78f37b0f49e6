"""Convolution layers on a GPU: ours by every backend against its peers, and the passes of the bare convolution."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepcontrol_cuda import backends, measured
from deepcontrol_cuda.timing import Shape, Step, Times

from . import peers, runner
from .cases import SETS
from .clock import Clock, race
from .rows import Accuracy
from .runner import WrongResultError

PEERS = ("conv_relu", "conv_bn_relu")
# Where layers are only checked: every path of the ops is taken, with ends that are no whole vectors.
CHECKED = (
    Shape(16, 24, 3, 9),
    Shape(19, 33, 1, 7),
    Shape(8, 16, 3, 10, stride=2, groups=2),
    Shape(64, 128, 3, 14),
    Shape(128, 64, 1, 14, stride=2),
    Shape(3, 64, 7, 32, stride=2),
    Shape(32, 32, 3, 14, groups=32),
)


@dataclass(frozen=True)
class Setting:
    """``mode`` is "forward" or "training", forward and backward timed together."""

    dtype: str
    layout: str
    mode: str

    def __str__(self) -> str:
        return f"{self.dtype}, {self.layout}, {self.mode}"


Inputs = list[tuple[Tensor, Tensor | None]]
Calls = dict[str, list[Callable[[], object]]]


@dataclass(frozen=True)
class Row:
    """Seconds by contestant of one shape, and errors of ours by backend and result.

    Contestants are ``PEERS``, the layer of each backend under the backend's name, and passes of the convolution alone:
    ``conv...`` is cuDNN's; behind a backend's name stands its own, the weight's gradient with projection.
    """

    setting: Setting
    shape: str
    layer: str
    """As in ``measured.Time``."""
    batch: int
    times: dict[str, Times]
    accuracies: dict[str, dict[str, Accuracy]]
    wrong: dict[str, str]
    """What was wrong by backend; those were not timed."""

    def ratio(self, contestant: str, to: str) -> float:
        return self.times[contestant].median / self.times[to].median


@dataclass(frozen=True)
class Algorithms:
    """One shape by each algorithm of a backend that takes it; ``times`` of the forward pass have cuDNN's ``conv``."""

    backend: str
    setting: Setting
    shape: str
    layer: str
    """As in ``measured.Time``."""
    batch: int
    bytes: int
    """Of the forward pass, at least, and its ``operations``: two for a multiply-add."""
    operations: int
    times: dict[str, Times]
    accuracies: dict[str, dict[str, Accuracy]]
    wrong: dict[str, str]
    """What was wrong by algorithm; those were not timed."""
    refused: dict[str, str]
    """Why the others do not take it."""


def algorithms(backend: str) -> tuple[str, ...]:
    """What a backend can be told to do for a convolution; none if there is no choice."""
    # The CPU's ops may lie in one namespace with CUDA's.
    chooses = hasattr(getattr(torch.ops, backends._compiled[backend].namespace), "prefer_algorithm")
    return tuple(backends.ALGORITHMS["cuda"]) if chooses and backend != "cpu" else ()


def timed() -> list[tuple[Shape, Setting, int]]:
    """What is timed and at which batch, the required ones first."""
    required = Setting("bfloat16", "channels_last", "forward"), Setting("bfloat16", "channels_last", "training")
    found = [(shape, mode, batch) for batch in (64, 256) for shape in SETS["resnet50_all"] for mode in required]
    depthwise = [shape for shape in SETS["mobilenet_v2"] if shape.groups > 1]
    found += [(shape, mode, 256) for shape in depthwise for mode in required]
    others = [("float16", "channels_last"), ("float32", "channels_last"), ("bfloat16", "contiguous")]
    for dtype, layout in others:
        found += [(shape, Setting(dtype, layout, "training"), 64) for shape in SETS["resnet50"]]
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


def check(
    shape: Shape, setting: Setting, batch: int, backend: str, device: str, algorithm: str | None = None
) -> dict[str, Accuracy]:
    """Errors of ours against float64, with the budgets of ``runner.check``; raises ``WrongResultError``.

    ``RefusedError`` tells that the algorithm does not take the layer.
    """
    operands = _Operands(shape, setting, batch, device)
    step = Step(operands.layer("ours"), operands.input(), operands.grad_output(), not shape.reads_image)
    what = f"ours at {shape}, {setting}" + (f", by {algorithm!r}" if algorithm else "")
    try:
        with _chosen(backend, algorithm):
            return runner.check(step, what)
    except RuntimeError as error:
        refused = re.match(r"algorithm '[^']+': ([^\n]*)", str(error))
        if refused is None:
            raise
        raise RefusedError(refused[1]) from error


class RefusedError(RuntimeError):
    """An algorithm does not take a layer."""


def _chosen(backend: str, algorithm: str | None) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(backends.use(backend))
    if algorithm is not None:
        stack.enter_context(backends.prefer(algorithm, backend))
    return stack


def measure(shape: Shape, setting: Setting, batch: int, names: Sequence[str], clock: Clock, rounds: int) -> Row:
    """Check ours by the backends ``names``, then time those that are right, and the peers."""
    accuracies, wrong = {}, {}
    for name in names:
        try:
            accuracies[name] = check(shape, setting, batch, name, clock.device)
        except WrongResultError as error:
            wrong[name] = str(error)
    operands = _Operands(shape, setting, batch, clock.device)
    inputs = _inputs(operands, clock)
    contestants = {name: list(_layer_calls(operands.layer(name), shape, inputs)) for name in PEERS}
    weight = operands.layer("conv").weight.detach()
    contestants |= _bare_calls(weight, shape, inputs)
    for name in accuracies:
        contestants[name] = [_by(name, None, call) for call in _layer_calls(operands.layer("ours"), shape, inputs)]
        contestants |= _own_bare_calls(name, weight, shape, inputs)
    times = _race(clock, contestants, rounds)
    return Row(setting, str(shape), _place(shape), batch, times, accuracies, wrong)


def measure_algorithms(
    shape: Shape, setting: Setting, batch: int, backend: str, clock: Clock, rounds: int
) -> Algorithms:
    """Check ours by each algorithm that takes the layer, then time those that are right."""
    accuracies, wrong, refused = {}, {}, {}
    for name in algorithms(backend):
        try:
            accuracies[name] = check(shape, setting, batch, backend, clock.device, name)
        except RefusedError as error:
            refused[name] = str(error)
        except WrongResultError as error:
            wrong[name] = str(error)
    operands = _Operands(shape, setting, batch, clock.device)
    inputs = _inputs(operands, clock)
    contestants = {}
    if setting.mode == "forward":
        contestants |= _bare_calls(operands.layer("conv").weight.detach(), shape, inputs)
    for name in accuracies:
        calls = _layer_calls(operands.layer("ours"), shape, inputs)
        contestants[name] = [_by(backend, name, call) for call in calls]
    times = _race(clock, contestants, rounds)
    counts = bytes_and_operations(shape, operands.dtype, batch)
    return Algorithms(
        backend, setting, str(shape), _place(shape), batch, *counts, times, accuracies, wrong, refused
    )  # fmt: skip


def bytes_and_operations(shape: Shape, dtype: torch.dtype, batch: int) -> tuple[int, int]:
    """Of the forward pass with ReLU: every tensor moved once, and a bit for each element of the output."""
    input = batch * shape.in_channels * shape.size**2
    output = batch * shape.out_channels * shape.out_size**2
    of_filter = shape.in_channels // shape.groups * shape.kernel_size**2
    moved = (input + shape.out_channels * of_filter + output) * dtype.itemsize + output // 8
    return moved, 2 * output * of_filter


def _place(shape: Shape) -> str:
    kernel, stride = (shape.kernel_size,) * 2, (shape.stride,) * 2
    return measured.layer(kernel, shape.in_channels, shape.out_channels, stride, shape.groups)


def _race(clock: Clock, contestants: Calls, rounds: int) -> dict[str, Times]:
    # Each convolution by cuDNN's fastest way, which it finds in the first, untimed calls.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        return race(clock, contestants, rounds)


def _by(backend: str, algorithm: str | None, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with _chosen(backend, algorithm):
            return call()

    return run


def _inputs(operands: _Operands, clock: Clock) -> Inputs:
    """As many as the cache cannot hold all of."""
    shape = operands.shape
    maps = shape.in_channels * shape.size**2 + shape.out_channels * shape.out_size**2
    sets = min(8, max(2, math.ceil(4 * clock.cache_bytes / (operands.batch * maps * operands.dtype.itemsize))))
    return [(operands.input(), operands.grad_output()) for _ in range(sets)]


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


_MASKS = {"weight_grad": [False, True], "input_grad": [True, False]}


def _passes(shape: Shape) -> Sequence[str]:
    return ("weight_grad",) if shape.reads_image else tuple(_MASKS)


def _bare_calls(weight: Tensor, shape: Shape, inputs: Inputs) -> Calls:
    """cuDNN's convolution alone: forward, or the gradients of its input and of its weight."""
    stride, padding = shape.stride, shape.kernel_size // 2
    if inputs[0][1] is None:
        return {"conv": [partial(F.conv2d, x, weight, None, stride, padding, 1, shape.groups) for x, _ in inputs]}

    def backward(x: Tensor, grad_output: Tensor, mask: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], shape.groups, mask
        )

    return {
        f"conv_{name}": [partial(backward, x, g, [*_MASKS[name], False]) for x, g in inputs] for name in _passes(shape)
    }


def _own_bare_calls(backend: str, weight: Tensor, shape: Shape, inputs: Inputs) -> Calls:
    """The same gradients by the op of a backend, that of the weight projected; nothing is centred or activated."""
    if inputs[0][1] is None:
        return {}
    op = backends.ops[backend].conv_center_backward
    nothing = weight.new_empty(0)
    geometry = ([shape.stride] * 2, [shape.kernel_size // 2] * 2, [1, 1], shape.groups)

    def backward(x: Tensor, grad_output: Tensor, mask: list[bool]) -> object:
        everything = (grad_output, x, weight, None, None, 0.0, nothing, nothing, *geometry, "identity", 0.0, 0.9)
        return op(*everything, [*mask, False, False, False, False])

    return {f"{backend}_{name}": [partial(backward, x, g, _MASKS[name]) for x, g in inputs] for name in _passes(shape)}
