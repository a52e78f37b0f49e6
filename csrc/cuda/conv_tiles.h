// Tiles of the convolution on mma.sync: what the planner counts with is what the kernel does.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_plan.h"

namespace deepcontrol::cuda {

// Eight warps share a tile, and one has warp_rows x warp_columns of it.
struct ConvTile {
  int rows, columns;
  int warp_rows, warp_columns;
  int resident;  // blocks a multiprocessor that registers leave room for
};
constexpr ConvTile kConvTiles[] = {
    {64, 64, 32, 16, 3}, {128, 64, 32, 32, 2}, {256, 64, 64, 32, 1}, {128, 128, 64, 32, 1}, {256, 128, 64, 64, 1}};
constexpr int kConvTileCount = sizeof(kConvTiles) / sizeof(ConvTile);
// f32, and channels or tensors that 16-byte vectors do not fit, have the first ones alone.
constexpr int kConvTilesForAll = 2;
constexpr int resident_blocks(const ConvTile& tile, bool vectors) {
  return vectors ? tile.resident : std::min(tile.resident, 2);
}
constexpr int kFewestStages = 3, kMostStages = 5;

// A stage of the pipeline has so much of every row.
constexpr int kConvStepBytes = 128;
constexpr int64_t bytes_of_stage(const ConvTile& tile) { return int64_t(tile.rows + tile.columns) * kConvStepBytes; }
// What a block knows of a row.
constexpr int kConvRowBytes = 8;

// Sums wait for the epilogue as rows of floats, 8 more than there are columns: so neither writing pairs nor reading
// octets meets a bank conflict.
constexpr int pitch_of_sums(int columns) { return columns + 8; }
constexpr int64_t bytes_of_sums(int rows, int columns) { return int64_t(rows) * pitch_of_sums(columns) * 4; }
// Threads beside each other have a column each; this many have the same one.
constexpr int summing_threads(int columns) { return kThreads / columns; }
constexpr int64_t bytes_of_means(int samples, int columns) {
  return int64_t(std::max(samples, summing_threads(columns))) * columns * 4;
}
// With `samples` whole maps in a tile, or none.
constexpr int64_t shared_memory_of(const ConvTile& tile, int stages, int samples) {
  const int64_t pipeline = stages * bytes_of_stage(tile) + tile.rows * kConvRowBytes;
  const int64_t sums = bytes_of_sums(tile.rows, tile.columns);
  return std::max(pipeline, sums + (samples ? bytes_of_means(samples, tile.columns) : 0));
}

// Where splits of the sum are added up in a launch of their own, a block has so many filters, and whole maps up to so
// many pixels or, where no means are taken, that many rows.
constexpr int kJoinedColumns = 32, kJoinedMap = 256, kJoinedRows = 64;
constexpr int64_t split_pitch(const ConvTile& tile, int64_t group_filters, int64_t groups) {
  return groups * ceil_divide(group_filters, tile.columns) * tile.columns;
}

constexpr int64_t kMostConvRows = (int64_t(1) << 31) - (1 << 16);

// Which taps of a padded kernel see a row's input is a word of bits, a run for each padded dimension.
constexpr int kMostTapBits = 31;
constexpr int64_t tap_bits(const Windows& windows) {
  int64_t bits = 0;
  for (int d = 0; d < 3; ++d) bits += windows.padding[d] ? windows.kernel[d] : 0;
  return bits;
}

}  // namespace deepcontrol::cuda
