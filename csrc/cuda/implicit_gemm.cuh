// What a warp does in a matrix product whose operands lie in shared memory as rows of 128 bytes along the sum.
#pragma once

#include "ptx.cuh"

namespace deepcontrol::cuda {

constexpr int kStepBytes = 128;  // of a row, in one stage of a pipeline
constexpr int kStepChunks = kStepBytes / 16;

// Where a 16-byte chunk of a row lies. Eight rows have the same chunk in different banks, as have eight chunks of a
// row: so neither ldmatrix nor cp.async meets a conflict.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kStepBytes + ((chunk ^ row % 8) << 4); }

// The sums of a warp, `rows` by `columns`, of products of T. Both operands are [row or column][k].
template <class T, int rows, int columns>
class WarpTile {
 public:
  static constexpr int kTall = rows / 16, kWide = columns / 8;
  // What one instruction takes along the sum: 16 elements of 16 bits or 8 TF32 numbers.
  static constexpr int kSlices = kStepBytes / 32;

  struct Operands {
    unsigned a[kTall][4], b[kWide / 2][4];
  };

  float sums[kTall][kWide][4] = {};

  // From the warp's first row and column, multiples of eight.
  __device__ __forceinline__ WarpTile(int row, int column) {
    const int lane = threadIdx.x % 32;
    a_ = swizzled(row + lane % 16, lane / 16);
    b_ = swizzled(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // A slice of both operands. Rows 16 apart are swizzled alike.
  __device__ __forceinline__ void load(Operands& to, const unsigned char* a, const unsigned char* b, int slice) const {
    const unsigned char* from = a + (a_ ^ slice * 32);
#pragma unroll
    for (int i = 0; i < kTall; ++i) load_matrices(to.a[i], from + i * 16 * kStepBytes);
    from = b + (b_ ^ slice * 32);
#pragma unroll
    for (int j = 0; j < kWide / 2; ++j) load_matrices(to.b[j], from + j * 16 * kStepBytes);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int i = 0; i < kTall; ++i) to.a[i][w] = round_to_tf32(to.a[i][w]);
#pragma unroll
        for (int j = 0; j < kWide / 2; ++j) to.b[j][w] = round_to_tf32(to.b[j][w]);
      }
    }
  }

  __device__ __forceinline__ void multiply(const Operands& x) {
#pragma unroll
    for (int i = 0; i < kTall; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        multiply_add<T>(sums[i][j], x.a[i], x.b[j / 2][j % 2 * 2], x.b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // f(row, column, two neighbours of a row) for all sums, counted from the warp's first.
  template <class F>
  __device__ __forceinline__ void for_each_pair(F&& f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kTall; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        f(i * 16 + lane / 4, j * 8 + lane % 4 * 2, make_float2(sums[i][j][0], sums[i][j][1]));
        f(i * 16 + lane / 4 + 8, j * 8 + lane % 4 * 2, make_float2(sums[i][j][2], sums[i][j][3]));
      }
    }
  }

 private:
  int a_, b_;  // of the lane's row in its first matrix
};

}  // namespace deepcontrol::cuda
