// The convolution by one tap, which is a matrix product over the pixels that its stride meets: packing, map means from the
// input's means where those are cheaper than the output's, one pass for everything else.

#include "pointwise.h"
#include "workspace.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/slice.h>

namespace deepcontrol::cpu {

Tensor met_pixels(const Tensor& x, at::IntArrayRef stride) {
  Tensor met = x;
  for (size_t d = 0; d < stride.size(); ++d) {
    if (stride[d] != 1) met = met.slice(int64_t(d) + 2, 0, std::nullopt, stride[d]);
  }
  return met;
}

Tensor mean_of_product(const Tensor& x, const Tensor& weight, at::MemoryFormat format, const Tensor& gain) {
  const Tensor sums = center_error(x, {}, {}, {}, 0.0, {}, Activation::identity, 0.0, format, {false, false, true, false}).sums;
  PointwiseMean p{};
  p.dtype = dtype_of(x);
  p.samples = x.size(0);
  p.pixels = pixels_of(x);
  p.channels = x.size(1);
  p.filters = weight.size(0);
  p.weight_dtype = dtype_of(weight);
  p.weight = data(weight);
  p.sums = data(sums);
  p.gain = data(gain);
  const Tensor map_mean = at::empty({p.samples, p.filters}, sums.options());
  p.map_mean = mutable_data(map_mean);
  for_tasks(p.filters, p.samples * p.channels,
            [&](int64_t begin, int64_t end) { kernels().pointwise_mean(p, begin, end); });
  return map_mean;
}

// Bytes of the weight packed for inputs of a dtype; the panels run over filters, transposed over channels.
static int64_t packed_bytes(const Tensor& weight, const Tensor& input, bool transposed) {
  constexpr int64_t kPanel = PointwiseForward::kPanel;
  const int64_t outer = weight.size(transposed ? 1 : 0), inner = weight.size(transposed ? 0 : 1);
  return (outer + kPanel - 1) / kPanel * kPanel * inner * input.element_size();
}

static void pack(const Tensor& weight, Dtype dtype, bool transposed, void* packed) {
  constexpr int64_t kPanel = PointwiseForward::kPanel;
  const PackWeight p{dtype, dtype_of(weight), transposed, weight.size(0), weight.size(1), data(weight), packed};
  const int64_t outer = transposed ? p.channels : p.filters, inner = transposed ? p.filters : p.channels;
  for_tasks((outer + kPanel - 1) / kPanel, kPanel * inner,
            [&](int64_t begin, int64_t end) { kernels().pack_weight(p, begin, end); });
}

// factor * mean_scale * means + bias, (N, O), float32. One loop, where a chain of ops costs more than its arithmetic.
static Tensor scaled_means(const Tensor& means, const Tensor& mean_scale, double constant, float factor,
                           const Tensor& bias) {
  const Tensor result = at::empty(means.sizes(), means.options());
  const int64_t samples = means.size(0), filters = means.size(1);
  const float* mean = means.const_data_ptr<float>();
  const float* scale = mean_scale.defined() ? mean_scale.const_data_ptr<float>() : nullptr;
  const float* added = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  float* to = result.mutable_data_ptr<float>();
  for (int64_t n = 0; n < samples; ++n, mean += filters, to += filters) {
    for (int64_t o = 0; o < filters; ++o) {
      to[o] = factor * mean[o] * (scale ? scale[o] : float(constant)) + (added ? added[o] : 0.0f);
    }
  }
  return result;
}

static PointwiseForward describe(const Tensor& x, const Tensor& w, const Tensor& output) {
  PointwiseForward p{};
  p.dtype = dtype_of(x);
  p.samples = x.size(0);
  p.pixels = pixels_of(x);
  p.channels = x.size(1);
  p.filters = w.size(0);
  p.input = data(x);
  p.output = mutable_data(output);
  return p;
}

static void run(PointwiseForward& p, const Tensor& x, const Tensor& w) {
  const Workspace packed(packed_bytes(w, x, false));
  pack(w, p.dtype, false, packed.data());
  p.weight = packed.data();
  // A task's rows of the input should stay in the second-level cache while panel after panel of filters passes; where
  // there are fewer such tiles than threads, the panels are shared out too.
  constexpr int64_t kTileBytes = 128 * 1024, kLeastRows = 24, kMostRows = 96;
  const int64_t rows = std::clamp(kTileBytes / (p.channels * x.element_size()), kLeastRows, kMostRows);
  const int64_t threads = at::get_num_threads();
  p.row_tiles = even_tiles(p.samples, (p.pixels + rows - 1) / rows, p.pixels / kLeastRows, threads);
  p.panels = p.samples * p.row_tiles >= threads ? p.all_panels() : (p.all_panels() + threads - 1) / threads;
  for_tasks(p.tasks(), rows * p.panels * PointwiseForward::kPanel * p.channels,
            [&](int64_t begin, int64_t end) { kernels().pointwise_forward(p, begin, end); });
}

Tensor between_zeros(const Tensor& met, const Tensor& input, at::MemoryFormat format, at::IntArrayRef stride) {
  if (met.sizes() == input.sizes()) return met;
  const Tensor everywhere = at::empty(input.sizes(), input.options().memory_format(format)).zero_();
  met_pixels(everywhere, stride).copy_(met);
  return everywhere;
}

static Tensor empty_output(const Tensor& x, const Tensor& w, at::MemoryFormat format) {
  auto shape = x.sizes().vec();
  shape[1] = w.size(0);
  return at::empty(shape, x.options().memory_format(format));
}

Tensor pointwise_product(const Tensor& input, const Tensor& weight, at::MemoryFormat format, at::IntArrayRef stride) {
  const Tensor x = met_pixels(input, stride).contiguous(format);
  const Tensor w = weight.contiguous();  // one tap: the same in every memory format
  const Tensor output = empty_output(x, w, format);
  PointwiseForward p = describe(x, w, output);
  run(p, x, w);
  return output;
}

Convolved fused_pointwise(const Tensor& input, const Tensor& weight, at::MemoryFormat format, at::IntArrayRef stride,
                          const Tensor& gain, const Tensor& mean_scale, double constant, const Tensor& bias,
                          const OptionalTensor& residual, Activation activation, double slope, bool save) {
  const Tensor x = met_pixels(input, stride).contiguous(format);
  const Tensor w = weight.contiguous();
  Convolved result;
  result.output = empty_output(x, w, format);
  result.centred.saved = saved_for(result.output, format, activation, save);
  const Tensor dense_residual = residual_of(residual, result.output, format);
  PointwiseForward p = describe(x, w, result.output);
  p.activation = activation;
  p.slope = slope;
  const auto vectors = x.options().dtype(accumulation_type(x)).memory_format(std::nullopt);
  Tensor shift;
  if (mean_scale.defined() || constant != 0.0) {
    result.centred.map_mean = mean_of_product(x, w, format, gain);
    shift = scaled_means(result.centred.map_mean, mean_scale, constant, -1, bias);
  } else {
    result.centred.map_mean = at::empty({0}, vectors);
    if (bias.defined()) shift = bias.expand({p.samples, p.filters}).contiguous();
  }
  p.gain = data(gain);
  p.shift = data(shift);
  p.residual = data(dense_residual);
  if (save && is_piecewise(activation)) p.bits = result.centred.saved.mutable_data_ptr<uint8_t>();
  if (save && is_smooth(activation)) p.pre_activation = mutable_data(result.centred.saved);
  run(p, x, w);
  return result;
}

PointwiseGrads fused_pointwise_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                        at::MemoryFormat format, at::IntArrayRef stride, const Tensor& scale,
                                        const Tensor& mean_scale, double constant, const Tensor& saved,
                                        Activation activation, double slope, bool wants_input, bool wants_weight,
                                        bool wants_residual) {
  const Tensor grad = grad_output.contiguous(format), x = met_pixels(input, stride).contiguous(format);
  const Tensor w = weight.contiguous();
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
    removed = scaled_means(result.sums, mean_scale, constant, 1 / float(p.pixels), {});
  }
  if (wants_input) result.grad_input = at::empty_like(x);
  if (wants_weight) result.grad_weight = at::empty_like(w);
  if (wants_residual) result.grad_residual = at::empty_like(grad);

  p.slots = at::get_num_threads();
  const int64_t partial_bytes = wants_weight ? p.slots * w.numel() * int64_t(sizeof(float)) : 0;
  const int64_t scratch_bytes = p.slots * p.scratch_bytes();
  const Workspace workspace(partial_bytes + scratch_bytes + (wants_input ? packed_bytes(w, x, true) : 0));
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
    pack(w, p.dtype, true, packed);
    p.weight = packed;
  }
  at::parallel_for(0, p.slots, 1, [&](int64_t begin, int64_t end) { kernels().pointwise_backward(p, begin, end); });
  if (wants_weight) {
    AddPartials add{dtype_of(w), p.slots, p.filters, p.channels, p.partials, mutable_data(result.grad_weight)};
    for_tasks(p.filters, p.slots * p.channels, [&](int64_t begin, int64_t end) { kernels().add_partials(add, begin, end); });
  }
  if (wants_input) result.grad_input = between_zeros(result.grad_input, input, format, stride);
  return result;
}

Tensor unfolded_weight_grad(const Tensor& grad_output, const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation) {
  constexpr auto format = at::MemoryFormat::ChannelsLast;
  const Tensor padded =
      at::constant_pad_nd(input.contiguous(format), {padding[1], padding[1], padding[0], padding[0]}).contiguous(format);
  const int64_t samples = input.size(0), channels = input.size(1), filters = weight.size(0);
  const int64_t columns = weight.numel() / filters, row = padded.stride(2), pixel = padded.stride(3);
  const Tensor unfolded =
      padded
          .as_strided({samples, grad_output.size(2), grad_output.size(3), weight.size(2), weight.size(3), channels},
                      {padded.stride(0), row * stride[0], pixel * stride[1], row * dilation[0], pixel * dilation[1], 1})
          .reshape({samples, grad_output.size(2), grad_output.size(3), columns})
          .permute({0, 3, 1, 2});
  const Tensor taps = weight.permute({0, 2, 3, 1}).reshape({filters, columns, 1, 1});
  return fused_pointwise_backward(grad_output, unfolded, taps, format, std::vector<int64_t>{1, 1}, {}, {}, 0.0, {},
                                  Activation::identity, 0.0, false, true, false)
      .grad_weight.view({filters, weight.size(2), weight.size(3), channels})
      .permute({0, 3, 1, 2});
}

}  // namespace deepcontrol::cpu
