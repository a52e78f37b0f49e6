// Kernels that are right, and the same with one mistake each: what the harness must let pass and what it must notice.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/ptx.cuh"

namespace deepcontrol::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 4;
constexpr int kTile = kThreads * kVector;

// What is left out or done wrong.
enum class Mistake {  // faulty.py reads the names
  none,
  no_barrier,
  no_barrier_after_copy,
  reuses_memory_early,
  no_commit,
  no_copy_wait,
  misaligned_copy,
  misaligned_target,
  copies_past_shared,
  source_overwritten,
  target_overwritten,
  misaligned_access,
  reads_past_global,
  reads_past_shared,
  writes_past_shared,
  reads_past_array,
  divergent_barrier,
  early_exit,
  mismatched_collective,
  partial_collective,
  no_cluster_barrier,
  no_cluster_wait,
  no_cluster_wait_at_exit,
  rank_outside,
  misaligned_row,
  row_outside,
  skips_load,
  parted_lanes,
  not_rounded,
};

__device__ float sum_warp(float value, Mistake mistake) {
  if (mistake == Mistake::partial_collective && threadIdx.x == 7) return value;
  for (int distance = 16; distance > 0; distance /= 2) {
    if (mistake == Mistake::mismatched_collective && threadIdx.x == 7) {
      value += __shfl_down_sync(0xffffffffu, value, distance);
    } else {
      value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
  }
  return value;
}

// sums[block] is the sum of the block's elements: of `repeat` tiles, one after another in the same memory.
__global__ void __launch_bounds__(kThreads)
    sum_block(float* input, float* sums, const int repeat, const Mistake mistake) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  float* partial = mistake == Mistake::reuses_memory_early ? tile : tile + kTile;
  const int thread = threadIdx.x, warp = thread / 32;
  // A thread adds up what another one, of another warp, has brought.
  const int own = thread * kVector, others = (thread + 33) % kThreads * kVector;
  float total = 0;
  for (int r = 0; r < repeat; ++r) {
    float* from = input + (blockIdx.x * repeat + r) * kTile + own;
    float* to = tile + own;
    if (mistake == Mistake::misaligned_copy) from += 1;
    if (mistake == Mistake::misaligned_target) to += 1;
    if (mistake == Mistake::copies_past_shared) to = partial + kWarps;
    if (mistake == Mistake::reads_past_global) from += kTile;
    copy_async_16(to, from);
    if (mistake != Mistake::no_commit) copy_async_commit();
    if (mistake == Mistake::source_overwritten) from[1] = -1;
    if (mistake == Mistake::target_overwritten) to[1] = 0;
    if (mistake != Mistake::no_copy_wait) copy_async_wait<0>();
    if (mistake != Mistake::no_barrier_after_copy) __syncthreads();
    float elements[kVector];
    for (int j = 0; j < kVector; ++j) elements[j] = tile[others + j];
    float sum = 0;
    if (mistake == Mistake::misaligned_access) sum = reinterpret_cast<const float4*>(tile + thread)->x;
    const int end = mistake == Mistake::reads_past_array ? kVector + 1 : kVector;
    for (int j = 0; j < end; ++j) sum += elements[j];
    sum = sum_warp(sum, mistake);
    if (thread % 32 == 0) partial[warp] = sum;
    if (mistake == Mistake::early_exit && thread >= 96) return;
    if (mistake == Mistake::divergent_barrier && warp == 1) {
      __syncthreads();
    } else if (mistake != Mistake::no_barrier) {
      __syncthreads();
    }
    if (mistake == Mistake::writes_past_shared && thread == 5) partial[kWarps] = 1;
    const int last = mistake == Mistake::reads_past_shared ? kWarps + 1 : kWarps;
    for (int w = 0; w < last; ++w) total += partial[w];
  }
  if (thread == 0) sums[blockIdx.x] = total;
}

// sums[block] is the sum of the elements of all blocks of its cluster.
__global__ void __launch_bounds__(kThreads)
    sum_cluster(const float* input, float* sums, const int cluster, const Mistake mistake) {
  float* total = reinterpret_cast<float*>(dynamic_shared());
  const int thread = threadIdx.x;
  float* partial = total + kVector;
  const float sum = sum_warp(__ldg(input + blockIdx.x * kThreads + thread), mistake);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) total[0] = partial[0] + partial[1] + partial[2] + partial[3];
  if (mistake != Mistake::no_cluster_barrier) {
    cluster_arrive();
    if (mistake != Mistake::no_cluster_wait) cluster_wait();
  }
  if (thread == 0) {
    float all = 0;
    const int end = mistake == Mistake::rank_outside ? cluster + 1 : cluster;
    for (int rank = 0; rank < end; ++rank) all += load_from_cluster(total, rank);
    sums[blockIdx.x] = all;
  }
  if (mistake == Mistake::no_cluster_wait_at_exit) return;
  cluster_arrive();
  cluster_wait();
}

// d = a * b by one warp, 16 x 16 of 64 bytes along K. Of these `bytes` are there in each row of a and of b^T; or in memory
// K goes down the rows if `transposed`, and all is there.
template <class T>
__global__ void __launch_bounds__(32)
    multiply_tile(const T* a, const T* b, float* d, const int bytes, const bool transposed, const Mistake mistake) {
  constexpr int kSide = 16, kStep = 32, kRowBytes = 64;
  const int lane = threadIdx.x, row_bytes = transposed ? kSide * int(sizeof(T)) : kRowBytes, pitch = row_bytes + 16;
  const int chunks = row_bytes / 16, rows = kSide * kRowBytes / row_bytes;
  unsigned char* tiles[] = {dynamic_shared(), dynamic_shared() + rows * pitch};
  for (int operand = 0; operand < 2; ++operand) {
    const auto* from = reinterpret_cast<const unsigned char*>(operand ? b : a);
    for (int i = lane; i < rows * chunks; i += 32) {
      const int row = i / chunks, at = i % chunks * 16;
      const bool there = transposed || at < bytes;
      copy_async_16_or_zero(tiles[operand] + row * pitch + at, from + row * row_bytes + at, there);
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  const int matrix = lane / 8, line = lane % 8;
  float sums[2][4] = {};
  for (int step = 0; step < kRowBytes / kStep; ++step) {
    unsigned left[4], right[4];
    if (transposed) {
      const int first = step * kSide + line;
      load_matrices_transposed(left, tiles[0] + (first + matrix / 2 * 8) * pitch + matrix % 2 * 16);
      load_matrices_transposed(right, tiles[1] + (first + matrix % 2 * 8) * pitch + matrix / 2 * 16);
    } else if (mistake != Mistake::skips_load || lane != 7) {
      int at = step * kStep;
      if (mistake == Mistake::misaligned_row && lane == 7) at += 8;
      if (mistake == Mistake::row_outside && lane == 7) at += 2 * kSide * pitch;
      load_matrices(left, tiles[0] + (line + matrix % 2 * 8) * pitch + at + matrix / 2 * 16);
      load_matrices(right, tiles[1] + (line + matrix / 2 * 8) * pitch + at + matrix % 2 * 16);
    }
    if (sizeof(T) == 4 && mistake != Mistake::not_rounded) {
      for (int i = 0; i < 4; ++i) left[i] = round_to_tf32(left[i]);
      for (int i = 0; i < 4; ++i) right[i] = round_to_tf32(right[i]);
    }
    if (mistake == Mistake::parted_lanes && lane == 7) {
      multiply_add<T>(sums[0], left, right[0], right[1]);
    } else {
      multiply_add<T>(sums[0], left, right[0], right[1]);
    }
    multiply_add<T>(sums[1], left, right[2], right[3]);
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * kSide + half * 8 + lane % 4 * 2 + i % 2] = sums[half][i];
  }
}

}  // namespace
}  // namespace deepcontrol::cuda

namespace {

thread_local const char* error = "";

int report(cudaError_t result) {
  error = cudaGetErrorString(result);
  return result;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* last_error() { return error; }

EXPORT int run_sum_block(float* input, float* sums, int blocks, int repeat, int mistake) {
  using namespace deepcontrol::cuda;
  const int64_t shared = (kTile + kWarps) * sizeof(float);
  return report(launch(sum_block, blocks, kThreads, shared, 1, host_cuda::current_stream(), input, sums, repeat,
                       static_cast<Mistake>(mistake)));
}

EXPORT int run_sum_cluster(const float* input, float* sums, int blocks, int cluster, int mistake) {
  using namespace deepcontrol::cuda;
  return report(launch(sum_cluster, blocks, kThreads, 64, cluster, host_cuda::current_stream(), input, sums, cluster,
                       static_cast<Mistake>(mistake)));
}

// `type` is 0 for bf16, 1 for f16, 2 for TF32.
EXPORT int run_multiply_tile(const void* a, const void* b, float* d, int type, int bytes, int transposed, int mistake) {
  using namespace deepcontrol::cuda;
  const auto run = [&](auto kernel, auto first) {
    using T = decltype(first);
    return report(launch(kernel, 1, 32, 2 * 32 * 48, 1, host_cuda::current_stream(), static_cast<const T*>(a),
                         static_cast<const T*>(b), d, bytes, transposed != 0, static_cast<Mistake>(mistake)));
  };
  if (type == 0) return run(multiply_tile<__nv_bfloat16>, __nv_bfloat16{});
  if (type == 1) return run(multiply_tile<__half>, __half{});
  return run(multiply_tile<float>, float{});
}

// Sizes as given, straight to the runtime: for its limits.
EXPORT int run_nothing(int blocks, int threads, int shared, int cluster, int ask, int default_stream) {
  using namespace deepcontrol::cuda;
  void (*kernel)(float*) = [](float*) {};
  if (ask) {
    const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (refused != cudaSuccess) return report(refused);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = default_stream ? nullptr : host_cuda::current_stream();
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return report(cudaLaunchKernelEx(&config, kernel, nullptr));
}
