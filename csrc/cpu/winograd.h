// Winograd's convolution (Lavin & Gray, arXiv 1509.09308) by 3 x 3 taps at stride one, as the ATen side (winograd.cpp)
// hands it to the kernels (winograd_impl.h). Plain pointers and sizes only.
#pragma once

#include <cstdint>

#include "../types.h"

namespace deepcontrol::cpu {

// Outputs of a tile, down and across. A tile of 4 x 2 takes 24 products where the taps would take 72.
struct WinogradTile {
  int64_t down, across;

  int64_t points() const { return (down + 2) * (across + 2); }
};

// Maps in channels_last and the tiles that their outputs are cut into; the last of a row or column may reach over the edge.
struct WinogradMaps {
  Dtype dtype;
  WinogradTile tile;
  int64_t samples, channels, filters;
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  int64_t padding[2];

  int64_t tiles_down() const { return (out_height + tile.down - 1) / tile.down; }
  int64_t tiles_across() const { return (out_width + tile.across - 1) / tile.across; }
  int64_t tiles() const { return samples * tiles_down() * tiles_across(); }
};

// (points, rows, row) elements of a transformed operand. The points are an odd number of cache lines apart, so that those of
// one tile do not fall into few sets of the cache.
struct WinogradRows {
  int64_t row, rows;

  int64_t point() const { return (rows * row / 16 | 1) * 16; }
};

// Elements of a row of `length`: whole cache lines and one more, so that neighbouring rows fall into different sets.
inline int64_t winograd_row(int64_t length) { return (length + 15) / 16 * 16 + 16; }

// The weights transformed: panels of kPanel filters, inside a panel point by point, channel by channel, the filters
// innermost and zeros behind the last. Tasks are (panel, block of kChannels channels).
struct WinogradWeights {
  WinogradTile tile;
  int64_t channels, filters;
  // Of the memory: elements between filters, channels and taps.
  int64_t filter_stride, channel_stride, tap_stride;
  bool flipped;  // the last tap first
  const float* weight;
  float* transformed;

  static constexpr int64_t kPanel = 64;
  static constexpr int64_t kChannels = 16;
  int64_t panels() const { return (filters + kPanel - 1) / kPanel; }
  int64_t channel_blocks() const { return (channels + kChannels - 1) / kChannels; }
  int64_t tasks() const { return panels() * channel_blocks(); }
  int64_t elements() const { return panels() * kPanel * channels * tile.points(); }
};

// The convolution. A task is a slot: a share of all tiles, worked off in blocks, with scratch memory of its own.
struct WinogradForward : WinogradMaps {
  int64_t slots;
  int64_t block;  // tiles
  const void* input;
  const float* weight;  // of WinogradWeights
  void* output;
  float* scratch;  // slots * scratch_elements()

  // The block's inputs transformed, and its products with one panel of filters.
  WinogradRows inputs() const { return {winograd_row(channels), block}; }
  WinogradRows products() const { return {WinogradWeights::kPanel, block}; }
  int64_t scratch_elements() const { return tile.points() * (inputs().point() + products().point()); }
};

// The gradient of the weight. A task is a slot: one of `groups` of the filters over one of `parts` of the tiles, worked off
// in blocks. Parts have sums of their own, which are added in their order.
struct WinogradWeightGrad : WinogradMaps {
  int64_t parts, groups;
  int64_t block;  // tiles
  // Of the gradient: elements between filters, channels and taps.
  int64_t filter_stride, channel_stride, tap_stride;
  const void* input;
  const void* error;  // gradient of the output
  float* grad;
  float* scratch;  // slots() * scratch_elements()
  float* sums;     // (parts, points, filters, sums_row()); null where one part is one block, whose sums need no memory

  int64_t slots() const { return parts * groups; }
  // Whole cache lines.
  int64_t group() const { return ((filters + groups - 1) / groups + 15) / 16 * 16; }
  WinogradRows inputs() const { return {winograd_row(channels), block}; }
  WinogradRows errors() const { return {winograd_row(group()), block}; }
  int64_t scratch_elements() const { return tile.points() * (inputs().point() + errors().point()); }
  int64_t sums_row() const { return (channels + 15) / 16 * 16; }
  int64_t sums_point() const { return filters * sums_row(); }
  int64_t sums_elements() const { return tile.points() * sums_point(); }
};

struct WinogradKernels {
  void (*weights)(const WinogradWeights&, int64_t begin, int64_t end);
  void (*forward)(const WinogradForward&, int64_t begin, int64_t end);
  void (*weight_grad)(const WinogradWeightGrad&, int64_t begin, int64_t end);         // tasks are parts
  void (*weight_grad_finish)(const WinogradWeightGrad&, int64_t begin, int64_t end);  // tasks are filters
};

}  // namespace deepcontrol::cpu
