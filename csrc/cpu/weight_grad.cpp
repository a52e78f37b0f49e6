// What is done to weight gradients behind the convolution: gain, dgain and projection, each gradient read once.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "common.h"

namespace deepcontrol::cpu {

static WeightGrad describe(const Tensor& grad, double projection) {
  WeightGrad p{};
  p.dtype = dtype_of(grad);
  p.filters = grad.size(0);
  p.channels = grad.size(1);
  p.taps = pixels_of(grad);
  p.channels_innermost = format_of(grad) != at::MemoryFormat::Contiguous;
  p.projection = projection;
  p.grad = mutable_data(grad);
  return p;
}

Tensor finish_weight_grad(const Tensor& grad, const Tensor& weight, const Tensor& factor, const Tensor& divisor,
                          double projection, bool dots) {
  WeightGrad p = describe(grad, projection);
  const Tensor dense_weight = dots ? weight.contiguous(format_of(grad)) : Tensor();
  Tensor result = dots ? at::empty({p.filters}, accumulation_options(grad)) : Tensor();
  p.weight = data(dense_weight);
  p.factor = data(factor);
  p.divisor = data(divisor);
  p.dots = mutable_data(result);
  const bool unchanged = !factor.defined() && (projection == 0.0 || p.taps == 1);
  if (unchanged && !dots) return result;
  for_tasks(p.filters, p.channels * p.taps,
            [&](int64_t begin, int64_t end) { kernels().finish_weight_grad(p, begin, end); });
  return result;
}

static Tensor finish_weight_grad_(Tensor grad_weight, const Tensor& weight, const OptionalTensor& gain,
                                  const OptionalTensor& scale, double projection) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto [factor, divisor] = finishing_factors(grad_weight, weight, gain, scale);
  const Tensor grad = dense(grad_weight);
  const Tensor grad_gain = finish_weight_grad(grad, weight, factor, divisor, projection, true);
  if (!grad.is_same(grad_weight)) grad_weight.copy_(grad);
  mark_changed(grad_weight);
  return grad_gain;
}

// The filters of all gradients are shared out together, so that many small kernels fill the threads too.
static void project_kernel_gradients_(at::TensorList gradients, double weight) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  std::vector<Tensor> dense_gradients;
  std::vector<WeightGrad> parameters;
  std::vector<int64_t> first_task{0};
  int64_t elements = 0;
  for (const Tensor& gradient : gradients) {
    if (!has_taps(gradient)) continue;
    dense_gradients.push_back(dense(gradient));
    parameters.push_back(describe(dense_gradients.back(), weight));
    first_task.push_back(first_task.back() + parameters.back().filters);
    elements += gradient.numel();
  }
  const int64_t tasks = first_task.back();
  for_tasks(tasks, tasks ? elements / tasks : 0, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_task.begin(), first_task.end(), begin) - first_task.begin() - 1;
    for (; i < parameters.size() && first_task[i] < end; ++i) {
      kernels().finish_weight_grad(parameters[i], std::max(begin, first_task[i]) - first_task[i],
                                   std::min(end, first_task[i + 1]) - first_task[i]);
    }
  });
  size_t next = 0;
  for (const Tensor& gradient : gradients) {
    if (!has_taps(gradient)) continue;
    const Tensor& projected = dense_gradients[next++];
    if (!projected.is_same(gradient)) gradient.copy_(projected);
    mark_changed(gradient);
  }
}

TORCH_LIBRARY_IMPL(deepcontrol, CPU, m) {
  m.impl("finish_weight_grad_", finish_weight_grad_);
  m.impl("project_kernel_gradients_", project_kernel_gradients_);
}

}  // namespace deepcontrol::cpu
