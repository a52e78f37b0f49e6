"""The weight gradient of a convolution as an implicit matrix product, up to sums that ``kernel_gradients.finish`` adds.

    partials[split, o, tap, c] = sum over the output pixels m of a split of grad[m, o] * input[row(m, tap), c]

Everything is channels_last. Pixels are split among programs where there are too few tiles for the GPU; no two programs
add to one number, so with one tile the sums are the same from run to run. Gain, its gradient and the projection are
applied where the partials are added (``reference.finish_weight_grad``).

Moved: gradient and input once from memory (tiles that run together share them in the cache), partials out and in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import geometry
from .geometry import Layer, first_seen, in_units, load, seen_by
from .launch import INTERPRETED, ceil_divide, device_of, on
from .tuning import WEIGHT_GRAD_TILES, Product, Tile, pick


@triton.jit
def _weight_grad(
    input, grad, partials,
    rows, rows_of_split, groups, channels, group_channels, group_filters,
    pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
    size_d, size_h, size_w,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr, FEW_CHANNELS: tl.constexpr,
    CHANNELS_UNIT: tl.constexpr, FILTERS_UNIT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    PADDED: tl.constexpr = PADDING_D + PADDING_H + PADDING_W > 0
    channels, group_channels = in_units(channels, CHANNELS_UNIT), in_units(group_channels, CHANNELS_UNIT)
    group_filters = in_units(group_filters, FILTERS_UNIT)
    # Tiles of one split run together: they read the same pixels.
    tiles_o = tl.cdiv(group_filters, BLOCK_M)
    if FEW_CHANNELS:
        tiles_c = tl.cdiv(TAPS * group_channels, BLOCK_N)
    else:
        tiles_c = tl.cdiv(group_channels, BLOCK_N)
    program = tl.program_id(0)
    o = program % tiles_o * BLOCK_M + tl.arange(0, BLOCK_M)
    program = program // tiles_o
    column = program % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // tiles_c
    if FEW_CHANNELS:
        # The channels of all taps side by side.
        tap, c = column // group_channels, column % group_channels
        exists_c = column < TAPS * group_channels
    else:
        tap, c = program % TAPS, column
        exists_c = column < group_channels
        program = program // TAPS
    group = program % groups
    split = program // groups
    exists_o = o < group_filters
    loaded_o, loaded_c = tl.full((BLOCK_M,), True, tl.int1), tl.full((BLOCK_N,), True, tl.int1)
    if not EVEN_M:
        loaded_o = exists_o
    if not EVEN_N:
        loaded_c = exists_c
    filters = groups * group_filters
    grads = grad + group * group_filters + o[:, None]
    inputs = input + group * group_channels + c[None, :]
    begin = split * rows_of_split
    end = tl.minimum(begin + rows_of_split, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(begin, end, BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        exists = tl.full((BLOCK_K,), True, tl.int1)
        if not EVEN_K:
            exists = m < end
        a = load(grads + m.to(INDEX)[None, :] * filters, loaded_o[:, None] & exists[None, :], not (EVEN_M and EVEN_K))
        loaded = exists[:, None] & loaded_c[None, :]
        if POINTWISE:
            row = m[:, None]
        else:
            d, h, w, row = first_seen(
                m, pixels, pixels_by, pixels_shift, plane, plane_by, plane_shift, width, width_by, width_shift,
                size_d, size_h, size_w, KERNEL_D, STRIDE_D, STRIDE_H, STRIDE_W, PADDING_D, PADDING_H, PADDING_W,
            )  # fmt: skip
            if FEW_CHANNELS:
                inside, distance = seen_by(
                    d[:, None], h[:, None], w[:, None], tap[None, :], size_d, size_h, size_w, KERNEL_H, KERNEL_W,
                    PADDING_D, PADDING_H, PADDING_W, DILATION_D, DILATION_H, DILATION_W,
                )  # fmt: skip
                loaded &= inside
                row = row[:, None] + distance
            else:
                inside, distance = seen_by(
                    d, h, w, tap, size_d, size_h, size_w, KERNEL_H, KERNEL_W,
                    PADDING_D, PADDING_H, PADDING_W, DILATION_D, DILATION_H, DILATION_W,
                )  # fmt: skip
                loaded &= inside[:, None]
                row = (row + distance)[:, None]
        b = load(inputs + row.to(INDEX) * channels, loaded, PADDED or not (EVEN_N and EVEN_K))
        acc = tl.dot(a, b, acc)
    if FEW_CHANNELS:
        place = column
    else:
        place = tap * group_channels + c
    of_filter = (split * filters + group * group_filters + o).to(tl.int64) * (TAPS * group_channels)
    tl.store(partials + of_filter[:, None] + place[None, :], acc, exists_o[:, None] & exists_c[None, :])


# Below it a tap's channels do not fill the narrowest tile, so taps share tiles.
_FEW_CHANNELS = 32
# What partials are planned for: numbers of a tile, blocks of a multiprocessor, rows that are worth a block.
_TILE, _BLOCKS, _LEAST_ROWS = 128 * 64, 2, 512


def _shares_taps(layer: Layer) -> bool:
    return layer.group_channels < _FEW_CHANNELS and not layer.windows.is_pointwise


def weight_grad_partials(x: Tensor, grad: Tensor, layer: Layer) -> Tensor:
    """(SPLITS, O, taps, C / groups) float32 whose sum over the first is ``conv_weight_grad(x, grad)``.

    ``x`` (N, C, *spatial) and ``grad`` (N, O, *output) dense in channels_last, float32 or 16 bits, with at most
    ``conv_forward.MAX_ROWS`` pixels in all samples each.
    """
    _, channels, filters, groups, windows, itemsize = layer
    group_channels, group_filters, rows = layer.group_channels, layer.group_filters, layer.rows
    splits, rows_of_split = _split(rows, filters * windows.taps * group_channels, device_of(x).processors)
    partials = x.new_empty((splits, filters, windows.taps, group_channels), dtype=torch.float32)
    few = _shares_taps(layer)
    columns, taps_apart = (group_channels * windows.taps, 1) if few else (group_channels, windows.taps)
    channels_unit, filters_unit = geometry.unit(channels, group_channels), geometry.unit(filters, group_filters)

    def product() -> Product:
        return Product(
            rows=group_filters,
            columns=columns,
            runs=1,
            length=rows_of_split,
            count=splits * taps_apart * groups,
            itemsize=itemsize,
            stored=4,
            run=min(channels_unit, filters_unit),
            across=True,
        )

    def launch(tile: Tile) -> None:
        tiles = ceil_divide(group_filters, tile.m) * ceil_divide(columns, tile.n)
        _weight_grad[tiles * taps_apart * groups * splits,](
            x, grad, partials,
            rows, rows_of_split, groups, channels, group_channels, group_filters, *geometry.numbers(windows),
            **geometry.constants(windows),
            POINTWISE=windows.is_pointwise, FEW_CHANNELS=few, CHANNELS_UNIT=channels_unit, FILTERS_UNIT=filters_unit,
            INDEX=geometry.index_type(x, grad),
            # Splits begin at multiples of the largest block.
            EVEN_M=group_filters % tile.m == 0, EVEN_N=columns % tile.n == 0, EVEN_K=rows % tile.k == 0,
            **tile.launch,
        )  # fmt: skip

    with on(x):
        launch(pick(_weight_grad, WEIGHT_GRAD_TILES, layer.tuning_key, product, x, launch))
    return partials


def _split(rows: int, numbers: int, processors: int) -> tuple[int, int]:
    """How many programs share the rows of one tile, and the rows of each, where the gradient has ``numbers``."""
    if INTERPRETED:
        # Two splits where there are rows for two blocks.
        rows_of_split = ceil_divide(ceil_divide(rows, 2), 16) * 16
        return ceil_divide(rows, rows_of_split), rows_of_split
    wanted = ceil_divide(_BLOCKS * processors, ceil_divide(numbers, _TILE))
    splits = max(1, min(wanted, rows // _LEAST_ROWS))
    # Whole blocks of rows, and no split without any.
    rows_of_split = ceil_divide(ceil_divide(rows, splits), 64) * 64
    return ceil_divide(rows, rows_of_split), rows_of_split
