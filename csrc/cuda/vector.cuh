// Elements, and sixteen bytes of them at a time, as numbers of the accumulation type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../types.h"

namespace deepcontrol::cuda {

template <class T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What one access moves where everything is aligned to it.
constexpr int kVectorBytes = 16;
template <class T>
constexpr int kVector = kVectorBytes / sizeof(T);

template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T element[n];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Accumulation<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

template <int n, class T>
__device__ __forceinline__ void load(const T* from, Accumulation<T> (&values)[n]) {
  const Pack<T, n> pack = *reinterpret_cast<const Pack<T, n>*>(from);
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] = widen(pack.element[j]);
}

// From memory that nothing writes while the kernel runs: such loads may be moved ahead of stores.
template <int n, class T>
__device__ __forceinline__ void load_constant(const T* from, Accumulation<T> (&values)[n]) {
  if constexpr (sizeof(T) * n == sizeof(uint4)) {
    const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(from));
    Pack<T, n> pack;
    memcpy(&pack, &bytes, sizeof(pack));
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = widen(pack.element[j]);
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = widen(__ldg(from + j));
  }
}

template <int n, class T>
__device__ __forceinline__ void store(T* to, const Accumulation<T> (&values)[n]) {
  Pack<T, n> pack;
#pragma unroll
  for (int j = 0; j < n; ++j) pack.element[j] = narrow<T>(values[j]);
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

// The value as the output's dtype holds it.
template <class T>
__device__ __forceinline__ Accumulation<T> rounded(Accumulation<T> x) {
  return widen(narrow<T>(x));
}

// Calls f with a null pointer to the element type.
template <class F>
auto with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64: return f(static_cast<double*>(nullptr));
    case Dtype::bf16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::f16: return f(static_cast<__half*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

}  // namespace deepcontrol::cuda
