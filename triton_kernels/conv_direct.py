"""Convolutions of few channels a group, depthwise ones above all, in a true single pass.

A program holds whole maps of a sample, convolves, takes their means, and writes the finished layer
(``reference.deep_control_conv``). No tensor cores: a depthwise convolution does two operations a tap for each number
that it moves. Everything is channels_last: a tile is all output pixels by some filters.

Moved: the input (taps overlap in the cache), residual, and the output, once each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import geometry
from .activation import activate, pack_bits, passes
from .geometry import Layer, first_seen, in_units, seen_by
from .launch import ceil_divide, on
from .tensors import Vectors

_MOST_CHANNELS = 8  # of a group
_MOST_PIXELS = 4096  # of a map: where one is not held, a program goes through it chunk by chunk
# Numbers of four bytes of a thread and of a tile. Few wide loads at a time take fewer registers: with them a map that
# is held may have twice as many of both. Where groups have channels to gather, a tile has half as many.
_NUMBERS, _LARGEST = 8, 4096


@triton.jit
def _sums(
    maps, kernels, p, of_group, exists_o, channels, filters, group_channels,
    pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
    size_d, size_h, size_w,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The convolution at pixels p, zero where they do not exist or filters do not."""
    d, h, w, row = first_seen(
        p, pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
        size_d, size_h, size_w, KERNEL_D, STRIDE_D, STRIDE_H, STRIDE_W, PADDING_D, PADDING_H, PADDING_W,
    )  # fmt: skip
    exists = (p < pixels)[:, None] & exists_o[None, :]
    acc = tl.zeros(exists.shape, ACC)
    for c in range(group_channels):
        for line in range(KERNEL_D * KERNEL_H):
            # A line of taps at a time is in flight.
            for kw in tl.static_range(KERNEL_W):
                tap = line * KERNEL_W + kw
                inside, distance = seen_by(
                    d, h, w, tap, size_d, size_h, size_w, KERNEL_H, KERNEL_W,
                    PADDING_D, PADDING_H, PADDING_W, DILATION_D, DILATION_H, DILATION_W,
                )  # fmt: skip
                seen = (row + distance)[:, None] * channels + (of_group + c)[None, :]
                x = tl.load(maps + seen, exists & inside[:, None], 0.0)
                k = tl.load(kernels + (tap * group_channels + c) * filters, exists_o, 0.0)
                acc += x.to(ACC) * k.to(ACC)[None, :]
    return acc


@triton.jit
def _finish(
    acc, sample, p, o, exists_o, scale, shift, offset, residual, output, bits, pre_activation,
    filters, pixels, INDEX: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """From sums at pixels p to what is stored."""
    COLUMNS: tl.constexpr = acc.shape[1]
    exists_p = p < pixels
    exists = exists_p[:, None] & exists_o[None, :]
    acc = (acc - shift[None, :]) * scale[None, :] + offset[None, :]
    row = (sample.to(INDEX) * pixels + p)[:, None]
    at = row * filters + o[None, :]
    if residual is not None:
        acc += tl.load(residual + at, exists, 0.0).to(acc.dtype)
    if pre_activation is not None:
        tl.store(pre_activation + at, acc.to(pre_activation.dtype.element_ty), exists)
    tl.store(output + at, activate(acc, ACTIVATION, SLOPE).to(output.dtype.element_ty), exists)
    if bits is not None:
        eighth = tl.program_id(0) % tl.cdiv(filters, COLUMNS) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        row_bytes = tl.cdiv(filters, 8)
        packed = pack_bits(passes(acc, ACTIVATION) & exists_o[None, :])
        tl.store(bits + row * row_bytes + eighth[None, :], packed, exists_p[:, None] & (eighth < row_bytes)[None, :])


@triton.jit
def _convolve_groups(
    input, weight, gain, mean_scale, bias, residual, output, map_mean, bits, pre_activation,
    channels, filters, group_channels, group_filters,
    pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
    size_d, size_h, size_w,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    UNIT: tl.constexpr, INDEX: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    channels, filters = in_units(channels, UNIT), in_units(filters, UNIT)
    sample = tl.program_id(0) // tl.cdiv(filters, COLUMNS)
    o = tl.program_id(0) % tl.cdiv(filters, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    exists_o = o < filters
    maps = input + sample.to(INDEX) * (size_d * size_h * size_w) * channels
    kernels = weight + o
    of_group = o // group_filters * group_channels
    scale, offset = tl.full((COLUMNS,), 1.0, ACC), tl.zeros((COLUMNS,), ACC)
    if gain is not None:
        scale = tl.load(gain + o, exists_o, 0.0)
    if bias is not None:
        offset = tl.load(bias + o, exists_o, 0.0)
    total = tl.zeros((COLUMNS,), ACC)
    if HELD:
        p = tl.arange(0, ROWS)
        acc = _sums(
            maps, kernels, p, of_group, exists_o, channels, filters, group_channels,
            pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
            size_d, size_h, size_w, KERNEL_D, KERNEL_H, KERNEL_W, STRIDE_D, STRIDE_H, STRIDE_W,
            PADDING_D, PADDING_H, PADDING_W, DILATION_D, DILATION_H, DILATION_W, ACC,
        )  # fmt: skip
        total = tl.sum(acc, 0)
    elif map_mean is not None:
        for begin in range(0, pixels, ROWS):
            p = begin + tl.arange(0, ROWS)
            acc = _sums(
                maps, kernels, p, of_group, exists_o, channels, filters, group_channels,
                pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
                size_d, size_h, size_w, KERNEL_D, KERNEL_H, KERNEL_W, STRIDE_D, STRIDE_H, STRIDE_W,
                PADDING_D, PADDING_H, PADDING_W, DILATION_D, DILATION_H, DILATION_W, ACC,
            )  # fmt: skip
            total += tl.sum(acc, 0)
    shift = tl.zeros((COLUMNS,), ACC)
    if map_mean is not None:
        count = tl.cast(pixels, ACC)
        if tl.float32 == ACC:
            shift = tl.div_rn(total, count)
        else:
            shift = total / count
        tl.store(map_mean + sample.to(tl.int64) * filters + o, shift * scale, exists_o)
        if mean_scale is not None:
            shift *= tl.load(mean_scale + o, exists_o, 0.0)
    if HELD:
        _finish(
            acc, sample, p, o, exists_o, scale, shift, offset, residual, output, bits, pre_activation,
            filters, pixels, INDEX, ACTIVATION, SLOPE,
        )  # fmt: skip
    else:
        # What the cache still has is convolved again: that is less than to write sums and read them back.
        for begin in range(0, pixels, ROWS):
            p = begin + tl.arange(0, ROWS)
            acc = _sums(
                maps, kernels, p, of_group, exists_o, channels, filters, group_channels,
                pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
                size_d, size_h, size_w, KERNEL_D, KERNEL_H, KERNEL_W, STRIDE_D, STRIDE_H, STRIDE_W,
                PADDING_D, PADDING_H, PADDING_W, DILATION_D, DILATION_H, DILATION_W, ACC,
            )  # fmt: skip
            _finish(
                acc, sample, p, o, exists_o, scale, shift, offset, residual, output, bits, pre_activation,
                filters, pixels, INDEX, ACTIVATION, SLOPE,
            )  # fmt: skip


def why_not_direct(layer: Layer) -> str | None:
    """Why a layer in channels_last is none for ``convolve_groups``, or None."""
    if layer.groups == 1 or layer.group_channels > _MOST_CHANNELS:
        return f"groups have more than {_MOST_CHANNELS} channels"
    if layer.windows.pixels > _MOST_PIXELS:
        return f"a map of the output has more than {_MOST_PIXELS} pixels"
    if layer.input_rows * layer.channels * layer.filters == 0:
        return "there is nothing to compute"
    return None


def loads(layer: Layer) -> int:
    """Numbers of the input that ``convolve_groups`` loads, mostly from caches; where maps are not held, twice."""
    pixels = layer.windows.pixels
    rows, _, _ = tile(layer)
    return layer.rows * layer.filters * layer.windows.taps * layer.group_channels * (1 if pixels <= rows else 2)


def tile(layer: Layer) -> tuple[int, int, int]:
    """(ROWS, COLUMNS, warps): rows of 64 bytes, all pixels of a map where they can be held."""
    words = max(4, layer.itemsize) // 4
    columns = max(8, min(64 // layer.itemsize, triton.next_power_of_2(layer.filters)))
    rows, wide = triton.next_power_of_2(layer.windows.pixels), layer.group_channels == 1
    largest, numbers = (_LARGEST, _NUMBERS) if wide else (_LARGEST // 2, _NUMBERS)
    if wide and layer.windows.kernel[2] <= 3:
        largest, numbers = 2 * _LARGEST, 2 * _NUMBERS
    if rows * columns * words > largest:
        largest, numbers = min(_LARGEST, largest), _NUMBERS
        rows = largest // (columns * words)
    return rows, columns, max(1, rows * columns * words // (numbers * 32))


def convolve_groups(
    x: Tensor, weight: Tensor, vectors: Vectors, residual: Tensor | None, layer: Layer,
    activation: str, slope: float, output: Tensor, map_mean: Tensor, bits: Tensor | None, pre_activation: Tensor | None,
) -> None:  # fmt: skip
    """As ``conv_forward.convolve``, for what ``why_not_direct`` has nothing against; float64 too."""
    samples, channels, filters, groups, windows, _ = layer
    group_channels = layer.group_channels
    rows, columns, warps = tile(layer)
    # Filters innermost, so that neighbours load them together.
    by_tap = weight.permute(*range(2, weight.dim()), 1, 0).contiguous()
    with on(x):
        _convolve_groups[(samples * ceil_divide(filters, columns),)](
            x, by_tap, vectors.gain, vectors.mean_scale, vectors.bias, residual, output,
            map_mean if vectors.centred else None, bits, pre_activation,
            channels, filters, group_channels, filters // groups,
            *geometry.numbers(windows),
            **geometry.constants(windows),
            UNIT=geometry.unit(channels, filters), INDEX=geometry.index_type(x, output),
            ACTIVATION=activation, SLOPE=slope,
            HELD=windows.pixels <= rows, ROWS=rows, COLUMNS=columns,
            num_warps=warps,
        )  # fmt: skip
