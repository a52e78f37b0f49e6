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

// What one step of the product consumes: one element, or for bfloat16 a pair.
template <class T>
struct Product {
  static constexpr int64_t elements = 1;
  using Unit = T;
  template <class Tail>
  static DC_INLINE f32v read_vector(const T* b, Tail tail) {
    return load(b, tail);
  }
  static DC_INLINE f32v multiply_add(const f32v& sum, float a, const f32v& b) { return sum + a * b; }
};
#if defined(DC_AVX512_BF16)
struct BFloat16Pair {
  uint32_t bits;
};
template <>
struct Product<bfloat16> {
  static constexpr int64_t elements = 2;
  using Unit = BFloat16Pair;
  template <class Tail>
  static DC_INLINE f32v read_vector(const BFloat16Pair* b, Tail tail) {
    return read<f32v>(reinterpret_cast<const float*>(b), tail);
  }
  static DC_INLINE f32v multiply_add(const f32v& sum, BFloat16Pair a, const f32v& b) {
    return reinterpret<f32v>(_mm512_dpbf16_ps(reinterpret<__m512>(sum), reinterpret<__m512bh>(_mm512_set1_epi32(a.bits)),
                                              reinterpret<__m512bh>(b)));
  }
};
#endif

// Two rows at a time interleaved: pairs[r / 2 * length + i] holds element i of rows r and r + 1; zero for a missing row.
template <class T>
void pair_rows(const T* rows, int64_t count, int64_t length, uint32_t* pairs) {
  for (int64_t r = 0; r < count; r += 2) {
    each_vector<f32v>(length, [&](int64_t i, auto tail) DC_LAMBDA {
      u32v low = __builtin_convertvector(read<u16v>(rows + r * length + i, tail), u32v);
      u32v high{};
      if (r + 1 < count) high = __builtin_convertvector(read<u16v>(rows + (r + 1) * length + i, tail), u32v);
      write(pairs + r / 2 * length + i, low | high << 16, tail);
    });
  }
}

// sums[r][v] += sum over k of a[r * row + k * step] * b[k * stride + v * lanes ...], in registers. Only the last of the
// vectors of b may be partial.
template <class T, int rows, int vectors, class Tail, class Unit>
DC_INLINE void accumulate(f32v (&sums)[rows][vectors], int64_t steps, const Unit* a, int64_t row, int64_t step,
                          const Unit* b, int64_t stride, Tail tail) {
  for (int64_t k = 0; k < steps; ++k) {
    f32v right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors - 1; ++v) right[v] = Product<T>::read_vector(b + k * stride + v * DC_LANES, Whole{});
    right[vectors - 1] = Product<T>::read_vector(b + k * stride + (vectors - 1) * DC_LANES, tail);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Unit left = a[r * row + k * step];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = Product<T>::multiply_add(sums[r][v], left, right[v]);
    }
  }
}

// Calls body(rows at once as a type, first row) until all rows are done.
template <class Body>
DC_INLINE void each_rows(int64_t first, int64_t last, Body&& body) {
  for (; first + kRowsAtOnce <= last; first += kRowsAtOnce) body(std::integral_constant<int, kRowsAtOnce>{}, first);
  switch (last - first) {
    case 5: return body(std::integral_constant<int, 5>{}, first);
    case 4: return body(std::integral_constant<int, 4>{}, first);
    case 3: return body(std::integral_constant<int, 3>{}, first);
    case 2: return body(std::integral_constant<int, 2>{}, first);
    case 1: return body(std::integral_constant<int, 1>{}, first);
  }
}

// Calls body(v, index, tail) for each of the vectors at once that lies within `count`, from `first` on.
template <class Body>
DC_INLINE void each_vector_of_panel(int64_t first, int64_t count, Body&& body) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectorsAtOnce; ++v) {
    const int64_t i = first + v * DC_LANES;
    if (i + DC_LANES <= count) {
      body(v, i, Whole{});
    } else if (i < count) {
      body(v, i, Part{int(count - i)});
    }
  }
}

// Filters first..first + kFiltersAtOnce of `rows` pixels from `pixel` on.
template <class T, Sort sort, int rows>
DC_INLINE void pointwise_tile(const PointwiseForward& p, const PiecewiseLinear<f32v>& piecewise, int64_t sample,
                              int64_t pixel, int64_t first) {
  using Unit = typename Product<T>::Unit;
  const int64_t steps = p.channels / Product<T>::elements;
  const int64_t row = sample * p.pixels + pixel;
  const Unit* weight = static_cast<const Unit*>(p.weight) + first / kPanel * kPanel * steps + first % kPanel;
  f32v sums[rows][kVectorsAtOnce] = {};
  accumulate<T>(sums, steps, static_cast<const Unit*>(p.input) + row * steps, steps, 1, weight, kPanel, Whole{});

  const float* gain = offset<float>(p.gain, 0);
  const float* shift = offset<float>(p.shift, sample * p.filters);
  const int64_t bits_row = (p.filters + 7) / 8;
  each_vector_of_panel(first, p.filters, [&](int v, int64_t o, auto tail) DC_LAMBDA {
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
  });
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
    each_rows(first_row, last_row, [&](auto rows, int64_t row) DC_LAMBDA {
      pointwise_tile<T, sort, rows.value>(p, piecewise, sample, row, o);
    });
  }
}

// dz' of the rows first..first + count into `error` (rows of filters), and for bfloat16 into `pairs` with the pixels
// paired, a missing last one as zero.
template <class T, Sort sort>
void pointwise_error(const PointwiseBackward& p, const PiecewiseLinear<f32v>& piecewise, int64_t first, int64_t count,
                     T* error, uint32_t* pairs) {
  const float* scale = offset<float>(p.scale, 0);
  const int64_t bits_row = (p.filters + 7) / 8;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = first + r;
    const float* removed = offset<float>(p.removed, row / p.pixels * p.filters);
    each_vector<f32v>(p.filters, [&](int64_t o, auto tail) DC_LAMBDA {
      const int64_t at = row * p.filters + o;
      f32v e = error_at<T, sort>(offset<T>(p.grad_output, at), offset<T>(p.pre_activation, at),
                                 offset<uint8_t>(p.bits, row * bits_row + o / 8), piecewise, p.activation, tail);
      if (p.grad_residual) store(offset<T>(p.grad_residual, at), e, tail);
      if (removed) e -= load(removed + o, tail);
      if (scale) e *= load(scale + o, tail);
      store(error + r * p.filters + o, e, tail);
    });
  }
  if constexpr (sizeof(T) == 2) pair_rows(error, count, p.filters, pairs);
}

template <class T, Sort sort>
void pointwise_backward_slot(const PointwiseBackward& p, int64_t slot) {
  using Unit = typename Product<T>::Unit;
  constexpr int64_t elements = Product<T>::elements;
  const PiecewiseLinear<f32v> piecewise(p.activation, p.slope);
  T* error = offset<T>(static_cast<char*>(p.scratch) + slot * p.scratch_bytes(), 0);
  uint32_t* error_pairs = reinterpret_cast<uint32_t*>(error + PointwiseBackward::kRows * p.filters);
  uint32_t* input_pairs = error_pairs + PointwiseBackward::kRows / 2 * p.filters;
  float* partial = p.partials ? p.partials + slot * p.filters * p.channels : nullptr;
  if (partial) std::fill_n(partial, p.filters * p.channels, 0.0f);

  const int64_t begin = p.rows() * slot / p.slots, end = p.rows() * (slot + 1) / p.slots;
  for (int64_t first = begin; first < end; first += PointwiseBackward::kRows) {
    const int64_t count = std::min(PointwiseBackward::kRows, end - first);
    pointwise_error<T, sort>(p, piecewise, first, count, error, error_pairs);
    if (p.weight) {
      const int64_t steps = p.filters / elements;
      for (int64_t c = 0; c < p.channels; c += kFiltersAtOnce) {
        const Unit* weight = static_cast<const Unit*>(p.weight) + c / kPanel * kPanel * steps + c % kPanel;
        each_rows(0, count, [&](auto rows, int64_t row) DC_LAMBDA {
          f32v sums[rows.value][kVectorsAtOnce] = {};
          accumulate<T>(sums, steps, reinterpret_cast<const Unit*>(error) + row * steps, steps, 1, weight, kPanel,
                        Whole{});
          each_vector_of_panel(c, p.channels, [&](int v, int64_t i, auto tail) DC_LAMBDA {
#pragma GCC unroll 8
            for (int r = 0; r < rows.value; ++r) {
              store(offset<T>(p.grad_input, (first + row + r) * p.channels + i), sums[r][v], tail);
            }
          });
        });
      }
    }
    if (!partial) continue;
    const Unit* left = reinterpret_cast<const Unit*>(error);
    const Unit* right = static_cast<const Unit*>(p.input) + first * p.channels / elements;
    if constexpr (sizeof(T) == 2) {
      pair_rows(offset<T>(p.input, first * p.channels), count, p.channels, input_pairs);
      left = reinterpret_cast<const Unit*>(error_pairs);
      right = reinterpret_cast<const Unit*>(input_pairs);
    }
    const int64_t steps = (count + elements - 1) / elements;
    auto product = [&](int64_t c, auto vectors, auto tail) DC_LAMBDA {
      each_rows(0, p.filters, [&](auto rows, int64_t o) DC_LAMBDA {
        // Summed apart and then added, so that the rounding error grows with the rows of a tile plus the number of tiles.
        f32v sums[rows.value][vectors.value] = {};
        accumulate<T>(sums, steps, left + o, 1, p.filters, right + c, p.channels, tail);
        float* at = partial + o * p.channels + c;
#pragma GCC unroll 8
        for (int r = 0; r < rows.value; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors.value; ++v) {
            float* to = at + r * p.channels + v * DC_LANES;
            if (v + 1 < vectors.value) {
              store(to, load(to, Whole{}) + sums[r][v], Whole{});
            } else {
              store(to, load(to, tail) + sums[r][v], tail);
            }
          }
        }
      });
    };
    int64_t c = 0;
    for (; c + kFiltersAtOnce <= p.channels; c += kFiltersAtOnce) {
      product(c, std::integral_constant<int, kVectorsAtOnce>{}, Whole{});
    }
    for (; c + DC_LANES <= p.channels; c += DC_LANES) product(c, std::integral_constant<int, 1>{}, Whole{});
    if (c < p.channels) product(c, std::integral_constant<int, 1>{}, Part{int(p.channels - c)});
  }
}

template <class T>
void add_partials_task(const AddPartials& p, int64_t filter) {
  const int64_t size = p.filters * p.channels;
  const float* partials = p.partials + filter * p.channels;
  T* grad = offset<T>(p.grad, filter * p.channels);
  each_vector<f32v>(p.channels, [&](int64_t i, auto tail) DC_LAMBDA {
    f32v sum = load(partials + i, tail);
    for (int64_t slot = 1; slot < p.slots; ++slot) sum += load(partials + slot * size + i, tail);
    store(grad + i, sum, tail);
  });
}

#if defined(DC_AVX512)
// 16 x 16 elements of 32 bits: rows of `from` become columns of `to`. Neighbouring lanes change places in pairs, then
// pairs, fours and eights of lanes.
DC_INLINE void transpose_block(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const uint32_t*>(from) + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<uint32_t*>(to) + i * to_stride, a[i]);
}
#endif

template <class T>
void pack_weight_task(const PackWeight& p, int64_t panel) {
  using Unit = typename Product<T>::Unit;
  constexpr int64_t elements = Product<T>::elements;
  const int64_t steps = p.channels / elements;
  const int64_t first = panel * kPanel, filters = std::min(kPanel, p.filters - first);
  const Unit* weight = static_cast<const Unit*>(p.weight) + first * steps;
  Unit* packed = static_cast<Unit*>(p.packed) + first * steps;
  for (int64_t k = 0; k < steps; k += DC_LANES) {
    const int64_t count = std::min<int64_t>(DC_LANES, steps - k);
    for (int64_t o = 0; o < kPanel; o += DC_LANES) {
#if defined(DC_AVX512)
      if (sizeof(Unit) == 4 && count == DC_LANES && o + DC_LANES <= filters) {
        transpose_block(weight + o * steps + k, steps, packed + k * kPanel + o, kPanel);
        continue;
      }
#endif
      for (int64_t i = o; i < o + DC_LANES; ++i) {
        for (int64_t j = k; j < k + count; ++j) packed[j * kPanel + i] = i < filters ? weight[i * steps + j] : Unit{};
      }
    }
  }
}

template <class T>
void pack_transposed_task(const PackWeight& p, int64_t panel) {
  using Unit = typename Product<T>::Unit;
  constexpr int64_t elements = Product<T>::elements;
  const int64_t steps = p.filters / elements;
  const int64_t first = panel * kPanel, count = std::min(kPanel, p.channels - first);
  Unit* packed = static_cast<Unit*>(p.packed) + panel * kPanel * steps;
  for (int64_t k = 0; k < steps; ++k) {
    const T* rows = static_cast<const T*>(p.weight) + k * elements * p.channels + first;
    Unit* to = packed + k * kPanel;
    std::fill(to + count, to + kPanel, Unit{});
    if constexpr (elements == 1) {
      std::copy_n(rows, count, to);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i].bits = rows[i].bits | uint32_t(rows[p.channels + i].bits) << 16;
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

// Calls f(storage type, sort of activation), both as types.
template <class P, class F>
DC_INLINE void for_pointwise(const P& p, F&& f) {
  for_product(p.dtype, [&](auto storage) {
    switch (sort_of(p.activation)) {
      case Sort::identity: return f(storage, std::integral_constant<Sort, Sort::identity>{});
      case Sort::relu: return f(storage, std::integral_constant<Sort, Sort::relu>{});
      case Sort::piecewise: return f(storage, std::integral_constant<Sort, Sort::piecewise>{});
      case Sort::smooth: return f(storage, std::integral_constant<Sort, Sort::smooth>{});
    }
  });
}

void pointwise_forward(const PointwiseForward& p, int64_t begin, int64_t end) {
  for_pointwise(p, [&](auto storage, auto sort) {
    for (int64_t task = begin; task < end; ++task) pointwise_forward_task<decltype(storage), sort.value>(p, task);
  });
}

void pointwise_backward(const PointwiseBackward& p, int64_t begin, int64_t end) {
  for_pointwise(p, [&](auto storage, auto sort) {
    for (int64_t slot = begin; slot < end; ++slot) pointwise_backward_slot<decltype(storage), sort.value>(p, slot);
  });
}

void add_partials(const AddPartials& p, int64_t begin, int64_t end) {
  for_product(p.dtype, [&](auto storage) {
    for (int64_t filter = begin; filter < end; ++filter) add_partials_task<decltype(storage)>(p, filter);
  });
}

void pack_weight(const PackWeight& p, int64_t begin, int64_t end) {
  for_product(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    for (int64_t panel = begin; panel < end; ++panel) {
      p.transposed ? pack_transposed_task<T>(p, panel) : pack_weight_task<T>(p, panel);
    }
  });
}

void pointwise_mean(const PointwiseMean& p, int64_t begin, int64_t end) {
  for_product(p.dtype, [&](auto storage) {
    for (int64_t filter = begin; filter < end; ++filter) pointwise_mean_task<decltype(storage)>(p, filter);
  });
}
