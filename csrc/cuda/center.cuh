// What the center kernels of both layouts share: phases, and the vectors and sums of a channel.
#pragma once

#include "launch.cuh"
#include "params.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace deepcontrol::cuda {

// All in one launch, or the sums in one and what needs them in a second.
enum class Phase { whole, sums, apply };

// Doubles go one by one: eight bytes a lane fill the wires too.
template <class T>
constexpr int kCenterVector = std::is_same_v<T, double> ? 1 : kVector<T>;

// Doubles and the rarer activations take more registers.
template <class T, bool rectified>
constexpr int kBlocksOf = std::is_same_v<T, double> || !rectified ? 2 : kBlocks;

// values[j] = vector[first + j], or `absent` where there is no vector or no such channel.
template <int n, class A>
__device__ __forceinline__ void load_vector(const void* vector, int64_t first, bool inside, A absent, A (&values)[n]) {
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] = vector && inside ? static_cast<const A*>(vector)[first + j] : absent;
}

template <class T>
__device__ __forceinline__ T* at(void* base, int64_t element) {
  return static_cast<T*>(base) + element;
}
template <class T>
__device__ __forceinline__ const T* at(const void* base, int64_t element) {
  return static_cast<const T*>(base) + element;
}

// Launches what `kernel_of(T*, n)` gives for the dtype and the vector length, once or for each phase.
template <class P, class F>
cudaError_t run_center(const P& p, const CenterPlan& plan, bool centred, cudaStream_t stream, F&& kernel_of) {
  return with_type(p.dtype, [&](auto* type) {
    const auto run = [&](auto kernel) {
      const int cluster = plan.cluster ? plan.parts : 1;
      const auto phase = [&](Phase phase) {
        return launch(kernel, plan.blocks, kThreads, plan.shared, cluster, stream, p, plan, phase);
      };
      if (plan.parts == 1 || plan.cluster) return phase(Phase::whole);
      const cudaError_t failed = centred ? phase(Phase::sums) : cudaSuccess;
      return failed != cudaSuccess ? failed : phase(Phase::apply);
    };
    using T = std::remove_pointer_t<decltype(type)>;
    if (plan.vectorized) return run(kernel_of(type, std::integral_constant<int, kCenterVector<T>>{}));
    return run(kernel_of(type, std::integral_constant<int, 1>{}));
  });
}

}  // namespace deepcontrol::cuda
