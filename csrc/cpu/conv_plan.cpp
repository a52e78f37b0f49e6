#include "conv_plan.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace deepcontrol::cpu {
namespace {

constexpr int kNone = -1;
std::atomic<int> preferred{kNone};

// Why there is no matrix product by a (channels, filters) matrix.
const char* why_no_product(Dtype dtype, int64_t channels, int64_t filters) {
  if (!kernels().pointwise_forward) return "the instruction set has no fast matrix product";
  if (channels == 1 || filters == 1) return "it has one channel or one filter";
  if (dtype == Dtype::f32) return nullptr;
  if (dtype != Dtype::bf16) return "it multiplies float32 and bfloat16";
  if (!kernels().pointwise_bf16) return "the instruction set does not multiply bfloat16";
  // They are multiplied in pairs, of channels forward and of filters backward.
  return channels % 2 || filters % 2 ? "bfloat16 needs even numbers of channels and filters" : nullptr;
}

// Every thread of a backward pass needs rows, and memory for a weight gradient of its own.
const char* why_no_product_backward(const ConvCase& c) {
  constexpr int64_t kLeastRows = 192, kMostPartialBytes = int64_t(1) << 27;
  if (c.rows() < c.threads * kLeastRows) return "there are too few pixels for the threads";
  if (c.threads * c.weights() * int64_t(sizeof(float)) > kMostPartialBytes) {
    return "the threads' weight gradients take too much memory";
  }
  return nullptr;
}

const char* why_not_product(Pass pass, const ConvCase& c) {
  if (c.groups != 1) return "the channels are in groups";
  if (c.windows.taps() != 1) return "the kernel has more than one tap";
  if (c.is_padded()) return "the input is padded";
  if (c.is_empty()) return "there is nothing to compute";
  if (!c.channels_last && c.input_pixels() > 1) return "the maps are not in channels_last";
  if (const char* obstacle = why_no_product(c.dtype, c.channels, c.filters)) return obstacle;
  return pass == Pass::backward ? why_no_product_backward(c) : nullptr;
}

const char* why_not_direct(const ConvCase& c) {
  if (c.groups != c.channels || c.filters != c.channels) return "it is not one filter a channel";
  if (!kernels().depthwise_forward) return "the instruction set has no vectors for it";
  if (c.rank != 2) return "the maps do not have two dimensions";
  if (c.dtype == Dtype::f64) return "it computes in float32";
  if (c.is_empty()) return "there is nothing to compute";
  if (c.windows.dilation[1] != 1 || c.windows.dilation[2] != 1) return "the kernel is dilated";
  if (std::max(c.windows.kernel[1], c.windows.kernel[2]) > Depthwise::kMostTaps) return "the kernel is too large";
  return nullptr;
}

}  // namespace

const char* name_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::product: return "product";
    case Algorithm::direct: return "direct";
    case Algorithm::two_passes: break;
  }
  return "two passes";
}

Algorithm parse_algorithm(std::string_view name) {
  std::string names;
  for (const Algorithm algorithm : kAlgorithms) {
    if (name == name_of(algorithm)) return algorithm;
    names += std::string(names.empty() ? "'" : ", '") + name_of(algorithm) + "'";
  }
  throw std::invalid_argument("algorithm: got '" + std::string(name) + "', wanted one of " + names);
}

const char* why_not(Algorithm algorithm, Pass pass, const ConvCase& c) {
  switch (algorithm) {
    case Algorithm::product: return why_not_product(pass, c);
    case Algorithm::direct: return why_not_direct(c);
    case Algorithm::two_passes: break;
  }
  return nullptr;
}

bool is_faster(Algorithm algorithm, Pass, const ConvCase&) {
  switch (algorithm) {
    case Algorithm::product:
    case Algorithm::direct: return true;
    case Algorithm::two_passes: break;
  }
  return true;
}

Algorithm choose(Pass pass, const ConvCase& c) {
  const int wanted = preferred.load(std::memory_order_relaxed);
  if (wanted != kNone) {
    const auto algorithm = Algorithm(wanted);
    const char* obstacle = why_not(algorithm, pass, c);
    if (!obstacle) return algorithm;
    if (pass == Pass::backward) return Algorithm::two_passes;
    throw std::runtime_error("algorithm '" + std::string(name_of(algorithm)) + "': " + obstacle);
  }
  for (const Algorithm algorithm : kAlgorithms) {
    if (!why_not(algorithm, pass, c) && is_faster(algorithm, pass, c)) return algorithm;
  }
  return Algorithm::two_passes;
}

void prefer_algorithm(std::string_view name) { preferred = name.empty() ? kNone : int(parse_algorithm(name)); }

bool is_unfolded_better(const ConvCase& c) {
  constexpr int64_t kLeastWeights = int64_t(1) << 21, kMostUnfolded = int64_t(1) << 24;
  if (c.rank != 2 || c.groups != 1 || !c.channels_last || c.is_empty()) return false;
  return c.weights() >= kLeastWeights && c.rows() * c.columns() <= kMostUnfolded &&
         !why_no_product(c.dtype, c.columns(), c.filters) && !why_no_product_backward(c);
}

}  // namespace deepcontrol::cpu
