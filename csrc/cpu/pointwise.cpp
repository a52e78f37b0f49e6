// The fused convolution by one tap: packing, map means from the input's means, one pass for everything else.

#include "common.h"
#include "workspace.h"

#include <ATen/ops/empty_like.h>

namespace deepcontrol::cpu {

bool is_fused_pointwise(const Tensor& input, const Tensor& weight, at::MemoryFormat format, at::IntArrayRef stride,
                        at::IntArrayRef padding, int64_t groups, bool centred) {
  if (!kernels().pointwise_forward || groups != 1 || pixels_of(weight) != 1) return false;
  if (input.numel() == 0 || weight.numel() == 0) return false;
  const auto is = [](int64_t value) { return [value](int64_t v) { return v == value; }; };
  if (!std::all_of(stride.begin(), stride.end(), is(1)) || !std::all_of(padding.begin(), padding.end(), is(0))) return false;
  const int64_t channels = input.size(1);
  if (format == at::MemoryFormat::Contiguous && pixels_of(input) > 1) return false;
  if (channels == 1 || weight.size(0) == 1 || weight.size(1) != channels) return false;
  if (centred && channels > weight.size(0)) return false;
  if (input.scalar_type() == at::kFloat) return true;
  // bfloat16 is multiplied in pairs of channels forward and of filters backward.
  return input.scalar_type() == at::kBFloat16 && kernels().pointwise_bf16 && channels % 2 == 0 && weight.size(0) % 2 == 0;
}

// map_mean, (N, O), from the sums of the input over its maps.
static Tensor mean_of_product(const Tensor& x, const Tensor& weight, at::MemoryFormat format, const Tensor& gain) {
  const Tensor sums = center_error(x, {}, {}, {}, 0.0, {}, Activation::identity, 0.0, format, {false, false, true, false}).sums;
  PointwiseMean p{};
  p.dtype = dtype_of(x);
  p.samples = x.size(0);
  p.pixels = pixels_of(x);
  p.channels = x.size(1);
  p.filters = weight.size(0);
  p.weight = data(weight);
  p.sums = data(sums);
  p.gain = data(gain);
  const Tensor map_mean = at::empty({p.samples, p.filters}, sums.options());
  p.map_mean = mutable_data(map_mean);
  for_tasks(p.filters, p.samples * p.channels,
            [&](int64_t begin, int64_t end) { kernels().pointwise_mean(p, begin, end); });
  return map_mean;
}

// Bytes of the packed weight; the panels run over filters, transposed over channels.
static int64_t packed_bytes(const Tensor& weight, bool transposed) {
  constexpr int64_t kPanel = PointwiseForward::kPanel;
  const int64_t outer = weight.size(transposed ? 1 : 0), inner = weight.size(transposed ? 0 : 1);
  return (outer + kPanel - 1) / kPanel * kPanel * inner * weight.element_size();
}

static void pack(const Tensor& weight, bool transposed, void* packed) {
  constexpr int64_t kPanel = PointwiseForward::kPanel;
  const PackWeight p{dtype_of(weight), transposed, weight.size(0), weight.size(1), data(weight), packed};
  const int64_t outer = transposed ? p.channels : p.filters, inner = transposed ? p.filters : p.channels;
  for_tasks((outer + kPanel - 1) / kPanel, kPanel * inner,
            [&](int64_t begin, int64_t end) { kernels().pack_weight(p, begin, end); });
}

Convolved fused_pointwise(const Tensor& input, const Tensor& weight, at::MemoryFormat format, const Tensor& gain,
                          const Tensor& mean_scale, double constant, const Tensor& bias, const OptionalTensor& residual,
                          Activation activation, double slope, bool save) {
  const Tensor x = input.contiguous(format);
  const Tensor w = weight.contiguous();  // one tap: the same in every memory format
  PointwiseForward p{};
  p.dtype = dtype_of(x);
  p.activation = activation;
  p.slope = slope;
  p.samples = x.size(0);
  p.pixels = pixels_of(x);
  p.channels = x.size(1);
  p.filters = w.size(0);

  Convolved result;
  auto shape = x.sizes().vec();
  shape[1] = p.filters;
  result.output = at::empty(shape, x.options().memory_format(format));
  result.centred.saved = saved_for(result.output, format, activation, save);
  const auto vectors = x.options().dtype(accumulation_type(x)).memory_format(std::nullopt);
  Tensor shift;
  if (mean_scale.defined() || constant != 0.0) {
    result.centred.map_mean = mean_of_product(x, w, format, gain);
    shift = mean_scale.defined() ? result.centred.map_mean * mean_scale : result.centred.map_mean * constant;
    shift.neg_();
    if (bias.defined()) shift.add_(bias);
  } else {
    result.centred.map_mean = at::empty({0}, vectors);
    if (bias.defined()) shift = bias.expand({p.samples, p.filters}).contiguous();
  }
  const Workspace packed(packed_bytes(w, false));
  pack(w, false, packed.data());
  const Tensor dense_residual = residual_of(residual, result.output, format);

  // A task's rows of the input should stay in the second-level cache while panel after panel of filters passes; where
  // there are fewer such tiles than threads, the panels are shared out too.
  constexpr int64_t kTileBytes = 128 * 1024, kLeastRows = 24, kMostRows = 96;
  p.rows = std::clamp(kTileBytes / (p.channels * x.element_size()) / 6 * 6, kLeastRows, kMostRows);
  const int64_t threads = at::get_num_threads();
  p.panels = p.samples * p.row_tiles() >= threads ? p.all_panels() : (p.all_panels() + threads - 1) / threads;
  p.input = data(x);
  p.weight = packed.data();
  p.gain = data(gain);
  p.shift = data(shift);
  p.residual = data(dense_residual);
  p.output = mutable_data(result.output);
  if (save && is_piecewise(activation)) p.bits = result.centred.saved.mutable_data_ptr<uint8_t>();
  if (save && is_smooth(activation)) p.pre_activation = mutable_data(result.centred.saved);
  for_tasks(p.tasks(), p.rows * p.panels * PointwiseForward::kPanel * p.channels,
            [&](int64_t begin, int64_t end) { kernels().pointwise_forward(p, begin, end); });
  return result;
}

bool is_fused_pointwise_backward(const Tensor& input, const Tensor& weight, at::MemoryFormat format,
                                 at::IntArrayRef stride, at::IntArrayRef padding, int64_t groups) {
  if (!is_fused_pointwise(input, weight, format, stride, padding, groups, false)) return false;
  constexpr int64_t kMostPartialBytes = int64_t(1) << 27;
  const int64_t threads = at::get_num_threads();
  return input.size(0) * pixels_of(input) >= threads * PointwiseBackward::kRows &&
         threads * weight.numel() * int64_t(sizeof(float)) <= kMostPartialBytes;
}

PointwiseGrads fused_pointwise_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                        at::MemoryFormat format, const Tensor& scale, const Tensor& mean_scale,
                                        double constant, const Tensor& saved, Activation activation, double slope,
                                        bool wants_input, bool wants_weight, bool wants_residual) {
  const Tensor grad = grad_output.contiguous(format), x = input.contiguous(format), w = weight.contiguous();
  PointwiseGrads result;
  // One read of grad_output for the sums, a second for everything else.
  result.sums =
      center_error(grad, {}, {}, {}, 0.0, saved, activation, slope, format, {false, false, true, false}).sums;
  PointwiseBackward p{};
  p.dtype = dtype_of(x);
  p.activation = activation;
  p.slope = slope;
  p.samples = x.size(0);
  p.pixels = pixels_of(x);
  p.channels = x.size(1);
  p.filters = w.size(0);
  Tensor removed;
  if (mean_scale.defined() || constant != 0.0) {
    removed = mean_scale.defined() ? result.sums * mean_scale : result.sums * constant;
    removed.div_(p.pixels);
  }
  if (wants_input) result.grad_input = at::empty_like(x);
  if (wants_weight) result.grad_weight = at::empty_like(w);
  if (wants_residual) result.grad_residual = at::empty_like(grad);

  p.slots = at::get_num_threads();
  const int64_t partial_bytes = wants_weight ? p.slots * w.numel() * int64_t(sizeof(float)) : 0;
  const int64_t scratch_bytes = p.slots * p.scratch_bytes();
  const Workspace workspace(partial_bytes + scratch_bytes + (wants_input ? packed_bytes(w, true) : 0));
  p.grad_output = data(grad);
  if (is_piecewise(activation)) p.bits = saved.const_data_ptr<uint8_t>();
  if (is_smooth(activation)) p.pre_activation = data(saved);
  p.input = data(x);
  p.scale = data(scale);
  p.removed = data(removed);
  p.grad_input = mutable_data(result.grad_input);
  p.grad_residual = mutable_data(result.grad_residual);
  p.partials = wants_weight ? static_cast<float*>(workspace.data()) : nullptr;
  p.scratch = static_cast<char*>(workspace.data()) + partial_bytes;
  if (wants_input) {
    void* packed = static_cast<char*>(p.scratch) + scratch_bytes;
    pack(w, true, packed);
    p.weight = packed;
  }
  at::parallel_for(0, p.slots, 1, [&](int64_t begin, int64_t end) { kernels().pointwise_backward(p, begin, end); });
  if (wants_weight) {
    AddPartials add{p.dtype, p.slots, p.filters, p.channels, p.partials, mutable_data(result.grad_weight)};
    for_tasks(p.filters, p.slots * p.channels, [&](int64_t begin, int64_t end) { kernels().add_partials(add, begin, end); });
  }
  return result;
}

}  // namespace deepcontrol::cpu
