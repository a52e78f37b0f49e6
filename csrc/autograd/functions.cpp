// center and conv_center as nodes of autograd's graph, for any library of ops with the schemas of ops.cpp.
//
// A node's backward is the library's own op. Where it must be differentiable itself, or is part of a second derivative,
// it is the formulas of deepcontrol_cuda/autograd.py, which are registered as the ops `*_derivatives`.
//
// The map mean and what the activation keeps are outputs of the nodes, not only saved tensors: so autograd can send
// gradients into them, and a second derivative needs neither bias nor residual.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <string>
#include <string_view>

#include "../tensors.h"

namespace deepcontrol {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Integers = c10::SymIntArrayRef;

template <class Signature>
class Op {
 public:
  explicit Op(const std::string& name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<Signature>()) {}

  template <class... Arguments>
  auto operator()(Arguments&&... arguments) const {
    return handle_.call(std::forward<Arguments>(arguments)...);
  }

 private:
  c10::TypedOperatorHandle<Signature> handle_;
};

using CenterBackward = Five(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
                            const Tensor&, const Tensor&, std::string_view, double, std::array<bool, 5>);
using ConvCenterBackward = Six(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                               double, const Tensor&, const Tensor&, Integers, Integers, Integers, c10::SymInt,
                               std::string_view, double, double, std::array<bool, 6>);

struct Library {
  explicit Library(const std::string& name)
      : center(name + "::center"),
        center_backward(name + "::center_backward"),
        conv_center(name + "::conv_center"),
        conv_center_backward(name + "::conv_center_backward") {}

  Op<Three(const Tensor&, const OptionalTensor&, const OptionalTensor&, double, const OptionalTensor&,
           const OptionalTensor&, std::string_view, double, bool)>
      center;
  Op<CenterBackward> center_backward;
  Op<Three(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, double, const OptionalTensor&,
           const OptionalTensor&, Integers, Integers, Integers, c10::SymInt, std::string_view, double, bool)>
      conv_center;
  Op<ConvCenterBackward> conv_center_backward;
};

static const Library& library_named(std::string_view name) {
  static std::mutex mutex;
  static std::map<std::string, Library, std::less<>> libraries;
  std::lock_guard lock(mutex);
  const auto found = libraries.find(name);
  if (found != libraries.end()) return found->second;
  return libraries.emplace(name, std::string(name)).first->second;
}

static bool is_there(const OptionalTensor& tensor) { return tensor && tensor->defined(); }

// Whether an op goes through its node: for backward, or to refuse forward-mode derivatives.
template <class... Tensors>
static bool is_recorded(const Tensors&... tensors) {
  const auto has = [](const OptionalTensor& t, auto&& what) { return is_there(t) && what(*t); };
  const auto requires_grad = [](const Tensor& t) { return t.requires_grad(); };
  const auto has_tangent = [](const Tensor& t) { return t._fw_grad(0).defined(); };
  return (at::GradMode::is_enabled() && (has(tensors, requires_grad) || ...)) || (has(tensors, has_tangent) || ...);
}

// What backward needs beside tensors.
struct Settings {
  std::string library, activation;
  double constant, slope, projection;
  std::vector<c10::SymInt> geometry;  // stride, padding, dilation; of center nothing
  int64_t groups;
  bool has_bias, has_residual;

  Integers part(size_t i) const { return Integers(geometry).slice(i * geometry.size() / 3, geometry.size() / 3); }

  // In values that compiled autograd can take apart.
  void keep(AutogradContext* ctx, const Tensor& output) const {
    ctx->saved_data["names"] = std::vector<std::string>{library, activation};
    ctx->saved_data["reals"] = std::vector<double>{constant, slope, projection};
    std::vector<c10::SymInt> integers{groups, int64_t(has_bias), int64_t(has_residual), int64_t(output.scalar_type()),
                                      int64_t(format_of(output)), int64_t(geometry.size())};
    integers.insert(integers.end(), geometry.begin(), geometry.end());
    integers.insert(integers.end(), output.sym_sizes().begin(), output.sym_sizes().end());
    ctx->saved_data["integers"] = Integers(integers);
  }
};

struct Kept : Settings {
  std::vector<c10::SymInt> sizes;  // of the output, as the next two
  at::ScalarType dtype;
  at::MemoryFormat format;

  explicit Kept(AutogradContext* ctx) {
    const auto names = ctx->saved_data["names"].toList();
    library = names.get(0).toStringRef();
    activation = names.get(1).toStringRef();
    const auto reals = ctx->saved_data["reals"].toDoubleVector();
    constant = reals[0], slope = reals[1], projection = reals[2];
    const auto integers = ctx->saved_data["integers"].toSymIntVector();
    const auto integer = [&](size_t i) { return integers[i].expect_int(); };
    groups = integer(0), has_bias = integer(1), has_residual = integer(2);
    dtype = at::ScalarType(integer(3)), format = at::MemoryFormat(integer(4));
    const auto beyond_geometry = integers.begin() + 6 + integer(5);
    geometry.assign(integers.begin() + 6, beyond_geometry);
    sizes.assign(beyond_geometry, integers.end());
  }

  // The gradient of the output in its memory format, which is how bits are laid out.
  Tensor dense(const Tensor& grad_output, const Tensor& like) const {
    return (grad_output.defined() ? grad_output : at::zeros_symint(sizes, like.options().dtype(dtype)))
        .contiguous(format);
  }
};

// Whether backward must itself be differentiable, or is part of a second derivative.
static bool is_differentiable(const variable_list& grads) {
  return at::GradMode::is_enabled() || grads[1].defined() || grads[2].defined();
}

// Which of a node's tensors want a gradient; autograd counts only those that are there.
template <size_t N>
static std::array<bool, N> wanted(AutogradContext* ctx, const std::array<bool, N>& there) {
  std::array<bool, N> mask{};
  size_t edge = 0;
  for (size_t i = 0; i < N; ++i) mask[i] = there[i] && ctx->needs_input_grad(edge++);
  return mask;
}

// Gradients of vectors are (C,) in the accumulation type; the engine sums and casts them to what the vectors are.
struct Center : Function<Center> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& gain,
                               const OptionalTensor& mean_scale, const OptionalTensor& bias,
                               const OptionalTensor& residual, const Settings& s) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, map_mean, saved] = library_named(s.library).center(input, gain, mean_scale, s.constant, bias, residual, s.activation,
                                                      s.slope, true);
    const bool wants_gain = is_there(gain) && gain->requires_grad();
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({wants_gain ? input : Tensor(), gain.value_or(Tensor()), mean_scale.value_or(Tensor()),
                            map_mean, saved});
    s.keep(ctx, output);
    return {output, map_mean, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const Op<Five(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, double, const Tensor&, const Tensor&,
                         std::string_view, double, std::array<bool, 5>)>
        derivatives("deepcontrol_autograd::center_derivatives");
    const variable_list kept = ctx->get_saved_variables();
    const Tensor &input = kept[0], &gain = kept[1], &mean_scale = kept[2], &map_mean = kept[3], &saved = kept[4];
    const Kept s(ctx);
    auto mask = wanted<5>(ctx, {true, gain.defined(), mean_scale.defined(), s.has_bias, s.has_residual});
    Five results;
    if (is_differentiable(grads)) {
      results = derivatives(s.dense(grads[0], map_mean), grads[1], grads[2], input, gain, mean_scale, s.constant,
                                 map_mean, saved, s.activation, s.slope, mask);
    } else if (grads[0].defined()) {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      const bool passes = mask[4] && s.activation == "identity";
      mask[4] = mask[4] && !passes;
      results = library_named(s.library).center_backward(s.dense(grads[0], map_mean), input, gain, mean_scale, s.constant, map_mean,
                                          saved, s.activation, s.slope, mask);
      if (passes) std::get<4>(results) = grads[0];
    }
    auto& [grad_input, grad_gain, grad_mean_scale, grad_bias, grad_residual] = results;
    return {grad_input, grad_gain, grad_mean_scale, grad_bias, grad_residual, Tensor()};
  }
};

struct ConvCenter : Function<ConvCenter> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                               const OptionalTensor& gain, const OptionalTensor& mean_scale, const OptionalTensor& bias,
                               const OptionalTensor& residual, const Settings& s) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, map_mean, saved] =
        library_named(s.library).conv_center(input, weight, gain, mean_scale, s.constant, bias, residual, s.part(0), s.part(1),
                              s.part(2), s.groups, s.activation, s.slope, true);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({input, weight, gain.value_or(Tensor()), mean_scale.value_or(Tensor()), map_mean, saved});
    s.keep(ctx, output);
    return {output, map_mean, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const Op<Six(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                        const OptionalTensor&, const OptionalTensor&, double, const Tensor&, const Tensor&, Integers,
                        Integers, Integers, c10::SymInt, std::string_view, double, double, std::array<bool, 6>)>
        derivatives("deepcontrol_autograd::conv_center_derivatives");
    const variable_list kept = ctx->get_saved_variables();
    const Tensor &input = kept[0], &weight = kept[1], &gain = kept[2], &mean_scale = kept[3], &map_mean = kept[4],
                 &saved = kept[5];
    const Kept s(ctx);
    auto mask = wanted<6>(ctx, {true, true, gain.defined(), mean_scale.defined(), s.has_bias, s.has_residual});
    Six results;
    if (is_differentiable(grads)) {
      results = derivatives(s.dense(grads[0], map_mean), grads[1], grads[2], input, weight, gain, mean_scale,
                                 s.constant, map_mean, saved, s.part(0), s.part(1), s.part(2), s.groups, s.activation,
                                 s.slope, s.projection, mask);
    } else if (grads[0].defined()) {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      const bool passes = mask[5] && s.activation == "identity";
      mask[5] = mask[5] && !passes;
      results = library_named(s.library).conv_center_backward(grads[0], input, weight, gain, mean_scale, s.constant, map_mean, saved,
                                               s.part(0), s.part(1), s.part(2), s.groups, s.activation, s.slope,
                                               s.projection, mask);
      if (passes) std::get<5>(results) = grads[0];
    }
    auto& [grad_input, grad_weight, grad_gain, grad_mean_scale, grad_bias, grad_residual] = results;
    return {grad_input, grad_weight, grad_gain, grad_mean_scale, grad_bias, grad_residual, Tensor()};
  }
};

static Tensor center(const Tensor& input, const OptionalTensor& gain, const OptionalTensor& mean_scale, double constant,
                     const OptionalTensor& bias, const OptionalTensor& residual, std::string_view activation,
                     double slope, std::string_view library) {
  if (is_recorded(input, gain, mean_scale, bias, residual)) {
    const Settings settings{std::string(library), std::string(activation), constant, slope, 0.0, {}, 1,
                            is_there(bias), is_there(residual)};
    return Center::apply(input, gain, mean_scale, bias, residual, settings)[0];
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return std::get<0>(library_named(library).center(input, gain, mean_scale, constant, bias, residual, activation,
                                                        slope, false));
}

static Tensor conv_center(const Tensor& input, const Tensor& weight, const OptionalTensor& gain,
                          const OptionalTensor& mean_scale, double constant, const OptionalTensor& bias,
                          const OptionalTensor& residual, Integers stride, Integers padding, Integers dilation,
                          c10::SymInt groups, std::string_view activation, double slope, double projection,
                          std::string_view library) {
  if (is_recorded(input, weight, gain, mean_scale, bias, residual)) {
    Settings settings{std::string(library), std::string(activation), constant, slope, projection, stride.vec(),
                      groups.expect_int(), is_there(bias), is_there(residual)};
    settings.geometry.insert(settings.geometry.end(), padding.begin(), padding.end());
    settings.geometry.insert(settings.geometry.end(), dilation.begin(), dilation.end());
    return ConvCenter::apply(input, weight, gain, mean_scale, bias, residual, settings)[0];
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return std::get<0>(library_named(library).conv_center(input, weight, gain, mean_scale, constant, bias, residual,
                                                             stride, padding, dilation, groups, activation, slope,
                                                             false));
}

TORCH_LIBRARY(deepcontrol_autograd, m) {
  // Of `library`, a namespace of ops with the schemas of ops.cpp.
  m.def(
      "center(Tensor input, Tensor? gain, Tensor? mean_scale, float constant, Tensor? bias, Tensor? residual, "
      "str activation, float slope, str library) -> Tensor",
      center);
  m.def(
      "conv_center(Tensor input, Tensor weight, Tensor? gain, Tensor? mean_scale, float constant, Tensor? bias, "
      "Tensor? residual, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, "
      "float slope, float projection, str library) -> Tensor",
      conv_center);
  // The schemas of the backwards, with gradients of all that forward returns; implemented in Python.
  m.def(
      "center_derivatives(Tensor grad_output, Tensor? grad_mean, Tensor? grad_saved, Tensor? input, Tensor? gain, "
      "Tensor? mean_scale, float constant, Tensor map_mean, Tensor saved, str activation, float slope, bool[5] mask) "
      "-> (Tensor grad_input, Tensor grad_gain, Tensor grad_mean_scale, Tensor grad_bias, Tensor grad_residual)");
  m.def(
      "conv_center_derivatives(Tensor grad_output, Tensor? grad_mean, Tensor? grad_saved, Tensor input, Tensor weight, "
      "Tensor? gain, Tensor? mean_scale, float constant, Tensor map_mean, Tensor saved, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, float slope, float projection, bool[6] mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_gain, Tensor grad_mean_scale, Tensor grad_bias, "
      "Tensor grad_residual)");
}

}  // namespace deepcontrol
