// Convolutions by 3 x 3 taps at stride one after Winograd: which they are, memory and threads; the arithmetic is in
// winograd_impl.h.

#include "common.h"
#include "winograd.h"
#include "workspace.h"

#include <ATen/ops/empty_like.h>

#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace deepcontrol::cpu {

#if defined(__x86_64__)
namespace winograd_avx512 {
extern const WinogradKernels table;
}
namespace winograd_avx2 {
extern const WinogradKernels table;
}
#endif

const WinogradKernels* winograd_kernels() {
#if defined(__x86_64__)
  const std::string_view isa = isa_name();
  if (isa.substr(0, 6) == "avx512") return &winograd_avx512::table;
  if (isa == "avx2") return &winograd_avx2::table;
#endif
  return nullptr;
}

bool has_matrix_unit() {
#if defined(__x86_64__)
  constexpr unsigned kAmxBFloat16 = 1u << 22;
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBFloat16);
  }();
  return has;
#else
  return false;
#endif
}

// Of a core's second-level cache, for a block's operands and products.
static constexpr int64_t kBlockBytes = 640 * 1024;
// Products of more tiles with a panel of filters leave that cache far behind.
static constexpr int64_t kMostTilesOfPanel = 256;

// The weight dense in its own memory format, and its strides, which a size of one leaves undefined in the tensor.
struct DenseWeight {
  Tensor tensor;
  int64_t filter_stride, channel_stride, tap_stride;

  DenseWeight(const Tensor& weight, at::ScalarType type)
      : tensor(weight.to(type).contiguous(format_of(weight))) {
    const bool innermost = format_of(weight) != at::MemoryFormat::Contiguous;
    filter_stride = weight.size(1) * 9;
    channel_stride = innermost ? 1 : 9;
    tap_stride = innermost ? weight.size(1) : 1;
  }
};

static int64_t padded_bytes(const Tensor& tensor) { return (tensor.numel() * tensor.element_size() + 63) / 64 * 64; }

// A tensor's maps in channels_last: its own memory, or where that is contiguous `memory` of padded_bytes() to transpose from or
// to.
struct ChannelsLast {
  const Tensor& tensor;
  void* memory;

  ChannelsLast(const Tensor& tensor, at::MemoryFormat format, char*& memory) : tensor(tensor), memory(nullptr) {
    if (format != at::MemoryFormat::Contiguous) return;
    this->memory = memory;
    memory += padded_bytes(tensor);
  }
  static int64_t bytes(const Tensor& tensor, at::MemoryFormat format) {
    return format == at::MemoryFormat::Contiguous ? padded_bytes(tensor) : 0;
  }

  const void* read() const {
    if (!memory) return data(tensor);
    run(tensor.size(1), pixels_of(tensor), data(tensor), memory);
    return memory;
  }
  void* to_write() const { return memory ? memory : mutable_data(tensor); }
  void written() const {
    if (memory) run(pixels_of(tensor), tensor.size(1), memory, mutable_data(tensor));
  }

 private:
  void run(int64_t rows, int64_t columns, const void* from, void* to) const {
    const Transposition p{dtype_of(tensor), tensor.size(0), rows, columns, from, to};
    for_tasks(p.tasks(), Transposition::kRows * columns,
              [&](int64_t begin, int64_t end) { winograd_kernels()->transpose(p, begin, end); });
  }
};

static void describe_maps(WinogradMaps& p, const Tensor& input, const Tensor& output, at::IntArrayRef padding) {
  p.dtype = dtype_of(input);
  p.samples = input.size(0);
  p.channels = input.size(1);
  p.filters = output.size(1);
  p.height = input.size(2);
  p.width = input.size(3);
  p.out_height = output.size(2);
  p.out_width = output.size(3);
  std::copy(padding.begin(), padding.end(), p.padding);
}

static void run_forward(const Tensor& input, const WinogradWeights& weight, const Tensor& output,
                        at::IntArrayRef padding, at::MemoryFormat format) {
  const WinogradKernels& run = *winograd_kernels();
  WinogradForward p{};
  describe_maps(p, input, output, padding);
  p.tile = winograd_tile(p.dtype, std::min(p.channels * p.height * p.width, p.filters * p.out_height * p.out_width),
                         format != at::MemoryFormat::Contiguous);
  p.weight = weight;
  p.weight.dtype = p.dtype;
  p.weight.tile = p.tile;
  p.weight.channels = p.channels;
  p.weight.filters = p.filters;
  p.slots = at::get_num_threads();
  p.block = p.tiles();
  // What is transformed before is written to memory and read back.
  p.by_panels = p.input_elements() < p.weight.elements() && p.tiles() <= kMostTilesOfPanel && p.weight.panels() >= p.slots;
  const int64_t before = p.by_panels ? p.input_elements() : p.weight.elements();
  if (!p.by_panels) {
    p.block = 6;
    const int64_t bytes = p.scratch_elements() * int64_t(sizeof(float));
    const int64_t most = (p.tiles() + p.slots - 1) / p.slots;
    p.block = std::clamp<int64_t>(kBlockBytes / bytes * 6, std::min<int64_t>(24, most), std::min<int64_t>(96, most));
  }
  const int64_t copies = ChannelsLast::bytes(input, format) + ChannelsLast::bytes(output, format);
  const Workspace workspace(copies + (before + p.slots * p.scratch_elements()) * int64_t(sizeof(float)));
  char* memory = static_cast<char*>(workspace.data());
  const ChannelsLast from(input, format, memory), to(output, format, memory);
  p.input = from.read();
  p.output = to.to_write();
  float* transformed = reinterpret_cast<float*>(memory);
  p.scratch = transformed + before;
  if (p.by_panels) {
    p.inputs = transformed;
    for_tasks(p.tiles(), p.channels * p.tile.points(), [&](int64_t begin, int64_t end) { run.inputs(p, begin, end); });
  } else {
    p.weight.transformed = transformed;
    for_tasks(p.weight.tasks(), WinogradRows::kPanel * WinogradWeights::kChannels * p.tile.points(),
              [&](int64_t begin, int64_t end) { run.weights(p.weight, begin, end); });
  }
  at::parallel_for(0, p.slots, 1, [&](int64_t begin, int64_t end) { run.forward(p, begin, end); });
  to.written();
}

Tensor winograd_convolution(const Tensor& input, const Tensor& weight, at::MemoryFormat format, at::IntArrayRef padding) {
  const Tensor x = input.contiguous(format);
  const DenseWeight dense(weight, x.scalar_type());
  const Tensor output =
      at::empty({x.size(0), weight.size(0), x.size(2) + 2 * padding[0] - 2, x.size(3) + 2 * padding[1] - 2},
                x.options().memory_format(format));
  WinogradWeights w{};
  w.filter_stride = dense.filter_stride;
  w.channel_stride = dense.channel_stride;
  w.tap_stride = dense.tap_stride;
  w.weight = data(dense.tensor);
  run_forward(x, w, output, padding, format);
  return output;
}

Tensor winograd_input_grad(const Tensor& grad_output, const Tensor& weight, at::IntArrayRef input_sizes,
                           at::MemoryFormat format, at::IntArrayRef padding) {
  const Tensor error = grad_output.contiguous(format);
  const DenseWeight dense(weight, error.scalar_type());
  const Tensor grad = at::empty(input_sizes, error.options().memory_format(format));
  WinogradWeights w{};
  w.filter_stride = dense.channel_stride;
  w.channel_stride = dense.filter_stride;
  w.tap_stride = dense.tap_stride;
  w.flipped = true;
  w.weight = data(dense.tensor);
  run_forward(error, w, grad, {2 - padding[0], 2 - padding[1]}, format);
  return grad;
}

Tensor winograd_weight_grad(const Tensor& grad_output, const Tensor& input, const Tensor& weight, at::MemoryFormat format,
                            at::IntArrayRef padding) {
  const Tensor error = grad_output.contiguous(format);
  const Tensor x = input.contiguous(format);
  const DenseWeight dense(weight, weight.scalar_type());
  const Tensor grad = at::empty_like(dense.tensor);
  WinogradWeightGrad p{};
  describe_maps(p, x, error, padding);
  p.tile = winograd_weight_grad_tile(p.dtype);
  p.weight_dtype = dtype_of(grad);
  p.filter_stride = dense.filter_stride;
  p.channel_stride = dense.channel_stride;
  p.tap_stride = dense.tap_stride;
  // A part of the tiles of its own for each thread, unless the sums are so large that threads had better share the filters:
  // transforming the inputs again for each group is then cheap.
  constexpr int64_t kSumsBytes = int64_t(1) << 21, kFewTiles = 256;
  const int64_t threads = at::get_num_threads();
  p.groups = std::clamp<int64_t>(p.sums_elements() * int64_t(sizeof(float)) / kSumsBytes, 1, threads);
  p.parts = std::clamp<int64_t>(threads / p.groups, 1, p.tiles());
  const bool at_once = p.parts == 1 && p.tiles() <= kFewTiles;
  p.block = std::min<int64_t>(at_once ? kFewTiles : 128, (p.tiles() + p.parts - 1) / p.parts);
  const int64_t sums = at_once ? 0 : p.parts * p.sums_elements();
  const int64_t copies = ChannelsLast::bytes(x, format) + ChannelsLast::bytes(error, format);
  const Workspace workspace(copies + (p.slots() * p.scratch_elements() + sums) * int64_t(sizeof(float)));
  char* memory = static_cast<char*>(workspace.data());
  p.input = ChannelsLast(x, format, memory).read();
  p.error = ChannelsLast(error, format, memory).read();
  p.scratch = reinterpret_cast<float*>(memory);
  p.sums = at_once ? nullptr : p.scratch + p.slots() * p.scratch_elements();
  p.grad = mutable_data(grad);
  const WinogradKernels& run = *winograd_kernels();
  at::parallel_for(0, p.slots(), 1, [&](int64_t begin, int64_t end) { run.weight_grad(p, begin, end); });
  if (p.sums) {
    for_tasks(p.filters, p.parts * p.channels * p.tile.points(),
              [&](int64_t begin, int64_t end) { run.weight_grad_finish(p, begin, end); });
  }
  return grad;
}

}  // namespace deepcontrol::cpu
