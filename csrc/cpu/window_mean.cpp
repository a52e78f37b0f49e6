// window_mean on CPU tensors.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>

#include "common.h"

namespace deepcontrol::cpu {

static Tensor window_mean(const Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t rank = input.dim() - 2;
  TORCH_CHECK_VALUE(rank >= 1 && rank <= 3, "input: got shape ", input.sizes(), ", wanted 1 to 3 spatial dimensions");
  for (const auto& [name, values] : {std::pair<const char*, at::IntArrayRef>{"kernel_size", kernel_size},
                                     {"stride", stride}, {"padding", padding}, {"dilation", dilation}}) {
    const int64_t least = std::string_view(name) == "padding" ? 0 : 1;
    TORCH_CHECK_VALUE(int64_t(values.size()) == rank && *std::min_element(values.begin(), values.end()) >= least, name,
                      ": got ", values, ", wanted ", rank, " integers of at least ", least);
  }
  const Tensor x = dense(input);
  WindowMean p{};
  p.layout = layout_of(x, format_of(x));
  p.dtype = dtype_of(x);
  std::vector<int64_t> shape{x.size(0), x.size(1)};
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t from = d - (3 - rank);
    p.size[d] = from < 0 ? 1 : x.size(from + 2);
    p.kernel[d] = from < 0 ? 1 : kernel_size[from];
    p.stride[d] = from < 0 ? 1 : stride[from];
    p.padding[d] = from < 0 ? 0 : padding[from];
    p.dilation[d] = from < 0 ? 1 : dilation[from];
    p.output[d] = (p.size[d] + 2 * p.padding[d] - p.dilation[d] * (p.kernel[d] - 1) - 1) / p.stride[d] + 1;
    TORCH_CHECK_VALUE(p.output[d] > 0, "input: got shape ", x.sizes(), ", which leaves an empty output");
    if (from >= 0) shape.push_back(p.kernel[d]);
  }
  const Tensor means = at::empty(shape, x.options().memory_format(std::nullopt));
  p.input = data(x);
  p.means = mutable_data(means);
  for_tasks(p.layout.tasks(), p.layout.block * p.layout.pixels,
            [&](int64_t begin, int64_t end) { kernels().window_mean(p, begin, end); });
  return means;
}

TORCH_LIBRARY_IMPL(deepcontrol, CPU, m) { m.impl("window_mean", window_mean); }

}  // namespace deepcontrol::cpu
