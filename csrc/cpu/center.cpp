// center and center_backward on CPU tensors: layouts, outputs, threads; the arithmetic is in kernels_impl.h.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/flatten.h>
#include <ATen/ops/mean.h>
#include <torch/library.h>

#include "common.h"

namespace deepcontrol::cpu {

static Tensor partials_of(const Layout& layout, const at::TensorOptions& options) {
  return at::empty({layout.samples * layout.row_blocks(), layout.channels}, options);
}

template <class A>
static void add_row_blocks_as(const Layout& layout, const Tensor& partials, const Tensor& sums, A divisor) {
  const int64_t channels = layout.channels, row_blocks = layout.row_blocks();
  for_tasks(layout.samples, row_blocks * channels, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const A* part = partials.const_data_ptr<A>() + n * row_blocks * channels;
      A* sum = sums.mutable_data_ptr<A>() + n * channels;
      std::fill_n(sum, channels, A(0));
      for (int64_t block = 0; block < row_blocks; ++block, part += channels) {
        for (int64_t c = 0; c < channels; ++c) sum[c] += part[c];
      }
      for (int64_t c = 0; c < channels; ++c) sum[c] /= divisor;
    }
  });
}

// In the order of the rows, as one task would add them: the bits do not depend on whether they are split.
static void add_row_blocks(const Layout& layout, const Tensor& partials, const Tensor& sums, int64_t divisor) {
  sums.scalar_type() == at::kDouble ? add_row_blocks_as<double>(layout, partials, sums, double(divisor))
                                    : add_row_blocks_as<float>(layout, partials, sums, float(divisor));
}

Centred center_into(const Tensor& z, const Tensor& output, at::MemoryFormat format, const Tensor& gain, const Tensor& mean_scale,
                    double constant, const Tensor& bias, const OptionalTensor& residual, Activation activation,
                    double slope, bool save) {
  CenterForward p{};
  p.layout = layout_of(z, format, true);
  p.dtype = dtype_of(z);
  p.activation = activation;
  p.slope = slope;
  p.constant = constant;
  Centred result;
  const bool centred = mean_scale.defined() || constant != 0.0;
  result.map_mean =
      at::empty(centred ? at::IntArrayRef({z.size(0), z.size(1)}) : at::IntArrayRef({0}), accumulation_options(z));
  const Tensor dense_residual = residual_of(residual, z, format);
  result.saved = saved_for(z, format, activation, save);
  if (save && is_piecewise(activation)) p.bits = result.saved.mutable_data_ptr<uint8_t>();
  if (save && is_smooth(activation)) p.pre_activation = mutable_data(result.saved);
  p.input = data(z);
  p.residual = data(dense_residual);
  p.gain = data(gain);
  p.mean_scale = data(mean_scale);
  p.bias = data(bias);
  p.output = mutable_data(output);
  p.map_mean = centred ? mutable_data(result.map_mean) : nullptr;
  const auto run = [&](Step step) {
    p.step = step;
    for_tasks(p.layout.tasks(), p.layout.elements_of_task(),
              [&](int64_t begin, int64_t end) { kernels().center_forward(p, begin, end); });
  };
  if (!centred || p.layout.row_blocks() <= 1) {
    run(Step::whole);
    return result;
  }
  const Tensor partials = partials_of(p.layout, accumulation_options(z));
  p.partials = mutable_data(partials);
  run(Step::sum);
  add_row_blocks(p.layout, partials, result.map_mean, p.layout.pixels);
  run(Step::apply);
  return result;
}

CenteredError center_error(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                           const Tensor& mean_scale, double constant, const Tensor& saved, Activation activation,
                           double slope, at::MemoryFormat format, const Wanted& wanted) {
  const Tensor grad = grad_output.contiguous(format);
  CenterBackward p{};
  p.layout = layout_of(grad, format, true);
  p.dtype = dtype_of(grad);
  p.activation = activation;
  p.slope = slope;
  p.constant = constant;
  p.centred = mean_scale.defined() || constant != 0.0;
  CenteredError result;
  const auto vectors = accumulation_options(grad);
  if (wanted.grad_input) {
    result.grad_input = wanted.grad_input_memory.defined() ? wanted.grad_input_memory : at::empty_like(grad);
  }
  if (wanted.grad_residual) result.grad_residual = at::empty_like(grad);
  if (wanted.sums) result.sums = at::empty({grad.size(0), grad.size(1)}, vectors);
  if (wanted.dots) result.dots = at::empty({grad.size(0), grad.size(1)}, vectors);
  TORCH_CHECK_VALUE(!wanted.dots || (input.sizes() == grad.sizes() && input.scalar_type() == grad.scalar_type()),
                    "input: got ", input.scalar_type(), " ", input.sizes(), ", wanted ", grad.scalar_type(), " ",
                    grad.sizes(), " as grad_output is");
  const Tensor dense_input = wanted.dots ? input.contiguous(format) : Tensor();
  p.grad_output = data(grad);
  p.input = data(dense_input);
  check_saved(saved, grad, format, activation);
  if (is_piecewise(activation)) p.bits = saved.const_data_ptr<uint8_t>();
  if (is_smooth(activation)) p.pre_activation = data(saved);
  p.scale = data(scale);
  p.mean_scale = data(mean_scale);
  p.grad_input = mutable_data(result.grad_input);
  p.grad_residual = mutable_data(result.grad_residual);
  const bool needs_sums = p.centred || wanted.sums;
  const bool splits = p.layout.row_blocks() > 1 && (needs_sums || wanted.dots);
  const Tensor sums = splits && p.centred && !wanted.sums ? at::empty({grad.size(0), grad.size(1)}, vectors) : result.sums;
  p.sums = mutable_data(sums);
  p.dots = mutable_data(result.dots);
  const auto run = [&](Step step) {
    p.step = step;
    for_tasks(p.layout.tasks(), p.layout.elements_of_task(),
              [&](int64_t begin, int64_t end) { kernels().center_backward(p, begin, end); });
  };
  if (!splits) {
    run(Step::whole);
    return result;
  }
  const Tensor partial_sums = needs_sums ? partials_of(p.layout, vectors) : Tensor();
  const Tensor partial_dots = wanted.dots ? partials_of(p.layout, vectors) : Tensor();
  p.partial_sums = mutable_data(partial_sums);
  p.partial_dots = mutable_data(partial_dots);
  run(Step::sum);
  if (needs_sums) add_row_blocks(p.layout, partial_sums, sums, 1);
  if (wanted.dots) add_row_blocks(p.layout, partial_dots, result.dots, 1);
  if (wanted.grad_input || wanted.grad_residual) run(Step::apply);
  return result;
}

// Loops over channels stand here in place of ops: a small layer has few microseconds to spare.
template <class A>
static void reduce_samples_as(const Tensor& sums, const Tensor& map_mean, Tensor* grad_mean_scale, Tensor* grad_bias) {
  const int64_t samples = sums.size(0), channels = sums.size(1);
  const A* e = sums.const_data_ptr<A>();
  const A* mean = grad_mean_scale ? map_mean.const_data_ptr<A>() : nullptr;
  A* scale = grad_mean_scale ? grad_mean_scale->mutable_data_ptr<A>() : nullptr;
  A* bias = grad_bias ? grad_bias->mutable_data_ptr<A>() : nullptr;
  if (scale) std::fill_n(scale, channels, A(0));
  if (bias) std::fill_n(bias, channels, A(0));
  for (int64_t n = 0; n < samples; ++n, e += channels) {
    for (int64_t c = 0; bias && c < channels; ++c) bias[c] += e[c];
    if (!scale) continue;
    for (int64_t c = 0; c < channels; ++c) scale[c] -= mean[c] * e[c];
    mean += channels;
  }
}

void reduce_samples(const Tensor& sums, const Tensor& map_mean, Tensor* grad_mean_scale, Tensor* grad_bias) {
  if (grad_mean_scale) {
    TORCH_CHECK_VALUE(map_mean.sizes() == sums.sizes() && map_mean.scalar_type() == sums.scalar_type(),
                      "map_mean: got ", map_mean.scalar_type(), " ", map_mean.sizes(), ", wanted ", sums.scalar_type(),
                      " ", sums.sizes());
    *grad_mean_scale = at::empty({sums.size(1)}, sums.options());
  }
  const Tensor means = grad_mean_scale ? map_mean.contiguous() : map_mean;
  if (grad_bias) *grad_bias = at::empty({sums.size(1)}, sums.options());
  const auto as = sums.scalar_type() == at::kDouble ? reduce_samples_as<double> : reduce_samples_as<float>;
  as(sums, means, grad_mean_scale, grad_bias);
}

template <class A>
static void scale_means_as(const Tensor& map_mean, const Tensor& gain) {
  A* mean = map_mean.mutable_data_ptr<A>();
  const A* gains = gain.const_data_ptr<A>();
  const int64_t channels = gain.numel();
  for (int64_t n = 0; n < map_mean.size(0); ++n, mean += channels) {
    for (int64_t c = 0; c < channels; ++c) mean[c] *= gains[c];
  }
}

void scale_means(const Tensor& map_mean, const Tensor& gain) {
  const auto as = gain.scalar_type() == at::kDouble ? scale_means_as<double> : scale_means_as<float>;
  as(map_mean, gain);
}

// From minus the sums of mean * e, which `centring` holds if defined, to the gradients of gain, if wanted, and of
// mean_scale, which it holds afterwards.
template <class A>
static Tensor finish_vectors(const Tensor& dots, const Tensor& scale, const Tensor& mean_scale, double constant,
                             const Tensor& centring) {
  A* sums = centring.defined() ? centring.mutable_data_ptr<A>() : nullptr;
  const A* scales = scale.defined() ? scale.const_data_ptr<A>() : nullptr;
  Tensor grad_gain;
  if (dots.defined()) {
    const int64_t samples = dots.size(0), channels = dots.size(1);
    grad_gain = at::empty({channels}, dots.options());
    A* gain = grad_gain.mutable_data_ptr<A>();
    const A* dot = dots.const_data_ptr<A>();
    const A* removed = mean_scale.defined() ? mean_scale.const_data_ptr<A>() : nullptr;
    for (int64_t c = 0; c < channels; ++c) gain[c] = sums ? sums[c] * (removed ? removed[c] : A(constant)) : A(0);
    for (int64_t n = 0; n < samples; ++n, dot += channels) {
      for (int64_t c = 0; c < channels; ++c) gain[c] += dot[c];
    }
  }
  for (int64_t c = 0; sums && scales && c < centring.numel(); ++c) sums[c] *= scales[c];
  return grad_gain;
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

static Results center(const Tensor& input, const OptionalTensor& gain, const OptionalTensor& mean_scale, double constant,
                      const OptionalTensor& bias, const OptionalTensor& residual, c10::string_view activation,
                      double slope, bool save) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensor x = dense(input);
  const auto type = accumulation_type(x);
  const int64_t channels = x.size(1);
  const Tensor output = at::empty_like(x);
  const Centred centred = center_into(
      x, output, format_of(x), vector_of(gain, channels, type, "gain"), vector_of(mean_scale, channels, type, "mean_scale"),
      constant, vector_of(bias, channels, type, "bias"), residual, parse_activation(activation), slope, save);
  return {output, centred.map_mean, centred.saved};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> center_with_mean(
    const Tensor& input, const OptionalTensor& gain, const OptionalTensor& mean_scale, double constant,
    const OptionalTensor& bias, const OptionalTensor& residual, c10::string_view activation, double slope, bool save) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto [output, map_mean, saved] =
      center(input, gain, mean_scale, constant, bias, residual, activation, slope, save);
  return {output, map_mean, saved, output.flatten(2).mean(2, false, accumulation_type(output))};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> center_backward(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& gain,
    const OptionalTensor& mean_scale, double constant, const Tensor& map_mean, const Tensor& saved,
    c10::string_view activation, double slope, std::array<bool, 5> mask) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto type = accumulation_type(grad_output);
  const int64_t channels = grad_output.size(1);
  const Tensor scale = vector_of(gain, channels, type, "gain");
  const Tensor mean_scales = vector_of(mean_scale, channels, type, "mean_scale");
  const bool centred = mean_scales.defined() || constant != 0.0;
  TORCH_CHECK_VALUE(!mask[1] || (input && input->defined()), "input: missing, wanted for the gradient of gain");
  const CenteredError error =
      center_error(grad_output, input.value_or(Tensor()), scale, mean_scales, constant, saved,
                   parse_activation(activation), slope, format_of(grad_output),
                   {mask[0], mask[4], mask[1] || mask[2] || mask[3], mask[1]});
  Tensor grad_gain, grad_mean_scale, grad_bias;
  const bool means = centred && (mask[1] || mask[2]);
  if (means || mask[3]) reduce_samples(error.sums, map_mean, means ? &grad_mean_scale : nullptr, mask[3] ? &grad_bias : nullptr);
  const auto finish = type == at::kDouble ? finish_vectors<double> : finish_vectors<float>;
  grad_gain = finish(error.dots, scale, mean_scales, constant, grad_mean_scale);
  if (!mask[2]) grad_mean_scale.reset();
  return {error.grad_input, grad_gain, grad_mean_scale, grad_bias, error.grad_residual};
}

TORCH_LIBRARY_IMPL(deepcontrol, CPU, m) {
  m.impl("center", center);
  m.impl("center_with_mean", center_with_mean);
  m.impl("center_backward", center_backward);
}

}  // namespace deepcontrol::cpu
