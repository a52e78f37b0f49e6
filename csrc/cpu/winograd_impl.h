// Winograd's convolution, included by each winograd_<instruction set>.cpp inside a namespace and a target of its own after
// product_impl.h: transforms of the input, of the weight and of the products, all in float32 whatever the storage type.
//
// Operations of a tile of 4 x 2 outputs: 24 products of (channels) x (filters) where the taps take 72, and by channel
// about 80 additions for the transform of the input and by filter about 64 for that of the products.

constexpr int64_t kPanel = WinogradWeights::kPanel;

template <class T>
DC_INLINE T* offset(void* base, int64_t elements) {
  return static_cast<T*>(base) + elements;
}
template <class T>
DC_INLINE const T* offset(const void* base, int64_t elements) {
  return static_cast<const T*>(base) + elements;
}

// The one-dimensional algorithm F(outputs, 3) by its interpolation points and infinity: out = output(weight(taps) *
// input(values)), element by element. `error` and `gradient` are the transposes of `output` and `weight`.
template <int outputs>
struct Line;

// At the points 0, 1, -1.
template <>
struct Line<2> {
  static constexpr int points = 4;
  static DC_INLINE void input(const f32v (&d)[4], f32v (&r)[4]) {
    r[0] = d[0] - d[2];
    r[1] = d[1] + d[2];
    r[2] = d[2] - d[1];
    r[3] = d[1] - d[3];
  }
  static DC_INLINE void weight(const f32v (&w)[3], f32v (&r)[4]) {
    const f32v even = 0.5f * (w[0] + w[2]), odd = 0.5f * w[1];
    r[0] = w[0];
    r[1] = even + odd;
    r[2] = even - odd;
    r[3] = w[2];
  }
  static DC_INLINE void output(const f32v (&m)[4], f32v (&r)[2]) {
    r[0] = m[0] + (m[1] + m[2]);
    r[1] = (m[1] - m[2]) - m[3];
  }
  static DC_INLINE void error(const f32v (&e)[2], f32v (&r)[4]) {
    r[0] = e[0];
    r[1] = e[0] + e[1];
    r[2] = e[0] - e[1];
    r[3] = -e[1];
  }
  static DC_INLINE void gradient(const f32v (&g)[4], f32v (&r)[3]) {
    const f32v even = 0.5f * (g[1] + g[2]), odd = 0.5f * (g[1] - g[2]);
    r[0] = g[0] + even;
    r[1] = odd;
    r[2] = even + g[3];
  }
};

// At the points 0, 1, -1, 1/2, -2, which round less than 0, 1, -1, 2, -2 by a factor of two to three.
template <>
struct Line<4> {
  static constexpr int points = 6;
  static DC_INLINE void input(const f32v (&d)[6], f32v (&r)[6]) {
    const f32v even = d[4] - d[2], odd = d[3] - d[1];
    const f32v p = even + 1.5f * d[3], q = odd + 1.5f * d[2];
    r[0] = (d[0] - d[2]) + even + 1.5f * odd;
    r[1] = p + q;
    r[2] = p - q;
    r[3] = even + 2.0f * odd;
    r[4] = even - 0.5f * odd;
    r[5] = (d[5] - d[3]) - odd + 1.5f * even;
  }
  static DC_INLINE void weight(const f32v (&w)[3], f32v (&r)[6]) {
    const f32v even = w[0] + w[2];
    r[0] = w[0];
    r[1] = (even + w[1]) * (1 / 3.0f);
    r[2] = (w[1] - even) * (1 / 3.0f);
    r[3] = (w[0] + 0.5f * w[1] + 0.25f * w[2]) * (-16 / 15.0f);
    r[4] = (w[0] - 2.0f * w[1] + 4.0f * w[2]) * (1 / 15.0f);
    r[5] = w[2];
  }
  static DC_INLINE void output(const f32v (&m)[6], f32v (&r)[4]) {
    const f32v sum = m[1] + m[2], difference = m[1] - m[2];
    r[0] = (m[0] + sum) + (m[3] + m[4]);
    r[1] = difference + 0.5f * m[3] - 2.0f * m[4];
    r[2] = sum + 0.25f * m[3] + 4.0f * m[4];
    r[3] = (difference + m[5]) + 0.125f * m[3] - 8.0f * m[4];
  }
  static DC_INLINE void error(const f32v (&e)[4], f32v (&r)[6]) {
    const f32v even = e[0] + e[2], odd = e[1] + e[3];
    r[0] = e[0];
    r[1] = even + odd;
    r[2] = even - odd;
    r[3] = (e[0] + 0.25f * e[2]) + (0.5f * e[1] + 0.125f * e[3]);
    r[4] = (e[0] + 4.0f * e[2]) - (2.0f * e[1] + 8.0f * e[3]);
    r[5] = e[3];
  }
  static DC_INLINE void gradient(const f32v (&g)[6], f32v (&r)[3]) {
    const f32v sum = g[1] + g[2], difference = g[1] - g[2];
    const f32v half = g[3] * (-16 / 15.0f), two = g[4] * (1 / 15.0f);
    r[0] = g[0] + difference * (1 / 3.0f) + (half + two);
    r[1] = sum * (1 / 3.0f) + (0.5f * half - 2.0f * two);
    r[2] = g[5] + difference * (1 / 3.0f) + (0.25f * half + 4.0f * two);
  }
};

// The two-dimensional algorithm: `Down` along columns, `across` along rows. get(i, j) gives the values, put(i, j, v)
// takes the results.
template <int in_down, int in_across, int out_down, int out_across, class Down, class Across, class Get, class Put>
DC_INLINE void nested(Down&& down, Across&& across, Get&& get, Put&& put) {
  f32v half[out_down][in_across];
#pragma GCC unroll 6
  for (int j = 0; j < in_across; ++j) {
    f32v values[in_down], results[out_down];
#pragma GCC unroll 6
    for (int i = 0; i < in_down; ++i) values[i] = get(i, j);
    down(values, results);
#pragma GCC unroll 6
    for (int i = 0; i < out_down; ++i) half[i][j] = results[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < out_down; ++i) {
    f32v results[out_across];
    across(half[i], results);
#pragma GCC unroll 6
    for (int j = 0; j < out_across; ++j) put(i, j, results[j]);
  }
}

template <int down_, int across_>
struct Tile {
  static constexpr int down = down_, across = across_;
  using Down = Line<down>;
  using Across = Line<across>;
  static constexpr int rows = Down::points, columns = Across::points, points = rows * columns;

  template <class Get, class Put>
  static DC_INLINE void input(Get&& get, Put&& put) {
    nested<rows, columns, rows, columns>([](const auto& d, auto& r) DC_LAMBDA { Down::input(d, r); },
                                         [](const auto& d, auto& r) DC_LAMBDA { Across::input(d, r); }, get, put);
  }
  template <class Get, class Put>
  static DC_INLINE void weight(Get&& get, Put&& put) {
    nested<3, 3, rows, columns>([](const auto& w, auto& r) DC_LAMBDA { Down::weight(w, r); },
                                [](const auto& w, auto& r) DC_LAMBDA { Across::weight(w, r); }, get, put);
  }
  template <class Get, class Put>
  static DC_INLINE void output(Get&& get, Put&& put) {
    nested<rows, columns, down, across>([](const auto& m, auto& r) DC_LAMBDA { Down::output(m, r); },
                                        [](const auto& m, auto& r) DC_LAMBDA { Across::output(m, r); }, get, put);
  }
  template <class Get, class Put>
  static DC_INLINE void error(Get&& get, Put&& put) {
    nested<down, across, rows, columns>([](const auto& e, auto& r) DC_LAMBDA { Down::error(e, r); },
                                        [](const auto& e, auto& r) DC_LAMBDA { Across::error(e, r); }, get, put);
  }
  template <class Get, class Put>
  static DC_INLINE void gradient(Get&& get, Put&& put) {
    nested<rows, columns, 3, 3>([](const auto& g, auto& r) DC_LAMBDA { Down::gradient(g, r); },
                                [](const auto& g, auto& r) DC_LAMBDA { Across::gradient(g, r); }, get, put);
  }
};

// Where a tile lies: its sample and the first row and column of its outputs.
struct TilePlace {
  int64_t sample, y, x;

  TilePlace(const WinogradMaps& p, int64_t index) {
    x = index % p.tiles_across() * p.tile.across;
    y = index / p.tiles_across() % p.tiles_down() * p.tile.down;
    sample = index / p.tiles_across() / p.tiles_down();
  }
};

// Transforms the first `length` channels of `rows` x `columns` pixels from (y, x) on; pixels outside the map are zero.
template <int rows, int columns, class T, class Transform>
DC_INLINE void transform_pixels(const T* map, int64_t height, int64_t width, int64_t length, int64_t pixel, int64_t y,
                                int64_t x, const T* zeros, Transform&& transform) {
  const T* pixels[rows][columns];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      const bool inside = y + i >= 0 && y + i < height && x + j >= 0 && x + j < width;
      pixels[i][j] = inside ? map + ((y + i) * width + x + j) * pixel : zeros;
    }
  }
  each_vector<f32v>(length, [&](int64_t c, auto tail) DC_LAMBDA {
    transform(c, [&](int i, int j) DC_LAMBDA { return load(pixels[i][j] + c, tail); });
  });
}

// Asks for the pixels of a tile's outputs, or those at the same place of the input, some tiles before they are needed: the
// processor itself foresees only what is read in order.
template <class Tile, class T>
DC_INLINE void prefetch_tile(const WinogradMaps& p, const void* maps, int64_t height, int64_t width, int64_t pixel,
                             int64_t length, int64_t index) {
  constexpr int64_t kAhead = 2;
  if (index + kAhead >= p.tiles()) return;
  const TilePlace place(p, index + kAhead);
  const int64_t last_y = std::min(place.y + Tile::down, height), last_x = std::min(place.x + Tile::across, width);
  for (int64_t y = place.y; y < last_y; ++y) {
    const T* row = offset<T>(maps, ((place.sample * height + y) * width + place.x) * pixel);
    for (int64_t x = place.x; x < last_x; ++x, row += pixel) {
      for (int64_t i = 0; i < length; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 3);
    }
  }
}

// The inputs of the tiles first..first + count as (points, panels, count, channels).
template <class Tile, class T>
void winograd_inputs(const WinogradMaps& p, const void* input, const WinogradRows& to, int64_t first, int64_t count,
                     const T* zeros, float* transformed) {
  for (int64_t t = 0; t < count; ++t) {
    const TilePlace place(p, first + t);
    prefetch_tile<Tile, T>(p, input, p.height, p.width, p.channels, p.channels, first + t);
    float* row = transformed + t * to.row;
    const T* map = offset<T>(input, place.sample * p.height * p.width * p.channels);
    transform_pixels<Tile::rows, Tile::columns>(
        map, p.height, p.width, p.channels, p.channels, place.y - p.padding[0], place.x - p.padding[1], zeros,
        [&](int64_t c, auto&& get) DC_LAMBDA {
          float* at = row + to.offset(c);
          Tile::input(get, [&](int i, int j, const f32v& v) DC_LAMBDA {
            store(at + (i * Tile::columns + j) * to.point(), v, Whole{});
          });
        });
  }
}

// The errors of `filters` filters in the tiles first..first + count as (points, panels, count, filters).
template <class Tile, class T>
void winograd_errors(const WinogradWeightGrad& p, int64_t first_filter, int64_t filters, int64_t first, int64_t count,
                     const T* zeros, float* transformed) {
  const WinogradRows to = p.error_rows();
  for (int64_t t = 0; t < count; ++t) {
    const TilePlace place(p, first + t);
    prefetch_tile<Tile, T>(p, offset<T>(p.error, first_filter), p.out_height, p.out_width, p.filters, filters, first + t);
    float* row = transformed + t * to.row;
    const T* map = offset<T>(p.error, place.sample * p.out_height * p.out_width * p.filters + first_filter);
    transform_pixels<Tile::down, Tile::across>(
        map, p.out_height, p.out_width, filters, p.filters, place.y, place.x, zeros, [&](int64_t o, auto&& get) DC_LAMBDA {
          float* at = row + to.offset(o);
          Tile::error(get, [&](int i, int j, const f32v& v) DC_LAMBDA {
            store(at + (i * Tile::columns + j) * to.point(), v, Whole{});
          });
        });
  }
}

// Rows of `to`, `row` apart, = or += the sums.
template <int rows, int vectors>
DC_INLINE void add_to(float* to, int64_t row, const f32v (&sums)[rows][vectors], bool add) {
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* at = to + r * row + v * DC_LANES;
      store(at, add ? load(at, Whole{}) + sums[r][v] : sums[r][v], Whole{});
    }
  }
}

// products(point, tile, 0..kPanel) = or += sum over at most kChannels channels of inputs(point, tile, channel) *
// weight(point, channel, 0..kPanel), the weight's points `weight_point` apart.
static void winograd_products(const WinogradForward& p, int64_t tiles, int64_t channels, const float* inputs,
                              const float* weight, int64_t weight_point, bool add, float* products) {
  const WinogradRows input = p.input_rows(), product = p.product_rows();
  for (int64_t point = 0; point < p.tile.points(); ++point) {
    for (int64_t o = 0; o < kPanel; o += kColumnsAtOnce) {
      const float* right = weight + point * weight_point + o;
      each_rows(0, tiles, [&](auto rows, int64_t t) DC_LAMBDA {
        f32v sums[rows.value][kVectorsAtOnce] = {};
        accumulate<float>(sums, channels, inputs + point * input.point() + t * input.row, input.row, 1, right, kPanel);
        float* to = products + point * product.point() + t * product.row + o;
        add_to(to, product.row, sums, add);
      });
    }
  }
}

// The outputs first_filter..first_filter + kPanel of the tiles first..first + count.
template <class Tile, class T>
void winograd_outputs(const WinogradForward& p, int64_t first, int64_t count, int64_t first_filter, const float* products) {
  const WinogradRows from = p.product_rows();
  const int64_t filters = std::min(kPanel, p.filters - first_filter);
  for (int64_t t = 0; t < count; ++t) {
    const TilePlace place(p, first + t);
    const int64_t rows = p.out_height - place.y, columns = p.out_width - place.x;
    T* corner = offset<T>(p.output, ((place.sample * p.out_height + place.y) * p.out_width + place.x) * p.filters + first_filter);
    const float* row = products + t * from.row;
    each_vector<f32v>(filters, [&](int64_t o, auto tail) DC_LAMBDA {
      Tile::output([&](int i, int j) DC_LAMBDA { return load(row + (i * Tile::columns + j) * from.point() + o, Whole{}); },
                   [&](int i, int j, const f32v& v) DC_LAMBDA {
                     if (i < rows && j < columns) store(corner + (i * p.out_width + j) * p.filters + o, v, tail);
                   });
    });
  }
}

// Calls body(first, count) for blocks of a share of `all`, whose sizes are alike.
template <class Body>
DC_INLINE void each_block(int64_t all, int64_t share, int64_t shares, int64_t most, Body&& body) {
  const int64_t begin = all * share / shares, end = all * (share + 1) / shares;
  const int64_t blocks = (end - begin + most - 1) / most;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = begin + (end - begin) * b / blocks;
    body(first, begin + (end - begin) * (b + 1) / blocks - first);
  }
}

// Rows of lanes x lanes elements become columns.
DC_INLINE void transpose(f32v (&a)[DC_LANES]) {
#if defined(DC_AVX512)
  __m512i b[16], c[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) b[i] = reinterpret<__m512i>(a[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    c[i] = _mm512_unpacklo_epi32(b[i], b[i + 1]);
    c[i + 1] = _mm512_unpackhi_epi32(b[i], b[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(c[i], c[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(c[i], c[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(c[i + 1], c[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(c[i + 1], c[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    c[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    c[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    c[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    c[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] = reinterpret<f32v>(_mm512_shuffle_i32x4(c[i], c[i + 8], 0x88));
    a[i + 8] = reinterpret<f32v>(_mm512_shuffle_i32x4(c[i], c[i + 8], 0xdd));
  }
#else
  for (int i = 0; i < DC_LANES; ++i) {
    for (int j = 0; j < i; ++j) {
      const float other = a[i][j];
      a[i][j] = a[j][i];
      a[j][i] = other;
    }
  }
#endif
}

// `rows` x `columns` elements, at most lanes of each, to columns x rows; vectors of `wide` elements are written, zeros behind
// the rows.
template <class From, class To>
void transpose_block(const From* from, int64_t stride, int rows, int columns, To* to, int64_t to_stride, int wide) {
  f32v a[DC_LANES];
#pragma GCC unroll 16
  for (int i = 0; i < DC_LANES; ++i) a[i] = i < rows ? load(from + i * stride, Part{columns}) : f32v{};
  transpose(a);
#pragma GCC unroll 16
  for (int i = 0; i < DC_LANES; ++i) {
    if (i < columns) store(to + i * to_stride, a[i], Part{wide});
  }
}

constexpr int64_t kTaps = 9;

// The taps of `filters` filters, at most lanes, for `channels` channels as (channels, taps, lanes).
template <class W>
void winograd_taps(const WinogradWeights& p, int64_t filter, int filters, int64_t channel, int64_t channels, float* taps) {
  const W* weight = static_cast<const W*>(p.weight) + filter * p.filter_stride + channel * p.channel_stride;
  auto transposed = [&](const W* from, int64_t stride, int64_t columns, float* to, int64_t to_stride) {
    for (int64_t i = 0; i < columns; i += DC_LANES) {
      const int count = int(std::min<int64_t>(columns - i, DC_LANES));
      transpose_block(from + i, stride, filters, count, to + i * to_stride, to_stride, DC_LANES);
    }
  };
  if (p.filter_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const f32v of_filters = load(weight + c * p.channel_stride + tap * p.tap_stride, Part{filters});
        store(taps + (c * kTaps + tap) * DC_LANES, of_filters, Whole{});
      }
    }
  } else if (p.channel_stride == 1) {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      transposed(weight + tap * p.tap_stride, p.filter_stride, channels, taps + tap * DC_LANES, kTaps * DC_LANES);
    }
  } else if (p.channel_stride == kTaps) {
    transposed(weight, p.filter_stride, channels * kTaps, taps, DC_LANES);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      transposed(weight + c * p.channel_stride, p.filter_stride, kTaps, taps + c * kTaps * DC_LANES, DC_LANES);
    }
  }
}

template <class Tile, class W>
void winograd_weights_task(const WinogradWeights& p, int64_t task) {
  constexpr int64_t kChannels = WinogradWeights::kChannels;
  alignas(64) float taps[kChannels * kTaps * DC_LANES];
  const int64_t panel = task / p.channel_blocks(), channel = task % p.channel_blocks() * kChannels;
  const int64_t channels = std::min(kChannels, p.channels - channel);
  const int64_t point = p.channels * kPanel;
  float* transformed = p.transformed + panel * Tile::points * point + channel * kPanel;
  for (int64_t o = 0; o < kPanel; o += DC_LANES) {
    const int64_t filters = std::clamp<int64_t>(p.filters - panel * kPanel - o, 0, DC_LANES);
    if (filters) winograd_taps<W>(p, panel * kPanel + o, int(filters), channel, channels, taps);
    for (int64_t c = 0; c < channels; ++c) {
      float* to = transformed + c * kPanel + o;
      if (!filters) {
        for (int i = 0; i < Tile::points; ++i) store(to + i * point, f32v{}, Whole{});
        continue;
      }
      Tile::weight(
          [&](int i, int j) DC_LAMBDA {
            const int64_t tap = p.flipped ? kTaps - 1 - (i * 3 + j) : i * 3 + j;
            return load(taps + (c * kTaps + tap) * DC_LANES, Whole{});
          },
          [&](int i, int j, const f32v& v) DC_LAMBDA { store(to + (i * Tile::columns + j) * point, v, Whole{}); });
    }
  }
}

template <class Tile, class T>
void winograd_forward_tiles(const WinogradForward& p, int64_t slot, float* inputs) {
  float* products = inputs + p.input_elements();
  const std::vector<T> zeros(p.channels);
  const int64_t point = p.channels * kPanel;
  each_block(p.tiles(), slot, p.slots, p.block, [&](int64_t first, int64_t count) {
    winograd_inputs<Tile, T>(p, p.input, p.input_rows(), first, count, zeros.data(), inputs);
    for (int64_t o = 0; o < p.filters; o += kPanel) {
      const float* weight = p.weight.transformed + o * p.channels * Tile::points;
      for (int64_t c = 0; c < p.channels; c += WinogradForward::kChannels) {
        const int64_t channels = std::min(WinogradForward::kChannels, p.channels - c);
        winograd_products(p, count, channels, inputs + c, weight + c * kPanel, point, c > 0, products);
      }
      winograd_outputs<Tile, T>(p, first, count, o, products);
    }
  });
}

template <class Tile, class T>
void winograd_forward_panels(const WinogradForward& p, int64_t slot, float* weight) {
  float* products = weight + Tile::points * WinogradForward::kChannels * kPanel;
  const int64_t panels = p.weight.panels();
  for (int64_t panel = panels * slot / p.slots; panel < panels * (slot + 1) / p.slots; ++panel) {
    for (int64_t c = 0; c < p.channels; c += WinogradForward::kChannels) {
      WinogradWeights part = p.weight;
      part.weight = static_cast<const T*>(p.weight.weight) + panel * kPanel * part.filter_stride + c * part.channel_stride;
      part.filters = std::min(kPanel, p.filters - panel * kPanel);
      part.channels = std::min(WinogradForward::kChannels, p.channels - c);
      part.transformed = weight;
      for (int64_t task = 0; task < part.tasks(); ++task) winograd_weights_task<Tile, T>(part, task);
      winograd_products(p, p.tiles(), part.channels, p.inputs + c, weight, part.channels * kPanel, c > 0, products);
    }
    winograd_outputs<Tile, T>(p, 0, p.tiles(), panel * kPanel, products);
  }
}

// sums(point, o, c) = or += sum over tiles of errors(point, tile, o) * inputs(point, tile, c), o and c from first to last, the
// filters in one panel.
static void winograd_weight_products(const WinogradWeightGrad& p, int64_t tiles, const float* errors, int64_t first_filter,
                                     int64_t last_filter, const float* inputs, int64_t first_channel,
                                     int64_t last_channel, bool add, float* sums, int64_t sums_point, int64_t sums_row) {
  // Rounding errors grow with the tiles of one part plus the number of parts that are added.
  constexpr int64_t kPart = 48;
  const int64_t parts = (tiles + kPart - 1) / kPart, part = (tiles + parts - 1) / parts;
  const WinogradRows input = p.input_rows(), error = p.error_rows();
  for (int64_t point = 0; point < p.tile.points(); ++point) {
    auto product = [&](int64_t c, auto vectors) DC_LAMBDA {
      each_rows(first_filter, last_filter, [&](auto rows, int64_t o) DC_LAMBDA {
        const float* left = errors + point * error.point() + error.offset(o);
        const float* right = inputs + point * input.point() + input.offset(c);
        float* to = sums + point * sums_point + (o - first_filter) * sums_row + c - first_channel;
        for (int64_t k = 0; k < tiles; k += part) {
          f32v products[rows.value][vectors.value] = {};
          accumulate<float>(products, std::min(part, tiles - k), left + k * error.row, 1, error.row, right + k * input.row,
                     input.row);
          add_to(to, sums_row, products, add || k > 0);
        }
      });
    };
    int64_t c = first_channel;
    for (; c + kColumnsAtOnce <= last_channel; c += kColumnsAtOnce) product(c, std::integral_constant<int, kVectorsAtOnce>{});
    for (; c < last_channel; c += DC_LANES) product(c, std::integral_constant<int, 1>{});
  }
}

// The gradient of a filter's channels first..last from the sums of all parts.
template <class Tile, class W>
void winograd_gradient(const WinogradWeightGrad& p, int64_t filter, int64_t first, int64_t last, const float* sums,
                       int64_t sums_point) {
  W* grad = static_cast<W*>(p.grad) + filter * p.filter_stride + first * p.channel_stride;
  each_vector<f32v>(last - first, [&](int64_t c, auto tail) DC_LAMBDA {
    Tile::gradient(
        [&](int i, int j) DC_LAMBDA {
          const float* at = sums + (i * Tile::columns + j) * sums_point + c;
          f32v sum = load(at, Whole{});
          for (int64_t part = 1; part < p.parts; ++part) sum += load(at + part * p.sums_elements(), Whole{});
          return sum;
        },
        [&](int i, int j, const f32v& v) DC_LAMBDA {
          W* to = grad + c * p.channel_stride + (i * 3 + j) * p.tap_stride;
          if (p.channel_stride == 1) {
            store(to, v, tail);
          } else {
            W elements[DC_LANES];
            store(elements, v, Whole{});
            const int64_t count = std::min<int64_t>(last - first - c, DC_LANES);
            for (int64_t k = 0; k < count; ++k) to[k * p.channel_stride] = elements[k];
          }
        });
  });
}

template <class Tile, class T, class W>
void winograd_weight_grad_slot(const WinogradWeightGrad& p, int64_t slot) {
  float* inputs = p.scratch + slot * p.scratch_elements();
  float* errors = inputs + Tile::points * p.input_rows().point();
  const int64_t part = slot / p.groups, first = slot % p.groups * p.group();
  const int64_t filters = std::min(p.group(), p.filters - first);
  if (filters <= 0) return;
  const std::vector<T> zeros(std::max(p.channels, p.filters));
  bool add = false;
  each_block(p.tiles(), part, p.parts, p.block, [&](int64_t tile, int64_t count) {
    winograd_inputs<Tile, T>(p, p.input, p.input_rows(), tile, count, zeros.data(), inputs);
    winograd_errors<Tile, T>(p, first, filters, tile, count, zeros.data(), errors);
    if (p.sums) {
      for (int64_t o = 0; o < filters; o += kPanel) {
        float* sums = p.sums + part * p.sums_elements() + (first + o) * p.sums_row();
        const int64_t last = std::min(o + kPanel, filters);
        winograd_weight_products(p, count, errors, o, last, inputs, 0, p.channels, add, sums, p.sums_point(), p.sums_row());
      }
      add = true;
      return;
    }
    constexpr int64_t row = kPanel, point = (kPanel + 1) * row;
    std::vector<float> sums(Tile::points * point);
    for (int64_t o = 0; o < filters; o += kPanel) {
      const int64_t last_filter = std::min(o + kPanel, filters);
      for (int64_t c = 0; c < p.channels; c += kPanel) {
        const int64_t last_channel = std::min(c + kPanel, p.channels);
        winograd_weight_products(p, count, errors, o, last_filter, inputs, c, last_channel, false, sums.data(), point, row);
        for (int64_t i = o; i < last_filter; ++i) {
          winograd_gradient<Tile, W>(p, first + i, c, last_channel, sums.data() + (i - o) * row, point);
        }
      }
    }
  });
}

template <class T>
void transpose_task(const Transposition& p, int64_t task) {
  const int64_t sample = task / p.row_blocks() * p.rows * p.columns, first = task % p.row_blocks() * Transposition::kRows;
  const int64_t last = std::min(first + Transposition::kRows, p.rows);
  for (int64_t c = 0; c < p.columns; c += DC_LANES) {
    const int columns = int(std::min<int64_t>(p.columns - c, DC_LANES));
    for (int64_t r = first; r < last; r += DC_LANES) {
      const int rows = int(std::min<int64_t>(last - r, DC_LANES));
      transpose_block(offset<T>(p.from, sample + r * p.columns + c), p.columns, rows, columns,
                      offset<T>(p.to, sample + c * p.rows + r), p.rows, rows);
    }
  }
}

// Calls f(storage type, tile), both as types, for the tiles that winograd.cpp chooses from.
template <class F>
DC_INLINE void for_storage(Dtype dtype, const WinogradTile& tile, F&& f) {
  if (dtype == Dtype::bf16) return f(bfloat16{}, Tile<4, 4>{});
  if (dtype != Dtype::f32) return;
  if (tile.down == 2) return f(float{}, Tile<2, 2>{});
  f(float{}, Tile<4, 2>{});
}

void winograd_transpose(const Transposition& p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    p.dtype == Dtype::f32 ? transpose_task<float>(p, task) : transpose_task<bfloat16>(p, task);
  }
}

void winograd_weights(const WinogradWeights& p, int64_t begin, int64_t end) {
  for_storage(p.dtype, p.tile, [&](auto storage, auto tile) {
    for (int64_t task = begin; task < end; ++task) winograd_weights_task<decltype(tile), decltype(storage)>(p, task);
  });
}

void winograd_inputs(const WinogradForward& p, int64_t begin, int64_t end) {
  for_storage(p.dtype, p.tile, [&](auto storage, auto tile) {
    using T = decltype(storage);
    const std::vector<T> zeros(p.channels);
    winograd_inputs<decltype(tile), T>(p, p.input, p.input_rows(), begin, end - begin, zeros.data(),
                                       p.inputs + begin * p.input_rows().row);
  });
}

void winograd_forward(const WinogradForward& p, int64_t begin, int64_t end) {
  for_storage(p.dtype, p.tile, [&](auto storage, auto tile) {
    for (int64_t slot = begin; slot < end; ++slot) {
      float* scratch = p.scratch + slot * p.scratch_elements();
      p.by_panels ? winograd_forward_panels<decltype(tile), decltype(storage)>(p, slot, scratch)
                  : winograd_forward_tiles<decltype(tile), decltype(storage)>(p, slot, scratch);
    }
  });
}

// Calls f(storage type of the maps, storage type of the weight, tile), all as types.
template <class F>
DC_INLINE void for_weight_grad(const WinogradWeightGrad& p, F&& f) {
  if (p.dtype == Dtype::f32) return f(float{}, float{}, Tile<2, 2>{});
  if (p.weight_dtype == Dtype::f32) return f(bfloat16{}, float{}, Tile<4, 4>{});
  f(bfloat16{}, bfloat16{}, Tile<4, 4>{});
}

void winograd_weight_grad(const WinogradWeightGrad& p, int64_t begin, int64_t end) {
  for_weight_grad(p, [&](auto storage, auto weight, auto tile) {
    for (int64_t slot = begin; slot < end; ++slot) {
      winograd_weight_grad_slot<decltype(tile), decltype(storage), decltype(weight)>(p, slot);
    }
  });
}

void winograd_weight_grad_finish(const WinogradWeightGrad& p, int64_t begin, int64_t end) {
  for_weight_grad(p, [&](auto, auto weight, auto tile) {
    for (int64_t filter = begin; filter < end; ++filter) {
      winograd_gradient<decltype(tile), decltype(weight)>(p, filter, 0, p.channels, p.sums + filter * p.sums_row(),
                                                          p.sums_point());
    }
  });
}
