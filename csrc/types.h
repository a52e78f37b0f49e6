// What every backend means by a dtype, an activation and a batch of maps. No torch headers: kernels include this too.
#pragma once

#include <cstdint>

namespace deepcontrol {

enum class Dtype { f32, f64, bf16, f16 };

// The derivatives of the first four take two values at most, those of the others depend on the pre-activation.
enum class Activation { identity, relu, leaky_relu, relu6, silu, gelu, hardswish };

constexpr bool is_smooth(Activation activation) { return activation > Activation::relu6; }
constexpr bool is_piecewise(Activation activation) {
  return activation != Activation::identity && !is_smooth(activation);
}

// A dense (N, C, *spatial) tensor as rows: of channels, one row a pixel (channels_last), or of pixels, one row a map.
struct Maps {
  int64_t samples;
  int64_t channels;
  int64_t pixels;
  bool channels_innermost;

  constexpr int64_t elements() const { return samples * channels * pixels; }
  constexpr int64_t bytes_of_bits_row() const { return ((channels_innermost ? channels : pixels) + 7) / 8; }
};

// Which pixels each tap of a kernel sees. Spatial sizes, outermost first, with leading dimensions of one.
struct Windows {
  int64_t size[3], output[3], kernel[3], stride[3], padding[3], dilation[3];

  constexpr int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

}  // namespace deepcontrol
