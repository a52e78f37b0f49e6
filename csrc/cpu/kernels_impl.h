// The kernels themselves, included by each kernels_<instruction set>.cpp inside a namespace
// and a target of their own. The standard headers are included there, before the target is set: an inline function of
// the standard library compiled for AVX-512 must not be the copy that the linker keeps.
//
// Bytes, forward: one read of the input (and residual), one write of the output; a task's slab stays in the cache
// between its sum and its apply, or where pixels are split the whole tensor does, if it fits. Backward: one read of
// grad_output and of the activation's bits, one write.

template <class T>
using VectorOf = typename Storage<T>::V;
template <class T>
using ScalarOf = typename Vector<VectorOf<T>>::Scalar;

// Of the activations only the sort is a template argument; within one the choice is a select or a predictable branch.
enum class Sort { identity, relu, piecewise, smooth };

DC_INLINE Sort sort_of(Activation activation) {
  if (activation == Activation::identity) return Sort::identity;
  if (activation == Activation::relu) return Sort::relu;
  return activation <= Activation::relu6 ? Sort::piecewise : Sort::smooth;
}

template <class V>
struct PiecewiseLinear {
  using Mask = typename Vector<V>::Mask;
  V slope;        // below zero
  Mask leaky;     // all ones: `slope` is used; else zero, so that 0 * -inf does not turn into NaN
  V cap;          // the output stays at it above
  Mask uncapped;  // all ones: there is no cap

  PiecewiseLinear(Activation activation, double negative_slope) {
    slope = broadcast<V>(typename Vector<V>::Scalar(negative_slope));
    leaky = Mask{} - int(activation == Activation::leaky_relu);
    const bool capped = activation == Activation::relu6;
    cap = broadcast<V>(capped ? 6 : std::numeric_limits<typename Vector<V>::Scalar>::infinity());
    uncapped = Mask{} - int(!capped);
  }
  DC_INLINE V value(const V& pre) const {
    V below = reinterpret<V>(reinterpret<Mask>(pre * slope) & leaky);
    V y = pre <= 0 ? below : pre;
    return y > cap ? cap : y;
  }
  // Where the derivative is one; not on NaN, as in PyTorch.
  DC_INLINE Mask passes(const V& pre) const { return (pre > 0) & (~(pre >= cap) | uncapped); }
  DC_INLINE V backward(const V& grad, const Mask& passes) const {
    V below = reinterpret<V>(reinterpret<Mask>(grad * slope) & leaky);
    return passes ? grad : below;
  }
};

template <class V>
DC_INLINE V smooth_value(const V& pre, Activation activation) {
  if (activation == Activation::silu) return pre / (1 + exp(-pre));
  if (activation == Activation::gelu) return pre * normal_cdf(pre);
  V lifted = pre + 3;
  lifted = lifted < 0 ? V{} : lifted;
  lifted = lifted > 6 ? V{} + 6 : lifted;
  return pre * lifted / 6;
}

template <class V>
DC_INLINE V smooth_derivative(const V& pre, Activation activation) {
  using Scalar = typename Vector<V>::Scalar;
  if (activation == Activation::silu) {
    V s = 1 / (1 + exp(-pre));
    return s * (1 + pre * (1 - s));
  }
  if (activation == Activation::gelu) {
    return normal_cdf(pre) + pre * exp(pre * pre * Scalar(-0.5)) * Scalar(0.39894228040143267794);
  }
  V inside = pre / 3 + Scalar(0.5);
  V below = pre <= -3 ? V{} : inside;
  return pre >= 3 ? V{} + 1 : below;
}

// A vector argument over one row: an array beside a row of channels, one number for a whole row of pixels.
template <bool channels_innermost, class A, class Tail>
DC_INLINE auto per_element(const A* values, int64_t i, Tail tail) {
  if constexpr (channels_innermost) {
    return load(values + i, tail);
  } else {
    return broadcast<VectorOf<A>>(values[0]);
  }
}

template <class T>
DC_INLINE T* offset(void* base, int64_t elements) {
  return base ? static_cast<T*>(base) + elements : nullptr;
}
template <class T>
DC_INLINE const T* offset(const void* base, int64_t elements) {
  return base ? static_cast<const T*>(base) + elements : nullptr;
}

// Applies the activation to a vector and writes the output, and for backward the bits or the pre-activation if asked.
template <class T, Sort sort, class V, class Tail>
DC_INLINE void activate(const V& pre, T* output, T* pre_activation, uint8_t* bits, const PiecewiseLinear<V>& piecewise,
                        Activation activation, Tail tail) {
  if constexpr (sort == Sort::identity) {
    store(output, pre, tail);
  } else if constexpr (sort == Sort::smooth) {
    if (pre_activation) store(pre_activation, pre, tail);
    store(output, smooth_value(pre, activation), tail);
  } else if constexpr (sort == Sort::relu) {
    const auto passes = ~(pre <= 0);  // on NaN too, as in PyTorch
    store(output, passes ? pre : V{}, tail);
    if (bits) write_bits<V>(bits, to_bits(passes), tail);
  } else {
    store(output, piecewise.value(pre), tail);
    if (bits) write_bits<V>(bits, to_bits(piecewise.passes(pre)), tail);
  }
}

// The gradient in front of the activation.
template <class T, Sort sort, class V, class Tail>
DC_INLINE V error_at(const T* grad_output, const T* pre_activation, const uint8_t* bits,
                     const PiecewiseLinear<V>& piecewise, Activation activation, Tail tail) {
  V grad = load(grad_output, tail);
  if constexpr (sort == Sort::relu || sort == Sort::piecewise) {
    const auto passes = from_bits<typename Vector<V>::Mask>(read_bits<V>(bits, tail));
    grad = sort == Sort::relu ? (passes ? grad : V{}) : piecewise.backward(grad, passes);
  } else if constexpr (sort == Sort::smooth) {
    grad *= smooth_derivative(load(pre_activation, tail), activation);
  }
  return grad;
}

// One task's part of a tensor: `rows` rows of `length` elements, `stride` apart.
struct Slab {
  int64_t sample, channel;  // the first
  int64_t first_sum;        // among those of all row blocks
  int64_t channels;
  int64_t rows, length, stride;
  int64_t first;           // element
  int64_t bits, bits_row;  // byte of the first element's bit, bytes between rows

  Slab(const Layout& layout, int64_t task) {
    const int64_t row_block = task / layout.blocks();
    sample = row_block / layout.row_blocks();
    channel = task % layout.blocks() * layout.block;
    first_sum = row_block * layout.channels + channel;
    channels = std::min(layout.block, layout.channels - channel);
    bits_row = layout.bytes_of_bits_row();
    if (layout.channels_innermost) {
      const int64_t above = row_block % layout.row_blocks() * layout.rows, row = sample * layout.pixels + above;
      rows = std::min(layout.rows, layout.pixels - above), length = channels, stride = layout.channels;
      first = row * layout.channels + channel;
      bits = row * bits_row + channel / 8;
    } else {
      rows = 1, length = layout.pixels, stride = 0;
      first = (sample * layout.channels + channel) * layout.pixels;
      bits = (sample * layout.channels + channel) * bits_row;
    }
  }
};

// Sums the terms of a slab per channel into sums[0..channels). term(row, i, tail) is the vector at element i of a row.
template <class V, bool channels_innermost, class Term>
DC_INLINE void sum_slab(const Slab& slab, typename Vector<V>::Scalar* sums, Term&& term) {
  using A = typename Vector<V>::Scalar;
  constexpr int lanes = Vector<V>::lanes;
  if constexpr (channels_innermost) {
    alignas(64) A group[kMostChannels];
    std::fill_n(sums, slab.channels, A(0));
    for (int64_t start = 0; start < slab.rows; start += kGroup) {
      const int64_t end = std::min(start + kGroup, slab.rows);
      std::fill_n(group, slab.channels, A(0));
      int64_t row = start;
      for (; row + 4 <= end; row += 4) {
        each_vector<V>(slab.length, [&](int64_t i, auto tail) DC_LAMBDA {
          V sum = (term(row, i, tail) + term(row + 1, i, tail)) + (term(row + 2, i, tail) + term(row + 3, i, tail));
          store(group + i, load(group + i, tail) + sum, tail);
        });
      }
      for (; row < end; ++row) {
        each_vector<V>(slab.length, [&](int64_t i, auto tail) DC_LAMBDA {
          store(group + i, load(group + i, tail) + term(row, i, tail), tail);
        });
      }
      each_vector<V>(slab.length, [&](int64_t i, auto tail) DC_LAMBDA {
        store(sums + i, load(sums + i, tail) + load(group + i, tail), tail);
      });
    }
  } else {
    V total{};
    int64_t start = 0;
    while (start < slab.length) {
      V part[4] = {};
      const int64_t end = std::min(start + kGroup * lanes, slab.length);
      for (; start + 4 * lanes <= end; start += 4 * lanes) {
        for (int k = 0; k < 4; ++k) part[k] += term(0, start + k * lanes, Whole{});
      }
      each_vector<V>(end - start, [&](int64_t i, auto tail) DC_LAMBDA { part[0] += term(0, start + i, tail); });
      start = end;
      total += (part[0] + part[1]) + (part[2] + part[3]);
    }
    sums[0] = horizontal_sum(total);
  }
}

// Calls body(count, row) for all rows of a slab, `count` of them at once: rows of channels meet the same vectors, which so
// are loaded once for several rows.
template <bool channels_innermost, Sort sort, class Body>
DC_INLINE void each_rows_of_slab(const Slab& slab, Body&& body) {
  constexpr int at_once = channels_innermost && sort != Sort::smooth ? 4 : 1;
  int64_t row = 0;
  for (; row + at_once <= slab.rows; row += at_once) body(std::integral_constant<int, at_once>{}, row);
  for (; row < slab.rows; ++row) body(std::integral_constant<int, 1>{}, row);
}

template <class T, bool channels_innermost, Sort sort>
void center_forward_task(const CenterForward& p, int64_t task) {
  using V = VectorOf<T>;
  using A = ScalarOf<T>;
  const Slab slab(p.layout, task);
  const T* input = offset<T>(p.input, slab.first);
  const T* residual = offset<T>(p.residual, slab.first);
  T* output = offset<T>(p.output, slab.first);
  T* pre_activation = offset<T>(p.pre_activation, slab.first);
  uint8_t* bits = offset<uint8_t>(p.bits, slab.bits);
  const PiecewiseLinear<V> piecewise(p.activation, p.slope);

  // Not folded into scale * z + shift, which is as fast: what is constant cancels exactly.
  alignas(64) A removed[kMostChannels], scale[kMostChannels], bias[kMostChannels];
  const A* gains = offset<A>(p.gain, slab.channel);
  const A* mean_scales = offset<A>(p.mean_scale, slab.channel);
  const A* biases = offset<A>(p.bias, slab.channel);
  if (p.map_mean) {
    A* means = offset<A>(p.map_mean, slab.sample * p.layout.channels + slab.channel);
    if (p.step != Step::apply) {
      A* sums = p.step == Step::sum ? offset<A>(p.partials, slab.first_sum) : means;
      sum_slab<V, channels_innermost>(slab, sums, [&](int64_t row, int64_t i, auto tail) DC_LAMBDA {
        return load(input + row * slab.stride + i, tail);
      });
      if (p.step == Step::sum) return;
      for (int64_t c = 0; c < slab.channels; ++c) means[c] /= A(p.layout.pixels);
    }
    for (int64_t c = 0; c < slab.channels; ++c) removed[c] = means[c] * (mean_scales ? mean_scales[c] : A(p.constant));
  } else {
    std::fill_n(removed, slab.channels, A(0));
  }
  for (int64_t c = 0; c < slab.channels; ++c) {
    scale[c] = gains ? gains[c] : A(1);
    bias[c] = biases ? biases[c] : A(0);
  }
  each_rows_of_slab<channels_innermost, sort>(slab, [&](auto count, int64_t row) DC_LAMBDA {
    each_vector<V>(slab.length, [&](int64_t i, auto tail) DC_LAMBDA {
      const V means = per_element<channels_innermost>(removed, i, tail);
      const V scales = per_element<channels_innermost>(scale, i, tail);
      const V added = per_element<channels_innermost>(bias, i, tail);
#pragma GCC unroll 4
      for (int64_t r = row; r < row + count.value; ++r) {
        const int64_t at = r * slab.stride + i;
        V pre = (load(input + at, tail) - means) * scales + added;
        if (residual) pre += load(residual + at, tail);
        activate<T, sort>(pre, output + at, offset<T>(pre_activation, at),
                          offset<uint8_t>(bits, r * slab.bits_row + i / 8), piecewise, p.activation, tail);
      }
    });
  });
}

template <class T, bool channels_innermost, Sort sort>
void center_backward_task(const CenterBackward& p, int64_t task) {
  using V = VectorOf<T>;
  using A = ScalarOf<T>;
  const Slab slab(p.layout, task);
  const T* grad_output = offset<T>(p.grad_output, slab.first);
  const T* input = offset<T>(p.input, slab.first);
  const T* pre_activation = offset<T>(p.pre_activation, slab.first);
  const uint8_t* bits = offset<uint8_t>(p.bits, slab.bits);
  const PiecewiseLinear<V> piecewise(p.activation, p.slope);
  const int64_t vector = slab.sample * p.layout.channels + slab.channel;

  auto error = [&](int64_t row, int64_t i, auto tail) DC_LAMBDA {
    const int64_t at = row * slab.stride + i;
    return error_at<T, sort>(grad_output + at, offset<T>(pre_activation, at),
                             offset<uint8_t>(bits, row * slab.bits_row + i / 8), piecewise, p.activation, tail);
  };

  alignas(64) A sums[kMostChannels];
  if (p.step == Step::apply) {
    if (p.centred) std::copy_n(offset<A>(p.sums, vector), slab.channels, sums);
  } else if (p.centred || p.sums) {
    sum_slab<V, channels_innermost>(slab, sums, error);
    A* all = p.step == Step::sum ? offset<A>(p.partial_sums, slab.first_sum) : offset<A>(p.sums, vector);
    if (all) std::copy_n(sums, slab.channels, all);
  }
  if (p.dots && p.step != Step::apply) {
    A* all = p.step == Step::sum ? offset<A>(p.partial_dots, slab.first_sum) : offset<A>(p.dots, vector);
    sum_slab<V, channels_innermost>(slab, all, [&](int64_t row, int64_t i, auto tail) DC_LAMBDA {
      return error(row, i, tail) * load(input + row * slab.stride + i, tail);
    });
  }
  T* grad_input = offset<T>(p.grad_input, slab.first);
  T* grad_residual = offset<T>(p.grad_residual, slab.first);
  if (p.step == Step::sum || (!grad_input && !grad_residual)) return;

  alignas(64) A removed[kMostChannels], scale[kMostChannels];
  const A* scales = offset<A>(p.scale, slab.channel);
  const A* mean_scales = offset<A>(p.mean_scale, slab.channel);
  for (int64_t c = 0; c < slab.channels; ++c) {
    const A mean_scale = mean_scales ? mean_scales[c] : A(p.constant);
    removed[c] = p.centred ? sums[c] / A(p.layout.pixels) * mean_scale : A(0);
    scale[c] = scales ? scales[c] : A(1);
  }
  each_rows_of_slab<channels_innermost, sort>(slab, [&](auto count, int64_t row) DC_LAMBDA {
    each_vector<V>(slab.length, [&](int64_t i, auto tail) DC_LAMBDA {
      const V means = per_element<channels_innermost>(removed, i, tail);
      const V factors = per_element<channels_innermost>(scale, i, tail);
#pragma GCC unroll 4
      for (int64_t r = row; r < row + count.value; ++r) {
        const V e = error(r, i, tail);
        if (grad_residual) store(grad_residual + r * slab.stride + i, e, tail);
        if (grad_input) store(grad_input + r * slab.stride + i, (e - means) * factors, tail);
      }
    });
  });
}

// Input positions offset + stride * [first, last) lie inside the map, for a tap at `offset` from the padded corner.
struct Span {
  int64_t first, last;
  Span(int64_t offset, int64_t stride, int64_t size, int64_t outputs) {
    first = offset < 0 ? (-offset + stride - 1) / stride : 0;
    last = offset < size ? std::min(outputs, (size - 1 - offset) / stride + 1) : 0;
  }
};

template <class T, bool channels_innermost>
void window_mean_task(const WindowMean& p, int64_t task, std::vector<ScalarOf<T>>& sums) {
  using V = VectorOf<T>;
  using A = ScalarOf<T>;
  const Slab slab(p.layout, task);
  const T* input = offset<T>(p.input, slab.first);
  const int64_t channels = slab.channels, taps = p.taps();
  const int64_t pixel = channels_innermost ? slab.stride : 1;
  sums.assign(taps * channels, A(0));

  // Row by row of the input, so that memory is read once: the sums along a row serve every kernel row that meets it.
  alignas(64) A along_row[kMostChannels];
  for (int64_t d = 0; d < p.size[0]; ++d) {
    for (int64_t h = 0; h < p.size[1]; ++h) {
      const T* row = input + (d * p.size[1] + h) * p.size[2] * pixel;
      for (int64_t s = 0; s < p.kernel[2]; ++s) {
        const int64_t corner = s * p.dilation[2] - p.padding[2];
        const Span span(corner, p.stride[2], p.size[2], p.output[2]);
        bool summed = false;
        for (int64_t kd = 0; kd < p.kernel[0]; ++kd) {
          const int64_t at_d = d + p.padding[0] - kd * p.dilation[0];
          if (at_d < 0 || at_d % p.stride[0] || at_d / p.stride[0] >= p.output[0]) continue;
          for (int64_t kh = 0; kh < p.kernel[1]; ++kh) {
            const int64_t at_h = h + p.padding[1] - kh * p.dilation[1];
            if (at_h < 0 || at_h % p.stride[1] || at_h / p.stride[1] >= p.output[1]) continue;
            if (!summed) {
              summed = true;
              std::fill_n(along_row, channels, A(0));
              if (channels_innermost) {
                for (int64_t q = span.first; q < span.last; ++q) {
                  const T* at = row + (corner + q * p.stride[2]) * pixel;
                  each_vector<V>(channels, [&](int64_t i, auto tail) DC_LAMBDA {
                    store(along_row + i, load(along_row + i, tail) + load(at + i, tail), tail);
                  });
                }
              } else if (p.stride[2] == 1) {
                V total{};
                const int64_t count = std::max<int64_t>(span.last - span.first, 0);
                each_vector<V>(count, [&](int64_t i, auto tail) DC_LAMBDA {
                  total += load(row + corner + span.first + i, tail);
                });
                along_row[0] = horizontal_sum(total);
              } else {
                for (int64_t q = span.first; q < span.last; ++q) {
                  along_row[0] += load(row + corner + q * p.stride[2], Part{1})[0];
                }
              }
            }
            A* sum = sums.data() + ((kd * p.kernel[1] + kh) * p.kernel[2] + s) * channels;
            for (int64_t c = 0; c < channels; ++c) sum[c] += along_row[c];
          }
        }
      }
    }
  }
  const A outputs = A(p.output[0] * p.output[1] * p.output[2]);
  T* means = offset<T>(p.means, (slab.sample * p.layout.channels + slab.channel) * taps);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      V mean = broadcast<V>(sums[tap * channels + c] / outputs);
      store(means + c * taps + tap, mean, Part{1});
    }
  }
}

template <class T>
void finish_weight_grad_task(const WeightGrad& p, int64_t filter) {
  using V = VectorOf<T>;
  using A = ScalarOf<T>;
  const int64_t size = p.channels * p.taps;
  T* grad = offset<T>(p.grad, filter * size);
  // A filter is a few KiB, so the second and third look at it come from the first-level cache.
  if (p.dots) {
    const T* weight = offset<T>(p.weight, filter * size);
    V dot{};
    each_vector<V>(size, [&](int64_t i, auto tail) DC_LAMBDA { dot += load(weight + i, tail) * load(grad + i, tail); });
    const A divisor = p.divisor ? static_cast<const A*>(p.divisor)[filter] : A(1);
    static_cast<A*>(p.dots)[filter] = horizontal_sum(dot) / divisor;
  }
  const A factor = p.factor ? static_cast<const A*>(p.factor)[filter] : A(1);
  const A share = p.taps > 1 ? A(p.projection) / A(p.taps) : A(0);
  if (share == 0) {
    if (factor == 1) return;
    each_vector<V>(size, [&](int64_t i, auto tail) DC_LAMBDA { store(grad + i, load(grad + i, tail) * factor, tail); });
    return;
  }
  if (p.channels_innermost) {
    each_vector<V>(p.channels, [&](int64_t i, auto tail) DC_LAMBDA {
      V sum{};
      for (int64_t tap = 0; tap < p.taps; ++tap) sum += load(grad + tap * p.channels + i, tail);
      sum *= share;
      for (int64_t tap = 0; tap < p.taps; ++tap) {
        T* at = grad + tap * p.channels + i;
        store(at, (load(at, tail) - sum) * factor, tail);
      }
    });
    return;
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    T* kernel = grad + c * p.taps;
    V total{};
    each_vector<V>(p.taps, [&](int64_t i, auto tail) DC_LAMBDA { total += load(kernel + i, tail); });
    const A removed = horizontal_sum(total) * share;
    each_vector<V>(p.taps, [&](int64_t i, auto tail) DC_LAMBDA {
      store(kernel + i, (load(kernel + i, tail) - removed) * factor, tail);
    });
  }
}

template <class F>
DC_INLINE void for_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
    case Dtype::bf16: return f(bfloat16{});
    case Dtype::f16: return f(float16{});
  }
}

// Calls f(storage type, rows of channels?, sort of activation), all as types.
template <class P, class F>
DC_INLINE void for_variant(const P& p, F&& f) {
  for_dtype(p.dtype, [&](auto storage) {
    auto with_layout = [&](auto innermost) {
      switch (sort_of(p.activation)) {
        case Sort::identity: return f(storage, innermost, std::integral_constant<Sort, Sort::identity>{});
        case Sort::relu: return f(storage, innermost, std::integral_constant<Sort, Sort::relu>{});
        case Sort::piecewise: return f(storage, innermost, std::integral_constant<Sort, Sort::piecewise>{});
        case Sort::smooth: return f(storage, innermost, std::integral_constant<Sort, Sort::smooth>{});
      }
    };
    p.layout.channels_innermost ? with_layout(std::true_type{}) : with_layout(std::false_type{});
  });
}

void center_forward(const CenterForward& p, int64_t begin, int64_t end) {
  for_variant(p, [&](auto storage, auto innermost, auto sort) {
    for (int64_t task = begin; task < end; ++task) {
      center_forward_task<decltype(storage), innermost.value, sort.value>(p, task);
    }
  });
}

void center_backward(const CenterBackward& p, int64_t begin, int64_t end) {
  for_variant(p, [&](auto storage, auto innermost, auto sort) {
    for (int64_t task = begin; task < end; ++task) {
      center_backward_task<decltype(storage), innermost.value, sort.value>(p, task);
    }
  });
}

void window_mean(const WindowMean& p, int64_t begin, int64_t end) {
  for_dtype(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    std::vector<ScalarOf<T>> sums;
    for (int64_t task = begin; task < end; ++task) {
      if (p.layout.channels_innermost) {
        window_mean_task<T, true>(p, task, sums);
      } else {
        window_mean_task<T, false>(p, task, sums);
      }
    }
  });
}

void finish_weight_grad(const WeightGrad& p, int64_t begin, int64_t end) {
  for_dtype(p.dtype, [&](auto storage) {
    for (int64_t filter = begin; filter < end; ++filter) finish_weight_grad_task<decltype(storage)>(p, filter);
  });
}
