"""Means over all output positions of the input that each tap of a kernel sees: ``reference.window_mean``.

The sums of a sample are a product of matrices, (taps, pixels) @ (pixels, channels), of whether a tap sees a pixel and
the map. The first is computed where it is needed, so the map is read once and nothing else is:
``input + N * C * taps * 4`` bytes, plus twice ``splits`` times the second term where programs share a map.

In a product a zero times an infinity or NaN is NaN, so such a pixel makes its channel's mean NaN for all taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import accumulation, memory_format
from . import launch, tensors
from .division import divide, division
from .geometry import in_units, unit

_LONGEST_SUM = 1024
"""Pixels that one program adds up at most: what bounds the rounding error and fills a GPU from a single sample."""


@triton.jit
def _axis_sees(coordinate, tap, reach, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """Whether a multiple of the stride from 0 to ``reach`` leads from the tap to the coordinate."""
    distance = ((coordinate + PADDING) - tap * DILATION).to(tl.uint32, bitcast=True)
    sees = distance <= reach
    if STRIDE > 1:
        sees &= distance % STRIDE == 0
    return sees


@triton.jit
def _sees(
    pixel, tap, pixels, width, width_by, width_shift, height, height_by, height_shift,
    reach_depth, reach_height, reach_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """Whether a tap sees a pixel from some output position, broadcast. Axes that every tap sees whole cost nothing."""
    IN_WIDTH: tl.constexpr = KERNEL[2] > 1 or STRIDE[2] > 1 or PADDING[2] > 0
    IN_HEIGHT: tl.constexpr = KERNEL[1] > 1 or STRIDE[1] > 1 or PADDING[1] > 0
    IN_DEPTH: tl.constexpr = KERNEL[0] > 1 or STRIDE[0] > 1 or PADDING[0] > 0
    sees = pixel < pixels
    if IN_WIDTH or IN_HEIGHT or IN_DEPTH:
        row = divide(pixel, width_by, width_shift)
        if IN_WIDTH:
            column = pixel - row * width
            sees &= _axis_sees(column, tap % KERNEL[2], reach_width, STRIDE[2], PADDING[2], DILATION[2])
        if IN_HEIGHT or IN_DEPTH:
            plane = divide(row, height_by, height_shift)
            if IN_HEIGHT:
                within = row - plane * height
                upright = tap // KERNEL[2] % KERNEL[1]
                sees &= _axis_sees(within, upright, reach_height, STRIDE[1], PADDING[1], DILATION[1])
            if IN_DEPTH:
                deep = tap // (KERNEL[2] * KERNEL[1])
                sees &= _axis_sees(plane, deep, reach_depth, STRIDE[0], PADDING[0], DILATION[0])
    return sees


@triton.jit
def _divided(sums, divisor):
    if sums.dtype == tl.float32:
        return tl.div_rn(sums, divisor.to(tl.float32))
    else:
        return sums / divisor.to(sums.dtype)


_GEOMETRY = (
    "width", "width_by", "width_shift", "height", "height_by", "height_shift",
    "reach_depth", "reach_height", "reach_width",
)  # fmt: skip


@triton.jit(do_not_specialize=(*_GEOMETRY, "splits", "divisor"))
def _sum_windows(
    x, means, pixels, channels, splits, divisor, tap_stride, channel_stride,
    width, width_by, width_shift, height, height_by, height_shift,
    reach_depth, reach_height, reach_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    PIXELS_INNERMOST: tl.constexpr, UNIT: tl.constexpr, LENGTH: tl.constexpr,
    TAPS: tl.constexpr, SLICES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """means[sample, split, tap, channel] = sum over LENGTH pixels / divisor, of TAPS taps and CHANNELS channels.

    The slices are products of their own, one a warp, and are added up at the end. One tap needs no product.
    """
    ALL_TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    SUM: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    if PIXELS_INNERMOST:
        pixels = in_units(pixels, UNIT)
    else:
        channels = in_units(channels, UNIT)
    blocks = tl.cdiv(channels, CHANNELS)
    # The last sample first: what this leaves in the cache is what the convolution begins with.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    part = program // blocks
    first_channel = program % blocks * CHANNELS
    sample = (part // splits).to(tl.int64)
    first = part % splits * LENGTH
    last = tl.minimum(first + LENGTH, pixels)

    slice = tl.arange(0, SLICES)[:, None, None] * PIXELS
    if PIXELS_INNERMOST:
        place = slice + tl.arange(0, PIXELS)[None, None, :]
        channel = first_channel + tl.arange(0, CHANNELS)[None, :, None]
        tile = x + ((sample * channels + channel) * pixels + place)
        step = 1
    else:
        place = slice + tl.arange(0, PIXELS)[None, :, None]
        channel = first_channel + tl.arange(0, CHANNELS)[None, None, :]
        tile = x + sample * pixels * channels + (place * channels + channel)
        step = tl.cast(channels, tl.int64)
    if ALL_TAPS == 1:
        tap = tl.program_id(1)
        sums = tl.zeros((SLICES, place.shape[1] * channel.shape[1], place.shape[2] * channel.shape[2]), SUM)
    else:
        tap = tl.program_id(1) * TAPS + tl.arange(0, TAPS)
        sums = tl.zeros((SLICES, TAPS, CHANNELS), SUM)
    for start in range(first, last, SLICES * PIXELS):
        if ALL_TAPS == 1:
            seen = _sees(start + place, tap, pixels,
                         width, width_by, width_shift, height, height_by, height_shift,
                         reach_depth, reach_height, reach_width, KERNEL, STRIDE, PADDING, DILATION)  # fmt: skip
            sums += tl.load(tile + start * step, seen & (channel < channels), 0.0).to(SUM)
        else:
            values = tl.load(tile + start * step, (start + place < pixels) & (channel < channels), 0.0)
            if PIXELS_INNERMOST:
                values = tl.permute(values, (0, 2, 1))
            seen = _sees(start + slice + tl.arange(0, PIXELS)[None, None, :], tap[None, :, None], pixels,
                         width, width_by, width_shift, height, height_by, height_shift,
                         reach_depth, reach_height, reach_width, KERNEL, STRIDE, PADDING, DILATION)  # fmt: skip
            sums = tl.dot(tl.where(seen, 1.0, 0.0).to(values.dtype), values, sums, "ieee", out_dtype=SUM)
    channel = first_channel + tl.arange(0, CHANNELS)
    target = means + part.to(tl.int64) * (ALL_TAPS * channels)
    if ALL_TAPS == 1:
        sums = tl.sum(tl.sum(sums, 2 if PIXELS_INNERMOST else 1), 0)
        target += tap * tap_stride + channel * channel_stride
        tl.store(target, _divided(sums, divisor), channel < channels)
    else:
        sums = tl.sum(sums, 0)
        target += tap[:, None] * tap_stride + channel[None, :] * channel_stride
        tl.store(target, _divided(sums, divisor), (tap < ALL_TAPS)[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=("splits", "divisor"))
def _add_splits(
    parts, means, splits, length, channels, divisor, tap_stride, channel_stride,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """means[sample, i] = sum over parts[sample, split, i] / divisor, of BLOCK of the length's (tap, channel) pairs."""
    blocks = tl.cdiv(length, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)[:, None]
    source = parts + sample * splits * length
    sums = tl.zeros((SPLITS, BLOCK), parts.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        rows = source + (first + split).to(tl.int64) * length
        sums += tl.load(rows + i[None, :], (first + split < splits) & (i < length)[None, :], 0.0)
    target = means + sample * length + i // channels * tap_stride + i % channels * channel_stride
    tl.store(target, _divided(tl.sum(sums, 0), divisor), i < length)


# Of a thread, so that three programs fit a multiprocessor; left to itself ptxas spills to have a fourth.
_MOST_REGISTERS = 168


class Plan(NamedTuple):
    """How programs share the sums of a sample."""

    splits: int
    length: int
    """Pixels of a split."""
    taps: int
    slices: int
    pixels: int
    channels: int
    warps: int
    stages: int


@cache
def plan(dtype: torch.dtype, channels: int, pixels: int, channels_innermost: bool, taps: int) -> Plan:
    """From one map alone, so that a sample has the same bits in any batch."""
    line = 128 // dtype.itemsize
    if (channels if channels_innermost else pixels) % 2:
        line = 16  # where no vectors can be loaded each element costs a thread an address and a mask
    if taps == 1:
        together, slices, least = 1, 1, 1
        most_pixels, most_channels = (128, line) if channels_innermost else (4 * line, 16)
    else:
        most_taps = 32 if taps > 64 or dtype == torch.float64 else 64
        together = min(most_taps, max(16, triton.next_power_of_2(taps)))
        slices, least = 4, 16
        most_pixels, most_channels = (32, line) if channels_innermost else (line, 16)
        if taps > 16:  # registers hold all sums of a block
            most_pixels, most_channels = 16, min(most_channels, 1024 // together)
    block = min(most_pixels, max(least, triton.next_power_of_2(pixels) // slices))
    step = slices * block
    splits = launch.ceil_divide(pixels, _LONGEST_SUM)
    length = launch.ceil_divide(launch.ceil_divide(pixels, splits), step) * step
    return Plan(
        launch.ceil_divide(pixels, length),
        length,
        together,
        slices,
        block,
        min(most_channels, max(least, triton.next_power_of_2(channels))),
        4,
        3,
    )


def _launch(x: Tensor, windows: tensors.Windows, means: Tensor, tap_stride: int, channel_stride: int) -> None:
    if launch.INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()  # the interpreter multiplies the bits of bfloat16 as integers
    maps = tensors.maps_of(x, memory_format(x))
    if maps.pixels >= 1 << 30:
        raise ValueError(f"input: got maps of {maps.pixels} pixels, wanted fewer than 2^30")
    if maps.elements == 0:
        means.zero_()
        return
    p = plan(x.dtype, maps.channels, maps.pixels, maps.channels_innermost, windows.taps)
    shared = p.splits > 1
    parts = (
        x.new_empty((maps.samples, p.splits, windows.taps, maps.channels), dtype=accumulation(x)) if shared else means
    )
    blocks = launch.ceil_divide(maps.channels, p.channels)
    reach = [(windows.output[d] - 1) * windows.stride[d] for d in range(3)]
    with launch.on(x):
        _sum_windows[maps.samples * p.splits * blocks, launch.ceil_divide(windows.taps, p.taps)](
            x, parts, maps.pixels, maps.channels, p.splits, 1 if shared else windows.pixels,
            maps.channels if shared else tap_stride, 1 if shared else channel_stride,
            windows.size[2], *division(windows.size[2]), windows.size[1], *division(windows.size[1]), *reach,
            KERNEL=windows.kernel, STRIDE=windows.stride, PADDING=windows.padding, DILATION=windows.dilation,
            PIXELS_INNERMOST=not maps.channels_innermost,
            UNIT=unit(maps.channels if maps.channels_innermost else maps.pixels), LENGTH=p.length, TAPS=p.taps,
            SLICES=p.slices, PIXELS=p.pixels, CHANNELS=p.channels,
            num_warps=p.warps, num_stages=p.stages, maxnreg=_MOST_REGISTERS,
        )  # fmt: skip
        if shared:
            length = windows.taps * maps.channels
            _add_splits[maps.samples * launch.ceil_divide(length, 128),](
                parts, means, p.splits, length, maps.channels, windows.pixels, tap_stride, channel_stride,
                SPLITS=min(16, triton.next_power_of_2(p.splits)), BLOCK=128, num_warps=4,
            )  # fmt: skip


def window_means(x: Tensor, windows: tensors.Windows) -> Tensor:
    """(N, taps, C) in the accumulation type, of a dense (N, C, *spatial) map: what each tap sees on average."""
    means = x.new_empty((x.shape[0], windows.taps, x.shape[1]), dtype=accumulation(x))
    _launch(x, windows, means, x.shape[1], 1)
    return means


def window_mean(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    tensors.check_dtype(input)
    windows = tensors.windows_of(input, kernel_size, stride, padding, dilation)
    means = input.new_empty((*input.shape[:2], *kernel_size))
    _launch(tensors.dense(input), windows, means, 1, windows.taps)
    return means
