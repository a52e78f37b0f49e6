// Convolutions by 3 x 3 taps at stride one after Winograd: which they are, memory and threads; the arithmetic is in
// winograd_impl.h.

#include "common.h"
#include "workspace.h"

#include <ATen/ops/empty_like.h>

namespace deepcontrol::cpu {

// Outputs that round no more than the library's: a tile of 4 x 4 would take a quarter fewer products and round three times as
// much. The weight gradient's sums, over all pixels, are the library's best, so its tile is the most exact one.
static constexpr WinogradTile kForwardTile{4, 2}, kWeightGradTile{2, 2};

// Of a core's second-level cache, for a block's operands and products.
static constexpr int64_t kBlockBytes = 640 * 1024;

// The weight dense in its own memory format, and its strides, which a size of one leaves undefined in the tensor.
struct DenseWeight {
  Tensor tensor;
  int64_t filter_stride, channel_stride, tap_stride;

  explicit DenseWeight(const Tensor& weight) : tensor(weight.contiguous(format_of(weight))) {
    const bool innermost = format_of(weight) != at::MemoryFormat::Contiguous;
    filter_stride = weight.size(1) * 9;
    channel_stride = innermost ? 1 : 9;
    tap_stride = innermost ? weight.size(1) : 1;
  }
};

static void describe_maps(WinogradMaps& p, const WinogradTile& tile, const Tensor& input, const Tensor& output,
                          at::IntArrayRef padding) {
  p.dtype = dtype_of(input);
  p.tile = tile;
  p.samples = input.size(0);
  p.channels = input.size(1);
  p.filters = output.size(1);
  p.height = input.size(2);
  p.width = input.size(3);
  p.out_height = output.size(2);
  p.out_width = output.size(3);
  std::copy(padding.begin(), padding.end(), p.padding);
}

static void run_forward(const Tensor& input, WinogradWeights w, const Tensor& output, at::IntArrayRef padding) {
  WinogradForward p{};
  describe_maps(p, kForwardTile, input, output, padding);
  w.tile = kForwardTile;
  w.channels = p.channels;
  w.filters = p.filters;
  p.slots = at::get_num_threads();
  p.block = 6;
  const int64_t bytes = p.scratch_elements() * int64_t(sizeof(float));
  const int64_t most = (p.tiles() + p.slots - 1) / p.slots;
  p.block = std::clamp<int64_t>(kBlockBytes / bytes * 6, std::min<int64_t>(24, most), std::min<int64_t>(96, most));
  const Workspace workspace((w.elements() + p.slots * p.scratch_elements()) * int64_t(sizeof(float)));
  w.transformed = static_cast<float*>(workspace.data());
  for_tasks(w.tasks(), WinogradWeights::kPanel * WinogradWeights::kChannels * p.tile.points(),
            [&](int64_t begin, int64_t end) { kernels().winograd.weights(w, begin, end); });
  p.weight = w.transformed;
  p.scratch = w.transformed + w.elements();
  p.input = data(input);
  p.output = mutable_data(output);
  at::parallel_for(0, p.slots, 1, [&](int64_t begin, int64_t end) { kernels().winograd.forward(p, begin, end); });
}

Tensor winograd_convolution(const Tensor& input, const Tensor& weight, at::IntArrayRef padding) {
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const DenseWeight dense(weight);
  const Tensor output =
      at::empty({x.size(0), weight.size(0), x.size(2) + 2 * padding[0] - 2, x.size(3) + 2 * padding[1] - 2},
                x.options().memory_format(at::MemoryFormat::ChannelsLast));
  WinogradWeights w{};
  w.filter_stride = dense.filter_stride;
  w.channel_stride = dense.channel_stride;
  w.tap_stride = dense.tap_stride;
  w.weight = dense.tensor.const_data_ptr<float>();
  run_forward(x, w, output, padding);
  return output;
}

Tensor winograd_input_grad(const Tensor& grad_output, const Tensor& weight, at::IntArrayRef input_sizes,
                           at::IntArrayRef padding) {
  const Tensor error = grad_output.contiguous(at::MemoryFormat::ChannelsLast);
  const DenseWeight dense(weight);
  const Tensor grad = at::empty(input_sizes, error.options().memory_format(at::MemoryFormat::ChannelsLast));
  WinogradWeights w{};
  w.filter_stride = dense.channel_stride;
  w.channel_stride = dense.filter_stride;
  w.tap_stride = dense.tap_stride;
  w.flipped = true;
  w.weight = dense.tensor.const_data_ptr<float>();
  run_forward(error, w, grad, {2 - padding[0], 2 - padding[1]});
  return grad;
}

Tensor winograd_weight_grad(const Tensor& grad_output, const Tensor& input, const Tensor& weight, at::IntArrayRef padding) {
  const Tensor error = grad_output.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const DenseWeight dense(weight);
  const Tensor grad = at::empty_like(dense.tensor);
  WinogradWeightGrad p{};
  describe_maps(p, kWeightGradTile, x, error, padding);
  p.filter_stride = dense.filter_stride;
  p.channel_stride = dense.channel_stride;
  p.tap_stride = dense.tap_stride;
  // A part of the tiles of its own for each thread, unless the sums are so large that threads had better share the filters:
  // transforming the inputs again for each group is then cheap.
  constexpr int64_t kSumsBytes = int64_t(1) << 21, kFewTiles = 256;
  const int64_t threads = at::get_num_threads();
  p.groups = std::clamp<int64_t>(p.sums_elements() * int64_t(sizeof(float)) / kSumsBytes, 1, threads);
  p.parts = std::max<int64_t>(threads / p.groups, 1);
  const bool at_once = p.parts == 1 && p.tiles() <= kFewTiles;
  p.block = std::min<int64_t>(at_once ? kFewTiles : 128, (p.tiles() + p.parts - 1) / p.parts);
  const int64_t sums = at_once ? 0 : p.parts * p.sums_elements();
  const Workspace workspace((p.slots() * p.scratch_elements() + sums) * int64_t(sizeof(float)));
  p.scratch = static_cast<float*>(workspace.data());
  p.sums = at_once ? nullptr : p.scratch + p.slots() * p.scratch_elements();
  p.input = data(x);
  p.error = data(error);
  p.grad = grad.mutable_data_ptr<float>();
  at::parallel_for(0, p.slots(), 1, [&](int64_t begin, int64_t end) { kernels().winograd.weight_grad(p, begin, end); });
  if (p.sums) {
    for_tasks(p.filters, p.parts * p.channels * p.tile.points(),
              [&](int64_t begin, int64_t end) { kernels().winograd.weight_grad_finish(p, begin, end); });
  }
  return grad;
}

}  // namespace deepcontrol::cpu
