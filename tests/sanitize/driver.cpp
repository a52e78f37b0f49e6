// Calls every CPU kernel of one instruction set (DEEPCONTROL_ISA) on odd sizes, in memory that ends exactly where the
// data ends, and compares with plain loops. tests/test_sanitizers.py compiles it with the kernels, under sanitizers.
//
//   driver isas                      names what this processor can run
//   driver run heap|guard            all cases
//   driver run heap|guard NAME       the same with every buffer called NAME one element too small: must not end well
//
// heap: the address sanitizer surrounds the buffers, but does not see the masked loads and stores of AVX-512.
// guard: the page behind each buffer cannot be touched, which every instruction notices, but only behind the end.

#include <c10/util/Half.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

using namespace deepcontrol;
using namespace deepcontrol::cpu;

static bool guarded;
static std::string too_small;
static std::string current;  // the case, for messages
static uint32_t state = 1;

static uint32_t random_below(uint32_t bound) {
  state = state * 1664525 + 1013904223;
  return (state >> 8) % bound;
}

// Memory of an exact size, poisoned with NaN (all bits set in every dtype).
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    if (!guarded) {
      base_ = data_ = std::malloc(bytes);
    } else {
      const size_t page = sysconf(_SC_PAGESIZE);
      mapped_ = (bytes + page - 1) / page * page + page;
      base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (base_ == MAP_FAILED || mprotect(static_cast<char*>(base_) + mapped_ - page, page, PROT_NONE)) std::abort();
      data_ = static_cast<char*>(base_) + mapped_ - page - bytes;
    }
    std::memset(data_, 0xff, bytes);
  }
  ~Memory() { guarded ? void(munmap(base_, mapped_)) : std::free(base_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  size_t bytes_, mapped_ = 0;
  void* base_;
  void* data_;
};

static size_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
static Dtype accumulation(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// The elements of one argument; absent ones have a null pointer.
class Values {
 public:
  Values(const char* name, Dtype dtype, int64_t count, bool present = true)
      : name_(name), dtype_(dtype), count_(count - (too_small == name)), present_(present),
        memory_(present ? count_ * size_of(dtype) : 0) {}

  Dtype dtype() const { return dtype_; }

  // Multiples of 1/8 (of `unit`) from -2 to 2, which every dtype holds exactly.
  Values& fill(double unit = 1) {
    for (int64_t i = 0; present_ && i < count_; ++i) set(i, unit * (int(random_below(33)) - 16) / 8.0);
    return *this;
  }
  void set(int64_t i, double value) {
    const float narrow = float(value);
    if (dtype_ == Dtype::f64) static_cast<double*>(memory_.data())[i] = value;
    if (dtype_ == Dtype::f32) static_cast<float*>(memory_.data())[i] = narrow;
    auto* halves = static_cast<uint16_t*>(memory_.data());
    if (dtype_ == Dtype::f16) halves[i] = c10::detail::fp16_ieee_from_fp32_value(narrow);
    if (dtype_ == Dtype::bf16) {
      uint32_t word;
      std::memcpy(&word, &narrow, 4);
      halves[i] = uint16_t(word >> 16);
    }
  }
  double operator[](int64_t i) const {
    if (dtype_ == Dtype::f64) return static_cast<const double*>(memory_.data())[i];
    if (dtype_ == Dtype::f32) return static_cast<const float*>(memory_.data())[i];
    const uint16_t half = static_cast<const uint16_t*>(memory_.data())[i];
    if (dtype_ == Dtype::f16) return c10::detail::fp16_ieee_to_fp32_value(half);
    const uint32_t word = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  double or_else(int64_t i, double absent) const { return present_ ? (*this)[i] : absent; }
  void* data() const { return present_ ? memory_.data() : nullptr; }
  explicit operator bool() const { return present_; }

  // `magnitude`: of the terms whose rounding errors the value holds.
  void expect(int64_t i, double wanted, double magnitude = 1) const { expect(i, wanted, magnitude, dtype_); }

  // `computed`: the dtype of what the value was computed from, where that is the less precise.
  void expect(int64_t i, double wanted, double magnitude, Dtype computed) const {
    if (!present_) return;
    constexpr double steps[] = {1e-4, 1e-10, 0x1p-7, 0x1p-9};  // in the order of Dtype
    const double step = steps[int(computed)];
    const double got = (*this)[i];
    if (std::abs(got - wanted) <= step * std::max(magnitude, std::abs(wanted))) return;
    std::fprintf(stderr, "%s: %s[%ld] is %g, wanted %g\n", current.c_str(), name_, long(i), got, wanted);
    std::exit(1);
  }

 private:
  const char* name_;
  Dtype dtype_;
  int64_t count_;
  bool present_;
  Memory memory_;
};

class Bits {
 public:
  Bits(int64_t rows, int64_t length, bool present)
      : row_((length + 7) / 8), count_(rows * row_ - (too_small == "bits")), present_(present),
        memory_(present ? count_ : 0) {}
  Bits& fill() {
    for (int64_t i = 0; present_ && i < count_; ++i) data()[i] = uint8_t(random_below(256));
    return *this;
  }
  bool at(int64_t row, int64_t i) const { return data()[row * row_ + i / 8] >> i % 8 & 1; }
  uint8_t* data() const { return present_ ? static_cast<uint8_t*>(memory_.data()) : nullptr; }

 private:
  int64_t row_, count_;
  bool present_;
  Memory memory_;
};

static constexpr double kSlope = 0.25;

static double activate(Activation a, double v) {
  switch (a) {
    case Activation::identity: return v;
    case Activation::relu: return std::max(v, 0.0);
    case Activation::leaky_relu: return v > 0 ? v : kSlope * v;
    case Activation::relu6: return std::clamp(v, 0.0, 6.0);
    case Activation::silu: return v / (1 + std::exp(-v));
    case Activation::gelu: return 0.5 * v * std::erfc(-v * std::sqrt(0.5));
    case Activation::hardswish: return v * std::clamp(v + 3, 0.0, 6.0) / 6;
  }
  std::abort();
}

static double derivative(Activation a, double v) {
  const double s = 1 / (1 + std::exp(-v));
  if (a == Activation::silu) return s * (1 + v * (1 - s));
  const double density = std::exp(-v * v / 2) / std::sqrt(2 * M_PI);
  if (a == Activation::gelu) return 0.5 * std::erfc(-v * std::sqrt(0.5)) + v * density;
  return v <= -3 ? 0 : v >= 3 ? 1 : v / 3 + 0.5;
}

// The gradient in front of the activation.
static double error_of(Activation a, double grad, const Values& pre, int64_t i, bool bit) {
  if (is_smooth(a)) return grad * derivative(a, pre[i]);
  if (is_piecewise(a)) return bit ? grad : a == Activation::leaky_relu ? kSlope * grad : 0;
  return grad;
}

// Where the activation's bit is not decided by rounding.
static void expect_bit(const Bits& bits, int64_t row, int64_t i, Activation a, double pre) {
  if (std::abs(pre) < 0.05 || std::abs(pre - 6) < 0.05) return;
  if (bits.at(row, i) == (pre > 0 && !(a == Activation::relu6 && pre > 6))) return;
  std::fprintf(stderr, "%s: bit %ld of row %ld is wrong\n", current.c_str(), long(i), long(row));
  std::exit(1);
}

// As two calls, the way threads share the tasks.
template <class P>
static void run(void (*kernel)(const P&, int64_t, int64_t), const P& p, int64_t tasks) {
  kernel(p, 0, tasks / 2);
  kernel(p, tasks / 2, tasks);
}

static Layout layout_of(int64_t samples, int64_t channels, int64_t pixels, bool channels_innermost) {
  const int64_t most = random_below(2) ? kMostChannels : 32;
  const int64_t block = channels_innermost ? std::min((channels + 31) / 32 * 32, most) : 1;
  return {{samples, channels, pixels, channels_innermost}, block, pixels};
}

// As the tasks of `l` with their rows cut write them, by channel and sample.
static void add_row_blocks(const Layout& l, const Values& partials, Values& sums, double divisor) {
  for (int64_t map = 0; map < l.samples * l.channels; ++map) {
    double sum = 0;
    for (int64_t block = 0; block < l.row_blocks(); ++block) {
      sum += partials[(map / l.channels * l.row_blocks() + block) * l.channels + map % l.channels];
    }
    sums.set(map, sum / divisor);
  }
}

// Calls f(map, pixel, element, row of bits, place in it) for every element; `map` counts samples * channels.
template <class F>
static void each_element(const Layout& l, F&& f) {
  for (int64_t map = 0; map < l.samples * l.channels; ++map) {
    const int64_t n = map / l.channels, c = map % l.channels;
    for (int64_t q = 0; q < l.pixels; ++q) {
      const int64_t row = n * l.pixels + q;
      l.channels_innermost ? f(map, row * l.channels + c, row, c) : f(map, map * l.pixels + q, map, q);
    }
  }
}

static void center_forward(Dtype dtype, Activation activation, const Layout& l, uint32_t options) {
  const Dtype vector = accumulation(dtype);
  const int64_t count = l.samples * l.channels * l.pixels, maps = l.samples * l.channels;
  const bool centred = options & 1;
  Values input("input", dtype, count), residual("residual", dtype, count, options & 2), output("output", dtype, count);
  Values gain("gain", vector, l.channels, options & 4), bias("bias", vector, l.channels, options & 8);
  Values mean_scale("mean_scale", vector, l.channels, options & 16), map_mean("map_mean", vector, maps, centred);
  Values pre_activation("pre_activation", dtype, count, is_smooth(activation));
  Bits bits(count / (l.channels_innermost ? l.channels : l.pixels), l.channels_innermost ? l.channels : l.pixels,
            is_piecewise(activation));
  for (Values* values : {&input, &residual, &gain, &bias, &mean_scale}) values->fill();

  CenterForward p{};
  p.layout = l, p.dtype = dtype, p.activation = activation, p.slope = kSlope, p.constant = 0.5;
  p.input = input.data(), p.residual = residual.data(), p.output = output.data();
  p.gain = gain.data(), p.bias = bias.data(), p.mean_scale = mean_scale.data(), p.map_mean = map_mean.data();
  p.pre_activation = pre_activation.data(), p.bits = bits.data();
  if (centred && l.row_blocks() > 1) {
    Values partials("partials", vector, maps * l.row_blocks());
    p.step = Step::sum, p.partials = partials.data();
    run(kernels().center_forward, p, l.tasks());
    add_row_blocks(l, partials, map_mean, l.pixels);
    p.step = Step::apply, p.partials = nullptr;
  }
  run(kernels().center_forward, p, l.tasks());

  std::vector<double> means(maps);
  each_element(l, [&](int64_t map, int64_t i, int64_t, int64_t) { means[map] += input[i] / l.pixels; });
  for (int64_t map = 0; map < maps; ++map) map_mean.expect(map, means[map]);
  each_element(l, [&](int64_t map, int64_t i, int64_t row, int64_t place) {
    const int64_t c = map % l.channels;
    const double removed = centred ? mean_scale.or_else(c, 0.5) * means[map] : 0;
    const double pre = (input[i] - removed) * gain.or_else(c, 1) + bias.or_else(c, 0) + residual.or_else(i, 0);
    output.expect(i, activate(activation, pre), 4);
    pre_activation.expect(i, pre);
    if (bits.data()) expect_bit(bits, row, place, activation, pre);
  });
}

static void center_backward(Dtype dtype, Activation activation, const Layout& l, uint32_t options) {
  const Dtype vector = accumulation(dtype);
  const int64_t count = l.samples * l.channels * l.pixels, maps = l.samples * l.channels;
  const bool centred = options & 1;
  Values grad_output("grad_output", dtype, count), input("input", dtype, count, options & 2);
  Values pre_activation("pre_activation", dtype, count, is_smooth(activation));
  Bits bits(count / (l.channels_innermost ? l.channels : l.pixels), l.channels_innermost ? l.channels : l.pixels,
            is_piecewise(activation));
  Values scale("scale", vector, l.channels, options & 4), mean_scale("mean_scale", vector, l.channels, options & 8);
  Values grad_input("grad_input", dtype, count, options & 16);
  Values grad_residual("grad_residual", dtype, count, options & 32);
  Values sums("sums", vector, maps, options & 64), dots("dots", vector, maps, options & 2);
  for (Values* values : {&grad_output, &input, &scale, &mean_scale}) values->fill();
  pre_activation.fill(2);  // beyond where hardswish ends
  bits.fill();

  CenterBackward p{};
  p.layout = l, p.dtype = dtype, p.activation = activation, p.slope = kSlope, p.constant = 0.5, p.centred = centred;
  p.grad_output = grad_output.data(), p.input = input.data(), p.pre_activation = pre_activation.data();
  p.bits = bits.data(), p.scale = scale.data(), p.mean_scale = mean_scale.data(), p.grad_input = grad_input.data();
  p.grad_residual = grad_residual.data(), p.sums = sums.data(), p.dots = dots.data();
  if (l.row_blocks() > 1 && (centred || sums.data() || dots.data())) {
    Values all_sums("all sums", vector, maps, centred && !sums.data());
    Values partial_sums("partial sums", vector, maps * l.row_blocks(), centred || sums.data());
    Values partial_dots("partial dots", vector, maps * l.row_blocks(), dots.data());
    p.sums = sums.data() ? sums.data() : all_sums.data();
    p.step = Step::sum, p.partial_sums = partial_sums.data(), p.partial_dots = partial_dots.data();
    run(kernels().center_backward, p, l.tasks());
    if (partial_sums.data()) add_row_blocks(l, partial_sums, sums.data() ? sums : all_sums, 1);
    if (partial_dots.data()) add_row_blocks(l, partial_dots, dots, 1);
    p.step = Step::apply, p.partial_sums = p.partial_dots = nullptr;
    run(kernels().center_backward, p, l.tasks());
  } else {
    run(kernels().center_backward, p, l.tasks());
  }

  std::vector<double> wanted_sums(maps), wanted_dots(maps);
  auto error = [&](int64_t i, int64_t row, int64_t place) {
    return error_of(activation, grad_output[i], pre_activation, i, bits.data() && bits.at(row, place));
  };
  each_element(l, [&](int64_t map, int64_t i, int64_t row, int64_t place) {
    wanted_sums[map] += error(i, row, place);
    wanted_dots[map] += error(i, row, place) * input.or_else(i, 0);
  });
  for (int64_t map = 0; map < maps; ++map) {
    sums.expect(map, wanted_sums[map], 10);
    dots.expect(map, wanted_dots[map], 10);
  }
  each_element(l, [&](int64_t map, int64_t i, int64_t row, int64_t place) {
    const int64_t c = map % l.channels;
    const double e = error(i, row, place);
    const double removed = centred ? mean_scale.or_else(c, 0.5) * wanted_sums[map] / l.pixels : 0;
    grad_residual.expect(i, e);
    grad_input.expect(i, (e - removed) * scale.or_else(c, 1), 4);
  });
}

static void window_mean(Dtype dtype, int64_t channels, bool channels_innermost, const int64_t (&geometry)[6][3]) {
  WindowMean p{};
  int64_t pixels = 1;
  for (int d = 0; d < 3; ++d) {
    p.size[d] = geometry[0][d], p.kernel[d] = geometry[1][d], p.stride[d] = geometry[2][d];
    p.padding[d] = geometry[3][d], p.dilation[d] = geometry[4][d];
    p.output[d] = (p.size[d] + 2 * p.padding[d] - p.dilation[d] * (p.kernel[d] - 1) - 1) / p.stride[d] + 1;
    pixels *= p.size[d];
  }
  const int64_t samples = 2, taps = p.taps();
  p.layout = layout_of(samples, channels, pixels, channels_innermost), p.dtype = dtype;
  Values input("input", dtype, samples * channels * pixels), means("means", dtype, samples * channels * taps);
  input.fill();
  p.input = input.data(), p.means = means.data();
  run(kernels().window_mean, p, p.layout.tasks());

  for (int64_t map = 0; map < samples * channels; ++map) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t at[3] = {tap / p.kernel[2] / p.kernel[1], tap / p.kernel[2] % p.kernel[1], tap % p.kernel[2]};
      double sum = 0;
      for (int64_t out = 0; out < p.output[0] * p.output[1] * p.output[2]; ++out) {
        const int64_t to[3] = {out / p.output[2] / p.output[1], out / p.output[2] % p.output[1], out % p.output[2]};
        int64_t pixel = 0;
        bool inside = true;
        for (int d = 0; d < 3; ++d) {
          const int64_t from = to[d] * p.stride[d] + at[d] * p.dilation[d] - p.padding[d];
          inside = inside && from >= 0 && from < p.size[d];
          pixel = pixel * p.size[d] + from;
        }
        if (!inside) continue;
        sum += input[channels_innermost ? (map / channels * pixels + pixel) * channels + map % channels
                                        : map * pixels + pixel];
      }
      means.expect(map * taps + tap, sum / (p.output[0] * p.output[1] * p.output[2]));
    }
  }
}

static void finish_weight_grad(Dtype dtype, int64_t filters, int64_t channels, int64_t taps, bool channels_innermost,
                               uint32_t options) {
  const Dtype vector = accumulation(dtype);
  const int64_t size = channels * taps;
  Values grad("grad", dtype, filters * size), weight("weight", dtype, filters * size, options & 1);
  Values factor("factor", vector, filters, options & 2), divisor("divisor", vector, filters, options & 4);
  Values dots("dots", vector, filters, options & 1);
  grad.fill(), weight.fill(), factor.fill();
  for (int64_t o = 0; divisor && o < filters; ++o) divisor.set(o, o % 2 ? 0.5 : -2);
  std::vector<double> before;
  for (int64_t i = 0; i < filters * size - (too_small == "grad"); ++i) before.push_back(grad[i]);

  WeightGrad p{};
  p.dtype = dtype, p.filters = filters, p.channels = channels, p.taps = taps, p.channels_innermost = channels_innermost;
  p.projection = options & 8 ? 0.75 : 0, p.grad = grad.data(), p.weight = weight.data(), p.factor = factor.data();
  p.divisor = divisor.data(), p.dots = dots.data();
  run(kernels().finish_weight_grad, p, filters);

  auto index = [&](int64_t o, int64_t c, int64_t t) {
    return o * size + (channels_innermost ? t * channels + c : c * taps + t);
  };
  for (int64_t o = 0; o < filters; ++o) {
    double dot = 0;
    for (int64_t c = 0; c < channels; ++c) {
      double mean = 0;
      for (int64_t t = 0; t < taps; ++t) {
        mean += before[index(o, c, t)] / taps;
        dot += weight.or_else(index(o, c, t), 0) * before[index(o, c, t)];
      }
      const double removed = taps > 1 ? p.projection * mean : 0;
      for (int64_t t = 0; t < taps; ++t) {
        grad.expect(index(o, c, t), (before[index(o, c, t)] - removed) * factor.or_else(o, 1));
      }
    }
    dots.expect(o, dot / divisor.or_else(o, 1), 10);
  }
}

static constexpr int64_t kPanel = PointwiseForward::kPanel;

struct Packed {
  Values values;
  Packed(const Values& weight, Dtype dtype, int64_t filters, int64_t channels, bool transposed)
      : values("packed", dtype, panels(transposed ? channels : filters) * kPanel * (transposed ? filters : channels)) {
    PackWeight p{};
    p.dtype = dtype, p.weight_dtype = weight.dtype(), p.transposed = transposed, p.filters = filters, p.channels = channels;
    p.weight = weight.data(), p.packed = values.data();
    run(kernels().pack_weight, p, panels(transposed ? channels : filters));
  }
  static int64_t panels(int64_t count) { return (count + kPanel - 1) / kPanel; }
};

static void pointwise_forward(Dtype dtype, Activation activation, int64_t pixels, int64_t channels, int64_t filters,
                              uint32_t options) {
  const int64_t samples = 3, count = samples * pixels * filters;
  Values input("input", dtype, samples * pixels * channels);
  Values weight("weight", options & 32 ? Dtype::f32 : dtype, filters * channels);
  Values gain("gain", Dtype::f32, filters, options & 1), shift("shift", Dtype::f32, samples * filters, options & 2);
  Values residual("residual", dtype, count, options & 4), output("output", dtype, count);
  Values pre_activation("pre_activation", dtype, count, is_smooth(activation));
  Bits bits(samples * pixels, filters, is_piecewise(activation));
  for (Values* values : {&input, &weight, &gain, &shift, &residual}) values->fill();
  const Packed packed(weight, dtype, filters, channels, false);

  PointwiseForward p{};
  p.dtype = dtype, p.activation = activation, p.slope = kSlope;
  p.samples = samples, p.pixels = pixels, p.channels = channels, p.filters = filters;
  p.row_tiles = std::max<int64_t>(pixels / (options & 8 ? 24 : 96), 1), p.panels = options & 16 ? 1 : p.all_panels();
  p.input = input.data(), p.weight = packed.values.data(), p.gain = gain.data(), p.shift = shift.data();
  p.residual = residual.data(), p.output = output.data();
  p.pre_activation = pre_activation.data(), p.bits = bits.data();
  run(kernels().pointwise_forward, p, p.tasks());

  for (int64_t row = 0; row < samples * pixels; ++row) {
    for (int64_t o = 0; o < filters; ++o) {
      double z = 0;
      for (int64_t c = 0; c < channels; ++c) z += input[row * channels + c] * weight[o * channels + c];
      const int64_t i = row * filters + o;
      const double pre = z * gain.or_else(o, 1) + shift.or_else(row / pixels * filters + o, 0) + residual.or_else(i, 0);
      output.expect(i, activate(activation, pre), channels);
      pre_activation.expect(i, pre, channels);
      if (bits.data()) expect_bit(bits, row, o, activation, pre);
    }
  }
}

static void pointwise_mean(Dtype dtype, Dtype weight_dtype, int64_t channels, int64_t filters, bool with_gain) {
  const int64_t samples = 11, pixels = 4;
  Values weight("weight", weight_dtype, filters * channels), sums("sums", Dtype::f32, samples * channels);
  Values gain("gain", Dtype::f32, filters, with_gain), map_mean("map_mean", Dtype::f32, samples * filters);
  weight.fill(), sums.fill(), gain.fill();
  PointwiseMean p{};
  p.dtype = dtype, p.weight_dtype = weight_dtype;
  p.samples = samples, p.pixels = pixels, p.channels = channels, p.filters = filters;
  p.weight = weight.data(), p.sums = sums.data(), p.gain = gain.data(), p.map_mean = map_mean.data();
  run(kernels().pointwise_mean, p, filters);
  for (int64_t i = 0; i < samples * filters; ++i) {
    double dot = 0;
    for (int64_t c = 0; c < channels; ++c) dot += weight[i % filters * channels + c] * sums[i / filters * channels + c];
    map_mean.expect(i, dot * gain.or_else(i % filters, 1) / pixels);
  }
}

static void pointwise_backward(Dtype dtype, Activation activation, int64_t samples, int64_t pixels, int64_t channels,
                               int64_t filters, uint32_t options) {
  const int64_t rows = samples * pixels, count = rows * filters;
  const bool wants_input = options & 1, wants_weight = !wants_input || options & 2;
  Values grad_output("grad_output", dtype, count);
  Values pre_activation("pre_activation", dtype, count, is_smooth(activation));
  Bits bits(rows, filters, is_piecewise(activation));
  const Dtype weight_dtype = options & 64 ? Dtype::f32 : dtype;
  Values input("input", dtype, rows * channels), weight("weight", weight_dtype, filters * channels);
  Values scale("scale", Dtype::f32, filters, options & 4);
  Values removed("removed", Dtype::f32, samples * filters, options & 8);
  for (Values* values : {&grad_output, &input, &weight, &scale, &removed}) values->fill();
  pre_activation.fill(2);
  bits.fill();
  const Packed packed(weight, dtype, filters, channels, true);

  PointwiseBackward p{};
  p.dtype = dtype, p.activation = activation, p.slope = kSlope;
  p.samples = samples, p.pixels = pixels, p.channels = channels, p.filters = filters;
  p.slots = options & 16 && rows > 1 ? 2 : 1;
  Values grad_input("grad_input", dtype, rows * channels, wants_input);
  Values grad_residual("grad_residual", dtype, count, options & 32);
  Values partials("partials", Dtype::f32, p.slots * filters * channels, wants_weight);
  Values scratch("scratch", Dtype::f32, p.slots * p.scratch_bytes() / 4);
  Values grad_weight("grad_weight", weight_dtype, filters * channels);
  p.grad_output = grad_output.data(), p.pre_activation = pre_activation.data(), p.bits = bits.data();
  p.input = input.data(), p.weight = wants_input ? packed.values.data() : nullptr, p.scale = scale.data();
  p.removed = removed.data(), p.grad_input = grad_input.data(), p.grad_residual = grad_residual.data();
  p.scratch = scratch.data(), p.partials = static_cast<float*>(partials.data());
  run(kernels().pointwise_backward, p, p.slots);
  if (wants_weight) {
    AddPartials add{};
    add.dtype = weight_dtype, add.slots = p.slots, add.filters = filters, add.channels = channels;
    add.partials = p.partials, add.grad = grad_weight.data();
    run(kernels().add_partials, add, filters);
  }

  std::vector<double> dz(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = i / filters, o = i % filters;
    const double e = error_of(activation, grad_output[i], pre_activation, i, bits.data() && bits.at(row, o));
    grad_residual.expect(i, e);
    dz[i] = (e - removed.or_else(row / pixels * filters + o, 0)) * scale.or_else(o, 1);
  }
  for (int64_t i = 0; wants_input && i < rows * channels; ++i) {
    double sum = 0;
    for (int64_t o = 0; o < filters; ++o) sum += dz[i / channels * filters + o] * weight[o * channels + i % channels];
    grad_input.expect(i, sum, filters);
  }
  for (int64_t i = 0; wants_weight && i < filters * channels; ++i) {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) {
      sum += dz[row * filters + i / channels] * input[row * channels + i % channels];
    }
    grad_weight.expect(i, sum, rows, dtype);
  }
}

// The same layer in contiguous layout: of `samples` small maps, or parts of a large one.
static void planar_forward(Dtype dtype, Activation activation, int64_t samples, int64_t pixels, int64_t channels,
                           int64_t filters, uint32_t options) {
  const PlanarTiles tiles(samples, pixels, options & 8 ? 2 : 1);
  const int64_t maps = samples * filters, count = maps * pixels;
  const bool centred = options & 16, knows_means = !tiles.has_whole_maps() || options & 32;
  Values input("input", dtype, samples * channels * pixels), weight("weight", dtype, filters * channels);
  Values gain("gain", Dtype::f32, filters, options & 1), bias("bias", Dtype::f32, filters, options & 2);
  Values mean_scale("mean_scale", Dtype::f32, filters, options & 64), map_mean("map_mean", Dtype::f32, maps, centred);
  Values residual("residual", dtype, count, options & 4), output("output", dtype, count);
  Values pre_activation("pre_activation", dtype, count, is_smooth(activation));
  Bits bits(maps, pixels, is_piecewise(activation));
  for (Values* values : {&input, &weight, &gain, &bias, &mean_scale, &residual}) values->fill();
  if (centred && knows_means) map_mean.fill();

  PlanarForward p{dtype, activation, kSlope, 0.5, tiles, channels, filters, options & 128 ? 2 : 1};
  Values scratch("scratch", Dtype::f32, p.scratch_bytes() / 4);
  p.input = input.data(), p.weight = weight.data(), p.gain = gain.data(), p.mean_scale = mean_scale.data();
  p.bias = bias.data(), p.residual = residual.data(), p.output = output.data(), p.knows_means = knows_means;
  p.pre_activation = pre_activation.data(), p.bits = bits.data(), p.scratch = scratch.data();
  p.map_mean = static_cast<float*>(map_mean.data());
  run(kernels().planar_forward, p, p.tasks());

  std::vector<double> z(pixels);
  for (int64_t map = 0; map < maps; ++map) {
    const int64_t o = map % filters;
    double mean = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      z[i] = 0;
      for (int64_t c = 0; c < channels; ++c) {
        z[i] += input[(map / filters * channels + c) * pixels + i] * weight[o * channels + c];
      }
      z[i] *= gain.or_else(o, 1);
      mean += z[i] / pixels;
    }
    if (centred && !knows_means) map_mean.expect(map, mean, channels);
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t at = map * pixels + i;
      const double pre =
          z[i] - mean_scale.or_else(o, 0.5) * map_mean.or_else(map, 0) + bias.or_else(o, 0) + residual.or_else(at, 0);
      output.expect(at, activate(activation, pre), channels);
      pre_activation.expect(at, pre, channels);
      if (bits.data()) expect_bit(bits, map, i, activation, pre);
    }
  }
}

static void planar_backward(Dtype dtype, Activation activation, int64_t samples, int64_t pixels, int64_t channels,
                            int64_t filters, uint32_t options) {
  const int64_t maps = samples * filters, count = maps * pixels;
  const bool wants_input = options & 1, wants_weight = !wants_input || options & 2, centred = options & 8;
  Values grad_output("grad_output", dtype, count);
  Values pre_activation("pre_activation", dtype, count, is_smooth(activation));
  Bits bits(maps, pixels, is_piecewise(activation));
  Values input("input", dtype, samples * channels * pixels);
  Values weight("weight", dtype, channels * filters, wants_input), scale("scale", Dtype::f32, filters, options & 4);
  Values mean_scale("mean_scale", Dtype::f32, filters, options & 64), sums("sums", Dtype::f32, maps);
  for (Values* values : {&grad_output, &input, &weight, &scale, &mean_scale}) values->fill();
  pre_activation.fill(2);
  bits.fill();

  const int64_t slots = options & 16 ? 2 : 1;
  PlanarBackward p{dtype, activation, kSlope, 0.5, centred, PlanarTiles(samples, pixels, slots), channels, filters, slots};
  p.knows_sums = !p.tiles.has_whole_maps() || options & 128;
  if (p.knows_sums) sums.fill();
  Values grad_input("grad_input", dtype, samples * channels * pixels, wants_input);
  Values grad_residual("grad_residual", dtype, count, options & 32);
  Values partials("partials", Dtype::f32, slots * filters * channels, wants_weight);
  Values scratch("scratch", Dtype::f32, slots * p.scratch_bytes() / 4);
  Values grad_weight("grad_weight", dtype, filters * channels, wants_weight);
  p.grad_output = grad_output.data(), p.pre_activation = pre_activation.data(), p.bits = bits.data();
  p.input = input.data(), p.weight = weight.data(), p.scale = scale.data(), p.mean_scale = mean_scale.data();
  p.sums = static_cast<float*>(sums.data()), p.grad_input = grad_input.data(), p.grad_residual = grad_residual.data();
  p.scratch = scratch.data(), p.partials = static_cast<float*>(partials.data());
  run(kernels().planar_backward, p, slots);
  if (wants_weight) {
    const AddPartials add{dtype, slots, filters, channels, p.partials, grad_weight.data()};
    run(kernels().add_partials, add, filters);
  }

  std::vector<double> dz(count);
  for (int64_t map = 0; map < maps; ++map) {
    double sum = 0;
    for (int64_t i = map * pixels; i < (map + 1) * pixels; ++i) {
      dz[i] = error_of(activation, grad_output[i], pre_activation, i, bits.data() && bits.at(map, i % pixels));
      grad_residual.expect(i, dz[i]);
      sum += dz[i];
    }
    if (!p.knows_sums) sums.expect(map, sum, pixels);
    const int64_t o = map % filters;
    const double removed = centred ? mean_scale.or_else(o, 0.5) * sums[map] / pixels : 0;
    for (int64_t i = map * pixels; i < (map + 1) * pixels; ++i) dz[i] = (dz[i] - removed) * scale.or_else(o, 1);
  }
  for (int64_t i = 0; wants_input && i < samples * channels * pixels; ++i) {
    const int64_t sample = i / pixels / channels, c = i / pixels % channels;
    double sum = 0;
    for (int64_t o = 0; o < filters; ++o) sum += dz[(sample * filters + o) * pixels + i % pixels] * weight[c * filters + o];
    grad_input.expect(i, sum, filters);
  }
  for (int64_t i = 0; wants_weight && i < filters * channels; ++i) {
    double sum = 0, magnitude = 0;
    for (int64_t sample = 0; sample < samples; ++sample) {
      const int64_t o = (sample * filters + i / channels) * pixels, c = (sample * channels + i % channels) * pixels;
      for (int64_t j = 0; j < pixels; ++j) {
        sum += dz[o + j] * input[c + j];
        magnitude += std::abs(dz[o + j] * input[c + j]);  // each dz' is rounded by itself
      }
    }
    grad_weight.expect(i, sum, std::max(double(samples * pixels), magnitude), dtype);
  }
}

struct DepthwiseGeometry {
  int64_t size[2], kernel[2], stride[2], padding[2];
};

static void describe(Depthwise& p, Dtype dtype, Activation activation, int64_t channels, bool channels_innermost,
                     const DepthwiseGeometry& g, uint32_t options) {
  p.dtype = dtype, p.activation = activation, p.slope = kSlope, p.constant = 0.5, p.centred = options & 1;
  p.samples = 3, p.channels = channels, p.slots = options & 2 ? 2 : 1;
  for (int d = 0; d < 2; ++d) {
    p.size[d] = g.size[d], p.kernel[d] = g.kernel[d], p.stride[d] = g.stride[d], p.padding[d] = g.padding[d];
    p.output[d] = (p.size[d] + 2 * p.padding[d] - p.kernel[d]) / p.stride[d] + 1;
  }
  p.input_innermost = channels_innermost || p.pixels() == 1;
  p.output_innermost = channels_innermost || p.output_pixels() == 1;
}

struct PackedDepthwise {
  Values values;
  PackedDepthwise(const Depthwise& p, const Values& weight, const void* gain)
      : values("packed", Dtype::f32, p.padded_channels() * p.taps()) {
    kernels().pack_depthwise({p.dtype, weight.dtype(), p.channels, p.taps(), weight.data(), gain,
                              static_cast<float*>(values.data())});
  }
};

// Calls f(pixel of the output, pixel of the input, tap) for all that meet.
template <class F>
static void each_meeting(const Depthwise& p, F&& f) {
  for (int64_t out = 0; out < p.output_pixels(); ++out) {
    for (int64_t tap = 0; tap < p.taps(); ++tap) {
      const int64_t h = out / p.output[1] * p.stride[0] + tap / p.kernel[1] - p.padding[0];
      const int64_t w = out % p.output[1] * p.stride[1] + tap % p.kernel[1] - p.padding[1];
      if (h >= 0 && h < p.size[0] && w >= 0 && w < p.size[1]) f(out, h * p.size[1] + w, tap);
    }
  }
}

// Of pixel `pixel` of map `map` in a tensor of maps of `pixels`.
static int64_t element_of(const Depthwise& p, int64_t map, int64_t pixel, int64_t pixels, bool channels_innermost) {
  return channels_innermost ? (map / p.channels * pixels + pixel) * p.channels + map % p.channels : map * pixels + pixel;
}

static void depthwise_forward(Dtype dtype, Activation activation, int64_t channels, bool channels_innermost,
                              const DepthwiseGeometry& geometry, uint32_t options) {
  DepthwiseForward p{};
  describe(p, dtype, activation, channels, channels_innermost, geometry, options);
  const int64_t maps = p.samples * channels, pixels = p.output_pixels(), count = maps * pixels;
  Values input("input", dtype, maps * p.pixels()), output("output", dtype, count);
  Values weight("weight", options & 4 ? Dtype::f32 : dtype, channels * p.taps());
  Values residual("residual", dtype, count, options & 8), gain("gain", Dtype::f32, channels, options & 16);
  Values bias("bias", Dtype::f32, channels, options & 32), mean_scale("mean_scale", Dtype::f32, channels, options & 64);
  Values map_mean("map_mean", Dtype::f32, maps, p.centred);
  Values pre_activation("pre_activation", dtype, count, is_smooth(activation));
  Values scratch("scratch", Dtype::f32, p.slots * p.scratch_floats());
  Bits bits(p.output_innermost ? p.samples * pixels : maps, p.output_innermost ? channels : pixels,
            is_piecewise(activation));
  for (Values* values : {&input, &weight, &residual, &gain, &bias, &mean_scale}) values->fill();
  const PackedDepthwise packed(p, weight, nullptr);
  p.input = input.data(), p.residual = residual.data(), p.gain = gain.data(), p.bias = bias.data();
  p.mean_scale = mean_scale.data(), p.output_memory = output.data(), p.map_mean = map_mean.data();
  p.pre_activation = pre_activation.data(), p.bits = bits.data();
  p.weight = static_cast<const float*>(packed.values.data()), p.scratch = static_cast<float*>(scratch.data());
  run(kernels().depthwise_forward, p, p.slots);

  for (int64_t map = 0; map < maps; ++map) {
    const int64_t c = map % channels;
    std::vector<double> z(pixels);
    double mean = 0;
    each_meeting(p, [&](int64_t out, int64_t in, int64_t tap) {
      const double term = weight[c * p.taps() + tap] * input[element_of(p, map, in, p.pixels(), p.input_innermost)];
      z[out] += term;
      mean += term / pixels;
    });
    map_mean.expect(map, gain.or_else(c, 1) * mean, p.taps());
    for (int64_t out = 0; out < pixels; ++out) {
      const int64_t i = element_of(p, map, out, pixels, p.output_innermost);
      const double removed = p.centred ? mean_scale.or_else(c, 0.5) * mean : 0;
      const double pre = (z[out] - removed) * gain.or_else(c, 1) + bias.or_else(c, 0) + residual.or_else(i, 0);
      output.expect(i, activate(activation, pre), p.taps());
      pre_activation.expect(i, pre, p.taps());
      const int64_t row = p.output_innermost ? map / channels * pixels + out : map;
      if (bits.data()) expect_bit(bits, row, p.output_innermost ? c : out, activation, pre);
    }
  }
}

static void depthwise_backward(Dtype dtype, Activation activation, int64_t channels, bool channels_innermost,
                               const DepthwiseGeometry& geometry, uint32_t options) {
  DepthwiseBackward p{};
  describe(p, dtype, activation, channels, channels_innermost, geometry, options);
  const int64_t maps = p.samples * channels, pixels = p.output_pixels(), count = maps * pixels, taps = p.taps();
  const bool wants_input = options & 4, wants_weight = !wants_input || options & 8;
  const Dtype weight_dtype = options & 16 ? Dtype::f32 : dtype;
  Values grad_output("grad_output", dtype, count), pre_activation("pre_activation", dtype, count, is_smooth(activation));
  Values input("input", dtype, maps * p.pixels(), wants_weight), weight("weight", weight_dtype, channels * taps);
  Values gain("gain", Dtype::f32, channels, options & 32), mean_scale("mean_scale", Dtype::f32, channels, options & 64);
  Values grad_input("grad_input", dtype, maps * p.pixels(), wants_input);
  Values grad_residual("grad_residual", dtype, count, options & 128), sums("sums", Dtype::f32, maps, options & 256);
  Values partials("partials", Dtype::f32, p.samples * taps * p.padded_channels(), wants_weight);
  Values scratch("scratch", Dtype::f32, p.slots * p.scratch_floats());
  Values grad_weight("grad_weight", weight_dtype, channels * taps), dots("dots", Dtype::f32, channels, options & 512);
  Bits bits(p.output_innermost ? p.samples * pixels : maps, p.output_innermost ? channels : pixels,
            is_piecewise(activation));
  for (Values* values : {&grad_output, &input, &weight, &gain, &mean_scale}) values->fill();
  pre_activation.fill(2);
  bits.fill();
  const PackedDepthwise packed(p, weight, gain.data());
  p.grad_output = grad_output.data(), p.pre_activation = pre_activation.data(), p.bits = bits.data();
  p.input = input.data(), p.mean_scale = mean_scale.data(), p.grad_input = grad_input.data();
  p.grad_residual = grad_residual.data(), p.sums = sums.data();
  p.partials = static_cast<float*>(partials.data()), p.scratch = static_cast<float*>(scratch.data());
  p.weight = static_cast<const float*>(packed.values.data());
  run(kernels().depthwise_backward, p, p.slots);
  const DepthwiseWeightGrad finish{weight_dtype, p.samples, channels, taps, options & 1 ? 0.75 : 0, p.partials,
                                   weight.data(), gain.data(), grad_weight.data(), dots.data()};
  if (wants_weight) run(kernels().depthwise_weight_grad, finish, finish.tasks());

  std::vector<double> grads(channels * taps);
  for (int64_t map = 0; map < maps; ++map) {
    const int64_t c = map % channels;
    std::vector<double> dz(pixels), dx(p.pixels());
    double sum = 0;
    for (int64_t out = 0; out < pixels; ++out) {
      const int64_t i = element_of(p, map, out, pixels, p.output_innermost);
      const int64_t row = p.output_innermost ? map / channels * pixels + out : map;
      dz[out] = error_of(activation, grad_output[i], pre_activation, i,
                         bits.data() && bits.at(row, p.output_innermost ? c : out));
      grad_residual.expect(i, dz[out]);
      sum += dz[out];
    }
    sums.expect(map, sum, 10);
    if (p.centred) {
      for (double& e : dz) e -= sum / pixels * mean_scale.or_else(c, 0.5);
    }
    each_meeting(p, [&](int64_t out, int64_t in, int64_t tap) {
      dx[in] += weight[c * taps + tap] * gain.or_else(c, 1) * dz[out];
      if (wants_weight) grads[c * taps + tap] += dz[out] * input[element_of(p, map, in, p.pixels(), p.input_innermost)];
    });
    for (int64_t in = 0; in < p.pixels(); ++in) {
      grad_input.expect(element_of(p, map, in, p.pixels(), p.input_innermost), dx[in], taps);
    }
  }
  for (int64_t c = 0; wants_weight && c < channels; ++c) {
    double mean = 0, dot = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      mean += grads[c * taps + tap] / taps;
      dot += weight[c * taps + tap] * grads[c * taps + tap];
    }
    dots.expect(c, dot, 10 * taps);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const double removed = taps > 1 ? finish.projection * mean : 0;
      grad_weight.expect(c * taps + tap, (grads[c * taps + tap] - removed) * gain.or_else(c, 1), 10);
    }
  }
}

static void depthwise_cases(Dtype dtype) {
  constexpr DepthwiseGeometry geometries[] = {
      {{9, 8}, {3, 3}, {1, 1}, {1, 1}},    {{9, 23}, {3, 3}, {2, 2}, {1, 1}}, {{8, 7}, {5, 5}, {1, 1}, {2, 2}},
      {{11, 9}, {7, 7}, {2, 2}, {3, 3}},   {{1, 1}, {5, 5}, {1, 1}, {2, 2}},  {{3, 5}, {3, 5}, {1, 1}, {0, 0}},
      {{4, 5}, {2, 4}, {3, 1}, {4, 5}},    {{6, 8}, {1, 6}, {1, 4}, {0, 7}},  {{2, 2}, {3, 3}, {7, 7}, {3, 3}},
      {{20, 15}, {1, 1}, {2, 3}, {0, 0}}};
  uint32_t options = 0;
  for (const bool innermost : {false, true}) {
    for (const int64_t channels : {2, 16, 37}) {
      for (const DepthwiseGeometry& geometry : geometries) {
        const int a = options % 7;
        current = "depthwise of " + std::to_string(channels) + (innermost ? " channels_last" : " contiguous") +
                  " channels, dtype " + std::to_string(int(dtype)) + ", activation " + std::to_string(a) + ", options " +
                  std::to_string(options) + ", kernel " + std::to_string(geometry.kernel[0]);
        depthwise_forward(dtype, Activation(a), channels, innermost, geometry, options);
        depthwise_backward(dtype, Activation(a), channels, innermost, geometry, options * 5 + 1);
        options += 11;
      }
    }
  }
}

static void planar_cases(Dtype dtype) {
  const int64_t odd = dtype == Dtype::f32;  // bfloat16 is multiplied in pairs
  const std::pair<int64_t, int64_t> sizes[] = {{2 - odd, 6 + odd}, {16 + odd, 32 + odd}, {70 + odd, 130 + odd}, {130, 64}};
  // Whole maps, one of them and several in a tile, and parts of a map.
  constexpr int64_t maps[][2] = {{3, 1}, {6, 49}, {1, 300}, {3, 196}, {1, 600}};
  current = "planar";
  uint32_t options = 0;
  for (const auto& [channels, filters] : sizes) {
    for (const auto& [samples, pixels] : maps) {
      for (int a = 0; a < 7; a += pixels > 49 ? 2 : 1) {
        planar_forward(dtype, Activation(a), samples, pixels, channels, filters, options * 5);
        planar_backward(dtype, Activation(a), samples, pixels, channels, filters, options * 3 + 1);
        options += 11;
      }
    }
  }
}

static void all_cases() {
  constexpr const char* dtype_names[] = {"f32", "f64", "bf16", "f16"};
  // Channels and pixels: fewer than a vector, one more, more channels than a task's, more rows than a group's.
  constexpr int64_t shapes[][2] = {{1, 1},    {1, 49},   {7, 49},  {17, 1},  {33, 49},
                                   {17, 300}, {3, 2500}, {600, 1}, {600, 49}, {70, 130}};
  constexpr int64_t geometries[][6][3] = {
      {{1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}, {{1, 1, 49}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}},
      {{1, 7, 7}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {1, 1, 1}}, {{3, 4, 5}, {2, 3, 2}, {1, 2, 3}, {1, 2, 0}, {2, 1, 2}},
      {{1, 7, 1}, {1, 5, 3}, {1, 1, 1}, {0, 4, 2}, {1, 1, 2}}};
  uint32_t options = 0;
  for (int d = 0; d < 4; ++d) {
    const Dtype dtype = Dtype(d);
    for (const bool innermost : {false, true}) {
      const std::string where = std::string(dtype_names[d]) + (innermost ? " channels_last" : " contiguous");
      for (const auto& [channels, pixels] : shapes) {
        const bool large = channels * pixels > 9999;
        for (int a = large; a < 7; a += large ? 2 : 1) {
          Layout layout = layout_of(large ? 1 : 2, channels, pixels, innermost);
          if (innermost && a % 2) layout.rows = kGroup;
          current = where + " activation " + std::to_string(a) + ", " + std::to_string(channels) + " channels, " +
                    std::to_string(pixels) + " pixels";
          center_forward(dtype, Activation(a), layout, options);
          center_backward(dtype, Activation(a), layout, options * 5 + 1);
          options += 11;
        }
        current = where + " window_mean";
        for (const auto& geometry : geometries) {
          if (pixels == 1) window_mean(dtype, channels, innermost, geometry);
        }
      }
      current = where + " finish_weight_grad";
      for (const int64_t channels : {1, 7, 17, 33, 600}) {
        for (const int64_t taps : {1, 9, 49}) finish_weight_grad(dtype, 3, channels, taps, innermost, options++);
      }
    }
    if (!kernels().pointwise_forward) continue;
    if (dtype != Dtype::f32 && !(dtype == Dtype::bf16 && kernels().pointwise_bf16)) continue;
    current = std::string(dtype_names[d]) + " pointwise";
    const int64_t odd = dtype == Dtype::f32;  // bfloat16 is multiplied in pairs
    const std::pair<int64_t, int64_t> sizes[] = {
        {2 - odd, 6 + odd}, {16 + odd, 32 + odd}, {70 + odd, 130 + odd}, {130, 64}};
    for (const auto& [channels, filters] : sizes) {
      for (const int64_t pixels : {1, 49}) {
        for (const Dtype wide : {dtype, Dtype::f32}) pointwise_mean(dtype, wide, channels, filters, options % 2);
        for (int a = 0; a < 7; ++a) {
          pointwise_forward(dtype, Activation(a), pixels, channels, filters, options);
          pointwise_backward(dtype, Activation(a), pixels == 1 ? 1 : 5, pixels, channels, filters, options * 3 + 1);
          options += 11;
        }
      }
    }
  }
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    if (kernels().depthwise_forward) depthwise_cases(dtype);
  }
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    if (kernels().planar_forward && (dtype == Dtype::f32 || kernels().pointwise_bf16)) planar_cases(dtype);
  }
}

int main(int count, char** arguments) {
  const std::string command = count > 1 ? arguments[1] : "";
  if (command == "isas") {
    setenv("DEEPCONTROL_ISA", "?", 1);
    try {
      kernels();
    } catch (const std::exception& error) {
      const std::string message = error.what(), before = "can run ";
      std::puts(message.substr(message.find(before) + before.size()).c_str());
      return 0;
    }
    return 2;
  }
  if (command != "run" || count < 3) return 2;
  guarded = std::string(arguments[2]) == "guard";
  if (count > 3) too_small = arguments[3];
  all_cases();
  std::printf("%s passed\n", kernels().isa);
}
