// The ops on CUDA tensors but convolutions: checks, outputs, launches; the arithmetic is in the .cu files beside this.

#include "dispatch.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/flatten.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "../library.h"

namespace deepcontrol::cuda {
namespace {

Tensor workspace_of(int64_t elements, const at::TensorOptions& options) {
  return elements ? at::empty({elements}, options) : Tensor();
}

// A gradient that is dense; the other fields are for the finish pass of one weight.
WeightGrad describe(const Tensor& grad) {
  WeightGrad p{};
  p.dtype = dtype_of(grad);
  p.filters = grad.size(0);
  p.channels = grad.size(1);
  p.taps = pixels_of(grad);
  p.channels_innermost = format_of(grad) != at::MemoryFormat::Contiguous;
  p.grad = mutable_data(grad);
  return p;
}

}  // namespace

bool are_aligned(std::initializer_list<const void*> addresses) {
  uintptr_t all = 0;
  for (const void* address : addresses) all |= reinterpret_cast<uintptr_t>(address);
  return all % 16 == 0;
}

Vectors vectors_of(const Scope& scope, const Tensor& like, int64_t channels, const OptionalTensor& gain,
                   const OptionalTensor& mean_scale, double constant, const OptionalTensor& bias) {
  scope.check("gain", gain);
  scope.check("mean_scale", mean_scale);
  scope.check("bias", bias);
  const auto type = accumulation_type(like);
  return {vector_of(gain, channels, type, "gain"), vector_of(mean_scale, channels, type, "mean_scale"),
          vector_of(bias, channels, type, "bias"), constant};
}

Centred Centring::operator()(const Scope& scope, const Tensor& z, const Tensor& output, at::MemoryFormat format) const {
  scope.check("residual", residual);
  const Tensor dense_residual = residual_of(residual, z, format);
  const auto sums = accumulation_options(z);
  const std::array<int64_t, 2> per_map{z.size(0), z.size(1)};
  const bool centred = vectors.centred();
  CenterForward p{};
  p.maps = maps_of(z, format);
  p.dtype = dtype_of(z);
  p.activation = activation;
  p.slope = slope;
  p.constant = vectors.constant;
  p.mean_of_scaled = mean_of_scaled;
  Centred result;
  result.map_mean = centred ? at::empty(per_map, sums) : at::empty({0}, sums);
  result.saved = saved_for(z, format, activation, save);
  if (output_mean) result.output_mean = at::empty(per_map, sums);
  if (p.maps.elements() == 0) {
    for (const Tensor& means : {result.map_mean, result.output_mean}) {
      if (means.defined()) means.fill_(std::numeric_limits<double>::quiet_NaN());
    }
    return result;
  }
  p.input = data(z);
  p.residual = data(dense_residual);
  p.gain = data(vectors.gain);
  p.mean_scale = data(vectors.mean_scale);
  p.bias = data(vectors.bias);
  p.output = mutable_data(output);
  p.map_mean = centred ? mutable_data(result.map_mean) : nullptr;
  p.output_mean = mutable_data(result.output_mean);
  if (save && is_piecewise(activation)) p.bits = result.saved.mutable_data_ptr<uint8_t>();
  if (save && is_smooth(activation)) p.pre_activation = mutable_data(result.saved);
  const bool aligned = are_aligned({p.input, p.residual, p.output, p.pre_activation});
  const CenterPlan plan = plan_center({p.maps, p.dtype, aligned, centred || output_mean, 1, false, 1}, scope.device);
  const Tensor workspace = workspace_of(plan.workspace(p.maps), sums);
  p.workspace = mutable_data(workspace);
  if (workspace.defined()) p.output_mean = nullptr;
  const auto launch = p.maps.channels_innermost ? launch_center_forward_nhwc : launch_center_forward_nchw;
  C10_CUDA_CHECK(launch(p, plan, scope.stream()));
  // A map that does not fit on chip costs one more read.
  if (output_mean && !p.output_mean) result.output_mean = output.flatten(2).mean(2, false, accumulation_type(z));
  return result;
}

Error center_error(const Scope& scope, const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                   const Vectors& vectors, const Tensor& saved, Activation activation, double slope,
                   at::MemoryFormat format, const Wanted& wanted) {
  const Tensor grad = grad_output.contiguous(format);
  scope.check("saved", saved);
  check_saved(saved, grad, format, activation);
  TORCH_CHECK_VALUE(!wanted.dots || (input.sizes() == grad.sizes() && input.scalar_type() == grad.scalar_type()),
                    "input: got ", input.scalar_type(), " ", input.sizes(), ", wanted ", grad.scalar_type(), " ",
                    grad.sizes(), " as grad_output is");
  const Tensor dense_input = wanted.dots ? input.contiguous(format) : Tensor();
  const auto sums = accumulation_options(grad);
  const std::array<int64_t, 2> per_map{grad.size(0), grad.size(1)};
  Error result;
  if (wanted.grad_input) result.grad_input = at::empty_like(grad);
  if (wanted.grad_residual) result.grad_residual = at::empty_like(grad);
  if (wanted.sums) result.sums = at::empty(per_map, sums);
  if (wanted.dots) result.dots = at::empty(per_map, sums);
  CenterBackward p{};
  p.maps = maps_of(grad, format);
  if (p.maps.elements() == 0) {
    for (const Tensor& none : {result.sums, result.dots}) {
      if (none.defined()) none.zero_();
    }
    return result;
  }
  p.dtype = dtype_of(grad);
  p.activation = activation;
  p.slope = slope;
  p.constant = vectors.constant;
  p.centred = vectors.centred();
  p.grad_output = data(grad);
  p.input = data(dense_input);
  if (is_piecewise(activation)) p.bits = saved.const_data_ptr<uint8_t>();
  if (is_smooth(activation)) p.pre_activation = data(saved);
  p.scale = data(scale);
  p.mean_scale = data(vectors.mean_scale);
  p.grad_input = mutable_data(result.grad_input);
  p.grad_residual = mutable_data(result.grad_residual);
  p.sums = mutable_data(result.sums);
  p.dots = mutable_data(result.dots);
  const bool aligned = are_aligned({p.grad_output, p.input, p.pre_activation, p.grad_input, p.grad_residual});
  const int staged = is_smooth(activation) ? 2 : 1;
  const bool needs_sums = p.centred || p.sums || p.dots;
  const CenterPlan plan =
      plan_center({p.maps, p.dtype, aligned, needs_sums, staged, p.bits != nullptr, 2}, scope.device);
  const Tensor workspace = workspace_of(2 * plan.workspace(p.maps), sums);
  p.workspace = mutable_data(workspace);
  const auto launch = p.maps.channels_innermost ? launch_center_backward_nhwc : launch_center_backward_nchw;
  C10_CUDA_CHECK(launch(p, plan, scope.stream()));
  return result;
}

VectorGrads reduce_samples(const Scope& scope, const Error& error, const Tensor& map_mean, const Tensor& scale,
                           const Vectors& vectors, bool gain, bool mean_scale, bool bias) {
  VectorGrads grads;
  if (!gain && !mean_scale && !bias) return grads;
  const bool means = vectors.centred() && (gain || mean_scale);
  scope.check("map_mean", map_mean);
  TORCH_CHECK_VALUE(!means || (map_mean.sizes() == error.sums.sizes() && map_mean.scalar_type() == error.sums.scalar_type()),
                    "map_mean: got ", map_mean.scalar_type(), " ", map_mean.sizes(), ", wanted ",
                    error.sums.scalar_type(), " ", error.sums.sizes());
  const Tensor dense_means = means ? map_mean.contiguous() : Tensor();
  const auto vector = [&] { return at::empty({error.sums.size(1)}, error.sums.options()); };
  if (gain) grads.gain = vector();
  if (mean_scale && means) grads.mean_scale = vector();
  if (bias) grads.bias = vector();
  ReduceSamples p{};
  p.dtype = error.sums.scalar_type() == at::kDouble ? Dtype::f64 : Dtype::f32;
  p.samples = error.sums.size(0);
  p.channels = error.sums.size(1);
  p.constant = vectors.constant;
  p.sums = data(error.sums);
  p.dots = data(error.dots);
  p.map_mean = data(dense_means);
  p.scale = data(scale);
  p.mean_scale = data(vectors.mean_scale);
  p.grad_gain = mutable_data(grads.gain);
  p.grad_mean_scale = mutable_data(grads.mean_scale);
  p.grad_bias = mutable_data(grads.bias);
  C10_CUDA_CHECK(launch_reduce_samples(p, scope.stream()));
  return grads;
}

Tensor finish_weight_grad(const Scope& scope, const Tensor& grad, const Tensor& weight, const Tensor& factor,
                          const Tensor& divisor, double projection, bool dots) {
  if (grad.numel() == 0) return dots ? at::zeros({grad.size(0)}, accumulation_options(grad)) : Tensor();
  WeightGrad p = describe(grad);
  const bool unchanged = !factor.defined() && (projection == 0.0 || p.taps == 1);
  if (unchanged && !dots) return {};
  const Tensor dense_weight = dots ? weight.contiguous(format_of(grad)) : Tensor();
  const Tensor result = dots ? at::empty({p.filters}, accumulation_options(grad)) : Tensor();
  p.weight = data(dense_weight);
  p.factor = data(factor);
  p.divisor = data(divisor);
  p.dots = mutable_data(result);
  C10_CUDA_CHECK(launch_finish_weight_grads(&p, 1, projection, scope.stream()));
  return result;
}

namespace {

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four center_and_mean(const Tensor& input, const OptionalTensor& gain, const OptionalTensor& mean_scale, double constant,
                     const OptionalTensor& bias, const OptionalTensor& residual, c10::string_view activation,
                     double slope, bool save, bool output_mean) {
  const Scope scope(input);
  const Tensor x = dense(input);
  const Vectors vectors = vectors_of(scope, x, x.size(1), gain, mean_scale, constant, bias);
  const Tensor output = at::empty_like(x);
  const Centring centring{vectors, residual, parse_activation(activation), slope, save, false, output_mean};
  const Centred centred = centring(scope, x, output, format_of(x));
  return {output, centred.map_mean, centred.saved, centred.output_mean};
}

std::tuple<Tensor, Tensor, Tensor> center(const Tensor& input, const OptionalTensor& gain,
                                          const OptionalTensor& mean_scale, double constant, const OptionalTensor& bias,
                                          const OptionalTensor& residual, c10::string_view activation, double slope,
                                          bool save) {
  const auto [output, map_mean, saved, none] =
      center_and_mean(input, gain, mean_scale, constant, bias, residual, activation, slope, save, false);
  return {output, map_mean, saved};
}

Four center_with_mean(const Tensor& input, const OptionalTensor& gain, const OptionalTensor& mean_scale, double constant,
                      const OptionalTensor& bias, const OptionalTensor& residual, c10::string_view activation,
                      double slope, bool save) {
  return center_and_mean(input, gain, mean_scale, constant, bias, residual, activation, slope, save, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> center_backward(
    const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& gain,
    const OptionalTensor& mean_scale, double constant, const Tensor& map_mean, const Tensor& saved,
    c10::string_view activation, double slope, std::array<bool, 5> mask) {
  const Scope scope(grad_output);
  scope.check("input", input);
  const Vectors vectors = vectors_of(scope, grad_output, grad_output.size(1), gain, mean_scale, constant, {});
  TORCH_CHECK_VALUE(!mask[1] || (input && input->defined()), "input: missing, wanted for the gradient of gain");
  const Error error = center_error(scope, grad_output, input.value_or(Tensor()), vectors.gain, vectors, saved,
                                   parse_activation(activation), slope, format_of(grad_output),
                                   {mask[0], mask[4], mask[1] || mask[2] || mask[3], mask[1]});
  const VectorGrads grads =
      reduce_samples(scope, error, map_mean, vectors.gain, vectors, mask[1], mask[2], mask[3]);
  return {error.grad_input, grads.gain, grads.mean_scale, grads.bias, error.grad_residual};
}

Tensor window_mean(const Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation) {
  const Scope scope(input);
  const Tensor x = dense(input);
  WindowMean p{};
  p.windows = windows_of(x, kernel_size, stride, padding, dilation);
  p.maps = maps_of(x, format_of(x));
  p.dtype = dtype_of(x);
  TORCH_CHECK_VALUE(p.maps.pixels < int64_t(1) << 30, "input: got maps of ", p.maps.pixels, " pixels, wanted fewer than 2^30");
  const Tensor means = at::empty(window_mean_sizes(x, kernel_size), x.options().memory_format(std::nullopt));
  p.input = data(x);
  p.means = mutable_data(means);
  if (p.maps.elements() == 0) return means.zero_();
  C10_CUDA_CHECK(launch_window_mean(p, scope.device, scope.stream()));
  return means;
}

Tensor finish_weight_grad_(Tensor grad_weight, const Tensor& weight, const OptionalTensor& gain,
                           const OptionalTensor& scale, double projection) {
  const Scope scope(grad_weight);
  scope.check("weight", weight);
  scope.check("gain", gain);
  scope.check("scale", scale);
  const auto [factor, divisor] = finishing_factors(grad_weight, weight, gain, scale);
  const Tensor grad = dense(grad_weight);
  const Tensor grad_gain = finish_weight_grad(scope, grad, weight, factor, divisor, projection, true);
  if (!grad.is_same(grad_weight)) grad_weight.copy_(grad);
  mark_changed(grad_weight);
  return grad_gain;
}

// One launch for each device and dtype that there is.
void project_kernel_gradients_(at::TensorList gradients, double weight) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  std::vector<Tensor> changed, dense_gradients;
  for (const Tensor& gradient : gradients) {
    if (!has_taps(gradient)) continue;
    changed.push_back(gradient);
    dense_gradients.push_back(dense(gradient));
  }
  std::vector<bool> done(changed.size());
  for (size_t first = 0; first < changed.size(); ++first) {
    if (done[first]) continue;
    const Scope scope(changed[first]);
    std::vector<WeightGrad> alike;
    for (size_t i = first; i < changed.size(); ++i) {
      if (changed[i].device() != changed[first].device() || changed[i].dtype() != changed[first].dtype()) continue;
      alike.push_back(describe(dense_gradients[i]));
      done[i] = true;
    }
    C10_CUDA_CHECK(launch_finish_weight_grads(alike.data(), alike.size(), weight, scope.stream()));
  }
  for (size_t i = 0; i < changed.size(); ++i) {
    if (!dense_gradients[i].is_same(changed[i])) changed[i].copy_(dense_gradients[i]);
    mark_changed(changed[i]);
  }
}

}  // namespace

DEEPCONTROL_REGISTER_CUDA(m) {
  m.impl("center", center);
  m.impl("center_with_mean", center_with_mean);
  m.impl("center_backward", center_backward);
  m.impl("window_mean", window_mean);
  m.impl("finish_weight_grad_", finish_weight_grad_);
  m.impl("project_kernel_gradients_", project_kernel_gradients_);
}

}  // namespace deepcontrol::cuda
