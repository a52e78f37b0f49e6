#include "conv_plan.h"

#include <algorithm>
#include <cassert>

namespace deepcontrol::cuda {

// A100 SXM 80GB and H100 SXM. mma.sync, which on an A100 is all there is, was measured to reach 62.9 % of an H100's wgmma
// (arXiv 2402.13499).
Ceilings ceilings_of(const Device& device) {
  if (device.capability < 90) return {2.039e12, 108 * 128 * 1.41e9, 312e12, 1.0};
  return {3.35e12, 132 * 128 * 1.83e9, 989.4e12, 0.629};
}

namespace {

double size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

double weights_of(const ConvCase& c) { return double(c.filters) * c.group_channels() * c.windows.taps(); }

// Operations take twice as long on f32, as TF32.
double operation_seconds(const ConvCase& c, const Ceilings& ceilings) {
  return 2.0 * c.rows() * weights_of(c) / ceilings.operations * size_of(c.dtype) / 2;
}

// The library's convolution is taken to be as fast as the fastest kernel here where that has what it is made for, dense
// channels in whole vectors: compared by its bounds alone it would win over kernels of which more is known. center reads
// and writes the output again, in place, and a bit for each element.
double two_passes_seconds(ConvCase c, const Device& device) {
  c.centred = false;
  const double bound = library_seconds(c, device), output = double(c.rows()) * c.filters;
  std::optional<double> bare;
  for (const Algorithm& algorithm : algorithms()) {
    if (algorithm.way == Way::two_passes || c.groups > 1 || c.channels % 8 || why_not(algorithm, c, device)) continue;
    const double seconds = plan_conv(algorithm, c, device).seconds;
    bare = bare ? std::min(*bare, seconds) : seconds;
  }
  return std::max(bare.value_or(bound), bound) + output * (2 * size_of(c.dtype) + 1.0 / 8) / ceilings_of(device).bytes;
}

}  // namespace

double library_seconds(const ConvCase& c, const Device& device) {
  const Ceilings ceilings = ceilings_of(device);
  const double input = double(c.samples) * c.input_pixels() * c.channels, output = double(c.rows()) * c.filters;
  const double bytes = (input + output + weights_of(c)) * size_of(c.dtype);
  return std::max(bytes / ceilings.bytes, operation_seconds(c, ceilings));
}

// The library's product is taken to be as fast as ours would be with all of the GPU's instructions; behind it the gradient
// goes in and out, and the weight in for the gain's gradient.
double library_weight_grad_seconds(const ConvCase& c, const Device& device) {
  const Ceilings ceilings = ceilings_of(device);
  double product = library_seconds(c, device);
  if (c.groups == 1 && c.channels % 8 == 0 && !why_no_weight_grad(c, device)) {
    product = std::max(product, plan_weight_grad(c, device).seconds * ceilings.mma_sync);
  }
  return product + 3 * weights_of(c) * size_of(c.dtype) / ceilings.bytes;
}

const std::array<Algorithm, 6>& algorithms() {
  static const std::array<Algorithm, 6> all{{
      {"fused sm90", Way::sm90, false},
      {"held sm90", Way::sm90, true},
      {"fused sm80", Way::sm80, false},
      {"held sm80", Way::sm80, true},
      {"direct", Way::direct, false},
      {"two passes", Way::two_passes, false},
  }};
  return all;
}

std::optional<std::string> why_not(const Algorithm& algorithm, const ConvCase& c, const Device& device) {
  if (algorithm.way == Way::two_passes) return {};
  if (!c.channels_innermost) return "the maps are not in channels_last";
  if (std::min({c.samples, c.pixels(), c.filters, c.input_pixels(), c.group_channels()}) == 0) {
    return "there is nothing to compute";
  }
  if (algorithm.held && !c.centred) return "nothing is centred, so no means are taken";
  switch (algorithm.way) {
    case Way::sm90: return why_not_sm90(c, device, algorithm.held);
    case Way::sm80: return why_not_sm80(c, device, algorithm.held);
    case Way::direct: return why_not_direct(c, device);
    default: return {};
  }
}

ConvPlan plan_conv(const Algorithm& algorithm, const ConvCase& c, const Device& device) {
  switch (algorithm.way) {
    case Way::sm90: return plan_sm90(c, device, algorithm.held);
    case Way::sm80: return plan_sm80(c, device, algorithm.held);
    case Way::direct: return plan_direct(c, device);
    default: break;
  }
  ConvPlan plan{};
  plan.way = Way::two_passes;
  plan.seconds = two_passes_seconds(c, device);
  return plan;
}

Chosen choose_conv(const ConvCase& c, const Device& device) {
  std::optional<Chosen> best;
  for (const Algorithm& algorithm : algorithms()) {
    if (why_not(algorithm, c, device)) continue;
    const Chosen one{&algorithm, plan_conv(algorithm, c, device)};
    if (!best || one.plan.seconds < best->plan.seconds) best = one;
  }
  assert(best);
  return *best;
}

}  // namespace deepcontrol::cuda
