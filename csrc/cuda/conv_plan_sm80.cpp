// The fused convolution on mma.sync: what it takes, its tiles and what they should take. All of it is counted from data
// sheets, but for the latencies, which are assumed; it orders plans, and says how the kernel compares with other ways.
#include <algorithm>

#include "conv_plan.h"
#include "conv_tiles.h"

namespace deepcontrol::cuda {

namespace {

// A clock and multiprocessor: bytes from shared memory, and from the second-level cache (NVIDIA's papers on A100 and
// H100).
constexpr double kSharedBytes = 128, kCachedBytes = 40;
// What a load element by element takes of the first number for each element: a warp's touches four lines.
constexpr double kElementBytes = 16;
// And what the epilogue takes for each sum: eight bytes through shared memory, and sixty instructions for eight sums.
constexpr double kEpilogueBytes = 16;
// Clocks, assumed: until a tile's first operands are there and its last results are under way; what a launch behind
// another adds; from a load to what it brings.
constexpr double kTileLatency = 1500, kLaunchLatency = 3000, kLoadLatency = 1000;
constexpr int64_t kMostWorkspace = int64_t(256) << 20;

int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

class Planner {
 public:
  Planner(const ConvCase& c, const Device& device, bool held)
      : c_(c),
        device_(device),
        held_(held),
        size_(size_of(c.dtype)),
        vectors_(c.aligned && c.group_channels() % (16 / size_) == 0) {
    const Ceilings ceilings = ceilings_of(device);
    bytes_ = ceilings.bytes;
    clock_ = ceilings.cached / (kSharedBytes * device.processors);
    operations_ = ceilings.operations * ceilings.mma_sync / device.processors / clock_ * 2 / size_;
    steps_ = ceil_divide(c.windows.taps() * c.group_channels() * size_, kConvStepBytes);
  }

  // blocks == 0 if there is none.
  ConvPlan plan() const {
    ConvPlan best{};
    const int tiles = vectors_ && size_ == 2 ? kConvTileCount : kConvTilesForAll;
    for (int i = 0; i < tiles; ++i) {
      for (int stages = kFewestStages; stages <= kMostStages; ++stages) {
        for (const int splits : {1, 2, 3, 4, 6, 8, 12, 16}) {
          if (splits > steps_) break;
          // None without a step.
          const ConvPlan plan = cut(kConvTiles[i], stages, static_cast<int>(ceil_divide(steps_, ceil_divide(steps_, splits))));
          if (plan.blocks && (!best.blocks || plan.seconds < best.seconds)) best = plan;
        }
      }
    }
    return best;
  }

 private:
  ConvPlan cut(const ConvTile& tile, int stages, int splits) const {
    const int64_t pixels = c_.pixels();
    ConvPlan plan{};
    plan.way = Way::sm80;
    plan.held = held_;
    plan.rows = tile.rows;
    plan.columns = tile.columns;
    plan.stages = stages;
    plan.cluster = 1;
    plan.splits = splits;
    plan.used = splits > 1 ? kJoinedRows : tile.rows;
    int64_t height = tile.rows;
    if (held_) {
      if (pixels > (splits > 1 ? kJoinedMap : tile.rows)) return {};
      plan.samples = static_cast<int>(std::max<int64_t>(plan.used / pixels, 1));
      plan.used = static_cast<int>(plan.samples * pixels);
      if (splits == 1) height = plan.used;
    } else if (c_.centred && splits > 1) {
      return {};
    }
    plan.blocks = ceil_divide(c_.rows(), height) * ceil_divide(c_.group_filters(), tile.columns) * c_.groups * splits;
    plan.shared = shared_memory_of(tile, stages, splits > 1 ? 0 : plan.samples);
    if (splits > 1) plan.workspace = splits * c_.rows() * split_pitch(tile, c_.group_filters(), c_.groups) * 4;
    if (plan.shared > device_.shared_memory || plan.workspace > kMostWorkspace) return {};
    plan.seconds = std::max(clocks_of_tiles(tile, plan) / clock_, moved() / bytes_) + clocks_of_others(plan) / clock_;
    if (c_.centred && !held_) plan.seconds += input_bytes() / bytes_;
    return plan;
  }

  double input_bytes() const { return double(c_.samples) * c_.input_pixels() * c_.channels * size_; }
  double moved() const {
    const double output = double(c_.rows()) * c_.filters;
    const double weights = double(c_.filters) * c_.windows.taps() * c_.group_channels();
    return input_bytes() + (weights + output) * size_ + output / 8;
  }

  double clocks_of_tiles(const ConvTile& tile, const ConvPlan& plan) const {
    const double stage = bytes_of_stage(tile), elements = stage / size_;
    const double products = 2.0 * tile.rows * tile.columns * (kConvStepBytes / size_) / operations_;
    const double read = double(kConvStepBytes) * (tile.rows * (tile.columns / tile.warp_columns) +
                                                  tile.columns * (tile.rows / tile.warp_rows));
    const double shared = (stage + read + (vectors_ ? 0 : elements * kElementBytes)) / kSharedBytes;
    const double step = std::max({products, shared, stage / kCachedBytes});
    const double steps = ceil_divide(steps_, plan.splits);
    const double epilogue = tile.rows * tile.columns * kEpilogueBytes / kSharedBytes, work = steps * step + epilogue;
    // A block cannot be faster than its loads come, of which all stages but one are under way.
    const double alone =
        steps * std::max(step, kLoadLatency / (vectors_ ? plan.stages - 1 : 1)) + epilogue + kTileLatency;
    // Blocks of a multiprocessor take turns, and one hides what another waits for.
    const int64_t resident =
        std::clamp<int64_t>((device_.shared_memory + 1024) / (plan.shared + 1024), 1, resident_blocks(tile, vectors_));
    const auto wave = [&](int64_t blocks) { return std::max(blocks * work, alone); };
    const int64_t room = resident * device_.processors, rest = plan.blocks % room;
    return plan.blocks / room * wave(resident) + (rest ? wave(ceil_divide(rest, device_.processors)) : 0);
  }

  // What runs before or after, but for reading the input: window means and their product, or the sum of splits.
  double clocks_of_others(const ConvPlan& plan) const {
    const double cached = kCachedBytes * device_.processors;
    if (plan.splits > 1) return 2.0 * plan.workspace / cached + kLaunchLatency;
    if (!c_.centred || held_) return 0;
    const double terms = double(c_.windows.taps()) * c_.group_channels();
    const int64_t blocks = ceil_divide(c_.samples, 32) * ceil_divide(c_.group_filters(), 32) * c_.groups;
    const double traffic = 32 * terms * (4 + size_) / kCachedBytes, latency = terms / 256 * kLoadLatency;
    return ceil_divide(blocks, device_.processors) * std::max(traffic, latency) + 2 * kLaunchLatency;
  }

  ConvCase c_;
  Device device_;
  bool held_;
  int size_;
  bool vectors_;
  double bytes_;       // a second, from memory
  double clock_;       // a second
  double operations_;  // a clock and multiprocessor
  int64_t steps_;
};

}  // namespace

std::optional<std::string> why_not_sm80(const ConvCase& c, const Device& device, bool held) {
  constexpr double kMostBytes = int64_t(1) << 35;
  if (c.dtype == Dtype::f64) return "tensor cores take no float64";
  if (c.dtype == Dtype::f32 && !c.tf32) {
    return "float32 without TF32 (torch.backends.cudnn.allow_tf32) is none for tensor cores";
  }
  if (c.groups > 1 && c.group_filters() % 8) return "groups have filters that are no multiple of 8";
  if (tap_bits(c.windows) > kMostTapBits) {
    return "the kernel has more than " + std::to_string(kMostTapBits) + " taps along its padded dimensions";
  }
  if (std::max(c.rows(), c.samples * c.input_pixels()) > kMostConvRows) {
    return "input or output have more than " + std::to_string(kMostConvRows) + " pixels";
  }
  // Offsets count from where the first tap sees the first pixel, and may go as far behind the last.
  double reach = 0, plane = 1;
  for (int d = 2; d >= 0; --d) {
    reach += (c.windows.padding[d] + c.windows.dilation[d] * double(c.windows.kernel[d] - 1)) * plane;
    plane *= c.windows.size[d];
  }
  const double seen = double(c.samples) * plane + reach, terms = double(c.windows.taps()) * c.group_channels();
  if (seen > kMostConvRows || terms > kMostConvRows) {
    return "padding and dilation, or the kernel, reach over more than " + std::to_string(kMostConvRows) + " pixels";
  }
  if (std::max(seen * c.channels, c.filters * terms) * size_of(c.dtype) >= kMostBytes) {
    return "input with its padding, or weight, have 32 GiB or more";
  }
  if (held && c.pixels() > kJoinedMap) {
    return "a map of the output has more than " + std::to_string(kJoinedMap) + " pixels";
  }
  if (Planner(c, device, held).plan().blocks == 0) {
    return held ? "no tile holds a map of the output" : "the GPU has too little shared memory for a tile";
  }
  return std::nullopt;
}

ConvPlan plan_sm80(const ConvCase& c, const Device& device, bool held) { return Planner(c, device, held).plan(); }

}  // namespace deepcontrol::cuda
