#include <algorithm>
#include <limits>

#include "conv_direct.h"

namespace deepcontrol::cuda {

namespace {

constexpr int64_t kMostChannels = 8;  // of a group
constexpr int kMostLanes = 32;
constexpr int64_t kMostSteps = 4;        // strips of a thread whose sums are kept
constexpr int kMostBlocksOfCluster = 8;  // more is not portable
// Bytes of neighbouring filters that a block should have, and that it must have if a map is to be kept for that.
constexpr int kRow = 64, kShortestRow = 32;

int size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
int size_of_sum(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

// How a map is cut, and so how it is summed, depends on the map alone, never on how many there are: so a sample's
// result has the same bits in whatever batch it comes.
class Planner {
 public:
  Planner(const ConvCase& c, const Device& device)
      : c_(c),
        device_(device),
        strip_(strip_of(size_of_sum(c.dtype))),
        strips_(strips_of_map(c.windows, strip_)),
        weights_(c.windows.taps() * c.group_channels()) {}

  ConvPlan plan() const {
    ConvPlan chosen = choose();
    chosen.seconds = seconds(chosen);
    return chosen;
  }

  ConvPlan cut(int lanes, bool held, int cluster, int64_t strips_of_block) const {
    ConvPlan plan{};
    plan.way = Way::direct;
    plan.held = held;
    while (1 << plan.log_lanes < lanes) ++plan.log_lanes;
    plan.rows = plan.used = static_cast<int>(strips_of_block * strip_);
    plan.columns = lanes * kFilters;
    plan.stages = plan.samples = plan.splits = 1;
    plan.cluster = cluster;
    plan.blocks = c_.samples * ceil_divide(c_.filters, plan.columns) * ceil_divide(strips_, strips_of_block);
    plan.shared = DirectShared(plan, weights_, size_of_sum(c_.dtype)).end * size_of_sum(c_.dtype);
    return plan;
  }

 private:
  // Two blocks a multiprocessor, as many as registers allow. Each costs 1 KiB more than it asks for.
  bool leaves_room(const ConvPlan& plan) const { return plan.shared <= device_.shared_memory / 2 - 1024; }
  int64_t groups(int lanes) const { return kThreads / lanes; }

  ConvPlan choose() const {
    const int octet = kFilters * size_of(c_.dtype), clusters = device_.capability >= 90 ? kMostBlocksOfCluster : 1;
    int widest = 1;
    while (widest < kMostLanes && widest * kFilters < c_.filters) widest *= 2;
    int lanes = std::min(widest, kRow / octet);
    // A small map leaves threads without a strip, unless there are filters for them.
    while (lanes < widest && groups(lanes) >= 2 * strips_) lanes *= 2;
    // Long filters leave little room for many.
    while (lanes > 1 && !leaves_room(cut(lanes, false, 1, strips_))) lanes /= 2;
    if (!c_.centred) return cut(lanes, false, 1, std::min(strips_, kMostSteps * groups(lanes)));
    for (int narrower = lanes; narrower >= std::min(lanes, std::max(1, kShortestRow / octet)); narrower /= 2) {
      for (int cluster = 1; cluster <= clusters; ++cluster) {
        const int64_t strips = ceil_divide(strips_, cluster);
        const ConvPlan plan = cut(narrower, true, cluster, strips);
        // Every block of a cluster must be there.
        const bool whole = ceil_divide(strips_, strips) == cluster;
        if (whole && steps_of(plan, strip_) <= kMostSteps && leaves_room(plan)) return plan;
      }
    }
    // A cluster goes through its maps twice while the second-level cache has them.
    int cluster = static_cast<int>(std::min<int64_t>(clusters, ceil_divide(strips_, groups(lanes))));
    while (ceil_divide(strips_, ceil_divide(strips_, cluster)) < cluster) --cluster;
    return cut(lanes, false, cluster, ceil_divide(strips_, cluster));
  }

  // The larger of three: bytes over the memory's ceiling; those that the first-level cache, which shared memory is too,
  // gives to registers over its ceiling; and instructions, of which a multiprocessor starts those of 128 lanes a clock,
  // as many as that cache gives bytes. Instructions are those counted in the code for sm_90.
  double seconds(const ConvPlan& plan) const {
    const Ceilings ceilings = ceilings_of(device_);
    const double size = size_of(c_.dtype), size_of_weight = size_of_sum(c_.dtype);
    const double input = c_.samples * c_.input_pixels() * c_.channels * size, output = c_.rows() * c_.filters * size;
    const double sweeps = c_.centred && !plan.held ? 2 : 1;
    // More maps are under way than the second-level cache holds, unless a cluster shares one.
    const double reads = plan.cluster > 1 ? 1 : sweeps;
    const double moved = reads * input + output + c_.filters * weights_ * size + c_.rows() * c_.filters / 8.0;
    // Of one octet and strip, for each row of taps.
    const bool depthwise = c_.groups == c_.channels && c_.groups == c_.filters;
    const bool vectors = depthwise && c_.aligned && c_.channels % kFilters == 0;
    const int64_t kernel = c_.windows.kernel[2], phases = phases_of(c_.windows);
    const double loads = phases * (strip_ - 1) + kernel, rows = static_cast<double>(weights_) / kernel;
    const double bytes = kFilters * (loads * size + kernel * size_of_weight);
    const double load = vectors ? 7 + (size == 2 ? kFilters : 0) : 5 * kFilters;
    const double products = kFilters * strip_ * (size == 8 ? 2 : 1);
    const double instructions = 50 * phases + loads * load + kernel * (products + 2);
    const double per_pixel = 110;
    const double of_strip = std::max(sweeps * rows * bytes, sweeps * rows * instructions + per_pixel * strip_);
    // As if every thread had as many strips as its block allows, and every multiprocessor as many blocks as the
    // busiest.
    const int64_t blocks = ceil_divide(plan.blocks, device_.processors) * device_.processors;
    const double strips = static_cast<double>(blocks) * kThreads * steps_of(plan, strip_);
    return std::max(moved / ceilings.bytes, strips * of_strip / ceilings.cached);
  }

  ConvCase c_;
  Device device_;
  int strip_;
  int64_t strips_;   // of a map
  int64_t weights_;  // of a filter
};

}  // namespace

std::optional<std::string> why_not_direct(const ConvCase& c, const Device& device) {
  if (c.groups == 1) return "all channels are one group";
  if (c.group_channels() > kMostChannels) return "groups have more than " + std::to_string(kMostChannels) + " channels";
  // Pixels, filters, weights of a block and bytes of a row are counted in 32 bits.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
  const Windows& w = c.windows;
  int64_t columns = 0;
  for (int i = 0; i < 3; ++i) {
    // Of the input, from its padding to what the last strip sees.
    columns = w.padding[i] + w.size[i] + (w.output[i] + kFilters) * w.stride[i] + w.kernel[i] * w.dilation[i];
    if (columns > kMost) return "a map is too large";
  }
  if (columns > kMost / (c.channels * size_of(c.dtype)) || c.input_pixels() > kMost || c.pixels() > kMost) {
    return "a map is too large";
  }
  if (c.filters > kMost) return "there are too many filters";
  const Planner planner(c, device);
  if (planner.cut(1, false, 1, 1).shared > device.shared_memory) return "the weights of eight filters are too many";
  if (planner.plan().blocks > std::numeric_limits<int32_t>::max()) return "there are too many maps";
  return std::nullopt;
}

ConvPlan plan_direct(const ConvCase& c, const Device& device) { return Planner(c, device).plan(); }

}  // namespace deepcontrol::cuda
