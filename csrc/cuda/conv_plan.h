// Which kernel runs a convolution, how it is cut into tiles and what that should take. Plain C++: all of it can be looked
// at without a GPU.
//
// Each kernel has one function that says why it does not take a layer, or nothing, behind what is common to all and stands
// in why_not; and one that plans a layer which it takes.
#pragma once

#include <array>
#include <optional>
#include <string>

#include "../types.h"
#include "plan.h"

namespace deepcontrol::cuda {

// What plans of a convolution depend on.
struct ConvCase {
  Dtype dtype;
  int64_t samples, channels, filters, groups;
  Windows windows;
  bool channels_innermost;  // of the output, and so of everything
  bool aligned;             // the operands start at multiples of 16 bytes
  bool centred;
  bool tf32;  // f32 may be rounded to it

  constexpr int64_t group_channels() const { return channels / groups; }
  constexpr int64_t group_filters() const { return filters / groups; }
  constexpr int64_t pixels() const { return windows.output[0] * windows.output[1] * windows.output[2]; }
  constexpr int64_t input_pixels() const { return windows.size[0] * windows.size[1] * windows.size[2]; }
  constexpr int64_t rows() const { return samples * pixels(); }
  constexpr bool is_pointwise() const {
    return windows.taps() == 1 && windows.stride[0] * windows.stride[1] * windows.stride[2] == 1 &&
           windows.padding[0] + windows.padding[1] + windows.padding[2] == 0;
  }
};

enum class Way { two_passes, direct, sm80, sm90 };

// How a convolution runs. Tiles have `rows` pixels of the output and `columns` filters of one group.
struct ConvPlan {
  Way way;
  bool held;    // a block or cluster has whole maps and takes the means of those; else the means are known before
  int rows;
  int columns;
  int stages;   // of the pipeline that brings operands on chip
  int cluster;  // blocks of a thread block cluster, one above the other
  int samples;  // whole maps of a block or cluster if they are held
  int used;     // rows of a block's tile that maps have
  int splits;   // of the sum over taps and channels
  bool shared_tile;  // sm90: both groups of consumers have a half of one tile, else each has tiles of its own
  int log_lanes;     // direct: threads along a row of channels
  int64_t blocks;
  int64_t shared;     // bytes a block
  int64_t workspace;  // bytes
  double seconds;     // predicted, from bytes and operations
};

struct WeightGradPlan {
  int rows;     // of a tile: filters of one group
  int columns;  // of a tile: (tap, channel)
  int stages;
  int splits;         // of the pixels
  int64_t of_split;   // pixels of a split, a multiple of the pipeline's step
  int64_t blocks;
  int64_t shared;
  int64_t workspace;  // bytes
  double seconds;
};

// Ceilings of a GPU from NVIDIA's data sheets, without sparsity; what predictions are made of.
struct Ceilings {
  double bytes;       // a second, memory
  double cached;      // a second, first-level caches or shared memory
  double operations;  // a second, dense 16-bit, two for a multiply-add
  double mma_sync;    // the share of them that mma.sync can reach
};
Ceilings ceilings_of(const Device& device);

std::optional<std::string> why_not_direct(const ConvCase& c, const Device& device);
std::optional<std::string> why_not_sm80(const ConvCase& c, const Device& device, bool held);
std::optional<std::string> why_not_sm90(const ConvCase& c, const Device& device, bool held);
std::optional<std::string> why_no_weight_grad(const ConvCase& c, const Device& device);
ConvPlan plan_direct(const ConvCase& c, const Device& device);
ConvPlan plan_sm80(const ConvCase& c, const Device& device, bool held);
ConvPlan plan_sm90(const ConvCase& c, const Device& device, bool held);
WeightGradPlan plan_weight_grad(const ConvCase& c, const Device& device);

// The ways there are, in the order of preference where two should take equally long.
struct Algorithm {
  const char* name;
  Way way;
  bool held;
};
const std::array<Algorithm, 6>& algorithms();
// Why an algorithm does not take a layer, or nothing.
std::optional<std::string> why_not(const Algorithm& algorithm, const ConvCase& c, const Device& device);
ConvPlan plan_conv(const Algorithm& algorithm, const ConvCase& c, const Device& device);

struct Chosen {
  const Algorithm* algorithm;
  ConvPlan plan;
};
// The one that is predicted to be fastest.
Chosen choose_conv(const ConvCase& c, const Device& device);

// The least that the library's convolution takes, bytes or operations; and what its weight gradient and the pass behind it
// are taken to take.
double library_seconds(const ConvCase& c, const Device& device);
double library_weight_grad_seconds(const ConvCase& c, const Device& device);

}  // namespace deepcontrol::cuda
