"""Which tiles the matrix products take: every configuration there is, those worth a try, and Triton's tuner.

The tuner times what is worth a try once for each shape and GPU, and keeps what it found in Triton's cache, which the
variable TRITON_CACHE_DIR moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import triton

from .launch import INTERPRETED, Device, ceil_divide, device_of

# Of those that fit, this many are timed.
_TRIED = 5
# Of a multiprocessor.
_THREADS, _REGISTERS = 2048, 65536
# A clock and multiprocessor, from NVIDIA's papers on A100 and H100: multiply-adds of 16-bit numbers by compute
# capability, and bytes from the L2 cache.
_MULTIPLY_ADDS = {8: 1024, 9: 2048}
_CACHE_BYTES = 40


class Product(NamedTuple):
    """``count`` matrix products of ``rows`` by ``columns``, each number a sum of ``runs`` times ``length`` terms."""

    rows: int
    columns: int
    runs: int
    length: int
    count: int
    itemsize: int
    run: int
    """How many numbers of an operand lie side by side at least; fewer than eight bytes take many registers."""
    whole: int = 0
    """Rows that tiles must not cut, 0 where they may."""
    across: bool = False
    """Whether numbers that are summed together are not neighbours in memory."""


def _config(m: int, n: int, k: int, warps: int, stages: int, **others: int) -> triton.Config:
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, **others}
    # Where it is not told what there is, ptxas spills a register or two to get below a step of occupancy.
    registers = min(255, _REGISTERS // (32 * warps)) if m * n <= 64 * 64 else None
    return triton.Config(tile, num_warps=warps, num_stages=stages, maxnreg=registers)


# In the interpreter every tile has edges.
_INTERPRETED_FORWARD, _INTERPRETED_WEIGHT_GRAD = (64, 32, 16, 1, 1), (16, 32, 16, 1, 1)
_FORWARD_TILES = (
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (128, 128, 32, 4, 4),
    (128, 64, 64, 4, 4),
    (128, 64, 32, 4, 4),
    (256, 64, 64, 8, 3),
    (256, 64, 32, 8, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 4, 4),
    (128, 32, 64, 4, 4),
    (128, 32, 32, 4, 4),
    (128, 16, 32, 4, 4),
)
_WEIGHT_GRAD_TILES = (
    (128, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 4, 4),
    (64, 64, 32, 2, 4),
    (64, 32, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (32, 64, 32, 4, 4),
    (16, 64, 32, 4, 4),
)


def forward_configs() -> list[triton.Config]:
    """``PARTS`` is how many parts the epilogue takes a tile in: 32 accumulators a thread each."""
    if INTERPRETED:
        return [_config(*_INTERPRETED_FORWARD, GROUP_M=2, PARTS=2)]
    return [
        _config(m, n, k, warps, stages, GROUP_M=8, PARTS=max(1, m * n // (32 * warps) // 32))
        for m, n, k, warps, stages in _FORWARD_TILES
    ]


def weight_grad_configs() -> list[triton.Config]:
    return [_config(*tile) for tile in ((_INTERPRETED_WEIGHT_GRAD,) if INTERPRETED else _WEIGHT_GRAD_TILES)]


_KEY = (
    "rows_log2", "channels", "group_channels", "group_filters", "KERNEL_D", "KERNEL_H", "KERNEL_W", "STRIDE_W",
)  # fmt: skip


def tuned(configs: Sequence[triton.Config], key: Sequence[str], product_of: Callable[[dict], Product]):
    """Decorates a kernel with Triton's tuner, which tries the most promising of ``configs`` that the GPU has room for.

    ``key`` names arguments that matter besides those that every convolution has. ``product_of`` makes the product of a
    call's arguments by name, of which ``input`` is a tensor.
    """

    def keep(configs: Sequence[triton.Config], named: dict, **others) -> list[triton.Config]:
        arguments = {**named, **others}
        device = device_of(arguments["input"])
        product = product_of(arguments)
        possible = [config for config in configs if _is_possible(config, product, device)]
        fitting = [config for config in possible if _fits(config, product, device)] or [min(possible, key=_numbers)]
        return sorted(fitting, key=lambda config: predicted_clocks(config, product, device))[:_TRIED]

    return triton.autotune(
        configs=list(configs), key=[*_KEY, *key], prune_configs_by={"early_config_prune": keep}, cache_results=True
    )


def shared_memory(config: triton.Config, itemsize: int) -> int:
    """Bytes of a block: the operands of every stage."""
    m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return (m + n) * k * itemsize * config.num_stages


def _numbers(config: triton.Config) -> int:
    return config.kwargs["BLOCK_M"] * config.kwargs["BLOCK_N"] * config.kwargs["BLOCK_K"]


def _is_possible(config: triton.Config, product: Product, device: Device) -> bool:
    fits = shared_memory(config, product.itemsize) <= device.shared_memory
    return fits and (product.whole == 0 or config.kwargs["BLOCK_M"] % product.whole == 0)


def _fits(config: triton.Config, product: Product, device: Device) -> bool:
    """Whether nothing spills and not most of it is padding."""
    m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    if k * product.itemsize > 128:
        return False
    # Wide numbers and gathers take more registers for what is not summed, so fewer are left for sums.
    threads = 32 * config.num_warps
    gathers = product.run * product.itemsize < 8
    if m * n // threads > (64 if product.itemsize == 4 or gathers else 128):
        return False
    if gathers and max(m, n) * k // threads > 16:
        return False
    # wgmma takes only 16-bit operands across; others would be turned number by number on their way.
    if product.across and product.itemsize == 4 and device.capability >= 90 and m >= 64 and config.num_warps >= 4:
        return False
    return n <= max(64, 2 * product.columns - 1) and m <= max(64, product.whole, 2 * product.rows - 1)


def predicted_clocks(config: triton.Config, product: Product, device: Device) -> float:
    """What ``product`` takes, counted: waves of tiles, each as long as its multiply-adds or its loads."""
    m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    threads = 32 * config.num_warps
    registers = threads * min(255, m * n // threads + 64)
    resident = min(
        device.shared_memory // shared_memory(config, product.itemsize), _THREADS // threads, _REGISTERS // registers
    )
    resident = max(1, resident)
    tiles = ceil_divide(product.rows, m) * ceil_divide(product.columns, n) * product.count
    waves = ceil_divide(tiles, resident * device.processors)
    multiply_adds = _MULTIPLY_ADDS.get(device.capability // 10, _MULTIPLY_ADDS[9]) * 2 / product.itemsize
    step = max(m * n * k / multiply_adds, (m + n) * k * product.itemsize / _CACHE_BYTES)
    store = m * n * product.itemsize / _CACHE_BYTES
    return waves * resident * (product.runs * ceil_divide(product.length, k) * step + store)
