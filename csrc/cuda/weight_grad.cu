// What is done to weights and their gradients around the library's convolutions: filters times gain, and behind the weight
// gradient gain, dgain and projection. Each gradient is read and written once, the weight read once where dgain is wanted.
//
// A block has some filters, which are adjacent in memory in both layouts; a thread has kernels (all taps of one filter and
// one input channel) of one of them. They meet in shared memory, where any stride is as good as another.

#include <algorithm>

#include "launch.cuh"
#include "params.h"
#include "reduce.cuh"
#include "stage.cuh"

namespace deepcontrol::cuda {
namespace {

constexpr int64_t kStagedBytes = 40 * 1024;  // of a block, and so without asking the driver for more

struct Entry {
  void* grad;
  const void* weight;
  const void* factor;
  const void* divisor;
  void* dots;
  int filters, channels, taps;
  int first_block;
  int chunk;  // input channels on chip at a time; 0: a single kernel is too long for that
  int team;   // threads of a filter, a power of two
  bool channels_innermost;
};

// Kernel parameters are 4 KiB at most.
struct Table {
  static constexpr int kEntries = 56;
  int count;
  double projection;
  Entry entries[kEntries];
};
static_assert(sizeof(Table) <= 4096);

// Where a block has one filter and that is too long to be staged whole, it takes some input channels at a time.
__device__ __forceinline__ bool is_whole(const Entry& e) { return e.chunk == e.channels; }

template <class T, class A>
__device__ __forceinline__ A finish_staged(const Entry& e, A projection, A factor, A per_divisor, int filters,
                                           int first_filter) {
  const int thread = threadIdx.x % e.team, filter = threadIdx.x / e.team;
  T* grads = reinterpret_cast<T*>(dynamic_shared());
  A dot = 0;
  for (int begin = 0; begin < e.channels; begin += e.chunk) {
    const int width = min(e.chunk, e.channels - begin);
    // As rows that are adjacent in memory: all of it, or of each tap the channels of this round.
    const bool by_tap = e.channels_innermost && !is_whole(e);
    const int rows = by_tap ? e.taps : 1, length = by_tap ? width : filters * width * e.taps;
    T* weights = grads + ceil_divide(int64_t(rows) * length, kVectorBytes) * kVectorBytes;
    const int64_t first = int64_t(first_filter) * e.channels * e.taps + int64_t(begin) * (by_tap ? 1 : e.taps);
    for (int row = 0; row < rows; ++row) {
      const int64_t from = first + int64_t(row) * e.channels;
      stage(static_cast<const T*>(e.grad) + from, grads + row * length, length);
      if (e.dots) stage(static_cast<const T*>(e.weight) + from, weights + row * length, length);
    }
    copy_async_wait<0>();
    __syncthreads();

    const int per_kernel = e.channels_innermost ? 1 : e.taps, per_tap = e.channels_innermost ? width : 1;
    for (int c = thread; filter < filters && c < width; c += e.team) {
      const int kernel = filter * width * e.taps + c * per_kernel;
      A sum = 0;
      for (int tap = 0; tap < e.taps; ++tap) {
        const A grad = widen(grads[kernel + tap * per_tap]);
        sum += grad;
        if (e.dots) dot += grad * per_divisor * widen(weights[kernel + tap * per_tap]);
      }
      const A shift = e.taps > 1 ? projection * (sum * factor / A(e.taps)) : A(0);
      for (int tap = 0; tap < e.taps; ++tap) {
        T& grad = grads[kernel + tap * per_tap];
        grad = narrow<T>(widen(grad) * factor - shift);
      }
    }
    __syncthreads();
    for (int row = 0; row < rows; ++row) {
      unstage(grads + row * length, static_cast<T*>(e.grad) + first + int64_t(row) * e.channels, length);
    }
    __syncthreads();
  }
  return dot;
}

// A warp goes over its kernel in global memory twice.
template <class T, class A>
__device__ __forceinline__ A finish_long(const Entry& e, A projection, A factor, A per_divisor, int filter) {
  const int64_t per_kernel = e.channels_innermost ? 1 : e.taps, per_tap = e.channels_innermost ? e.channels : 1;
  const int lane = threadIdx.x % 32;
  A dot = 0;
  for (int c = threadIdx.x / 32; c < e.channels; c += kWarps) {
    const int64_t kernel = int64_t(filter) * e.channels * e.taps + c * per_kernel;
    T* grads = static_cast<T*>(e.grad) + kernel;
    const T* weights = static_cast<const T*>(e.weight) + kernel;
    A sum = 0;
    for (int tap = lane; tap < e.taps; tap += 32) {
      const A grad = widen(grads[tap * per_tap]);
      sum += grad;
      if (e.dots) dot += grad * per_divisor * widen(weights[tap * per_tap]);
    }
    const A shift = projection * (sum_lanes(sum, 1, 32) * factor / A(e.taps));
    for (int tap = lane; tap < e.taps; tap += 32) {
      grads[tap * per_tap] = narrow<T>(widen(grads[tap * per_tap]) * factor - shift);
    }
  }
  return dot;
}

template <class T>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, double> ? 2 : 3) finish(const __grid_constant__ Table table) {
  using A = Accumulation<T>;
  const int block = blockIdx.x;
  int i = 0;
  while (i + 1 < table.count && table.entries[i + 1].first_block <= block) ++i;
  const Entry& e = table.entries[i];
  const int per_block = kThreads / e.team, first_filter = (block - e.first_block) * per_block;
  const int filters = min(per_block, e.filters - first_filter), filter = threadIdx.x / e.team;
  A factor = 1, per_divisor = 1;
  if (filter < filters) {
    if (e.factor) factor = static_cast<const A*>(e.factor)[first_filter + filter];
    if (e.divisor) per_divisor = A(1) / static_cast<const A*>(e.divisor)[first_filter + filter];
  }
  A dot[1];
  dot[0] = e.chunk ? finish_staged<T>(e, A(table.projection), factor, per_divisor, filters, first_filter)
                   : finish_long<T>(e, A(table.projection), factor, per_divisor, first_filter);
  if (!e.dots) return;
  A* dots = static_cast<A*>(e.dots) + first_filter;
  if (e.team <= 32) {
    const A sum = sum_lanes(dot[0], 1, e.team);
    if (threadIdx.x % e.team == 0 && filter < filters) dots[filter] = sum;
    return;
  }
  // What was staged has been written back.
  __syncthreads();
  A* warps = reinterpret_cast<A*>(dynamic_shared());
  const A sum = sum_lanes(dot[0], 1, 32);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x % e.team != 0 || filter >= filters) return;
  A total = 0;
  for (int warp = 0; warp < e.team / 32; ++warp) total += warps[threadIdx.x / 32 + warp];
  dots[filter] = total;
}

template <class T>
Entry describe(const WeightGrad& p, int64_t& shared) {
  Entry e{};
  e.grad = p.grad;
  e.weight = p.weight;
  e.factor = p.factor;
  e.divisor = p.divisor;
  e.dots = p.dots;
  e.filters = static_cast<int>(p.filters);
  e.channels = static_cast<int>(p.channels);
  e.taps = static_cast<int>(p.taps);
  e.channels_innermost = p.channels_innermost;
  // A gap of a vector's elements at most behind each of two tensors.
  const int64_t tensors = p.dots ? 2 : 1, fits = kStagedBytes / sizeof(T) / tensors - kVectorBytes;
  e.team = 1;
  while (e.team < kThreads && e.team < p.channels) e.team *= 2;
  while (e.team < kThreads && kThreads / e.team * p.channels * p.taps > fits) e.team *= 2;
  e.chunk = static_cast<int>(std::min(p.channels, fits / p.taps));
  if (e.chunk < p.channels && e.chunk >= 8) e.chunk = e.chunk / 8 * 8;
  if (!e.chunk) e.team = kThreads;
  const int64_t per_block = std::min<int64_t>(kThreads / e.team, p.filters);
  const int64_t elements = e.chunk ? per_block * e.chunk * p.taps + kVectorBytes : 0;
  shared = std::max<int64_t>({shared, tensors * elements * int64_t(sizeof(T)), kWarps * 8});
  return e;
}

template <class T>
cudaError_t finish_all(const WeightGrad* gradients, int64_t count, double projection, cudaStream_t stream) {
  for (int64_t next = 0; next < count;) {
    Table table{};
    table.projection = projection;
    int64_t blocks = 0, shared = 0;
    for (; next < count && table.count < Table::kEntries; ++next) {
      Entry& e = table.entries[table.count++] = describe<T>(gradients[next], shared);
      e.first_block = static_cast<int>(blocks);
      blocks += ceil_divide(e.filters, kThreads / e.team);
    }
    const cudaError_t failed = launch(finish<T>, blocks, kThreads, shared, 1, stream, table);
    if (failed != cudaSuccess) return failed;
  }
  return cudaSuccess;
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads) multiply(const __grid_constant__ ScaleFilters p) {
  using A = Accumulation<T>;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * n;
  if (i >= p.filters * p.length) return;
  const A gain = static_cast<const A*>(p.gain)[i / p.length];
  A values[n];
  load<n>(static_cast<const T*>(p.weight) + i, values);
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] *= gain;
  store<n>(static_cast<T*>(p.scaled) + i, values);
}

}  // namespace

cudaError_t launch_finish_weight_grads(const WeightGrad* gradients, int64_t count, double projection, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return with_type(gradients->dtype, [&](auto* type) {
    return finish_all<std::remove_pointer_t<decltype(type)>>(gradients, count, projection, stream);
  });
}

cudaError_t launch_scale_filters(const ScaleFilters& p, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(p.weight) | reinterpret_cast<uintptr_t>(p.scaled);
    const bool vectors = addresses % kVectorBytes == 0 && p.length % kVector<T> == 0;
    const auto run = [&](auto kernel, int n) {
      return launch(kernel, ceil_divide(p.filters * p.length, kThreads * n), kThreads, 0, 1, stream, p);
    };
    return vectors ? run(multiply<T, kVector<T>>, kVector<T>) : run(multiply<T, 1>, 1);
  });
}

}  // namespace deepcontrol::cuda
