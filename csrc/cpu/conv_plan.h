// Which algorithm runs each pass of a convolution on a CPU. Plain C++: all of it can be looked at without tensors.
//
// An algorithm is known here by its name, by why it does not take a layer and by the rule that says where it is faster than
// two passes. conv_center.cpp runs it: one case of a switch forward, one backward.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

#include "../types.h"

namespace deepcontrol::cpu {

// What the choice depends on.
struct ConvCase {
  Dtype dtype;
  int64_t rank;  // spatial dimensions
  int64_t samples, channels, filters, groups;
  Windows windows;
  bool channels_last;  // the output's format, and so that of everything
  bool centred;
  int64_t threads;

  constexpr int64_t pixels() const { return windows.output[0] * windows.output[1] * windows.output[2]; }
  constexpr int64_t input_pixels() const { return windows.size[0] * windows.size[1] * windows.size[2]; }
  constexpr int64_t rows() const { return samples * pixels(); }
  constexpr int64_t columns() const { return channels / groups * windows.taps(); }
  constexpr int64_t weights() const { return filters * columns(); }
  constexpr bool is_padded() const { return windows.padding[0] + windows.padding[1] + windows.padding[2] > 0; }
  constexpr bool is_empty() const {
    return samples * input_pixels() * weights() == 0 ||
           std::min({windows.output[0], windows.output[1], windows.output[2]}) < 1;
  }
};

enum class Pass { forward, backward };

enum class Algorithm {
  product,     // own matrix product over channels, the centring on its way (pointwise.cpp)
  direct,      // depthwise convolutions, each map centred while it is in the cache (depthwise.cpp)
  two_passes,  // the library's convolution, then center; takes every layer
};
// In the order in which they are asked whether they take a layer.
inline constexpr std::array kAlgorithms{Algorithm::product, Algorithm::direct, Algorithm::two_passes};

const char* name_of(Algorithm algorithm);
// Throws std::invalid_argument for an unknown name.
Algorithm parse_algorithm(std::string_view name);

// Why an algorithm does not take a pass of a layer, in words, or null.
const char* why_not(Algorithm algorithm, Pass pass, const ConvCase& c);
// Whether an algorithm that takes a pass of a layer is faster there than two passes.
bool is_faster(Algorithm algorithm, Pass pass, const ConvCase& c);

// The algorithm that a pass takes: the one that is preferred, else the first that takes the layer and is faster. Throws
// std::runtime_error where the preferred one does not take the forward pass; a backward pass that it does not take is that
// of two passes. Costs some nanoseconds.
Algorithm choose(Pass pass, const ConvCase& c);

// One algorithm for every convolution of the process, by name; "" for automatic choice.
void prefer_algorithm(std::string_view name);

// Product: whether the means of the input's maps, from which those of the output follow, are fewer; one pass then does the
// layer.
constexpr bool is_mean_of_input_cheaper(const ConvCase& c) { return c.channels <= c.filters; }

// Two passes: whether the weight gradient of a convolution by several taps is faster as a matrix product over an unfolded
// input. The library is slow where the weights are many and the pixels few; there a copy of the input for each tap is cheap.
bool is_unfolded_better(const ConvCase& c);

}  // namespace deepcontrol::cpu
