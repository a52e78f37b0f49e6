#include "conv_plan.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "kernels.h"
#include "winograd.h"

namespace deepcontrol::cpu {
namespace {

constexpr int kNone = -1;
std::atomic<int> preferred{kNone};
thread_local int preferred_of_thread = kNone;

// Costs of one number of threads, by what they are of.
class CostTable {
 public:
  void put(const Cost& cost) { at(cost.algorithm, cost.pass, cost.dtype, cost.channels_last, cost.kind) = cost; }
  const Cost* find(Algorithm algorithm, Pass pass, const ConvCase& c) const {
    const auto& found = const_cast<CostTable*>(this)->at(algorithm, pass, c.dtype, c.channels_last, kind_of(c));
    return found ? &*found : nullptr;
  }

 private:
  std::optional<Cost>& at(Algorithm algorithm, Pass pass, Dtype dtype, bool channels_last, Kind kind) {
    return costs_[size_t(algorithm)][size_t(pass)][size_t(dtype)][channels_last][size_t(kind)];
  }
  std::optional<Cost> costs_[kAlgorithms.size()][2][4][2][kKinds.size()];
};
using CostTables = std::map<int64_t, CostTable>;
// Those that were replaced stay, since another thread may still read them.
std::atomic<const CostTables*> cost_tables{nullptr};

const CostTable* nearest_table(int64_t threads) {
  const CostTables* tables = cost_tables.load(std::memory_order_acquire);
  if (!tables || tables->empty()) return nullptr;
  const auto distance = [&](const auto& entry) {
    return double(std::max(entry.first, threads)) / double(std::min(entry.first, threads));
  };
  auto best = tables->begin();
  for (auto entry = tables->begin(); entry != tables->end(); ++entry) {
    if (distance(*entry) < distance(*best)) best = entry;
  }
  return &best->second;
}

using Key = std::array<int64_t, 27>;

Key key_of(Pass pass, const ConvCase& c) {
  Key key{int64_t(pass), int64_t(c.dtype), c.rank, c.samples, c.channels, c.filters, c.groups, c.channels_last, c.threads};
  size_t next = 9;
  for (const auto& values : {c.windows.size, c.windows.output, c.windows.kernel, c.windows.stride, c.windows.padding,
                             c.windows.dilation}) {
    for (int d = 0; d < 3; ++d) key[next++] = values[d];
  }
  return key;
}

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t value : key) hash = (hash ^ uint64_t(value)) * 0x9E3779B97F4A7C15ull;
    return size_t(hash ^ hash >> 32);
  }
};

// The fastest that were timed.
class Fastest {
 public:
  void remember(const Key& key, Algorithm algorithm) {
    const std::lock_guard lock(mutex_);
    known_[key] = algorithm;
    any_ = true;
  }
  void forget() {
    const std::lock_guard lock(mutex_);
    known_.clear();
    any_ = false;
  }
  std::optional<Algorithm> find(Pass pass, const ConvCase& c) const {
    if (!any_.load(std::memory_order_relaxed)) return {};
    const Key key = key_of(pass, c);
    const std::lock_guard lock(mutex_);
    const auto found = known_.find(key);
    return found == known_.end() ? std::nullopt : std::optional(found->second);
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<Key, Algorithm, Hash> known_;
  std::atomic<bool> any_{false};
};
Fastest fastest;

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
  // A map of one pixel lies the same in every layout, and so its bits are those of channels_last.
  if (is_planar(c) && c.pixels() == 1) return "the output has one pixel and the input more";
  if (const char* obstacle = why_no_product(c.dtype, c.channels, c.filters)) return obstacle;
  return pass == Pass::backward ? why_no_product_backward(c) : nullptr;
}

const char* why_not_winograd(const ConvCase& c) {
  const Windows& w = c.windows;
  if (!winograd_kernels()) return "the instruction set has no fast matrix product";
  if (c.dtype != Dtype::f32 && c.dtype != Dtype::bf16) return "it convolves float32 and bfloat16";
  if (c.rank != 2 || w.kernel[1] != 3 || w.kernel[2] != 3) return "the kernel is not 3 x 3";
  if (w.stride[1] != 1 || w.stride[2] != 1) return "the stride is not one";
  if (w.dilation[1] != 1 || w.dilation[2] != 1) return "the kernel is dilated";
  if (w.padding[1] > 2 || w.padding[2] > 2) return "the padding is larger than two";
  if (c.groups != 1) return "the channels are in groups";
  if (c.is_empty()) return "there is nothing to compute";
  return nullptr;
}

int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of; }

// Products of a sample and one input channel, in the transformed tiles of the pass's own output, the input's gradient backward.
int64_t winograd_products(Pass pass, const ConvCase& c) {
  const WinogradTile tile =
      winograd_tile(c.dtype, std::min(c.channels * c.input_pixels(), c.filters * c.pixels()), c.channels_last);
  const int64_t* size = pass == Pass::forward ? c.windows.output : c.windows.size;
  const int64_t tiles = whole(size[1], tile.down) * whole(size[2], tile.across);
  const int64_t columns = pass == Pass::forward ? c.filters : c.channels;
  return tile.points() * tiles * whole(columns, WinogradRows::kPanel) * WinogradRows::kPanel;
}

// By the products that it saves of those of the pass's own output, the input's gradient backward. Transforms and the float32
// arithmetic for bfloat16 take their share of that; measured on ResNet-50's layers and smaller ones (Zen 4, two threads).
// Nothing here depends on the number of samples, so that no sample's output does.
bool is_winograd_faster(Pass pass, const ConvCase& c) {
  constexpr int64_t kLeastProducts = int64_t(1) << 22;
  constexpr double kLeastGain = 1.45, kLeastGainBFloat16 = 3.5;
  const Windows& w = c.windows;
  const bool is_bfloat16 = c.dtype == Dtype::bf16;
  if (is_bfloat16 && has_matrix_unit()) return false;
  const int64_t* size = pass == Pass::forward ? w.output : w.size;
  const int64_t products = w.taps() * size[1] * size[2] * (pass == Pass::forward ? c.filters : c.channels);
  return w.taps() * c.pixels() * c.channels * c.filters >= kLeastProducts &&
         double(products) >= (is_bfloat16 ? kLeastGainBFloat16 : kLeastGain) * double(winograd_products(pass, c));
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

// From 10 layers of MobileNetV2: vectors that channels fill, maps that stay in the second-level cache as float32. Of larger
// maps in channels_last only the backward pass at a stride, where the library takes two to five times as long.
bool is_direct_faster(Pass pass, const ConvCase& c) {
  constexpr int64_t kLeastChannels = 16, kMostPixels = 1 << 12, kMostPixelsOfPlanes = 1 << 14;
  const int64_t pixels = std::max(c.pixels(), c.input_pixels());
  if (c.channels < kLeastChannels || pixels > kMostPixelsOfPlanes) return false;
  const bool at_stride = c.windows.stride[1] > 1 || c.windows.stride[2] > 1;
  return !c.channels_last || pixels <= kMostPixels || (pass == Pass::backward && at_stride);
}

}  // namespace

const char* name_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::product: return "product";
    case Algorithm::direct: return "direct";
    case Algorithm::winograd: return "winograd";
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
    case Algorithm::direct: return why_not_direct(c);
    case Algorithm::product: return why_not_product(pass, c);
    case Algorithm::winograd: return why_not_winograd(c);
    case Algorithm::two_passes: break;
  }
  return nullptr;
}

bool is_faster(Algorithm algorithm, Pass pass, const ConvCase& c) {
  switch (algorithm) {
    case Algorithm::product: return true;
    case Algorithm::direct: return is_direct_faster(pass, c);
    case Algorithm::winograd: return is_winograd_faster(pass, c);
    case Algorithm::two_passes: break;
  }
  return true;
}

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::pointwise: return "1x1";
    case Kind::three_by_three: return "3x3";
    case Kind::depthwise: return "depthwise";
    case Kind::other: break;
  }
  return "other";
}

Kind kind_of(const ConvCase& c) {
  if (c.groups > 1) return c.groups == c.channels ? Kind::depthwise : Kind::other;
  if (c.windows.taps() == 1) return Kind::pointwise;
  const bool is_square = c.rank == 2 && c.windows.kernel[1] == 3 && c.windows.kernel[2] == 3;
  return is_square && !c.is_strided() ? Kind::three_by_three : Kind::other;
}

double operations_of(Algorithm algorithm, Pass pass, const ConvCase& c) {
  constexpr int64_t kVector = 16;  // floats, of AVX-512
  const auto vectors = [](int64_t columns) { return whole(columns, kVector) * kVector; };
  // A panel of four vectors whose last are empty is computed by as many as hold it, but three as four.
  const auto panels = [&](int64_t columns) {
    const int64_t rest = columns % (4 * kVector);
    return columns - rest + (rest > 2 * kVector ? 4 * kVector : vectors(rest));
  };
  if (algorithm == Algorithm::winograd) {
    const double own = 2.0 * double(c.samples) * double(winograd_products(pass, c));
    if (pass == Pass::forward) return own * double(c.channels);
    const WinogradTile tile = winograd_weight_grad_tile(c.dtype);
    const int64_t tiles = whole(c.windows.output[1], tile.down) * whole(c.windows.output[2], tile.across);
    const double of_weight = 2.0 * double(c.samples * tile.points() * tiles) * double(c.filters * vectors(c.channels));
    return own * double(c.filters) + of_weight;
  }
  // In contiguous layout pixels fill the vectors, of several samples where one has few.
  const bool fills = algorithm == Algorithm::product && !is_planar(c);
  if (algorithm == Algorithm::direct) {
    return (pass == Pass::forward ? 2.0 : 4.0) * double(c.rows()) * double(vectors(c.filters)) * double(c.columns());
  }
  if (pass == Pass::forward) {
    return 2.0 * double(c.rows()) * double(fills ? panels(c.filters) : c.filters) * double(c.columns());
  }
  return 4.0 * double(c.rows()) * double(c.filters) * double(fills ? panels(c.channels) : c.columns());
}

// Forward reads input and weights and writes the output; backward reads the like of all three, a bit for each element that
// tells where the activation let it pass, and writes both gradients.
double bytes_of(Pass pass, const ConvCase& c) {
  const double size = c.dtype == Dtype::f64 ? 8 : c.dtype == Dtype::f32 ? 4 : 2;
  const double input = double(c.samples * c.channels) * double(c.input_pixels()), weights = double(c.weights());
  const double output = double(c.rows()) * double(c.filters);
  if (pass == Pass::forward) return (input + weights + output) * size;
  return (output + 2 * input + 2 * weights) * size + output / 8;
}

void set_costs(const std::vector<Cost>& costs) {
  auto* tables = new CostTables;
  for (const Cost& cost : costs) (*tables)[cost.threads].put(cost);
  cost_tables.store(tables, std::memory_order_release);
}

std::optional<double> predicted_seconds(Algorithm algorithm, Pass pass, const ConvCase& c) {
  const CostTable* table = nearest_table(c.threads);
  const Cost* cost = table ? table->find(algorithm, pass, c) : nullptr;
  return cost ? std::optional(cost->seconds(c)) : std::nullopt;
}

void remember_fastest(Pass pass, const ConvCase& c, Algorithm algorithm) { fastest.remember(key_of(pass, c), algorithm); }

void forget_fastest() { fastest.forget(); }

static Algorithm by_rule(Pass pass, const ConvCase& c) {
  for (const Algorithm algorithm : kAlgorithms) {
    if (!why_not(algorithm, pass, c) && is_faster(algorithm, pass, c)) return algorithm;
  }
  return Algorithm::two_passes;
}

// The least cost, where it is less than that of `other` by more than both may be wrong.
static std::optional<Algorithm> cheaper_than(Algorithm other, Pass pass, const ConvCase& c) {
  const CostTable* table = nearest_table(c.threads);
  const Cost* known = table ? table->find(other, pass, c) : nullptr;
  if (!known) return {};
  const double most = known->seconds(c);
  std::optional<Algorithm> best;
  double least = most;
  for (const Algorithm algorithm : kAlgorithms) {
    const Cost* cost = algorithm == other ? nullptr : table->find(algorithm, pass, c);
    if (!cost || why_not(algorithm, pass, c)) continue;
    const double seconds = cost->seconds(c);
    if (seconds >= std::min(least, most * (1 - std::max(cost->error, known->error)))) continue;
    best = algorithm;
    least = seconds;
  }
  return best;
}

Choice choose(Pass pass, const ConvCase& c) {
  const int of_thread = preferred_of_thread;
  const int wanted = of_thread != kNone ? of_thread : preferred.load(std::memory_order_relaxed);
  if (wanted != kNone) {
    const auto algorithm = Algorithm(wanted);
    const char* obstacle = why_not(algorithm, pass, c);
    if (!obstacle) return {algorithm, Source::preferred};
    if (pass == Pass::backward) return {Algorithm::two_passes, Source::preferred};
    throw std::runtime_error("algorithm '" + std::string(name_of(algorithm)) + "': " + obstacle);
  }
  if (const auto timed = fastest.find(pass, c); timed && !why_not(*timed, pass, c)) return {*timed, Source::timed};
  const Algorithm ruled = by_rule(pass, c);
  if (const auto cheaper = cheaper_than(ruled, pass, c)) return {*cheaper, Source::predicted};
  return {ruled, Source::rule};
}

void prefer_algorithm(std::string_view name, bool of_thread) {
  const int wanted = name.empty() ? kNone : int(parse_algorithm(name));
  if (of_thread) {
    preferred_of_thread = wanted;
  } else {
    preferred = wanted;
  }
}

bool is_unfolded_better(const ConvCase& c) {
  constexpr int64_t kLeastWeights = int64_t(1) << 21, kMostUnfolded = int64_t(1) << 24;
  if (c.rank != 2 || c.groups != 1 || !c.channels_last || c.is_empty()) return false;
  return c.weights() >= kLeastWeights && c.rows() * c.columns() <= kMostUnfolded &&
         !why_no_product(c.dtype, c.columns(), c.filters) && !why_no_product_backward(c);
}

}  // namespace deepcontrol::cpu
