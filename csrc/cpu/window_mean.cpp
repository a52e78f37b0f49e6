// window_mean on CPU tensors.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "common.h"

namespace deepcontrol::cpu {

static Tensor window_mean(const Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensor x = dense(input);
  WindowMean p{windows_of(x, kernel_size, stride, padding, dilation)};
  p.layout = layout_of(x, format_of(x));
  p.dtype = dtype_of(x);
  const Tensor means = at::empty(window_mean_sizes(x, kernel_size), x.options().memory_format(std::nullopt));
  p.input = data(x);
  p.means = mutable_data(means);
  for_tasks(p.layout.tasks(), p.layout.elements_of_task(),
            [&](int64_t begin, int64_t end) { kernels().window_mean(p, begin, end); });
  return means;
}

TORCH_LIBRARY_IMPL(deepcontrol, CPU, m) { m.impl("window_mean", window_mean); }

}  // namespace deepcontrol::cpu
