// Convolutions on CUDA tensors: which way a layer goes, its checks, outputs and launches.
//
// Forward is one of this package's kernels (conv_plan.h) or two passes: the library's convolution (cuDNN's, through ATen)
// and center in place on its output. Backward is center's on the gradient, the library's input gradient of weights that
// were multiplied by gain, so that no gain is ever divided by, and the weight gradient, by a kernel of this package that
// applies gain, dgain and projection on the way or by the library with a pass behind it.

#include <ATen/Context.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <atomic>
#include <map>
#include <mutex>
#include <sstream>

#include "../library.h"
#include "dispatch.h"

namespace deepcontrol::cuda {
namespace {

std::atomic<const Algorithm*> preferred{nullptr};

// The fastest of those that were timed, by compute capability, dtype and layer, the last as deepcontrol_cuda/measured.py
// names it.
class Fastest {
 public:
  void remember(const std::string& place, const Algorithm* algorithm) {
    const std::lock_guard lock(mutex_);
    known_[place] = algorithm;
    ++changes_;
  }
  const Algorithm* find(const Device& device, const char* dtype, const std::string& layer) const {
    const std::string capability = std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10);
    const std::lock_guard lock(mutex_);
    const auto found = known_.find(capability + ": " + dtype + ": " + layer);
    return found == known_.end() ? nullptr : found->second;
  }
  int64_t changes() const { return changes_; }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, const Algorithm*> known_;
  std::atomic<int64_t> changes_{0};
};
Fastest fastest;

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64: return "float64";
    case Dtype::bf16: return "bfloat16";
    case Dtype::f16: return "float16";
    default: return "float32";
  }
}

std::string name_of(const Tensor& weight, at::IntArrayRef stride, int64_t groups) {
  std::ostringstream text;
  for (int64_t d = 2; d < weight.dim(); ++d) text << (d > 2 ? "x" : "") << weight.size(d);
  text << ", " << weight.size(1) * groups << " to " << weight.size(0) << ", stride ";
  for (size_t d = 0; d < stride.size(); ++d) text << (d > 0 ? "x" : "") << stride[d];
  text << ", groups " << groups;
  return text.str();
}

// Whether cuDNN's convolutions may round float32 to TF32. PyTorch 2.9 asks by the name of the op, later ones by a number.
template <class Op>
bool allows_tf32(bool (at::Context::*of)(Op) const) {
  if constexpr (std::is_same_v<std::decay_t<Op>, std::string>) {
    return (at::globalContext().*of)("conv");
  } else {
    return (at::globalContext().*of)(std::decay_t<Op>::value_type::CONV);
  }
}

struct Layer {
  at::MemoryFormat format;
  Windows windows;
  std::vector<int64_t> sizes;  // of the output
  ConvCase convolution;
};

Layer layer_of(const Tensor& input, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
               at::IntArrayRef dilation, int64_t groups, bool centred) {
  Layer layer;
  layer.sizes = output_sizes(input, weight, stride, padding, dilation, groups);
  layer.format = format_of(input, weight);
  layer.windows = windows_of(input, weight.sizes().slice(2), stride, padding, dilation);
  ConvCase& c = layer.convolution = {};
  c.dtype = dtype_of(input);
  c.samples = input.size(0);
  c.channels = input.size(1);
  c.filters = weight.size(0);
  c.groups = groups;
  c.windows = layer.windows;
  // Of a single channel the maps are what is innermost in every format.
  c.channels_innermost = layer.format != at::MemoryFormat::Contiguous && (c.filters > 1 || c.pixels() == 1);
  c.centred = centred;
  c.tf32 = allows_tf32(&at::Context::allowTF32CuDNN);
  return layer;
}

using Key = std::array<int64_t, 32>;

// `rank` of the tensors: what was timed is known by names that tell 3x3 from 1x3x3.
Key key_of(const ConvCase& c, int64_t rank, const Device& device) {
  Key key{int64_t(c.dtype), rank, c.samples, c.channels, c.filters, c.groups, c.channels_innermost, c.aligned, c.centred,
          c.tf32, device.capability, device.processors, device.shared_memory, device.sm90a, fastest.changes()};
  size_t next = 15;
  for (const auto& values : {c.windows.size, c.windows.kernel, c.windows.stride, c.windows.padding, c.windows.dilation}) {
    for (int d = 0; d < 3; ++d) key[next++] = values[d];
  }
  return key;
}

// What `make` gives for a layer, which takes longer than to look it up.
template <class F>
auto remember(const ConvCase& c, int64_t rank, const Device& device, F&& make) {
  constexpr size_t kMost = 4096;
  thread_local std::map<Key, decltype(make())> known;
  const Key key = key_of(c, rank, device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() == kMost) known.clear();
  return known.emplace(key, make()).first->second;
}

// An algorithm that is preferred takes the layer or raises with the reason. Else it is the fastest that was timed, if that
// takes a layer of these very sizes, or the one that is predicted to be.
Chosen choose(const ConvCase& c, const Device& device, const Tensor& weight, at::IntArrayRef stride) {
  const Algorithm* algorithm = preferred.load();
  if (!algorithm) {
    return remember(c, weight.dim(), device, [&]() -> Chosen {
      const Algorithm* timed = c.centred ? fastest.find(device, name_of(c.dtype), name_of(weight, stride, c.groups)) : nullptr;
      if (timed && !why_not(*timed, c, device)) return {timed, plan_conv(*timed, c, device)};
      return choose_conv(c, device);
    });
  }
  const auto obstacle = why_not(*algorithm, c, device);
  TORCH_CHECK(!obstacle, "algorithm '", algorithm->name, "': ", obstacle.value_or(""));
  return {algorithm, plan_conv(*algorithm, c, device)};
}

std::tuple<Tensor, Tensor, Tensor> conv_center(const Tensor& input, const Tensor& weight, const OptionalTensor& gain,
                                               const OptionalTensor& mean_scale, double constant,
                                               const OptionalTensor& bias, const OptionalTensor& residual,
                                               at::IntArrayRef stride, at::IntArrayRef padding,
                                               at::IntArrayRef dilation, int64_t groups, c10::string_view activation,
                                               double slope, bool save) {
  const Scope scope(input);
  scope.check("weight", weight);
  const Vectors vectors = vectors_of(scope, input, weight.size(0), gain, mean_scale, constant, bias);
  Layer layer = layer_of(input, weight, stride, padding, dilation, groups, vectors.centred());
  ConvCase& c = layer.convolution;
  const auto format = layer.format;
  const Tensor x = c.channels_innermost ? input.contiguous(format) : dense(input);
  const Tensor w = c.channels_innermost ? weight.contiguous(format) : weight;
  c.aligned = are_aligned({data(x), data(w)});
  const Chosen chosen = choose(c, scope.device, weight, stride);
  const ConvPlan& plan = chosen.plan;
  if (chosen.algorithm->way == Way::two_passes) {
    const std::vector<int64_t> no_output_padding(stride.size(), 0);
    const Tensor z =
        at::convolution(x, weight, {}, stride, padding, dilation, false, no_output_padding, groups).contiguous(format);
    const Centring centring{vectors, residual, parse_activation(activation), slope, save, true, false};
    const Centred centred = centring(scope, z, z, format);
    return {z, centred.map_mean, centred.saved};
  }
  scope.check("residual", residual);
  const Tensor output = at::empty(layer.sizes, x.options().memory_format(format));
  const Tensor dense_residual = residual_of(residual, output, format);
  const auto sums = accumulation_options(x);
  const Tensor map_mean = c.centred ? at::empty({c.samples, c.filters}, sums) : at::empty({0}, sums);
  ConvForward p{};
  p.dtype = c.dtype;
  p.activation = parse_activation(activation);
  p.slope = slope;
  p.constant = constant;
  p.centred = c.centred;
  p.samples = c.samples;
  p.channels = c.channels;
  p.filters = c.filters;
  p.groups = groups;
  p.windows = c.windows;
  p.input = data(x);
  p.weight = data(w);
  p.residual = data(dense_residual);
  p.gain = data(vectors.gain);
  p.mean_scale = data(vectors.mean_scale);
  p.bias = data(vectors.bias);
  p.output = mutable_data(output);
  const Tensor saved = saved_for(output, format, p.activation, save);
  if (save && is_piecewise(p.activation)) p.bits = saved.mutable_data_ptr<uint8_t>();
  if (save && is_smooth(p.activation)) p.pre_activation = mutable_data(saved);
  Tensor beta;
  if (c.centred && !plan.held && plan.way != Way::direct) {
    const Tensor means = at::empty({c.samples, c.windows.taps(), c.channels}, sums);
    WindowMean windows{};
    windows.maps = maps_of(x, format);
    windows.maps.channels_innermost = true;  // as x is, also of a single channel
    windows.dtype = c.dtype;
    windows.windows = c.windows;
    windows.input = p.input;
    windows.for_product = true;
    windows.means = mutable_data(means);
    C10_CUDA_CHECK(launch_window_mean(windows, scope.device, scope.stream()));
    beta = at::empty_like(map_mean);
    MeanOfMaps product{};
    product.dtype = c.dtype;
    product.constant = constant;
    product.samples = c.samples;
    product.channels = c.channels;
    product.filters = c.filters;
    product.groups = groups;
    product.taps = c.windows.taps();
    product.window_means = data(means);
    product.weight = p.weight;
    product.gain = p.gain;
    product.mean_scale = p.mean_scale;
    product.bias = p.bias;
    product.map_mean = mutable_data(map_mean);
    product.beta = mutable_data(beta);
    C10_CUDA_CHECK(launch_mean_of_maps(product, scope.stream()));
    p.beta = data(beta);
  } else if (c.centred) {
    p.map_mean = mutable_data(map_mean);
  }
  const Tensor workspace = plan.workspace ? at::empty({plan.workspace}, x.options().dtype(at::kByte)) : Tensor();
  p.workspace = mutable_data(workspace);
  const auto launch = plan.way == Way::sm90   ? launch_conv_sm90
                      : plan.way == Way::sm80 ? launch_conv_sm80
                                              : launch_conv_direct;
  C10_CUDA_CHECK(launch(p, plan, scope.stream()));
  return {output, map_mean, saved};
}

Tensor scale_filters(const Scope& scope, const Tensor& weight, const Tensor& gain) {
  const Tensor from = dense(weight);
  const Tensor scaled = at::empty_like(from);
  ScaleFilters p{};
  p.dtype = dtype_of(from);
  p.filters = from.size(0);
  p.length = from.numel() / p.filters;
  p.weight = data(from);
  p.gain = data(gain);
  p.scaled = mutable_data(scaled);
  C10_CUDA_CHECK(launch_scale_filters(p, scope.stream()));
  return scaled;
}

// How the weight gradient of a layer is computed; nothing: by the library. Where an algorithm is preferred that is not the
// library's, the kernel takes all that it can, else what it is predicted to be faster at.
std::optional<WeightGradPlan> plan_of_weight_grad(const ConvCase& c, const Device& device) {
  const Algorithm* algorithm = preferred.load();
  if (algorithm && algorithm->way == Way::two_passes) return {};
  const auto plan = remember(c, 0, device, [&]() -> std::optional<WeightGradPlan> {
    if (why_no_weight_grad(c, device)) return {};
    return plan_weight_grad(c, device);
  });
  if (plan && !algorithm && plan->seconds > library_weight_grad_seconds(c, device)) return {};
  return plan;
}

struct WeightGrads {
  Tensor weight, gain;
};

WeightGrads weight_grad(const Scope& scope, const Layer& layer, const WeightGradPlan& plan, const Tensor& x,
                        const Tensor& grad, const Tensor& weight, const Tensor& factor, double projection, bool dots) {
  const ConvCase& c = layer.convolution;
  WeightGrads grads;
  grads.weight = at::empty(weight.sizes(), weight.options().memory_format(layer.format));
  const Tensor w = dots ? weight.contiguous(layer.format) : Tensor();
  if (dots) grads.gain = at::empty({c.filters}, accumulation_options(x));
  const Tensor workspace = at::empty({plan.workspace}, x.options().dtype(at::kByte));
  ConvWeightGrad p{};
  p.dtype = c.dtype;
  p.samples = c.samples;
  p.channels = c.channels;
  p.filters = c.filters;
  p.groups = c.groups;
  p.windows = c.windows;
  p.input = data(x);
  p.grad_output = data(grad);
  p.weight = data(w);
  p.factor = data(factor);
  p.projection = projection;
  p.grad = mutable_data(grads.weight);
  p.dots = mutable_data(grads.gain);
  p.workspace = mutable_data(workspace);
  C10_CUDA_CHECK(launch_conv_weight_grad(p, plan, scope.stream()));
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_center_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const OptionalTensor& gain,
    const OptionalTensor& mean_scale, double constant, const Tensor& map_mean, const Tensor& saved,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    c10::string_view activation, double slope, double projection, std::array<bool, 6> mask) {
  const Scope scope(grad_output);
  scope.check("input", input);
  scope.check("weight", weight);
  const Vectors vectors = vectors_of(scope, input, weight.size(0), gain, mean_scale, constant, {});
  Layer layer = layer_of(input, weight, stride, padding, dilation, groups, vectors.centred());
  check_grad_output(grad_output, input, layer.sizes);
  const bool wants_weight = mask[1] || mask[2], through_conv = mask[0] || wants_weight;
  const Error error = center_error(scope, grad_output, {}, {}, vectors, saved, parse_activation(activation), slope,
                                   layer.format, {through_conv, mask[5], mask[3] || mask[4], false});
  const Tensor factor = mask[1] ? vectors.gain : Tensor();
  if (!mask[1]) projection = 0.0;
  WeightGrads of_weight;
  bool by_library = wants_weight;
  if (wants_weight) {
    ConvCase& c = layer.convolution;
    const Tensor x = c.channels_innermost ? input.contiguous(layer.format) : input;
    c.aligned = are_aligned({data(x), data(error.grad_input)});
    if (const auto plan = plan_of_weight_grad(c, scope.device)) {
      of_weight = weight_grad(scope, layer, *plan, x, error.grad_input, weight, factor, projection, mask[2]);
      of_weight.weight = of_weight.weight.contiguous(format_of(weight));
      by_library = false;
    }
  }
  Tensor grad_input;
  if (mask[0] || by_library) {
    const std::vector<int64_t> no_output_padding(stride.size(), 0);
    const Tensor scaled = vectors.gain.defined() && mask[0] ? scale_filters(scope, weight, vectors.gain) : weight;
    Tensor grad_weight;
    std::tie(grad_input, grad_weight, std::ignore) =
        at::convolution_backward(error.grad_input, dense(input), scaled, std::nullopt, stride, padding, dilation, false,
                                 no_output_padding, groups, {mask[0], by_library, false});
    if (by_library) {
      of_weight.weight = grad_weight.contiguous(format_of(weight));
      of_weight.gain = finish_weight_grad(scope, of_weight.weight, weight, factor, {}, projection, mask[2]);
    }
  }
  if (mask[0]) grad_input = grad_input.contiguous(format_of(input));
  if (!mask[1]) of_weight.weight.reset();
  const VectorGrads grads = reduce_samples(scope, error, map_mean, {}, vectors, false, mask[3], mask[4]);
  return {grad_input, of_weight.weight, of_weight.gain, grads.mean_scale, grads.bias, error.grad_residual};
}

// The algorithm that the forward pass of a centred layer takes.
std::string conv_algorithm(const Tensor& input, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups) {
  const Scope scope(input);
  Layer layer = layer_of(input, weight, stride, padding, dilation, groups, true);
  layer.convolution.aligned = are_aligned({data(input), data(weight)});
  return choose(layer.convolution, scope.device, weight, stride).algorithm->name;
}

const Algorithm* parse_algorithm(c10::string_view name) {
  std::string names;
  for (const Algorithm& algorithm : algorithms()) {
    if (name == algorithm.name) return &algorithm;
    names += std::string(names.empty() ? "'" : ", '") + algorithm.name + "'";
  }
  TORCH_CHECK_VALUE(false, "algorithm: got '", name, "', wanted one of ", names);
}

// One algorithm for every convolution, '' for automatic choice.
void prefer_algorithm(c10::string_view name) { preferred = name.empty() ? nullptr : parse_algorithm(name); }

void remember_fastest(c10::string_view capability, c10::string_view dtype, c10::string_view layer, c10::string_view name) {
  const std::string place = std::string(capability) + ": " + std::string(dtype) + ": " + std::string(layer);
  fastest.remember(place, parse_algorithm(name));
}

}  // namespace

DEEPCONTROL_DEFINE_MORE(m) {
  m.def(
      "conv_algorithm(Tensor input, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "SymInt groups) -> str");
  m.def("prefer_algorithm(str name) -> ()", prefer_algorithm);
  m.def("remember_fastest_algorithm(str capability, str dtype, str layer, str name) -> ()", remember_fastest);
}

DEEPCONTROL_REGISTER_CUDA(m) {
  m.impl("conv_algorithm", conv_algorithm);
  m.impl("conv_center", conv_center);
  m.impl("conv_center_backward", conv_center_backward);
}

}  // namespace deepcontrol::cuda
