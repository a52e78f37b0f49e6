"""The fused convolution: an implicit matrix product with the whole layer in its epilogue.

    output = act(gain * conv(input, weight) + beta[n, o] + residual),  beta = bias - mean_scale * map_mean,
    map_mean[n, o] = gain[o] * sum_{tap, c} weight[o, tap, c] * window_means[n, tap, c]

(``reference.deep_control_conv``; the means are known before the convolution because both are linear.) Everything is
channels_last: rows are output pixels of all samples, columns are filters, and what is summed over is (channel, tap).

Moved per layer: the input once for its window means and once for the product, weights, residual, and the output once.
Two passes move the input once and the output three times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import geometry
from .activation import activate, pack_bits, passes
from .division import divide
from .geometry import Layer, first_seen, in_units, load, seen_by, taps_inside
from .launch import INTERPRETED, Device, ceil_divide, on
from .tensors import Vectors, Windows
from .tuning import FORWARD_TILES, Product, Tile, pick, rank
from .window_mean import window_means

# The 32-bit indices of rows must hold the last tile's too, and one word a bit for each tap.
MAX_ROWS, MAX_TAPS = 2**31 - 2**16, 64


@triton.jit
def _mean_of_maps(
    window_means, weight, gain, mean_scale, bias, map_mean, beta,
    samples, channels, group_channels, group_filters,
    TAPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside_n, inside_o = n < samples, o < group_filters
    o += group * group_filters
    filters = tl.num_programs(2) * group_filters
    means_of_n = window_means + n.to(tl.int64)[:, None] * TAPS * channels + group * group_channels
    weights_of_o = weight + o[None, :] * TAPS * group_channels
    sums = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    chunks = tl.cdiv(group_channels, BLOCK_K)
    for step in range(0, TAPS * chunks):
        tap = step // chunks
        c = step % chunks * BLOCK_K + tl.arange(0, BLOCK_K)
        inside_c = c < group_channels
        means = tl.load(means_of_n + tap * channels + c[None, :], inside_n[:, None] & inside_c[None, :], 0.0)
        weights = tl.load(weights_of_o + tap * group_channels + c[:, None], inside_o[None, :] & inside_c[:, None], 0.0)
        if weights.dtype == tl.float32:
            sums = tl.dot(means, weights, sums, input_precision=PRECISION)
        else:
            # A mean is the sum of two 16-bit numbers to 2^-16 of itself or better, so tensor cores do not round it.
            high = means.to(weights.dtype)
            low = (means - high.to(tl.float32)).to(weights.dtype)
            sums = tl.dot(high, weights, sums)
            sums = tl.dot(low, weights, sums)
    if gain is not None:
        sums *= tl.load(gain + o, inside_o, 0.0)[None, :]
    shift = sums
    if mean_scale is not None:
        shift *= tl.load(mean_scale + o, inside_o, 0.0)[None, :]
    shift = -shift
    if bias is not None:
        shift += tl.load(bias + o, inside_o, 0.0)[None, :]
    at = n.to(tl.int64)[:, None] * filters + o[None, :]
    inside = inside_n[:, None] & inside_o[None, :]
    tl.store(map_mean + at, sums, inside)
    tl.store(beta + at, shift, inside)


@triton.jit
def _halves(acc):
    """The left and the right columns."""
    pairs = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def _finish(
    acc, m, inside_m, n, first, group,
    gain, mean_scale, beta, bias, residual, output, map_mean, bits, pre_activation, samples, pixels, group_filters,
    HELD: tl.constexpr, INDEX: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """From sums of rows m, which are of samples n, and columns from ``first`` on in a group to what is stored."""
    ROWS: tl.constexpr = acc.shape[0]
    WIDTH: tl.constexpr = acc.shape[1]
    o = first + tl.arange(0, WIDTH)
    inside_o = o < group_filters
    inside = inside_m[:, None] & inside_o[None, :]
    filters = tl.num_programs(1) * group_filters
    column = group * group_filters + o
    if gain is not None:
        acc *= tl.load(gain + column, inside_o, 0.0)[None, :]
    if HELD > 0:
        SAMPLES: tl.constexpr = ROWS // HELD
        maps = tl.reshape(tl.where(inside_m[:, None], acc, 0.0), (SAMPLES, HELD, WIDTH))
        mean = tl.div_rn(tl.sum(maps, 1), tl.cast(pixels, tl.float32))
        sample = tl.min(tl.reshape(n, (SAMPLES, HELD)), 1)
        at = sample.to(tl.int64)[:, None] * filters + column[None, :]
        tl.store(map_mean + at, mean, (sample < samples)[:, None] & inside_o[None, :])
        if mean_scale is not None:
            mean *= tl.load(mean_scale + column, inside_o, 0.0)[None, :]
        acc -= tl.reshape(tl.broadcast_to(mean[:, None, :], (SAMPLES, HELD, WIDTH)), (ROWS, WIDTH))
    if beta is not None:
        acc += tl.load(beta + n.to(INDEX)[:, None] * filters + column[None, :], inside, 0.0)
    elif bias is not None:
        acc += tl.load(bias + column, inside_o, 0.0)[None, :]
    at = m.to(INDEX)[:, None] * filters + column[None, :]
    if residual is not None:
        acc += tl.load(residual + at, inside, 0.0).to(tl.float32)
    if pre_activation is not None:
        tl.store(pre_activation + at, acc.to(pre_activation.dtype.element_ty), inside)
    tl.store(output + at, activate(acc, ACTIVATION, SLOPE).to(output.dtype.element_ty), inside)
    if bits is not None:
        packed = pack_bits(passes(acc, ACTIVATION) & inside_o[None, :])
        eighth = first // 8 + tl.arange(0, WIDTH // 8)
        row = bits + m.to(INDEX)[:, None] * tl.cdiv(filters, 8) + group * (group_filters // 8)
        tl.store(row + eighth[None, :], packed, inside_m[:, None] & (eighth < tl.cdiv(group_filters, 8))[None, :])


@triton.jit
def _convolve(
    input, weight, gain, mean_scale, beta, bias, residual, output, map_mean, bits, pre_activation,
    samples, channels, group_channels, group_filters,
    pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
    size_d, size_h, size_w,
    HELD: tl.constexpr,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr, FEW_CHANNELS: tl.constexpr,
    CHANNELS_UNIT: tl.constexpr, FILTERS_UNIT: tl.constexpr, INDEX: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    channels, group_channels = in_units(channels, CHANNELS_UNIT), in_units(group_channels, CHANNELS_UNIT)
    group_filters = in_units(group_filters, FILTERS_UNIT)
    rows = samples * pixels
    if HELD > 0:
        tiles_m = tl.cdiv(samples, BLOCK_M // HELD)
    else:
        tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(group_filters, BLOCK_N)
    program = tl.program_id(0)
    group = tl.program_id(1)
    # Programs that run together share rows of the input and columns of the weights, which stay in the cache.
    band = program // (GROUP_M * tiles_n)
    height = min(tiles_m - band * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    tile = band * GROUP_M + within % height
    first_filter = within // height * BLOCK_N
    o = first_filter + tl.arange(0, BLOCK_N)
    # Rows and columns that do not exist are loaded as others and not stored.
    if HELD > 0:
        r = tl.arange(0, BLOCK_M)
        n, p = tile * (BLOCK_M // HELD) + r // HELD, r % HELD
        m = n * pixels + p
        inside_m = (p < pixels) & (n < samples)
        seen_m = tl.minimum(m, rows - 1)
    else:
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside_m = m < rows
        seen_m = tl.minimum(m, rows - 1)
        n = divide(seen_m, pixels_by, pixels_shift)
    seen_o = tl.minimum(o, group_filters - 1)
    if POINTWISE:
        row = seen_m
    else:
        d, h, w, row = first_seen(
            seen_m, pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
            size_d, size_h, size_w, KERNEL_D, STRIDE_D, STRIDE_H, STRIDE_W, PADDING_D, PADDING_H, PADDING_W,
        )  # fmt: skip
    inputs = input + row.to(INDEX)[:, None] * channels + group * group_channels
    weights = weight + (group * group_filters + seen_o).to(INDEX)[None, :] * (TAPS * group_channels)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K)
    PADDED: tl.constexpr = PADDING_D + PADDING_H + PADDING_W > 0
    if FEW_CHANNELS:
        for first in range(0, TAPS * group_channels, BLOCK_K):
            flat = first + k
            exists = flat < TAPS * group_channels
            inside, distance = seen_by(
                d[:, None], h[:, None], w[:, None], flat[None, :] // group_channels, size_d, size_h, size_w,
                KERNEL_H, KERNEL_W, PADDING_D, PADDING_H, PADDING_W, DILATION_D, DILATION_H, DILATION_W,
            )  # fmt: skip
            ahead = distance * channels + flat[None, :] % group_channels
            a = tl.load(inputs + ahead, inside & exists[None, :], 0.0)
            b = tl.load(weights + flat[:, None], exists[:, None], 0.0)
            acc = tl.dot(a, b, acc)
    else:
        chunks = tl.cdiv(group_channels, BLOCK_K)
        WORD: tl.constexpr = tl.int32 if TAPS <= 32 else tl.int64
        if PADDED:
            on_input = taps_inside(
                d, h, w, size_d, size_h, size_w, KERNEL_D, KERNEL_H, KERNEL_W,
                PADDING_D, PADDING_H, PADDING_W, DILATION_D, DILATION_H, DILATION_W, WORD,
            )  # fmt: skip
        for step in range(0, TAPS * chunks):
            tap = step // chunks
            c = step % chunks * BLOCK_K + k
            kd, kh, kw = tap // (KERNEL_H * KERNEL_W), tap // KERNEL_W % KERNEL_H, tap % KERNEL_W
            ahead = ((kd * DILATION_D * size_h + kh * DILATION_H) * size_w + kw * DILATION_W) * channels + c
            exists = tl.full((BLOCK_K,), True, tl.int1)
            if not EVEN_K:
                exists = c < group_channels
            inside = tl.full((BLOCK_M,), True, tl.int1)
            if PADDED:
                inside = (on_input & (tl.full((), 1, WORD) << tap)) != 0
            a = load(inputs + ahead[None, :], inside[:, None] & exists[None, :], PADDED or not EVEN_K)
            b = load(weights + (tap * group_channels + c)[:, None], exists[:, None], not EVEN_K)
            acc = tl.dot(a, b, acc)

    # A part of the columns at a time, so that registers hold what is added to the accumulators beside them.
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    if PARTS == 1:
        parts = (acc,)
    elif PARTS == 2:
        parts = _halves(acc)
    else:
        left, right = _halves(acc)
        first, second = _halves(left)
        third, fourth = _halves(right)
        parts = (first, second, third, fourth)
    for i in tl.static_range(PARTS):
        _finish(
            parts[i], m, inside_m, n, first_filter + i * WIDTH, group,
            gain, mean_scale, beta, bias, residual, output, map_mean, bits, pre_activation,
            samples, pixels, group_filters, HELD, INDEX, ACTIVATION, SLOPE,
        )  # fmt: skip


# Below it a tap's channels do not fill the narrowest tile, so taps share tiles.
_FEW_CHANNELS = 16
# Samples and filters of a tile of means.
_MEANS_N, _MEANS_O = 16, 64
# A tile holds whole maps up to so many pixels.
_MOST_HELD = max(tile.m for tile in FORWARD_TILES)


def means_moved(layer: Layer) -> int:
    """Bytes that the means of maps take which are not held: the input once, its window means out, and the tiles of
    their product with the weights."""
    means = 4 * layer.samples * layer.windows.taps * layer.channels
    weights = layer.filters * layer.group_channels * layer.windows.taps * layer.itemsize
    return (
        layer.input_rows * layer.channels * layer.itemsize
        + means * (1 + ceil_divide(layer.group_filters, _MEANS_O))
        + weights * ceil_divide(layer.samples, _MEANS_N)
    )


def held_rows(windows: Windows) -> int:
    """How many rows of a tile a whole map of the output has, or 0 if it has too many pixels for one tile."""
    rows = max(16, triton.next_power_of_2(windows.pixels))
    return rows if rows <= _MOST_HELD else 0


def has_tile(layer: Layer, held: bool, device: Device) -> bool:
    """Whether the GPU has room for a tile, one that holds a map if ``held``."""
    whole = held_rows(layer.windows) if held else 0
    if held and not whole:
        return False
    return bool(rank(FORWARD_TILES, _product(layer, whole), device))


def _shares_taps(layer: Layer) -> bool:
    return layer.group_channels < _FEW_CHANNELS and not layer.windows.is_pointwise


def _product(layer: Layer, whole: int) -> Product:
    return Product(
        rows=layer.samples * whole if whole else layer.rows,
        columns=layer.group_filters,
        runs=layer.windows.taps,
        length=layer.group_channels,
        count=layer.groups,
        itemsize=layer.itemsize,
        stored=layer.itemsize,
        run=geometry.unit(layer.channels, layer.group_channels),
        whole=whole,
    )


def convolve(
    x: Tensor, weight: Tensor, vectors: Vectors, residual: Tensor | None, layer: Layer,
    activation: str, slope: float, output: Tensor, map_mean: Tensor, bits: Tensor | None, pre_activation: Tensor | None,
    held: bool,
) -> None:  # fmt: skip
    """Write ``output`` (N, O, *spatial), ``map_mean`` (N, O) where the maps are centred, and what backward keeps.

    All tensors of maps and the weight are dense in channels_last, float32 or 16 bits; input and output have at most
    ``MAX_ROWS`` pixels in all samples. ``held``: tiles hold whole maps and take the means themselves, as ``has_tile``
    lets them.
    """
    samples, channels, filters, groups, windows, _ = layer
    group_channels, group_filters = layer.group_channels, layer.group_filters
    whole = held_rows(windows) if held and vectors.centred else 0
    beta = None
    with on(x):
        if vectors.centred and not whole:
            means = window_means(x, windows)
            beta = torch.empty_like(map_mean)
            _mean_of_maps[ceil_divide(samples, _MEANS_N), ceil_divide(group_filters, _MEANS_O), groups](
                means, weight, vectors.gain, vectors.mean_scale, vectors.bias, map_mean, beta,
                samples, channels, group_channels, group_filters,
                TAPS=windows.taps, PRECISION="tf32x3", BLOCK_N=_MEANS_N, BLOCK_O=_MEANS_O, BLOCK_K=64,
                num_warps=4, num_stages=3, maxnreg=255,
            )  # fmt: skip

        def launch(tile: Tile) -> None:
            tiles = ceil_divide(samples, tile.m // whole) if whole else ceil_divide(layer.rows, tile.m)
            _convolve[tiles * ceil_divide(group_filters, tile.n), groups](
                x, weight, vectors.gain, vectors.mean_scale if whole else None, beta, vectors.bias, residual, output,
                map_mean if whole else None, bits, pre_activation,
                samples, channels, group_channels, group_filters, *geometry.numbers(windows),
                HELD=whole, **geometry.constants(windows),
                POINTWISE=windows.is_pointwise, FEW_CHANNELS=_shares_taps(layer),
                CHANNELS_UNIT=geometry.unit(channels, group_channels),
                FILTERS_UNIT=geometry.unit(filters, group_filters),
                INDEX=geometry.index_type(x, output), ACTIVATION=activation, SLOPE=slope,
                # Of the epilogue: 32 accumulators a thread at a time.
                PARTS=max(1, tile.m * tile.n // (1024 * tile.warps)) if not INTERPRETED else 2,
                GROUP_M=8, EVEN_K=group_channels % tile.k == 0, **tile.launch,
            )  # fmt: skip

        key = (*layer.tuning_key, whole)
        launch(pick(_convolve, FORWARD_TILES, key, lambda: _product(layer, whole), x, launch))
