// The depthwise convolution on CPU tensors: outputs, memory that lives inside a call, threads; the arithmetic is in
// depthwise_impl.h.

#include <ATen/ops/empty_like.h>

#include "common.h"
#include "workspace.h"

namespace deepcontrol::cpu {

static void describe(Depthwise& p, const Tensor& x, const Tensor& weight, const Tensor& output, at::MemoryFormat format,
                     at::IntArrayRef stride, at::IntArrayRef padding, const Tensor& mean_scale, double constant,
                     Activation activation, double slope) {
  p.dtype = dtype_of(x);
  p.activation = activation;
  p.slope = slope;
  p.constant = constant;
  p.centred = mean_scale.defined() || constant != 0.0;
  p.input_innermost = maps_of(x, format).channels_innermost;
  p.output_innermost = maps_of(output, format).channels_innermost;
  p.samples = x.size(0);
  p.channels = x.size(1);
  for (int d = 0; d < 2; ++d) {
    p.size[d] = x.size(d + 2);
    p.output[d] = output.size(d + 2);
    p.kernel[d] = weight.size(d + 2);
    p.stride[d] = stride[d];
    p.padding[d] = padding[d];
  }
  p.mean_scale = data(mean_scale);
  const int64_t elements = p.samples * p.channels * std::max(p.pixels(), p.output_pixels());
  p.slots = std::clamp<int64_t>(elements / kGrain, 1, at::get_num_threads());
}

static int64_t packed_floats(const Depthwise& p) { return p.padded_channels() * p.taps(); }

static void pack(Depthwise& p, const Tensor& weight, const Tensor& gain, float* packed) {
  kernels().pack_depthwise({p.dtype, dtype_of(weight), p.channels, p.taps(), data(weight), data(gain), packed});
  p.weight = packed;
}

Convolved direct_depthwise(const Tensor& input, const Tensor& weight, at::IntArrayRef output_sizes,
                           at::MemoryFormat format, at::IntArrayRef stride, at::IntArrayRef padding, const Tensor& gain,
                           const Tensor& mean_scale, double constant, const Tensor& bias, const OptionalTensor& residual,
                           Activation activation, double slope, bool save) {
  const Tensor x = input.contiguous(format), w = weight.contiguous();
  Convolved result;
  result.output = at::empty(output_sizes, x.options().memory_format(format));
  result.centred.saved = saved_for(result.output, format, activation, save);
  const Tensor dense_residual = residual_of(residual, result.output, format);
  DepthwiseForward p{};
  describe(p, x, w, result.output, format, stride, padding, mean_scale, constant, activation, slope);
  result.centred.map_mean =
      at::empty(p.centred ? at::IntArrayRef({p.samples, p.channels}) : at::IntArrayRef({0}), accumulation_options(x));
  p.input = data(x);
  p.residual = data(dense_residual);
  p.gain = data(gain);
  p.bias = data(bias);
  p.output_memory = mutable_data(result.output);
  p.map_mean = p.centred ? mutable_data(result.centred.map_mean) : nullptr;
  if (save && is_piecewise(activation)) p.bits = result.centred.saved.mutable_data_ptr<uint8_t>();
  if (save && is_smooth(activation)) p.pre_activation = mutable_data(result.centred.saved);
  const Workspace workspace((packed_floats(p) + p.slots * p.scratch_floats()) * int64_t(sizeof(float)));
  float* packed = static_cast<float*>(workspace.data());
  pack(p, w, {}, packed);
  p.scratch = packed + packed_floats(p);
  at::parallel_for(0, p.slots, 1, [&](int64_t begin, int64_t end) { kernels().depthwise_forward(p, begin, end); });
  return result;
}

DepthwiseGrads direct_depthwise_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                         at::MemoryFormat format, at::IntArrayRef stride, at::IntArrayRef padding,
                                         const Tensor& gain, const Tensor& mean_scale, double constant,
                                         const Tensor& saved, Activation activation, double slope, double projection,
                                         bool wants_input, bool wants_weight, bool wants_gain, bool wants_sums,
                                         bool wants_residual) {
  const Tensor grad = grad_output.contiguous(format), w = weight.contiguous();
  const Tensor x = input.contiguous(format);
  check_saved(saved, grad, format, activation);
  DepthwiseGrads result;
  DepthwiseBackward p{};
  describe(p, x, w, grad, format, stride, padding, mean_scale, constant, activation, slope);
  const auto vectors = accumulation_options(x);
  if (wants_input) result.grad_input = at::empty_like(x);
  if (wants_residual) result.grad_residual = at::empty_like(grad);
  if (wants_sums) result.sums = at::empty({p.samples, p.channels}, vectors);
  p.grad_output = data(grad);
  if (is_piecewise(activation)) p.bits = saved.const_data_ptr<uint8_t>();
  if (is_smooth(activation)) p.pre_activation = data(saved);
  p.input = wants_weight || wants_gain ? data(x) : nullptr;
  p.grad_input = mutable_data(result.grad_input);
  p.grad_residual = mutable_data(result.grad_residual);
  p.sums = mutable_data(result.sums);
  const int64_t partials = p.input ? p.samples * packed_floats(p) : 0;
  const Workspace workspace((packed_floats(p) + partials + p.slots * p.scratch_floats()) * int64_t(sizeof(float)));
  float* packed = static_cast<float*>(workspace.data());
  pack(p, w, gain, packed);
  p.partials = packed + packed_floats(p);
  p.scratch = p.partials + partials;
  at::parallel_for(0, p.slots, 1, [&](int64_t begin, int64_t end) { kernels().depthwise_backward(p, begin, end); });
  if (p.input) {
    if (wants_weight) result.grad_weight = at::empty_like(w);
    if (wants_gain) result.grad_gain = at::empty({p.channels}, vectors);
    const DepthwiseWeightGrad finish{dtype_of(w), p.samples, p.channels, p.taps(), projection, p.partials, data(w),
                                     data(gain), mutable_data(result.grad_weight), mutable_data(result.grad_gain)};
    for_tasks(finish.tasks(), p.samples * p.taps() * Depthwise::kMostLanes,
              [&](int64_t begin, int64_t end) { kernels().depthwise_weight_grad(finish, begin, end); });
  }
  return result;
}

}  // namespace deepcontrol::cpu
