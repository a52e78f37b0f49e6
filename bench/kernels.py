"""The kernels of the package one by one: what each must move, whether it is right, and how it compares with a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepcontrol_cuda import reference
from deepcontrol_cuda._ops import channels_innermost, memory_format, unpack_bits
from deepcontrol_cuda.timing import Times

from .clock import Clock, race
from .rows import Accuracy
from .runner import WrongResultError

DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = ("channels_last", "contiguous")
# Maps of ResNet-50 (arXiv 1512.03385, table 1) behind its convolutions: channels by pixels a side.
RESNET50_MAPS = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
# Its kernels of more than one tap: filters, input channels, taps a side, how many of them.
RESNET50_KERNELS = ((64, 3, 7, 1), (64, 64, 3, 3), (128, 128, 3, 4), (256, 256, 3, 6), (512, 512, 3, 3))


@dataclass(frozen=True)
class Case:
    """One op on maps of one shape, or for the ops on kernels on those of a network."""

    op: str
    variant: str
    dtype: str
    layout: str
    shape: tuple[int, ...] = ()
    """(N, C, H, W)"""

    @property
    def bytes(self) -> int:
        """What must be read and written, each tensor once; sums and vectors, thousandths of it, not counted."""
        return _KINDS[self.op].bytes(self)

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) or "ResNet-50's kernels"
        return f"{self.op}, {self.variant}, {self.dtype}, {self.layout}, {size}"


@dataclass(frozen=True)
class Measured:
    """``seconds`` of the kernel and of a copy that moves as many bytes."""

    case: Case
    accuracy: Accuracy
    bytes: int
    seconds: dict[str, Times] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds["kernel"].median

    @property
    def share_of_copy(self) -> float:
        return self.seconds["copy"].median / self.seconds["kernel"].median


class _Maker:
    """Random tensors of a case."""

    def __init__(self, case: Case, device: str, seed: int):
        self.dtype = getattr(torch, case.dtype)
        self.wide = torch.float32 if self.dtype.itemsize == 2 else self.dtype
        self.channels_last = case.layout == "channels_last"
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def maps(self, shape: Sequence[int]) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=self.wide)
        format = torch.channels_last if self.channels_last else torch.contiguous_format
        return values.to(self.dtype, memory_format=format)

    def vector(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, device=self.device, dtype=self.wide) + 0.5


class _Center:
    op = "center"
    VARIANTS = ("identity", "relu", "relu, residual")

    @classmethod
    def bytes(cls, case: Case) -> int:
        elements, size = math.prod(case.shape), getattr(torch, case.dtype).itemsize
        tensors = 3 if "residual" in case.variant else 2
        return elements * size * tensors + (0 if case.variant == "identity" else _bits(case))

    def __init__(self, case: Case, library, make: _Maker):
        channels = case.shape[1]
        self.run = getattr(library, self.op)
        self.x = make.maps(case.shape)
        self.gain, self.mean_scale, self.bias = (make.vector(channels) for _ in range(3))
        self.residual = make.maps(case.shape) if "residual" in case.variant else None
        self.activation = case.variant.split(",")[0]

    def __call__(self):
        return self.run(self.x, self.gain, self.mean_scale, 1.0, self.bias, self.residual, self.activation, 0.0, True)

    def results(self) -> dict[str, Tensor]:
        output, map_mean, saved, *output_mean = self()
        if self.activation == "relu":
            innermost = channels_innermost(output.shape, memory_format(output))
            if not torch.equal(unpack_bits(saved, output.shape, innermost), output > 0):
                raise WrongResultError(f"{self.op}: the bits that backward needs are not where the output is positive")
        return {"output": output, "map_mean": map_mean} | ({"output_mean": output_mean[0]} if output_mean else {})

    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        residual = None if self.residual is None else self.residual.to(dtype)
        vectors = (vector.to(dtype) for vector in (self.gain, self.mean_scale, self.bias))
        x = self.x.to(dtype)
        output = reference.deep_control(x, *vectors, residual=residual, activation=self.activation)
        return {"output": output, "map_mean": x.mean((2, 3)), "output_mean": output.mean((2, 3))}


class _CenterWithMean(_Center):
    op = "center_with_mean"


class _CenterBackward:
    op = "center_backward"
    VARIANTS = ("relu",)

    @classmethod
    def bytes(cls, case: Case) -> int:
        return 2 * math.prod(case.shape) * getattr(torch, case.dtype).itemsize + _bits(case)

    def __init__(self, case: Case, library, make: _Maker):
        channels = case.shape[1]
        self.run = library.center_backward
        self.x, self.grad = make.maps(case.shape), make.maps(case.shape)
        self.gain, self.mean_scale = make.vector(channels), make.vector(channels)
        forward = library.center(self.x, self.gain, self.mean_scale, 1.0, None, None, "relu", 0.0, True)
        output, self.map_mean, self.saved = forward
        self.shape = output.shape
        self.innermost = channels_innermost(output.shape, memory_format(output))

    def __call__(self):
        # As behind a convolution: the gain's gradient comes from the weight's.
        mask = [True, False, True, True, False]
        return self.run(self.grad, None, self.gain, self.mean_scale, 1.0, self.map_mean, self.saved, "relu", 0.0, mask)

    def results(self) -> dict[str, Tensor]:
        grad_input, _, grad_mean_scale, grad_bias, _ = self()
        return {"grad_input": grad_input, "grad_mean_scale": grad_mean_scale, "grad_bias": grad_bias}

    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        e = self.grad.to(dtype) * unpack_bits(self.saved, self.shape, self.innermost)
        gain, mean_scale = (v.to(dtype).view(1, -1, 1, 1) for v in (self.gain, self.mean_scale))
        grad_input = gain * (e - mean_scale * e.mean((2, 3), keepdim=True))
        scaled_mean = self.map_mean.to(dtype) * self.gain.to(dtype)
        sums = e.sum((2, 3))
        return {"grad_input": grad_input, "grad_mean_scale": -(scaled_mean * sums).sum(0), "grad_bias": sums.sum(0)}


class _WindowMean:
    op = "window_mean"
    VARIANTS = ("3x3",)
    GEOMETRY = ((3, 3), (1, 1), (1, 1), (1, 1))

    @classmethod
    def bytes(cls, case: Case) -> int:
        return math.prod(case.shape) * getattr(torch, case.dtype).itemsize

    def __init__(self, case: Case, library, make: _Maker):
        self.run = library.window_mean
        self.x = make.maps(case.shape)

    def __call__(self):
        return self.run(self.x, *self.GEOMETRY)

    def results(self) -> dict[str, Tensor]:
        return {"means": self()}

    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"means": reference.window_mean(self.x.to(dtype), *self.GEOMETRY)}


class _Kernels:
    """Gradients of ResNet-50's kernels, or of a few small ones where the case has a shape."""

    def __init__(self, case: Case, library, make: _Maker):
        sizes = ((33, 7, 3, 1), (8, 16, 3, 1), (4, 3, 7, 1)) if case.shape else RESNET50_KERNELS
        shapes = [(o, c, k, k) for o, c, k, count in sizes for _ in range(count)]
        self.gradients = [make.maps(shape) for shape in shapes]
        self.before = [gradient.clone() for gradient in self.gradients]

    @classmethod
    def bytes(cls, case: Case) -> int:
        elements = sum(o * c * k * k * count for o, c, k, count in RESNET50_KERNELS)
        return cls.TENSORS * elements * getattr(torch, case.dtype).itemsize


class _Project(_Kernels):
    op = "project_kernel_gradients_"
    VARIANTS = ("weight 0.9",)
    TENSORS = 2

    def __init__(self, case: Case, library, make: _Maker):
        super().__init__(case, library, make)
        self.run = library.project_kernel_gradients_

    def __call__(self):
        self.run(self.gradients, 0.9)

    def results(self) -> dict[str, Tensor]:
        for gradient, before in zip(self.gradients, self.before):
            gradient.copy_(before)
        self()
        return {str(i): gradient for i, gradient in enumerate(self.gradients)}

    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {str(i): reference.project(g.to(dtype), 0.9) for i, g in enumerate(self.before)}


class _FinishWeightGrad(_Kernels):
    op = "finish_weight_grad_"
    VARIANTS = ("gain, projection 0.9",)
    TENSORS = 3

    def __init__(self, case: Case, library, make: _Maker):
        super().__init__(case, library, make)
        self.run = library.finish_weight_grad_
        self.weights = [make.maps(gradient.shape) for gradient in self.gradients]
        self.gains = [make.vector(len(gradient)) for gradient in self.gradients]

    def __call__(self):
        everything = zip(self.gradients, self.weights, self.gains)
        return [self.run(gradient, weight, gain, None, 0.9) for gradient, weight, gain in everything]

    def results(self) -> dict[str, Tensor]:
        for gradient, before in zip(self.gradients, self.before):
            gradient.copy_(before)
        dots = {f"gradient of gain {i}": dot for i, dot in enumerate(self())}
        return dots | {str(i): gradient for i, gradient in enumerate(self.gradients)}

    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        found = {}
        for i, tensors in enumerate(zip(self.before, self.weights, self.gains)):
            before, weight, gain = (tensor.to(dtype) for tensor in tensors)
            found[str(i)], found[f"gradient of gain {i}"] = reference.finish_weight_grad(
                before, weight, gain, None, 0.9
            )
        return found


_KINDS = {
    kind.op: kind for kind in (_Center, _CenterWithMean, _CenterBackward, _WindowMean, _FinishWeightGrad, _Project)
}
OPS = tuple(_KINDS)


def _bits(case: Case) -> int:
    n, c, h, w = case.shape
    return n * h * w * math.ceil(c / 8) if case.layout == "channels_last" else n * c * math.ceil(h * w / 8)


def checks() -> list[Case]:
    """Every op and variant in every dtype and layout, on a shape of whole vectors and on one with odd ends."""
    return [
        Case(op, variant, dtype, layout, shape)
        for op, kind in _KINDS.items()
        for variant in kind.VARIANTS
        for dtype in DTYPES
        for layout in LAYOUTS
        for shape in ((8, 64, 14, 14), (3, 19, 9, 7))
    ]


def timed() -> list[Case]:
    """What is timed on a GPU, the required ones first: bfloat16 in channels_last."""
    required = [case for batch in (64, 256) for case in _timed("bfloat16", "channels_last", batch, RESNET50_MAPS)]
    few = ((64, 112), (256, 56), (512, 28), (256, 14), (2048, 7))
    others = (
        ("bfloat16", "contiguous"),
        ("float32", "channels_last"),
        ("float16", "channels_last"),
        ("float32", "contiguous"),
    )
    kernels = [
        Case(kind.op, kind.VARIANTS[0], dtype, "channels_last")
        for dtype in ("bfloat16", "float32")
        for kind in (_Project, _FinishWeightGrad)
    ]
    return required + kernels + [case for setting in others for case in _timed(*setting, 64, few)]


def of_maps(ops: Sequence[str], dtype: str, layout: str, batch: int, maps: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Every variant of ``ops`` on ``maps``, channels by pixels a side; those on kernels have one case, ResNet-50's."""
    for op in ops:
        kind = _KINDS[op]
        shapes = [()] if issubclass(kind, _Kernels) else [(batch, channels, size, size) for channels, size in maps]
        for shape in shapes:
            for variant in kind.VARIANTS:
                yield Case(op, variant, dtype, layout, shape)


def _timed(dtype: str, layout: str, batch: int, maps: Sequence[tuple[int, int]]) -> Iterator[Case]:
    for channels, size in maps:
        shape = (batch, channels, size, size)
        for kind in (_Center, _CenterWithMean, _CenterBackward, _WindowMean):
            for variant in kind.VARIANTS if kind is not _CenterWithMean else ("relu, residual",):
                yield Case(kind.op, variant, dtype, layout, shape)


def check(case: Case, library, device: str) -> Accuracy:
    """Error of a case, relative to the largest value, against float64; raises ``WrongResultError`` beyond the budget.

    The budget is twice the error of the same in plain PyTorch, plus one unit in the last place (in float64, where plain
    PyTorch is what is compared with, eight).
    """
    return _check(_KINDS[case.op](case, library, _Maker(case, device, 0)), case)


def _check(work, case: Case) -> Accuracy:
    dtype = getattr(torch, case.dtype)
    got, exact, low = work.results(), work.exact(torch.float64), work.exact(dtype)
    units = 8 if dtype == torch.float64 else 1
    worst = Accuracy(0.0, math.inf)
    for name, value in got.items():
        error, reference_error = (_error(tensor, exact[name]) for tensor in (value, low[name]))
        budget = 2 * (reference_error + units * torch.finfo(dtype).eps)
        if not error <= budget:
            raise WrongResultError(f"{case}: error of {name} {error:.1e}, wanted at most {budget:.1e}; it is not timed")
        if error / budget >= worst.error / worst.budget:
            worst = Accuracy(error, budget)
    return worst


def _error(got: Tensor, exact: Tensor) -> float:
    largest = exact.abs().max().item()
    return (got.double() - exact).abs().max().item() / (largest or 1.0)


def measure(case: Case, library, clock: Clock, rounds: int) -> Measured:
    """Check a case, then time it against a copy of as many bytes; raises ``WrongResultError``."""
    accuracy, found = contestants(case, library, clock)
    return Measured(case, accuracy, case.bytes, race(clock, found, rounds))


def contestants(case: Case, library, clock: Clock) -> tuple[Accuracy, dict[str, list[Callable[[], object]]]]:
    """Error and calls of a case, ``kernel``, and of a ``copy`` of as many bytes; raises ``WrongResultError``.

    Both go through as many buffers as the cache cannot hold.
    """
    sets = min(64, max(2, math.ceil(4 * clock.cache_bytes / case.bytes)))
    works = [_KINDS[case.op](case, library, _Maker(case, clock.device, seed)) for seed in range(sets)]
    accuracy = _check(works[0], case)
    copies = [_copy(case.bytes // 2, clock.device) for _ in range(sets)]
    return accuracy, {"kernel": works, "copy": copies}


def _copy(size: int, device: str) -> Callable[[], Tensor]:
    # As float32, which PyTorch copies faster than single bytes.
    source = torch.rand(max(1, size // 4), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
