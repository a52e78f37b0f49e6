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

// The memory format of a tensor: where the strides tell, what they tell. Unlike suggest_memory_format() it does not mind
// the strides of dimensions of size one, which a view of a single sample may bring, so that a tensor that
// contiguous(format) leaves as it is has that format here.
inline at::MemoryFormat format_of(const Tensor& tensor) {
  if (tensor.is_contiguous()) return at::MemoryFormat::Contiguous;
  const auto channels_last = tensor.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  if ((tensor.dim() == 4 || tensor.dim() == 5) && tensor.is_contiguous(channels_last)) return channels_last;
  return tensor.suggest_memory_format();
}

// How the kernels see a tensor that is dense in `format`. One channel or one pixel is dense in every format, so there
// the format must not decide. Rows of channels are cut into blocks only to occupy all threads, or where they
// exceed kMostChannels. Blocks small enough for a slab to stay in the second-level cache measured 2 to 4 times slower
// on 256 channels of 56 x 56: at power-of-two strides a narrow slab falls into few of the cache's sets, while whole rows
// stream twice from the third level at memory-copy speed.
inline Layout layout_of(const Tensor& tensor, at::MemoryFormat format) {
  Layout layout;
  layout.samples = tensor.size(0);
  layout.channels = tensor.size(1);
  layout.pixels = pixels_of(tensor);
  layout.channels_innermost =
      layout.pixels == 1 || (layout.channels > 1 && format != at::MemoryFormat::Contiguous);
  layout.block = 1;
  if (layout.channels_innermost) {
    constexpr int64_t kCacheLines = 32;
    const int64_t threads = at::get_num_threads();
    const bool balanced = layout.samples % threads == 0 || layout.samples >= 8 * threads;
    const int64_t block = (layout.channels + (balanced ? 1 : threads) - 1) / (balanced ? 1 : threads);
    layout.block = std::clamp((block + kCacheLines - 1) / kCacheLines * kCacheLines, kCacheLines, kMostChannels);
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
inline Tensor dense(const Tensor& tensor) { return tensor.contiguous(format_of(tensor)); }

struct Centred {
  Tensor map_mean;  // of the input, (N, C)
  Tensor saved;
};

// Centres `z`, which is dense in `format`, into `output`, which may be `z`.
Centred center_into(const Tensor& z, const Tensor& output, at::MemoryFormat format, const Tensor& gain, const Tensor& mean_scale,
                    double constant, const Tensor& bias, const OptionalTensor& residual, Activation activation,
                    double slope, bool save);

// Whether one fused pass does the layer: a convolution by one tap at stride one, in channels_last, of a dtype that the
// processor multiplies fast, and with an input that is cheaper to average than the output.
bool is_fused_pointwise(const Tensor& input, const Tensor& weight, at::MemoryFormat format, at::IntArrayRef stride,
                        at::IntArrayRef padding, int64_t groups, bool centred);

struct Convolved {
  Tensor output;
  Centred centred;  // with the mean of conv(input, gain * weight)
};

Convolved fused_pointwise(const Tensor& input, const Tensor& weight, at::MemoryFormat format, const Tensor& gain,
                          const Tensor& mean_scale, double constant, const Tensor& bias, const OptionalTensor& residual,
                          Activation activation, double slope, bool save);

struct PointwiseGrads {
  Tensor grad_input;
  Tensor grad_weight;  // scale * dw'
  Tensor sums, grad_residual;
};

// Whether its backward pays as well: every thread needs rows and memory for a weight gradient of its own.
bool is_fused_pointwise_backward(const Tensor& input, const Tensor& weight, at::MemoryFormat format,
                                 at::IntArrayRef stride, at::IntArrayRef padding, int64_t groups);

// `scale` multiplies dz'; `weight` is what grad_input is computed with. Sums are always there.
PointwiseGrads fused_pointwise_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                        at::MemoryFormat format, const Tensor& scale, const Tensor& mean_scale,
                                        double constant, const Tensor& saved, Activation activation, double slope,
                                        bool wants_input, bool wants_weight, bool wants_residual);

// What the forward pass keeps of the activation for an output like `output`.
Tensor saved_for(const Tensor& output, at::MemoryFormat format, Activation activation, bool save);

// The residual dense in `format`, checked against the output; undefined if absent.
Tensor residual_of(const OptionalTensor& residual, const Tensor& output, at::MemoryFormat format);

struct CenteredError {
  Tensor grad_input, grad_residual, sums, dots;
};

// What the backward of the centring asks for. `grad_input` may bring the memory that it is to be written to.
struct Wanted {
  bool grad_input, grad_residual, sums, dots;
  Tensor grad_input_memory = {};
};

// `format` is that of the output; `input` is needed for the dots only.
CenteredError center_error(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                           const Tensor& mean_scale, double constant, const Tensor& saved, Activation activation,
                           double slope, at::MemoryFormat format, const Wanted& wanted);

// Sums over the samples: of `sums` into grad_bias and of -map_mean * sums into grad_mean_scale, each (C,) and only if asked.
void reduce_samples(const Tensor& sums, const Tensor& map_mean, Tensor* grad_mean_scale, Tensor* grad_bias);

// Divides, multiplies and projects in place; returns sum(weight * grad / divisor) if asked, else an undefined tensor.
Tensor finish_weight_grad(const Tensor& grad, const Tensor& weight, const Tensor& factor, const Tensor& divisor,
                          double projection, bool dots);

}  // namespace deepcontrol::cpu
