// Plans of the sm_90a convolution: which tiles, and what they should take.
#include <algorithm>
#include <limits>

#include "conv_layout_sm90.h"
#include "conv_plan.h"

namespace deepcontrol::cuda {

namespace {

using Layout = LayoutSm90;

constexpr int64_t kMostRows = (int64_t{1} << 31) - (1 << 16);  // a row behind the last tile is a 32-bit number still
constexpr int64_t kMostTiles = (int64_t{1} << 31) - (1 << 16);
constexpr int kMostBlocks = 8;  // of a cluster
constexpr int kFewestStages = 2;
constexpr int kBytes = 2;  // of an element

// Of one multiprocessor, a clock.
constexpr double kOperations = 4096;  // dense, 16 bits, two for a multiply-add
constexpr double kCachedBytes = 64;   // from the second-level cache
// Clocks that are predicted, not measured. A warp finishes four rows of 64 columns at a time, some hundred instructions
// that wait for shared memory and cached vectors; a group sums its rows of a map by selects, additions and shuffles; and
// sums go through the cluster and back.
constexpr double kFinishClocks = 200, kSumClocks = 400, kOwnMeansClocks = 800, kClusterMeansClocks = 2000;
// What data sheets of an H100 SXM count; its clock follows from what all of it does.
constexpr int kProcessorsOfSheet = 132;

// Blocks of a cluster share a part of the GPU, of which each has some 16 multiprocessors that work; pairs fit anywhere.
// One part has fewer: with clusters of 8, 15 of them were seen on an H100 (NVIDIA/cutlass#1921). At the launch the driver
// is asked.
int64_t resident_clusters(const Device& device, int cluster) {
  constexpr int kPart = 16;
  if (cluster <= 2 || device.processors < kPart) return std::max(device.processors / cluster, 1);
  return std::max(device.processors / kPart * (kPart / cluster) - 1, 1);
}

// What is read to know the means before: the input, and the product of window means and weight.
double bytes_of_means(const ConvCase& c) {
  constexpr int64_t kSamples = 16, kFilters = 64;
  const int64_t means = 4 * c.samples * c.windows.taps() * c.channels;
  const int64_t weights = c.filters * c.group_channels() * c.windows.taps() * kBytes;
  return static_cast<double>(c.samples * c.input_pixels() * c.channels * kBytes +
                             means * (1 + ceil_divide(c.group_filters(), kFilters)) +
                             weights * ceil_divide(c.samples, kSamples));
}

class Planner {
 public:
  Planner(const ConvCase& c, const Device& device, bool held) : c_(c), device_(device), held_(held) {}

  ConvPlan plan() const {
    ConvPlan best{};
    best.seconds = std::numeric_limits<double>::infinity();
    const auto consider = [&](const ConvPlan& plan) {
      if (plan.blocks && plan.seconds < best.seconds) best = plan;
    };
    for (const bool shared_tile : {false, true}) {
      for (const int columns : {128, 64}) {
        if (shared_tile && columns == 64) continue;  // not built: the cache is no bound there
        if (!held_) {
          consider(cut(shared_tile, columns, 1, 0));
          continue;
        }
        for (int cluster = 1; cluster <= kMostBlocks; ++cluster) {
          const int64_t samples = std::min(cluster * Layout::rows(shared_tile) / c_.pixels(), c_.samples);
          if (samples) consider(cut(shared_tile, columns, cluster, static_cast<int>(samples)));
        }
      }
    }
    return best;
  }

 private:
  ConvPlan cut(bool shared_tile, int columns, int cluster, int samples) const {
    ConvPlan plan{};
    plan.way = Way::sm90;
    plan.held = held_;
    plan.shared_tile = shared_tile;
    plan.rows = Layout::rows(shared_tile);
    plan.columns = columns;
    plan.cluster = cluster;
    plan.samples = samples;
    plan.splits = 1;
    const int64_t span = held_ ? samples * c_.pixels() : plan.rows;
    plan.used = static_cast<int>(ceil_divide(span, cluster));
    if (plan.used * (cluster - 1) >= span) return {};  // a block would have nothing
    for (plan.stages = Layout::kMostStages; plan.stages >= kFewestStages; --plan.stages) {
      plan.shared = Layout(shared_tile, columns, plan.stages, held_).total;
      if (plan.shared <= device_.shared_memory) break;
    }
    if (plan.stages < kFewestStages) return {};
    const int64_t tiles = ceil_divide(c_.rows(), span) * c_.groups * ceil_divide(c_.group_filters(), columns);
    const int64_t clusters = std::min(tiles, resident_clusters(device_, cluster));
    plan.blocks = clusters * cluster;
    plan.seconds = seconds(plan, ceil_divide(tiles, clusters));
    return plan;
  }

  // Of a cluster that has so many tiles, one after the other.
  double seconds(const ConvPlan& plan, int64_t tiles) const {
    const Ceilings ceilings = ceilings_of(device_);
    const int64_t steps = c_.windows.taps() * ceil_divide(c_.group_channels(), Layout::kStepChannels);
    const double operations = 2.0 * plan.rows * plan.columns * Layout::kStepChannels;
    const double loaded = double(plan.used + plan.columns) * Layout::kStepBytes;
    const double products = steps * std::max(operations / kOperations, loaded / kCachedBytes);
    const int octets = Layout::kGroupRows * plan.columns / 8 / (Layout::kWarpsOfGroup * 32);
    double finish = octets * kFinishClocks;
    if (held_) {
      const int64_t maps = std::min<int64_t>((std::min(plan.used, Layout::kGroupRows) - 2) / c_.pixels() + 2, plan.samples);
      finish += maps * kSumClocks + (plan.cluster > 1 ? kClusterMeansClocks : kOwnMeansClocks);
    }
    // Groups with tiles of their own take turns: one finishes while the other multiplies.
    const double clocks = plan.shared_tile ? tiles * (products + finish)
                                           : tiles * std::max(products, (products + finish) / 2) + finish;
    const double clock = ceilings.operations / (kOperations * kProcessorsOfSheet);
    const double output = static_cast<double>(c_.rows() * c_.filters);
    const double moved = static_cast<double>(c_.samples * c_.input_pixels() * c_.channels * kBytes +
                                             c_.filters * c_.group_channels() * c_.windows.taps() * kBytes) +
                         output * kBytes + output / 8;
    const double before = c_.centred && !held_ ? bytes_of_means(c_) : 0;
    return std::max(clocks / clock, moved / ceilings.bytes) + before / ceilings.bytes;
  }

  const ConvCase& c_;
  const Device& device_;
  const bool held_;
};

// What the TMA's im2col mode has bits for.
std::optional<std::string> why_not_mapped(const Windows& w) {
  const bool flat = is_flat(w);
  const int64_t far = flat ? 128 : 16, ahead = flat ? 255 : 31;
  for (int i = flat ? 1 : 0; i < 3; ++i) {
    const int64_t reach = (w.kernel[i] - 1) * w.dilation[i], behind = w.padding[i] - reach;
    if (w.stride[i] > 8) return "a stride is larger than 8";
    if (reach > ahead) return "a dilated kernel is larger than " + std::to_string(ahead + 1);
    if (w.padding[i] > far || behind < -far || behind >= far) {
      return "a padding, or a dilated kernel less its padding, is larger than " + std::to_string(far);
    }
  }
  return {};
}

}  // namespace

std::optional<std::string> why_not_sm90(const ConvCase& c, const Device& device, bool held) {
  if (device.capability != 90) return "the GPU's compute capability is not 9.0";
  if (!device.sm90a) return "this build has no code for sm_90a (TORCH_CUDA_ARCH_LIST with 9.0a, without 9.0, makes it)";
  if (c.dtype != Dtype::bf16 && c.dtype != Dtype::f16) return "it takes bfloat16 and float16 only";
  if (!c.aligned) return "a tensor does not start at a multiple of 16 bytes";
  if (c.group_channels() % 8) return "the channels of a group are no multiple of 8";
  if (c.groups > 1 && c.group_channels() % Layout::kStepChannels) {
    return "there are groups, and their channels are no multiple of " + std::to_string(Layout::kStepChannels);
  }
  if (c.groups > 1 && c.group_filters() % 8) return "there are groups, and their filters are no multiple of 8";
  if (const auto reason = why_not_mapped(c.windows)) return reason;
  const int64_t columns = c.groups * ceil_divide(c.group_filters(), 64);
  if (c.rows() > kMostRows || ceil_divide(c.rows(), Layout::kGroupRows) * columns > kMostTiles) {
    return "the output is too large for 32-bit numbers of rows and tiles";
  }
  if (held && !Layout::takes_maps_of(c.pixels())) return "maps are too small to take their means";
  if (held && c.pixels() > kMostBlocks * Layout::rows(true)) {
    return "maps have more than " + std::to_string(kMostBlocks * Layout::rows(true)) + " pixels, more than a cluster has";
  }
  if (!Planner(c, device, held).plan().blocks) return "the GPU has too little shared memory for a tile";
  return {};
}

ConvPlan plan_sm90(const ConvCase& c, const Device& device, bool held) { return Planner(c, device, held).plan(); }

}  // namespace deepcontrol::cuda
