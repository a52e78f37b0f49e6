// The gradients of gain, mean_scale and bias from the sums over each map: sums over the samples, always in the same order.
// A block has 32 channels, each thread every eighth sample of one of them.

#include "launch.cuh"
#include "params.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace deepcontrol::cuda {
namespace {

constexpr int kLogColumns = 5;
constexpr int kColumns = 1 << kLogColumns;
constexpr int kKinds = 3;

template <class A>
__global__ void __launch_bounds__(kThreads) add_samples(const __grid_constant__ ReduceSamples p) {
  const int64_t channel = int64_t(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const bool inside = channel < p.channels;
  const A* sums = static_cast<const A*>(p.sums) + channel;
  const A* dots = static_cast<const A*>(p.dots) + channel;
  const A* means = static_cast<const A*>(p.map_mean) + channel;
  A total[kKinds] = {};  // of sums, dots, map_mean * sums
  if (inside) {
#pragma unroll 4
    for (int64_t n = threadIdx.x / kColumns; n < p.samples; n += kThreads / kColumns) {
      const A sum = p.sums ? sums[n * p.channels] : A(0);
      total[0] += sum;
      if (p.dots) total[1] += dots[n * p.channels];
      if (p.map_mean) total[2] += means[n * p.channels] * sum;
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
