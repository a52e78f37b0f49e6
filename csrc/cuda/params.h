// What passes between dispatch.cpp and the kernels: plain structs, and functions that launch a kernel on `stream`.
// Vectors, means and sums are in the accumulation type: double for f64, else float. Null means absent.
#pragma once

#include <cuda_runtime_api.h>

#include "conv_plan.h"
#include "plan.h"

namespace deepcontrol::cuda {

struct CenterForward {
  Maps maps;
  Dtype dtype;
  Activation activation;
  double slope;
  double constant;  // mean_scale where the vector is null
  bool mean_of_scaled;  // map_mean is multiplied by gain
  const void* input;
  const void* residual;
  const void* gain;        // (C)
  const void* mean_scale;  // (C)
  const void* bias;        // (C)
  void* output;            // may be `input`
  void* map_mean;          // (N, C), null: leave the mean in
  void* output_mean;       // (N, C); not where sums and apply are two launches
  void* pre_activation;    // like output, for smooth activations
  uint8_t* bits;           // rows of bits, for piecewise linear activations
  void* workspace;         // plan.workspace elements
};
cudaError_t launch_center_forward_nhwc(const CenterForward& p, const CenterPlan& plan, cudaStream_t stream);
cudaError_t launch_center_forward_nchw(const CenterForward& p, const CenterPlan& plan, cudaStream_t stream);

struct CenterBackward {
  Maps maps;
  Dtype dtype;
  Activation activation;
  double slope;
  double constant;
  bool centred;
  const void* grad_output;
  const void* input;           // for `dots`
  const void* pre_activation;  // smooth activations
  const uint8_t* bits;         // piecewise linear activations
  const void* scale;           // (C): grad_input = scale * (e - mean_scale * mean(e))
  const void* mean_scale;      // (C)
  void* grad_input;
  void* grad_residual;  // e
  void* sums;           // (N, C): sum of e
  void* dots;           // (N, C): sum of e * input
  void* workspace;      // 2 * plan.workspace elements
};
cudaError_t launch_center_backward_nhwc(const CenterBackward& p, const CenterPlan& plan, cudaStream_t stream);
cudaError_t launch_center_backward_nchw(const CenterBackward& p, const CenterPlan& plan, cudaStream_t stream);

// Sums over the samples: grad_bias = sum of sums; grad_mean_scale = - scale * sum of map_mean * sums;
// grad_gain = sum of dots - mean_scale * map_mean * sums. Each (C) and only where not null.
struct ReduceSamples {
  Dtype dtype;
  int64_t samples, channels;
  double constant;         // mean_scale where the vector is null
  const void* sums;        // (N, C)
  const void* dots;        // (N, C)
  const void* map_mean;    // (N, C), null: the mean was left in
  const void* scale;       // (C)
  const void* mean_scale;  // (C)
  void* grad_gain;
  void* grad_mean_scale;
  void* grad_bias;
};
cudaError_t launch_reduce_samples(const ReduceSamples& p, cudaStream_t stream);

struct WindowMean {
  Maps maps;
  Dtype dtype;
  Windows windows;
  const void* input;
  bool for_product;  // (N, taps, C) in the accumulation type, else (N, C, *kernel) in the input's
  void* means;       // contiguous
};
cudaError_t launch_window_mean(const WindowMean& p, const Device& device, cudaStream_t stream);

// A convolution in one pass; everything is channels_last, so maps are rows of channels and filters rows of (tap, channel).
// Vectors and means are float, in double for a direct kernel of f64.
struct ConvForward {
  Dtype dtype;
  Activation activation;
  double slope;
  double constant;  // mean_scale where the vector is null
  bool centred;
  int64_t samples, channels, filters, groups;
  Windows windows;
  const void* input;       // (N, *size, channels)
  const void* weight;      // (filters, *kernel, channels / groups)
  const void* residual;    // like output
  const void* gain;        // (filters)
  const void* mean_scale;  // (filters)
  const void* bias;        // (filters)
  const void* beta;        // (N, filters): what gain * z is shifted by, of plans whose means are known before; else null
  void* output;            // (N, *output, filters)
  void* map_mean;          // (N, filters), of plans that take the means themselves; null where nothing is centred
  void* pre_activation;    // like output, for smooth activations
  uint8_t* bits;           // rows of bits, for piecewise linear activations
  void* workspace;         // plan.workspace bytes, aligned to 16

  constexpr int64_t group_channels() const { return channels / groups; }
  constexpr int64_t group_filters() const { return filters / groups; }
  constexpr int64_t pixels() const { return windows.output[0] * windows.output[1] * windows.output[2]; }
};
cudaError_t launch_conv_sm80(const ConvForward& p, const ConvPlan& plan, cudaStream_t stream);
cudaError_t launch_conv_sm90(const ConvForward& p, const ConvPlan& plan, cudaStream_t stream);
cudaError_t launch_conv_direct(const ConvForward& p, const ConvPlan& plan, cudaStream_t stream);

// map_mean = gain * (window means times weight), beta = bias - mean_scale * map_mean.
struct MeanOfMaps {
  Dtype dtype;  // of the weight
  double constant;
  int64_t samples, channels, filters, groups, taps;
  const void* window_means;  // (N, taps, channels), float
  const void* weight;        // (filters, taps, channels / groups)
  const void* gain;
  const void* mean_scale;
  const void* bias;
  void* map_mean;  // (N, filters)
  void* beta;      // (N, filters)
};
cudaError_t launch_mean_of_maps(const MeanOfMaps& p, cudaStream_t stream);

// The gradient of a convolution's weight, with gain, dgain and projection; everything is channels_last.
struct ConvWeightGrad {
  Dtype dtype;
  int64_t samples, channels, filters, groups;
  Windows windows;
  const void* input;        // (N, *size, channels)
  const void* grad_output;  // (N, *output, filters), in front of the convolution's output
  const void* weight;       // (filters, *kernel, channels / groups), for `dots`
  const void* factor;       // (filters): the gradient is multiplied by it
  double projection;        // and loses that much of its mean over the taps, if there is more than one tap
  void* grad;               // like weight
  void* dots;               // (filters): sum of weight * grad before that
  void* workspace;          // plan.workspace bytes, aligned to 16

  constexpr int64_t group_channels() const { return channels / groups; }
  constexpr int64_t group_filters() const { return filters / groups; }
};
cudaError_t launch_conv_weight_grad(const ConvWeightGrad& p, const WeightGradPlan& plan, cudaStream_t stream);

// scaled[o] = gain[o] * weight[o]; both dense alike, `length` elements a filter.
struct ScaleFilters {
  Dtype dtype;
  int64_t filters, length;
  const void* weight;
  const void* gain;  // (filters)
  void* scaled;
};
cudaError_t launch_scale_filters(const ScaleFilters& p, cudaStream_t stream);

// The gradient of one weight, (filters, channels, taps), in place.
struct WeightGrad {
  Dtype dtype;
  bool channels_innermost;
  int64_t filters, channels, taps;
  void* grad;
  const void* weight;   // for `dots`
  const void* factor;   // (filters): the gradient is multiplied by it
  const void* divisor;  // (filters): what `dots` are divided by
  void* dots;           // (filters): sum of weight * grad / divisor
};
// Multiplies, sums and subtracts `projection` times the mean over the taps. All `count` gradients of one dtype go into
// one launch, or into as few as their table fits.
cudaError_t launch_finish_weight_grads(const WeightGrad* gradients, int64_t count, double projection, cudaStream_t stream);

}  // namespace deepcontrol::cuda
