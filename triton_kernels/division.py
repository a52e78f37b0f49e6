"""Division of indices by what a kernel learns when it runs: a multiplication and two shifts.

``x // d == (x * m) >> (31 + s)`` for 0 <= x < 2^31, 1 <= d < 2^31, ``s = ceil(log2(d))``, ``m = ceil(2^(31 + s) / d)``:
with ``e = m d - 2^(31 + s) < d <= 2^s`` the product is too large by ``x e < 2^(31 + s)``, less than what the next
quotient needs. ``m`` has 32 bits and the highest is set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import ceil_divide


def division(divisor: int) -> tuple[int, int]:
    """(multiplier, shift) for ``divide``, of 1 <= divisor < 2^31. The multiplier keeps its 32 bits as a signed number,
    as which Triton types every value alike."""
    shift = (divisor - 1).bit_length()
    return ceil_divide(1 << (31 + shift), divisor) - (1 << 32), shift


@triton.jit
def divide(x, multiplier, shift):
    """x // divisor of int32 x >= 0."""
    twice = x.to(tl.uint32, bitcast=True) << 1
    return (tl.umulhi(twice, multiplier.to(tl.uint32, bitcast=True)) >> shift).to(tl.int32, bitcast=True)
