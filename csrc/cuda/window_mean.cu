// window_mean: for each tap of a kernel the mean of the input that it sees. The input is read once, n * C * taps numbers
// are written; for the product with a weight (`for_product`, channels innermost alone) they are not rounded, and lie as the
// weight does.
//
// Along one axis a tap sees every stride-th pixel of a range. So the pixels fall into classes, each seen by the same taps:
// the ranges' ends cut the axis into segments, and within one the pixels that are a stride apart are a class. A kernel of
// three at stride one and padding one has three: the first pixel, the last, and all between. Each pixel is added to the
// sum of its class (one along each axis), and a tap's mean is the sum over the classes that it sees.
//
// A block has a tile of one sample's channels, or one map a warp where the pixels are innermost. The blocks of a cluster
// share large maps.

#include <algorithm>
#include <vector>

#include "launch.cuh"
#include "params.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace deepcontrol::cuda {
namespace {

constexpr int kMostClasses = 64;
constexpr int kMostTaps = 32;

// The classes of one axis: pixels start, start + step, ..., count of them; bit t of `taps` tells that tap t sees them.
struct Axis {
  int classes, step, taps;
  int start[kMostClasses], count[kMostClasses];
  uint32_t seen_by[kMostClasses];
};

struct Job {
  Axis axis[3];
  int first_tap[3];  // this launch's share of the kernel starts there
  int columns;       // channel vectors, or maps, side by side
  int parts;         // blocks of a cluster
  int64_t tiles;     // blocks, or clusters, of a sample; where the pixels are innermost, of all maps
};

__device__ __forceinline__ int classes_of(const Job& job) {
  return job.axis[0].classes * job.axis[1].classes * job.axis[2].classes;
}

// The sum of the pixels first, first + stride, ... of a class, counted along its axes.
template <class T, int n, class A>
__device__ __forceinline__ void sum_class(const WindowMean& p, const Job& job, const int (&k)[3], const T* from,
                                          int64_t pitch, int first, int stride, A (&sum)[n]) {
  const int counts[3] = {job.axis[0].count[k[0]], job.axis[1].count[k[1]], job.axis[2].count[k[2]]};
  const int total = counts[0] * counts[1] * counts[2];
  int index[3], advance[3];
  index[2] = first % counts[2], index[1] = first / counts[2] % counts[1], index[0] = first / counts[2] / counts[1];
  advance[2] = stride % counts[2], advance[1] = stride / counts[2] % counts[1];
  advance[0] = stride / counts[2] / counts[1];
  const int64_t row = p.windows.size[2], plane = p.windows.size[1] * row;
  constexpr int kLoads = 4;
  for (int i = first; i < total; i += kLoads * stride) {
    // Together under way: a loop that may end behind each of them would wait for each.
    A x[kLoads][n] = {};
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int64_t pixel = (job.axis[0].start[k[0]] + index[0] * job.axis[0].step) * plane +
                            (job.axis[1].start[k[1]] + index[1] * job.axis[1].step) * row +
                            (job.axis[2].start[k[2]] + index[2] * job.axis[2].step);
      if (i + l * stride < total) load_constant<n>(from + pixel * pitch, x[l]);
      index[2] += advance[2];
      const int carry = index[2] >= counts[2];
      index[2] -= carry ? counts[2] : 0;
      index[1] += advance[1] + carry;
      const int carry_too = index[1] >= counts[1];
      index[1] -= carry_too ? counts[1] : 0;
      index[0] += advance[0] + carry_too;
    }
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] += (x[0][j] + x[1][j]) + (x[2][j] + x[3][j]);
  }
}

template <class T, int n, bool channels_innermost>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, double> ? 2 : 3)
    means(const __grid_constant__ WindowMean p, const __grid_constant__ Job job) {
  using A = Accumulation<T>;
  const int width = job.columns * n, classes = classes_of(job), count = classes * width;
  // What warps, the block and the cluster have summed: (class, channel of the tile) each.
  A* warps = reinterpret_cast<A*>(dynamic_shared());
  A* totals = warps + (channels_innermost ? kWarps * count : 0);
  A* sums = job.parts > 1 ? totals + count : totals;
  const int part = blockIdx.x % unsigned(job.parts), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tile = blockIdx.x / unsigned(job.parts);
  const int column = channels_innermost ? threadIdx.x % job.columns : warp;
  const int group = channels_innermost ? threadIdx.x / job.columns : lane;
  const int groups = channels_innermost ? kThreads / job.columns : 32;
  const int64_t sample = channels_innermost ? tile / job.tiles : 0;
  const int64_t channel = channels_innermost ? tile % job.tiles * width : tile * width;  // a map where pixels are innermost
  const int64_t channels = channels_innermost ? p.maps.channels : p.maps.samples * p.maps.channels;
  const int64_t pitch = channels_innermost ? channels : 1;
  const int64_t first = channel + column * n;
  const bool inside = first < channels;
  const T* from = static_cast<const T*>(p.input) +
                  (channels_innermost ? sample * p.maps.pixels * channels + first : first * p.maps.pixels);

  int c = 0;
  int k[3];
  for (k[0] = 0; k[0] < job.axis[0].classes; ++k[0]) {
    for (k[1] = 0; k[1] < job.axis[1].classes; ++k[1]) {
      for (k[2] = 0; k[2] < job.axis[2].classes; ++k[2], ++c) {
        A sum[n] = {};
        if (inside) sum_class<T, n>(p, job, k, from, pitch, part * groups + group, job.parts * groups, sum);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const A total = sum_lanes(sum[j], channels_innermost ? job.columns : 1, 32);
          if constexpr (channels_innermost) {
            if (lane < job.columns) warps[(warp * classes + c) * width + column * n + j] = total;
          } else {
            if (lane == 0) totals[c * width + column] = total;
          }
        }
      }
    }
  }
  __syncthreads();
  if constexpr (channels_innermost) {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      A total = 0;
      for (int w = 0; w < kWarps; ++w) total += warps[w * count + i];
      totals[i] = total;
    }
    __syncthreads();
  }
  if (job.parts > 1) sum_cluster(totals, count, job.parts, sums);

  if (part == 0) {
    const Windows& windows = p.windows;
    const A seen = static_cast<A>(windows.output[0] * windows.output[1] * windows.output[2]);
    const int taps = job.axis[0].taps * job.axis[1].taps * job.axis[2].taps;
    for (int i = threadIdx.x; i < taps * width; i += kThreads) {
      const int at = i % width;
      const int t[3] = {i / width / job.axis[2].taps / job.axis[1].taps, i / width / job.axis[2].taps % job.axis[1].taps,
                        i / width % job.axis[2].taps};
      if (channel + at >= channels) continue;
      A sum = 0;
      int c = 0;
      for (int a = 0; a < job.axis[0].classes; ++a) {
        for (int b = 0; b < job.axis[1].classes; ++b) {
          for (int d = 0; d < job.axis[2].classes; ++d, ++c) {
            const uint32_t sees = job.axis[0].seen_by[a] >> t[0] & job.axis[1].seen_by[b] >> t[1] &
                                  job.axis[2].seen_by[d] >> t[2] & 1u;
            if (sees) sum += sums[c * width + at];
          }
        }
      }
      const int64_t tap = ((job.first_tap[0] + t[0]) * windows.kernel[1] + job.first_tap[1] + t[1]) * windows.kernel[2] +
                          job.first_tap[2] + t[2];
      const A mean = sum / seen;
      if (p.for_product) {
        static_cast<A*>(p.means)[(sample * windows.taps() + tap) * channels + channel + at] = mean;
        continue;
      }
      const int64_t map = channels_innermost ? sample * channels + channel + at : channel + at;
      static_cast<T*>(p.means)[map * windows.taps() + tap] = narrow<T>(mean);
    }
  }
  if (job.parts > 1) cluster_wait();
}

// The classes of one axis for the taps first .. first + taps; false if they are too many.
bool classify(const Windows& windows, int d, int first, int taps, Axis& axis) {
  const int64_t size = windows.size[d], stride = windows.stride[d];
  std::vector<int64_t> ends{0, size};
  // The pixels that a tap sees: begin, begin + stride, ..., last.
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int t = first; t < first + taps; ++t) {
    const int64_t offset = t * windows.dilation[d] - windows.padding[d];
    const int64_t begin = offset >= 0 ? offset : offset + (-offset + stride - 1) / stride * stride;
    const int64_t furthest = std::min(offset + (windows.output[d] - 1) * stride, size - 1);
    const int64_t last = furthest < begin ? begin - stride : begin + (furthest - begin) / stride * stride;
    ranges.emplace_back(begin, last);
    if (last < begin) continue;
    ends.push_back(begin);
    ends.push_back(last + 1);
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  axis.classes = 0;
  axis.step = static_cast<int>(stride);
  axis.taps = taps;
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    for (int64_t start = ends[i]; start < std::min(ends[i] + stride, ends[i + 1]); ++start) {
      uint32_t seen_by = 0;
      for (int t = 0; t < taps; ++t) {
        const auto& [begin, last] = ranges[t];
        if (start >= begin && start <= last && (start - begin) % stride == 0) seen_by |= 1u << t;
      }
      if (!seen_by) continue;
      if (axis.classes == kMostClasses) return false;
      axis.start[axis.classes] = static_cast<int>(start);
      axis.count[axis.classes] = static_cast<int>((ends[i + 1] - start + stride - 1) / stride);
      axis.seen_by[axis.classes++] = seen_by;
    }
  }
  return true;
}

template <class T, int n>
cudaError_t run(const WindowMean& p, const Device& device, cudaStream_t stream) {
  using A = Accumulation<T>;
  Job job{};
  int share[3];  // taps of one launch along each axis
  for (int d = 0; d < 3; ++d) share[d] = static_cast<int>(std::min<int64_t>(p.windows.kernel[d], kMostTaps));
  const auto shared = [&](int columns) {
    const int64_t classes = int64_t(job.axis[0].classes) * job.axis[1].classes * job.axis[2].classes;
    return (p.maps.channels_innermost ? kWarps + 2 : 2) * classes * columns * n * int64_t(sizeof(A));
  };
  const auto widest = [&] {
    if (!p.maps.channels_innermost) return kWarps;
    int columns = 1;
    while (columns < 32 && columns * n * int(sizeof(T)) < 128 && columns * n < p.maps.channels) columns *= 2;
    return columns;
  };
  const int narrowest = p.maps.channels_innermost ? 1 : kWarps;
  for (int first[3] = {}; first[0] < p.windows.kernel[0];) {
    // Fewer taps a launch until their classes fit; the input is then read once a launch.
    for (;;) {
      bool fits = true;
      for (int d = 0; d < 3; ++d) {
        const int taps = static_cast<int>(std::min<int64_t>(share[d], p.windows.kernel[d] - first[d]));
        fits = classify(p.windows, d, first[d], taps, job.axis[d]) && fits;
      }
      if (fits && shared(narrowest) <= device.shared_memory) break;
      int& most = *std::max_element(share, share + 3);
      if (most == 1) return cudaErrorInvalidConfiguration;
      most = (most + 1) / 2;
    }
    job.columns = widest();
    while (job.columns > narrowest && shared(job.columns) > device.shared_memory / 4) {
      job.columns /= 2;
    }
    std::copy(first, first + 3, job.first_tap);
    const int64_t rows = p.maps.channels_innermost ? p.maps.channels : p.maps.samples * p.maps.channels;
    job.tiles = ceil_divide(rows, job.columns * n);
    const int64_t blocks = job.tiles * (p.maps.channels_innermost ? p.maps.samples : 1);
    // By the size of a map alone, so that a sample's means do not depend on its batch.
    const int64_t groups = p.maps.channels_innermost ? kThreads / job.columns : 32;
    job.parts = 1;
    while (device.capability >= 90 && job.parts < 8 && p.maps.pixels > 32 * groups * job.parts) job.parts *= 2;
    auto* kernel = means<T, n, true>;
    if constexpr (n == 1) {
      if (!p.maps.channels_innermost) kernel = means<T, 1, false>;
    }
    const cudaError_t failed =
        launch(kernel, blocks * job.parts, kThreads, shared(job.columns), job.parts, stream, p, job);
    if (failed != cudaSuccess) return failed;
    for (int d = 2; d >= 0; --d) {
      first[d] += job.axis[d].taps;
      if (first[d] < p.windows.kernel[d] || d == 0) break;
      first[d] = 0;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_window_mean(const WindowMean& p, const Device& device, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = reinterpret_cast<uintptr_t>(p.input) % kVectorBytes == 0;
    if (p.maps.channels_innermost && aligned && p.maps.channels % kVector<T> == 0) {
      return run<T, kVector<T>>(p, device, stream);
    }
    return run<T, 1>(p, device, stream);
  });
}

}  // namespace deepcontrol::cuda
