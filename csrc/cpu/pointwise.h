// The convolution by one tap as a matrix product: what both layouts share, and what the rest of the folder calls.
#pragma once

#include "common.h"

namespace deepcontrol::cpu {

// The pixels that the stride meets, as a view.
Tensor met_pixels(const Tensor& x, at::IntArrayRef stride);

// map_mean, (N, O), of conv(x, gain * weight) from the sums of `x` over its maps.
Tensor mean_of_product(const Tensor& x, const Tensor& weight, at::MemoryFormat format, const Tensor& gain);

// The gradient of `input` that is `met` on the pixels that the stride meets and zero between them.
Tensor between_zeros(const Tensor& met, const Tensor& input, at::MemoryFormat format, at::IntArrayRef stride);

// The layer in contiguous layout; the arguments are those of fused_pointwise.
Convolved fused_planar(const Tensor& input, const Tensor& weight, at::IntArrayRef stride, const Tensor& gain,
                       const Tensor& mean_scale, double constant, const Tensor& bias, const OptionalTensor& residual,
                       Activation activation, double slope, bool save);

// Its backward pass; the arguments are those of fused_pointwise_backward.
PointwiseGrads fused_planar_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                     at::IntArrayRef stride, const Tensor& scale, const Tensor& mean_scale,
                                     double constant, const Tensor& saved, Activation activation, double slope,
                                     bool wants_input, bool wants_weight, bool wants_residual);

}  // namespace deepcontrol::cpu
