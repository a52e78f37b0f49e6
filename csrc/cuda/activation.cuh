// Activations, their derivatives, and the bits that the piecewise linear ones keep.
#pragma once

#include "../types.h"

namespace deepcontrol::cuda {

// identity, relu, leaky_relu and relu6 as one formula whose constants are found once a thread.
template <class A>
struct Piecewise {
  A slope;        // below zero
  A cap;          // the output stays at it above; NaN, which nothing exceeds: there is no cap
  bool flat;      // below zero all is zero, -inf too, which zero times a slope would turn into NaN
  bool nan_passes;  // as in PyTorch: a NaN lets the gradient of relu through and no other's

  __device__ Piecewise(Activation activation, double negative_slope) {
    slope = activation == Activation::identity ? A(1) : A(negative_slope);
    flat = activation == Activation::relu || activation == Activation::relu6;
    cap = activation == Activation::relu6 ? A(6) : A(NAN);
    nan_passes = activation == Activation::relu;
  }
  __device__ __forceinline__ A value(A pre) const {
    const A below = flat ? A(0) : pre * slope;
    const A y = pre <= A(0) ? below : pre;
    return y > cap ? cap : y;
  }
  // Where the derivative is one.
  __device__ __forceinline__ bool passes(A pre) const {
    return (nan_passes ? !(pre <= A(0)) : pre > A(0)) && !(pre >= cap);
  }
  __device__ __forceinline__ A backward(A grad, bool pass) const {
    const A below = flat ? A(0) : grad * slope;
    return pass ? grad : below;
  }
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * erfcf(x * -0.70710678118654752440f); }
__device__ __forceinline__ double normal_cdf(double x) { return 0.5 * erfc(x * -0.70710678118654752440); }

template <class A>
__device__ __forceinline__ A smooth_value(A pre, Activation activation) {
  if (activation == Activation::silu) return pre / (A(1) + exponential(-pre));
  if (activation == Activation::gelu) return pre * normal_cdf(pre);
  A lifted = pre + A(3);
  lifted = lifted < A(0) ? A(0) : lifted;
  lifted = lifted > A(6) ? A(6) : lifted;
  return pre * lifted / A(6);
}

template <class A>
__device__ __forceinline__ A smooth_derivative(A pre, Activation activation) {
  if (activation == Activation::silu) {
    const A s = A(1) / (A(1) + exponential(-pre));
    return s * (A(1) + pre * (A(1) - s));
  }
  if (activation == Activation::gelu) {
    return normal_cdf(pre) + pre * exponential(pre * pre * A(-0.5)) * A(0.39894228040143267794);
  }
  const A inside = pre / A(3) + A(0.5);
  const A below = pre <= A(-3) ? A(0) : inside;
  return pre >= A(3) ? A(1) : below;
}

// The bits of n neighbouring elements a thread, lowest first, gathered to one byte in the first of every 8 / n lanes.
// Every lane of the warp calls it.
template <int n>
__device__ __forceinline__ unsigned gather_byte(unsigned bits) {
  static_assert(n == 1 || n == 2 || n == 4 || n == 8);
  unsigned byte = bits;
#pragma unroll
  for (int lanes = 1; lanes * n < 8; lanes *= 2) byte |= __shfl_down_sync(0xffffffffu, byte, lanes) << (lanes * n);
  return byte & 0xffu;
}

}  // namespace deepcontrol::cuda
