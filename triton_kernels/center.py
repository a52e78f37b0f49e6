"""``reference.deep_control`` and its backward: maps are centred, with gain, bias, residual and activation in one pass.

    removed = mean_scale * mean(input)            output = act(gain * (input - removed) + bias + residual)
    e = act'(pre) * grad_output                   grad_input = gain * (e - mean_scale * mean(e)), grad_residual = e

A tensor is a matrix in memory: rows of channels, one a pixel (channels_last), or rows of pixels, one a map. A program
has a tile of it, whose maps are its columns or its rows. Small maps stay in registers between the sum and what needs
it; a program goes through the chunks of larger ones twice, and finds them in a cache the second time. So memory is read
once and written once, and backward reads one bit an element of the activation. Maps too large for that are shared by
several programs: partial sums, their totals and what needs them are launches of their own.

How a map is cut depends on its size alone, so that a sample has the same bits in any batch.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import activations
from .._ops import accumulation, center_results, memory_format
from .activation import activate, derivative, pack_bits, passes, through_bits, unpack_bits
from .launch import ceil_divide, on
from .tensors import (
    Maps,
    Vectors,
    check_activation,
    check_device,
    check_dtype,
    check_same,
    check_saved,
    dense,
    maps_of,
    residual_of,
    vectors_of,
)


@triton.jit
def _place(maps, channels, pixels, parts, CHANNELS_INNERMOST: tl.constexpr, UNIT: tl.constexpr,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, LAST_FIRST: tl.constexpr):  # fmt: skip
    """The first tile of the program's part of its maps, the part, and the first of the maps and its channel.

    LAST_FIRST: in the order that meets in the cache what the launch before has left there.

    A tile is where it begins, (row, column), how much of the matrix lies from there on, (rows, columns), and the width
    of the matrix. UNIT divides the width, and telling so makes vectors of what is next to each other.
    """
    program = tl.program_id(0)
    if LAST_FIRST:
        program = tl.num_programs(0) - 1 - program
    if CHANNELS_INNERMOST:
        width = channels // UNIT * UNIT
        blocks = tl.cdiv(width, COLUMNS)
        part = (program // blocks % parts).to(tl.int64)
        sample = (program // blocks // parts).to(tl.int64)
        column = program % blocks * COLUMNS
        first_pixel = part * (ROWS * CHUNKS)
        tile = (sample * pixels + first_pixel, column, pixels - first_pixel, width - column, width)
        return tile, part, sample * channels + column, column
    else:
        width = pixels // UNIT * UNIT
        part = (program % parts).to(tl.int64)
        map = (program // parts).to(tl.int64) * ROWS
        column = part * (COLUMNS * CHUNKS)
        tile = (map, column, maps - map, width - column, width)
        return tile, part, map, (map % channels).to(tl.int32)


@triton.jit
def _chunk(tile, i, CHANNELS_INNERMOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile that is ``i`` chunks further along the same maps."""
    row, column, rows, columns, width = tile
    if CHANNELS_INNERMOST:
        return row + i * ROWS, column, rows - i * ROWS, columns, width
    else:
        return row, column + i * COLUMNS, rows, columns - i * COLUMNS, width


@triton.jit
def _elements(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first element of a tile, the offsets of all, and which of them there are."""
    row, column, rows, columns, width = tile
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    return row * width + column, r * width + c, (r < rows) & (c < columns)


@triton.jit
def _bytes(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same for the tile's bits."""
    row, column, rows, columns, width = tile
    return _elements((row, column // 8, rows, tl.cdiv(columns, 8), tl.cdiv(width, 8)), ROWS, COLUMNS // 8)


@triton.jit
def _maps(tile, channel, channels, CHANNELS_INNERMOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a tile's maps, their channels, and which of them there are: (1, COLUMNS) or (ROWS, 1)."""
    _, _, rows, columns, _ = tile
    if CHANNELS_INNERMOST:
        c = tl.arange(0, COLUMNS)[None, :]
        return c, channel + c, c < columns
    else:
        r = tl.arange(0, ROWS)[:, None]
        return r, (channel + r) % channels, r < rows


@triton.jit
def _load(tensor, offsets, inside):
    """In the accumulation type; zeros outside."""
    values = tl.load(tensor + offsets, mask=inside, other=0.0)
    if values.dtype == tl.float64:
        return values
    else:
        return values.to(tl.float32)


@triton.jit
def _store(tensor, offsets, values, inside):
    tl.store(tensor + offsets, values.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _sum(values, CHANNELS_INNERMOST: tl.constexpr):
    """Over each map of a tile."""
    if CHANNELS_INNERMOST:
        return tl.sum(values, axis=0, keep_dims=True)
    else:
        return tl.sum(values, axis=1, keep_dims=True)


@triton.jit
def _mean(total, pixels):
    if total.dtype == tl.float32:
        # Rounded correctly, which the plain quotient is not, so that the mean of equal numbers is that number.
        return tl.div_rn(total, tl.zeros_like(total) + pixels)
    else:
        return total / pixels


@triton.jit
def _error(grad_output, bits, pre_activation, tile, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """The gradient in front of the activation; zeros outside."""
    at, offsets, inside = _elements(tile, ROWS, COLUMNS)
    grad = _load(grad_output + at, offsets, inside)
    if bits is not None:
        at, offsets, inside = _bytes(tile, ROWS, COLUMNS)
        return through_bits(grad, unpack_bits(tl.load(bits + at + offsets, mask=inside, other=0)), ACTIVATION, SLOPE)
    elif pre_activation is not None:
        return grad * derivative(_load(pre_activation + at, offsets, inside), ACTIVATION)
    else:
        return grad


@triton.jit
def _sum_error(grad_output, bits, pre_activation, input, tile, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
               CHANNELS_INNERMOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               CHUNKS: tl.constexpr):  # fmt: skip
    """The error of the tile, and over all chunks the sums of the error and, where there is input, of error * input."""
    error = _error(grad_output, bits, pre_activation, tile, ACTIVATION, SLOPE, ROWS, COLUMNS)
    total = error
    dot = error
    if input is not None:
        at, offsets, inside = _elements(tile, ROWS, COLUMNS)
        dot = error * _load(input + at, offsets, inside)
    for i in range(1, CHUNKS):
        chunk = _chunk(tile, i, CHANNELS_INNERMOST, ROWS, COLUMNS)
        further = _error(grad_output, bits, pre_activation, chunk, ACTIVATION, SLOPE, ROWS, COLUMNS)
        total += further
        if input is not None:
            at, offsets, inside = _elements(chunk, ROWS, COLUMNS)
            dot += further * _load(input + at, offsets, inside)
    return error, _sum(total, CHANNELS_INNERMOST), _sum(dot, CHANNELS_INNERMOST)


@triton.jit
def _center(
    input, residual, gain, mean_scale, bias, sums, output, map_mean, output_mean, pre_activation, bits,
    maps, channels, pixels, parts, MEAN_OF_SCALED: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    CHANNELS_INNERMOST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Centres if there is ``map_mean``, by ``sums`` where others have parts of the same maps."""
    tile, _, map, channel = _place(
        maps, channels, pixels, parts, CHANNELS_INNERMOST, UNIT, ROWS, COLUMNS, CHUNKS, sums is None
    )
    lane, channel, has_map = _maps(tile, channel, channels, CHANNELS_INNERMOST, ROWS, COLUMNS)
    HELD: tl.constexpr = map_mean is not None and sums is None
    if HELD:
        x, total, _ = _sum_error(
            input, None, None, None, tile, "identity", 0.0, CHANNELS_INNERMOST, ROWS, COLUMNS, CHUNKS
        )
    elif map_mean is not None:
        total = tl.load(sums + map + lane, mask=has_map, other=0.0)
    dtype: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    offset = tl.zeros(lane.shape, dtype)
    if bias is not None:
        offset = tl.load(bias + channel, mask=has_map, other=0.0)
    if gain is not None:
        gain = tl.load(gain + channel, mask=has_map, other=0.0)
    if map_mean is not None:
        mean = _mean(total, pixels)
        removed = mean
        if mean_scale is not None:
            removed *= tl.load(mean_scale + channel, mask=has_map, other=0.0)
        if gain is not None:
            removed *= gain
            if MEAN_OF_SCALED:
                mean *= gain
        offset -= removed
        # Each part writes the same.
        tl.store(map_mean + map + lane, mean, mask=has_map)
    if output_mean is not None:
        total_output = tl.zeros((ROWS, COLUMNS), dtype)
    for i in range(CHUNKS):
        chunk = _chunk(tile, i, CHANNELS_INNERMOST, ROWS, COLUMNS)
        at, offsets, inside = _elements(chunk, ROWS, COLUMNS)
        if not HELD or CHUNKS > 1:
            # For the second time, if summed above: it is in a cache.
            x = _load(input + at, offsets, inside)
        if gain is None:
            pre = x + offset
        else:
            pre = x * gain + offset
        if residual is not None:
            pre += _load(residual + at, offsets, inside)
        if pre_activation is not None:
            _store(pre_activation + at, offsets, pre, inside)
        if bits is not None:
            byte, byte_offsets, has_byte = _bytes(chunk, ROWS, COLUMNS)
            tl.store(bits + byte + byte_offsets, pack_bits(passes(pre, ACTIVATION) & inside), mask=has_byte)
        result = activate(pre, ACTIVATION, SLOPE).to(output.dtype.element_ty)
        tl.store(output + at + offsets, result, mask=inside)
        if output_mean is not None:
            total_output += tl.where(inside, result.to(dtype), 0.0)
    if output_mean is not None:
        tl.store(output_mean + map + lane, _mean(_sum(total_output, CHANNELS_INNERMOST), pixels), mask=has_map)


@triton.jit
def _center_backward(
    grad_output, bits, pre_activation, input, scale, mean_scale, totals, grad_input, grad_residual, sums, dots,
    maps, channels, pixels, parts, CENTRED: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    CHANNELS_INNERMOST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """``totals`` are the sums of the error over the maps where others have parts of the same maps."""
    tile, _, map, channel = _place(
        maps, channels, pixels, parts, CHANNELS_INNERMOST, UNIT, ROWS, COLUMNS, CHUNKS, totals is None
    )
    lane, channel, has_map = _maps(tile, channel, channels, CHANNELS_INNERMOST, ROWS, COLUMNS)
    HELD: tl.constexpr = totals is None and (CENTRED or sums is not None)
    if HELD:
        error, total, dot = _sum_error(
            grad_output, bits, pre_activation, input, tile, ACTIVATION, SLOPE,
            CHANNELS_INNERMOST, ROWS, COLUMNS, CHUNKS,
        )  # fmt: skip
        if sums is not None:
            tl.store(sums + map + lane, total, mask=has_map)
        if dots is not None:
            tl.store(dots + map + lane, dot, mask=has_map)
    elif CENTRED:
        total = tl.load(totals + map + lane, mask=has_map, other=0.0)
    if scale is not None:
        scale = tl.load(scale + channel, mask=has_map, other=0.0)
    if CENTRED:
        removed = _mean(total, pixels)
        if mean_scale is not None:
            removed *= tl.load(mean_scale + channel, mask=has_map, other=0.0)
        if scale is not None:
            removed *= scale
    if grad_input is not None or grad_residual is not None:
        for i in range(CHUNKS):
            chunk = _chunk(tile, i, CHANNELS_INNERMOST, ROWS, COLUMNS)
            at, offsets, inside = _elements(chunk, ROWS, COLUMNS)
            if not HELD or CHUNKS > 1:
                error = _error(grad_output, bits, pre_activation, chunk, ACTIVATION, SLOPE, ROWS, COLUMNS)
            if grad_residual is not None:
                _store(grad_residual + at, offsets, error, inside)
            if grad_input is not None:
                result = error
                if scale is not None:
                    result *= scale
                if CENTRED:
                    result -= removed
                _store(grad_input + at, offsets, result, inside)


@triton.jit
def _sum_parts(
    grad_output, bits, pre_activation, input, partials, maps, channels, pixels, parts,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_INNERMOST: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Sums over a part of each map: of the error, (parts, maps), or also of error * input, (parts, 2, maps)."""
    tile, part, map, channel = _place(
        maps, channels, pixels, parts, CHANNELS_INNERMOST, UNIT, ROWS, COLUMNS, CHUNKS, True
    )
    lane, channel, has_map = _maps(tile, channel, channels, CHANNELS_INNERMOST, ROWS, COLUMNS)
    _, total, dot = _sum_error(
        grad_output, bits, pre_activation, input, tile, ACTIVATION, SLOPE, CHANNELS_INNERMOST, ROWS, COLUMNS, CHUNKS
    )
    if input is None:
        tl.store(partials + part * maps + map + lane, total, mask=has_map)
    else:
        tl.store(partials + 2 * part * maps + map + lane, total, mask=has_map)
        tl.store(partials + (2 * part + 1) * maps + map + lane, dot, mask=has_map)


@triton.jit
def _add_parts(partials, totals, sums, parts, PARTS: tl.constexpr, SUMS: tl.constexpr):
    """From (parts, sums) to (sums,)."""
    part = tl.arange(0, PARTS)[:, None]
    at = tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS)[None, :]
    values = tl.load(partials + part.to(tl.int64) * sums + at, mask=(part < parts) & (at < sums), other=0.0)
    tl.store(totals + at, tl.sum(values, axis=0, keep_dims=True), mask=at < sums)


@triton.jit
def _reduce_samples(
    sums, dots, map_mean, scale, mean_scale, grad_gain, grad_mean_scale, grad_bias, samples, channels,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """From sums over maps, (samples, channels), to gradients, (channels,); the mean was left in if none is given."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    has_channel = channel < channels
    dtype: tl.constexpr = sums.dtype.element_ty
    sum = tl.zeros((SAMPLES, CHANNELS), dtype)
    dot = tl.zeros((SAMPLES, CHANNELS), dtype)
    removed = tl.zeros((SAMPLES, CHANNELS), dtype)
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)[:, None]
        inside = (sample < samples) & has_channel[None, :]
        offsets = sample.to(tl.int64) * channels + channel[None, :]
        added = tl.load(sums + offsets, mask=inside, other=0.0)
        sum += added
        if dots is not None:
            dot += tl.load(dots + offsets, mask=inside, other=0.0)
        if map_mean is not None:
            removed += added * tl.load(map_mean + offsets, mask=inside, other=0.0)
    if grad_bias is not None:
        tl.store(grad_bias + channel, tl.sum(sum, axis=0), mask=has_channel)
    if map_mean is not None:
        without = tl.sum(removed, axis=0)
    if grad_mean_scale is not None:
        if scale is None:
            tl.store(grad_mean_scale + channel, -without, mask=has_channel)
        else:
            factor = tl.load(scale + channel, mask=has_channel, other=0.0)
            tl.store(grad_mean_scale + channel, -factor * without, mask=has_channel)
    if grad_gain is not None:
        gradient = tl.sum(dot, axis=0)
        if map_mean is not None:
            if mean_scale is None:
                gradient -= without
            else:
                gradient -= tl.load(mean_scale + channel, mask=has_channel, other=0.0) * without
        tl.store(grad_gain + channel, gradient, mask=has_channel)


class Plan(NamedTuple):
    """Tiles of (ROWS, COLUMNS); a program goes through CHUNKS of them, which are a part of its maps."""

    ROWS: int
    COLUMNS: int
    CHUNKS: int
    parts: int
    num_warps: int


MAP_BYTES = 128 * 1024
"""Most of its maps that one program reads twice: a cache must hold that for all programs which run at a time."""
THREADS = 256
"""Of a program that has all of its maps in registers; of others twice as many."""
_MOST_PARTS = 256


def plan(maps: Maps, itemsize: int, tensors: int = 1, summed: bool = True) -> Plan:
    """How maps are cut; ``maps.samples`` does not matter.

    ``tensors`` of elements of ``itemsize`` bytes are needed for the sums over the maps, if those are needed at all.
    """
    pixels, channels = (triton.next_power_of_2(n) for n in (maps.pixels, maps.channels))
    width = maps.channels if maps.channels_innermost else maps.pixels
    elements_a_thread, threads = 16 // tensors, THREADS
    if itemsize == 8:
        elements_a_thread //= 2
    if width % 4:
        # Where no vectors can be loaded each element costs a thread an address and a mask.
        elements_a_thread, threads = elements_a_thread // 2, THREADS // 2
    tile = threads * elements_a_thread
    if maps.channels_innermost:
        # From a cache line of channels down to a sector; bits come in eights.
        most = max(8, min(128 // itemsize, channels))
        least = min(most, max(8, 32 // itemsize))
        together = [most // n for n in (1, 2, 4) if most // n >= least]
    else:
        together = [1]
    in_registers = [n for n in together if pixels * n <= tile]
    in_cache = [n for n in together if maps.pixels * n * itemsize * tensors <= MAP_BYTES]
    if summed and not in_registers:
        # Fewer programs at a time, so that a cache holds what they have.
        tile *= 2
    side = ((summed and (in_registers or in_cache)) or together)[0]
    along = max(1 if maps.channels_innermost else 8, min(pixels, tile // side))
    while side * along < tile and not (maps.channels_innermost and side >= channels):
        side *= 2
    tiles = ceil_divide(maps.pixels, along)
    if not summed:
        chunks = 1
    elif in_registers or in_cache:
        chunks = tiles
    else:
        chunks = max(4, triton.next_power_of_2(ceil_divide(tiles, _MOST_PARTS)))
    num_warps = max(1, side * along // (32 * elements_a_thread))
    rows, columns = (along, side) if maps.channels_innermost else (side, along)
    return Plan(rows, columns, chunks, ceil_divide(tiles, chunks), num_warps)


def _grid(maps: Maps, plan: Plan) -> tuple[int]:
    if maps.channels_innermost:
        return (maps.samples * plan.parts * ceil_divide(maps.channels, plan.COLUMNS),)
    return (ceil_divide(maps.samples * maps.channels, plan.ROWS) * plan.parts,)


def _cut(maps: Maps, plan: Plan) -> dict[str, int | bool]:
    """The arguments that tell a kernel what it has of the maps."""
    width = maps.channels if maps.channels_innermost else maps.pixels
    return {
        "maps": maps.samples * maps.channels,
        "channels": maps.channels,
        "pixels": maps.pixels,
        "CHANNELS_INNERMOST": maps.channels_innermost,
        "UNIT": gcd(width, 16),
        **plan._asdict(),
    }


def _totals(
    grad_output: Tensor,
    bits: Tensor | None,
    pre_activation: Tensor | None,
    input: Tensor | None,
    activation: str,
    slope: float,
    maps: Maps,
    plan: Plan,
) -> Tensor:
    """Sums over maps of several parts: of the error, and of error * input if there is one. (1 or 2, N, C)."""
    kinds = 1 if input is None else 2
    dtype = accumulation(grad_output)
    partials = grad_output.new_empty((plan.parts, kinds, maps.samples * maps.channels), dtype=dtype)
    totals = grad_output.new_empty((kinds, maps.samples, maps.channels), dtype=dtype)
    _sum_parts[_grid(maps, plan)](
        grad_output, bits, pre_activation, input, partials, ACTIVATION=activation, SLOPE=slope, **_cut(maps, plan)
    )
    parts = triton.next_power_of_2(plan.parts)
    sums = max(16, 2048 // parts)
    _add_parts[(ceil_divide(totals.numel(), sums),)](
        partials, totals, totals.numel(), plan.parts, PARTS=parts, SUMS=sums
    )
    return totals


def centre_maps(
    z: Tensor,
    output: Tensor,
    format: torch.memory_format,
    vectors: Vectors,
    residual: Tensor | None,
    activation: str,
    slope: float,
    save: bool,
    mean_of_scaled: bool,
    with_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``center`` of ``z``, which is dense in ``format``, into ``output``, which may be ``z``.

    Returns map_mean (N, C), of ``gain * z`` if ``mean_of_scaled``, (0,) where nothing is centred; what backward needs
    of the activation; and, ``with_mean``, the mean of the output (N, C).
    """
    residual = residual_of(residual, z.shape, z, format)
    _, map_mean, saved = center_results(output, format, vectors.centred, activation, save)
    output_mean = map_mean.new_empty(z.shape[:2]) if with_mean else None
    maps = maps_of(z, format)
    if maps.elements == 0:
        for means in (map_mean, output_mean):
            if means is not None:
                means.fill_(float("nan"))
        return map_mean, saved, output_mean
    cut = plan(maps, z.element_size(), summed=vectors.centred or with_mean)
    whole = cut.parts == 1
    with on(z):
        sums = None
        if vectors.centred and not whole:
            sums = _totals(z, None, None, None, "identity", 0.0, maps, cut)
        _center[_grid(maps, cut)](
            z, residual, vectors.gain, vectors.mean_scale, vectors.bias, sums, output,
            map_mean if vectors.centred else None, output_mean if whole else None,
            saved if save and activation in activations.SMOOTH else None,
            saved if save and activation in activations.PIECEWISE else None,
            MEAN_OF_SCALED=mean_of_scaled, ACTIVATION=activation, SLOPE=slope, **_cut(maps, cut),
            # Left to itself ptxas spills a register or two to have four programs of 256 threads instead of three.
            maxnreg=80 if activation in activations.SMOOTH and z.element_size() == 2 and cut.num_warps <= 8 else None,
        )  # fmt: skip
    if with_mean and not whole:
        # A map that is cut costs one more read.
        output_mean = output.flatten(2).mean(2, dtype=map_mean.dtype)
    return map_mean, saved, output_mean


class Wanted(NamedTuple):
    grad_input: bool
    grad_residual: bool
    sums: bool
    dots: bool


class Error(NamedTuple):
    """Gradients in front of the centring, and (N, C) sums over maps of the error and of error * input."""

    grad_input: Tensor | None
    grad_residual: Tensor | None
    sums: Tensor | None
    dots: Tensor | None


def center_error(
    grad_output: Tensor,
    input: Tensor | None,
    scale: Tensor | None,
    vectors: Vectors,
    saved: Tensor,
    activation: str,
    slope: float,
    format: torch.memory_format,
    wanted: Wanted,
) -> Error:
    """From the gradient of the output, whose memory format is ``format``, to that in front of the centring.

    ``scale`` (C,) is what the gradient is multiplied by. ``input`` is needed for the dots alone.
    """
    grad = grad_output.contiguous(memory_format=format)
    check_saved(saved, grad, format, activation)
    if wanted.dots:
        check_same("input", input, grad)
        input = input.contiguous(memory_format=format)
    else:
        input = None
    maps = maps_of(grad, format)
    dtype = accumulation(grad)
    grad_input = torch.empty_like(grad) if wanted.grad_input else None
    grad_residual = torch.empty_like(grad) if wanted.grad_residual else None
    per_map = grad.shape[:2]
    sums, dots = (grad.new_empty(per_map, dtype=dtype) if want else None for want in (wanted.sums, wanted.dots))
    if maps.elements == 0:
        for none in (sums, dots):
            if none is not None:
                none.zero_()
        return Error(grad_input, grad_residual, sums, dots)
    bits = saved if activation in activations.PIECEWISE else None
    pre_activation = saved if activation in activations.SMOOTH else None
    summed = vectors.centred or wanted.sums or wanted.dots
    cut = plan(maps, grad.element_size(), 1 if pre_activation is None else 2, summed)
    apart = summed and cut.parts > 1
    with on(grad):
        totals = _totals(grad, bits, pre_activation, input, activation, slope, maps, cut) if apart else None
        if grad_input is not None or grad_residual is not None or not apart:
            _center_backward[_grid(maps, cut)](
                grad, bits, pre_activation, None if apart else input, scale, vectors.mean_scale, totals,
                grad_input, grad_residual, None if apart else sums, None if apart else dots,
                CENTRED=vectors.centred, ACTIVATION=activation, SLOPE=slope, **_cut(maps, cut),
            )  # fmt: skip
    if apart:
        sums, dots = totals[0] if wanted.sums else None, totals[1] if wanted.dots else None
    return Error(grad_input, grad_residual, sums, dots)


class VectorGrads(NamedTuple):
    gain: Tensor | None
    mean_scale: Tensor | None
    bias: Tensor | None


def reduce_samples(
    error: Error, map_mean: Tensor, scale: Tensor | None, vectors: Vectors, gain: bool, mean_scale: bool, bias: bool
) -> VectorGrads:
    """The gradients (C,) that are wanted; the one of mean_scale is None where nothing is centred.

    ``scale`` (C,) is what center multiplied the centred input by, None where ``map_mean`` is of scaled maps.
    """
    if not (gain or mean_scale or bias):
        return VectorGrads(None, None, None)
    means = vectors.centred and (gain or mean_scale)
    if means:
        check_same("map_mean", map_mean, error.sums)
    samples, channels = error.sums.shape
    grads = VectorGrads(
        *(error.sums.new_empty((channels,)) if want else None for want in (gain, mean_scale and means, bias))
    )
    if channels:
        with on(error.sums):
            _reduce_samples[(ceil_divide(channels, 8),)](
                error.sums, error.dots, map_mean.contiguous() if means else None, scale, vectors.mean_scale, *grads,
                samples, channels, SAMPLES=128, CHANNELS=8,
            )  # fmt: skip
    return grads


def _center_and_mean(
    input, gain, mean_scale, constant, bias, residual, activation, slope, save, with_mean
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    check_dtype(input)
    check_activation(activation)
    x = dense(input)
    vectors = vectors_of(x, x.shape[1], gain, mean_scale, constant, bias)
    output = torch.empty_like(x)
    format = memory_format(x)
    return output, *centre_maps(
        x, output, format, vectors, residual, activation, slope, save, mean_of_scaled=False, with_mean=with_mean
    )


def center(input, gain, mean_scale, constant, bias, residual, activation, slope, save):
    """(output, map_mean, saved); see ``csrc/ops.cpp``."""
    return _center_and_mean(input, gain, mean_scale, constant, bias, residual, activation, slope, save, False)[:3]


def center_with_mean(input, gain, mean_scale, constant, bias, residual, activation, slope, save):
    """(output, map_mean, saved, output_mean)."""
    return _center_and_mean(input, gain, mean_scale, constant, bias, residual, activation, slope, save, True)


def center_backward(grad_output, input, gain, mean_scale, constant, map_mean, saved, activation, slope, mask):
    """(grad_input, grad_gain, grad_mean_scale, grad_bias, grad_residual), None where ``mask`` wants none."""
    check_dtype(grad_output)
    if mask[1] and input is None:
        raise ValueError("input: missing, wanted for the gradient of gain")
    check_device(grad_output, input=input, map_mean=map_mean)
    vectors = vectors_of(grad_output, grad_output.shape[1], gain, mean_scale, constant, None)
    wanted = Wanted(grad_input=mask[0], grad_residual=mask[4], sums=any(mask[1:4]), dots=mask[1])
    error = center_error(
        grad_output, input, vectors.gain, vectors, saved, activation, slope, memory_format(grad_output), wanted
    )
    grads = reduce_samples(error, map_mean, vectors.gain, vectors, *mask[1:4])
    return error.grad_input, *grads, error.grad_residual
