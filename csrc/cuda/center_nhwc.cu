// center and center_backward where the channels are innermost: (N, *spatial, C).
//
// A block has a tile of one sample: `lanes` vectors of channels wide, all pixels (or its part of them) high. It brings the
// tile on chip with cp.async, adds up its columns there, and writes what it makes of it. So forward reads the input and
// writes the output once (z and the residual in, y and one bit an element out), backward reads grad_output and the bits
// and writes grad_input once. Where a tile is more than a block should hold, the blocks of a cluster have a part each and
// exchange their sums; where it is more than a cluster can hold, sums and apply are launches of their own, and the input is
// read twice.
//
// A thread has one column of channels and every (kThreads / lanes)-th pixel; it sums and writes what it loaded itself.

#include "activation.cuh"
#include "center.cuh"

namespace deepcontrol::cuda {
namespace {

// One thread's part of a tile.
struct Place {
  int64_t sample;
  int64_t first_channel;  // of the tile
  int64_t channel;        // of the thread
  int64_t pixel;          // the first
  int64_t first;          // its element
  int64_t stride;         // elements from one pixel to the next
  int pixels;             // steps with something to do
  int steps;              // of the whole block
  int part;
  bool inside;  // has channels

  __device__ Place(const Maps& maps, const CenterPlan& plan, int n) {
    const int column = threadIdx.x & (plan.lanes() - 1), group = threadIdx.x >> plan.log_lanes;
    const int log_groups = kLogThreads - plan.log_lanes, groups = 1 << log_groups;
    const unsigned block = blockIdx.x / unsigned(plan.parts);
    part = blockIdx.x % unsigned(plan.parts);
    sample = block / unsigned(plan.tiles);
    first_channel = int64_t(block % unsigned(plan.tiles)) * (plan.lanes() * n);
    channel = first_channel + column * n;
    inside = channel < maps.channels;
    const int64_t begin = part * plan.part;
    const int64_t left = begin + plan.part < maps.pixels ? plan.part : maps.pixels - begin;
    const int height = left > 0 ? static_cast<int>(left) : 0;
    pixel = begin + group;
    first = (sample * maps.pixels + pixel) * maps.channels + channel;
    stride = groups * maps.channels;
    steps = (height + groups - 1) >> log_groups;
    pixels = inside && group < height ? (height - group + groups - 1) >> log_groups : 0;
  }
};

__device__ __forceinline__ int slot(int step) { return step * kThreads + threadIdx.x; }

// Starts bringing the thread's elements on chip; copy_async_wait<0>() ends it.
template <int n, class T>
__device__ __forceinline__ void stage(const T* __restrict__ from, T* __restrict__ staged, const Place& place) {
  if constexpr (n > 1) {
#pragma unroll 4
    for (int k = 0; k < place.pixels; ++k, from += place.stride) copy_async_16(staged + slot(k) * n, from);
    copy_async_commit();
  } else {
    for (int k = 0; k < place.pixels; k += kBatch) {
      T elements[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (k + j < place.pixels) elements[j] = from[(k + j) * place.stride];
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (k + j < place.pixels) staged[slot(k + j)] = elements[j];
      }
    }
  }
}

// What is read only later, as far as the second-level cache: no register has to wait for it there.
template <int n, class T>
__device__ __forceinline__ void prefetch(const void* tensor, const Place& place) {
  constexpr int kSector = 32 / (n * int(sizeof(T))) > 0 ? 32 / (n * int(sizeof(T))) : 1;
  if (!tensor || threadIdx.x % kSector) return;
  const T* from = at<T>(tensor, place.first);
  for (int k = 0; k < place.pixels; ++k, from += place.stride) prefetch_second_level(from);
}

// The block's shared memory, in this order.
template <class T, int n>
struct Shared {
  using A = Accumulation<T>;
  T* staged;
  T* staged_too;
  A* scratch;
  A* totals;  // of the block, then
  A* sums;    // of the map
  uint8_t* bits;

  // The same count as Planner::shared_nhwc, and of the plan alone: where a cluster's block reads its neighbour's sums, they
  // must lie where its own do, also if one has fewer pixels.
  __device__ Shared(const CenterPlan& plan, int tensors, int kinds) {
    const int log_groups = kLogThreads - plan.log_lanes;
    const int steps = (static_cast<int>(plan.part) + (1 << log_groups) - 1) >> log_groups;
    const int elements = steps * kThreads * n, width = plan.lanes() * n;
    staged = reinterpret_cast<T*>(dynamic_shared());
    staged_too = staged + elements;
    scratch = reinterpret_cast<A*>(staged + tensors * elements);
    totals = scratch + scratch_elements(plan.lanes(), n);
    sums = totals + kinds * width;
    bits = reinterpret_cast<uint8_t*>(sums + kinds * width);
  }
};

// The sums of `kinds` over the maps, from those of the block's threads in shared.totals or from the first launch.
template <class A>
__device__ __forceinline__ void sum_maps(const CenterPlan& plan, const Maps& maps, const Place& place, Phase phase,
                                         int kinds, int width, A* totals, A* sums, A* workspace) {
  const int64_t all = maps.samples * maps.channels, row = place.sample * maps.channels + place.first_channel;
  const int count = maps.channels - place.first_channel < width ? static_cast<int>(maps.channels - place.first_channel) : width;
  if (plan.cluster) return sum_cluster(totals, kinds * width, plan.parts, sums);
  for (int c = threadIdx.x; c < kinds * width; c += kThreads) {
    const int kind = c / width, column = c % width;
    if (column >= count) continue;
    A* partial = workspace + kind * plan.parts * all + row + column;
    if (phase == Phase::whole) {
      sums[c] = totals[c];
    } else if (phase == Phase::sums) {
      partial[place.part * all] = totals[c];
    } else {
      sums[c] = *partial;
    }
  }
  __syncthreads();
}

// The channel of a tile whose sum this thread finishes; a tile has no more of them than a block has threads.
template <class A>
struct Column {
  int64_t channel, map;
  bool inside;

  __device__ Column(const Maps& maps, const Place& place, int width) {
    channel = place.first_channel + threadIdx.x;
    map = place.sample * maps.channels + channel;
    inside = int(threadIdx.x) < width && channel < maps.channels;
  }
  __device__ A load(const void* vector, A absent) const {
    return vector && inside ? __ldg(static_cast<const A*>(vector) + channel) : absent;
  }
};

template <class T, int n, bool rectified>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, rectified>)
    forward(const __grid_constant__ CenterForward p, const __grid_constant__ CenterPlan plan, const Phase phase) {
  using A = Accumulation<T>;
  const Place place(p.maps, plan, n);
  const Shared<T, n> shared(plan, 1, 1);
  const int width = plan.lanes() * n, column = threadIdx.x & (plan.lanes() - 1);
  stage<n>(at<T>(p.input, place.first), shared.staged, place);
  prefetch<n, T>(p.residual, place);
  A gain[n], bias[n];
  load_vector(p.gain, place.channel, place.inside, A(1), gain);
  load_vector(p.bias, place.channel, place.inside, A(0), bias);
  const Column<A> mine(p.maps, place, width);
  const A mean_scale = mine.load(p.mean_scale, A(p.constant)), per_pixel = A(1) / static_cast<A>(p.maps.pixels);
  copy_async_wait<0>();

  if (p.map_mean) {
    if (phase != Phase::apply) {
      A sum[n] = {};
#pragma unroll 4
      for (int k = 0; k < place.pixels; ++k) {
        A x[n];
        load<n>(shared.staged + slot(k) * n, x);
#pragma unroll
        for (int j = 0; j < n; ++j) sum[j] += x[j];
      }
      sum_rows<n>(sum, plan.log_lanes, shared.scratch, shared.totals);
    }
    sum_maps(plan, p.maps, place, phase, 1, width, shared.totals, shared.sums, static_cast<A*>(p.workspace));
    if (phase == Phase::sums) return;
    if (mine.inside) {
      const A mean = shared.sums[threadIdx.x] * per_pixel;
      shared.sums[threadIdx.x] = mean_scale * mean;
      const A factor = p.mean_of_scaled ? mine.load(p.gain, A(1)) : A(1);
      if (place.part == 0) *at<A>(p.map_mean, mine.map) = factor * mean;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < n; ++j) bias[j] -= shared.sums[column * n + j] * gain[j];
  }

  const Piecewise<A, rectified> piecewise(p.activation, p.slope);
  const bool smooth = !rectified && is_smooth(p.activation);
  const int groups = kThreads >> plan.log_lanes;
  const int64_t bits_row = p.maps.bytes_of_bits_row();
  const int64_t first_pixel = place.sample * p.maps.pixels + place.pixel;
  uint8_t* bits = p.bits ? p.bits + first_pixel * bits_row + place.channel / 8 : nullptr;
  A sum[n] = {};
  const auto apply = [&](auto with_extras) {
    int64_t element = place.first;
#pragma unroll 2
    for (int k = 0; k < place.steps; ++k, element += place.stride) {
      const bool here = k < place.pixels;
      unsigned passes = 0;
      if (here) {
        A y[n];
        load<n>(shared.staged + slot(k) * n, y);
#pragma unroll
        for (int j = 0; j < n; ++j) y[j] = y[j] * gain[j] + bias[j];
        if (with_extras() && p.residual) {
          A residual[n];
          load_constant<n>(at<T>(p.residual, element), residual);
#pragma unroll
          for (int j = 0; j < n; ++j) y[j] += residual[j];
        }
        if (smooth) {
          if (p.pre_activation) store<n>(at<T>(p.pre_activation, element), y);
          apply_smooth(y, p.activation);
        } else {
          passes = piecewise(y);
        }
        store<n>(at<T>(p.output, element), y);
        if (with_extras() && p.output_mean) {
          round_to<T>(y);
#pragma unroll
          for (int j = 0; j < n; ++j) sum[j] += y[j];
        }
      }
      if (!bits) continue;
      const unsigned byte = gather_byte<n>(passes);
      if (here && place.channel % 8 == 0) *bits = static_cast<uint8_t>(byte);
      bits += groups * bits_row;
    }
  };
  // The plain case stands alone, since every instruction of the loop counts there.
  if (p.residual || p.output_mean) {
    apply(std::true_type{});
  } else {
    apply(std::false_type{});
  }

  if (plan.cluster && p.map_mean) cluster_wait();
  if (!p.output_mean) return;
  sum_rows<n>(sum, plan.log_lanes, shared.scratch, shared.totals);
  sum_maps(plan, p.maps, place, phase, 1, width, shared.totals, shared.sums, static_cast<A*>(nullptr));
  if (mine.inside && place.part == 0) *at<A>(p.output_mean, mine.map) = shared.sums[threadIdx.x] * per_pixel;
  if (plan.cluster) cluster_wait();
}

template <class T, int n, bool rectified>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, rectified>)
    backward(const __grid_constant__ CenterBackward p, const __grid_constant__ CenterPlan plan, const Phase phase) {
  using A = Accumulation<T>;
  const Place place(p.maps, plan, n);
  const bool smooth = !rectified && is_smooth(p.activation);
  const Shared<T, n> shared(plan, smooth ? 2 : 1, 2);
  const int width = plan.lanes() * n, column = threadIdx.x & (plan.lanes() - 1);
  const Piecewise<A, rectified> piecewise(p.activation, p.slope);
  stage<n>(at<T>(p.grad_output, place.first), shared.staged, place);
  if (smooth) {
    stage<n>(at<T>(p.pre_activation, place.first), shared.staged_too, place);
  } else if (p.bits) {
    const int64_t bits_row = p.maps.bytes_of_bits_row(), stride = (kThreads >> plan.log_lanes) * bits_row;
    const uint8_t* from = p.bits + (place.sample * p.maps.pixels + place.pixel) * bits_row + place.channel / 8;
    for (int k = 0; k < place.pixels; k += kBatch) {
      uint8_t bytes[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) bytes[j] = k + j < place.pixels ? __ldg(from + (k + j) * stride) : 0;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (k + j < place.pixels) shared.bits[slot(k + j)] = bytes[j];
      }
    }
  }
  prefetch<n, T>(p.dots ? p.input : nullptr, place);
  A scale[n], offset[n] = {};
  load_vector(p.scale, place.channel, place.inside, A(1), scale);
  const Column<A> mine(p.maps, place, width);
  const A mean_scale = mine.load(p.mean_scale, A(p.constant)), per_pixel = A(1) / static_cast<A>(p.maps.pixels);
  copy_async_wait<0>();

  // The gradient in front of the activation.
  const auto error = [&](int k, A (&e)[n]) {
    load<n>(shared.staged + slot(k) * n, e);
    if (smooth) {
      A pre[n];
      load<n>(shared.staged_too + slot(k) * n, pre);
#pragma unroll
      for (int j = 0; j < n; ++j) e[j] *= smooth_derivative(pre[j], p.activation);
    } else if (p.bits) {
      piecewise.backward(e, shared.bits[slot(k)] >> (n == 8 ? 0 : place.channel % 8));
    }
  };

  if (p.centred || p.sums || p.dots) {
    const int kinds = p.dots ? 2 : 1;
    if (phase != Phase::apply) {
      A sum[n] = {}, dot[n] = {};
#pragma unroll 4
      for (int k = 0; k < place.pixels; ++k) {
        A e[n];
        error(k, e);
#pragma unroll
        for (int j = 0; j < n; ++j) sum[j] += e[j];
        if (p.dots) {
          A x[n];
          load_constant<n>(at<T>(p.input, place.first + k * place.stride), x);
#pragma unroll
          for (int j = 0; j < n; ++j) dot[j] += e[j] * x[j];
        }
      }
      sum_rows<n>(sum, plan.log_lanes, shared.scratch, shared.totals);
      if (p.dots) sum_rows<n>(dot, plan.log_lanes, shared.scratch, shared.totals + width);
    }
    sum_maps(plan, p.maps, place, phase, kinds, width, shared.totals, shared.sums, static_cast<A*>(p.workspace));
    if (phase == Phase::sums) return;
    if (mine.inside) {
      const A sum = shared.sums[threadIdx.x];
      shared.sums[threadIdx.x] = p.centred ? mean_scale * (sum * per_pixel) : A(0);
      if (place.part == 0) {
        if (p.sums) *at<A>(p.sums, mine.map) = sum;
        if (p.dots) *at<A>(p.dots, mine.map) = shared.sums[width + threadIdx.x];
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < n; ++j) offset[j] = -scale[j] * shared.sums[column * n + j];
  }

  if (p.grad_input || p.grad_residual) {
    int64_t element = place.first;
#pragma unroll 2
    for (int k = 0; k < place.pixels; ++k, element += place.stride) {
      A e[n];
      error(k, e);
      if (p.grad_residual) store<n>(at<T>(p.grad_residual, element), e);
#pragma unroll
      for (int j = 0; j < n; ++j) e[j] = e[j] * scale[j] + offset[j];
      if (p.grad_input) store<n>(at<T>(p.grad_input, element), e);
    }
  }
  if (plan.cluster && (p.centred || p.sums || p.dots)) cluster_wait();
}

}  // namespace

cudaError_t launch_center_forward_nhwc(const CenterForward& p, const CenterPlan& plan, cudaStream_t stream) {
  return run_center(p, plan, p.map_mean ? 1 : 0, stream, [&](auto* type, auto n) {
    using T = std::remove_pointer_t<decltype(type)>;
    return is_rectified(p.activation) ? forward<T, n(), true> : forward<T, n(), false>;
  });
}

cudaError_t launch_center_backward_nhwc(const CenterBackward& p, const CenterPlan& plan, cudaStream_t stream) {
  return run_center(p, plan, p.dots ? 2 : p.centred || p.sums ? 1 : 0, stream, [&](auto* type, auto n) {
    using T = std::remove_pointer_t<decltype(type)>;
    return is_rectified(p.activation) ? backward<T, n(), true> : backward<T, n(), false>;
  });
}

}  // namespace deepcontrol::cuda
