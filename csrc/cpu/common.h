// Tensors to kernel parameters: checks, dense layouts, vectors in the accumulation type.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <optional>
#include <string>

#include "kernels.h"

namespace deepcontrol::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(false, "got dtype ", tensor.scalar_type(), ", wanted float32, float64, bfloat16 or float16");
  }
}

inline at::ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Activation parse_activation(c10::string_view name) {
  constexpr std::array names{"identity", "relu", "leaky_relu", "relu6", "silu", "gelu", "hardswish"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(false, "activation: got '", name, "', wanted identity, relu, leaky_relu, relu6, silu, gelu or hardswish");
}

inline bool is_piecewise(Activation activation) {
  return activation != Activation::identity && activation <= Activation::relu6;
}
inline bool is_smooth(Activation activation) { return activation > Activation::relu6; }

inline int64_t pixels_of(const Tensor& tensor) {
  int64_t pixels = 1;
  for (int64_t d = 2; d < tensor.dim(); ++d) pixels *= tensor.size(d);
  return pixels;
}

// How the kernels see a dense tensor. `working_bytes` of a pixel's channel are live at once in one task.
inline Layout layout_of(const Tensor& tensor, int64_t working_bytes) {
  Layout layout;
  layout.samples = tensor.size(0);
  layout.channels = tensor.size(1);
  layout.pixels = pixels_of(tensor);
  layout.channels_innermost = layout.pixels == 1 || tensor.suggest_memory_format() != at::MemoryFormat::Contiguous;
  layout.block = 1;
  if (layout.channels_innermost) {
    // A task's slab should stay in the second-level cache between its two passes, in runs of whole cache lines; and
    // there should be enough tasks to share out evenly.
    constexpr int64_t kSlabBytes = 384 * 1024, kRun = 32;
    int64_t block = kSlabBytes / std::max<int64_t>(layout.pixels * working_bytes, 1) / kRun * kRun;
    const int64_t wanted_tasks = 4 * at::get_num_threads();
    const int64_t blocks = (wanted_tasks + layout.samples - 1) / std::max<int64_t>(layout.samples, 1);
    block = std::min(block, (layout.channels / std::max<int64_t>(blocks, 1) + kRun - 1) / kRun * kRun);
    layout.block = std::clamp(block, kRun, kMostChannels);
  }
  return layout;
}

// Threads are not worth waking for less.
constexpr int64_t kGrain = 32768;

template <class F>
void for_tasks(int64_t tasks, int64_t elements_of_task, F&& f) {
  if (tasks == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(elements_of_task, 1));
  at::parallel_for(0, tasks, grain, f);
}

// A (C,) vector in the accumulation type, dense; an undefined tensor if absent.
inline Tensor vector_of(const OptionalTensor& vector, int64_t channels, at::ScalarType type, const char* name) {
  if (!vector || !vector->defined()) return {};
  TORCH_CHECK_VALUE(vector->dim() == 1 && (vector->size(0) == channels || vector->size(0) == 1),
                    name, ": got shape ", vector->sizes(), ", wanted (", channels, ",) or (1,)");
  return vector->to(type).expand({channels}).contiguous();
}

inline const void* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
inline void* mutable_data(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

inline std::array<int64_t, 3> bits_shape(const Layout& layout) {
  const int64_t rows = layout.channels_innermost ? layout.pixels : layout.channels;
  return {layout.samples, rows, layout.bytes_of_bits_row()};
}

// Without gaps, in the memory format that is nearest: other strides are copied once.
inline Tensor dense(const Tensor& tensor) { return tensor.contiguous(tensor.suggest_memory_format()); }

struct Centred {
  Tensor map_mean;  // of the input, (N, C)
  Tensor saved;
};

// Centres `z`, which is dense, into `output`, which may be `z`.
Centred center_into(const Tensor& z, const Tensor& output, const Tensor& gain, const Tensor& mean_scale,
                    double constant, const Tensor& bias, const OptionalTensor& residual, Activation activation,
                    double slope, bool save);

struct CenteredError {
  Tensor grad_input, grad_residual, sums, dots;
};

// What the backward of the centring asks for.
struct Wanted {
  bool grad_input, grad_residual, sums, dots;
};

// `like` gives the memory format; `input` is needed for the dots only.
CenteredError center_error(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                           const Tensor& mean_scale, double constant, const Tensor& saved, Activation activation,
                           double slope, at::MemoryFormat format, Wanted wanted);

// Divides, multiplies and projects in place; returns sum(weight * grad / divisor) if asked, else an undefined tensor.
Tensor finish_weight_grad(const Tensor& grad, const Tensor& weight, const Tensor& factor, const Tensor& divisor,
                          double projection, bool dots);

}  // namespace deepcontrol::cpu
