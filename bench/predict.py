"""What layers should take on a GPU, counted and not measured: bytes and operations over its data sheet's ceilings."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import torch

from deepcontrol_cuda import _ops, backends
from deepcontrol_cuda.timing import Shape
from deepcontrol_cuda.training.table import markdown_table

from . import options
from .cases import SETS

HELP = "print what layers should take on an H100: counted from bytes and operations, not measured"
BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=WAYS, default="cuda", help="default: cuda")
    parser.add_argument("--set", choices=SETS, default="resnet50_all", help="shapes (default: resnet50_all)")
    parser.add_argument("--batch", type=options.positive, default=BATCH, help=f"default: {BATCH}")


def run(asked: argparse.Namespace) -> int:
    if asked.backend == "triton" and importlib.util.find_spec("triton") is None:
        raise options.MissingError(
            "predict asks the Triton kernels what they would do; install triton: pip install 'triton>=3.5'"
        )
    if asked.backend == "cuda" and _ops.unavailable is not None:
        raise options.MissingError(f"predict asks the extension what its kernels would do: {_ops.unavailable}")
    print(table(asked.backend, SETS[asked.set], asked.batch))
    return 0


@dataclass(frozen=True)
class Prediction:
    """Of the forward pass: least seconds of the bare convolution and of ours in each way, and the way that is taken."""

    shape: Shape
    convolution: float
    seconds: dict[str, float]
    """Of the ways that take the layer."""
    taken: str
    weight_grad: float
    """Least seconds of the weight gradient with projection, over those of the library's; infinite where it has none."""

    @property
    def ours(self) -> float:
        return self.seconds[self.taken]


WAYS = {
    "cuda": tuple(backends.ALGORITHMS["cuda"]),
    "triton": ("fused", "held", "direct", "two passes"),
}


def predict(shape: Shape, backend: str, batch: int = BATCH) -> Prediction:
    """Of one layer in bfloat16, channels_last, with relu, on an H100."""
    return {"cuda": _by_cuda, "triton": _by_triton}[backend](shape, batch)


def _by_cuda(shape: Shape, batch: int) -> Prediction:
    plans = plan_conv(shape, batch)
    seconds = {name: plan["seconds"] for name, plan in plans["algorithms"].items() if not isinstance(plan, str)}
    own, library = plans["weight_grad"], plans["library_weight_grad"]
    ratio = math.inf if isinstance(own, str) else own["seconds"] / library
    return Prediction(shape, plans["convolution"], seconds, plans["chosen"], ratio)


def plan_conv(shape: Shape, batch: int, **gpu: int) -> dict:
    """``_C.plan_conv`` of a layer in bfloat16 and channels_last; for an H100 if no GPU is given."""
    maps, kernel, padding = (
        (first, value, value) for first, value in ((1, shape.size), (1, shape.kernel_size), (0, shape.kernel_size // 2))
    )
    return _ops.extension.plan_conv(
        batch, shape.in_channels, shape.out_channels, shape.groups, maps, kernel, (1, shape.stride, shape.stride),
        padding, (1, 1, 1), **gpu,
    )  # fmt: skip


def _by_triton(shape: Shape, batch: int) -> Prediction:
    costs, conv_center = _triton("costs"), _triton("conv_center")
    like = {"dtype": torch.bfloat16, "device": "meta", "memory_format": torch.channels_last}
    x = torch.empty(batch, shape.in_channels, shape.size, shape.size, **like)
    kernel = (shape.kernel_size, shape.kernel_size)
    weight = torch.empty(shape.out_channels, shape.in_channels // shape.groups, *kernel, **like)
    geometry = ((shape.stride,) * 2, (shape.kernel_size // 2,) * 2, (1, 1), shape.groups)
    layer = conv_center.layer_of(x, weight, *geometry)
    seconds = costs.seconds(layer, costs.H100)
    taken = conv_center.algorithm(x, weight, *geometry)[0]
    return Prediction(shape, seconds.pop("convolution"), seconds, taken, math.inf)


def _triton(name: str):
    """A module of kernels; not imported where nothing is predicted, since Triton may not be installed."""
    return importlib.import_module(f"deepcontrol_cuda.triton_kernels.{name}")


def table(backend: str, shapes: Sequence[Shape] = SETS["resnet50_all"], batch: int = BATCH) -> str:
    """Markdown; the last line has geometric means."""
    rows = [predict(shape, backend, batch) for shape in shapes]
    ways = [way for way in WAYS[backend] if any(math.isfinite(row.seconds.get(way, math.inf)) for row in rows)]
    # Not predicted where it is not taken.
    if backend == "triton" and not any(row.taken == "direct" for row in rows):
        ways.remove("direct")
    last = ["weight gradient / library's"] if backend == "cuda" else []
    lines = [["layer", "convolution, us", *(f"{way} / that" for way in ways), "taken", *last]]
    for row in rows:
        ratios = [_ratio(row.seconds.get(way, math.inf) / row.convolution) for way in ways]
        lines.append([str(row.shape), f"{1e6 * row.convolution:.0f}", *ratios, row.taken])
        if last:
            lines[-1].append(_ratio(row.weight_grad))
    two_passes, taken = (
        geometric_mean(row.seconds[name or row.taken] / row.convolution for row in rows) for name in ("two passes", "")
    )
    means = [f"{two_passes:.2f}" if way == "two passes" else "" for way in ways]
    lines.append(["geometric mean", "", *means, f"{taken:.2f}", *("" for _ in last)])
    return markdown_table(lines)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"
