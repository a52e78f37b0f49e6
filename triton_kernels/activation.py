"""Activations, their derivatives, and the bits that the piecewise linear ones keep; names as in ``activations.py``.

Tiles are (rows, columns) of the accumulation type, columns innermost in memory. Bits are packed along columns.
"""

import triton
import triton.language as tl


@triton.jit
def activate(pre, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """From pre-activations to outputs. A NaN stays one."""
    if ACTIVATION == "relu":
        return tl.where(pre <= 0, 0.0, pre)
    elif ACTIVATION == "leaky_relu":
        return tl.where(pre <= 0, pre * tl.full((), SLOPE, pre.dtype), pre)
    elif ACTIVATION == "relu6":
        return tl.where(pre <= 0, 0.0, tl.where(pre > 6, 6.0, pre))
    elif ACTIVATION == "silu":
        return pre / (1 + tl.exp(-pre))
    elif ACTIVATION == "gelu":
        return pre * _normal_cdf(pre)
    elif ACTIVATION == "hardswish":
        lifted = pre + 3
        lifted = tl.where(lifted < 0, 0.0, tl.where(lifted > 6, 6.0, lifted))
        return pre * lifted / 6
    else:
        return pre


@triton.jit
def passes(pre, ACTIVATION: tl.constexpr):
    """Where the derivative of relu, leaky_relu or relu6 is one; a NaN lets the gradient of relu alone through."""
    if ACTIVATION == "relu":
        return (pre <= 0) == 0
    elif ACTIVATION == "relu6":
        return (pre > 0) & (pre < 6)
    else:
        return pre > 0


@triton.jit
def pack_bits(bits):
    """(R, C) booleans as (R, C / 8) bytes, lowest bit first."""
    eights = tl.reshape(bits.to(tl.int32), (bits.shape[0], bits.shape[1] // 8, 8))
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed):
    """(R, C / 8) bytes as (R, C) booleans."""
    ROWS: tl.constexpr = packed.shape[0]
    COLUMNS: tl.constexpr = packed.shape[1] * 8
    eights = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(eights, (ROWS, COLUMNS)) != 0


@triton.jit
def through_bits(grad, bits, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """From gradients of the output to those of the pre-activation, by the bits that ``passes`` told."""
    if ACTIVATION == "leaky_relu":
        return tl.where(bits, grad, grad * tl.full((), SLOPE, grad.dtype))
    else:
        return tl.where(bits, grad, 0.0)


@triton.jit
def derivative(pre, ACTIVATION: tl.constexpr):
    """Of silu, gelu and hardswish in the pre-activation."""
    if ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-pre))
        return s * (1 + pre * (1 - s))
    elif ACTIVATION == "gelu":
        return _normal_cdf(pre) + pre * tl.exp(pre * pre * -0.5) * tl.full((), 0.39894228040143267794, pre.dtype)
    else:
        inside = pre / 3 + 0.5
        return tl.where(pre <= -3, 0.0, tl.where(pre >= 3, 1.0, inside))


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1 + tl.erf(x * tl.full((), 0.70710678118654752440, x.dtype)))
