"""What layers should take on a GPU, counted and not measured: bytes and operations over its data sheet's ceilings."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import torch

from deepcontrol_cuda.timing import Shape
from deepcontrol_cuda.training.table import markdown_table

from .cases import SETS

BATCH = 256
_BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class Ceilings:
    """Of a GPU: bytes a second from memory, and operations a second on bfloat16 (two for a multiply-add)."""

    name: str
    bytes: float
    operations: float


# NVIDIA's data sheet, without sparsity.
H100 = Ceilings("H100 SXM", 3.35e12, 989.4e12)


@dataclass(frozen=True)
class Prediction:
    """Least seconds of the forward pass: of the bare convolution, and of ours, with relu and its bits, in each way."""

    shape: Shape
    convolution: float
    two_passes: float
    fused: float
    chosen: str
    """"fused", "direct" or "two passes": what the Triton backend takes where nothing is measured."""

    @property
    def ours(self) -> float:
        return self.two_passes if self.chosen == "two passes" else self.fused


def predict(shape: Shape, batch: int = BATCH, ceilings: Ceilings = H100) -> Prediction:
    """Of one layer in bfloat16, channels_last."""
    taps = shape.kernel_size**2
    input = batch * shape.in_channels * shape.size**2 * _BYTES
    output = batch * shape.out_channels * shape.out_size**2 * _BYTES
    numbers = shape.out_channels * shape.in_channels // shape.groups * taps
    operations = 2 * batch * shape.out_size**2 * numbers
    bits = output / (8 * _BYTES)

    def seconds(moved: float, operations: float = 0.0) -> float:
        return max(moved / ceilings.bytes, operations / ceilings.operations)

    bare = input + numbers * _BYTES + output
    means = input + 2 * 4 * batch * shape.in_channels * taps
    return Prediction(
        shape,
        seconds(bare, operations),
        seconds(bare, operations) + seconds(2 * output + bits),
        seconds(bare + bits, operations) + seconds(means),
        _chosen(shape, batch),
    )


def _chosen(shape: Shape, batch: int) -> str:
    triton = importlib.import_module("deepcontrol_cuda.triton_kernels.conv_center")
    like = {"dtype": torch.bfloat16, "device": "meta", "memory_format": torch.channels_last}
    x = torch.empty(batch, shape.in_channels, shape.size, shape.size, **like)
    kernel = (shape.kernel_size, shape.kernel_size)
    weight = torch.empty(shape.out_channels, shape.in_channels // shape.groups, *kernel, **like)
    padding = (shape.kernel_size // 2,) * 2
    return triton.algorithm(x, weight, (shape.stride,) * 2, padding, (1, 1), shape.groups)[0]


def table(shapes: Sequence[Shape] = SETS["resnet50_all"], batch: int = BATCH, ceilings: Ceilings = H100) -> str:
    """Markdown; the last line has geometric means."""
    rows = [predict(shape, batch, ceilings) for shape in shapes]
    lines = [["layer", "convolution, us", "two passes / that", "fused / that", "taken"]]
    for row in rows:
        ratios = (f"{seconds / row.convolution:.2f}" for seconds in (row.two_passes, row.fused))
        lines.append([str(row.shape), f"{1e6 * row.convolution:.0f}", *ratios, row.chosen])
    two_passes, fused, taken = (
        geometric_mean(value(row) / row.convolution for row in rows)
        for value in (lambda row: row.two_passes, lambda row: row.fused, lambda row: row.ours)
    )
    lines.append(["geometric mean", "", f"{two_passes:.2f}", f"{fused:.2f}", f"{taken:.2f}"])
    return markdown_table(lines)
