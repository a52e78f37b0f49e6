// The weight gradient of a convolution on tensor cores, with gain, dgain and projection:
//
//   dw'[o, tap, c] = sum over the pixels m of the output of grad_output[m, o] * input[row(m, tap), c]
//
// It is a product of matrices: its rows are the filters of a group, its columns the (tap, channel) side by side, and
// the sum runs over the pixels. Both operands lie in memory as pixels of neighbouring elements, and so they are
// brought on chip, sixteen bytes at a time; ldmatrix turns them round, TF32 is read as the tensor cores want it. No
// two accesses of a warp meet in a bank. A thread's sixteen bytes of a tile's columns have one tap and one channel;
// the pixels that this tap sees are walked without a division.
//
// The pixels are split among blocks until the GPU is full. Each block writes its sums as floats, and a second kernel
// adds them in one order, so that nothing depends on which block comes first. Moved: gradient and input once from
// memory (the tiles of one split run together and share them in the second-level cache, from which each row of tiles
// reads the input and each column of tiles the gradient), the sums out and in, the result out, the weight in where
// dgain is wanted.

#include <algorithm>

#include "conv_weight_grad.h"
#include "launch.cuh"
#include "params.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace deepcontrol::cuda {
namespace {

using namespace weight_grad;

// How the pixels of the input that one tap sees follow each other, where a thread takes every n-th pixel of the output.
struct Path {
  int size[3], kernel[3], stride[3], padding[3], dilation[3], output[3];
  int advance[3];         // by n pixels of the output, in pixels of the input
  unsigned advance_rows;  // the same in rows of channels
  int span[3];            // what an axis goes back when it starts again,
  unsigned carry[3];      // and the rows by which the next one goes on

  Path(const Windows& windows, int n) {
    int64_t left = n, rows[4];
    rows[3] = 1;
    for (int d = 2; d >= 0; --d) {
      size[d] = static_cast<int>(windows.size[d]);
      kernel[d] = static_cast<int>(windows.kernel[d]);
      stride[d] = static_cast<int>(windows.stride[d]);
      padding[d] = static_cast<int>(windows.padding[d]);
      dilation[d] = static_cast<int>(windows.dilation[d]);
      output[d] = static_cast<int>(windows.output[d]);
      advance[d] = static_cast<int>(left % windows.output[d] * windows.stride[d]);
      span[d] = static_cast<int>(windows.output[d] * windows.stride[d]);
      rows[d] = rows[d + 1] * windows.size[d];
      left /= windows.output[d];
    }
    advance_rows = static_cast<unsigned>(left * rows[0]);
    for (int d = 0; d < 3; ++d) {
      advance_rows += static_cast<unsigned>(advance[d] * rows[d + 1]);
      const int64_t next = d > 0 ? windows.stride[d - 1] : 1;
      carry[d] = static_cast<unsigned>(next * rows[d] - span[d] * rows[d + 1]);
    }
  }
};

struct Job {
  int filters, group_filters, group_channels;
  int gradient_pitch, input_pitch;  // bytes from one pixel to the next
  int length;  // of a filter: taps times channels of a group
  int groups;
  int pixels;  // of the output, in all samples
  int of_split;
  int row_tiles, column_tiles;
  bool vector_rows, vector_columns;  // whole vectors, aligned
  Path path;                         // of the columns
};

// The pixel of the input that a tap sees. Where that is none, its row is that of another, or before or behind all.
struct Position {
  int at[3];
  int end[3];  // where an axis starts again
  unsigned row;

  __device__ __forceinline__ Position(const Path& path, unsigned pixel, unsigned tap) {
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      const int offset = static_cast<int>(tap % path.kernel[d]) * path.dilation[d] - path.padding[d];
      at[d] = static_cast<int>(pixel % path.output[d]) * path.stride[d] + offset;
      end[d] = path.span[d] + offset;
      pixel /= path.output[d];
      tap /= path.kernel[d];
    }
    row = pixel;
#pragma unroll
    for (int d = 0; d < 3; ++d) row = row * path.size[d] + at[d];
  }

  // By as many pixels of the output as the path was made for.
  __device__ __forceinline__ void advance(const Path& path) {
    row += path.advance_rows;
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      at[d] += path.advance[d];
      if (at[d] >= end[d]) carry(path, d);
    }
  }

  // By `n` pixels, within one row of the output or to the beginning of the next.
  __device__ __forceinline__ void advance_in_row(const Path& path, int n) {
    row += n * path.stride[2];
    at[2] += n * path.stride[2];
    if (at[2] < end[2]) return;
    carry(path, 2);
    if (at[1] < end[1]) return;
    carry(path, 1);
    if (at[0] >= end[0]) carry(path, 0);
  }

  __device__ __forceinline__ bool inside(const Path& path, int d) const {
    return unsigned(at[d]) < unsigned(path.size[d]);
  }
  __device__ __forceinline__ bool inside(const Path& path) const {
    // No jumps.
    return int(inside(path, 0)) & int(inside(path, 1)) & int(inside(path, 2));
  }

 private:
  __device__ __forceinline__ void carry(const Path& path, int d) {
    at[d] -= path.span[d];
    if (d > 0) at[d - 1] += path.stride[d - 1];
    row += path.carry[d];
  }
};

// Where a thread's elements of an operand come from. Rows of the product: the gradient's pixels, one after another.
template <class T>
struct Gradient {
  const unsigned char* from;
  int pitch;
  int64_t step;  // from one vector to the next, in bytes too

  __device__ __forceinline__ Gradient(const ConvWeightGrad& p, const Job& job, int filter, int pixel, int apart)
      : from(static_cast<const unsigned char*>(p.grad_output) + int64_t(pixel) * job.gradient_pitch +
             int64_t(filter) * int64_t(sizeof(T))),
        pitch(job.gradient_pitch),
        step(int64_t(apart) * job.gradient_pitch) {}

  // A vector: where it is, and whether it is at all.
  __device__ __forceinline__ const void* address() const { return from; }
  __device__ __forceinline__ bool there() const { return true; }
  __device__ __forceinline__ void next() { from += step; }

  // An element each of n pixels, of which `left` remain.
  template <int n>
  __device__ __forceinline__ void read(T (&elements)[n], int left) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      elements[i] = i < left ? __ldg(reinterpret_cast<const T*>(from + int64_t(i) * pitch)) : narrow<T>(0);
    }
    from += int64_t(n) * pitch;
  }
};

// Columns of the product: what one tap sees of the input.
template <class T>
struct Input {
  const Path& path;
  const unsigned char* base;
  int pitch;
  Position position;

  __device__ __forceinline__ Input(const ConvWeightGrad& p, const Job& job, int group, int column, int pixel)
      : path(job.path),
        base(static_cast<const unsigned char*>(p.input) +
             int64_t(group * job.group_channels + column % job.group_channels) * int64_t(sizeof(T))),
        pitch(job.input_pitch),
        position(job.path, pixel, column / job.group_channels) {}

  __device__ __forceinline__ const void* address() const {
    return base + int64_t(static_cast<int>(position.row)) * pitch;
  }
  __device__ __forceinline__ bool there() const { return position.inside(path); }
  __device__ __forceinline__ void next() { position.advance(path); }

  template <int n>
  __device__ __forceinline__ void read(T (&elements)[n], int left) {
    const auto load = [&](const void* from, bool there) {
      return there ? __ldg(static_cast<const T*>(from)) : narrow<T>(0);
    };
    const int stride = path.stride[2];
    if (position.at[2] + (n - 1) * stride < position.end[2]) {
      // All in one row, which is most of the time.
      const auto* from = static_cast<const unsigned char*>(address());
      const bool row_there = position.inside(path, 0) && position.inside(path, 1);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const bool there = unsigned(position.at[2] + i * stride) < unsigned(path.size[2]);
        elements[i] = load(from + int64_t(i) * stride * pitch, row_there && there && i < left);
      }
      position.advance_in_row(path, n);
    } else {
#pragma unroll 1
      for (int i = 0; i < n; ++i) {
        const T element = load(address(), there() && i < left);
#pragma unroll
        for (int k = 0; k < n; ++k) elements[k] = k == i ? element : elements[k];
        position.advance_in_row(path, 1);
      }
    }
  }
};

// An operand's part of a stage: kStepBytes of each of `width` elements, pixel by pixel. Vectors lie so that neither
// those of one pixel nor those of neighbouring pixels that are read together meet in a bank.
template <class T, int width>
struct Operand {
  static constexpr int kPixels = kStepBytes / sizeof(T);
  static constexpr int kRowBytes = width * sizeof(T);
  static constexpr int kBytes = kPixels * kRowBytes;
  static constexpr int kVectors = width / kVector<T>;

  static constexpr int swizzle(int pixel) { return sizeof(T) == 2 ? pixel & 7 : (pixel & 3) << 1; }
  static constexpr int byte_of(int pixel, int vector) {
    return pixel * kRowBytes + (vector ^ swizzle(pixel)) * kVectorBytes;
  }
};

// A thread's share of an operand: one vector of every n-th pixel, where the block takes n at a time; or else one
// element of all pixels.
template <class T, int width, int threads>
struct Share {
  using Of = Operand<T, width>;
  static constexpr int kPixelsApart = threads / Of::kVectors;
  static constexpr int kLoads = Of::kPixels / kPixelsApart;
  static constexpr int kElements = kVector<T>;  // under way together
  static_assert(threads % Of::kVectors == 0 && Of::kPixels % kPixelsApart == 0 && Of::kPixels % kElements == 0);
  static_assert(Of::swizzle(kPixelsApart) == 0 && Of::swizzle(kElements) == 0);

  int element;  // of the tile
  int pixel;    // of a step
  int left;  // pixels of the split from that one on, none where there is no such element

  __device__ __forceinline__ Share(bool vectors, int elements, int pixels)
      : element(vectors ? threadIdx.x % Of::kVectors * kVector<T> : threadIdx.x),
        pixel(vectors ? threadIdx.x / Of::kVectors : 0),
        left(element < elements ? pixels - pixel : 0) {}

  // Brings the next step's pixels on chip; visible after a wait and a barrier.
  template <class Source>
  __device__ __forceinline__ void load(Source& source, unsigned char* stage) {
    stage += Of::byte_of(pixel, element / kVector<T>);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      copy_async_16_or_zero(stage + i * kPixelsApart * Of::kRowBytes, source.address(),
                            int(source.there()) & int(i * kPixelsApart < left));
      source.next();
    }
    left -= Of::kPixels;
  }
  template <class Source>
  __device__ __forceinline__ void load_elements(Source& source, unsigned char* stage) {
    static_assert(threads == width);
    stage += element % kVector<T> * sizeof(T);
#pragma unroll 1
    for (int start = 0; start < Of::kPixels; start += kElements, stage += kElements * Of::kRowBytes) {
      T elements[kElements];
      source.read(elements, left);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        *reinterpret_cast<T*>(stage + Of::byte_of(i, element / kVector<T>)) = elements[i];
      }
      left -= kElements;
    }
  }
};

// The tile of one warp, in products of 16 rows and 8 columns. Of TF32, which ldmatrix does not turn round, a thread
// reads two neighbouring filters at once, and so those are rows g and g + 8 of a product.
template <class T, int rows, int columns>
class WarpTile {
  using A = Operand<T, rows>;
  using B = Operand<T, columns>;
  static constexpr bool kWords = sizeof(T) == 4;
  static constexpr int kColumns = warp_columns_of(rows, columns);
  static constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kColumns / 8;
  static constexpr int kPixels = 32 / sizeof(T);  // of one product

 public:
  __device__ __forceinline__ WarpTile() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, thread = lane % 4;
    row_ = warp % (rows / kWarpRows) * kWarpRows;
    column_ = warp / (rows / kWarpRows) * kColumns;
    const int row_vector = row_ / kVector<T>, column_vector = column_ / kVector<T>;
    if constexpr (kWords) {
#pragma unroll
      for (int i = 0; i < 2; ++i) a_[i] = A::byte_of(thread, row_vector + 4 * i + group / 2) + group % 2 * 8;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        b_[j] = A::kBytes + B::byte_of(thread, column_vector + 2 * j + group / 4) + group % 4 * 4;
      }
    } else {
      // Matrices of eight pixels and eight elements: of rows the elements first, of columns the pixels first.
      const int matrix = lane / 8, pixel = lane % 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) a_[i] = A::byte_of(matrix / 2 * 8 + pixel, row_vector + 2 * i + matrix % 2);
#pragma unroll
      for (int j = 0; j < kColumnTiles / 2; ++j) {
        b_[j] = A::kBytes + B::byte_of(matrix % 2 * 8 + pixel, column_vector + 2 * j + matrix / 2);
      }
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* stage) {
#pragma unroll
    for (int first = 0; first < A::kPixels; first += kPixels) {
      unsigned a[kRowTiles][4], b[kColumnTiles][2];
      const unsigned char *of_rows = stage + first * A::kRowBytes, *of_columns = stage + first * B::kRowBytes;
      if constexpr (kWords) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            const unsigned char* words = of_rows + a_[i % 2] + i / 2 * 128 + half * 4 * A::kRowBytes;
            const uint2 pair = *reinterpret_cast<const uint2*>(words);
            a[i][2 * half] = round_to_tf32(pair.x), a[i][2 * half + 1] = round_to_tf32(pair.y);
          }
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j) {
            const unsigned char* word = of_columns + b_[j % 4] + j / 4 * 128 + half * 4 * B::kRowBytes;
            b[j][half] = round_to_tf32(*reinterpret_cast<const unsigned*>(word));
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) load_matrices_transposed(a[i], of_rows + a_[i]);
#pragma unroll
        for (int j = 0; j < kColumnTiles; j += 2) {
          unsigned words[4];
          load_matrices_transposed(words, of_columns + b_[j / 2]);
          b[j][0] = words[0], b[j][1] = words[1], b[j + 1][0] = words[2], b[j + 1][1] = words[3];
        }
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) multiply_add<T>(sums_[i][j], a[i], b[j][0], b[j][1]);
      }
    }
  }

  // Of the tile: where the thread's sums begin. Those of product i, half and the first or second of a pair are further.
  __device__ __forceinline__ int first_row() const { return row_ + threadIdx.x % 32 / 4 * (kWords ? 2 : 1); }
  __device__ __forceinline__ int first_column() const { return column_ + threadIdx.x % 4 * 2; }

  // Writes them to rows that are `pitch` apart, as many as there are.
  __device__ __forceinline__ void store(float* to, int pitch, int rows_left, int columns_left) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * i + half * (kWords ? 1 : 8);
        if (row >= rows_left) continue;
        float* of_row = to + int64_t(row) * pitch;
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const float first = sums_[i][j][2 * half], second = sums_[i][j][2 * half + 1];
          if (pitch % 2 == 0) {
            if (8 * j < columns_left) *reinterpret_cast<float2*>(of_row + 8 * j) = make_float2(first, second);
          } else {
            if (8 * j < columns_left) of_row[8 * j] = first;
            if (8 * j + 1 < columns_left) of_row[8 * j + 1] = second;
          }
        }
      }
    }
  }

 private:
  int row_, column_;  // of the tile
  int a_[4], b_[4];   // bytes of a stage
  float sums_[kRowTiles][kColumnTiles][4] = {};
};

// The sums of one tile over one split, to workspace[split][filter][tap][channel].
template <class T, int rows, int columns, bool vectors>
__global__ void __launch_bounds__(threads_of(rows, columns), resident_of(rows, columns))
    partial_sums(const __grid_constant__ ConvWeightGrad p, const __grid_constant__ Job job) {
  constexpr int kThreadsHere = threads_of(rows, columns);
  using A = Operand<T, rows>;
  using B = Operand<T, columns>;
  constexpr int kStageBytes = A::kBytes + B::kBytes;
  static_assert(kStages * kStageBytes == shared_of(rows, columns));
  unsigned block = blockIdx.x;
  const int first_row = block % job.row_tiles * rows;
  block /= job.row_tiles;
  const int first_column = block % job.column_tiles * columns;
  block /= job.column_tiles;
  const int group = block % job.groups, split = block / job.groups;
  const int begin = split * job.of_split, length = min(job.of_split, job.pixels - begin);

  Share<T, rows, kThreadsHere> row_share(vectors || job.vector_rows, job.group_filters - first_row, length);
  Share<T, columns, kThreadsHere> column_share(vectors || job.vector_columns, job.length - first_column, length);
  Gradient<T> gradient(p, job, group * job.group_filters + first_row + row_share.element, begin + row_share.pixel,
                       row_share.kPixelsApart);
  Input<T> input(p, job, group, first_column + column_share.element, begin + column_share.pixel);
  unsigned char* const stages = dynamic_shared();
  const auto load = [&](int stage) {
    unsigned char *to_rows = stages + stage, *to_columns = to_rows + A::kBytes;
    if constexpr (vectors) {
      row_share.load(gradient, to_rows);
      column_share.load(input, to_columns);
    } else {
      job.vector_rows ? row_share.load(gradient, to_rows) : row_share.load_elements(gradient, to_rows);
      job.vector_columns ? column_share.load(input, to_columns) : column_share.load_elements(input, to_columns);
    }
  };

  WarpTile<T, rows, columns> tile;
  // Known here, so that what it is made of takes no registers in the loop.
  const int first_filter = group * job.group_filters + first_row + tile.first_row();
  float* const to = static_cast<float*>(p.workspace) + (int64_t(split) * job.filters + first_filter) * job.length +
                    first_column + tile.first_column();
  const int rows_left = job.group_filters - first_row - tile.first_row();
  const int columns_left = job.length - first_column - tile.first_column();
  const int steps = (length + A::kPixels - 1) / A::kPixels;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step * kStageBytes);
    copy_async_commit();
  }
  // The stage to fill is the one that was read before.
  int stage = 0, free = (kStages - 1) * kStageBytes;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) load(free);
    copy_async_commit();
    tile.multiply(stages + stage);
    free = stage;
    stage = stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
  }
  tile.store(to, job.length, rows_left, columns_left);
}

// How one filter's sums are finished, by one block.
struct Finish {
  int splits, filters, channels, taps;
  bool vectors;  // of sums, aligned
  int chunk;     // channels on chip at a time
  int teams;     // of threads, each of which adds some of the splits
  int members;   // threads of a team
  int width;     // threads side by side along the channels
};

// Filters are few, so each block must have much under way.
constexpr int kFinishThreads = 512;

// totals[i] = the sum of n neighbours each of `splits` arrays that lie `pitch` apart.
template <int n>
__device__ __forceinline__ void add_splits(const float* from, int64_t pitch, int splits, float* totals) {
  float total[n] = {};
  for (int split = 0; split < splits; split += kBatch) {
    float parts[kBatch][n];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
#pragma unroll
      for (int i = 0; i < n; ++i) parts[k][i] = 0;
      if (split + k < splits) load_constant<n>(from + (split + k) * pitch, parts[k]);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      total[i] += ((parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i])) +
                  ((parts[4][i] + parts[5][i]) + (parts[6][i] + parts[7][i]));
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) totals[i] = total[i];
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 2)
    finish(const __grid_constant__ ConvWeightGrad p, const __grid_constant__ Finish job) {
  const int64_t length = int64_t(job.taps) * job.channels, of_filter = blockIdx.x * length;
  const int64_t of_split = job.filters * length;
  const int team = threadIdx.x / job.members, member = threadIdx.x % job.members;
  const int of_team = (job.splits - team + job.teams - 1) / job.teams;
  const int column = threadIdx.x % job.width;
  const int first_tap = threadIdx.x / job.width, taps_apart = kFinishThreads / job.width;
  const float factor = p.factor ? static_cast<const float*>(p.factor)[blockIdx.x] : 1.0f;
  const float projection = job.taps > 1 ? static_cast<float>(p.projection) / static_cast<float>(job.taps) : 0.0f;
  const T* weight = static_cast<const T*>(p.weight) + of_filter;
  T* grad = static_cast<T*>(p.grad) + of_filter;
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  float dot = 0;
  for (int begin = 0; begin < job.channels; begin += job.chunk) {
    // As rows that are adjacent in memory: all of it, or of each tap the channels of this round.
    const int channels = min(job.chunk, job.channels - begin), elements = job.taps * channels;
    const int rows = channels == job.channels ? 1 : job.taps, run = elements / rows;
    for (int row = 0; team < job.teams && row < rows; ++row) {
      const float* from = static_cast<const float*>(p.workspace) + team * of_split + of_filter +
                          int64_t(row) * job.channels + begin;
      float* to = sums + team * elements + row * run;
      if (job.vectors) {
        for (int e = 4 * member; e < run; e += 4 * job.members) {
          add_splits<4>(from + e, job.teams * of_split, of_team, to + e);
        }
      } else {
        for (int e = member; e < run; e += job.members) add_splits<1>(from + e, job.teams * of_split, of_team, to + e);
      }
    }
    __syncthreads();
    if (job.teams > 1) {
      for (int e = threadIdx.x; e < elements; e += kFinishThreads) {
        float total = sums[e];
        for (int t = 1; t < job.teams; ++t) total += sums[t * elements + e];
        sums[e] = total;
      }
      __syncthreads();
    }

    for (int c = column; c < channels; c += job.width) {
      float shift = 0;
      if (projection != 0) {
        for (int tap = 0; tap < job.taps; ++tap) shift += sums[tap * channels + c];
        shift *= factor * projection;
      }
#pragma unroll 4
      for (int tap = first_tap; tap < job.taps; tap += taps_apart) {
        const float sum = sums[tap * channels + c];
        const int64_t at = int64_t(tap) * job.channels + begin + c;
        if (p.dots) dot += sum * widen(__ldg(weight + at));
        grad[at] = narrow<T>(sum * factor - shift);
      }
    }
    __syncthreads();
  }
  if (!p.dots) return;
  dot = sum_lanes(dot, 1, 32);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = dot;
  __syncthreads();
  if (threadIdx.x) return;
  float total = 0;
  for (int warp = 0; warp < kFinishThreads / 32; ++warp) total += sums[warp];
  static_cast<float*>(p.dots)[blockIdx.x] = total;
}

template <class T>
cudaError_t launch_finish(const ConvWeightGrad& p, const WeightGradPlan& plan, cudaStream_t stream) {
  Finish job{};
  job.splits = plan.splits;
  job.filters = static_cast<int>(p.filters);
  job.channels = static_cast<int>(p.group_channels());
  job.taps = static_cast<int>(p.windows.taps());
  constexpr int kMost = kFinishedBytes / sizeof(float);
  job.chunk = std::min(job.channels, kMost / job.taps);
  // Whole lines, or at least vectors, where there are several rounds.
  const int unit = job.chunk >= 32 ? 32 : job.chunk >= 4 ? 4 : 1;
  const bool whole = job.chunk == job.channels;
  if (!whole) job.chunk -= job.chunk % unit;
  const int elements = job.chunk * job.taps;
  job.vectors = whole ? elements % 4 == 0 : job.channels % 4 == 0 && job.chunk % 4 == 0;
  const int accesses = static_cast<int>(ceil_divide(elements, job.vectors ? 4 : 1));
  job.members = static_cast<int>(std::min<int64_t>(ceil_divide(accesses, 32) * 32, kFinishThreads));
  job.teams = std::min(kFinishThreads / job.members, job.splits);
  job.width = 1;
  while (job.width < kFinishThreads && job.width < job.chunk) job.width *= 2;
  const int64_t shared = std::max<int64_t>(job.teams * elements, kFinishThreads / 32) * int64_t(sizeof(float));
  return launch(finish<T>, p.filters, kFinishThreads, shared, 1, stream, p, job);
}

template <class T>
cudaError_t run(const ConvWeightGrad& p, const WeightGradPlan& plan, cudaStream_t stream) {
  const auto whole_vectors = [](const void* tensor, int64_t row, int64_t of_group) {
    const bool aligned = reinterpret_cast<uintptr_t>(tensor) % kVectorBytes == 0;
    return aligned && row % kVector<T> == 0 && of_group % kVector<T> == 0;
  };
  const bool vector_rows = whole_vectors(p.grad_output, p.filters, p.group_filters());
  const bool vector_columns = whole_vectors(p.input, p.channels, p.group_channels());
  const auto run_tile = [&](auto kernel, int rows, int columns) {
    const int threads = threads_of(rows, columns);
    const int64_t length = p.windows.taps() * p.group_channels();
    const Job job{static_cast<int>(p.filters),
                  static_cast<int>(p.group_filters()),
                  static_cast<int>(p.group_channels()),
                  static_cast<int>(p.filters * sizeof(T)),
                  static_cast<int>(p.channels * sizeof(T)),
                  static_cast<int>(length),
                  static_cast<int>(p.groups),
                  static_cast<int>(p.samples * p.windows.output[0] * p.windows.output[1] * p.windows.output[2]),
                  static_cast<int>(plan.of_split),
                  static_cast<int>(ceil_divide(p.group_filters(), rows)),
                  static_cast<int>(ceil_divide(length, columns)),
                  vector_rows,
                  vector_columns,
                  Path(p.windows, threads * kVector<T> / columns)};
    return launch(kernel, plan.blocks, threads, shared_of(rows, columns), 1, stream, p, job);
  };
  const auto run_vectors = [&] {
    if (plan.rows == 256) return run_tile(partial_sums<T, 256, 128, true>, 256, 128);
    if (plan.columns == 256) return run_tile(partial_sums<T, 128, 256, true>, 128, 256);
    if (plan.rows == 128 && plan.columns == 128) return run_tile(partial_sums<T, 128, 128, true>, 128, 128);
    if (plan.rows == 128) return run_tile(partial_sums<T, 128, 64, true>, 128, 64);
    if (plan.columns == 128) return run_tile(partial_sums<T, 64, 128, true>, 64, 128);
    return run_tile(partial_sums<T, 64, 64, true>, 64, 64);
  };
  const bool vectors = vector_rows && vector_columns;
  if (!vectors && (plan.rows != 64 || plan.columns != 64)) return cudaErrorInvalidConfiguration;
  const cudaError_t failed = vectors ? run_vectors() : run_tile(partial_sums<T, 64, 64, false>, 64, 64);
  return failed != cudaSuccess ? failed : launch_finish<T>(p, plan, stream);
}

}  // namespace

cudaError_t launch_conv_weight_grad(const ConvWeightGrad& p, const WeightGradPlan& plan, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p, plan, stream);
    case Dtype::bf16: return run<__nv_bfloat16>(p, plan, stream);
    case Dtype::f16: return run<__half>(p, plan, stream);
    default: return cudaErrorInvalidConfiguration;
  }
}

}  // namespace deepcontrol::cuda
