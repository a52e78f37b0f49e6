// Means of a convolution's maps before it runs, from the means of what its taps see: a matrix product, samples by
// filters, summed over (tap, channel).
//
//   map_mean[n, o] = gain[o] * sum of weight[o, tap, c] * window_means[n, tap, c],  beta = bias - mean_scale * map_mean
//
// It is small beside the layer, but deep: so a block has 32 samples and 32 filters only, and its eight warps share the
// sum, 32 terms each at a time, straight from the caches to registers. Which terms go into which product is free, so a
// lane's are four neighbours. Products are of TF32 numbers, two for a mean and, of f32, two for a weight; 16-bit
// weights are TF32 numbers already. That is exact to some 2^-21. A block reads 32 * terms * (4 + bytes of a weight) bytes.

#include "division.cuh"
#include "launch.cuh"
#include "params.h"
#include "vector.cuh"

namespace deepcontrol::cuda {
namespace {

constexpr int kTile = 32;  // samples, and filters
constexpr int kTerms = 32;  // of a warp at a time
constexpr int kLine = 4;    // neighbours that a lane loads
constexpr int kTall = kTile / 16, kWide = kTile / 8;
constexpr int kPitch = kTile + 8;  // of sums in shared memory; writing pairs meets no bank conflict

struct Job {
  Divisor group_channels;
  int terms;
  bool vectors;  // four neighbours are there together, aligned
  unsigned tiles_across, groups;  // tiles along the filters of a group
};

// Four neighbours, aligned.
template <class T>
__device__ __forceinline__ void load_line(const T* from, float (&values)[kLine]) {
  if constexpr (sizeof(T) == 4) {
    const float4 line = __ldg(reinterpret_cast<const float4*>(from));
    memcpy(values, &line, sizeof(line));
  } else {
    const uint2 line = __ldg(reinterpret_cast<const uint2*>(from));
    float both[kVector<T>];
    unpack<T>(make_uint4(line.x, line.y, 0, 0), both);
#pragma unroll
    for (int e = 0; e < kLine; ++e) values[e] = both[e];
  }
}

// high + low is x to 2^-22 of it; an infinity has nothing left.
__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
  high = round_to_tf32(__float_as_uint(x));
  const float rest = x - __uint_as_float(high);
  low = fabsf(rest) < INFINITY ? round_to_tf32(__float_as_uint(rest)) : 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    mean_of_maps(const __grid_constant__ MeanOfMaps p, const __grid_constant__ Job job) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quarter = lane % 4;
  const int64_t group_filters = p.filters / p.groups, group_channels = p.channels / p.groups;
  const unsigned across = blockIdx.x % (job.tiles_across * job.groups);
  const int64_t first_sample = int64_t(blockIdx.x / (job.tiles_across * job.groups)) * kTile;
  const int64_t first_filter = int64_t(across % job.tiles_across) * kTile, group = across / job.tiles_across;
  // Samples and filters that do not exist are loaded as others and not stored.
  const float* means[2 * kTall];
  const T* weights[kWide];
#pragma unroll
  for (int i = 0; i < 2 * kTall; ++i) {
    const int64_t n = min(first_sample + i * 8 + lane / 4, p.samples - 1);
    means[i] = static_cast<const float*>(p.window_means) + n * p.taps * p.channels + group * group_channels;
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const int64_t o = group * group_filters + min(first_filter + j * 8 + lane / 4, group_filters - 1);
    weights[j] = static_cast<const T*>(p.weight) + o * job.terms;
  }

  float sums[kTall][kWide][4] = {};
#pragma unroll 1
  for (int first = warp * kTerms; first < job.terms; first += kWarps * kTerms) {
    // Two lines, for the two words along the sum that an instruction takes of a row.
    float a[2][2 * kTall][kLine], b[2][kWide][kLine];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = first + half * kTerms / 2 + quarter * kLine;
      const auto seen = [&](int k) {
        const int tap = job.group_channels(k);
        return tap * p.channels + (k - tap * group_channels);
      };
      if (job.vectors && k < job.terms) {
#pragma unroll
        for (int i = 0; i < 2 * kTall; ++i) load_line(means[i] + seen(k), a[half][i]);
#pragma unroll
        for (int j = 0; j < kWide; ++j) load_line(weights[j] + k, b[half][j]);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kLine; ++e) {
        const bool exists = k + e < job.terms;
#pragma unroll
        for (int i = 0; i < 2 * kTall; ++i) a[half][i][e] = exists ? means[i][seen(k + e)] : 0.0f;
#pragma unroll
        for (int j = 0; j < kWide; ++j) b[half][j][e] = exists ? widen(weights[j][k + e]) : 0.0f;
      }
    }
#pragma unroll
    for (int e = 0; e < kLine; ++e) {
      unsigned high[kTall][4], low[kTall][4];
#pragma unroll
      for (int i = 0; i < kTall; ++i) {
#pragma unroll
        for (int w = 0; w < 4; ++w) split(a[w / 2][2 * i + w % 2][e], high[i][w], low[i][w]);
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        unsigned b_high[2], b_low[2];
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          if constexpr (sizeof(T) == 4) {
            split(b[w][j][e], b_high[w], b_low[w]);
          } else {
            b_high[w] = __float_as_uint(b[w][j][e]);
          }
        }
#pragma unroll
        for (int i = 0; i < kTall; ++i) {
          if constexpr (sizeof(T) == 4) multiply_add<float>(sums[i][j], high[i], b_low[0], b_low[1]);
          multiply_add<float>(sums[i][j], low[i], b_high[0], b_high[1]);
          multiply_add<float>(sums[i][j], high[i], b_high[0], b_high[1]);
        }
      }
    }
  }

  float* const parts = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < kTall; ++i) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      float* to = parts + (warp * kTile + i * 16 + lane / 4) * kPitch + j * 8 + quarter * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<float2*>(to + 8 * kPitch) = make_float2(sums[i][j][2], sums[i][j][3]);
    }
  }
  __syncthreads();
  const int column = threadIdx.x % kTile;
  if (first_filter + column >= group_filters) return;
  const int64_t o = group * group_filters + first_filter + column;
  const auto of_filter = [&](const void* vector, float absent) {
    return vector ? __ldg(static_cast<const float*>(vector) + o) : absent;
  };
  const float gain = of_filter(p.gain, 1), bias = of_filter(p.bias, 0);
  const float mean_scale = of_filter(p.mean_scale, static_cast<float>(p.constant));
  for (int r = threadIdx.x / kTile; r < kTile && first_sample + r < p.samples; r += kThreads / kTile) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[(w * kTile + r) * kPitch + column];
    const float mean = gain * sum;
    const int64_t at = (first_sample + r) * p.filters + o;
    static_cast<float*>(p.map_mean)[at] = mean;
    static_cast<float*>(p.beta)[at] = bias - mean_scale * mean;
  }
}

template <class T>
cudaError_t run(const MeanOfMaps& p, cudaStream_t stream) {
  const auto is_multiple = [](const void* address, size_t of) {
    return reinterpret_cast<uintptr_t>(address) % of == 0;
  };
  const int64_t group_channels = p.channels / p.groups;
  Job job{};
  job.group_channels = Divisor(group_channels);
  job.terms = static_cast<int>(p.taps * group_channels);
  job.vectors = group_channels % kLine == 0 && is_multiple(p.window_means, kLine * sizeof(float)) &&
                is_multiple(p.weight, kLine * sizeof(T));
  job.tiles_across = static_cast<unsigned>(ceil_divide(p.filters / p.groups, kTile));
  job.groups = static_cast<unsigned>(p.groups);
  const int64_t blocks = ceil_divide(p.samples, kTile) * job.tiles_across * job.groups;
  const int64_t shared = int64_t(kWarps) * kTile * kPitch * sizeof(float);
  return launch(mean_of_maps<T>, blocks, kThreads, shared, 1, stream, p, job);
}

}  // namespace

cudaError_t launch_mean_of_maps(const MeanOfMaps& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::bf16: return run<__nv_bfloat16>(p, stream);
    case Dtype::f16: return run<__half>(p, stream);
    case Dtype::f32: return run<float>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace deepcontrol::cuda
