// Kernels that are right, and the same with one mistake each: what the harness must let pass and what it must notice.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/ptx.cuh"
#include "../../csrc/cuda/ptx_sm90.cuh"

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
  waits_in_block,
  misaligned_row,
  row_outside,
  skips_load,
  parted_lanes,
  not_rounded,
  no_fence_barriers,
  no_barrier_after_init,
  no_wait_for_load,
  no_wait_for_release,
  releases_early,
  arrives_twice,
  wrong_parity,
  expects_less,
  expects_more,
  load_not_waited,
  source_of_load_overwritten,
  misaligned_tile,
  begins_outside,
  no_products_begin,
  no_products_commit,
  no_products_wait,
  reads_sums_early,
  changes_sums_early,
  skips_product,
  no_group_barrier,
  too_many_registers,
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

// The same by barriers in shared memory: blocks tell each other that their sums are there.
__global__ void __launch_bounds__(kThreads)
    sum_told(const float* input, float* sums, const int cluster, const Mistake mistake) {
  auto* barrier = reinterpret_cast<uint64_t*>(dynamic_shared());
  float* total = reinterpret_cast<float*>(barrier + 1);
  const int thread = threadIdx.x;
  if (thread == 0) {
    init_barrier(barrier, cluster);
    fence_barriers();
  }
  if (mistake != Mistake::no_cluster_barrier) {
    cluster_arrive();
    cluster_wait();
  }
  if (thread < 32) {
    float sum = 0;
    for (int i = thread; i < kThreads; i += 32) sum += input[blockIdx.x * kThreads + i];
    sum = sum_warp(sum, mistake);
    if (thread == 0) total[0] = sum;
    __syncwarp();
    if (thread < cluster) arrive_in_cluster(barrier, thread);
    if (mistake == Mistake::waits_in_block) {
      wait_barrier(barrier, 0);
    } else if (mistake != Mistake::no_cluster_wait) {
      wait_barrier_of_cluster(barrier, 0);
    }
    sum = sum_warp(thread < cluster ? load_from_cluster(total, thread) : 0, mistake);
    if (thread == 0) sums[blockIdx.x] = sum;
  }
  if (mistake == Mistake::no_cluster_wait_at_exit) return;
  cluster_arrive();
  cluster_wait();
}

// d = a * b by one warp, 16 x 16 of 64 bytes along K. Of these `bytes` are there in each row of a and of b^T; or in
// memory K goes down the rows if `transposed`, and all is there.
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

// A convolution of 16-bit numbers: TMA brings tiles of the input, by im2col, and of the weight, wgmma multiplies them.
struct Convolution {
  CUtensorMap input, weight;
  int dimensions;  // 2 or 3
  int channels, rows;
  int output[3], taps[3], stride[3], padding[3], dilation[3];  // innermost first
};

// y[row][filter] of 64 rows a block and all 16 filters. One thread of the second warpgroup brings tiles.
template <class T>
__global__ void __launch_bounds__(256)
    convolve(const __grid_constant__ Convolution c, T* input, float* y, const Mistake mistake) {
  constexpr int kRows = 64, kFilters = 16, kStages = 3, kChannels = 64;
  constexpr int kInputBytes = kRows * 128, kStageBytes = kInputBytes + 2048;
  unsigned char* tiles = dynamic_shared();
  if (mistake != Mistake::misaligned_tile) tiles += -shared_address(tiles) % 1024;
  auto* full = reinterpret_cast<uint64_t*>(tiles + kStages * kStageBytes);
  uint64_t* empty = full + kStages;
  const int thread = threadIdx.x, first = blockIdx.x * kRows;
  const int slices = (c.channels + kChannels - 1) / kChannels, steps = slices * c.taps[0] * c.taps[1] * c.taps[2];
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(full + s, 1);
      init_barrier(empty + s, 4);
    }
    if (mistake != Mistake::no_fence_barriers) fence_barriers();
  }
  if (mistake != Mistake::no_barrier_after_init) __syncthreads();

  if (thread >= 128) {
    if (thread < 256) {
      keep_registers<24>();
    } else {
      take_registers<256>();
    }
    if (thread > 128) return;
    prefetch_tensor_map(&c.input);
    int at[4] = {};
    for (int i = 0, rest = first; i < 4; ++i) {
      at[i] = i < 3 ? rest % c.output[i] * c.stride[i] - c.padding[i] : rest;
      if (i < 3) rest /= c.output[i];
    }
    if (mistake == Mistake::begins_outside) --at[1];
    for (int step = 0; step < steps; ++step) {
      const int s = step % kStages, tap = step / slices, channel = step % slices * kChannels;
      unsigned char* stage = tiles + s * kStageBytes;
      if (step >= kStages && mistake != Mistake::no_wait_for_release) wait_barrier(empty + s, (step / kStages - 1) & 1);
      int bytes = kStageBytes;
      if (mistake == Mistake::expects_less) bytes -= 64;
      if (mistake == Mistake::expects_more) bytes += 64;
      arrive_and_expect(full + s, bytes);
      const auto ahead = [&](int i, int t) { return static_cast<unsigned short>(t % c.taps[i] * c.dilation[i]); };
      const unsigned short w = ahead(0, tap), h = ahead(1, tap / c.taps[0]), d = ahead(2, tap / c.taps[0] / c.taps[1]);
      if (c.dimensions == 2) {
        load_pixels(stage, &c.input, full + s, channel, at[0], at[1], at[3], w, h);
      } else {
        load_pixels(stage, &c.input, full + s, channel, at[0], at[1], at[2], at[3], w, h, d);
      }
      load_box(stage + kInputBytes, &c.weight, full + s, channel, tap, 0);
      if (mistake == Mistake::source_of_load_overwritten) input[0] = T(float(step));
    }
    return;
  }

  take_registers<256>();
  float sums[kFilters / 2] = {}, early = 0;
  for (int step = 0; step < steps; ++step) {
    const int s = step % kStages;
    const unsigned char* stage = tiles + s * kStageBytes;
    if (mistake == Mistake::load_not_waited && step + 1 == steps) break;
    if (mistake != Mistake::no_wait_for_load) {
      wait_barrier(full + s, (step / kStages + (mistake == Mistake::wrong_parity)) & 1);
    }
    const uint64_t a = matrix_descriptor(stage), b = matrix_descriptor(stage + kInputBytes);
    if (mistake != Mistake::no_products_begin) products_begin();
    for (int k = 0; k < 4; ++k) {
      if (mistake == Mistake::skips_product && thread / 32 == 2 && k == 1 && step == 1) continue;
      multiply_add_group<T, kFilters>(sums, a + 2 * k, b + 2 * k);
    }
    if (mistake == Mistake::reads_sums_early && step == 1) early = sums[0];
    if (mistake == Mistake::changes_sums_early && step == 1) sums[1] = 0;
    if (mistake != Mistake::no_products_commit) products_commit();
    const int behind = mistake == Mistake::releases_early ? 0 : 1;
    if (mistake != Mistake::no_products_wait) products_wait<1>();
    if (step < behind || thread % 32 != 0) continue;
    arrive(empty + (step - behind) % kStages);
    if (mistake == Mistake::arrives_twice) arrive(empty + (step - behind) % kStages);
  }
  if (mistake != Mistake::no_products_wait) products_wait<0>();
  sums[0] += 0 * early;
  // All warps have read the tiles.
  sync_group(1, 128);
  auto* staged = reinterpret_cast<float*>(tiles);
  for (int i = 0; i < kFilters / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    staged[row * kFilters + i / 4 * 8 + thread % 4 * 2 + i % 2] = sums[i];
  }
  if (mistake != Mistake::no_group_barrier) sync_group(1, 128);
  const int row = thread % kRows;
  for (int i = thread / kRows; i < kFilters; i += 2) {
    if (first + row < c.rows) y[(first + row) * kFilters + i] = staged[row * kFilters + i];
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

EXPORT int run_sum_cluster(const float* input, float* sums, int blocks, int cluster, int told, int mistake) {
  using namespace deepcontrol::cuda;
  return report(launch(told ? sum_told : sum_cluster, blocks, kThreads, 64, cluster, host_cuda::current_stream(),
                       input, sums, cluster, static_cast<Mistake>(mistake)));
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

EXPORT int run_convolve(void* input, void* weight, float* y, int is_half, int dimensions, int samples, int channels,
                        const int* size, const int* taps, const int* stride, const int* padding, const int* dilation,
                        int mistake) {
  using namespace deepcontrol::cuda;
  void *tiled, *im2col;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &tiled, 12000, cudaEnableDefault, &found);
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeIm2col", &im2col, 12000, cudaEnableDefault, &found);

  Convolution c{};
  c.dimensions = dimensions;
  c.channels = channels;
  const cuuint32_t rank = dimensions + 2;
  cuuint64_t sizes[5] = {cuuint64_t(channels)}, strides[4] = {cuuint64_t(channels) * 2};
  cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  int lower[3], upper[3], pixels = 1, all_taps = 1;
  for (int i = 0; i < 3; ++i) {
    const int reach = (taps[i] - 1) * dilation[i];
    c.taps[i] = taps[i];
    c.stride[i] = stride[i];
    c.padding[i] = padding[i];
    c.dilation[i] = dilation[i];
    c.output[i] = (size[i] + 2 * padding[i] - reach - 1) / stride[i] + 1;
    pixels *= c.output[i];
    all_taps *= taps[i];
    if (i >= dimensions) continue;
    sizes[i + 1] = size[i];
    steps[i + 1] = stride[i];
    lower[i] = -padding[i];
    upper[i] = padding[i] - reach;
    strides[i + 1] = strides[i] * size[i];
  }
  sizes[dimensions + 1] = samples;
  c.rows = samples * pixels;
  const auto type = is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUresult refused = reinterpret_cast<decltype(&cuTensorMapEncodeIm2col)>(im2col)(
      &c.input, type, rank, input, sizes, strides, lower, upper, 64, 64, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (refused != CUDA_SUCCESS) return -refused;
  const cuuint64_t weight_sizes[] = {cuuint64_t(channels), cuuint64_t(all_taps), 16};
  const cuuint64_t weight_strides[] = {cuuint64_t(channels) * 2, cuuint64_t(channels) * all_taps * 2};
  const cuuint32_t box[] = {64, 1, 16}, ones[] = {1, 1, 1};
  refused = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(tiled)(
      &c.weight, type, 3, weight, weight_sizes, weight_strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (refused != CUDA_SUCCESS) return -refused;

  const auto run = [&](auto kernel, auto* numbers) {
    const int threads = static_cast<Mistake>(mistake) == Mistake::too_many_registers ? 384 : 256;
    return report(launch(kernel, (c.rows + 63) / 64, threads, 3 * 10240 + 48 + 1008, 1, host_cuda::current_stream(), c,
                         numbers, y, static_cast<Mistake>(mistake)));
  };
  if (is_half) return run(convolve<__half>, static_cast<__half*>(input));
  return run(convolve<__nv_bfloat16>, static_cast<__nv_bfloat16*>(input));
}

// 0, or why the driver does not make a tensor map: `lower` and `upper` for im2col, else a box.
EXPORT int run_encode(int type, int rank, uint64_t address, const cuuint64_t* sizes, const cuuint64_t* strides,
                      const int* lower, const int* upper, const cuuint32_t* box, const cuuint32_t* steps,
                      int interleave, int swizzle, int fill) {
  CUtensorMap map;
  const auto pointer = reinterpret_cast<void*>(address);
  const auto kind = static_cast<CUtensorMapDataType>(type);
  const auto interleaved = static_cast<CUtensorMapInterleave>(interleave);
  const auto swizzled = static_cast<CUtensorMapSwizzle>(swizzle);
  const auto filled = static_cast<CUtensorMapFloatOOBfill>(fill);
  if (!lower) {
    return cuTensorMapEncodeTiled(&map, kind, rank, pointer, sizes, strides, box, steps, interleaved, swizzled,
                                  CU_TENSOR_MAP_L2_PROMOTION_NONE, filled);
  }
  return cuTensorMapEncodeIm2col(&map, kind, rank, pointer, sizes, strides, lower, upper, box[0], box[1], steps,
                                 interleaved, swizzled, CU_TENSOR_MAP_L2_PROMOTION_NONE, filled);
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
