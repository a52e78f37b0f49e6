#include "tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/reciprocal.h>

#include <algorithm>
#include <string_view>
#include <utility>

namespace deepcontrol {

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(false, "got dtype ", tensor.scalar_type(), ", wanted float32, float64, bfloat16 or float16");
  }
}

Activation parse_activation(c10::string_view name) {
  constexpr std::array names{"identity", "relu", "leaky_relu", "relu6", "silu", "gelu", "hardswish"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(false, "activation: got '", name, "', wanted identity, relu, leaky_relu, relu6, silu, gelu or hardswish");
}

at::MemoryFormat format_of(const Tensor& tensor) {
  if (tensor.is_contiguous()) return at::MemoryFormat::Contiguous;
  const auto channels_last = tensor.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  if ((tensor.dim() == 4 || tensor.dim() == 5) && tensor.is_contiguous(channels_last)) return channels_last;
  return tensor.suggest_memory_format();
}

at::MemoryFormat format_of(const Tensor& input, const Tensor& weight) {
  const auto format = format_of(input);
  return format != at::MemoryFormat::Contiguous ? format : format_of(weight);
}

int64_t pixels_of(const Tensor& tensor) {
  int64_t pixels = 1;
  for (int64_t d = 2; d < tensor.dim(); ++d) pixels *= tensor.size(d);
  return pixels;
}

Maps maps_of(const Tensor& tensor, at::MemoryFormat format) {
  Maps maps{tensor.size(0), tensor.size(1), pixels_of(tensor), false};
  maps.channels_innermost = maps.pixels == 1 || (maps.channels > 1 && format != at::MemoryFormat::Contiguous);
  return maps;
}

Tensor vector_of(const OptionalTensor& vector, int64_t channels, at::ScalarType type, const char* name) {
  if (!vector || !vector->defined()) return {};
  TORCH_CHECK_VALUE(vector->dim() == 1 && (vector->size(0) == channels || vector->size(0) == 1),
                    name, ": got shape ", vector->sizes(), ", wanted (", channels, ",) or (1,)");
  // The usual case costs no op: a layer has few microseconds to spare.
  if (vector->scalar_type() == type && vector->size(0) == channels && vector->is_contiguous()) return *vector;
  return vector->to(type).expand({channels}).contiguous();
}

static std::array<int64_t, 3> bits_shape(const Maps& maps) {
  return {maps.samples, maps.channels_innermost ? maps.pixels : maps.channels, maps.bytes_of_bits_row()};
}

Tensor saved_for(const Tensor& output, at::MemoryFormat format, Activation activation, bool save) {
  const auto options = output.options().memory_format(std::nullopt);
  if (save && is_piecewise(activation)) return at::empty(bits_shape(maps_of(output, format)), options.dtype(at::kByte));
  if (save && is_smooth(activation)) return at::empty_like(output);
  return at::empty({0}, options);
}

void check_saved(const Tensor& saved, const Tensor& grad, at::MemoryFormat format, Activation activation) {
  if (is_piecewise(activation)) {
    TORCH_CHECK_VALUE(saved.scalar_type() == at::kByte && saved.is_contiguous() &&
                          saved.sizes() == at::IntArrayRef(bits_shape(maps_of(grad, format))),
                      "saved: got ", saved.scalar_type(), " ", saved.sizes(), ", wanted the bits that forward returned");
  } else if (is_smooth(activation)) {
    TORCH_CHECK_VALUE(saved.sizes() == grad.sizes() && saved.scalar_type() == grad.scalar_type() &&
                          saved.is_contiguous(format),
                      "saved: got ", saved.scalar_type(), " ", saved.sizes(), ", wanted the pre-activation that forward returned");
  }
}

Tensor residual_of(const OptionalTensor& residual, const Tensor& output, at::MemoryFormat format) {
  if (!residual || !residual->defined()) return {};
  TORCH_CHECK_VALUE(residual->sizes() == output.sizes(), "residual: got shape ", residual->sizes(), ", wanted ",
                    output.sizes());
  TORCH_CHECK_TYPE(residual->scalar_type() == output.scalar_type(), "residual: got dtype ", residual->scalar_type(),
                   ", wanted ", output.scalar_type());
  return residual->contiguous(format);
}

std::vector<int64_t> output_sizes(const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                  bool wide_weight) {
  const int64_t rank = input.dim() - 2;
  TORCH_CHECK_VALUE(rank >= 1 && rank <= 3, "input: got shape ", input.sizes(), ", wanted 1 to 3 spatial dimensions");
  TORCH_CHECK_VALUE(weight.dim() == input.dim() && groups >= 1 && weight.size(1) * groups == input.size(1) &&
                        weight.size(0) % groups == 0,
                    "weight: got shape ", weight.sizes(), " for input ", input.sizes(), " and ", groups, " groups");
  const bool is_wide = wide_weight && input.element_size() == 2 && weight.scalar_type() == at::kFloat;
  TORCH_CHECK_TYPE(is_wide || weight.scalar_type() == input.scalar_type(), "weight: got dtype ", weight.scalar_type(),
                   ", wanted ", input.scalar_type(), " as input is");
  TORCH_CHECK_VALUE(int64_t(stride.size()) == rank && int64_t(padding.size()) == rank && int64_t(dilation.size()) == rank,
                    "stride, padding, dilation: got ", stride, ", ", padding, ", ", dilation, ", wanted ", rank,
                    " integers each");
  std::vector<int64_t> sizes{input.size(0), weight.size(0)};
  for (int64_t d = 0; d < rank; ++d) {
    TORCH_CHECK_VALUE(stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1, "stride, padding, dilation: got ", stride,
                      ", ", padding, ", ", dilation, ", wanted positive integers, for the padding zero or more");
    sizes.push_back((input.size(d + 2) + 2 * padding[d] - dilation[d] * (weight.size(d + 2) - 1) - 1) / stride[d] + 1);
  }
  return sizes;
}

void check_grad_output(const Tensor& grad_output, const Tensor& input, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(grad_output.sizes() == sizes, "grad_output: got shape ", grad_output.sizes(),
                    ", wanted the output's, ", sizes);
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(), "grad_output: got dtype ",
                   grad_output.scalar_type(), ", wanted ", input.scalar_type());
}

Windows windows_of(const Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation) {
  const int64_t rank = input.dim() - 2;
  TORCH_CHECK_VALUE(rank >= 1 && rank <= 3, "input: got shape ", input.sizes(), ", wanted 1 to 3 spatial dimensions");
  for (const auto& [name, values] : {std::pair<const char*, at::IntArrayRef>{"kernel_size", kernel_size},
                                     {"stride", stride}, {"padding", padding}, {"dilation", dilation}}) {
    const int64_t least = std::string_view(name) == "padding" ? 0 : 1;
    TORCH_CHECK_VALUE(int64_t(values.size()) == rank && *std::min_element(values.begin(), values.end()) >= least, name,
                      ": got ", values, ", wanted ", rank, " integers of at least ", least);
  }
  Windows w{};
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t from = d - (3 - rank);
    w.size[d] = from < 0 ? 1 : input.size(from + 2);
    w.kernel[d] = from < 0 ? 1 : kernel_size[from];
    w.stride[d] = from < 0 ? 1 : stride[from];
    w.padding[d] = from < 0 ? 0 : padding[from];
    w.dilation[d] = from < 0 ? 1 : dilation[from];
    const int64_t beyond = w.size[d] + 2 * w.padding[d] - w.dilation[d] * (w.kernel[d] - 1) - 1;
    TORCH_CHECK_VALUE(beyond >= 0, "input: got shape ", input.sizes(), ", which leaves an empty output");
    w.output[d] = beyond / w.stride[d] + 1;
  }
  return w;
}

std::vector<int64_t> window_mean_sizes(const Tensor& input, at::IntArrayRef kernel_size) {
  std::vector<int64_t> sizes{input.size(0), input.size(1)};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  return sizes;
}

std::pair<Tensor, Tensor> finishing_factors(const Tensor& grad_weight, const Tensor& weight, const OptionalTensor& gain,
                                            const OptionalTensor& scale) {
  TORCH_CHECK_VALUE(grad_weight.sizes() == weight.sizes() && grad_weight.scalar_type() == weight.scalar_type(),
                    "grad_weight: got ", grad_weight.scalar_type(), " ", grad_weight.sizes(), ", wanted ",
                    weight.scalar_type(), " ", weight.sizes());
  const auto type = accumulation_type(weight);
  Tensor factor = vector_of(gain, weight.size(0), type, "gain");
  const Tensor divisor = vector_of(scale, weight.size(0), type, "scale");
  if (divisor.defined()) factor = factor.defined() ? factor / divisor : divisor.reciprocal();
  return {factor, divisor};
}

bool has_taps(const Tensor& gradient) {
  return gradient.dim() >= 3 && pixels_of(gradient) > 1 && gradient.numel() > 0;
}

void mark_changed(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace deepcontrol
