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

// The tile of the convolution and its input gradient, by the elements of a sample's input or output, whichever are fewer. In
// float32 a tile of 4 x 2 rounds as much as the library does in channels_last, where it sums all taps and channels in one chain;
// one of 4 x 4 three times as much. In contiguous layout and of a single small sample the library rounds less, and a tile of
// 2 x 2 as little. A bfloat16 rounds a thousand times as much as the largest tile.
inline WinogradTile winograd_tile(Dtype dtype, int64_t elements, bool channels_last) {
  constexpr int64_t kSmall = 20480;
  if (dtype == Dtype::bf16) return {4, 4};
  return {elements > kSmall && channels_last ? 4 : 2, 2};
}

// Of the weight gradient, whose sums over all pixels are the library's most exact ones.
inline WinogradTile winograd_weight_grad_tile(Dtype dtype) {
  if (dtype == Dtype::bf16) return {4, 4};
  return {2, 2};
}

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

// (points, panels, rows, row) elements of a transformed operand. Points and panels are an odd number of cache lines apart, so
// that those of one tile do not fall into few sets of the cache.
struct WinogradRows {
  int64_t row, rows, panels;

  int64_t panel() const { return (rows * row / 16 | 1) * 16; }
  int64_t point() const { return (panels * panel() / 16 | 1) * 16; }
  int64_t offset(int64_t i) const { return i / row * panel() + i % row; }

  // One panel, rows of whole cache lines and one more, so that neighbours fall into different sets.
  static WinogradRows in_rows(int64_t length, int64_t rows) { return {(length + 15) / 16 * 16 + 16, rows, 1}; }
  // Read panel by panel as one stream.
  static WinogradRows in_panels(int64_t length, int64_t rows) { return {kPanel, rows, (length + kPanel - 1) / kPanel}; }

  static constexpr int64_t kPanel = 64;
};

// The weights transformed: panels of filters, inside a panel point by point, channel by channel, the filters innermost and
// zeros behind the last. Tasks are (panel, block of kChannels channels).
struct WinogradWeights {
  Dtype dtype;
  WinogradTile tile;
  int64_t channels, filters;
  // Of the memory: elements between filters, channels and taps.
  int64_t filter_stride, channel_stride, tap_stride;
  bool flipped;  // the last tap first
  const void* weight;
  float* transformed;

  static constexpr int64_t kPanel = WinogradRows::kPanel;
  static constexpr int64_t kChannels = 16;
  int64_t panels() const { return (filters + kPanel - 1) / kPanel; }
  int64_t channel_blocks() const { return (channels + kChannels - 1) / kChannels; }
  int64_t tasks() const { return panels() * channel_blocks(); }
  int64_t elements() const { return panels() * kPanel * channels * tile.points(); }
};

// The convolution. A task is a slot with scratch memory of its own. Where the tiles are many it is a share of them, worked off
// in blocks, and the weights are transformed before. Where the weights are many it is a share of the panels of filters: the
// inputs are transformed before, and the weights as they are needed.
struct WinogradForward : WinogradMaps {
  bool by_panels;
  int64_t slots;
  int64_t block;  // tiles; by panels all of them
  const void* input;
  WinogradWeights weight;
  void* output;
  float* inputs;   // by panels those transformed
  float* scratch;  // slots * scratch_elements()

  // Channels that are summed at a time: rounding errors grow with them plus the number of such sums.
  static constexpr int64_t kChannels = 128;
  // The block's inputs transformed, and its products with one panel of filters.
  WinogradRows input_rows() const { return WinogradRows::in_rows(channels, block); }
  WinogradRows product_rows() const { return {WinogradRows::kPanel, block, 1}; }
  int64_t input_elements() const { return tile.points() * input_rows().point(); }
  int64_t scratch_elements() const {
    const int64_t products = tile.points() * product_rows().point();
    return products + (by_panels ? tile.points() * kChannels * WinogradRows::kPanel : input_elements());
  }
};

// The gradient of the weight. A task is a slot: one of `groups` of the filters over one of `parts` of the tiles, worked off
// in blocks. Parts have sums of their own, which are added in their order.
struct WinogradWeightGrad : WinogradMaps {
  Dtype weight_dtype;
  int64_t parts, groups;
  int64_t block;  // tiles
  // Of the gradient: elements between filters, channels and taps.
  int64_t filter_stride, channel_stride, tap_stride;
  const void* input;
  const void* error;  // gradient of the output
  void* grad;
  float* scratch;  // slots() * scratch_elements()
  float* sums;     // (parts, points, filters, sums_row()); null where one part is one block, whose sums need no memory

  int64_t slots() const { return parts * groups; }
  // Whole cache lines.
  int64_t group() const { return ((filters + groups - 1) / groups + 15) / 16 * 16; }
  WinogradRows input_rows() const { return WinogradRows::in_panels(channels, block); }
  WinogradRows error_rows() const { return WinogradRows::in_panels(group(), block); }
  int64_t scratch_elements() const { return tile.points() * (input_rows().point() + error_rows().point()); }
  int64_t sums_row() const { return (channels + 15) / 16 * 16; }
  int64_t sums_point() const { return filters * sums_row(); }
  int64_t sums_elements() const { return tile.points() * sums_point(); }
};

// (samples, rows, columns) to (samples, columns, rows). Tasks are (sample, block of kRows rows).
struct Transposition {
  Dtype dtype;
  int64_t samples, rows, columns;
  const void* from;
  void* to;

  static constexpr int64_t kRows = 16;
  int64_t row_blocks() const { return (rows + kRows - 1) / kRows; }
  int64_t tasks() const { return samples * row_blocks(); }
};

struct WinogradKernels {
  void (*transpose)(const Transposition&, int64_t begin, int64_t end);
  void (*weights)(const WinogradWeights&, int64_t begin, int64_t end);
  void (*inputs)(const WinogradForward&, int64_t begin, int64_t end);   // by panels; tasks are tiles
  void (*forward)(const WinogradForward&, int64_t begin, int64_t end);  // tasks are slots
  void (*weight_grad)(const WinogradWeightGrad&, int64_t begin, int64_t end);         // tasks are parts
  void (*weight_grad_finish)(const WinogradWeightGrad&, int64_t begin, int64_t end);  // tasks are filters
};

// Those for the instruction set that `kernels` chose; null where it has no fast matrix product.
const WinogradKernels* winograd_kernels();

// Whether the library multiplies bfloat16 by a matrix unit, which no float32 arithmetic keeps up with.
bool has_matrix_unit();

}  // namespace deepcontrol::cpu
