// Sums over the threads of a block and the blocks of a cluster, always in the same order.
#pragma once

#include "plan.h"
#include "ptx.cuh"

namespace deepcontrol::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Sums over the lanes that are multiples of `step` apart, `span` lanes in all; powers of two. Every lane gets its sum.
template <class A>
__device__ __forceinline__ A sum_lanes(A value, int step, int span) {
  for (int distance = span / 2; distance >= step; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Each thread of a block holds sums of `n` channels, those of column threadIdx.x % columns, where columns is 2^log_columns.
// Writes to totals[0 .. columns * n) their sums over the block, for all threads to read. `scratch` holds
// scratch_elements(columns, n).
template <int n, class A>
__device__ __forceinline__ void sum_rows(const A (&sums)[n], int log_columns, A* scratch, A* totals) {
  const unsigned thread = threadIdx.x, lane = thread % 32, columns = 1u << log_columns, width = columns * n;
  const unsigned column = thread & (columns - 1), group = thread >> (log_columns < 5 ? 5 : log_columns);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const A sum = columns < 32 ? sum_lanes(sums[j], columns, 32) : sums[j];
    if (lane < columns) scratch[group * width + column * n + j] = sum;
  }
  __syncthreads();
  const unsigned groups = kThreads >> (log_columns < 5 ? 5 : log_columns);
  for (unsigned c = thread; c < width; c += kThreads) {
    A total = 0;
    for (unsigned g = 0; g < groups; ++g) total += scratch[g * width + c];
    totals[c] = total;
  }
  __syncthreads();
}

// The sum of parts that lie `stride` apart, by groups, so that the rounding error does not grow with their number.
template <class A>
__device__ __forceinline__ A sum_parts(const A* parts, int64_t stride, int count) {
  constexpr int kGroup = 16;
  A total = 0;
  for (int start = 0; start < count; start += kGroup) {
    A sum = 0;
#pragma unroll 4
    for (int part = start; part < count && part < start + kGroup; ++part) sum += parts[part * stride];
    total += sum;
  }
  return total;
}

// The same array in every block of the cluster: `sums` becomes its sum over the blocks, for all threads to read. A call of
// cluster_wait() must follow behind everything else, since no block may leave or change its array while another reads it.
template <class A>
__device__ __forceinline__ void sum_cluster(const A* totals, int count, int blocks, A* sums) {
  cluster_arrive();
  cluster_wait();
  for (int c = threadIdx.x; c < count; c += kThreads) {
    A sum = 0;
    for (int rank = 0; rank < blocks; ++rank) sum += load_from_cluster(totals + c, rank);
    sums[c] = sum;
  }
  __syncthreads();
  cluster_arrive();
}

}  // namespace deepcontrol::cuda
