// What the files of this folder share: how work is shared out to threads, and the steps that ops are made of.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../tensors.h"
#include "kernels.h"

namespace deepcontrol::cpu {

// A task has a sample, where these share out evenly to the threads. Else, if it `may_split_pixels` and there are enough, it
// has a group of its pixels: each thread then finds in its cache what a convolution, which splits pixels, has left there,
// and in memory whole rows. Else, or where they exceed kMostChannels, channels are split. Blocks of channels small enough
// for a slab to stay in the second-level cache measured 2 to 4 times slower on 256 channels of 56 x 56: at power-of-two
// strides a narrow slab falls into few of the cache's sets, while whole rows stream twice from the third level at
// memory-copy speed.
inline Layout layout_of(const Tensor& tensor, at::MemoryFormat format, bool may_split_pixels = false) {
  Layout layout{maps_of(tensor, format), 1};
  layout.rows = layout.pixels;
  if (layout.channels_innermost) {
    constexpr int64_t kCacheLines = 32;
    const int64_t threads = at::get_num_threads();
    const int64_t rounds = (layout.samples + threads - 1) / threads;
    const bool is_even = 4 * rounds * threads <= 5 * layout.samples;
    const int64_t groups = layout.samples * ((layout.pixels + kGroup - 1) / kGroup);
    const bool splits_pixels = may_split_pixels && !is_even && groups >= 4 * threads;
    if (splits_pixels) layout.rows = kGroup;
    const int64_t shares = is_even || splits_pixels ? 1 : threads, block = (layout.channels + shares - 1) / shares;
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

struct Centred {
  Tensor map_mean;  // of the input, (N, C)
  Tensor saved;
};

// Centres `z`, which is dense in `format`, into `output`, which may be `z`.
Centred center_into(const Tensor& z, const Tensor& output, at::MemoryFormat format, const Tensor& gain, const Tensor& mean_scale,
                    double constant, const Tensor& bias, const OptionalTensor& residual, Activation activation,
                    double slope, bool save);

struct Convolved {
  Tensor output;
  Centred centred;  // with the mean of conv(input, gain * weight)
};

// The whole layer in one pass.
Convolved fused_pointwise(const Tensor& input, const Tensor& weight, at::MemoryFormat format, at::IntArrayRef stride,
                          const Tensor& gain, const Tensor& mean_scale, double constant, const Tensor& bias,
                          const OptionalTensor& residual, Activation activation, double slope, bool save);

// The convolution alone.
Tensor pointwise_product(const Tensor& input, const Tensor& weight, at::MemoryFormat format, at::IntArrayRef stride);

struct PointwiseGrads {
  Tensor grad_input;
  Tensor grad_weight;  // scale * dw'
  Tensor sums, grad_residual;
};

// `scale` multiplies dz'; `weight` is what grad_input is computed with. Sums are always there.
PointwiseGrads fused_pointwise_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                        at::MemoryFormat format, at::IntArrayRef stride, const Tensor& scale,
                                        const Tensor& mean_scale, double constant, const Tensor& saved,
                                        Activation activation, double slope, bool wants_input, bool wants_weight,
                                        bool wants_residual);

// The weight gradient of a convolution by several taps as a matrix product over an unfolded input, in the dtype of the weight.
Tensor unfolded_weight_grad(const Tensor& grad_output, const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation);

// The convolution by 3 x 3 taps at stride one and its gradients after Winograd, float32 and bfloat16. `format` is that of the
// maps; the weight's gradient is in the dtype and format of the weight.
Tensor winograd_convolution(const Tensor& input, const Tensor& weight, at::MemoryFormat format, at::IntArrayRef padding);
Tensor winograd_input_grad(const Tensor& grad_output, const Tensor& weight, at::IntArrayRef input_sizes,
                           at::MemoryFormat format, at::IntArrayRef padding);
Tensor winograd_weight_grad(const Tensor& grad_output, const Tensor& input, const Tensor& weight, at::MemoryFormat format,
                            at::IntArrayRef padding);

// The whole layer of a depthwise convolution in one pass. Everything is brought into `format`, the output's.
Convolved direct_depthwise(const Tensor& input, const Tensor& weight, at::IntArrayRef output_sizes,
                           at::MemoryFormat format, at::IntArrayRef stride, at::IntArrayRef padding, const Tensor& gain,
                           const Tensor& mean_scale, double constant, const Tensor& bias, const OptionalTensor& residual,
                           Activation activation, double slope, bool save);

struct DepthwiseGrads {
  Tensor grad_input;
  Tensor grad_weight, grad_gain;  // of the layer: multiplied by the gain and projected
  Tensor sums, grad_residual;
};

// Its backward pass.
DepthwiseGrads direct_depthwise_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                         at::MemoryFormat format, at::IntArrayRef stride, at::IntArrayRef padding,
                                         const Tensor& gain, const Tensor& mean_scale, double constant,
                                         const Tensor& saved, Activation activation, double slope, double projection,
                                         bool wants_input, bool wants_weight, bool wants_gain, bool wants_sums,
                                         bool wants_residual);

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

// Multiplies the means (N, C) of maps by the gain (C,) of their channels, in place.
void scale_means(const Tensor& map_mean, const Tensor& gain);

// Divides, multiplies and projects in place; returns sum(weight * grad / divisor) if asked, else an undefined tensor.
Tensor finish_weight_grad(const Tensor& grad, const Tensor& weight, const Tensor& factor, const Tensor& divisor,
                          double projection, bool dots);

}  // namespace deepcontrol::cpu
