// What the center kernels of both layouts share: phases, and the vectors and sums of a channel.
#pragma once

#include "launch.cuh"
#include "params.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace deepcontrol::cuda {

// All in one launch, or the sums in one and what needs them in another.
enum class Phase { whole, sums, apply };

// Doubles go one by one: eight bytes a lane fill the wires too.
template <class T>
constexpr int kCenterVector = std::is_same_v<T, double> ? 1 : kVector<T>;

// Blocks a multiprocessor that registers must leave room for: more of them go to wide numbers and rare activations.
template <class T, bool rectified>
constexpr int kResidentBlocks = sizeof(T) == 8 || !rectified ? 2 : sizeof(T) == 4 ? 3 : 4;

// values[j] = vector[first + j], or `absent` where there is no vector or no such channel. `first` is a multiple of n.
template <int n, class A>
__device__ __forceinline__ void load_vector(const void* vector, int64_t first, bool inside, A absent, A (&values)[n]) {
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] = absent;
  if (!vector || !inside) return;
  const A* from = static_cast<const A*>(vector) + first;
  if constexpr (n % kVector<A> == 0) {
    if (is_aligned(vector)) {
#pragma unroll
      for (int j = 0; j < n; j += kVector<A>) {
        const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(from + j));
        memcpy(values + j, &bytes, sizeof(bytes));
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] = from[j];
}

template <class T>
__device__ __forceinline__ T* at(void* base, int64_t element) {
  return static_cast<T*>(base) + element;
}
template <class T>
__device__ __forceinline__ const T* at(const void* base, int64_t element) {
  return static_cast<const T*>(base) + element;
}

// Between sums and apply: the parts of each map's sum are added into the first of them.
template <class A>
static __global__ void __launch_bounds__(kThreads)
    fold_parts(A* workspace, const int64_t maps, const int kinds, const int parts) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= kinds * maps) return;
  A* first = workspace + i / maps * parts * maps + i % maps;
  *first = sum_parts(first, maps, parts);
}

// Launches what `kernel_of(T*, n)` gives for the dtype and the vector length, once or for each phase. `kinds` is how many
// sums a map has, none if nothing is summed.
template <class P, class F>
cudaError_t run_center(const P& p, const CenterPlan& plan, int kinds, cudaStream_t stream, F&& kernel_of) {
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulation<T>;
    const auto run = [&](auto kernel) {
      const auto phase = [&](Phase phase) {
        const int cluster = plan.cluster ? plan.parts : 1;
        return launch(kernel, plan.blocks, kThreads, plan.shared, cluster, stream, p, plan, phase);
      };
      if (plan.parts == 1 || plan.cluster) return phase(Phase::whole);
      cudaError_t failed = cudaSuccess;
      if (kinds) {
        const int64_t maps = p.maps.samples * p.maps.channels, blocks = ceil_divide(kinds * maps, kThreads);
        failed = phase(Phase::sums);
        if (failed != cudaSuccess) return failed;
        failed = launch(fold_parts<A>, blocks, kThreads, 0, 1, stream, static_cast<A*>(p.workspace), maps, kinds,
                        plan.parts);
      }
      return failed != cudaSuccess ? failed : phase(Phase::apply);
    };
    if (plan.vectorized) return run(kernel_of(type, std::integral_constant<int, kCenterVector<T>>{}));
    return run(kernel_of(type, std::integral_constant<int, 1>{}));
  });
}

}  // namespace deepcontrol::cuda
