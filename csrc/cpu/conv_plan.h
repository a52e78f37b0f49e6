// Which algorithm runs each pass of a convolution on a CPU. Plain C++: all of it can be looked at without tensors.
//
// An algorithm is known here by its name, by why it does not take a layer and by the rule that says where it is faster than
// two passes. conv_center.cpp runs it: one case of a switch forward, one backward. Rules are for layers of which nothing
// was measured; before them go what was timed of the very layer and the table of costs (deepcontrol_cuda/costs.json).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

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
  constexpr bool is_strided() const { return windows.stride[0] * windows.stride[1] * windows.stride[2] > 1; }
  constexpr bool is_padded() const { return windows.padding[0] + windows.padding[1] + windows.padding[2] > 0; }
  constexpr bool is_empty() const {
    return samples * input_pixels() * weights() == 0 ||
           std::min({windows.output[0], windows.output[1], windows.output[2]}) < 1;
  }
};

enum class Pass { forward, backward };

enum class Algorithm {
  product,     // own matrix product over channels, the centring on its way (pointwise.cpp, planar.cpp)
  direct,      // depthwise convolutions, each map centred while it is in the cache (depthwise.cpp)
  winograd,    // own convolution by 3 x 3 taps in transformed tiles (winograd.cpp), then center
  two_passes,  // the library's convolution, then center; takes every layer
};
// In the order in which they are asked whether they take a layer.
inline constexpr std::array kAlgorithms{Algorithm::product, Algorithm::direct, Algorithm::winograd, Algorithm::two_passes};

const char* name_of(Algorithm algorithm);
// Throws std::invalid_argument for an unknown name.
Algorithm parse_algorithm(std::string_view name);

// Why an algorithm does not take a pass of a layer, in words, or null.
const char* why_not(Algorithm algorithm, Pass pass, const ConvCase& c);
// Whether an algorithm that takes a pass of a layer is faster there than two passes.
bool is_faster(Algorithm algorithm, Pass pass, const ConvCase& c);

enum class Kind { pointwise, three_by_three, depthwise, other };

inline constexpr std::array kKinds{Kind::pointwise, Kind::three_by_three, Kind::depthwise, Kind::other};
const char* name_of(Kind kind);
Kind kind_of(const ConvCase& c);

// What an algorithm computes in a pass of a layer, two for a multiply-add, with what fills up vectors, panels and tiles; and
// what any of them must move at least.
double operations_of(Algorithm algorithm, Pass pass, const ConvCase& c);
double bytes_of(Pass pass, const ConvCase& c);

// Seconds of an algorithm, fitted to what was measured of layers of one kind.
struct Cost {
  Algorithm algorithm;
  Pass pass;
  Dtype dtype;
  bool channels_last;
  Kind kind;
  int64_t threads;
  double fixed, per_operation, per_byte;
  double error;  // of what it gives, relative, half of the time more

  double seconds(const ConvCase& c) const {
    return fixed + per_operation * operations_of(algorithm, pass, c) + per_byte * bytes_of(pass, c);
  }
};
// The table of this processor's instruction set; it replaces the one before.
void set_costs(const std::vector<Cost>& costs);
// By the table, from the row whose number of threads is nearest.
std::optional<double> predicted_seconds(Algorithm algorithm, Pass pass, const ConvCase& c);

// What was timed of a very layer; centred or not, it is the same one.
void remember_fastest(Pass pass, const ConvCase& c, Algorithm algorithm);
void forget_fastest();

enum class Source { preferred, timed, predicted, rule };

struct Choice {
  Algorithm algorithm;
  Source source;
};
// The algorithm that a pass takes: the one that is preferred, else the fastest that was timed, else the first that takes the
// layer and by rule is faster, unless another one costs less by more than the error of the costs. Throws std::runtime_error
// where the preferred one does not take the forward pass; a backward pass that it does not take is that of two passes.
// Takes some tens of nanoseconds.
Choice choose(Pass pass, const ConvCase& c);

// One algorithm for every convolution of the process, or of the calling thread alone, by name; "" for automatic choice. The
// thread's goes before the process's.
void prefer_algorithm(std::string_view name, bool of_thread);

// Product: whether rows are filters and columns pixels (planar.cpp); one pixel lies the same in every layout.
constexpr bool is_planar(const ConvCase& c) { return !c.channels_last && c.input_pixels() > 1; }

// Product: whether map means follow from the input's at less cost than from z, so that one pass does the layer: they are
// fewer, or z has rows too short for the vectors of center.
constexpr bool is_mean_of_input_cheaper(const ConvCase& c) {
  constexpr int64_t kShortRow = 32;
  return c.channels <= c.filters || c.filters < kShortRow;
}

// Two passes: whether the weight gradient of a convolution by several taps is faster as a matrix product over an unfolded
// input. The library is slow where the weights are many and the pixels few; there a copy of the input for each tap is cheap.
bool is_unfolded_better(const ConvCase& c);

}  // namespace deepcontrol::cpu
