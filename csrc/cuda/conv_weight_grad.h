// What the kernel of the weight gradient and its plan agree on. Plain C++.
#pragma once

#include <cstdint>

namespace deepcontrol::cuda::weight_grad {

// A tile's pipeline brings so many bytes of each filter and each column on chip at a time, and has so many stages.
constexpr int kStepBytes = 64;
constexpr int kStages = 3;

// What a warp has of a tile: 64 sums a thread, of large tiles 128, where it reads less from shared memory for each
// product.
constexpr int kWarpRows = 64;
constexpr int warp_columns_of(int rows, int columns) { return rows * columns > 128 * 128 ? 64 : 32; }
constexpr int threads_of(int rows, int columns) {
  return rows * columns / (kWarpRows * warp_columns_of(rows, columns)) * 32;
}

// Blocks of a multiprocessor that registers leave room for.
constexpr int resident_of(int rows, int columns) {
  return (warp_columns_of(rows, columns) == 64 ? 256 : 512) / threads_of(rows, columns);
}

constexpr int64_t shared_of(int rows, int columns) { return int64_t(kStages) * kStepBytes * (rows + columns); }

struct Tile {
  int rows, columns;
};
// The smallest is also for tensors whose vectors do not fit.
constexpr Tile kSmallest = {64, 64};
constexpr Tile kTiles[] = {{256, 128}, {128, 256}, {128, 128}, {128, 64}, {64, 128}, kSmallest};

// What the partial sums of one filter may take on chip when they are finished, some channels at a time.
constexpr int64_t kFinishedBytes = 40 * 1024;

}  // namespace deepcontrol::cuda::weight_grad
