// Elements, and sixteen bytes of them at a time, as numbers of the accumulation type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../types.h"
#include "ptx.cuh"

namespace deepcontrol::cuda {

template <class T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What one access moves where everything is aligned to it.
constexpr int kVectorBytes = 16;
template <class T>
constexpr int kVector = kVectorBytes / sizeof(T);

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
}

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

// Word by word: left to itself the compiler takes a vector of 16-bit elements apart and stores them one at a time.
template <class T>
__device__ __forceinline__ void unpack(const uint4& vector, Accumulation<T> (&values)[kVector<T>]) {
  if constexpr (sizeof(T) == 2) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const unsigned low = words[w] << 16, high = words[w] & 0xffff0000u;
        memcpy(&values[2 * w], &low, sizeof(low));
        memcpy(&values[2 * w + 1], &high, sizeof(high));
      } else {
        __half2 pair;
        memcpy(&pair, &words[w], sizeof(pair));
        values[2 * w] = __low2float(pair);
        values[2 * w + 1] = __high2float(pair);
      }
    }
  } else {
    memcpy(values, &vector, sizeof(vector));
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const Accumulation<T> (&values)[kVector<T>]) {
  uint4 vector;
  if constexpr (sizeof(T) == 2) {
    unsigned words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * w], values[2 * w + 1]);
        memcpy(&words[w], &pair, sizeof(pair));
      } else {
        const __half2 pair = __floats2half2_rn(values[2 * w], values[2 * w + 1]);
        memcpy(&words[w], &pair, sizeof(pair));
      }
    }
    vector = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    memcpy(&vector, values, sizeof(vector));
  }
  return vector;
}

// n is 1, or the length of a vector, to which the address then is aligned.
template <int n, class T>
__device__ __forceinline__ void load(const T* from, Accumulation<T> (&values)[n]) {
  if constexpr (n == 1) {
    values[0] = widen(*from);
  } else {
    unpack<T>(*reinterpret_cast<const uint4*>(from), values);
  }
}

// From memory that nothing writes while the kernel runs: such loads may be moved ahead of stores.
template <int n, class T>
__device__ __forceinline__ void load_constant(const T* from, Accumulation<T> (&values)[n]) {
  if constexpr (n == 1) {
    values[0] = widen(__ldg(from));
  } else {
    unpack<T>(__ldg(reinterpret_cast<const uint4*>(from)), values);
  }
}

template <int n, class T>
__device__ __forceinline__ void store(T* to, const Accumulation<T> (&values)[n]) {
  if constexpr (n == 1) {
    *to = narrow<T>(values[0]);
  } else {
    store_16(to, pack<T>(values));
  }
}

// What a load would bring back after a store.
template <class T, int n, class A>
__device__ __forceinline__ void round_to(A (&values)[n]) {
  if constexpr (n == 1) {
    values[0] = widen(narrow<T>(values[0]));
  } else {
    unpack<T>(pack<T>(values), values);
  }
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
