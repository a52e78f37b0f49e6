#include "plan.h"

#include <algorithm>
#include <utility>

namespace deepcontrol::cuda {

namespace {

constexpr int kMostBlocksOfCluster = 8;  // more is not portable

int size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
int size_of_sum(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

// How a map is summed depends on the map alone, never on how many there are: so a sample's result has the same bits in
// whatever batch it comes.
class Planner {
 public:
  Planner(const CenterCase& c, const Device& device) : c_(c), device_(device) {
    // As in center.cuh: doubles go one by one.
    const int vector = c.dtype == Dtype::f64 ? 1 : 16 / size_of(c.dtype);
    const int64_t row = c.maps.channels_innermost ? c.maps.channels : c.maps.pixels;
    n_ = c.aligned && row % vector == 0 ? vector : 1;
    clusters_ = device.capability >= 90;
  }

  CenterPlan plan() const { return c_.maps.channels_innermost ? nhwc() : nchw(); }

 private:
  // Each block costs 1 KiB more than it asks for.
  int64_t preferred() const { return device_.shared_memory / kPlannedBlocks - 1024; }
  int64_t tolerable() const { return device_.shared_memory / 2 - 1024; }

  // The same count as Shared in center_nhwc.cu.
  int64_t shared_nhwc(int lanes, int64_t part) const {
    const int64_t steps = ceil_divide(part, kThreads / lanes), elements = steps * kThreads * n_;
    const int64_t sums = scratch_elements(lanes, n_) + 2 * c_.kinds * lanes * n_;
    return c_.staged * elements * size_of(c_.dtype) + sums * size_of_sum(c_.dtype) + (c_.bits ? steps * kThreads : 0);
  }
  // The same count as Shared in center_nchw.cu.
  int64_t shared_nchw(int maps, int64_t part) const {
    const int64_t elements = ceil_divide(maps * part, 16) * 16;
    const int64_t sums = scratch_elements(1, c_.kinds) + 2 * c_.kinds;
    return c_.staged * elements * size_of(c_.dtype) + sums * size_of_sum(c_.dtype);
  }

  CenterPlan cut(int lanes, int parts, bool cluster) const {
    CenterPlan plan{};
    plan.vectorized = n_ > 1;
    while (plan.lanes() < lanes) ++plan.log_lanes;
    plan.maps = plan.tiles = 1;
    // Whole bytes of bits, and whole vectors, to every part of a map.
    plan.part = ceil_divide(ceil_divide(c_.maps.pixels, parts), 8) * 8;
    if (c_.maps.channels_innermost || parts == 1) plan.part = ceil_divide(c_.maps.pixels, parts);
    plan.parts = cluster ? parts : static_cast<int>(ceil_divide(c_.maps.pixels, plan.part));
    plan.cluster = cluster;
    if (c_.maps.channels_innermost) {
      plan.tiles = static_cast<int>(ceil_divide(c_.maps.channels, lanes * n_));
      plan.blocks = c_.maps.samples * plan.tiles * plan.parts;
      plan.shared = shared_nhwc(lanes, plan.part);
    } else {
      plan.blocks = c_.maps.samples * c_.maps.channels * plan.parts;
      plan.shared = shared_nchw(1, plan.part);
    }
    return plan;
  }

  // One block or a cluster, the smallest that keeps each block within `most` bytes; blocks == 0 if there is none.
  CenterPlan on_chip(int lanes, int64_t most) const {
    most = std::min(most, device_.shared_memory);
    for (int parts = 1; parts <= (clusters_ ? kMostBlocksOfCluster : 1); parts *= 2) {
      const CenterPlan plan = cut(lanes, parts, parts > 1);
      if (plan.shared <= most) return plan;
    }
    return {};
  }

  // Parts of some 32 KiB in launches that need no others.
  CenterPlan apart(int lanes) const {
    const int64_t width = c_.maps.channels_innermost ? lanes * n_ : 1;
    const int64_t most = std::min<int64_t>(32 * 1024, device_.shared_memory / 2);
    int64_t part = std::max<int64_t>(most / (c_.staged * width * size_of(c_.dtype)), 8);
    int parts = static_cast<int>(ceil_divide(c_.maps.pixels, part));
    CenterPlan plan = cut(lanes, parts, false);
    while (plan.shared > device_.shared_memory && parts < c_.maps.pixels) plan = cut(lanes, parts *= 2, false);
    return plan;
  }

  CenterPlan nhwc() const {
    const int line = 128 / (n_ * size_of(c_.dtype));  // lanes that read a whole cache line
    const int narrowest = std::max(1, 8 / n_);        // whole bytes of bits
    int widest = narrowest;
    while (widest < (n_ > 1 ? 32 : kThreads) && widest * n_ < c_.maps.channels) widest *= 2;
    if (!c_.centred) return apart(std::min(widest, std::max(line, narrowest)));
    // Wider than a line only as long as a tile is too small to be worth a block.
    constexpr int64_t kSmallTile = 12 * 1024;
    CenterPlan wide{};
    for (int lanes = std::max(line, narrowest); lanes <= widest; lanes *= 2) {
      const CenterPlan plan = cut(lanes, 1, false);
      if (plan.shared > preferred()) break;
      wide = plan;
      if (c_.maps.pixels * lanes * n_ * size_of(c_.dtype) >= kSmallTile) break;
    }
    if (wide.blocks) return wide;
    const int full = std::max(narrowest, std::min(widest, line)), half = std::max(narrowest, full / 2);
    for (const auto& [lanes, most] : {std::pair{full, preferred()}, {half, preferred()}, {full, tolerable()},
                                      {half, tolerable()}, {half, device_.shared_memory}}) {
      const CenterPlan plan = on_chip(lanes, most);
      if (plan.blocks) return plan;
    }
    for (int lanes = half; lanes >= narrowest; lanes /= 2) {
      const CenterPlan plan = on_chip(lanes, device_.shared_memory);
      if (plan.blocks) return plan;
    }
    return apart(full);
  }

  CenterPlan nchw() const {
    const int64_t vectors = ceil_divide(c_.maps.pixels, n_), maps = c_.maps.samples * c_.maps.channels;
    const int lanes = vectors <= 64 ? 8 : 32;
    const int teams = kThreads / lanes;
    if (shared_nchw(teams, c_.maps.pixels) <= std::min(preferred(), device_.shared_memory)) {
      CenterPlan plan = cut(lanes, 1, false);
      plan.maps = teams;
      // Several maps a team where they are small, and enough blocks are left.
      while (shared_nchw(2 * plan.maps, c_.maps.pixels) <= preferred() / 2 &&
             maps >= 2 * plan.maps * 4 * int64_t(device_.processors)) {
        plan.maps *= 2;
      }
      plan.blocks = ceil_divide(maps, plan.maps);
      plan.shared = shared_nchw(plan.maps, plan.part);
      return plan;
    }
    if (!c_.centred) return apart(kThreads);
    for (const int64_t most : {preferred(), tolerable(), device_.shared_memory}) {
      const CenterPlan plan = on_chip(kThreads, most);
      if (plan.blocks) return plan;
    }
    return apart(kThreads);
  }

  CenterCase c_;
  Device device_;
  int n_;
  bool clusters_;
};

}  // namespace

CenterPlan plan_center(const CenterCase& c, const Device& device) { return Planner(c, device).plan(); }

}  // namespace deepcontrol::cuda
