// Winograd's convolution, included after pointwise_impl.h, whose product it uses: transforms of the input, of the weight and
// of the products, all in float32 whatever the storage type.
//
// Operations of a tile of 4 x 2 outputs: 24 products of (channels) x (filters) where the taps take 72, and by channel
// about 80 additions for the transform of the input and by filter about 64 for that of the products.

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

// The inputs of the tiles first..first + count as (points, count, channels).
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
          Tile::input(get, [&](int i, int j, const f32v& v) DC_LAMBDA {
            store(row + (i * Tile::columns + j) * to.point() + c, v, Whole{});
          });
        });
  }
}

// The errors of `filters` filters in the tiles first..first + count as (points, count, filters).
template <class Tile, class T>
void winograd_errors(const WinogradWeightGrad& p, int64_t first_filter, int64_t filters, int64_t first, int64_t count,
                     const T* zeros, float* transformed) {
  const WinogradRows to = p.errors();
  for (int64_t t = 0; t < count; ++t) {
    const TilePlace place(p, first + t);
    prefetch_tile<Tile, T>(p, offset<T>(p.error, first_filter), p.out_height, p.out_width, p.filters, filters, first + t);
    float* row = transformed + t * to.row;
    const T* map = offset<T>(p.error, place.sample * p.out_height * p.out_width * p.filters + first_filter);
    transform_pixels<Tile::down, Tile::across>(
        map, p.out_height, p.out_width, filters, p.filters, place.y, place.x, zeros, [&](int64_t o, auto&& get) DC_LAMBDA {
          Tile::error(get, [&](int i, int j, const f32v& v) DC_LAMBDA {
            store(row + (i * Tile::columns + j) * to.point() + o, v, Whole{});
          });
        });
  }
}

// products(point, tile, 0..kPanel) = sum over channels of inputs(point, tile, channel) * weight(point, channel, 0..kPanel).
static void winograd_products(int64_t points, int64_t tiles, int64_t channels, const float* inputs,
                              const WinogradRows& input, const float* weight, float* products,
                              const WinogradRows& product) {
  for (int64_t point = 0; point < points; ++point) {
    for (int64_t o = 0; o < kPanel; o += kFiltersAtOnce) {
      const float* right = weight + point * channels * kPanel + o;
      each_rows(0, tiles, [&](auto rows, int64_t t) DC_LAMBDA {
        f32v sums[rows.value][kVectorsAtOnce] = {};
        accumulate_in_parts<float>(sums, channels, inputs + point * input.point() + t * input.row, input.row, right,
                                   kPanel);
        float* to = products + point * product.point() + t * product.row + o;
        for (int r = 0; r < rows.value; ++r) {
          for (int v = 0; v < kVectorsAtOnce; ++v) store(to + r * product.row + v * DC_LANES, sums[r][v], Whole{});
        }
      });
    }
  }
}

// The outputs first_filter..first_filter + kPanel of the tiles first..first + count.
template <class Tile, class T>
void winograd_outputs(const WinogradForward& p, int64_t first, int64_t count, int64_t first_filter, const float* products) {
  const WinogradRows from = p.products();
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

template <class Tile, class T>
void winograd_forward_slot(const WinogradForward& p, int64_t slot) {
  float* inputs = p.scratch + slot * p.scratch_elements();
  float* products = inputs + Tile::points * p.inputs().point();
  const std::vector<T> zeros(p.channels);
  each_block(p.tiles(), slot, p.slots, p.block, [&](int64_t first, int64_t count) {
    winograd_inputs<Tile, T>(p, p.input, p.inputs(), first, count, zeros.data(), inputs);
    for (int64_t o = 0; o < p.filters; o += kPanel) {
      winograd_products(Tile::points, count, p.channels, inputs, p.inputs(), p.weight + o * p.channels * Tile::points,
                        products, p.products());
      winograd_outputs<Tile, T>(p, first, count, o, products);
    }
  });
}

// lanes x lanes elements, `rows` and `columns` of which exist: rows become columns, as floats.
static void transpose_lanes(const float* from, int64_t stride, int rows, int columns, float* to, int64_t to_stride) {
  f32v a[DC_LANES];
#pragma GCC unroll 16
  for (int i = 0; i < DC_LANES; ++i) a[i] = i < rows ? load(from + i * stride, Part{columns}) : f32v{};
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
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(c[i], c[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(c[i], c[i + 8], 0xdd));
  }
#else
  for (int i = 0; i < DC_LANES; ++i) {
    for (int j = 0; j < DC_LANES; ++j) to[j * to_stride + i] = a[i][j];
  }
#endif
}

constexpr int64_t kTaps = 9;

// The taps of `filters` filters, at most lanes, for `channels` channels as (channels, taps, lanes).
static void winograd_taps(const WinogradWeights& p, int64_t filter, int filters, int64_t channel, int64_t channels, float* taps) {
  const float* weight = p.weight + filter * p.filter_stride + channel * p.channel_stride;
  auto transpose = [&](const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
    for (int64_t i = 0; i < columns; i += DC_LANES) {
      transpose_lanes(from + i, stride, int(rows), int(std::min<int64_t>(columns - i, DC_LANES)), to + i * to_stride, to_stride);
    }
  };
  if (p.filter_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        store(taps + (c * kTaps + tap) * DC_LANES, load(weight + c * p.channel_stride + tap * p.tap_stride, Part{filters}), Whole{});
      }
    }
  } else if (p.channel_stride == 1) {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      transpose(weight + tap * p.tap_stride, p.filter_stride, filters, channels, taps + tap * DC_LANES, kTaps * DC_LANES);
    }
  } else if (p.channel_stride == kTaps) {
    transpose(weight, p.filter_stride, filters, channels * kTaps, taps, DC_LANES);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      transpose(weight + c * p.channel_stride, p.filter_stride, filters, kTaps, taps + c * kTaps * DC_LANES, DC_LANES);
    }
  }
}

template <class Tile>
void winograd_weights_task(const WinogradWeights& p, int64_t task) {
  constexpr int64_t kChannels = WinogradWeights::kChannels;
  // A transposition of the last taps writes whole vectors for columns that are not there.
  alignas(64) float taps[((kChannels + 1) * kTaps + DC_LANES * kTaps) * DC_LANES];
  const int64_t panel = task / p.channel_blocks(), channel = task % p.channel_blocks() * kChannels;
  const int64_t channels = std::min(kChannels, p.channels - channel);
  const int64_t point = p.channels * kPanel;
  float* transformed = p.transformed + panel * Tile::points * point + channel * kPanel;
  for (int64_t o = 0; o < kPanel; o += DC_LANES) {
    const int64_t filters = std::clamp<int64_t>(p.filters - panel * kPanel - o, 0, DC_LANES);
    if (filters) winograd_taps(p, panel * kPanel + o, int(filters), channel, channels, taps);
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

// sums(point, o, c) = or += sum over tiles of errors(point, tile, o) * inputs(point, tile, c), o and c from first to last.
static void winograd_weight_products(const WinogradWeightGrad& p, int64_t tiles, const float* errors, int64_t first_filter,
                                     int64_t last_filter, const float* inputs, int64_t first_channel,
                                     int64_t last_channel, bool add, float* sums, int64_t sums_point, int64_t sums_row) {
  const WinogradRows input = p.inputs(), error = p.errors();
  for (int64_t point = 0; point < p.tile.points(); ++point) {
    auto product = [&](int64_t c, auto vectors) DC_LAMBDA {
      each_rows(first_filter, last_filter, [&](auto rows, int64_t o) DC_LAMBDA {
        f32v products[rows.value][vectors.value] = {};
        accumulate<float>(products, tiles, errors + point * error.point() + o, 1, error.row,
                          inputs + point * input.point() + c, input.row);
        float* to = sums + point * sums_point + (o - first_filter) * sums_row + c - first_channel;
#pragma GCC unroll 8
        for (int r = 0; r < rows.value; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors.value; ++v) {
            float* at = to + r * sums_row + v * DC_LANES;
            store(at, add ? load(at, Whole{}) + products[r][v] : products[r][v], Whole{});
          }
        }
      });
    };
    int64_t c = first_channel;
    for (; c + kFiltersAtOnce <= last_channel; c += kFiltersAtOnce) product(c, std::integral_constant<int, kVectorsAtOnce>{});
    for (; c < last_channel; c += DC_LANES) product(c, std::integral_constant<int, 1>{});
  }
}

// The gradient of a filter's channels first..last from the sums of all parts.
template <class Tile>
void winograd_gradient(const WinogradWeightGrad& p, int64_t filter, int64_t first, int64_t last, const float* sums,
                       int64_t sums_point) {
  float* grad = p.grad + filter * p.filter_stride + first * p.channel_stride;
  each_vector<f32v>(last - first, [&](int64_t c, auto tail) DC_LAMBDA {
    Tile::gradient(
        [&](int i, int j) DC_LAMBDA {
          const float* at = sums + (i * Tile::columns + j) * sums_point + c;
          f32v sum = load(at, Whole{});
          for (int64_t part = 1; part < p.parts; ++part) sum += load(at + part * p.sums_elements(), Whole{});
          return sum;
        },
        [&](int i, int j, const f32v& v) DC_LAMBDA {
          float* to = grad + c * p.channel_stride + (i * 3 + j) * p.tap_stride;
          if (p.channel_stride == 1) {
            store(to, v, tail);
          } else {
            float elements[DC_LANES];
            store(elements, v, Whole{});
            const int64_t count = std::min<int64_t>(last - first - c, DC_LANES);
            for (int64_t k = 0; k < count; ++k) to[k * p.channel_stride] = elements[k];
          }
        });
  });
}

template <class Tile, class T>
void winograd_weight_grad_slot(const WinogradWeightGrad& p, int64_t slot) {
  // Rounding errors grow with the tiles of one sum plus the number of sums that are added.
  constexpr int64_t kSum = 256;
  constexpr int64_t kFilters = 48, kChannels = 64;
  float* inputs = p.scratch + slot * p.scratch_elements();
  float* errors = inputs + Tile::points * p.inputs().point();
  const int64_t part = slot / p.groups, first = slot % p.groups * p.group();
  const int64_t filters = std::min(p.group(), p.filters - first);
  if (filters <= 0) return;
  const std::vector<T> zeros(std::max(p.channels, p.filters));
  bool add = false;
  each_block(p.tiles(), part, p.parts, p.block, [&](int64_t tile, int64_t count) {
    winograd_inputs<Tile, T>(p, p.input, p.inputs(), tile, count, zeros.data(), inputs);
    winograd_errors<Tile, T>(p, first, filters, tile, count, zeros.data(), errors);
    auto each_sum = [&](auto&& body) {
      for (int64_t k = 0; k < count; k += kSum) {
        body(std::min(kSum, count - k), errors + k * p.errors().row, inputs + k * p.inputs().row, add || k);
      }
    };
    if (p.sums) {
      float* sums = p.sums + part * p.sums_elements() + first * p.sums_row();
      each_sum([&](int64_t tiles, const float* e, const float* v, bool added) {
        winograd_weight_products(p, tiles, e, 0, filters, v, 0, p.channels, added, sums, p.sums_point(), p.sums_row());
      });
      add = true;
      return;
    }
    constexpr int64_t row = kChannels, point = (kFilters + 1) * row;
    std::vector<float> sums(Tile::points * point);
    for (int64_t o = 0; o < filters; o += kFilters) {
      const int64_t last_filter = std::min(o + kFilters, filters);
      for (int64_t c = 0; c < p.channels; c += kChannels) {
        const int64_t last_channel = std::min(c + kChannels, p.channels);
        each_sum([&](int64_t tiles, const float* e, const float* v, bool added) {
          winograd_weight_products(p, tiles, e, o, last_filter, v, c, last_channel, added, sums.data(), point, row);
        });
        for (int64_t i = o; i < last_filter; ++i) {
          winograd_gradient<Tile>(p, first + i, c, last_channel, sums.data() + (i - o) * row, point);
        }
      }
    }
  });
}

// Calls f(tile) as a type.
template <class F>
DC_INLINE void for_tile(const WinogradTile& tile, F&& f) {
  if (tile.down == 4 && tile.across == 2) f(Tile<4, 2>{});
  if (tile.down == 2 && tile.across == 2) f(Tile<2, 2>{});
}

void winograd_weights(const WinogradWeights& p, int64_t begin, int64_t end) {
  for_tile(p.tile, [&](auto tile) {
    for (int64_t task = begin; task < end; ++task) winograd_weights_task<decltype(tile)>(p, task);
  });
}

void winograd_forward(const WinogradForward& p, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) winograd_forward_slot<Tile<4, 2>, float>(p, slot);
}

void winograd_weight_grad(const WinogradWeightGrad& p, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) winograd_weight_grad_slot<Tile<2, 2>, float>(p, slot);
}

void winograd_weight_grad_finish(const WinogradWeightGrad& p, int64_t begin, int64_t end) {
  for (int64_t filter = begin; filter < end; ++filter) {
    winograd_gradient<Tile<2, 2>>(p, filter, 0, p.channels, p.sums + filter * p.sums_row(), p.sums_point());
  }
}
