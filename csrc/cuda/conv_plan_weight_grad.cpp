#include <algorithm>

#include "conv_plan.h"
#include "conv_weight_grad.h"

namespace deepcontrol::cuda {
namespace {

using namespace weight_grad;

// Of the input or the output, in all samples; some room is left below 2^31 for pixels behind the last.
constexpr int64_t kMostPixels = (int64_t{1} << 31) - (1 << 16);
// Of one axis with its padding, and of what a kernel or the strides reach over.
constexpr int64_t kLongestAxis = int64_t{1} << 30;
constexpr int64_t kMostTaps = 4096;
constexpr int64_t kMostElements = int64_t{1} << 28;

// Assumed where no data sheet says it: the second-level cache gives a multiprocessor a quarter of what the first does,
// and memory answers after a microsecond.
constexpr double kSecondLevel = 0.25;
constexpr double kLatency = 1e-6;

// Counted, for each element that is not loaded in a vector.
constexpr int kElementInstructions = 17;

int size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Times of a tile's step and of bytes, in seconds.
class Model {
 public:
  Model(const ConvCase& c, const Device& device) : c_(c), device_(device), ceilings_(ceilings_of(device)) {}

  bool vector_rows() const { return c_.aligned && c_.group_filters() % (16 / size_of(c_.dtype)) == 0; }
  bool vector_columns() const { return c_.aligned && c_.group_channels() % (16 / size_of(c_.dtype)) == 0; }

  // The best cut of the pixels among blocks for one tile.
  WeightGradPlan plan(const Tile& tile) const {
    const int64_t tiles = c_.groups * ceil_divide(c_.group_filters(), tile.rows) * ceil_divide(length(), tile.columns);
    const int64_t steps = ceil_divide(c_.rows(), step());
    WeightGradPlan best{};
    for (const int per_processor : {1, 2, 3, 4, 6, 8, 12, 16}) {
      const int64_t wanted = std::max<int64_t>(1, per_processor * device_.processors / tiles);
      const int64_t of_split = ceil_divide(steps, std::min(wanted, steps)), splits = ceil_divide(steps, of_split);
      if (best.blocks == tiles * splits) continue;
      WeightGradPlan plan{};
      plan.rows = tile.rows;
      plan.columns = tile.columns;
      plan.stages = kStages;
      plan.splits = static_cast<int>(splits);
      plan.of_split = of_split * step();
      plan.blocks = tiles * splits;
      plan.shared = shared_of(tile.rows, tile.columns);
      plan.workspace = splits * weights() * int64_t(sizeof(float));
      plan.seconds = seconds(tile, plan, of_split);
      if (best.blocks == 0 || plan.seconds < best.seconds) best = plan;
    }
    return best;
  }

 private:
  int64_t length() const { return c_.windows.taps() * c_.group_channels(); }
  int64_t weights() const { return c_.filters * length(); }
  int64_t step() const { return kStepBytes / size_of(c_.dtype); }

  // Of a multiprocessor that does nothing else: what is slowest of tensor cores, shared memory and what fills it.
  double seconds_of_step(const Tile& tile) const {
    const int64_t brought = int64_t(kStepBytes) * (tile.rows + tile.columns);
    const int64_t read = int64_t(kStepBytes) * (kWarpRows + warp_columns_of(tile.rows, tile.columns)) *
                         threads_of(tile.rows, tile.columns) / 32;
    // As many bytes take as many clocks, be they 16-bit numbers or TF32.
    const double operations = 2.0 * tile.rows * tile.columns * kStepBytes / 2;
    const double products = operations / (ceilings_.operations * ceilings_.mma_sync);
    const double shared = double(brought + read) / ceilings_.cached;
    const double filled = double(brought) / (ceilings_.cached * kSecondLevel);
    // A clock serves as many lanes as the caches give bytes.
    const int64_t elements = (vector_rows() ? 0 : tile.rows) + (vector_columns() ? 0 : tile.columns);
    const double issued = double(elements * step() * kElementInstructions) / ceilings_.cached;
    return std::max({products, shared, filled, issued}) * device_.processors;
  }

  double seconds(const Tile& tile, const WeightGradPlan& plan, int64_t steps) const {
    // A block costs a kibibyte more than it asks for.
    const int64_t resident =
        std::min<int64_t>(resident_of(tile.rows, tile.columns), (device_.shared_memory + 1024) / (plan.shared + 1024));
    const int64_t of_processor = ceil_divide(plan.blocks, device_.processors);
    const int64_t together = std::max<int64_t>(1, std::min(resident, of_processor));
    // Blocks that are few wait for their loads, which are a stage less ahead than there are.
    const double step = std::max(seconds_of_step(tile), kLatency / (kStages - 1) / double(together));
    const double waves = double(ceil_divide(of_processor, together));
    const double computed = double(of_processor * steps) * step + waves * kLatency;
    const int64_t operands = c_.samples * (c_.input_pixels() * c_.channels + c_.pixels() * c_.filters);
    const double moved = double(operands * size_of(c_.dtype) + plan.workspace) / ceilings_.bytes;
    // The second kernel, with the weight for dgain.
    const double finished = double(plan.workspace + 2 * weights() * size_of(c_.dtype)) / ceilings_.bytes + kLatency;
    return std::max(computed, moved) + finished;
  }

  const ConvCase& c_;
  const Device& device_;
  Ceilings ceilings_;
};

}  // namespace

std::optional<std::string> why_no_weight_grad(const ConvCase& c, const Device& device) {
  if (!c.channels_innermost) return "the maps are not in channels_last";
  if (c.dtype == Dtype::f64) return "tensor cores take no float64";
  if (c.dtype == Dtype::f32 && !c.tf32) {
    return "float32 without TF32 (torch.backends.cudnn.allow_tf32) is none for tensor cores";
  }
  if (device.capability < 80) return "the GPU is older than compute capability 8.0";
  if (c.groups > 1 && c.group_filters() % 8 != 0) return "groups have filters that are no multiple of 8";
  if (c.rows() * c.filters == 0 || c.samples * c.input_pixels() * c.channels == 0) return "there is nothing to compute";
  if (std::max({c.channels, c.filters, c.windows.taps() * c.group_channels()}) > kMostElements) {
    return "a pixel or a filter has more than " + std::to_string(kMostElements) + " elements";
  }
  if (c.windows.taps() > kMostTaps) return "the kernel has more than " + std::to_string(kMostTaps) + " taps";
  if (std::max(c.rows(), c.samples * c.input_pixels()) > kMostPixels) {
    return "input or output have more than " + std::to_string(kMostPixels) + " pixels";
  }
  for (int d = 0; d < 3; ++d) {
    const Windows& w = c.windows;
    const int64_t longest =
        std::max({w.size[d] + 2 * w.padding[d], w.output[d] * w.stride[d], w.kernel[d] * w.dilation[d]});
    if (longest > kLongestAxis) return "a padded axis is longer than " + std::to_string(kLongestAxis) + " pixels";
  }
  if (device.shared_memory < std::max(shared_of(kSmallest.rows, kSmallest.columns), kFinishedBytes)) {
    return "the GPU has too little shared memory for a tile";
  }
  return std::nullopt;
}

WeightGradPlan plan_weight_grad(const ConvCase& c, const Device& device) {
  const Model model(c, device);
  WeightGradPlan best{};
  for (const Tile& tile : kTiles) {
    const bool smallest = tile.rows == kSmallest.rows && tile.columns == kSmallest.columns;
    const bool vectors = model.vector_rows() && model.vector_columns();
    if (!smallest && (!vectors || shared_of(tile.rows, tile.columns) > device.shared_memory)) continue;
    const WeightGradPlan plan = model.plan(tile);
    if (best.blocks == 0 || plan.seconds < best.seconds) best = plan;
  }
  return best;
}

}  // namespace deepcontrol::cuda
