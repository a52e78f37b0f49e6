// Convolutions of few channels a group, depthwise ones above all, with everything that follows, in a true single pass.
//
// Tensor cores have nothing to do here: a depthwise convolution is two operations a tap for each number that it moves.
// So a block takes one sample and some octets of filters, convolves all of the map or, in a thread block cluster, its
// part of it, and keeps the sums; their mean over the map is known then, and the finished layer is written. The input
// is read once (taps overlap in the first-level cache, halos of a cluster's blocks in the second), the residual once;
// the output and its bits are written once. Maps that are too large to be kept are convolved twice: to read again what
// a cluster has in the second-level cache is less than to write sums and read them back. Where nothing is centred, once
// is enough.
//
// What costs are instructions: each number that is loaded has to be widened, each weight comes from shared memory. A
// thread has strips of neighbouring pixels of a row, where a weight serves all pixels and a number most taps of a row:
// for three taps a strip of four loads six times rather than twelve. Kernel sizes need not be constants for that.

#include "conv_direct.h"
#include "conv_epilogue.cuh"
#include "division.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace deepcontrol::cuda {
namespace {

static_assert(kFilters == kOctet);

// What is the same for all blocks, found once.
struct Cut {
  int strips;    // of a map
  int of_block;  // of them
  int parts;     // blocks that share a map
  int tiles;     // of filters
  int steps;     // strips of a thread
  int phases;
  int most_taps, last_of_most;  // of a phase, and the last phase that has as many
  int group_channels, group_filters;
  int weights;    // of a filter
  int pixel_bytes, row_bytes;  // of the input
  int64_t map_bytes;
  int lanes, groups;
  int next_pixel, next_tap;  // bytes along a row, as far as pixels of the output and taps lie apart
  int tap_weights;           // of all channels and filters of the block
  int phase_weights;         // the distance of a phase's taps
  Divisor row;    // by strips of a row
  Divisor plane;  // by rows of a plane
  DirectShared shared;

  Cut(const ConvForward& p, const ConvPlan& plan, int size, int size_of_sum)
      : strips(static_cast<int>(strips_of_map(p.windows, strip_of(size_of_sum)))),
        of_block(plan.rows / strip_of(size_of_sum)),
        parts(static_cast<int>(ceil_divide(strips, of_block))),
        tiles(static_cast<int>(ceil_divide(p.filters, plan.columns))),
        steps(static_cast<int>(steps_of(plan, strip_of(size_of_sum)))),
        phases(static_cast<int>(phases_of(p.windows))),
        most_taps(static_cast<int>(ceil_divide(p.windows.kernel[2], phases))),
        last_of_most(static_cast<int>(p.windows.kernel[2] - 1) % phases),
        group_channels(static_cast<int>(p.group_channels())),
        group_filters(static_cast<int>(p.group_filters())),
        weights(static_cast<int>(p.windows.taps()) * group_channels),
        pixel_bytes(static_cast<int>(p.channels * size)),
        row_bytes(static_cast<int>(p.windows.size[2] * pixel_bytes)),
        map_bytes(p.windows.size[0] * p.windows.size[1] * row_bytes),
        lanes(1 << plan.log_lanes),
        groups(kThreads >> plan.log_lanes),
        next_pixel(static_cast<int>(p.windows.stride[2]) * pixel_bytes),
        next_tap(static_cast<int>(p.windows.dilation[2]) * pixel_bytes),
        tap_weights(group_channels * plan.columns),
        phase_weights(phases * tap_weights),
        row(strips_of_row(p.windows, strip_of(size_of_sum))),
        plane(p.windows.output[1]),
        shared(plan, weights, size_of_sum) {}
};

// A row of the input, as eight filters see it: offsets within it are in bytes. With `vectors` the channels of the
// filters are neighbours, 16-byte aligned.
template <class T, bool vectors>
class Row {
  using A = Accumulation<T>;

 public:
  // For filters from `filter` on; if they are no `vectors`, `seen` has the offsets of their channels.
  __device__ __forceinline__ Row(const ConvForward& p, const Cut& cut, int sample, int filter, const int* seen)
      : cut_(cut),
        maps_(static_cast<const char*>(p.input) + sample * cut.map_bytes + (vectors ? filter * int(sizeof(T)) : 0)),
        seen_(seen) {}

  // Goes to a row of the sample and a channel of the groups.
  __device__ __forceinline__ void go_to(int row, int channel) {
    from_ = maps_ + int64_t(row) * cut_.row_bytes + channel * int(sizeof(T));
  }
  // Of a column, which may be outside of the row.
  __device__ __forceinline__ int offset_of(int column) const { return column * cut_.pixel_bytes; }
  // What filters from `first` of the eight on see; zero outside.
  template <int count>
  __device__ __forceinline__ void read(int offset, int first, A (&values)[count]) const {
    const bool inside = unsigned(offset) < unsigned(cut_.row_bytes);
    const char* from = from_ + unsigned(offset);
    if constexpr (vectors) {
      constexpr int n = kVector<T>;
#pragma unroll
      for (int j = 0; j < count; j += n) {
        uint4 bytes = make_uint4(0, 0, 0, 0);
        if (inside) bytes = __ldg(reinterpret_cast<const uint4*>(from) + (first + j) / n);
        A vector[n];
        unpack<T>(bytes, vector);
#pragma unroll
        for (int i = 0; i < n; ++i) values[j + i] = vector[i];
      }
    } else {
#pragma unroll
      for (int j = 0; j < count; ++j) {
        values[j] = inside ? widen(__ldg(reinterpret_cast<const T*>(from + seen_[first + j]))) : A(0);
      }
    }
  }

 private:
  const Cut& cut_;
  const char* maps_;
  const char* from_;
  const int* seen_;
};

// The weights of the block's filters lie by tap. In a row of them the octets are apart, vector by vector, so that the
// lanes of a warp read neighbours.
template <class A>
__device__ __forceinline__ int place_of(int filter, int lanes) {
  constexpr int n = kVector<A>;
  return (filter % kOctet / n * lanes + filter / kOctet) * n + filter % n;
}

template <int n, class A>
__device__ __forceinline__ void load_weights(const A* of_lane, int lanes, A (&values)[n]) {
#pragma unroll
  for (int j = 0; j < n; j += kVector<A>) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(of_lane + j * lanes);
    memcpy(values + j, &bytes, sizeof(bytes));
  }
}

// Vectors of a thread's sums lie kThreads apart.
template <class A>
__device__ __forceinline__ void store_sums(A* own, const A (&sums)[kOctet]) {
#pragma unroll
  for (int j = 0; j < kOctet; j += kVector<A>) {
    uint4 bytes;
    memcpy(&bytes, sums + j, sizeof(bytes));
    *reinterpret_cast<uint4*>(own + j * kThreads) = bytes;
  }
}
template <class A>
__device__ __forceinline__ void load_sums(const A* own, A (&sums)[kOctet]) {
#pragma unroll
  for (int j = 0; j < kOctet; j += kVector<A>) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(own + j * kThreads);
    memcpy(sums + j, &bytes, sizeof(bytes));
  }
}

// The sums of a strip of pixels and an octet of filters.
template <class T, bool vectors>
class Strip {
  using A = Accumulation<T>;

 public:
  static constexpr int kPixels = kVector<A>;
  // Filters at once: where one load does not bring all eight, fewer of them need fewer registers.
  static constexpr int kAtOnce = vectors && sizeof(T) == 2 ? kOctet : kVector<A>;
  A sums[kPixels][kOctet];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) sums[i][j] = 0;
    }
  }

  // (d, h, w) is what the tap at the origin sees for the first pixel; `weights` are those of this lane.
  __device__ __forceinline__ void convolve(const ConvForward& p, const Cut& cut, Row<T, vectors> row,
                                           const A* weights, int d, int h, int w) {
    clear();
#pragma unroll
    for (int first = 0; first < kOctet; first += kAtOnce) convolve(p, cut, row, weights, d, h, w, first);
  }

  // A thread reads only what it has written itself.
  __device__ __forceinline__ void keep(A* kept) const {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) store_sums(kept + i * kOctet * kThreads, sums[i]);
  }
  __device__ __forceinline__ void recall(const A* kept) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) load_sums(kept + i * kOctet * kThreads, sums[i]);
  }

  // Adds what the first pixels have to the thread's own sums.
  __device__ __forceinline__ void add_to(A* own, int pixels) {
    if (pixels < kPixels) {
#pragma unroll
      for (int i = 1; i < kPixels; ++i) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sums[i][j] = i < pixels ? sums[i][j] : A(0);
      }
    }
    A total[kOctet];
    load_sums(own, total);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) total[j] += sums[i][j];
    }
    store_sums(own, total);
  }

  // Makes the second pixel the first, and so on.
  __device__ __forceinline__ void move_up() {
#pragma unroll
    for (int i = 1; i < kPixels; ++i) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) sums[i - 1][j] = sums[i][j];
    }
  }

 private:
  __device__ __forceinline__ void convolve(const ConvForward& p, const Cut& cut, Row<T, vectors>& row,
                                           const A* weights, int d, int h, int w, int first) {
    const Windows& windows = p.windows;
    const int kernel_d = windows.kernel[0], kernel_h = windows.kernel[1], kernel_w = windows.kernel[2];
    const int dilation_d = windows.dilation[0], dilation_h = windows.dilation[1];
    const int size_d = windows.size[0], size_h = windows.size[1];
    const int channels = vectors ? 1 : cut.group_channels;
    const int offset = row.offset_of(w);
    for (int c = 0; c < channels; ++c) {
      for (int kd = 0; kd < kernel_d; ++kd) {
        const int z = d + kd * dilation_d;
        if (unsigned(z) >= unsigned(size_d)) continue;
        for (int kh = 0; kh < kernel_h; ++kh) {
          const int y = h + kh * dilation_h;
          if (unsigned(y) >= unsigned(size_h)) continue;
          row.go_to(z * size_h + y, c);
          const A* of_row = weights + (kd * kernel_h + kh) * kernel_w * cut.tap_weights + c * cut.lanes * kOctet;
          for (int phase = 0; phase < cut.phases; ++phase) {
            slide(cut, row, offset + phase * cut.next_tap, of_row + phase * cut.tap_weights,
                  cut.most_taps - (phase > cut.last_of_most), first);
          }
        }
      }
    }
  }

  // What a strip sees while a tap moves along its row. The window goes round: the next number takes the place of the
  // one that is not needed any more.
  struct Window {
    const Row<T, vectors>& row;
    int offset;        // of the number that comes next
    const A* weights;  // of the tap that comes next
    A values[kPixels][kAtOnce];
  };

  // The taps of one phase.
  __device__ __forceinline__ void slide(const Cut& cut, const Row<T, vectors>& row, int offset, const A* weights,
                                        int taps, int first) {
    Window window{row, offset, weights, {}};
#pragma unroll
    for (int i = 0; i < kPixels - 1; ++i) {
      row.read(window.offset, first, window.values[i]);
      window.offset += cut.next_pixel;
    }
    for (; taps >= kPixels; taps -= kPixels) advance<kPixels>(cut, window, first);
    // Not one by one: their loads are under way together.
    if (taps == 3) advance<3>(cut, window, first);
    if (taps == 2) advance<2>(cut, window, first);
    if (taps == 1) advance<1>(cut, window, first);
  }

  template <int taps>
  __device__ __forceinline__ void advance(const Cut& cut, Window& window, int first) {
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) {
      window.row.read(window.offset, first, window.values[(tap + kPixels - 1) % kPixels]);
      multiply(window.values, tap, window.weights, cut.lanes, first);
      window.offset += cut.next_pixel;
      window.weights += cut.phase_weights;
    }
  }

  __device__ __forceinline__ void multiply(const A (&window)[kPixels][kAtOnce], int begin, const A* weights, int lanes,
                                           int first) {
    constexpr int n = kVector<A>;
#pragma unroll
    for (int k = 0; k < kAtOnce; k += n) {
      A weight[n];
      load_weights(weights + (first + k) * lanes, lanes, weight);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
#pragma unroll
        for (int j = 0; j < n; ++j) sums[i][first + k + j] += window[(begin + i) % kPixels][k + j] * weight[j];
      }
    }
  }
};

// A block's part of the output. Every thread needs it now and then; in shared memory it takes no registers.
struct Place {
  int sample, first_filter, first_strip, strips;
};

template <class T, bool vectors>
__global__ void __launch_bounds__(kThreads, 2)
    convolve_groups(const __grid_constant__ ConvForward p, const __grid_constant__ ConvPlan plan,
                    const __grid_constant__ Cut cut) {
  using A = Accumulation<T>;
  constexpr int kPixels = Strip<T, vectors>::kPixels, kStrip = kPixels * kOctet * kThreads;
  const int lanes = cut.lanes, lane = threadIdx.x & (lanes - 1);
  const int groups = cut.groups, group = threadIdx.x >> plan.log_lanes;
  const int filters = static_cast<int>(p.filters), width = static_cast<int>(p.windows.output[2]);
  A* base = reinterpret_cast<A*>(dynamic_shared());
  A* weights = base + cut.shared.weights;
  A* scratch = base + cut.shared.scratch;
  A* totals = base + cut.shared.totals;
  A* shifts = base + cut.shared.shifts;
  A* gains = base + cut.shared.gains;
  A* own = base + cut.shared.own + threadIdx.x * kPixels;
  int* seen = reinterpret_cast<int*>(base + cut.shared.seen);

  Place& place = *reinterpret_cast<Place*>(seen + plan.columns);
  const int part = blockIdx.x % cut.parts, tile = blockIdx.x / cut.parts % cut.tiles;
  const int sample = blockIdx.x / cut.parts / cut.tiles, first_filter = tile * plan.columns;
  if (threadIdx.x == 0) {
    const int first_strip = part * cut.of_block;
    place = {sample, first_filter, first_strip, min(cut.of_block, cut.strips - first_strip)};
  }

  // As far apart as they are in memory, weights are read in the order in which shared memory likes them.
  const T* from = static_cast<const T*>(p.weight) + int64_t(first_filter) * cut.weights;
  for (int i = threadIdx.x; i < plan.columns * cut.weights; i += kThreads) {
    const int column = i & (plan.columns - 1), weight = i >> (plan.log_lanes + 3);
    weights[weight * plan.columns + place_of<A>(column, lanes)] =
        first_filter + column < filters ? widen(__ldg(from + int64_t(column) * cut.weights + weight)) : A(0);
  }
  if (int(threadIdx.x) < plan.columns) {
    const int existing = min(first_filter + int(threadIdx.x), filters - 1);
    seen[threadIdx.x] = existing / cut.group_filters * cut.group_channels * int(sizeof(T));
  }
  store_sums(own, {});
  __syncthreads();

  const Row<T, vectors> row(p, cut, sample, first_filter + lane * kOctet, seen + lane * kOctet);
  const bool exists = first_filter + lane * kOctet < filters;
  const auto kept_of = [&](int index) {
    return base + (index >> (kLogThreads - plan.log_lanes)) * kStrip + threadIdx.x * kPixels;
  };
  Strip<T, vectors> strip;
  const auto convolve = [&](int index) {
    index += place.first_strip;
    const int line = cut.row(index), plane = cut.plane(line), q = (index - line * int(cut.row.by)) * kPixels;
    strip.convolve(p, cut, row, weights + lane * kPixels,
                   plane * int(p.windows.stride[0]) - int(p.windows.padding[0]),
                   (line - plane * int(cut.plane.by)) * int(p.windows.stride[1]) - int(p.windows.padding[1]),
                   q * int(p.windows.stride[2]) - int(p.windows.padding[2]));
  };
  const auto finish = [&](int index) {
    const Epilogue<T> epilogue(p);
    index += place.first_strip;
    const int line = cut.row(index), q = (index - line * int(cut.row.by)) * kPixels, pixels = min(kPixels, width - q);
    const int64_t first = place.sample * p.pixels() + line * width + q;
    const int filter = place.first_filter + lane * kOctet, count = min(kOctet, filters - filter);
    const A* gains_of_lane = gains + lane * kPixels;
    const A* shifts_of_lane = shifts + lane * kPixels;
    if (sizeof(A) == 4 && is_rectified(p.activation)) {
      A gain[kOctet], shift[kOctet];
      load_weights(gains_of_lane, lanes, gain);
      load_weights(shifts_of_lane, lanes, shift);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        A z[kOctet];
#pragma unroll
        for (int j = 0; j < kOctet; ++j) z[j] = gain[j] * strip.sums[i][j] + shift[j];
        if (i < pixels) epilogue.template store<true>(first + i, filter, count, z);
      }
    } else {
      // Moves are less than as many copies of all activations as a strip has pixels.
#pragma unroll 1
      for (int i = 0; i < pixels; ++i) {
        A z[kOctet], shift[kOctet];
        load_weights(gains_of_lane, lanes, z);
        load_weights(shifts_of_lane, lanes, shift);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) z[j] = z[j] * strip.sums[0][j] + shift[j];
        epilogue.store(first + i, filter, count, z);
        strip.move_up();
      }
    }
  };

  if (p.centred) {
    for (int index = group; exists && index < place.strips; index += groups) {
      convolve(index);
      const int of_map = place.first_strip + index, column = of_map - cut.row(of_map) * int(cut.row.by);
      strip.add_to(own, width - column * kPixels);
      if (plan.held && index + groups < place.strips) strip.keep(kept_of(index));
    }
    A sums[kOctet];
    load_sums(own, sums);
    sum_rows<kOctet>(sums, plan.log_lanes, scratch, totals);
    if (plan.cluster > 1) sum_cluster(totals, plan.columns, plan.cluster, scratch);
  }
  const int o = place.first_filter + threadIdx.x;
  if (int(threadIdx.x) < plan.columns && o < filters) {
    const A gain = p.gain ? static_cast<const A*>(p.gain)[o] : A(1);
    A shift = p.bias ? static_cast<const A*>(p.bias)[o] : A(0);
    if (p.centred) {
      const A sum = (plan.cluster > 1 ? scratch : totals)[threadIdx.x], mean = gain * (sum / A(p.pixels()));
      shift -= (p.mean_scale ? static_cast<const A*>(p.mean_scale)[o] : A(p.constant)) * mean;
      if (place.first_strip == 0) static_cast<A*>(p.map_mean)[int64_t(place.sample) * filters + o] = mean;
    }
    gains[place_of<A>(threadIdx.x, lanes)] = gain;
    shifts[place_of<A>(threadIdx.x, lanes)] = shift;
  }
  __syncthreads();
  // Backwards, to begin with what is still in registers and caches.
  for (int index = (cut.steps - 1) * groups + group; exists && index >= 0; index -= groups) {
    if (index >= place.strips) continue;
    if (!plan.held) {
      convolve(index);
    } else if (index + groups < place.strips) {
      strip.recall(kept_of(index));
    }
    finish(index);
  }
  if (plan.cluster > 1) cluster_wait();
}

}  // namespace

cudaError_t launch_conv_direct(const ConvForward& p, const ConvPlan& plan, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Cut cut(p, plan, sizeof(T), sizeof(Accumulation<T>));
    const bool depthwise = p.groups == p.channels && p.groups == p.filters;
    const bool aligned = reinterpret_cast<uintptr_t>(p.input) % kVectorBytes == 0;
    const bool vectors = depthwise && aligned && p.channels % kOctet == 0;
    const auto kernel = vectors ? convolve_groups<T, true> : convolve_groups<T, false>;
    return launch(kernel, plan.blocks, kThreads, plan.shared, plan.cluster, stream, p, plan, cut);
  });
}

}  // namespace deepcontrol::cuda
