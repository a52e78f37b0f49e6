// Schemas of the ops; each backend registers its kernels for its own dispatch key.
//
// Conventions shared by all of them. Tensors are (N, C, *spatial) with 1 to 3 spatial dimensions. Vectors are (C,) or
// (1,). `constant` stands for mean_scale where no tensor is given; 0.0 skips the mean. Sums and map means are float32,
// float64 for float64 inputs.
//
// `saved` is what backward needs of the activation: nothing for identity (shape (0,)), one bit an element for relu,
// leaky_relu and relu6 (uint8, rows padded to whole bytes), the pre-activation for silu, gelu and hardswish. So the
// output itself is never kept, and backward reads 1/16 or 1/32 of what it would read.
//
// The weight of a convolution has the dtype of the input. On a CPU it may be float32 beside a 16-bit input: it is rounded
// to the input's dtype where products are computed, and its gradient is float32.
//
// `map_mean` is (N, C): of `input` for center, of conv(input, gain * weight) for conv_center; (0,) without a mean.

#include "library.h"

DEEPCONTROL_DEFINE(m) {
  m.def(
      "center(Tensor input, Tensor? gain, Tensor? mean_scale, float constant, Tensor? bias, Tensor? residual, "
      "str activation, float slope, bool save) -> (Tensor output, Tensor map_mean, Tensor saved)");
  // The same, and the mean over each map of the output, (N, C): what a convolution that follows needs to know of it.
  m.def(
      "center_with_mean(Tensor input, Tensor? gain, Tensor? mean_scale, float constant, Tensor? bias, "
      "Tensor? residual, str activation, float slope, bool save) "
      "-> (Tensor output, Tensor map_mean, Tensor saved, Tensor output_mean)");
  // grad_output has the memory format of the output, which is how the bits in `saved` are laid out.
  m.def(
      "center_backward(Tensor grad_output, Tensor? input, Tensor? gain, Tensor? mean_scale, float constant, "
      "Tensor map_mean, Tensor saved, str activation, float slope, bool[5] mask) "
      "-> (Tensor grad_input, Tensor grad_gain, Tensor grad_mean_scale, Tensor grad_bias, Tensor grad_residual)");
  m.def(
      "conv_center(Tensor input, Tensor weight, Tensor? gain, Tensor? mean_scale, float constant, Tensor? bias, "
      "Tensor? residual, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, "
      "float slope, bool save) -> (Tensor output, Tensor map_mean, Tensor saved)");
  m.def(
      "conv_center_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? gain, Tensor? mean_scale, "
      "float constant, Tensor map_mean, Tensor saved, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "SymInt groups, str activation, float slope, float projection, bool[6] mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_gain, Tensor grad_mean_scale, Tensor grad_bias, "
      "Tensor grad_residual)");
  m.def(
      "window_mean(Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation) "
      "-> Tensor");
  m.def("project_kernel_gradients_(Tensor(a!)[] gradients, float weight) -> ()");
  // grad_weight holds scale * dw' on entry and project(gain * dw') on return; the result is sum(weight * dw'), (O,).
  m.def(
      "finish_weight_grad_(Tensor(a!) grad_weight, Tensor weight, Tensor? gain, Tensor? scale, float projection) "
      "-> Tensor");
}
