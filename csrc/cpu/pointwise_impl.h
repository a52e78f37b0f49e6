// The convolution by one tap as a matrix product with everything behind it fused, included after kernels_impl.h and
// product_impl.h.
//
// Bytes: one read of the input, one write of the output (and of the activation's bits); the weights, packed, come from
// the second-level cache. A tile of kRowsAtOnce pixels by one panel of filters is accumulated in registers and leaves
// them finished.

constexpr int64_t kPanel = PointwiseForward::kPanel;
constexpr int64_t kLeftPanel = PointwiseBackward::kLeftPanel;
static_assert(PointwiseForward::kRowsAtOnce == kRowsAtOnce);

// One operand of a product over rows: units (elements, for bfloat16 pairs of two rows, zero for a missing row) in panels
// of `width` columns, inside a panel step by step. Read in order a panel streams through the first-level cache; at the
// power-of-two strides of whole rows the steps would fall into few of its sets.
template <int64_t width, class T>
DC_INLINE void panel_step(const T* row, const T* next, int64_t length, int64_t step, int64_t steps,
                          typename Product<T>::Unit* panels) {
  each_vector<f32v>(length, [&](int64_t i, auto tail) DC_LAMBDA {
    auto* at = panels + i / width * width * steps + step * width + i % width;
    if constexpr (Product<T>::elements == 1) {
      write(at, read<f32v>(row + i, tail), Whole{});
    } else {
      u32v low = __builtin_convertvector(read<u16v>(row + i, tail), u32v);
      u32v high{};
      if (next) high = __builtin_convertvector(read<u16v>(next + i, tail), u32v);
      write(at, low | high << 16, Whole{});
    }
  });
}
template <int64_t width, class T>
void panel_rows(const T* rows, int64_t count, int64_t length, int64_t first_step, int64_t steps,
                typename Product<T>::Unit* panels) {
  constexpr int64_t elements = Product<T>::elements;
  for (int64_t r = 0; r < count; r += elements) {
    panel_step<width>(rows + r * length, r + 1 < count ? rows + (r + 1) * length : nullptr, length,
                      first_step + r / elements, steps, panels);
  }
}

// Asks for the cache lines of the elements first..first + count, which are needed soon: their latency passes beside a
// product's arithmetic.
template <class T>
DC_INLINE void prefetch(const T* first, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(first);
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 1, 3);
}

// accumulate with a's elements side by side, for sums of any length. In float32, where rounding is all the error there is,
// long ones are made of parts, so that it grows with the length of a part plus the number of parts.
template <class T, int rows, int vectors, class Unit>
DC_INLINE void accumulate_in_parts(f32v (&sums)[rows][vectors], int64_t steps, const Unit* a, int64_t row, const Unit* b,
                                   int64_t stride) {
  const int64_t part = std::is_same_v<T, float> ? 256 : steps;
  f32v total[rows][vectors];
  for (int64_t k = 0; k < steps; k += part) {
    if (k) {
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) {
          total[r][v] = k == part ? sums[r][v] : total[r][v] + sums[r][v];
          sums[r][v] = f32v{};
        }
      }
    }
    accumulate<T>(sums, std::min(part, steps - k), a + k, row, 1, b + k * stride, stride);
  }
  if (steps <= part) return;
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) sums[r][v] += total[r][v];
  }
}

// Calls body(v, index, tail) for each of `vectors` that lies within `count`, from `first` on.
template <int vectors, class Body>
DC_INLINE void each_vector_of_panel(int64_t first, int64_t count, Body&& body) {
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int64_t i = first + v * DC_LANES;
    if (i + DC_LANES <= count) {
      body(v, i, Whole{});
    } else if (i < count) {
      body(v, i, Part{int(count - i)});
    }
  }
}

// `vectors` of filters from `first` on, of `rows` pixels from `pixel` on.
template <class T, Sort sort, int rows, int vectors>
DC_INLINE void pointwise_tile(const PointwiseForward& p, const PiecewiseLinear<f32v>& piecewise, int64_t sample,
                              int64_t pixel, int64_t first) {
  using Unit = typename Product<T>::Unit;
  const int64_t steps = p.channels / Product<T>::elements;
  const int64_t row = sample * p.pixels + pixel;
  const Unit* weight = static_cast<const Unit*>(p.weight) + first / kPanel * kPanel * steps + first % kPanel;
  const int64_t wide = std::min<int64_t>(vectors * DC_LANES, p.filters - first);
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * p.filters + first;
    prefetch(offset<T>(p.output, at), wide);
    if (p.residual) prefetch(offset<T>(p.residual, at), wide);
  }
  f32v sums[rows][vectors] = {};
  accumulate_in_parts<T>(sums, steps, static_cast<const Unit*>(p.input) + row * steps, steps, weight, kPanel);

  const float* gain = offset<float>(p.gain, 0);
  const float* shift = offset<float>(p.shift, sample * p.filters);
  const int64_t bits_row = (p.filters + 7) / 8;
  each_vector_of_panel<vectors>(first, p.filters, [&](int v, int64_t o, auto tail) DC_LAMBDA {
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
  const int64_t row_tile = task / p.panel_tiles() % p.row_tiles;
  const int64_t sample = task / p.panel_tiles() / p.row_tiles;
  const int64_t first_row = p.first_row(row_tile), last_row = p.first_row(row_tile + 1);
  const int64_t first = panel_tile * p.panels * kPanel;
  const int64_t last = std::min(first + p.panels * kPanel, p.filters);
  for (int64_t o = first; o < last; o += kColumnsAtOnce) {
    with_vectors(last - o, [&](auto vectors) DC_LAMBDA {
      each_rows(first_row, last_row, [&](auto rows, int64_t row) DC_LAMBDA {
        pointwise_tile<T, sort, rows.value, vectors.value>(p, piecewise, sample, row, o);
      });
    });
  }
}

// dz' of the rows first..first + count into `error` (rows of filters), for bfloat16 also paired as the left operand of the
// weight gradient; float32 is read from the rows themselves.
template <class T, Sort sort>
void pointwise_error(const PointwiseBackward& p, const PiecewiseLinear<f32v>& piecewise, int64_t first, int64_t count,
                     T* error, typename Product<T>::Unit* panels) {
  constexpr int64_t elements = Product<T>::elements;
  const int64_t steps = (count + elements - 1) / elements;
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
    if (elements > 1 && (r % elements == elements - 1 || r + 1 == count)) {
      const int64_t start = r / elements * elements;
      panel_rows<kLeftPanel>(error + start * p.filters, r + 1 - start, p.filters, r / elements, steps, panels);
    }
  }
}

// A tile's part of the weight gradient: partial[o, c] (+)= sum over k < steps of left(o)[k * step] * panels[k, c], where
// filters lie `row` apart. Summed apart and then added, so that the rounding error grows with the rows of a tile plus the
// number of tiles.
template <class T, class Unit, class Left>
DC_INLINE void add_product(int64_t steps, Left&& left, int64_t row, int64_t step, const Unit* panels, int64_t panel_steps,
                           int64_t filters, int64_t channels, float* partial, bool is_first) {
  auto product = [&](int64_t c, auto vectors, auto tail) DC_LAMBDA {
    const Unit* right = panels + c / kPanel * kPanel * panel_steps + c % kPanel;
    each_rows(0, filters, [&](auto rows, int64_t o) DC_LAMBDA {
      f32v sums[rows.value][vectors.value] = {};
      accumulate<T>(sums, steps, left(o), row, step, right, kPanel);
      float* at = partial + o * channels + c;
#pragma GCC unroll 8
      for (int r = 0; r < rows.value; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors.value; ++v) {
          float* to = at + r * channels + v * DC_LANES;
          auto add = [&](auto which) DC_LAMBDA { store(to, is_first ? sums[r][v] : load(to, which) + sums[r][v], which); };
          v + 1 < vectors.value ? add(Whole{}) : add(tail);
        }
      }
    });
  };
  int64_t c = 0;
  for (; c + kColumnsAtOnce <= channels; c += kColumnsAtOnce) {
    product(c, std::integral_constant<int, kVectorsAtOnce>{}, Whole{});
  }
  for (; c + DC_LANES <= channels; c += DC_LANES) product(c, std::integral_constant<int, 1>{}, Whole{});
  if (c < channels) product(c, std::integral_constant<int, 1>{}, Part{int(channels - c)});
}

// The rows first..first + count of grad_input from those of dz'.
template <class T>
void pointwise_grad_input(const PointwiseBackward& p, int64_t first, int64_t count, const T* error) {
  using Unit = typename Product<T>::Unit;
  const int64_t steps = p.filters / Product<T>::elements;
  for (int64_t c = 0; c < p.channels; c += kColumnsAtOnce) {
    const Unit* weight = static_cast<const Unit*>(p.weight) + c / kPanel * kPanel * steps + c % kPanel;
    const int64_t wide = std::min(kColumnsAtOnce, p.channels - c);
    with_vectors(wide, [&](auto vectors) DC_LAMBDA {
      each_rows(0, count, [&](auto rows, int64_t row) DC_LAMBDA {
        T* to = offset<T>(p.grad_input, (first + row) * p.channels);
        for (int r = 0; r < rows.value; ++r) prefetch(to + r * p.channels + c, wide);
        f32v sums[rows.value][vectors.value] = {};
        accumulate_in_parts<T>(sums, steps, reinterpret_cast<const Unit*>(error) + row * steps, steps, weight, kPanel);
        each_vector_of_panel<vectors.value>(c, p.channels, [&](int v, int64_t i, auto tail) DC_LAMBDA {
#pragma GCC unroll 8
          for (int r = 0; r < rows.value; ++r) store(to + r * p.channels + i, sums[r][v], tail);
        });
      });
    });
  }
}

template <class T, Sort sort>
void pointwise_backward_slot(const PointwiseBackward& p, int64_t slot) {
  using Unit = typename Product<T>::Unit;
  constexpr int64_t elements = Product<T>::elements;
  const PiecewiseLinear<f32v> piecewise(p.activation, p.slope);
  T* error = offset<T>(static_cast<char*>(p.scratch) + slot * p.scratch_bytes(), 0);
  Unit* left_panels = reinterpret_cast<Unit*>(error + PointwiseBackward::kRows * p.filters);
  Unit* right_panels = left_panels + (elements > 1 ? PointwiseBackward::kRows / elements * p.padded_filters() : 0);
  float* partial = p.partials ? p.partials + slot * p.filters * p.channels : nullptr;

  const int64_t begin = p.rows() * slot / p.slots, end = p.rows() * (slot + 1) / p.slots;
  // Tiles of equal height: a low last one would cost a pass over the partials all the same.
  const int64_t tiles = (end - begin + PointwiseBackward::kRows - 1) / PointwiseBackward::kRows;
  if (partial && tiles == 0) std::fill_n(partial, p.filters * p.channels, 0.0f);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = begin + (end - begin) * tile / tiles;
    const int64_t count = begin + (end - begin) * (tile + 1) / tiles - first;
    pointwise_error<T, sort>(p, piecewise, first, count, error, left_panels);
    if (p.weight) pointwise_grad_input<T>(p, first, count, error);
    if (!partial) continue;
    const int64_t steps = (count + elements - 1) / elements;
    panel_rows<kPanel>(offset<T>(p.input, first * p.channels), count, p.channels, 0, steps, right_panels);
    // float32 is read from the rows of dz' themselves.
    add_product<T>(
        steps,
        [&](int64_t o) DC_LAMBDA {
          return elements > 1 ? left_panels + o / kLeftPanel * kLeftPanel * steps + o % kLeftPanel
                              : reinterpret_cast<const Unit*>(error) + o;
        },
        1, elements > 1 ? kLeftPanel : p.filters, right_panels, steps, p.filters, p.channels, partial, tile == 0);
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
// 16 units of a row of the weight.
template <class Unit, class W>
DC_INLINE __m512i read_units(const W* from) {
#if defined(DC_AVX512_BF16)
  if constexpr (std::is_same_v<Unit, BFloat16Pair> && std::is_same_v<W, float>) {
    return reinterpret<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from)));
  }
#endif
  return _mm512_loadu_si512(from);
}

// 16 x 16 units of 32 bits: rows of `from` become columns of `to`. Neighbouring lanes change places in pairs, then
// pairs, fours and eights of lanes.
template <class Unit, class W>
DC_INLINE void transpose_block(const W* from, int64_t from_stride, void* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = read_units<Unit>(from + i * from_stride);
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
#else
template <class Unit, class W>
DC_INLINE void transpose_block(const W* from, int64_t from_stride, Unit* to, int64_t to_stride) {
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) to[k * to_stride + i] = from[i * from_stride + k];
  }
}
#endif

// A weight as a product takes it: of the product's dtype, or float32, which is rounded.
template <class T>
DC_INLINE uint32_t bits_of(T element) {
  if constexpr (std::is_same_v<T, float>) {
    bfloat16 rounded;
    store(&rounded, broadcast<f32v>(element), Part{1});
    return rounded.bits;
  } else {
    return element.bits;
  }
}
template <class Unit, class W>
DC_INLINE Unit unit_of(const W* from, int64_t next) {
  if constexpr (std::is_same_v<Unit, W>) {
    return *from;
  } else {
    return {bits_of(from[0]) | bits_of(from[next]) << 16};
  }
}

template <class T, class W>
void pack_weight_task(const PackWeight& p, int64_t panel) {
  using Unit = typename Product<T>::Unit;
  constexpr int64_t elements = Product<T>::elements;
  const int64_t steps = p.channels / elements;
  const int64_t first = panel * kPanel, filters = std::min(kPanel, p.filters - first);
  const W* weight = static_cast<const W*>(p.weight) + first * p.channels;
  Unit* packed = static_cast<Unit*>(p.packed) + first * steps;
  for (int64_t k = 0; k < steps; k += DC_LANES) {
    const int64_t count = std::min<int64_t>(DC_LANES, steps - k);
    for (int64_t o = 0; o < kPanel; o += DC_LANES) {
#if defined(DC_AVX512)
      if (sizeof(Unit) == 4 && count == DC_LANES && o + DC_LANES <= filters) {
        transpose_block<Unit>(weight + o * p.channels + k * elements, p.channels, packed + k * kPanel + o, kPanel);
        continue;
      }
#endif
      for (int64_t i = o; i < o + DC_LANES; ++i) {
        for (int64_t j = k; j < k + count; ++j) {
          packed[j * kPanel + i] = i < filters ? unit_of<Unit>(weight + i * p.channels + j * elements, 1) : Unit{};
        }
      }
    }
  }
}

template <class T, class W>
void pack_transposed_task(const PackWeight& p, int64_t panel) {
  using Unit = typename Product<T>::Unit;
  constexpr int64_t elements = Product<T>::elements;
  const int64_t steps = p.filters / elements;
  const int64_t first = panel * kPanel, count = std::min(kPanel, p.channels - first);
  Unit* packed = static_cast<Unit*>(p.packed) + panel * kPanel * steps;
  for (int64_t k = 0; k < steps; ++k) {
    const W* rows = static_cast<const W*>(p.weight) + k * elements * p.channels + first;
    Unit* to = packed + k * kPanel;
    std::fill(to + count, to + kPanel, Unit{});
#if defined(DC_AVX512_BF16)
    if constexpr (elements == 2 && std::is_same_v<W, float>) {
      each_vector<f32v>(count, [&](int64_t i, auto tail) DC_LAMBDA {
        const auto round = [&](const float* from) DC_LAMBDA {
          return __builtin_convertvector(
              reinterpret<u16v>(_mm512_cvtneps_pbh(reinterpret<__m512>(load(from, tail)))), u32v);
        };
        write(to + i, round(rows + i) | round(rows + p.channels + i) << 16, tail);
      });
      continue;
    }
#endif
    for (int64_t i = 0; i < count; ++i) to[i] = unit_of<Unit>(rows + i, p.channels);
  }
}

template <class T, class W>
void pointwise_mean_task(const PointwiseMean& p, int64_t filter) {
  constexpr int64_t kSamples = 8;
  const W* weight = static_cast<const W*>(p.weight) + filter * p.channels;
  const float* sums = static_cast<const float*>(p.sums);
  const float scale = (p.gain ? static_cast<const float*>(p.gain)[filter] : 1.0f) / float(p.pixels);
  for (int64_t start = 0; start < p.samples; start += kSamples) {
    const int64_t samples = std::min(kSamples, p.samples - start);
    f32v dots[kSamples] = {};
    each_vector<f32v>(p.channels, [&](int64_t i, auto tail) DC_LAMBDA {
      f32v w = load(weight + i, tail);
      if constexpr (!std::is_same_v<T, W>) {
        T rounded[DC_LANES];
        store(rounded, w, Whole{});
        w = load(rounded, Whole{});
      }
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

// Calls f(storage type of the product, storage type of the weight).
template <class P, class F>
DC_INLINE void for_weight(const P& p, F&& f) {
  for_product(p.dtype, [&](auto storage) {
    if (p.weight_dtype == Dtype::f32) return f(storage, float{});
    f(storage, storage);
  });
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
  for_weight(p, [&](auto storage, auto weight) {
    using T = decltype(storage);
    using W = decltype(weight);
    for (int64_t panel = begin; panel < end; ++panel) {
      p.transposed ? pack_transposed_task<T, W>(p, panel) : pack_weight_task<T, W>(p, panel);
    }
  });
}

void pointwise_mean(const PointwiseMean& p, int64_t begin, int64_t end) {
  for_weight(p, [&](auto storage, auto weight) {
    for (int64_t filter = begin; filter < end; ++filter) {
      pointwise_mean_task<decltype(storage), decltype(weight)>(p, filter);
    }
  });
}
