// conv_center and conv_center_backward on CPU tensors: oneDNN through ATen for the convolutions, center around it.
//
// On a CPU the gain rides on the activations, which the centring touches anyway, and not on the weights, where it would
// cost a pass and a copy of its own: forward multiplies z by it, backward multiplies dz' by it. So the library's weight
// gradient comes out multiplied by gain, and dgain = sum(weight * dw') divides it out again. Filters whose gain is too
// small to divide by, zero above all, go the other way round: their dz' stays as it is and their weights are scaled.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common.h"
#include "workspace.h"

namespace deepcontrol::cpu {

static std::tuple<Tensor, Tensor, Tensor> conv_center(
    const Tensor& input, const Tensor& weight, const OptionalTensor& gain, const OptionalTensor& mean_scale,
    double constant, const OptionalTensor& bias, const OptionalTensor& residual, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, c10::string_view activation, double slope,
    bool save) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  output_sizes(input, weight, stride, padding, dilation, groups, true);
  const auto format = format_of(input, weight);
  const auto type = accumulation_type(input);
  const int64_t filters = weight.size(0);
  const auto act = parse_activation(activation);
  const Tensor gains = vector_of(gain, filters, type, "gain");
  const Tensor mean_scales = vector_of(mean_scale, filters, type, "mean_scale");
  const Tensor biases = vector_of(bias, filters, type, "bias");
  const bool is_centred = mean_scales.defined() || constant != 0.0;
  Tensor z;
  if (is_pointwise(input, weight, format, padding, groups)) {
    if (!is_centred || is_mean_of_input_cheaper(weight)) {
      const Convolved result = fused_pointwise(input, weight, format, stride, gains, mean_scales, constant, biases,
                                               residual, act, slope, save);
      return {result.output, result.centred.map_mean, result.centred.saved};
    }
    z = pointwise_product(input, weight, format, stride);
  } else if (is_winograd(input, weight, format, stride, padding, dilation, groups)) {
    z = winograd_convolution(input, weight, padding);
  } else {
    const std::vector<int64_t> no_output_padding(stride.size(), 0);
    z = at::convolution(dense(input), weight.to(input.scalar_type()), {}, stride, padding, dilation, false,
                        no_output_padding, groups)
            .contiguous(format);
  }
  const Centred centred =
      center_into(z, z, format, gains, mean_scales, constant, biases, residual, act, slope, save);
  if (gains.defined() && is_centred) centred.map_mean.mul_(gains);
  return {z, centred.map_mean, centred.saved};
}

// dz' is multiplied by `on_error` and the weights by `on_weight`; their product is the gain.
struct SplitGain {
  Tensor on_error, on_weight;

  // `dtype` is that of the activations. In float16 a gradient times a small gain soon leaves the normal numbers.
  SplitGain(const Tensor& gain, at::ScalarType dtype) : on_error(gain) {
    const double least_divisor = dtype == at::kHalf ? 0.5 : 1.0 / 4096;
    if (!gain.defined()) return;
    gain.scalar_type() == at::kDouble ? split<double>(gain, least_divisor) : split<float>(gain, float(least_divisor));
  }

 private:
  template <class A>
  void split(const Tensor& gain, A least_divisor) {
    const A* gains = gain.const_data_ptr<A>();
    const int64_t filters = gain.numel();
    if (std::all_of(gains, gains + filters, [=](A g) { return std::abs(g) >= least_divisor; })) return;
    on_error = gain.clone();
    on_weight = at::ones_like(gain);
    A* error = on_error.mutable_data_ptr<A>();
    A* weight = on_weight.mutable_data_ptr<A>();
    for (int64_t o = 0; o < filters; ++o) {
      if (!(std::abs(gains[o]) >= least_divisor)) std::swap(error[o], weight[o]);
    }
  }
};

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_center_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const OptionalTensor& gain,
    const OptionalTensor& mean_scale, double constant, const Tensor& map_mean, const Tensor& saved,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    c10::string_view activation, double slope, double projection, std::array<bool, 6> mask) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto type = accumulation_type(input);
  const int64_t filters = weight.size(0);
  const bool wants_weight = mask[1] || mask[2], through_conv = mask[0] || wants_weight;
  const SplitGain split(vector_of(gain, filters, type, "gain"), input.scalar_type());
  const Tensor mean_scales = vector_of(mean_scale, filters, type, "mean_scale");
  const auto format = format_of(input, weight);
  const auto act = parse_activation(activation);
  check_grad_output(grad_output, input, output_sizes(input, weight, stride, padding, dilation, groups, true));
  Tensor scaled_weight = weight;
  if (split.on_weight.defined() && mask[0]) {
    std::vector<int64_t> per_filter(weight.dim(), 1);
    per_filter[0] = filters;
    scaled_weight = (weight * split.on_weight.view(per_filter)).to(weight.scalar_type());
  }

  Tensor grad_input, grad_weight, grad_gain, grad_mean_scale, grad_bias;
  Wanted wanted{through_conv, mask[5], mask[3] || mask[4], false};
  CenteredError error;
  if (through_conv && is_pointwise_backward(grad_output, input, weight, format, padding, groups)) {
    PointwiseGrads grads = fused_pointwise_backward(grad_output, input, scaled_weight, format, stride, split.on_error,
                                                    mean_scales, constant, saved, act, slope, mask[0], wants_weight,
                                                    mask[5]);
    grad_input = grads.grad_input;
    grad_weight = grads.grad_weight;
    error.sums = grads.sums;
    error.grad_residual = grads.grad_residual;
  } else {
    // dz' is the library's to read and no one's to keep.
    std::optional<Workspace> workspace;
    if (through_conv) {
      const Tensor shape = at::empty(grad_output.sizes(), grad_output.options().device(at::kMeta).memory_format(format));
      workspace.emplace(shape.numel() * shape.element_size());
      wanted.grad_input_memory =
          at::from_blob(workspace->data(), shape.sizes(), shape.strides(), grad_output.options());
    }
    error = center_error(grad_output, {}, split.on_error, mean_scales, constant, saved, act, slope, format, wanted);
    if (through_conv && is_winograd(input, weight, format, stride, padding, dilation, groups)) {
      if (mask[0]) grad_input = winograd_input_grad(error.grad_input, scaled_weight, input.sizes(), padding);
      if (wants_weight) grad_weight = winograd_weight_grad(error.grad_input, input, weight, padding);
    } else if (through_conv) {
      const bool unfolds = wants_weight && is_unfolded_better(error.grad_input, input, weight, format, groups);
      const std::vector<int64_t> no_output_padding(stride.size(), 0);
      if (mask[0] || !unfolds) {
        std::tie(grad_input, grad_weight, std::ignore) = at::convolution_backward(
            error.grad_input, dense(input), scaled_weight.to(input.scalar_type()), std::nullopt, stride, padding, dilation,
            false, no_output_padding, groups, {mask[0], wants_weight && !unfolds, false});
      }
      if (unfolds) {
        grad_weight = unfolded_weight_grad(error.grad_input, input, weight, stride, padding, dilation);
      } else if (wants_weight) {
        grad_weight = grad_weight.to(weight.scalar_type());
      }
    }
  }
  if (mask[0]) grad_input = grad_input.contiguous(format_of(input));
  if (wants_weight) {
    grad_weight = grad_weight.contiguous(format_of(weight));
    grad_gain = finish_weight_grad(grad_weight, weight, split.on_weight, split.on_error, mask[1] ? projection : 0.0,
                                   mask[2]);
    if (!mask[1]) grad_weight.reset();
  }
  if (mask[3] || mask[4]) {
    reduce_samples(error.sums, map_mean, mask[3] ? &grad_mean_scale : nullptr, mask[4] ? &grad_bias : nullptr);
  }
  return {grad_input, grad_weight, grad_gain, grad_mean_scale, grad_bias, error.grad_residual};
}

TORCH_LIBRARY_IMPL(deepcontrol, CPU, m) {
  m.impl("conv_center", conv_center);
  m.impl("conv_center_backward", conv_center_backward);
}

}  // namespace deepcontrol::cpu
