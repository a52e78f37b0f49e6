// center and center_backward where the pixels are innermost: (N, C, *spatial).
//
// A map is a row of memory. A block brings a run of whole maps on chip with cp.async, in vectors whatever the length of a
// map is, and hands each to a team of threads: 8 lanes, a warp or all of the block, by size. A map that is more than a
// block should hold is shared by the blocks of a cluster, one that is more than a cluster can hold costs launches of
// their own for sums and apply, and a second read. Else the traffic is that of center_nhwc.cu.
//
// Where the length of a map is no multiple of a vector, teams go through shared memory element by element, leave their
// results there, and the block writes them out in vectors as it read them.

#include "activation.cuh"
#include "center.cuh"
#include "stage.cuh"

namespace deepcontrol::cuda {
namespace {

// A block's run of maps, or its part of one.
struct Run {
  int64_t map;      // the first; sample * channels + channel
  unsigned channel;
  int64_t begin;    // first pixel of each
  int64_t first;    // its element
  int maps, pixels, part;

  __device__ Run(const Maps& all, const CenterPlan& plan) {
    part = blockIdx.x % unsigned(plan.parts);
    map = int64_t(blockIdx.x / unsigned(plan.parts)) * plan.maps;
    channel = static_cast<unsigned>(map % all.channels);
    const int64_t maps_left = all.samples * all.channels - map;
    maps = maps_left < plan.maps ? static_cast<int>(maps_left) : plan.maps;
    begin = part * plan.part;
    const int64_t pixels_left = all.pixels - begin;
    pixels = pixels_left <= 0 ? 0 : static_cast<int>(pixels_left < plan.part ? pixels_left : plan.part);
    first = map * all.pixels + begin;
  }
  // Adjacent in memory: either there is one map or each is whole.
  __device__ int elements() const { return maps * pixels; }
};

// The block's shared memory, in this order.
template <class T>
struct Shared {
  using A = Accumulation<T>;
  T* staged;
  T* staged_too;
  A* scratch;
  A* totals;  // of the block, then
  A* sums;    // of the map

  // The same count as Planner::shared_nchw.
  __device__ Shared(const CenterPlan& plan, int tensors, int kinds) {
    const int64_t elements = ceil_divide(plan.maps * plan.part, kVectorBytes) * kVectorBytes;
    staged = reinterpret_cast<T*>(dynamic_shared());
    staged_too = staged + elements;
    scratch = reinterpret_cast<A*>(staged + tensors * elements);
    totals = scratch + scratch_elements(1, kinds);
    sums = totals + kinds;
  }
};

// From the sums of a team's threads to those of its map, for all its threads. Of a map that blocks share, the first of two
// launches leaves its part in the workspace. Where the team is the block, all its threads call this.
template <int kinds, class T, class A>
__device__ __forceinline__ void sum_map(A (&sums)[kinds], const CenterPlan& plan, const Maps& maps, const Run& run,
                                        Phase phase, const Shared<T>& shared, A* workspace) {
  if (plan.lanes() <= 32) {
#pragma unroll
    for (int kind = 0; kind < kinds; ++kind) sums[kind] = sum_lanes(sums[kind], 1, plan.lanes());
    return;
  }
  const int64_t all = maps.samples * maps.channels;
  if (phase == Phase::apply) {
#pragma unroll
    for (int kind = 0; kind < kinds; ++kind) {
      sums[kind] = workspace[kind * plan.parts * all + run.map];
    }
    return;
  }
  sum_rows<kinds>(sums, 0, shared.scratch, shared.totals);
  if (plan.cluster) sum_cluster(shared.totals, kinds, plan.parts, shared.sums);
#pragma unroll
  for (int kind = 0; kind < kinds; ++kind) {
    sums[kind] = (plan.cluster ? shared.sums : shared.totals)[kind];
    if (phase == Phase::sums && threadIdx.x == 0) {
      workspace[(kind * plan.parts + run.part) * all + run.map] = sums[kind];
    }
  }
}

template <class T, int n, bool rectified>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, rectified>)
    forward(const __grid_constant__ CenterForward p, const __grid_constant__ CenterPlan plan, const Phase phase) {
  using A = Accumulation<T>;
  const Run run(p.maps, plan);
  const bool smooth = !rectified && is_smooth(p.activation);
  const Shared<T> shared(plan, 1, 1);
  const int lane = (threadIdx.x & (plan.lanes() - 1)) * n, team = threadIdx.x >> plan.log_lanes;
  const int teams = kThreads >> plan.log_lanes, stride = plan.lanes() * n;
  const A per_pixel = A(1) / static_cast<A>(p.maps.pixels);
  const Piecewise<A, rectified> piecewise(p.activation, p.slope);
  const int64_t bits_row = p.maps.bytes_of_bits_row();
  stage(at<T>(p.input, run.first), shared.staged, run.elements());
  copy_async_wait<0>();
  __syncthreads();

  for (int first = 0; first < plan.maps; first += teams) {
    const int mine = first + team;
    const bool inside = mine < run.maps;
    const int count = inside ? run.pixels : 0;
    const int64_t map = run.map + mine;
    const unsigned channel = (run.channel + mine) % unsigned(p.maps.channels);
    T* staged = shared.staged + mine * run.pixels;
    A mean_scale = 0, gain = 1, bias = 0;
    if (inside) {
      mean_scale = p.mean_scale ? static_cast<const A*>(p.mean_scale)[channel] : A(p.constant);
      if (p.gain) gain = static_cast<const A*>(p.gain)[channel];
      if (p.bias) bias = static_cast<const A*>(p.bias)[channel];
    }
    if (p.map_mean) {
      A sum[1] = {};
      if (phase != Phase::apply) {
#pragma unroll 4
        for (int i = lane; i < count; i += stride) {
          A x[n];
          load<n>(staged + i, x);
#pragma unroll
          for (int j = 0; j < n; ++j) sum[0] += x[j];
        }
      }
      sum_map(sum, plan, p.maps, run, phase, shared, static_cast<A*>(p.workspace));
      if (phase == Phase::sums) return;
      const A mean = sum[0] * per_pixel;
      bias -= mean_scale * mean * gain;
      if (inside && lane == 0 && run.part == 0) *at<A>(p.map_mean, map) = p.mean_of_scaled ? gain * mean : mean;
    }

    const int64_t from = run.first + mine * p.maps.pixels;
    A sum[1] = {};
    const auto apply = [&](auto with_extras) {
      for (int start = 0; start < run.pixels; start += stride) {
        const int i = start + lane;
        const bool here = i < count;
        unsigned passes = 0;
        if (here) {
          A y[n];
          load<n>(staged + i, y);
#pragma unroll
          for (int j = 0; j < n; ++j) y[j] = y[j] * gain + bias;
          if (with_extras() && p.residual) {
            A residual[n];
            load_constant<n>(at<T>(p.residual, from + i), residual);
#pragma unroll
            for (int j = 0; j < n; ++j) y[j] += residual[j];
          }
          if (smooth) {
            if (p.pre_activation) store<n>(at<T>(p.pre_activation, from + i), y);
            apply_smooth(y, p.activation);
          } else {
            passes = piecewise(y);
          }
          if constexpr (n > 1) {
            store<n>(at<T>(p.output, from + i), y);
          } else {
            staged[i] = narrow<T>(y[0]);
          }
          if (with_extras() && p.output_mean) {
            round_to<T>(y);
#pragma unroll
            for (int j = 0; j < n; ++j) sum[0] += y[j];
          }
        }
        if (!p.bits) continue;
        const unsigned byte = gather_byte<n>(passes);
        if (here && i % 8 == 0) p.bits[map * bits_row + (run.begin + i) / 8] = static_cast<uint8_t>(byte);
      }
    };
    if (p.residual || p.output_mean) {
      apply(std::true_type{});
    } else {
      apply(std::false_type{});
    }

    if (plan.cluster && p.map_mean) cluster_wait();
    if (!p.output_mean) continue;
    sum_map(sum, plan, p.maps, run, Phase::whole, shared, static_cast<A*>(nullptr));
    if (inside && lane == 0 && run.part == 0) *at<A>(p.output_mean, map) = sum[0] * per_pixel;
    if (plan.cluster) cluster_wait();
  }

  if constexpr (n == 1) {
    __syncthreads();
    unstage(shared.staged, at<T>(p.output, run.first), run.elements());
  }
}

template <class T, int n, bool rectified>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, rectified>)
    backward(const __grid_constant__ CenterBackward p, const __grid_constant__ CenterPlan plan, const Phase phase) {
  using A = Accumulation<T>;
  const Run run(p.maps, plan);
  const bool smooth = !rectified && is_smooth(p.activation);
  const Shared<T> shared(plan, smooth ? 2 : 1, 2);
  const int lane = (threadIdx.x & (plan.lanes() - 1)) * n, team = threadIdx.x >> plan.log_lanes;
  const int teams = kThreads >> plan.log_lanes, stride = plan.lanes() * n;
  const A per_pixel = A(1) / static_cast<A>(p.maps.pixels);
  const bool needs_sums = p.centred || p.sums || p.dots;
  const Piecewise<A, rectified> piecewise(p.activation, p.slope);
  const int64_t bits_row = p.maps.bytes_of_bits_row();
  stage(at<T>(p.grad_output, run.first), shared.staged, run.elements());
  if (smooth) stage(at<T>(p.pre_activation, run.first), shared.staged_too, run.elements());
  copy_async_wait<0>();
  __syncthreads();

  for (int first = 0; first < plan.maps; first += teams) {
    const int mine = first + team;
    const bool inside = mine < run.maps;
    const int count = inside ? run.pixels : 0;
    const int64_t map = run.map + mine;
    const unsigned channel = (run.channel + mine) % unsigned(p.maps.channels);
    const int64_t element = run.first + mine * p.maps.pixels;
    const int staged = mine * run.pixels;

    // The gradient in front of the activation.
    const auto error = [&](int i, A (&e)[n]) {
      load<n>(shared.staged + staged + i, e);
      if (smooth) {
        A pre[n];
        load<n>(shared.staged_too + staged + i, pre);
#pragma unroll
        for (int j = 0; j < n; ++j) e[j] *= smooth_derivative(pre[j], p.activation);
      } else if (p.bits) {
        const int64_t pixel = run.begin + i;
        piecewise.backward(e, __ldg(p.bits + map * bits_row + pixel / 8) >> (n == 8 ? 0 : pixel % 8));
      }
    };

    A offset = 0, scale = 1;
    if (inside) {
      offset = p.mean_scale ? static_cast<const A*>(p.mean_scale)[channel] : A(p.constant);
      if (p.scale) scale = static_cast<const A*>(p.scale)[channel];
    }
    if (needs_sums) {
      A sums[2] = {};
      if (phase != Phase::apply) {
#pragma unroll 4
        for (int i = lane; i < count; i += stride) {
          A e[n];
          error(i, e);
#pragma unroll
          for (int j = 0; j < n; ++j) sums[0] += e[j];
          if (p.dots) {
            A x[n];
            load_constant<n>(at<T>(p.input, element + i), x);
#pragma unroll
            for (int j = 0; j < n; ++j) sums[1] += e[j] * x[j];
          }
        }
      }
      sum_map(sums, plan, p.maps, run, phase, shared, static_cast<A*>(p.workspace));
      if (phase == Phase::sums) return;
      offset *= p.centred ? -scale * (sums[0] * per_pixel) : A(0);
      if (inside && lane == 0 && run.part == 0) {
        if (p.sums) *at<A>(p.sums, map) = sums[0];
        if (p.dots) *at<A>(p.dots, map) = sums[1];
      }
    } else {
      offset = 0;
    }

#pragma unroll 2
    for (int i = lane; i < count; i += stride) {
      A e[n];
      error(i, e);
      if (p.grad_residual) store<n>(at<T>(p.grad_residual, element + i), e);
#pragma unroll
      for (int j = 0; j < n; ++j) e[j] = e[j] * scale + offset;
      if constexpr (n > 1) {
        if (p.grad_input) store<n>(at<T>(p.grad_input, element + i), e);
      } else {
        shared.staged[staged + i] = narrow<T>(e[0]);
      }
    }
  }

  if constexpr (n == 1) {
    __syncthreads();
    if (p.grad_input) unstage(shared.staged, at<T>(p.grad_input, run.first), run.elements());
  }
  if (plan.cluster && needs_sums) cluster_wait();
}

}  // namespace

cudaError_t launch_center_forward_nchw(const CenterForward& p, const CenterPlan& plan, cudaStream_t stream) {
  return run_center(p, plan, p.map_mean ? 1 : 0, stream, [&](auto* type, auto n) {
    using T = std::remove_pointer_t<decltype(type)>;
    return is_rectified(p.activation) ? forward<T, n(), true> : forward<T, n(), false>;
  });
}

cudaError_t launch_center_backward_nchw(const CenterBackward& p, const CenterPlan& plan, cudaStream_t stream) {
  return run_center(p, plan, p.dots ? 2 : p.centred || p.sums ? 1 : 0, stream, [&](auto* type, auto n) {
    using T = std::remove_pointer_t<decltype(type)>;
    return is_rectified(p.activation) ? backward<T, n(), true> : backward<T, n(), false>;
  });
}

}  // namespace deepcontrol::cuda
