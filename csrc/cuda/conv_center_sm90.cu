// The fused convolution for sm_90a (H100): an implicit matrix product on wgmma with the whole layer in its epilogue, for
// bfloat16 and float16 in channels_last.
//
//   output = act(gain * conv(input, weight) + shift + residual),
//   shift  = beta[n, o], whose means are known before, or bias - mean_scale * gain * (mean of the map) taken here
//
// Reads the input, the weight and the residual and writes the output and the bits of the activation, each once as far as
// memory is concerned: what taps and tiles read again comes from the second-level cache. Multiprocessors take a tile of 128
// pixels and 128 filters through 32 KiB a step of 64 channels, 512 clocks of the tensor cores; two tiles one above the
// other, through 48 KiB in 1024.
//
// One thread tells the TMA what to load, far ahead: it finds the pixels that a tap sees by itself (im2col mode, so padding,
// strides and dilation cost no instruction) and zeros where there are none. Two warpgroups multiply from shared memory, 128
// pixels each. Either each has tiles of its own and they take turns, so that one's epilogue hides behind the other's
// products; or both have a half of one tile, which takes fewer bytes from the cache for each product. Blocks stay: each
// runs through every so-manieth tile, and loads of the next one start while the last is still multiplied.
//
// Maps that a block, or the blocks of a cluster, have whole are centred right here: each group sums its rows of each map in
// a fixed order, and blocks add the sums of others from their shared memory. So nothing is read ahead for means.
//
// No CUTLASS: this compiles in seconds rather than minutes, needs nothing installed, and the tests can play all of it on
// a CPU, for which they replace ptx.cuh and ptx_sm90.cuh.

#include <algorithm>

#include "conv_epilogue.cuh"
#include "conv_layout_sm90.h"
#include "division.cuh"
#include "launch.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace deepcontrol::cuda {
namespace {

using Layout = LayoutSm90;

constexpr int kGroupRows = Layout::kGroupRows, kConsumers = Layout::kConsumers, kWarpsOfGroup = Layout::kWarpsOfGroup;
constexpr int kGroupThreads = 128, kBlockThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of 65536 for all threads
constexpr int kProductRows = 64, kProductBytes = 32;              // of wgmma along K
constexpr int kMostBlocks = 8;                                    // of a cluster
constexpr unsigned kAllOfWarp = 0xffffffffu;

// What the host works out once a launch.
struct Work {
  CUtensorMap input, weight;
  ConvForward p;
  ConvPlan plan;
  Divisor pixels, plane, width, columns, group_columns, stages;
  int rows;     // of all samples
  int span;     // rows of a cluster's tile
  int tiles;    // of clusters
  int filters;  // of a group
  int chunks;   // of 64 channels, in a group of channels
  int steps;    // of a tile's sum
  bool flat;
  float per_pixel;
};

// The block's part of a tile. Tiles that run at the same time have the same pixels and other filters where they can.
struct Place {
  int group;      // of channels
  int column;     // the first filter, in the group
  int base;       // the first row of the cluster
  int row, rows;  // of the block: the first, and how many there are

  __device__ __forceinline__ Place(const Work& work, int tile, int rank, int width) {
    const int across = work.columns(tile), column_tile = tile - across * work.columns.by;
    group = work.group_columns(column_tile);
    column = (column_tile - group * work.group_columns.by) * width;
    base = across * work.span;
    row = base + rank * work.plan.used;
    const int end = min(base + work.span, work.rows);
    rows = max(min(end - row, work.plan.used), 0);
  }
};

// The block's shared memory.
struct Shared {
  uint64_t* full;   // a stage is loaded
  uint64_t* empty;  // and multiplied
  uint64_t* turn;   // a group may multiply
  uint64_t* ready;  // sums of maps are there in all of the cluster
  float* slabs;
  float* tables;
  float* shifts;
  unsigned char* stages;

  __device__ __forceinline__ explicit Shared(const Layout& layout) {
    unsigned char* start = dynamic_shared();
    full = reinterpret_cast<uint64_t*>(start);
    empty = full + Layout::kMostStages;
    turn = empty + Layout::kMostStages;
    ready = turn + kConsumers;
    slabs = reinterpret_cast<float*>(start + layout.slabs);
    tables = reinterpret_cast<float*>(start + layout.tables);
    shifts = reinterpret_cast<float*>(start + layout.shifts);
    stages = start + layout.stages;
    stages += -shared_address(stages) & (Layout::kStageAlignment - 1);
  }
};

// Where a thread is in the ring of stages.
struct Ring {
  int stages, stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int steps, const Divisor& by) {
    stage += steps;
    const int rounds = by(stage);
    stage -= rounds * stages;
    parity ^= rounds & 1;
  }
};

// Which tiles a block has, and its place among those that share each.
struct Turns {
  int first, step, rank;

  __device__ __forceinline__ explicit Turns(int cluster)
      : first(blockIdx.x / unsigned(cluster)),
        step(gridDim.x / unsigned(cluster)),
        rank(blockIdx.x - first * cluster) {}
};

// One thread: loads all stages of all tiles, as soon as there is room.
__device__ __forceinline__ void produce(const Work& work, const Shared& shared, int columns, int stage_bytes,
                                        int weight_at) {
  const ConvForward& p = work.p;
  const Windows& w = p.windows;
  const int kernel_d = w.kernel[0], kernel_h = w.kernel[1], kernel_w = w.kernel[2];
  const int channels = p.group_channels(), filters = work.filters;
  const unsigned bytes = (work.plan.used + columns) * Layout::kStepBytes;
  const Turns turns(work.plan.cluster);
  Ring ring{work.plan.stages};
  prefetch_tensor_map(&work.input);
  prefetch_tensor_map(&work.weight);
  for (int tile = turns.first; tile < work.tiles; tile += turns.step) {
    const Place place(work, tile, turns.rank, columns);
    // The first pixel, as where the tap at the origin sees the input.
    const int n = work.flat ? work.plane(place.row) : work.pixels(place.row);
    int rest = place.row - n * (work.flat ? work.plane.by : work.pixels.by);
    const int plane = work.flat ? 0 : work.plane(rest);
    rest -= plane * work.plane.by;
    const int line = work.width(rest), pixel = rest - line * work.width.by;
    const int d = plane * int(w.stride[0]) - int(w.padding[0]);
    const int h = line * int(w.stride[1]) - int(w.padding[1]);
    const int x = pixel * int(w.stride[2]) - int(w.padding[2]);
    const int first_channel = place.group * channels, filter = place.group * filters + place.column;
    int tap = 0;
    for (int kd = 0; kd < kernel_d; ++kd) {
      for (int kh = 0; kh < kernel_h; ++kh) {
        for (int kw = 0; kw < kernel_w; ++kw, ++tap) {
          const unsigned short ahead_d = kd * int(w.dilation[0]), ahead_h = kh * int(w.dilation[1]);
          const unsigned short ahead_w = kw * int(w.dilation[2]);
          for (int chunk = 0; chunk < work.chunks; ++chunk) {
            const int channel = chunk * Layout::kStepChannels;
            unsigned char* stage = shared.stages + ring.stage * stage_bytes;
            uint64_t* full = shared.full + ring.stage;
            wait_barrier(shared.empty + ring.stage, ring.parity ^ 1);
            arrive_and_expect(full, bytes);
            if (work.flat) {
              load_pixels(stage, &work.input, full, first_channel + channel, x, h, n, ahead_w, ahead_h);
            } else {
              load_pixels(stage, &work.input, full, first_channel + channel, x, h, d, n, ahead_w, ahead_h, ahead_d);
            }
            load_box(stage + weight_at, &work.weight, full, channel, tap, filter);
            ring.next();
          }
        }
      }
    }
  }
}

// Of n values of each of the eight lanes that are four apart, sums over those lanes; lane i has those of n / 8 from
// i / 4 * (n / 8) on. Halves are exchanged and added, so 7 n / 8 shuffles do.
template <int n, int distance = 16, int total>
__device__ __forceinline__ void sum_eighths(float (&values)[total]) {
  constexpr int kHalf = n / 2;
  const bool upper = threadIdx.x & distance;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float sent = upper ? values[i] : values[i + kHalf], kept = upper ? values[i + kHalf] : values[i];
    values[i] = kept + __shfl_xor_sync(kAllOfWarp, sent, distance);
  }
  if constexpr (distance > 4) sum_eighths<kHalf, distance / 2>(values);
}

// A matrix 16 * `ahead` bytes further on. In 32 bits, which a descriptor has its address in: uniform registers are few.
__device__ __forceinline__ uint64_t moved(uint64_t matrix, unsigned ahead) {
  return matrix >> 32 << 32 | (static_cast<unsigned>(matrix) + ahead);
}

// One warpgroup of those that multiply.
template <class T, int columns, bool shared_tile>
class Consumer {
  static constexpr int kHalves = kGroupRows / kProductRows, kSums = columns / 2;
  using Sums = float[kHalves][kSums];

 public:
  __device__ __forceinline__ Consumer(const Work& work, const Shared& shared, const Layout& layout, int group)
      : work_(work),
        p_(work.p),
        shared_(shared),
        stage_bytes_(layout.stage),
        group_(group),
        thread_(threadIdx.x % kGroupThreads),
        lane_(threadIdx.x % 32),
        warp_(__shfl_sync(kAllOfWarp, thread_ / 32, 0)),
        turns_(work.plan.cluster),
        ring_{work.plan.stages},
        epilogue_(work.p) {}

  __device__ __forceinline__ void run() {
    const int own = shared_tile ? 0 : group_, among = shared_tile ? 1 : kConsumers;
    ring_.skip(own * work_.steps, work_.stages);
    int turn = own, done = 0;
    for (int tile = turns_.first + own * turns_.step; tile < work_.tiles; tile += among * turns_.step) {
      const Place place(work_, tile, turns_.rank, columns);
      prefetch_residual(place);
      Sums sums;
      if (!shared_tile && turn > 0) wait_barrier(shared_.turn + group_, (turn - 1) / kConsumers & 1);
      multiply(sums);
      if (work_.plan.held) centre(sums, place, done);
      store(sums, place);
      ring_.skip((among - 1) * work_.steps, work_.stages);
      turn += among;
      ++done;
    }
  }

 private:
  // Of the block's rows, those of this group.
  __device__ __forceinline__ int first_row() const { return shared_tile ? group_ * kGroupRows : 0; }
  __device__ __forceinline__ int rows_of(const Place& place) const {
    return max(min(place.rows - first_row(), kGroupRows), 0);
  }

  // All loads are in the ring in the order of tiles; whoever has the turn goes through those of its tile and then hands it
  // over, while the last products are still under way.
  __device__ __forceinline__ void multiply(Sums& sums) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[half][i] = 0;
    }
    const uint64_t first_a = matrix_descriptor(shared_.stages + first_row() * Layout::kStepBytes);
    const uint64_t first_b = matrix_descriptor(shared_.stages + Layout::rows(shared_tile) * Layout::kStepBytes);
    int before = -1;
    for (int step = 0; step < work_.steps; ++step) {
      wait_barrier(shared_.full + ring_.stage, ring_.parity);
      const unsigned ahead = unsigned(ring_.stage * stage_bytes_) >> 4;
      products_begin();
#pragma unroll
      for (int k = 0; k < Layout::kStepBytes / kProductBytes; ++k) {
        const unsigned along = k * kProductBytes >> 4;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          constexpr unsigned kDown = kProductRows * Layout::kStepBytes >> 4;
          multiply_add_group<T, columns>(sums[half], moved(first_a, ahead + half * kDown + along),
                                         moved(first_b, ahead + along));
        }
      }
      products_commit();
      products_wait<1>();
      if (before >= 0 && lane_ == 0) arrive(shared_.empty + before);
      before = ring_.stage;
      ring_.next();
    }
    if (!shared_tile && lane_ == 0) arrive(shared_.turn + (group_ ^ 1));
    products_wait<0>();
#pragma unroll
    for (int half = 0; half < kHalves; ++half) products_done(sums[half]);
    if (lane_ == 0) arrive(shared_.empty + before);
  }

  // The means of the maps that this group has rows of, and what they shift their filters by.
  //
  // Each group that has rows of a cluster's tile brings a table: sums over its rows for each map that they touch. All of
  // them arrive at `ready` of every block, then each group adds up what it needs. A table is written again for the next but
  // one tile, behind the wait for the next one's: whoever arrived there had read this one's.
  __device__ __forceinline__ void centre(const Sums& sums, const Place& place, int done) {
    const int offset = place.row - place.base + first_row(), rows = rows_of(place);
    const int first_map = work_.pixels(offset), maps = rows > 0 ? work_.pixels(offset + rows - 1) - first_map + 1 : 0;
    const int pixels = work_.pixels.by;
    float* parts = shared_.slabs + group_ * (kWarpsOfGroup * Layout::kSlab / 4);
    const int row = 16 * warp_ + lane_ / 4;
    sync();  // `parts` are the slabs of all warps, some of which may still finish the tile before
    for (int map = 0; map < maps; ++map) {
      const int begin = max((first_map + map) * pixels - offset, 0);
      const unsigned count = min((first_map + map + 1) * pixels - offset, rows) - begin;
      float own[columns / 4];
#pragma unroll
      for (int i = 0; i < columns / 4; ++i) own[i] = 0;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const bool has = unsigned(row + half * kProductRows + below * 8 - begin) < count;
#pragma unroll
          for (int i = 0; i < columns / 4; ++i) {
            const float z = sums[half][i / 2 * 4 + below * 2 + i % 2];
            own[i] += has ? z : 0.0f;
          }
        }
      }
      sum_eighths<columns / 4>(own);
      float* part = parts + (map * kWarpsOfGroup + warp_) * columns + lane_ / 4 * (columns / 8) + lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < columns / 32; i += 2) {
        *reinterpret_cast<float2*>(part + i / 2 * 8) = make_float2(own[i], own[i + 1]);
      }
    }
    sync();
    float* table = table_of(group_, done);
    for (int i = thread_; i < maps * columns; i += kGroupThreads) {
      const float* part = parts + i / columns * (kWarpsOfGroup * columns) + i % columns;
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarpsOfGroup; ++warp) sum += part[warp * columns];
      table[i] = sum;
    }
    sync();
    uint64_t* ready = shared_.ready + (shared_tile ? 0 : group_);
    if (thread_ < work_.plan.cluster) arrive_in_cluster(ready, thread_);
    wait_barrier_of_cluster(ready, done & 1);
    float* shifts = shared_.shifts + group_ * (Layout::kMostMaps * columns);
    for (int i = thread_; i < maps * columns; i += kGroupThreads) {
      const int map = first_map + i / columns, column = i % columns;
      const float z = sum_of_map(map, column, done) * work_.per_pixel;
      if (place.column + column >= work_.filters) continue;
      const int filter = place.group * work_.filters + place.column + column;
      const float mean = p_.gain ? __ldg(static_cast<const float*>(p_.gain) + filter) * z : z;
      const float scale = p_.mean_scale ? __ldg(static_cast<const float*>(p_.mean_scale) + filter) : float(p_.constant);
      const float bias = p_.bias ? __ldg(static_cast<const float*>(p_.bias) + filter) : 0.0f;
      shifts[i] = bias - scale * mean;
      // By whoever has its first row.
      if (map * pixels >= offset) {
        const int64_t sample = work_.pixels(place.base) + map;
        static_cast<float*>(p_.map_mean)[sample * p_.filters + filter] = mean;
      }
    }
    sync();
  }

  __device__ __forceinline__ float* table_of(int group, int done) const {
    return shared_.tables + (group * 2 + (done & 1)) * (Layout::kMostMaps * columns);
  }

  // Over all groups of all blocks that have rows of a map, counted in the cluster's tile, in the order of rows.
  __device__ __forceinline__ float sum_of_map(int map, int column, int done) const {
    constexpr int kGroups = shared_tile ? kConsumers : 1;
    const int begin = map * int(work_.pixels.by), end = begin + int(work_.pixels.by);
    float parts[kMostBlocks * kGroups];
#pragma unroll
    for (int i = 0; i < kMostBlocks * kGroups; ++i) {
      const int rank = i / kGroups, group = shared_tile ? i % kGroups : group_;
      const int first = rank * work_.plan.used + (shared_tile ? group * kGroupRows : 0);
      const int last = min((rank + 1) * work_.plan.used, first + kGroupRows);
      parts[i] = 0;
      if (rank < work_.plan.cluster && first < end && last > begin && first < last) {
        const float* own = table_of(group, done) + (map - int(work_.pixels(first))) * columns + column;
        parts[i] = load_from_cluster(own, rank);
      }
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMostBlocks * kGroups; ++i) sum += parts[i];
    return sum;
  }

  // As far as the second-level cache, while products run: the epilogue then waits for it as long as for any of its loads.
  __device__ __forceinline__ void prefetch_residual(const Place& place) const {
    constexpr int kLine = 128 / sizeof(T);
    if (!p_.residual || thread_ >= rows_of(place)) return;
    const int count = min(work_.filters - place.column, columns);
    const int64_t row = place.row + first_row() + thread_;
    const T* from = static_cast<const T*>(p_.residual) + row * p_.filters + place.group * work_.filters + place.column;
    for (int i = 0; i < count; i += kLine) prefetch_second_level(from + i);
  }

  // Each warp turns 16 rows of 64 columns at a time, through shared memory of its own, from what products leave to eight
  // neighbouring columns a thread, and finishes them. Octets of columns are put where row ^ octet says, their halves
  // swapped in every second four, so that neither side meets a bank conflict.
  __device__ __forceinline__ void store(const Sums& sums, const Place& place) const {
    constexpr int kParts = columns / Layout::kSlabColumns, kRowBytes = Layout::kSlabColumns * 4;
    unsigned char* slab =
        reinterpret_cast<unsigned char*>(shared_.slabs) + (group_ * kWarpsOfGroup + warp_) * Layout::kSlab;
    const unsigned line = lane_ / 4, pair = lane_ % 4;
    const unsigned write_at = line * kRowBytes | (line & 3) << 5 | pair << 3;
    const unsigned octet = lane_ % 8, row_of_four = lane_ / 8;
    const unsigned read_at = row_of_four * kRowBytes | (octet ^ row_of_four) << 5 | (octet >> 2) << 4;
    const int rows = rows_of(place), first_map = work_.pixels(place.row - place.base + first_row());
    const float* shifts = shared_.shifts + group_ * (Layout::kMostMaps * columns);
#pragma unroll 1
    for (int piece = 0; piece < kHalves * kParts; ++piece) {
#pragma unroll
      for (int i = 0; i < kHalves * kParts; ++i) {
        if (i != piece) continue;
        const float* from = sums[i / kParts] + i % kParts * (Layout::kSlabColumns / 2);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          const unsigned at = write_at ^ (j << 5 | (j >> 2) << 4);
          *reinterpret_cast<float2*>(slab + at) = make_float2(from[4 * j], from[4 * j + 1]);
          *reinterpret_cast<float2*>(slab + at + 8 * kRowBytes) = make_float2(from[4 * j + 2], from[4 * j + 3]);
        }
      }
      __syncwarp();
      const int column = piece % kParts * Layout::kSlabColumns + octet * kOctet;
      const int count = min(work_.filters - place.column - column, kOctet);
      const int filter = place.group * work_.filters + place.column + column;
      const int first = piece / kParts * kProductRows + Layout::kSlabRows * warp_;  // of the warp
      float gain[kOctet], shift[kOctet];
      load_octet(p_.gain, filter, count, 1.0f, gain);
      load_octet(work_.plan.held ? nullptr : p_.bias, filter, count, 0.0f, shift);
#pragma unroll 1
      for (int row = 0; row < Layout::kSlabRows && first + row < rows; row += 4) {
        const int own = first + row + row_of_four, m = place.row + first_row() + own;
        if (own >= rows || count <= 0) continue;
        if (p_.beta) {
          load_octet(p_.beta, work_.pixels(m) * p_.filters + filter, count, 0.0f, shift);
        } else if (work_.plan.held) {
          const int map = work_.pixels(m - place.base) - first_map;
          memcpy(shift, __builtin_assume_aligned(shifts + map * columns + column, 16), sizeof(shift));
        }
        const unsigned char* from = slab + row * kRowBytes;
        const float4 low = *reinterpret_cast<const float4*>(from + read_at);
        const float4 high = *reinterpret_cast<const float4*>(from + (read_at ^ 16));
        float z[kOctet] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < kOctet; ++j) z[j] = gain[j] * z[j] + shift[j];
        epilogue_.store(m, filter, count, z);
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ void sync() const { sync_group(1 + group_, kGroupThreads); }

  const Work& work_;
  const ConvForward& p_;
  const Shared& shared_;
  const int stage_bytes_, group_, thread_, lane_, warp_;
  const Turns turns_;
  Ring ring_;
  const Epilogue<T> epilogue_;
};

template <class T, int columns, bool shared_tile>
__global__ void __launch_bounds__(kBlockThreads, 1) convolve(const __grid_constant__ Work work) {
  const Layout layout(shared_tile, columns, work.plan.stages, work.plan.held);
  const Shared shared(layout);
  const bool exchange = work.plan.held && work.plan.cluster > 1;
  if (threadIdx.x == 0) {
    // Every warp that multiplies says so itself.
    const int groups = shared_tile ? kConsumers : 1, arrivals = groups * kWarpsOfGroup;
    for (int i = 0; i < work.plan.stages; ++i) {
      init_barrier(shared.full + i, 1);
      init_barrier(shared.empty + i, arrivals);
    }
    for (int i = 0; i < kConsumers; ++i) {
      init_barrier(shared.turn + i, kWarpsOfGroup);
      init_barrier(shared.ready + i, groups * work.plan.cluster);
    }
    fence_barriers();
  }
  if (exchange) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  const int group = __shfl_sync(kAllOfWarp, threadIdx.x / kGroupThreads, 0);
  if (group == kConsumers) {
    keep_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kGroupThreads) {
      produce(work, shared, columns, layout.stage, Layout::rows(shared_tile) * Layout::kStepBytes);
    }
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, columns, shared_tile>(work, shared, layout, group).run();
  }
  // No block leaves while others read its sums.
  if (exchange) {
    cluster_arrive();
    cluster_wait();
  }
}

template <class T>
auto kernel_of(const ConvPlan& plan) {
  if (plan.shared_tile) return convolve<T, 128, true>;
  return plan.columns == 128 ? convolve<T, 128, false> : convolve<T, 64, false>;
}

}  // namespace

cudaError_t launch_conv_sm90(const ConvForward& p, const ConvPlan& plan, cudaStream_t stream) {
  const Windows& w = p.windows;
  const int64_t rows = p.samples * p.pixels(), span = plan.held ? plan.samples * p.pixels() : plan.rows;
  const int64_t group_columns = ceil_divide(p.group_filters(), plan.columns), columns = p.groups * group_columns;
  const int64_t chunks = ceil_divide(p.group_channels(), Layout::kStepChannels);
  Work work{};
  cudaError_t failed = map_pixels(work.input, p.dtype, p.input, p.samples, p.channels, w, plan.used);
  if (failed == cudaSuccess) {
    failed = map_filters(work.weight, p.dtype, p.weight, p.filters, w.taps(), p.group_channels(), plan.columns);
  }
  if (failed != cudaSuccess) return failed;
  work.p = p;
  work.plan = plan;
  work.pixels = Divisor(p.pixels());
  work.plane = Divisor(w.output[1] * w.output[2]);
  work.width = Divisor(w.output[2]);
  work.columns = Divisor(columns);
  work.group_columns = Divisor(group_columns);
  work.stages = Divisor(plan.stages);
  work.rows = static_cast<int>(rows);
  work.span = static_cast<int>(span);
  work.tiles = static_cast<int>(ceil_divide(rows, span) * columns);
  work.filters = static_cast<int>(p.group_filters());
  work.chunks = static_cast<int>(chunks);
  work.steps = static_cast<int>(w.taps() * chunks);
  work.flat = is_flat(w);
  work.per_pixel = static_cast<float>(1.0 / static_cast<double>(p.pixels()));
  const auto run = [&](auto kernel) {
    int64_t blocks = plan.blocks;
    if (plan.cluster > 1) {
      // One that finds no room would begin all of its tiles when another has ended all of its own.
      int resident = 0;
      const cudaError_t failed = resident_clusters(kernel, kBlockThreads, plan.shared, plan.cluster, resident);
      if (failed != cudaSuccess) return failed;
      blocks = std::min<int64_t>(blocks, std::max(resident, 1) * plan.cluster);
    }
    return launch(kernel, blocks, kBlockThreads, plan.shared, plan.cluster, stream, work);
  };
  return p.dtype == Dtype::f16 ? run(kernel_of<__half>(plan)) : run(kernel_of<__nv_bfloat16>(plan));
}

}  // namespace deepcontrol::cuda
