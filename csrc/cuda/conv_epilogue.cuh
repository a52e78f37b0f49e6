// What every fused convolution does with its sums: gain, shift, residual, activation, stores. A thread has eight neighbouring
// filters of one pixel, so that it writes whole vectors and a whole byte of bits.
#pragma once

#include "activation.cuh"
#include "params.h"
#include "vector.cuh"

namespace deepcontrol::cuda {

constexpr int kOctet = 8;

// values[j] = vector[first + j] for j < count, else `absent`.
template <class A>
__device__ __forceinline__ void load_octet(const void* vector, int64_t first, int count, A absent, A (&values)[kOctet]) {
  const A* from = static_cast<const A*>(vector) + first;
  if (vector && count >= kOctet && is_aligned(from)) {
#pragma unroll
    for (int j = 0; j < kOctet; j += kVector<A>) {
      const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(from + j));
      memcpy(values + j, &bytes, sizeof(bytes));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kOctet; ++j) values[j] = vector && j < count ? __ldg(from + j) : absent;
}

// Tensors of maps: `whole` if rows are whole vectors, aligned, and all eight exist.
template <class T>
__device__ __forceinline__ void store_octet(void* tensor, int64_t first, int count, bool whole,
                                            const Accumulation<T> (&values)[kOctet]) {
  T* to = static_cast<T*>(tensor) + first;
  if (whole) {
    constexpr int n = kVector<T>;
#pragma unroll
    for (int j = 0; j < kOctet; j += n) {
      Accumulation<T> vector[n];
#pragma unroll
      for (int i = 0; i < n; ++i) vector[i] = values[j + i];
      store_16(to + j, pack<T>(vector));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    if (j < count) to[j] = narrow<T>(values[j]);
  }
}
template <class T>
__device__ __forceinline__ void add_octet(const void* tensor, int64_t first, int count, bool whole,
                                          Accumulation<T> (&values)[kOctet]) {
  const T* from = static_cast<const T*>(tensor) + first;
  if (whole) {
    constexpr int n = kVector<T>;
#pragma unroll
    for (int j = 0; j < kOctet; j += n) {
      Accumulation<T> vector[n];
      unpack<T>(__ldg(reinterpret_cast<const uint4*>(from + j)), vector);
#pragma unroll
      for (int i = 0; i < n; ++i) values[j + i] += vector[i];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    if (j < count) values[j] += widen(from[j]);
  }
}

// The end of a layer for eight filters from `filter` on, a multiple of eight, of which `count` exist. Where there are
// groups, theirs are multiples of eight.
template <class T>
class Epilogue {
  using A = Accumulation<T>;

 public:
  __device__ __forceinline__ Epilogue(const ConvForward& p)
      : p_(p),
        rectifier_(p.activation, p.slope),
        piecewise_(p.activation, p.slope),
        bits_row_((p.filters + 7) / 8),
        aligned_(p.filters % kVector<T> == 0 && is_aligned(p.output) && is_aligned(p.residual) &&
                 is_aligned(p.pre_activation)) {}

  // From z, which has gain and shift already, of the output's pixel `row`, counted over all samples. `rectified` leaves out
  // the code of all activations but those: for where it is there several times.
  template <bool rectified = false>
  __device__ __forceinline__ void store(int64_t row, int filter, int count, A (&z)[kOctet]) const {
    const int64_t first = row * p_.filters + filter;
    const bool whole = aligned_ && count >= kOctet;
    if (p_.residual) add_octet<T>(p_.residual, first, count, whole, z);
    if (!rectified && is_smooth(p_.activation)) {
      if (p_.pre_activation) store_octet<T>(p_.pre_activation, first, count, whole, z);
      apply_smooth(z, p_.activation);
    } else {
      unsigned bits = rectified || is_rectified(p_.activation) ? rectifier_(z) : piecewise_(z);
      if (count < kOctet) bits &= (1u << count) - 1;
      if (p_.bits) p_.bits[row * bits_row_ + filter / 8] = static_cast<uint8_t>(bits);
    }
    store_octet<T>(p_.output, first, count, whole, z);
  }

 private:
  const ConvForward& p_;
  Piecewise<A, true> rectifier_;
  Piecewise<A, false> piecewise_;
  int64_t bits_row_;
  bool aligned_;
};

}  // namespace deepcontrol::cuda
