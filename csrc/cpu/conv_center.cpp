// conv_center and conv_center_backward on CPU tensors: each pass by the algorithm that conv_plan.h chooses.
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
#include "conv_plan.h"
#include "pointwise.h"
#include "workspace.h"

namespace deepcontrol::cpu {

// `sizes` are the output's.
static ConvCase case_of(const Tensor& input, const Tensor& weight, at::IntArrayRef sizes, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, at::MemoryFormat format,
                        bool centred) {
  ConvCase c{dtype_of(input), input.dim() - 2, input.size(0), input.size(1), weight.size(0), groups};
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t from = d - (3 - c.rank);
    const bool is_there = from >= 0;
    c.windows.size[d] = is_there ? input.size(from + 2) : 1;
    c.windows.output[d] = is_there ? sizes[from + 2] : 1;
    c.windows.kernel[d] = is_there ? weight.size(from + 2) : 1;
    c.windows.stride[d] = is_there ? stride[from] : 1;
    c.windows.padding[d] = is_there ? padding[from] : 0;
    c.windows.dilation[d] = is_there ? dilation[from] : 1;
  }
  c.channels_last = format != at::MemoryFormat::Contiguous;
  c.centred = centred;
  c.threads = at::get_num_threads();
  return c;
}

static Tensor library_convolution(const Tensor& input, const Tensor& weight, at::MemoryFormat format,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  int64_t groups) {
  const std::vector<int64_t> no_output_padding(stride.size(), 0);
  return at::convolution(dense(input), weight.to(input.scalar_type()), {}, stride, padding, dilation, false,
                         no_output_padding, groups)
      .contiguous(format);
}

static std::tuple<Tensor, Tensor, Tensor> conv_center(
    const Tensor& input, const Tensor& weight, const OptionalTensor& gain, const OptionalTensor& mean_scale,
    double constant, const OptionalTensor& bias, const OptionalTensor& residual, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, c10::string_view activation, double slope,
    bool save) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto sizes = output_sizes(input, weight, stride, padding, dilation, groups, true);
  const auto format = format_of(input, weight);
  const auto type = accumulation_type(input);
  const int64_t filters = weight.size(0);
  const auto act = parse_activation(activation);
  const Tensor gains = vector_of(gain, filters, type, "gain");
  const Tensor mean_scales = vector_of(mean_scale, filters, type, "mean_scale");
  const Tensor biases = vector_of(bias, filters, type, "bias");
  const bool is_centred = mean_scales.defined() || constant != 0.0;
  const ConvCase c = case_of(input, weight, sizes, stride, padding, dilation, groups, format, is_centred);
  Tensor z;
  switch (choose(Pass::forward, c).algorithm) {
    case Algorithm::product:
      if (is_planar(c)) {
        const Convolved result =
            fused_planar(input, weight, stride, gains, mean_scales, constant, biases, residual, act, slope, save);
        return {result.output, result.centred.map_mean, result.centred.saved};
      }
      if (!is_centred || is_mean_of_input_cheaper(c)) {
        const Convolved result = fused_pointwise(input, weight, format, stride, gains, mean_scales, constant, biases,
                                                 residual, act, slope, save);
        return {result.output, result.centred.map_mean, result.centred.saved};
      }
      z = pointwise_product(input, weight, format, stride);
      break;
    case Algorithm::winograd:
      z = winograd_convolution(input, weight, format, padding);
      break;
    case Algorithm::direct: {
      const Convolved result = direct_depthwise(input, weight, sizes, format, stride, padding, gains, mean_scales, constant,
                                                biases, residual, act, slope, save);
      return {result.output, result.centred.map_mean, result.centred.saved};
    }
    case Algorithm::two_passes:
      z = library_convolution(input, weight, format, stride, padding, dilation, groups);
      break;
  }
  const Centred centred =
      center_into(z, z, format, gains, mean_scales, constant, biases, residual, act, slope, save);
  if (gains.defined() && is_centred) scale_means(centred.map_mean, gains);
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

// What an algorithm is given for the backward pass.
struct Backward {
  const Tensor& grad_output;
  const Tensor& input;
  const Tensor& weight;         // the layer's
  const Tensor& scaled_weight;  // that grad_input is computed with, from dz' times `scale`
  at::MemoryFormat format;
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  const Tensor& gain;
  const Tensor& scale;  // of dz', and so of grad_weight
  const Tensor& mean_scale;
  double constant;
  const Tensor& saved;
  Activation activation;
  double slope;
  double projection;
  bool wants_input, wants_weight, wants_gain, wants_residual, wants_sums;

  bool wants_product() const { return wants_weight || wants_gain; }
};

struct Gradients {
  Tensor input, weight;
  Tensor sums, residual;
  Tensor gain = {};
  bool is_finished = false;  // the gradient of the weight is the layer's, and so is that of the gain
};

static Gradients backward_of_product(const Backward& b, bool planar) {
  PointwiseGrads grads =
      planar ? fused_planar_backward(b.grad_output, b.input, b.scaled_weight, b.stride, b.scale, b.mean_scale, b.constant,
                                     b.saved, b.activation, b.slope, b.wants_input, b.wants_product(), b.wants_residual)
             : fused_pointwise_backward(b.grad_output, b.input, b.scaled_weight, b.format, b.stride, b.scale, b.mean_scale,
                                        b.constant, b.saved, b.activation, b.slope, b.wants_input, b.wants_product(),
                                        b.wants_residual);
  return {grads.grad_input, grads.grad_weight, grads.sums, grads.grad_residual};
}

static Gradients backward_of_direct(const Backward& b) {
  DepthwiseGrads grads = direct_depthwise_backward(
      b.grad_output, b.input, b.weight, b.format, b.stride, b.padding, b.gain, b.mean_scale, b.constant, b.saved,
      b.activation, b.slope, b.projection, b.wants_input, b.wants_weight, b.wants_gain, b.wants_sums, b.wants_residual);
  return {grads.grad_input, grads.grad_weight, grads.sums, grads.grad_residual, grads.grad_gain, true};
}

// Computes dz', which is `convolve`'s to read and no one's to keep, and calls it: convolve(dz', gradients).
template <class F>
static Gradients backward_around(const Backward& b, F&& convolve) {
  const Tensor shape = at::empty(b.grad_output.sizes(), b.grad_output.options().device(at::kMeta).memory_format(b.format));
  const Workspace workspace(shape.numel() * shape.element_size());
  const Tensor memory = at::from_blob(workspace.data(), shape.sizes(), shape.strides(), b.grad_output.options());
  const CenteredError error =
      center_error(b.grad_output, {}, b.scale, b.mean_scale, b.constant, b.saved, b.activation, b.slope, b.format,
                   {true, b.wants_residual, b.wants_sums, false, memory});
  Gradients grads{{}, {}, error.sums, error.grad_residual};
  convolve(error.grad_input, grads);
  return grads;
}

static Gradients backward_of_two_passes(const Backward& b, bool unfolds) {
  return backward_around(b, [&](const Tensor& error, Gradients& grads) {
    const std::vector<int64_t> no_output_padding(b.stride.size(), 0);
    const bool by_library = b.wants_product() && !unfolds;
    if (b.wants_input || by_library) {
      std::tie(grads.input, grads.weight, std::ignore) = at::convolution_backward(
          error, dense(b.input), b.scaled_weight.to(b.input.scalar_type()), std::nullopt, b.stride, b.padding, b.dilation, false,
          no_output_padding, b.groups, {b.wants_input, by_library, false});
    }
    if (by_library) {
      grads.weight = grads.weight.to(b.weight.scalar_type());
    } else if (b.wants_product()) {
      grads.weight = unfolded_weight_grad(error, b.input, b.weight, b.stride, b.padding, b.dilation);
    }
  });
}

static Gradients backward_of_winograd(const Backward& b) {
  return backward_around(b, [&](const Tensor& error, Gradients& grads) {
    if (b.wants_input) grads.input = winograd_input_grad(error, b.scaled_weight, b.input.sizes(), b.format, b.padding);
    if (b.wants_product()) grads.weight = winograd_weight_grad(error, b.input, b.weight, b.format, b.padding);
  });
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_center_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const OptionalTensor& gain,
    const OptionalTensor& mean_scale, double constant, const Tensor& map_mean, const Tensor& saved,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    c10::string_view activation, double slope, double projection, std::array<bool, 6> mask) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto type = accumulation_type(input);
  const int64_t filters = weight.size(0);
  const bool wants_weight = mask[1] || mask[2], through_conv = mask[0] || wants_weight;
  const Tensor gains = vector_of(gain, filters, type, "gain");
  const SplitGain split(gains, input.scalar_type());
  const Tensor mean_scales = vector_of(mean_scale, filters, type, "mean_scale");
  const auto format = format_of(input, weight);
  const auto act = parse_activation(activation);
  const auto sizes = output_sizes(input, weight, stride, padding, dilation, groups, true);
  check_grad_output(grad_output, input, sizes);
  Tensor scaled_weight = weight;
  if (split.on_weight.defined() && mask[0]) {
    std::vector<int64_t> per_filter(weight.dim(), 1);
    per_filter[0] = filters;
    scaled_weight = (weight * split.on_weight.view(per_filter)).to(weight.scalar_type());
  }

  const bool wants_sums = mask[3] || mask[4];
  Gradients grads;
  if (through_conv) {
    const bool is_centred = mean_scales.defined() || constant != 0.0;
    const ConvCase c = case_of(input, weight, sizes, stride, padding, dilation, groups, format, is_centred);
    const Backward b{grad_output, input, weight, scaled_weight, format, stride, padding, dilation, groups, gains,
                     split.on_error, mean_scales, constant, saved, act, slope, projection, mask[0], mask[1], mask[2],
                     mask[5], wants_sums};
    switch (choose(Pass::backward, c).algorithm) {
      case Algorithm::product: grads = backward_of_product(b, is_planar(c)); break;
      case Algorithm::direct: grads = backward_of_direct(b); break;
      case Algorithm::winograd: grads = backward_of_winograd(b); break;
      case Algorithm::two_passes: grads = backward_of_two_passes(b, is_unfolded_better(c)); break;
    }
  } else {
    const CenteredError error = center_error(grad_output, {}, split.on_error, mean_scales, constant, saved, act, slope,
                                             format, {false, mask[5], wants_sums, false});
    grads = {{}, {}, error.sums, error.grad_residual};
  }

  Tensor grad_mean_scale, grad_bias;
  if (mask[0]) grads.input = grads.input.contiguous(format_of(input));
  if (wants_weight && !grads.is_finished) {
    grads.weight = grads.weight.contiguous(format_of(weight));
    grads.gain = finish_weight_grad(grads.weight, weight, split.on_weight, split.on_error, mask[1] ? projection : 0.0,
                                   mask[2]);
    if (!mask[1]) grads.weight.reset();
  }
  if (wants_sums) {
    reduce_samples(grads.sums, map_mean, mask[3] ? &grad_mean_scale : nullptr, mask[4] ? &grad_bias : nullptr);
  }
  return {grads.input, grads.weight, grads.gain, grad_mean_scale, grad_bias, grads.residual};
}

TORCH_LIBRARY_IMPL(deepcontrol, CPU, m) {
  m.impl("conv_center", conv_center);
  m.impl("conv_center_backward", conv_center_backward);
}

}  // namespace deepcontrol::cpu
