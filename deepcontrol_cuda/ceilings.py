"""What a GPU reaches at best, from NVIDIA's data sheets; what predictions and shares are made of."""

from __future__ import annotations

from typing import NamedTuple


class Ceilings(NamedTuple):
    """Bytes a second from memory and from first-level caches, and operations a second on 16-bit numbers (two for a
    multiply-add)."""

    name: str
    bytes: float
    cached: float
    operations: float


# Without sparsity, by the first digit of the compute capability; caches give 128 bytes a clock and multiprocessor.
BY_GENERATION = {
    8: Ceilings("A100 SXM 80GB", 2.039e12, 108 * 128 * 1.41e9, 312e12),
    9: Ceilings("H100 SXM", 3.35e12, 132 * 128 * 1.83e9, 989.4e12),
}
H100 = BY_GENERATION[9]
