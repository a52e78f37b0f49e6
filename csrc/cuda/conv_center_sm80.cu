// conv_center in one pass on tensor cores of sm_80 and up: an implicit matrix product with the whole layer in its
// epilogue.
//
// Rows are the output's pixels of all samples, columns the filters of a group, and what is summed over is (tap,
// channel). The input is read from memory once if the caches keep what taps and neighbouring columns share, the weights
// once, the residual once; the output and one bit an element are written once. Means of maps that fit a tile are taken
// from the sums (`held`), others are known before. Where tiles are too few for the GPU the sum is split, and a second
// launch adds the parts from the workspace: then that one takes the means.
//
// A block has eight warps and a tile. Operands come by cp.async through a ring of stages, 128 bytes of every row in
// each, swizzled. A thread brings one chunk of 16 bytes of every 32nd row. What the first tap sees of the input at each
// row, and a word of bits that tells which taps miss it, are in a table; how far ahead a step's tap is, and its bit, a
// thread finds once for all its rows. Taps share a step, so any number of chunks fills it. Channels that are no
// multiple of 16 bytes, and tensors that are not aligned, come element by element.

#include "conv_epilogue.cuh"
#include "conv_tiles.h"
#include "division.cuh"
#include "implicit_gemm.cuh"
#include "launch.cuh"
#include "params.h"

namespace deepcontrol::cuda {
namespace {

static_assert(kStepBytes == kConvStepBytes);

// Row tiles that go through all columns before the next ones do: blocks that run together share input and weights.
constexpr unsigned kBand = 8;
constexpr unsigned kNoRow = 1u << 31;

struct Job {
  Divisor pixels, plane, width;           // of the output
  Divisor run, kernel_plane, kernel_row;  // terms of a tap; taps
  int size[3], kernel[3], stride[3], padding[3], dilation[3];
  unsigned first_bit[3];  // of a dimension's taps; 0: it is not padded
  int rows, group_filters;
  int terms;  // of a sum: chunks of 16 bytes, or elements
  unsigned row_tiles, column_tiles, groups;
  int height;   // rows of a tile that are used
  int samples;  // whole maps of a tile if it takes their means
  int stages, steps, steps_of_split;
  int split_pitch;  // of the workspace, (splits, rows, columns of all tiles); 0: the sum is not split
  int input_pitch;  // terms from one pixel of the input to the next
};

// The block's tile.
struct Place {
  int split, group;
  int row;     // the first
  int column;  // the first, of the group
  int filter;  // the same, of all

  __device__ Place(const Job& job, int rows, int columns) {
    const unsigned tiles = job.row_tiles * job.column_tiles, tile = blockIdx.x % tiles, rest = blockIdx.x / tiles;
    group = rest % job.groups;
    split = rest / job.groups;
    const unsigned band = tile / (kBand * job.column_tiles), within = tile % (kBand * job.column_tiles);
    const unsigned left = job.row_tiles - band * kBand, height = left < kBand ? left : kBand;
    row = static_cast<int>((band * kBand + within % height) * job.height);
    column = static_cast<int>(within / height) * columns;
    filter = group * job.group_filters + column;
  }
};

// What the taps see of the input at one row of the product.
struct alignas(kConvRowBytes) Row {
  int pixel;         // the first tap's, of the whole input; it may lie in front
  unsigned missing;  // bits of the taps that are beside the input
};
static_assert(sizeof(Row) == kConvRowBytes);

__device__ __forceinline__ Row row_of(const Job& job, int m) {
  const unsigned sample = job.pixels(m);
  unsigned rest = m - sample * job.pixels.by, out[3];
  out[0] = job.plane(rest);
  rest -= out[0] * job.plane.by;
  out[1] = job.width(rest);
  out[2] = rest - out[1] * job.width.by;
  unsigned pixel = sample, missing = 0;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    int at = static_cast<int>(out[d]) * job.stride[d] - job.padding[d];
    pixel = pixel * job.size[d] + at;
    if (!job.first_bit[d]) continue;
    for (int tap = 0; tap < job.kernel[d]; ++tap, at += job.dilation[d]) {
      if (unsigned(at) >= unsigned(job.size[d])) missing |= job.first_bit[d] << tap;
    }
  }
  return {static_cast<int>(pixel), missing};
}

// Of the tile, for all threads to read.
__device__ __forceinline__ void make_table(const Job& job, const Place& place, int rows, Row* table) {
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    const int m = place.row + r;
    table[r] = r < job.height && m < job.rows ? row_of(job, m) : Row{0, kNoRow};
  }
  __syncthreads();
}

// One term of the sum.
struct Term {
  int ahead;      // of what the first tap sees, in pixels
  int within;     // its tap's run
  unsigned need;  // bits that must not be missing
  bool exists;

  __device__ __forceinline__ Term(const Job& job, int k) : exists(k < job.terms) {
    const unsigned at = min(k, job.terms - 1), tap = job.run(at);
    within = at - tap * job.run.by;
    const unsigned d = job.kernel_plane(tap), in_plane = tap - d * job.kernel_plane.by;
    const unsigned h = job.kernel_row(in_plane), w = in_plane - h * job.kernel_row.by;
    ahead = (d * job.dilation[0] * job.size[1] + h * job.dilation[1]) * job.size[2] + w * job.dilation[2];
    need = job.first_bit[0] << d | job.first_bit[1] << h | job.first_bit[2] << w | kNoRow;
  }
};

// Brings the steps of the sum on chip one after another. A term is a chunk of 16 bytes.
template <class T, int rows, int columns>
class Vectors {
 public:
  __device__ __forceinline__ Vectors(const ConvForward& p, const Job& job, const Place& place, const Row* table,
                                     int step)
      : p_(p), job_(job) {
    const int chunk = threadIdx.x % kStepChunks, first = threadIdx.x / kStepChunks;
    table_ = table + first;
    k_ = step * kStepChunks + chunk;
    to_ = swizzled(first, chunk);
    first_channel_ = place.group * job.run.by;
    weight_offset_ = (place.filter + first) * job.terms;
    columns_left_ = job.group_filters - place.column - first;
  }

  __device__ __forceinline__ void load(unsigned char* stage) {
    const Term term(job_, k_);
    const int ahead = term.ahead * job_.input_pitch + first_channel_ + term.within;
    const auto* input = static_cast<const unsigned char*>(p_.input) + int64_t(ahead) * kVectorBytes;
    const auto* weight = static_cast<const unsigned char*>(p_.weight) + int64_t(k_) * kVectorBytes;
    unsigned char* to = stage + to_;
#pragma unroll
    for (int first = 0; first < kRowsOfThread; first += kRowsTogether) {
      Row row[kRowsTogether];
#pragma unroll
      for (int i = 0; i < kRowsTogether; ++i) row[i] = table_[(first + i) * kRowsApart];
#pragma unroll
      for (int i = 0; i < kRowsTogether; ++i) {
        copy_async_16_or_zero(to + (first + i) * kRowsApart * kStepBytes,
                              input + int64_t(row[i].pixel * job_.input_pitch) * kVectorBytes,
                              term.exists && !(row[i].missing & term.need));
      }
    }
    to += rows * kStepBytes;
#pragma unroll
    for (int i = 0; i < kColumnsOfThread; ++i) {
      const int offset = weight_offset_ + i * kRowsApart * job_.terms;
      copy_async_16_or_zero(to + i * kRowsApart * kStepBytes, weight + int64_t(offset) * kVectorBytes,
                            term.exists && i * kRowsApart < columns_left_);
    }
    k_ += kStepChunks;
  }

 private:
  static constexpr int kRowsApart = kThreads / kStepChunks;
  static constexpr int kRowsOfThread = rows / kRowsApart, kColumnsOfThread = columns / kRowsApart;
  static constexpr int kRowsTogether = kRowsOfThread < 4 ? kRowsOfThread : 4;

  const ConvForward& p_;
  const Job& job_;
  const Row* table_;  // from the thread's first row on
  int k_, to_, first_channel_, weight_offset_, columns_left_;
};

// The same element by element. A warp has a row at a time and a lane four bytes of it, so that neighbours in memory are
// read together.
template <class T, int rows, int columns>
class Elements {
 public:
  __device__ __forceinline__ Elements(const ConvForward& p, const Job& job, const Place& place, const Row* table,
                                      int step)
      : p_(p), job_(job), place_(place), table_(table), k_(step * kStep) {}

  __device__ __forceinline__ void load(unsigned char* stage) {
    const int lane = threadIdx.x % 32;
    const T* input[kTogether];
    unsigned need[kTogether];
    bool exists[kTogether];
#pragma unroll
    for (int e = 0; e < kTogether; ++e) {
      const Term term(job_, k_ + lane * kTogether + e);
      input[e] = static_cast<const T*>(p_.input) + int64_t(term.ahead) * job_.input_pitch +
                 place_.group * int(job_.run.by) + term.within;
      need[e] = term.need;
      exists[e] = term.exists;
    }
    bring<rows>(stage, [&](int r, T(&elements)[kTogether]) {
      const Row row = table_[r];
      const int64_t offset = int64_t(row.pixel) * job_.input_pitch;
#pragma unroll
      for (int e = 0; e < kTogether; ++e) {
        elements[e] = exists[e] && !(row.missing & need[e]) ? input[e][offset] : narrow<T>(0.0f);
      }
    });
    const T* weight = static_cast<const T*>(p_.weight) + int64_t(place_.filter) * job_.terms + k_ + lane * kTogether;
    bring<columns>(stage + rows * kStepBytes, [&](int c, T(&elements)[kTogether]) {
      const bool inside = place_.column + c < job_.group_filters;
      const T* from = weight + int64_t(c) * job_.terms;
#pragma unroll
      for (int e = 0; e < kTogether; ++e) elements[e] = inside && exists[e] ? from[e] : narrow<T>(0.0f);
    });
    k_ += kStep;
  }

 private:
  static constexpr int kStep = kStepBytes / sizeof(T), kTogether = 4 / sizeof(T);

  // The warp's rows of `count`, some of them under way together.
  template <int count, class F>
  __device__ __forceinline__ static void bring(unsigned char* stage, F&& load_row) {
    constexpr int kRowsTogether = 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int first = warp; first < count; first += kRowsTogether * kWarps) {
      T elements[kRowsTogether][kTogether];
#pragma unroll
      for (int i = 0; i < kRowsTogether; ++i) load_row(first + i * kWarps, elements[i]);
#pragma unroll
      for (int i = 0; i < kRowsTogether; ++i) {
        unsigned word;
        memcpy(&word, elements[i], sizeof(word));
        *reinterpret_cast<unsigned*>(stage + swizzled(first + i * kWarps, lane / 4) + lane % 4 * 4) = word;
      }
    }
  }

  const ConvForward& p_;
  const Job& job_;
  const Place& place_;
  const Row* table_;
  int k_;
};

// Until all but the newest `stages` - 2 groups of copies are there.
__device__ __forceinline__ void wait_for_stage(int stages) {
  if (stages == 3) {
    copy_async_wait<1>();
  } else if (stages == 4) {
    copy_async_wait<2>();
  } else {
    copy_async_wait<3>();
  }
}

// A tile's sums in shared memory, `columns` wide. Halves of some octets change places, so that threads that read an
// octet each meet no bank conflict.
template <int columns>
struct Sums {
  float* base;

  __device__ __forceinline__ float* at(int row, int column) const {
    return base + row * pitch_of_sums(columns) + (column ^ (column >> 3 & 4));
  }
  __device__ __forceinline__ float* behind(int rows) const { return base + rows * pitch_of_sums(columns); }
};

// From shared memory, the second half `apart` elements behind the first.
__device__ __forceinline__ void read_octet(const float* from, int apart, float (&values)[kOctet]) {
  const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + apart);
  memcpy(values, &low, sizeof(low));
  memcpy(values + 4, &high, sizeof(high));
}

// The means of `samples` whole maps from the tile's first row on, and in shifts[sample * result] what their pixels are
// shifted by; the result is how many rows of `shifts` a sample has.
template <int columns>
__device__ __forceinline__ int take_means(const ConvForward& p, const Sums<columns>& sums, float* shifts,
                                          int64_t first_sample, int samples, int pixels, int filter, int count) {
  constexpr int kTogether = summing_threads(columns);
  const int column = threadIdx.x % columns, worker = threadIdx.x / columns;
  const int parts = samples < kTogether ? kTogether / samples : 1;
  for (int unit = worker; unit < samples * parts; unit += kTogether) {
    const int sample = unit / parts, part = unit % parts;
    float sum = 0;
#pragma unroll 4
    for (int pixel = part; pixel < pixels; pixel += parts) sum += *sums.at(sample * pixels + pixel, column);
    shifts[unit * columns + column] = sum;
  }
  __syncthreads();
  const bool inside = column < count;
  const auto of_column = [&](const void* vector, float absent) {
    return vector && inside ? __ldg(static_cast<const float*>(vector) + filter + column) : absent;
  };
  const float gain = of_column(p.gain, 1), bias = of_column(p.bias, 0);
  const float mean_scale = of_column(p.mean_scale, static_cast<float>(p.constant));
  const float factor = gain / static_cast<float>(pixels);
  for (int sample = worker; sample < samples; sample += kTogether) {
    float sum = 0;
    for (int part = 0; part < parts; ++part) sum += shifts[(sample * parts + part) * columns + column];
    const float mean = factor * sum;
    if (inside && first_sample + sample < p.samples) {
      static_cast<float*>(p.map_mean)[(first_sample + sample) * p.filters + filter + column] = mean;
    }
    shifts[sample * parts * columns + column] = bias - mean_scale * mean;
  }
  __syncthreads();
  return parts;
}

// What the epilogue adds, as far as the second-level cache while products are made.
template <class T, int columns>
__device__ __forceinline__ void prefetch_residual(const ConvForward& p, const Job& job, const Place& place) {
  constexpr int kSector = 32 / sizeof(T), kSectors = columns / kSector;
  const int column = threadIdx.x % kSectors * kSector;
  if (!p.residual || place.column + column >= job.group_filters) return;
  const int end = min(job.rows - place.row, job.height);
  for (int r = threadIdx.x / kSectors; r < end; r += kThreads / kSectors) {
    prefetch_second_level(static_cast<const T*>(p.residual) + (place.row + r) * p.filters + place.filter + column);
  }
}

// The end of a layer for a tile whose sums are in shared memory: `height` rows from `first_row` on, `count` columns
// from `filter` on. `samples` is how many whole maps it has, if their means are to be taken.
template <class T, int columns>
__device__ __forceinline__ void finish(const ConvForward& p, const Job& job, const Sums<columns>& sums, float* shifts,
                                       int first_row, int height, int samples, int filter, int count) {
  int parts = 0;
  if (samples) {
    parts = take_means(p, sums, shifts, job.pixels(first_row), samples, job.pixels.by, filter, count);
  }
  constexpr int kOctets = columns / kOctet, kRowsApart = kThreads / kOctets;
  const int column = threadIdx.x % kOctets * kOctet;
  filter += column;
  count -= column;
  if (count <= 0) return;
  const Epilogue<T> epilogue(p);
  float gain[kOctet], shift[kOctet];
  load_octet(p.gain, filter, count, 1.0f, gain);
  load_octet(p.bias, filter, count, 0.0f, shift);
  const int end = min(job.rows - first_row, height);
  int shifted = -1;  // the sample that `shift` is of
#pragma unroll 1
  for (int r = threadIdx.x / kOctets; r < end; r += kRowsApart) {
    if (samples || p.beta) {
      const int sample = job.pixels(samples ? r : first_row + r);
      if (sample != shifted) {
        shifted = sample;
        if (samples) {
          read_octet(shifts + sample * parts * columns + column, 4, shift);
        } else {
          load_octet(p.beta, sample * p.filters + filter, count, 0.0f, shift);
        }
      }
    }
    float z[kOctet];
    const float* from = sums.at(r, column);
    read_octet(from, sums.at(r, column + 4) - from, z);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) z[j] = gain[j] * z[j] + shift[j];
    epilogue.store(first_row + r, filter, count, z);
  }
}

template <class T, int tile, bool vectors>
__global__ void __launch_bounds__(kThreads, resident_blocks(kConvTiles[tile], vectors))
    convolve(const __grid_constant__ ConvForward p, const __grid_constant__ Job job) {
  constexpr ConvTile kTile = kConvTiles[tile];
  constexpr int kRows = kTile.rows, kColumns = kTile.columns, kStageBytes = bytes_of_stage(kTile);
  using Warp = WarpTile<T, kTile.warp_rows, kTile.warp_columns>;
  using Loader = std::conditional_t<vectors, Vectors<T, kRows, kColumns>, Elements<T, kRows, kColumns>>;
  unsigned char* const shared = dynamic_shared();
  const int ring = job.stages * kStageBytes;
  const Place place(job, kRows, kColumns);
  const int first_step = place.split * job.steps_of_split;
  const int steps = min(job.steps - first_step, job.steps_of_split);
  constexpr int kWarpsAcross = kColumns / kTile.warp_columns;
  const int warp = threadIdx.x / 32;
  const int warp_row = warp / kWarpsAcross * kTile.warp_rows, warp_column = warp % kWarpsAcross * kTile.warp_columns;
  Warp product(warp_row, warp_column);

  {
    Row* const table = reinterpret_cast<Row*>(shared + ring);
    make_table(job, place, kRows, table);
    Loader loader(p, job, place, table, first_step);
    int loaded = 0, write = 0;
    const auto load = [&] {
      if (loaded < steps) loader.load(shared + write);
      copy_async_commit();
      ++loaded;
      write = write + kStageBytes == ring ? 0 : write + kStageBytes;
    };
    for (int stage = 0; stage < job.stages - 1; ++stage) load();
    if (!job.split_pitch) prefetch_residual<T, kColumns>(p, job, place);
    wait_for_stage(job.stages);
    __syncthreads();
    // One slice of the operands is multiplied while the next is read, also across steps.
    typename Warp::Operands operands[2];
    int read = 0;
    product.load(operands[0], shared, shared + kRows * kStepBytes, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
#pragma unroll
      for (int slice = 0; slice < Warp::kSlices; ++slice) {
        if (slice == Warp::kSlices - 1) {
          wait_for_stage(job.stages);
          __syncthreads();
          read = read + kStageBytes == ring ? 0 : read + kStageBytes;
        }
        product.load(operands[(slice + 1) % 2], shared + read, shared + read + kRows * kStepBytes,
                     (slice + 1) % Warp::kSlices);
        // Into the stage that was read before this one: the last barrier was behind that.
        if (slice == 0) load();
        product.multiply(operands[slice % 2]);
      }
    }
    copy_async_wait<0>();
  }

  if (job.split_pitch) {
    float* sums = static_cast<float*>(p.workspace) + int64_t(place.split) * job.rows * job.split_pitch +
                  place.group * int(job.column_tiles * kColumns) + place.column + warp_column;
    product.for_each_pair([&](int row, int column, float2 pair) {
      const int64_t m = place.row + warp_row + row;
      if (m < job.rows) *reinterpret_cast<float2*>(sums + m * job.split_pitch + column) = pair;
    });
    return;
  }
  __syncthreads();
  const Sums<kColumns> sums{reinterpret_cast<float*>(shared)};
  product.for_each_pair([&](int row, int column, float2 pair) {
    *reinterpret_cast<float2*>(sums.at(warp_row + row, warp_column + column)) = pair;
  });
  __syncthreads();
  finish<T>(p, job, sums, sums.behind(kRows), place.row, job.height, job.samples, place.filter,
            job.group_filters - place.column);
}

// Adds up the splits, always in the same order, and ends the layer.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    join(const __grid_constant__ ConvForward p, const __grid_constant__ Job job, const int splits,
         const int tile_columns) {
  const unsigned blocks_across = unsigned(job.split_pitch) / kJoinedColumns;
  const int first_row = static_cast<int>(blockIdx.x / blocks_across) * job.height;
  const int across = static_cast<int>(blockIdx.x % blocks_across) * kJoinedColumns;
  const int of_group = job.column_tiles * tile_columns, group = across / of_group, column = across % of_group;
  const Sums<kJoinedColumns> sums{reinterpret_cast<float*>(dynamic_shared())};
  constexpr int kQuads = kJoinedColumns / 4;
  const int64_t stride = int64_t(job.rows) * job.split_pitch;
  for (int r = threadIdx.x / kQuads; r < job.height && first_row + r < job.rows; r += kThreads / kQuads) {
    const int quad = threadIdx.x % kQuads * 4;
    const float* from =
        static_cast<const float*>(p.workspace) + int64_t(first_row + r) * job.split_pitch + across + quad;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float4 part = *reinterpret_cast<const float4*>(from + split * stride);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    *reinterpret_cast<float4*>(sums.at(r, quad)) = sum;
  }
  __syncthreads();
  finish<T>(p, job, sums, sums.behind(job.height), first_row, job.height, job.samples,
            group * job.group_filters + column, job.group_filters - column);
}

template <class T>
auto kernel_of(int tile, bool vectors) {
  if (tile == 0) return vectors ? convolve<T, 0, true> : convolve<T, 0, false>;
  if constexpr (sizeof(T) == 2) {
    if (tile == 2) return convolve<T, 2, true>;
    if (tile == 3) return convolve<T, 3, true>;
    if (tile == 4) return convolve<T, 4, true>;
  }
  return vectors ? convolve<T, 1, true> : convolve<T, 1, false>;
}

bool is_aligned_on_host(const void* address) { return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0; }

Job job_of(const ConvForward& p, const ConvPlan& plan, bool vectors, int size) {
  const Windows& w = p.windows;
  Job job{};
  job.pixels = Divisor(p.pixels());
  job.plane = Divisor(w.output[1] * w.output[2]);
  job.width = Divisor(w.output[2]);
  job.kernel_plane = Divisor(w.kernel[1] * w.kernel[2]);
  job.kernel_row = Divisor(w.kernel[2]);
  for (int d = 0, bit = 0; d < 3; ++d) {
    job.size[d] = static_cast<int>(w.size[d]);
    job.kernel[d] = static_cast<int>(w.kernel[d]);
    job.stride[d] = static_cast<int>(w.stride[d]);
    job.padding[d] = static_cast<int>(w.padding[d]);
    job.dilation[d] = static_cast<int>(w.dilation[d]);
    if (!w.padding[d]) continue;
    job.first_bit[d] = 1u << bit;
    bit += job.kernel[d];
  }
  job.rows = static_cast<int>(p.samples * p.pixels());
  job.group_filters = static_cast<int>(p.group_filters());
  job.groups = static_cast<unsigned>(p.groups);
  job.height = plan.used;
  job.samples = plan.held && p.map_mean ? plan.samples : 0;
  job.stages = plan.stages;
  const int64_t elements = vectors ? kVectorBytes / size : 1;  // of a term
  job.run = Divisor(p.group_channels() / elements);
  job.terms = static_cast<int>(w.taps() * p.group_channels() / elements);
  job.input_pitch = static_cast<int>(p.channels / elements);
  job.steps = static_cast<int>(ceil_divide(w.taps() * p.group_channels() * size, kStepBytes));
  job.steps_of_split = static_cast<int>(ceil_divide(job.steps, plan.splits));
  return job;
}

template <class T>
cudaError_t run(const ConvForward& p, const ConvPlan& plan, cudaStream_t stream) {
  int tile = 0;
  while (kConvTiles[tile].rows != plan.rows || kConvTiles[tile].columns != plan.columns) {
    if (++tile == kConvTileCount) return cudaErrorInvalidValue;
  }
  const bool vectors =
      p.group_channels() % kVector<T> == 0 && is_aligned_on_host(p.input) && is_aligned_on_host(p.weight);
  if (tile >= kConvTilesForAll && (sizeof(T) == 4 || !vectors)) return cudaErrorInvalidValue;
  Job job = job_of(p, plan, vectors, sizeof(T));
  const bool split = plan.splits > 1;
  if (split) job.height = plan.rows, job.samples = 0;
  job.row_tiles = static_cast<unsigned>(ceil_divide(job.rows, job.height));
  job.column_tiles = static_cast<unsigned>(ceil_divide(p.group_filters(), plan.columns));
  if (split) job.split_pitch = static_cast<int>(split_pitch(kConvTiles[tile], p.group_filters(), p.groups));
  const cudaError_t failed =
      launch(kernel_of<T>(tile, vectors), plan.blocks, kThreads, plan.shared, 1, stream, p, job);
  if (failed != cudaSuccess || !split) return failed;
  job.height = plan.used;
  job.samples = plan.held && p.map_mean ? plan.samples : 0;
  const int64_t blocks = ceil_divide(job.rows, job.height) * (job.split_pitch / kJoinedColumns);
  const int64_t shared = bytes_of_sums(job.height, kJoinedColumns) + bytes_of_means(job.samples, kJoinedColumns);
  return launch(join<T>, blocks, kThreads, shared, 1, stream, p, job, plan.splits, plan.columns);
}

}  // namespace

cudaError_t launch_conv_sm80(const ConvForward& p, const ConvPlan& plan, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::bf16: return run<__nv_bfloat16>(p, plan, stream);
    case Dtype::f16: return run<__half>(p, plan, stream);
    case Dtype::f32: return run<float>(p, plan, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace deepcontrol::cuda
