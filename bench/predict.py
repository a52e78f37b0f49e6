"""What layers should take on a GPU, counted and not measured: bytes and operations over its data sheet's ceilings."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import torch

from deepcontrol_cuda.timing import Shape
from deepcontrol_cuda.training.table import markdown_table

from .cases import SETS

BATCH = 256


@dataclass(frozen=True)
class Prediction:
    """Of the forward pass: least seconds of the bare convolution and of ours in each way, and the way that is taken."""

    shape: Shape
    seconds: dict[str, float]
    taken: str

    @property
    def ours(self) -> float:
        return self.seconds[self.taken]


def predict(shape: Shape, batch: int = BATCH) -> Prediction:
    """Of one layer in bfloat16, channels_last, with relu, on an H100."""
    costs, conv_center = _triton("costs"), _triton("conv_center")
    like = {"dtype": torch.bfloat16, "device": "meta", "memory_format": torch.channels_last}
    x = torch.empty(batch, shape.in_channels, shape.size, shape.size, **like)
    kernel = (shape.kernel_size, shape.kernel_size)
    weight = torch.empty(shape.out_channels, shape.in_channels // shape.groups, *kernel, **like)
    geometry = ((shape.stride,) * 2, (shape.kernel_size // 2,) * 2, (1, 1), shape.groups)
    layer = conv_center.layer_of(x, weight, *geometry)
    return Prediction(shape, costs.seconds(layer, costs.H100), conv_center.algorithm(x, weight, *geometry)[0])


def _triton(name: str):
    """A module of kernels; not imported where nothing is predicted, since Triton may not be installed."""
    return importlib.import_module(f"deepcontrol_cuda.triton_kernels.{name}")


def table(shapes: Sequence[Shape] = SETS["resnet50_all"], batch: int = BATCH) -> str:
    """Markdown; the last line has geometric means."""
    rows = [predict(shape, batch) for shape in shapes]
    ways = ("two passes", "fused", "held")
    lines = [["layer", "convolution, us", *(f"{way} / that" for way in ways), "taken"]]
    for row in rows:
        bare = row.seconds["convolution"]
        ratios = ["-" if math.isinf(row.seconds[way]) else f"{row.seconds[way] / bare:.2f}" for way in ways]
        lines.append([str(row.shape), f"{1e6 * bare:.0f}", *ratios, row.taken])
    taken = geometric_mean(row.ours / row.seconds["convolution"] for row in rows)
    two_passes = geometric_mean(row.seconds["two passes"] / row.seconds["convolution"] for row in rows)
    lines.append(["geometric mean", "", f"{two_passes:.2f}", "", "", f"{taken:.2f}"])
    return markdown_table(lines)
