// The convolution by one tap as a matrix product with everything behind it fused, included after kernels_impl.h.
//
// Bytes: one read of the input, one write of the output (and of the activation's bits); the weights, packed, come from
// the second-level cache. A tile of kRowsAtOnce pixels by one panel of filters is accumulated in registers and leaves
// them finished.

constexpr int64_t kPanel = PointwiseForward::kPanel;
// Accumulators fill the registers: 6 x 4 of 32 with AVX-512, 6 x 2 of 16 with AVX2, where a panel takes four turns.
constexpr int kRowsAtOnce = 6;
constexpr int kVectorsAtOnce = DC_LANES == 16 ? 4 : 2;
constexpr int64_t kFiltersAtOnce = kVectorsAtOnce * DC_LANES;

// What one step of the product consumes of a row of the input: one channel, or for bfloat16 a pair.
template <class T>
struct Product {
  static constexpr int64_t channels = 1;
  using Unit = T;
  static DC_INLINE f32v multiply_add(const f32v& sum, float a, const float* b) {
    return sum + a * read<f32v>(b, Whole{});
  }
};
#if defined(DC_AVX512_BF16)
struct BFloat16Pair {
  uint32_t bits;
};
template <>
struct Product<bfloat16> {
  static constexpr int64_t channels = 2;
  using Unit = BFloat16Pair;
  static DC_INLINE f32v multiply_add(const f32v& sum, BFloat16Pair a, const BFloat16Pair* b) {
    return reinterpret<f32v>(_mm512_dpbf16_ps(reinterpret<__m512>(sum), reinterpret<__m512bh>(_mm512_set1_epi32(a.bits)),
                                              reinterpret<__m512bh>(read<u32v>(b, Whole{}))));
  }
};
#endif

// Filters first..first + kFiltersAtOnce of `rows` pixels from `pixel` on.
template <class T, Sort sort, int rows>
DC_INLINE void pointwise_tile(const PointwiseForward& p, const PiecewiseLinear<f32v>& piecewise, int64_t sample,
                              int64_t pixel, int64_t first) {
  using Unit = typename Product<T>::Unit;
  const int64_t steps = p.channels / Product<T>::channels;
  const int64_t row = sample * p.pixels + pixel;
  const Unit* input = static_cast<const Unit*>(p.input) + row * steps;
  const Unit* weight = static_cast<const Unit*>(p.weight) + first / kPanel * kPanel * steps + first % kPanel;

  f32v sums[rows][kVectorsAtOnce] = {};
  for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Unit a = input[r * steps + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsAtOnce; ++v) {
        sums[r][v] = Product<T>::multiply_add(sums[r][v], a, weight + k * kPanel + v * DC_LANES);
      }
    }
  }

  const float* gain = offset<float>(p.gain, 0);
  const float* shift = offset<float>(p.shift, sample * p.filters);
  const int64_t bits_row = (p.filters + 7) / 8;
  auto finish = [&](int v, int64_t o, auto tail) DC_LAMBDA {
    const f32v scale = gain ? load(gain + o, tail) : broadcast<f32v>(1.0f);
    const f32v added = shift ? load(shift + o, tail) : f32v{};
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * p.filters + o;
      f32v pre = sums[r][v] * scale + added;
      if (p.residual) pre += load(offset<T>(p.residual, at), tail);
      activate<T, sort>(pre, offset<T>(p.output, at), offset<T>(p.pre_activation, at),
                        offset<uint8_t>(p.bits, (row + r) * bits_row + o / 8), piecewise, p.activation, tail);
    }
  };
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsAtOnce; ++v) {
    const int64_t o = first + v * DC_LANES;
    if (o + DC_LANES <= p.filters) {
      finish(v, o, Whole{});
    } else if (o < p.filters) {
      finish(v, o, Part{int(p.filters - o)});
    }
  }
}

template <class T, Sort sort>
void pointwise_forward_task(const PointwiseForward& p, int64_t task) {
  const PiecewiseLinear<f32v> piecewise(p.activation, p.slope);
  const int64_t panel_tile = task % p.panel_tiles();
  const int64_t row_tile = task / p.panel_tiles() % p.row_tiles();
  const int64_t sample = task / p.panel_tiles() / p.row_tiles();
  const int64_t first_row = row_tile * p.rows, last_row = std::min(first_row + p.rows, p.pixels);
  const int64_t first = panel_tile * p.panels * kPanel;
  const int64_t last = std::min(first + p.panels * kPanel, p.filters);
  for (int64_t o = first; o < last; o += kFiltersAtOnce) {
    int64_t row = first_row;
    for (; row + kRowsAtOnce <= last_row; row += kRowsAtOnce) {
      pointwise_tile<T, sort, kRowsAtOnce>(p, piecewise, sample, row, o);
    }
    switch (last_row - row) {
      case 5: pointwise_tile<T, sort, 5>(p, piecewise, sample, row, o); break;
      case 4: pointwise_tile<T, sort, 4>(p, piecewise, sample, row, o); break;
      case 3: pointwise_tile<T, sort, 3>(p, piecewise, sample, row, o); break;
      case 2: pointwise_tile<T, sort, 2>(p, piecewise, sample, row, o); break;
      case 1: pointwise_tile<T, sort, 1>(p, piecewise, sample, row, o); break;
    }
  }
}

template <class Unit>
void pack_weight_task(const PackWeight& p, int64_t steps, int64_t panel) {
  const int64_t first = panel * kPanel, filters = std::min(kPanel, p.filters - first);
  const Unit* weight = static_cast<const Unit*>(p.weight) + first * steps;
  Unit* packed = static_cast<Unit*>(p.packed) + first * steps;
  // In blocks of channels, so that the lines written stay in the first-level cache until they are full.
  constexpr int64_t kBlock = 32;
  for (int64_t start = 0; start < steps; start += kBlock) {
    const int64_t end = std::min(start + kBlock, steps);
    for (int64_t o = 0; o < kPanel; ++o) {
      for (int64_t k = start; k < end; ++k) packed[k * kPanel + o] = o < filters ? weight[o * steps + k] : Unit{};
    }
  }
}

template <class T>
void pointwise_mean_task(const PointwiseMean& p, int64_t filter) {
  constexpr int64_t kSamples = 8;
  const T* weight = static_cast<const T*>(p.weight) + filter * p.channels;
  const float* sums = static_cast<const float*>(p.sums);
  const float scale = (p.gain ? static_cast<const float*>(p.gain)[filter] : 1.0f) / float(p.pixels);
  for (int64_t start = 0; start < p.samples; start += kSamples) {
    const int64_t samples = std::min(kSamples, p.samples - start);
    f32v dots[kSamples] = {};
    each_vector<f32v>(p.channels, [&](int64_t i, auto tail) DC_LAMBDA {
      const f32v w = load(weight + i, tail);
      for (int64_t n = 0; n < samples; ++n) dots[n] += w * load(sums + (start + n) * p.channels + i, tail);
    });
    for (int64_t n = 0; n < samples; ++n) {
      static_cast<float*>(p.map_mean)[(start + n) * p.filters + filter] = horizontal_sum(dots[n]) * scale;
    }
  }
}

// Calls f(storage type, its unit) for the dtypes that have a product.
template <class F>
DC_INLINE void for_product(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32) f(float{});
#if defined(DC_AVX512_BF16)
  if (dtype == Dtype::bf16) f(bfloat16{});
#endif
}

void pointwise_forward(const PointwiseForward& p, int64_t begin, int64_t end) {
  for_product(p.dtype, [&](auto storage) {
    auto run = [&](auto sort) {
      for (int64_t task = begin; task < end; ++task) pointwise_forward_task<decltype(storage), sort.value>(p, task);
    };
    switch (sort_of(p.activation)) {
      case Sort::identity: return run(std::integral_constant<Sort, Sort::identity>{});
      case Sort::relu: return run(std::integral_constant<Sort, Sort::relu>{});
      case Sort::piecewise: return run(std::integral_constant<Sort, Sort::piecewise>{});
      case Sort::smooth: return run(std::integral_constant<Sort, Sort::smooth>{});
    }
  });
}

void pack_weight(const PackWeight& p, int64_t begin, int64_t end) {
  for_product(p.dtype, [&](auto storage) {
    using Of = Product<decltype(storage)>;
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_weight_task<typename Of::Unit>(p, p.channels / Of::channels, panel);
    }
  });
}

void pointwise_mean(const PointwiseMean& p, int64_t begin, int64_t end) {
  for_product(p.dtype, [&](auto storage) {
    for (int64_t filter = begin; filter < end; ++filter) pointwise_mean_task<decltype(storage)>(p, filter);
  });
}
