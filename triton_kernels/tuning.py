"""Which tiles the matrix products take: those that there are, those worth a try on a GPU, and the fastest of them.

What is worth a try is timed the first time that a kernel meets a shape on a GPU; what was found is kept in the process
and in Triton's cache, which the variable TRITON_CACHE_DIR moves.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Hashable, Sequence
from hashlib import sha256
from threading import Lock
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

from .launch import INTERPRETED, Device, ceil_divide, device_of

# Of those that fit, this many are timed.
_TRIED = 5
_REGISTERS = 65536  # of a multiprocessor
# A clock and multiprocessor, from NVIDIA's papers on A100 and H100: multiply-adds of 16-bit numbers by compute
# capability, and bytes from the L2 cache.
_MULTIPLY_ADDS = {8: 1024, 9: 2048}
_CACHE_BYTES = 40


class Tile(NamedTuple):
    """``m`` rows by ``n`` columns, ``k`` terms of each sum at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int | None]:
        """What a kernel takes of it."""
        # Where it is not told what there is, ptxas spills a register or two to get below a step of occupancy.
        registers = min(255, _REGISTERS // (32 * self.warps)) if self.m * self.n <= 64 * 64 else None
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": registers,
        }


class Product(NamedTuple):
    """``count`` matrix products of ``rows`` by ``columns``, each number a sum of ``runs`` times ``length`` terms."""

    rows: int
    columns: int
    runs: int
    length: int
    count: int
    itemsize: int
    stored: int
    """Bytes of a number of the result."""
    run: int
    """How many numbers of an operand lie side by side at least; fewer than eight bytes take many registers."""
    whole: int = 0
    """Rows that tiles must not cut, 0 where they may."""
    across: bool = False
    """Whether numbers that are summed together are not neighbours in memory."""


def _tiles(interpreted: tuple[int, ...], *others: tuple[int, ...]) -> list[Tile]:
    """In the interpreter the one whose edges tests meet."""
    return [Tile(*numbers) for numbers in ((interpreted,) if INTERPRETED else others)]


FORWARD_TILES = _tiles(
    (64, 32, 16, 1, 1),
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
WEIGHT_GRAD_TILES = _tiles(
    (16, 32, 16, 1, 1),
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
_picked: dict[Hashable, Tile] = {}
# Threads of several GPUs may meet a new shape at a time.
_picking = Lock()


def pick(
    kernel: triton.JITFunction, tiles: Sequence[Tile], key: tuple[object, ...], product: Callable[[], Product],
    tensor: Tensor, launch: Callable[[Tile], object],
) -> Tile:  # fmt: skip
    """The tile for a ``product()`` on the GPU of ``tensor``; ``launch`` tries one, writing its result whole each time.

    ``key`` tells products apart for which other tiles may be the best. While a CUDA graph is captured nothing can be
    timed, and the tile that is predicted to be the fastest is taken.
    """
    place = (kernel, tensor.device.index, tensor.dtype, key)
    return _picked.get(place) or _pick(place, kernel, tiles, product, tensor, launch)


def _pick(place, kernel, tiles, product, tensor, launch) -> Tile:
    with _picking:
        if place in _picked:
            return _picked[place]
        ranked = rank(tiles, product(), device_of(tensor))
        if len(ranked) == 1:
            tile = ranked[0]
        elif torch.cuda.is_current_stream_capturing():
            return ranked[0]
        else:
            tile = _timed(place, kernel, ranked[:_TRIED], tensor, launch)
        _picked[place] = tile
        return tile


def _timed(place, kernel, tiles: Sequence[Tile], tensor: Tensor, launch: Callable[[Tile], object]) -> Tile:
    """The fastest; what an earlier process found for this kernel, GPU and Triton counts."""
    gpu = torch.cuda.get_device_properties(tensor.device.index).name
    words = (triton.__version__, kernel.cache_key, gpu, *place[2:], *tiles)
    cache = get_cache_manager(sha256(" ".join(map(str, words)).encode()).hexdigest())
    found = _read(cache.get_file(_FILE), tiles)
    if found is not None:
        return found
    benchmark = triton.runtime.driver.active.get_benchmarker()
    seconds = {}
    for tile in tiles:
        try:
            seconds[tile] = benchmark(lambda tile=tile: launch(tile), quantiles=(0.5, 0.2, 0.8))[0]
        except OutOfResources as error:
            failure = error
    if not seconds:
        raise failure
    tile = min(seconds, key=seconds.__getitem__)
    cache.put(json.dumps(tile), _FILE, binary=False)
    return tile


_FILE = "deepcontrol_tile.json"


def _read(path: str | None, tiles: Sequence[Tile]) -> Tile | None:
    """The tile that a file of the cache names, if it is one of ``tiles``."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            tile = Tile(*json.load(file))
    except (OSError, TypeError, ValueError) as error:
        warnings.warn(f"deepcontrol_cuda times tiles again, since {path} cannot be read ({error})", stacklevel=2)
        return None
    return tile if tile in tiles else None


def rank(tiles: Sequence[Tile], product: Product, device: Device) -> list[Tile]:
    """Those that the GPU has room for, the most promising first; none if it has room for none."""
    possible = [tile for tile in tiles if _is_possible(tile, product, device)]
    fitting = [tile for tile in possible if _fits(tile, product, device)]
    fitting = fitting or sorted(possible, key=lambda tile: tile.m * tile.n * tile.k)[:1]
    return sorted(fitting, key=lambda tile: predicted_clocks(tile, product, device))


def shared_memory(tile: Tile, itemsize: int) -> int:
    """Bytes of a block: the operands of every stage."""
    return (tile.m + tile.n) * tile.k * itemsize * tile.stages


def _is_possible(tile: Tile, product: Product, device: Device) -> bool:
    fits = shared_memory(tile, product.itemsize) <= device.shared_memory
    return fits and (product.whole == 0 or tile.m % product.whole == 0)


def _fits(tile: Tile, product: Product, device: Device) -> bool:
    """Whether nothing spills and not most of it is padding."""
    m, n, k, warps, _ = tile
    if INTERPRETED:
        return True
    if k * product.itemsize > 128:
        return False
    # Wide numbers, gathers and means take registers, so fewer are left for sums.
    if product.whole and n > 128:
        return False
    threads = 32 * warps
    gathers = product.run * product.itemsize < 8
    if m * n // threads > (64 if product.itemsize == 4 or gathers else 128):
        return False
    if gathers and max(m, n) * k // threads > 16:
        return False
    # wgmma takes only 16-bit operands across; others would be turned number by number on their way.
    if product.across and product.itemsize == 4 and device.capability >= 90 and m >= 64 and warps >= 4:
        return False
    return n <= max(64, 2 * product.columns - 1) and m <= max(64, product.whole, 2 * product.rows - 1)


def predicted_clocks(tile: Tile, product: Product, device: Device) -> float:
    """What ``product`` takes, counted: the tiles of the busiest multiprocessor, each by its multiply-adds or loads."""
    m, n, k = tile[:3]
    tiles = ceil_divide(product.rows, m) * ceil_divide(product.columns, n) * product.count
    multiply_adds = _MULTIPLY_ADDS.get(device.capability // 10, _MULTIPLY_ADDS[9]) * 2 / product.itemsize
    step = max(m * n * k / multiply_adds, (m + n) * k * product.itemsize / _CACHE_BYTES)
    store = m * n * product.stored / _CACHE_BYTES
    return ceil_divide(tiles, device.processors) * (product.runs * ceil_divide(product.length, k) * step + store)
