// What passes between the ATen side (center.cpp, conv_center.cpp, ...) and the kernels, which are compiled once for each
// instruction set. Plain pointers and sizes only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../types.h"

namespace deepcontrol::cpu {

// Rows summed before their sum is added to the total: the rounding error then grows with this plus the number of
// groups, not with the number of rows.
constexpr int64_t kGroup = 128;

struct Layout : Maps {
  int64_t block;  // channels of one task; 1 for rows of pixels
  int64_t rows;   // pixels of one task: all, or with channels innermost kGroup

  int64_t blocks() const { return (channels + block - 1) / block; }
  int64_t row_blocks() const { return rows < pixels ? (pixels + rows - 1) / rows : 1; }
  int64_t tasks() const { return samples * row_blocks() * blocks(); }
  int64_t elements_of_task() const { return block * rows; }
};

// Where the pixels of a map are split, its mean is known only when all of them are summed, so the two halves are calls of
// their own. `sum` writes one task's sums, which nobody else adds to; with as many pixels as a group has their order and
// so their bits are those of `whole`.
enum class Step : int8_t { whole, sum, apply };

// Vectors, means and sums are in the accumulation type: double for f64, else float. Null means absent.
struct CenterForward {
  Layout layout;
  Step step;
  Dtype dtype;
  Activation activation;
  double slope;
  double constant;  // mean_scale where the vector is null
  const void* input;
  const void* residual;
  const void* gain;
  const void* mean_scale;
  const void* bias;
  void* output;          // may be `input`
  void* map_mean;        // (N, C), null: leave the mean in; read by `apply`, else written
  void* partials;        // (N, row blocks, C), written by `sum`: the sums of their rows
  void* pre_activation;  // like output, for smooth activations
  uint8_t* bits;         // rows of bits, for piecewise linear activations
};

struct CenterBackward {
  Layout layout;
  Step step;
  Dtype dtype;
  Activation activation;
  double slope;
  double constant;
  bool centred;
  const void* grad_output;
  const void* input;  // for `dots`
  const void* pre_activation;
  const uint8_t* bits;
  const void* scale;  // (C): grad_input = scale * (e - mean_scale * mean(e))
  const void* mean_scale;
  void* grad_input;
  void* grad_residual;  // e
  void* sums;           // (N, C): sum of e; read by `apply`, written by `whole`
  void* dots;           // (N, C): sum of e * input; written by `whole`
  void* partial_sums;   // (N, row blocks, C), written by `sum`
  void* partial_dots;   // likewise
};

// How many tiles, `least` to `most`, each of `samples` had better be cut into, so that no thread has much more to do than
// another.
inline int64_t even_tiles(int64_t samples, int64_t least, int64_t most, int64_t threads) {
  const auto rounds = [&](int64_t tiles) { return (samples * tiles + threads - 1) / threads; };
  int64_t best = least;
  for (int64_t tiles = least + 1; tiles <= most && rounds(least) <= 8; ++tiles) {
    // More tiles cost a little themselves: less than a twentieth is not worth it.
    if (rounds(tiles) * best * 20 < rounds(best) * tiles * 19) best = tiles;
  }
  return best;
}

struct WindowMean : Windows {
  Layout layout;
  Dtype dtype;
  const void* input;
  void* means;  // (N, C, *kernel), contiguous
};

// The gradient of one weight, (filters, channels, taps).
struct WeightGrad {
  Dtype dtype;
  int64_t filters, channels, taps;
  bool channels_innermost;
  double projection;
  void* grad;
  const void* weight;  // for `dots`
  const void* factor;  // (filters): the gradient is multiplied by it
  const void* divisor; // (filters): what `dots` are divided by
  void* dots;          // (filters): sum of weight * grad / divisor
};

// A convolution by one tap at stride one, which is a matrix product, in channels_last: with the map means known before
// (from the means of the input, by linearity), one pass computes, centres, activates and writes.
struct PointwiseForward {
  Dtype dtype;
  Activation activation;
  double slope;
  int64_t samples, pixels, channels, filters;
  int64_t row_tiles;  // that the pixels of a sample are cut into
  int64_t panels;     // panels of filters of one task
  const void* input;
  const void* weight;  // packed by pack_weight
  const void* gain;    // (filters), null for 1
  const void* shift;   // (samples, filters), null for 0: bias - mean_scale * map_mean
  const void* residual;
  void* output;
  void* pre_activation;
  uint8_t* bits;

  // Tiles are alike but for the rows that are computed at once.
  int64_t first_row(int64_t tile) const {
    const int64_t all = (pixels + kRowsAtOnce - 1) / kRowsAtOnce;
    return std::min(all * tile / row_tiles * kRowsAtOnce, pixels);
  }
  int64_t panel_tiles() const { return (all_panels() + panels - 1) / panels; }
  int64_t all_panels() const { return (filters + kPanel - 1) / kPanel; }
  int64_t tasks() const { return samples * row_tiles * panel_tiles(); }

  // Filters of one panel of packed weights.
  static constexpr int64_t kPanel = 64;
  static constexpr int64_t kRowsAtOnce = 6;
};

// The backward pass of the same layer: dz' is computed tile by tile in `scratch` and meets both matrix products there.
// A task is a slot: a share of all rows (pixels of all samples), with its own part of `scratch` and of `partials`.
struct PointwiseBackward {
  Dtype dtype;
  Activation activation;
  double slope;
  int64_t samples, pixels, channels, filters;
  int64_t slots;
  const void* grad_output;
  const void* pre_activation;
  const uint8_t* bits;
  const void* input;
  const void* weight;   // packed by pack_weight with `transposed`, null: no grad_input
  const void* scale;    // (filters), null for 1
  const void* removed;  // (samples, filters), null for 0: mean_scale * mean(e)
  void* grad_input;
  void* grad_residual;
  void* scratch;   // slots * scratch_bytes()
  float* partials;  // (slots, filters, channels), null: no weight gradient

  // Most rows of a tile: four rows of 56 pixels, or one map of 14 x 14, and an even number.
  static constexpr int64_t kRows = 224;
  // Filters of one panel of the weight gradient's left operand; a multiple of the rows multiplied at once.
  static constexpr int64_t kLeftPanel = 48;
  static constexpr int64_t kMostBytes = 4;  // of an element
  int64_t rows() const { return samples * pixels; }
  int64_t padded_filters() const { return (filters + kLeftPanel - 1) / kLeftPanel * kLeftPanel; }
  int64_t padded_channels() const {
    return (channels + PointwiseForward::kPanel - 1) / PointwiseForward::kPanel * PointwiseForward::kPanel;
  }
  // dz' as rows of filters, and both operands of the weight gradient in panels.
  int64_t scratch_bytes() const {
    return (kRows * (filters + padded_filters() + padded_channels()) * kMostBytes + 63) / 64 * 64;
  }
};

// grad[i] = sum of the slots' partials, i over filters * channels. Tasks are filters.
struct AddPartials {
  Dtype dtype;  // of grad
  int64_t slots, filters, channels;
  const float* partials;
  void* grad;
};

// (filters, channels) weights to panels: of kPanel filters, all channels, the filters innermost (for bfloat16 in pairs
// of channels), zeros behind the last filter. Transposed: the same with the parts of filters and channels exchanged.
// Tasks are panels.
struct PackWeight {
  Dtype dtype;         // of the panels
  Dtype weight_dtype;  // the same, or f32, which is rounded
  bool transposed;
  int64_t filters, channels;
  const void* weight;
  void* packed;
};

// map_mean[n, o] = gain[o] / pixels * sum_c weight[o, c] * sums[n, c]. Tasks are filters.
struct PointwiseMean {
  Dtype dtype;         // of the product
  Dtype weight_dtype;  // the same, or f32, which is rounded
  int64_t samples, pixels, channels, filters;
  const void* weight;
  const void* sums;
  const void* gain;
  void* map_mean;
};

// The pixels of all samples cut for a product in contiguous layout: whole maps of neighbouring samples where maps are
// small, else parts of one map.
struct PlanarTile {
  int64_t sample, samples;
  int64_t pixel, pixels;  // of each map

  int64_t columns() const { return samples * pixels; }
};
struct PlanarTiles {
  int64_t samples, pixels;
  int64_t parts;  // of a map
  int64_t count;

  PlanarTiles(int64_t samples, int64_t pixels, int64_t slots)
      : samples(samples), pixels(pixels), parts((pixels + kMost - 1) / kMost) {
    if (!has_whole_maps()) {
      parts = even_tiles(samples, parts, panels(), slots);
      count = samples * parts;
      return;
    }
    const int64_t least = (samples + kMost / pixels - 1) / (kMost / pixels);
    count = std::min(samples, (least + slots - 1) / slots * slots);
  }
  static bool has_whole_maps(int64_t pixels) { return pixels <= kMost; }
  bool has_whole_maps() const { return has_whole_maps(pixels); }
  PlanarTile at(int64_t tile) const {
    if (has_whole_maps()) {
      const int64_t first = samples * tile / count;
      return {first, samples * (tile + 1) / count - first, 0, pixels};
    }
    // Parts begin at whole panels, and so at whole bytes of bits.
    const int64_t part = tile % parts, first = panels() * part / parts * kPanel;
    const int64_t last = std::min(pixels, panels() * (part + 1) / parts * kPanel);
    return {tile / parts, 1, first, last - first};
  }

  // Most columns of a tile: one map of 14 x 14, five of 7 x 7.
  static constexpr int64_t kMost = 256;
  static constexpr int64_t kPanel = PointwiseForward::kPanel;

 private:
  int64_t panels() const { return (pixels + kPanel - 1) / kPanel; }
};

// A convolution by one tap at stride one in contiguous layout: (filters x channels) by (channels x pixels), and everything
// behind it in the same pass. A task is one block of filters of one tile.
struct PlanarForward {
  Dtype dtype;
  Activation activation;
  double slope;
  double constant;  // mean_scale where the vector is null
  PlanarTiles tiles;
  int64_t channels, filters;
  int64_t blocks;  // of filters
  const void* input;
  const void* weight;  // (filters, channels), of the dtype
  const void* gain;
  const void* mean_scale;
  const void* bias;
  const void* residual;
  void* output;
  void* pre_activation;
  uint8_t* bits;
  float* map_mean;  // (samples, filters) of gain * z, null: leave the mean in
  bool knows_means;  // else they are computed here, for which tiles must have whole maps
  void* scratch;     // of one thread, scratch_bytes()

  int64_t tasks() const { return tiles.count * blocks; }
  int64_t scratch_bytes() const { return PlanarTiles::kMost * (channels + kRows + 2) * 4; }

  static constexpr int64_t kRows = 6;  // filters multiplied at once
};

// The backward pass of the same layer. A task is a slot: a share of the tiles.
struct PlanarBackward {
  Dtype dtype;
  Activation activation;
  double slope;
  double constant;
  bool centred;
  PlanarTiles tiles;
  int64_t channels, filters;
  int64_t slots;
  const void* grad_output;
  const void* pre_activation;
  const uint8_t* bits;
  const void* input;
  const void* weight;  // (channels, filters), of the dtype; null: no grad_input
  const void* scale;   // (filters), null for 1
  const void* mean_scale;
  float* sums;      // (samples, filters): sum of e
  bool knows_sums;  // else they are computed here, for which tiles must have whole maps
  void* grad_input;
  void* grad_residual;
  void* scratch;    // slots * scratch_bytes()
  float* partials;  // (slots, filters, channels), null: no weight gradient

  int64_t padded_channels() const { return (channels + PlanarTiles::kPanel - 1) / PlanarTiles::kPanel * PlanarTiles::kPanel; }
  int64_t scratch_bytes() const {
    return (kRow * (filters + kTransposed) + PlanarTiles::kMost * (filters + padded_channels() + PlanarForward::kRows)) * 4;
  }

  // Elements of a row of dz' in `scratch`: rows side by side fall into different sets of the caches.
  static constexpr int64_t kRow = PlanarTiles::kMost + 16;
  static constexpr int64_t kTransposed = 16;  // rows of the input transposed at once
};

// A depthwise convolution in two dimensions: one filter a channel, dilation one. The arithmetic is float32, so f64 has no
// kernel. A task is a slot: a share of all vectors of channels of all samples, with its own part of `scratch`.
struct Depthwise {
  Dtype dtype;
  Activation activation;
  double slope;
  double constant;  // mean_scale where the vector is null
  bool centred;
  // As Maps has it; they differ where the output has one pixel.
  bool input_innermost, output_innermost;
  int64_t samples, channels, slots;
  int64_t size[2], output[2], kernel[2], stride[2], padding[2];
  const float* weight;  // by pack_depthwise
  const void* mean_scale;
  float* scratch;

  // Along a dimension of the kernel, and lanes of a vector.
  static constexpr int64_t kMostTaps = 7, kMostLanes = 16;
  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t pixels() const { return size[0] * size[1]; }
  int64_t output_pixels() const { return output[0] * output[1]; }
  int64_t padded_channels() const { return (channels + kMostLanes - 1) / kMostLanes * kMostLanes; }
  // Columns of the padded row of the input that a row of outputs sees.
  int64_t seen_columns() const { return (output[1] - 1) * stride[1] + kernel[1]; }
  // Vectors of maps that are kept whole. Maps in rows of pixels are transposed in squares, which reach beyond the end.
  int64_t flat_input() const { return input_innermost ? 0 : pixels() + kMostLanes; }
  int64_t flat_output() const { return output_pixels() + kMostLanes; }
};

struct DepthwiseForward : Depthwise {
  const void* input;
  const void* residual;
  const void* gain;
  const void* bias;
  void* output_memory;
  void* map_mean;  // (N, C), of conv(input, gain * weight); null: not centred
  void* pre_activation;
  uint8_t* bits;

  int64_t scratch_floats() const { return (kernel[0] * seen_columns() + flat_output() + flat_input()) * kMostLanes; }
};

struct DepthwiseBackward : Depthwise {
  const void* grad_output;
  const void* pre_activation;
  const uint8_t* bits;
  const void* input;  // null: no weight gradient
  void* grad_input;
  void* grad_residual;
  void* sums;       // (N, C): sum of e
  float* partials;  // (N, taps * padded channels): dw' of each sample

  // Columns of the padded row of dz', and of them before the map's first.
  int64_t left_columns() const {
    const int64_t reach = kernel[1] - 1 - padding[1];
    return reach > 0 ? (reach + stride[1] - 1) / stride[1] : 0;
  }
  int64_t error_columns() const {
    const int64_t met = (size[1] - 1 + padding[1]) / stride[1] + 1;
    return left_columns() + (met > output[1] ? met : output[1]);
  }
  int64_t scratch_floats() const {
    return (kernel[0] * error_columns() + seen_columns() + size[1] + flat_output() + flat_input()) * kMostLanes;
  }
};

// (channels, taps) weights to the order of kernels: vectors of channels, of each all taps, padded with zeros.
struct PackDepthwise {
  Dtype dtype;         // that the weights are rounded to
  Dtype weight_dtype;  // the same, or f32
  int64_t channels, taps;
  const void* weight;
  const void* gain;  // (channels), null for 1
  float* packed;
};

// The samples' partials added up, projected and multiplied by the gain. Tasks are Depthwise::kMostLanes channels each.
struct DepthwiseWeightGrad {
  Dtype dtype;  // of weight and gradient
  int64_t samples, channels, taps;
  double projection;
  const float* partials;
  const void* weight;  // for `dots`
  const void* gain;
  void* grad;  // (channels, taps)
  void* dots;  // (channels): sum of weight * dw', the gradient of gain; null: not wanted

  int64_t tasks() const { return (channels + Depthwise::kMostLanes - 1) / Depthwise::kMostLanes; }
  int64_t padded() const { return tasks() * Depthwise::kMostLanes * taps; }
};

// Each works on the tasks begin..end: (sample, block of pixels, block of channels), or filters for the weight gradient.
struct Kernels {
  const char* isa;
  void (*center_forward)(const CenterForward&, int64_t begin, int64_t end);
  void (*center_backward)(const CenterBackward&, int64_t begin, int64_t end);
  void (*window_mean)(const WindowMean&, int64_t begin, int64_t end);
  void (*finish_weight_grad)(const WeightGrad&, int64_t begin, int64_t end);
  // Null where the instruction set has no fast matrix product.
  void (*pointwise_forward)(const PointwiseForward&, int64_t begin, int64_t end);
  void (*pack_weight)(const PackWeight&, int64_t begin, int64_t end);
  void (*pointwise_mean)(const PointwiseMean&, int64_t begin, int64_t end);
  void (*pointwise_backward)(const PointwiseBackward&, int64_t begin, int64_t end);
  void (*add_partials)(const AddPartials&, int64_t begin, int64_t end);
  bool pointwise_bf16;
  void (*planar_forward)(const PlanarForward&, int64_t begin, int64_t end);
  void (*planar_backward)(const PlanarBackward&, int64_t begin, int64_t end);
  // Null where vectors are no faster than the library.
  void (*depthwise_forward)(const DepthwiseForward&, int64_t begin, int64_t end);
  void (*depthwise_backward)(const DepthwiseBackward&, int64_t begin, int64_t end);
  void (*pack_depthwise)(const PackDepthwise&);
  void (*depthwise_weight_grad)(const DepthwiseWeightGrad&, int64_t begin, int64_t end);
};

// Channels of a task never exceed this, so that the vectors of one task lie on the stack.
constexpr int64_t kMostChannels = 512;

// The kernels for this machine: the widest instruction set it has, or the one DEEPCONTROL_ISA names.
const Kernels& kernels();
const char* isa_name();

}  // namespace deepcontrol::cpu
