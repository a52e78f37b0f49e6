// Runs of memory, of any length and alignment, between global and shared memory, by all threads of a block.
#pragma once

#include "plan.h"
#include "ptx.cuh"
#include "vector.cuh"

namespace deepcontrol::cuda {

// Starts bringing the block's elements on chip; copy_async_wait<0>() and a barrier end it.
template <class T>
__device__ __forceinline__ void stage(const T* __restrict__ from, T* __restrict__ staged, int elements) {
  int done = 0;
  if (is_aligned(from) && is_aligned(staged)) {
    constexpr int n = kVector<T>;
    done = elements / n * n;
    for (int i = threadIdx.x * n; i < done; i += kThreads * n) copy_async_16(staged + i, from + i);
    copy_async_commit();
  }
  for (int i = done + threadIdx.x; i < elements; i += kBatch * kThreads) {
    T batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (i + j * kThreads < elements) batch[j] = from[i + j * kThreads];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (i + j * kThreads < elements) staged[i + j * kThreads] = batch[j];
    }
  }
}

// The way back, behind a barrier.
template <class T>
__device__ __forceinline__ void unstage(const T* __restrict__ staged, T* __restrict__ to, int elements) {
  int done = 0;
  if (is_aligned(to) && is_aligned(staged)) {
    constexpr int n = kVector<T>;
    done = elements / n * n;
    for (int i = threadIdx.x * n; i < done; i += kThreads * n) {
      store_16(to + i, *reinterpret_cast<const uint4*>(staged + i));
    }
  }
  for (int i = done + threadIdx.x; i < elements; i += kThreads) to[i] = staged[i];
}

}  // namespace deepcontrol::cuda
