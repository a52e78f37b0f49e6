// Activations, their derivatives, and the bits that the piecewise linear ones keep.
#pragma once

#include "../types.h"

namespace deepcontrol::cuda {

// identity and relu have kernels of their own, `rectified`: where every clock counts, three instructions an element are
// affordable and ten are not. All others share the second kind.
constexpr bool is_rectified(Activation activation) {
  return activation == Activation::identity || activation == Activation::relu;
}

// identity, relu, leaky_relu and relu6, with constants that are found once a thread.
template <class A, bool rectified>
struct Piecewise {
  A floor;    // of relu; NaN, which nothing is below: identity
  A slope;    // below zero
  A cap;      // the output stays at it above; NaN: there is no cap
  bool flat;  // below zero all is zero, -inf too, which zero times a slope would turn into NaN

  __device__ Piecewise(Activation activation, double negative_slope) {
    floor = activation == Activation::identity ? A(NAN) : A(0);
    slope = A(negative_slope);
    flat = activation == Activation::relu6;
    cap = activation == Activation::relu6 ? A(6) : A(NAN);
  }
  // From pre-activations to outputs; the result tells, one bit each, where the derivative is one. A NaN lets the gradient
  // of relu through and no other's, as PyTorch does on the CPU.
  template <int n>
  __device__ __forceinline__ unsigned operator()(A (&y)[n]) const {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if constexpr (rectified) {
        const bool pass = !(y[j] <= floor);
        y[j] = pass ? y[j] : A(0);
        bits |= pass ? 1u << j : 0u;
      } else {
        const A pre = y[j], below = flat ? A(0) : pre * slope;
        bits |= pre > A(0) && !(pre >= cap) ? 1u << j : 0u;
        y[j] = pre <= A(0) ? below : pre;
        y[j] = y[j] > cap ? cap : y[j];
      }
    }
    return bits;
  }
  // From gradients of the output to those of the pre-activation.
  template <int n>
  __device__ __forceinline__ void backward(A (&grad)[n], unsigned bits) const {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A below = rectified || flat ? A(0) : grad[j] * slope;
      grad[j] = bits & 1u << j ? grad[j] : below;
    }
  }
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * erfcf(x * -0.70710678118654752440f); }
__device__ __forceinline__ double normal_cdf(double x) { return 0.5 * erfc(x * -0.70710678118654752440); }

template <int n, class A>
__device__ __forceinline__ void apply_smooth(A (&y)[n], Activation activation) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const A pre = y[j];
    if (activation == Activation::silu) {
      y[j] = pre / (A(1) + exponential(-pre));
    } else if (activation == Activation::gelu) {
      y[j] = pre * normal_cdf(pre);
    } else {
      A lifted = pre + A(3);
      lifted = lifted < A(0) ? A(0) : lifted;
      lifted = lifted > A(6) ? A(6) : lifted;
      y[j] = pre * lifted / A(6);
    }
  }
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
