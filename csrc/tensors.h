// From tensors to what kernels are given, the same for every backend: checks, dense layouts, vectors in the accumulation
// type.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "types.h"

namespace deepcontrol {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& tensor);
Activation parse_activation(c10::string_view name);

inline at::ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
// Of vectors, means and sums beside `tensor`.
inline at::TensorOptions accumulation_options(const Tensor& tensor) {
  return tensor.options().dtype(accumulation_type(tensor)).memory_format(std::nullopt);
}

// The memory format of a tensor: where the strides tell, what they tell. Unlike suggest_memory_format() it does not mind
// the strides of dimensions of size one, which a view of a single sample may bring, so that a tensor that
// contiguous(format) leaves as it is has that format here.
at::MemoryFormat format_of(const Tensor& tensor);
// Of a convolution's output.
at::MemoryFormat format_of(const Tensor& input, const Tensor& weight);
// Without gaps, in the memory format that is nearest: other strides are copied once.
inline Tensor dense(const Tensor& tensor) { return tensor.contiguous(format_of(tensor)); }

int64_t pixels_of(const Tensor& tensor);
// How kernels see a tensor that is dense in `format`. One channel or one pixel is dense in every format, so there the
// format must not decide.
Maps maps_of(const Tensor& tensor, at::MemoryFormat format);

// A (C,) vector in the accumulation type, dense; an undefined tensor if absent.
Tensor vector_of(const OptionalTensor& vector, int64_t channels, at::ScalarType type, const char* name);

inline const void* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
inline void* mutable_data(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

// What the forward pass keeps of the activation for an output like `output`.
Tensor saved_for(const Tensor& output, at::MemoryFormat format, Activation activation, bool save);
// Raises unless `saved` is what saved_for made for an output like `grad`, which is dense in `format`.
void check_saved(const Tensor& saved, const Tensor& grad, at::MemoryFormat format, Activation activation);

// The residual dense in `format`, checked against the output; undefined if absent.
Tensor residual_of(const OptionalTensor& residual, const Tensor& output, at::MemoryFormat format);

// The shape of a convolution's output; everything that kernels and the library rely on is checked on the way.
std::vector<int64_t> output_sizes(const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                  bool wide_weight = false);
// Raises unless `grad_output` belongs to an output of `sizes` beside `input`.
void check_grad_output(const Tensor& grad_output, const Tensor& input, at::IntArrayRef sizes);

Windows windows_of(const Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation);
// (N, C, *kernel)
std::vector<int64_t> window_mean_sizes(const Tensor& input, at::IntArrayRef kernel_size);

// What a gradient of `weight` that was multiplied by `scale` is to be multiplied by, gain / scale, and `scale`; each (O,)
// or undefined. Raises unless the gradient is like the weight.
std::pair<Tensor, Tensor> finishing_factors(const Tensor& grad_weight, const Tensor& weight, const OptionalTensor& gain,
                                            const OptionalTensor& scale);
// Whether project_kernel_gradients_ changes this gradient.
bool has_taps(const Tensor& gradient);
// What autograd's own in-place ops do, so that it notices a change of what it has saved.
void mark_changed(const Tensor& tensor);

}  // namespace deepcontrol
