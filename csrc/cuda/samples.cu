// The gradients of gain, mean_scale and bias from the sums over each map: sums over the samples, always in the same order.
// A block has eight channels, a sector of memory, each thread every 32nd sample of one of them.

#include "launch.cuh"
#include "params.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace deepcontrol::cuda {
namespace {

constexpr int kLogColumns = 3;
constexpr int kColumns = 1 << kLogColumns;
constexpr int kKinds = 3;

template <class A>
__global__ void __launch_bounds__(kThreads, 2) add_samples(const __grid_constant__ ReduceSamples p) {
  const int64_t channel = int64_t(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const bool inside = channel < p.channels;
  const A* sums = static_cast<const A*>(p.sums) + channel;
  const A* dots = static_cast<const A*>(p.dots) + channel;
  const A* means = static_cast<const A*>(p.map_mean) + channel;
  A total[kKinds] = {};  // of sums, dots, map_mean * sums
  if (inside) {
    constexpr int kRows = kThreads / kColumns;
    for (int64_t first = threadIdx.x / kColumns; first < p.samples; first += kBatch * kRows) {
      A sum[kBatch] = {}, dot[kBatch] = {}, mean[kBatch] = {};
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int64_t n = first + j * kRows;
        if (n >= p.samples) continue;
        sum[j] = sums[n * p.channels];
        if (p.dots) dot[j] = dots[n * p.channels];
        if (p.map_mean) mean[j] = means[n * p.channels];
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        total[0] += sum[j];
        total[1] += dot[j];
        total[2] += mean[j] * sum[j];
      }
    }
  }
  A* scratch = reinterpret_cast<A*>(dynamic_shared());
  A* totals = scratch + scratch_elements(kColumns, kKinds);
  sum_rows<kKinds>(total, kLogColumns, scratch, totals);
  if (!inside || threadIdx.x >= kColumns) return;
  const A sum = totals[threadIdx.x * kKinds], dot = totals[threadIdx.x * kKinds + 1];
  const A removed = totals[threadIdx.x * kKinds + 2];
  const A scale = p.scale ? static_cast<const A*>(p.scale)[channel] : A(1);
  const A mean_scale = p.mean_scale ? static_cast<const A*>(p.mean_scale)[channel] : A(p.constant);
  if (p.grad_bias) static_cast<A*>(p.grad_bias)[channel] = sum;
  if (p.grad_mean_scale) static_cast<A*>(p.grad_mean_scale)[channel] = -scale * removed;
  if (p.grad_gain) static_cast<A*>(p.grad_gain)[channel] = p.map_mean ? dot - mean_scale * removed : dot;
}

}  // namespace

cudaError_t launch_reduce_samples(const ReduceSamples& p, cudaStream_t stream) {
  const int64_t blocks = ceil_divide(p.channels, kColumns);
  const int elements = scratch_elements(kColumns, kKinds) + kColumns * kKinds;
  if (p.dtype == Dtype::f64) return launch(add_samples<double>, blocks, kThreads, elements * 8, 1, stream, p);
  return launch(add_samples<float>, blocks, kThreads, elements * 4, 1, stream, p);
}

}  // namespace deepcontrol::cuda
