"""Convolutions at which kernels have boundaries, and how one is compared with the reference."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest
import torch
from conftest import INTERPRETED
from test_ops import compare, small_integers

import deepcontrol_cuda as dc


class Case(NamedTuple):
    """A convolution of ``channels`` maps of ``size``; numbers stand for as many equal ones."""

    id: str
    channels: int
    filters: int
    size: tuple[int, ...]
    kernel: int | tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    activation: str = "relu"
    batch: int = 2

    def each(self, name: str) -> tuple[int, ...]:
        """One value for each spatial dimension."""
        value = getattr(self, name)
        return (value,) * len(self.size) if isinstance(value, int) else value

    @property
    def geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Stride, padding, dilation and groups."""
        return self.each("stride"), self.each("padding"), self.each("dilation"), self.groups

    @property
    def pixels(self) -> int:
        """Of a map of the output."""
        axes = zip(self.size, *map(self.each, ("kernel", "stride", "padding", "dilation")))
        return math.prod((n + 2 * padding - d * (k - 1) - 1) // s + 1 for n, k, s, padding, d in axes)

    @property
    def is_direct(self) -> bool:
        """Whether groups are so small that no matrix product is worth it."""
        return self.channels // self.groups < 16 and self.groups > 1


CASES = (
    Case("one-tap", 24, 40, (5, 7), 1, activation="identity"),
    Case("one-tap-odd-channels", 19, 33, (5, 3), 1, activation="silu"),
    Case("one-tap-strided", 16, 24, (7, 6), 1, stride=2),
    Case("one-tap-stride-3", 8, 16, (7, 8), 1, stride=3, activation="leaky_relu"),
    Case("one-tap-padded", 8, 16, (4, 3), 1, padding=2, activation="gelu"),
    Case("3x3", 24, 40, (5, 7), 3, padding=1),
    Case("3x3-odd-channels", 19, 33, (5, 4), 3, padding=1, activation="hardswish"),
    Case("3x3-few-channels", 5, 17, (6, 5), 3, padding=1, activation="relu6"),
    Case("3x3-unpadded", 16, 16, (6, 5), 3, activation="silu"),
    Case("3x3-strided", 16, 24, (9, 7), 3, stride=2, padding=1),
    Case("3x3-stride-3-padding-2", 16, 9, (8, 7), 3, stride=3, padding=2, activation="leaky_relu"),
    Case("3x3-dilated", 16, 16, (8, 7), 3, padding=2, dilation=2, activation="identity"),
    Case("3x3-dilated-strided", 16, 8, (9, 8), 3, stride=2, padding=1, dilation=2),
    Case("padding-larger-than-kernel", 16, 16, (3, 4), 3, padding=4, activation="relu6"),
    Case("stride-larger-than-kernel", 16, 16, (11, 9), 3, stride=5, padding=1, activation="gelu"),
    Case("2x2-of-stride-3", 16, 16, (8, 9), 2, stride=3),
    Case("5x5", 16, 16, (7, 6), 5, padding=2, activation="hardswish"),
    Case("5x5-dilated-padding-3", 8, 16, (9, 8), 5, padding=3, dilation=2),
    Case("7x7-image", 3, 16, (15, 13), 7, stride=2, padding=3),
    Case("1x7", 16, 16, (3, 9), (1, 7), padding=0, activation="relu6"),
    Case("7x1", 16, 16, (9, 3), (7, 1), padding=3, activation="identity"),
    Case("one-output-pixel", 16, 16, (3, 3), 3),
    Case("one-pixel-in-and-out", 16, 24, (1, 1), 3, padding=1, activation="leaky_relu"),
    Case("one-output-pixel-of-much-padding", 8, 8, (2, 2), 5, stride=7, padding=3, activation="silu"),
    Case("two-groups", 32, 48, (5, 4), 3, padding=1, groups=2),
    Case("odd-groups", 9, 15, (5, 4), 3, stride=2, padding=1, groups=3, activation="leaky_relu"),
    Case("groups-of-one-tap", 32, 32, (4, 5), 1, groups=4, activation="identity"),
    Case("depthwise", 20, 20, (7, 6), 3, padding=1, groups=20),
    Case("depthwise-strided", 16, 16, (8, 7), 3, stride=2, padding=1, groups=16, activation="relu6"),
    Case("depthwise-5x5-dilated", 8, 8, (9, 8), 5, padding=4, dilation=2, groups=8, activation="hardswish"),
    Case("depthwise-two-filters-a-channel", 10, 20, (6, 5), 3, padding=1, groups=10, activation="gelu"),
    Case("depthwise-one-output-pixel", 8, 8, (3, 3), 3, groups=8),
    Case("1d", 16, 24, (19,), 3, stride=2, padding=1, activation="silu"),
    Case("3d", 16, 16, (3, 4, 5), 3, padding=1),
    Case("3d-one-tap", 16, 24, (2, 3, 4), 1, activation="leaky_relu"),
    Case("3d-flat-kernel", 16, 16, (2, 5, 4), (1, 3, 3), stride=2, padding=1),
    Case("one-sample", 16, 24, (5, 4), 3, padding=1, batch=1, activation="identity"),
)  # fmt: skip
BY_ID = {case.id: case for case in CASES}


def some(*ids: str):
    return pytest.mark.parametrize("case", [BY_ID[id] for id in ids], ids=ids)


CONVOLUTIONS = {1: dc.functional.deep_control_conv1d, 2: dc.functional.deep_control_conv2d,
                3: dc.functional.deep_control_conv3d}  # fmt: skip


def check_convolution(
    case: Case, backend: str, dtype: torch.dtype, algorithm: AbstractContextManager, channels_last: bool = True,
    mean_scale: float | None = None,
) -> None:  # fmt: skip
    """Output and all gradients, within their budgets, by an algorithm that the context makes the backend prefer."""
    rank = len(case.size)
    x = small_integers(case.batch, case.channels, *case.size)
    w = small_integers(case.filters, case.channels // case.groups, *case.each("kernel"), bound=1)

    def function(x, w, gain, scale, bias, residual, **arguments):
        scale = mean_scale if scale is None else scale
        return CONVOLUTIONS[rank](x, w, gain, scale, bias, *case.geometry, residual=residual, **arguments)

    gain, scale, bias = torch.rand(case.filters) + 0.5, torch.rand(case.filters), torch.randn(case.filters)
    shape = function(x, w, None, None, None, None, backend="reference").shape
    # With a mean that stays in, no residual either.
    tensors = [x, w, gain, *((scale, bias, small_integers(*shape)) if mean_scale is None else (None, bias, None))]
    seed = torch.randn(shape).to(dtype).double()
    cudnn = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": True}
    # TF32, which the interpreter of Triton does not round to, has as many bits as float16.
    precision = torch.float16 if dtype == torch.float32 and not INTERPRETED else dtype
    with algorithm, torch.backends.cudnn.flags(**cudnn):
        compare(
            function, tensors, dtype, channels_last, seed, precision, activation=case.activation, projection=0.9,
            backend=backend,
        )  # fmt: skip
