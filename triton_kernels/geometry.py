"""Which input pixels the taps of a convolution see, from the index of an output pixel; all of it in channels_last.

A kernel takes ``numbers(windows)`` and ``constants(windows)`` by the names that its own arguments have.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .division import divide, division
from .tensors import Windows


class Layer(NamedTuple):
    """A convolution, as far as numbers tell of it."""

    samples: int
    channels: int
    filters: int
    groups: int
    windows: Windows
    itemsize: int

    @property
    def rows(self) -> int:
        """Pixels of the output of all samples."""
        return self.samples * self.windows.pixels

    @property
    def input_rows(self) -> int:
        depth, height, width = self.windows.size
        return self.samples * depth * height * width

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_filters(self) -> int:
        return self.filters // self.groups

    @property
    def tuning_key(self) -> tuple[object, ...]:
        """Which layers share the tiles that were found for one: other batches up to the next power of two too."""
        return self.rows.bit_length(), self._replace(samples=0)


@lru_cache(maxsize=4096)
def numbers(windows: Windows) -> tuple[int, ...]:
    """``pixels``, ``plane`` and ``width`` of the output, each with what it is divided by, and sizes of the input."""
    plane, width = windows.output[1] * windows.output[2], windows.output[2]
    return (
        windows.pixels, *division(windows.pixels), plane, *division(plane), width, *division(width), *windows.size,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def constants(windows: Windows) -> dict[str, int]:
    """``KERNEL``, ``STRIDE``, ``PADDING`` and ``DILATION``, each as ``_D``, ``_H`` and ``_W``."""
    fields = {
        "KERNEL": windows.kernel,
        "STRIDE": windows.stride,
        "PADDING": windows.padding,
        "DILATION": windows.dilation,
    }
    return {f"{name}_{axis}": value for name, values in fields.items() for axis, value in zip("DHW", values)}


def unit(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all of them."""
    return math.gcd(16, *sizes)


def index_type(*tensors: Tensor) -> tl.dtype:
    """Of elements of the largest tensor."""
    return tl.int64 if max(tensor.numel() for tensor in tensors) >= 2**31 else tl.int32


@triton.jit
def first_seen(
    m, pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
    size_d, size_h, size_w,
    KERNEL_D: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
):  # fmt: skip
    """What the first tap of output pixels m sees, as d, h, w, which may be outside, and as row of the input."""
    if KERNEL_D > 1 or STRIDE_D > 1 or PADDING_D > 0:
        n = divide(m, pixels_by, pixels_shift)
        rest = m - n * pixels
        d = divide(rest, plane_by, plane_shift)
        rest -= d * plane
        d = d * STRIDE_D - PADDING_D
        slice = n * size_d + d
    else:
        # Depths are like samples then.
        slice = divide(m, plane_by, plane_shift)
        rest = m - slice * plane
        d = slice
    h = divide(rest, width_by, width_shift)
    w = rest - h * width
    h = h * STRIDE_H - PADDING_H
    w = w * STRIDE_W - PADDING_W
    return d, h, w, (slice * size_h + h) * size_w + w


@triton.jit
def _is_below(x, size):
    """0 <= x < size: below zero is above every size where there is no sign."""
    return x.to(tl.uint32, bitcast=True) < size


@triton.jit
def seen_by(
    d, h, w, tap, size_d, size_h, size_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
):  # fmt: skip
    """Whether a tap lies on the input where the first tap is at d, h, w, and how many rows it is behind that."""
    kd = tap // (KERNEL_H * KERNEL_W) * DILATION_D
    kh = tap // KERNEL_W % KERNEL_H * DILATION_H
    kw = tap % KERNEL_W * DILATION_W
    # Without padding every tap of every output pixel lies on the input.
    inside = tl.full(w.shape, True, tl.int1)
    if PADDING_D > 0:
        inside &= _is_below(d + kd, size_d)
    if PADDING_H > 0:
        inside &= _is_below(h + kh, size_h)
    if PADDING_W > 0:
        inside &= _is_below(w + kw, size_w)
    return inside, (kd * size_h + kh) * size_w + kw


@triton.jit
def taps_inside(
    d, h, w, size_d, size_h, size_w,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """What ``seen_by`` tells of every tap, one bit of a word each."""
    line = tl.zeros(w.shape, WORD)
    for k in tl.static_range(KERNEL_W):
        if PADDING_W > 0:
            line |= _is_below(w + k * DILATION_W, size_w).to(WORD) << k
        else:
            line |= tl.full(w.shape, 1, WORD) << k
    plane = tl.zeros(w.shape, WORD)
    for k in tl.static_range(KERNEL_H):
        taps = line << (k * KERNEL_W)
        if PADDING_H > 0:
            taps = tl.where(_is_below(h + k * DILATION_H, size_h), taps, 0)
        plane |= taps
    volume = tl.zeros(w.shape, WORD)
    for k in tl.static_range(KERNEL_D):
        taps = plane << (k * KERNEL_H * KERNEL_W)
        if PADDING_D > 0:
            taps = tl.where(_is_below(d + k * DILATION_D, size_d), taps, 0)
        volume |= taps
    return volume


@triton.jit
def in_units(number, UNIT: tl.constexpr):
    """The same number, which UNIT divides. Triton by itself sees no divisor of an argument but 16."""
    return number // UNIT * UNIT


@triton.jit
def load(pointers, mask, MASKED: tl.constexpr):
    """Zero where a mask that is known to matter says no."""
    if MASKED:
        return tl.load(pointers, mask, 0.0)
    else:
        return tl.load(pointers)
