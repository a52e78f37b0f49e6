// The convolution by one tap in contiguous layout, included after pointwise_impl.h, whose products it shares: rows are
// filters here and columns pixels.
//
// Bytes, forward: one read of the input, which a tile lays out in panels that stay in the second-level cache, one write
// of the output; rows of the weight pass once for each tile. A few rows of z at a time leave the product in float32 and
// are finished from the first-level cache. Backward: one read of grad_output and of the input, one write of grad_input;
// dz' stays in `scratch`, where both products meet it.

constexpr int64_t kTileColumns = PlanarTiles::kMost;
static_assert(PlanarForward::kRows == kRowsAtOnce);

// z[r * kTileColumns + column] = sum over k of a[r * row + k] * panels[k, column].
template <class T, int rows, class Unit>
DC_INLINE void planar_product(const Unit* a, int64_t row, int64_t steps, const Unit* panels, int64_t columns, float* z) {
  for (int64_t c = 0; c < columns; c += kColumnsAtOnce) {
    const Unit* b = panels + c / kPanel * kPanel * steps + c % kPanel;
    auto product = [&](auto vectors) DC_LAMBDA {
      f32v sums[rows][vectors.value] = {};
      accumulate_in_parts<T>(sums, steps, a, row, b, kPanel);
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors.value; ++v) store(z + r * kTileColumns + c + v * DC_LANES, sums[r][v], Whole{});
      }
    };
    const int64_t left = (columns - c + DC_LANES - 1) / DC_LANES;
    if (left >= kVectorsAtOnce) {
      product(std::integral_constant<int, kVectorsAtOnce>{});
    } else if (left == 3) {
      product(std::integral_constant<int, 3>{});
    } else if (left == 2) {
      product(std::integral_constant<int, 2>{});
    } else {
      product(std::integral_constant<int, 1>{});
    }
  }
}

// A channel of a tile side by side: as it lies in memory, or the maps of several samples gathered in `buffer`.
template <class T>
DC_INLINE const T* planar_row(const PlanarTile& tile, const void* maps, int64_t channels, int64_t pixels, int64_t channel,
                              T* buffer) {
  const T* from = static_cast<const T*>(maps) + (tile.sample * channels + channel) * pixels + tile.pixel;
  if (tile.samples == 1) return from;
  for (int64_t s = 0; s < tile.samples; ++s) {
    each_vector<f32v>(pixels, [&](int64_t i, auto tail) DC_LAMBDA {
      using Bits = std::conditional_t<sizeof(T) == 4, u32v, u16v>;
      write(buffer + s * pixels + i, read<Bits>(from + s * channels * pixels + i, tail), tail);
    });
  }
  return buffer;
}

DC_INLINE float sum_of(const float* from, int64_t count) {
  f32v part[4] = {};
  int64_t i = 0;
  for (; i + 4 * DC_LANES <= count; i += 4 * DC_LANES) {
    for (int k = 0; k < 4; ++k) part[k] += load(from + i + k * DC_LANES, Whole{});
  }
  each_vector<f32v>(count - i, [&](int64_t j, auto tail) DC_LAMBDA { part[0] += load(from + i + j, tail); });
  return horizontal_sum((part[0] + part[1]) + (part[2] + part[3]));
}

// One filter of one sample, from z to the output.
template <class T, Sort sort>
DC_INLINE void planar_finish(const PlanarForward& p, const PiecewiseLinear<f32v>& piecewise, const PlanarTile& tile,
                             int64_t sample, int64_t filter, const float* z) {
  const int64_t map = sample * p.filters + filter, at = map * p.tiles.pixels + tile.pixel;
  const float scale = p.gain ? static_cast<const float*>(p.gain)[filter] : 1.0f;
  float added = p.bias ? static_cast<const float*>(p.bias)[filter] : 0.0f;
  if (p.map_mean) {
    if (!p.knows_means) p.map_mean[map] = sum_of(z, tile.pixels) / float(tile.pixels) * scale;
    added -= p.map_mean[map] * (p.mean_scale ? static_cast<const float*>(p.mean_scale)[filter] : float(p.constant));
  }
  uint8_t* bits = offset<uint8_t>(p.bits, map * ((p.tiles.pixels + 7) / 8) + tile.pixel / 8);
  each_vector<f32v>(tile.pixels, [&](int64_t i, auto tail) DC_LAMBDA {
    f32v pre = load(z + i, tail) * scale + added;
    if (p.residual) pre += load(offset<T>(p.residual, at + i), tail);
    activate<T, sort>(pre, offset<T>(p.output, at + i), offset<T>(p.pre_activation, at + i),
                      offset<uint8_t>(bits, i / 8), piecewise, p.activation, tail);
  });
}

template <class T, Sort sort>
void planar_forward_task(const PlanarForward& p, int64_t task) {
  using Unit = typename Product<T>::Unit;
  constexpr int64_t elements = Product<T>::elements;
  const PiecewiseLinear<f32v> piecewise(p.activation, p.slope);
  const PlanarTile tile = p.tiles.at(task / p.blocks);
  const int64_t block = task % p.blocks, steps = p.channels / elements;
  float* z = static_cast<float*>(p.scratch);
  T* buffer = reinterpret_cast<T*>(z + kRowsAtOnce * kTileColumns);
  Unit* panels = reinterpret_cast<Unit*>(buffer + 2 * kTileColumns);
  for (int64_t k = 0; k < steps; ++k) {
    const T* rows[elements];
    for (int64_t e = 0; e < elements; ++e) {
      rows[e] = planar_row(tile, p.input, p.channels, p.tiles.pixels, k * elements + e, buffer + e * kTileColumns);
    }
    panel_step<kPanel>(rows[0], rows[elements - 1], tile.columns(), k, steps, panels);
  }
  each_rows(p.filters * block / p.blocks, p.filters * (block + 1) / p.blocks, [&](auto rows, int64_t o) DC_LAMBDA {
    for (int r = 0; r < rows.value; ++r) {
      for (int64_t s = 0; s < tile.samples; ++s) {
        const int64_t at = ((tile.sample + s) * p.filters + o + r) * p.tiles.pixels + tile.pixel;
        prefetch(offset<T>(p.output, at), tile.pixels);
        if (p.residual) prefetch(offset<T>(p.residual, at), tile.pixels);
      }
    }
    planar_product<T, rows.value>(static_cast<const Unit*>(p.weight) + o * steps, steps, steps, panels, tile.columns(), z);
    for (int r = 0; r < rows.value; ++r) {
      for (int64_t s = 0; s < tile.samples; ++s) {
        planar_finish<T, sort>(p, piecewise, tile, tile.sample + s, o + r, z + r * kTileColumns + s * tile.pixels);
      }
    }
  });
}

// dz' of one filter of one sample into `error`.
template <class T, Sort sort>
DC_INLINE void planar_error(const PlanarBackward& p, const PiecewiseLinear<f32v>& piecewise, const PlanarTile& tile,
                            int64_t sample, int64_t filter, T* error) {
  const int64_t map = sample * p.filters + filter, at = map * p.tiles.pixels + tile.pixel;
  const uint8_t* bits = offset<uint8_t>(p.bits, map * ((p.tiles.pixels + 7) / 8) + tile.pixel / 8);
  auto error_of = [&](int64_t i, auto tail) DC_LAMBDA {
    return error_at<T, sort>(offset<T>(p.grad_output, at + i), offset<T>(p.pre_activation, at + i),
                             offset<uint8_t>(bits, i / 8), piecewise, p.activation, tail);
  };
  if (!p.knows_sums) {
    f32v sum{};
    each_vector<f32v>(tile.pixels, [&](int64_t i, auto tail) DC_LAMBDA { sum += error_of(i, tail); });
    p.sums[map] = horizontal_sum(sum);
  }
  float removed = 0;
  if (p.centred) {
    const float mean_scale = p.mean_scale ? static_cast<const float*>(p.mean_scale)[filter] : float(p.constant);
    removed = p.sums[map] / float(p.tiles.pixels) * mean_scale;
  }
  const float scale = p.scale ? static_cast<const float*>(p.scale)[filter] : 1.0f;
  each_vector<f32v>(tile.pixels, [&](int64_t i, auto tail) DC_LAMBDA {
    const f32v e = error_of(i, tail);
    if (p.grad_residual) store(offset<T>(p.grad_residual, at + i), e, tail);
    store(error + i, (e - removed) * scale, tail);
  });
}

// The input of a tile with channels innermost, in panels of units (for bfloat16 two neighbouring pixels).
template <class T>
void panel_transposed(const PlanarBackward& p, const PlanarTile& tile, int64_t steps, T* buffer,
                      typename Product<T>::Unit* panels) {
  using Unit = typename Product<T>::Unit;
  constexpr int64_t elements = Product<T>::elements, rows = PlanarBackward::kTransposed, length = PlanarBackward::kRow;
  const int64_t columns = tile.columns();
  for (int64_t c = 0; c < p.channels; c += rows) {
    for (int64_t r = 0; r < rows; ++r) {
      T* row = buffer + r * length;
      if (c + r >= p.channels) {
        std::fill_n(row, length, T{});
        continue;
      }
      for (int64_t s = 0; s < tile.samples; ++s) {
        const T* from = offset<T>(p.input, ((tile.sample + s) * p.channels + c + r) * p.tiles.pixels + tile.pixel);
        std::copy_n(from, tile.pixels, row + s * tile.pixels);
      }
      std::fill(row + columns, row + length, T{});
    }
    Unit* to = panels + c / kPanel * kPanel * steps + c % kPanel;
    for (int64_t k = 0; k < steps; k += 16) transpose_block<Unit>(buffer + k * elements, length, to + k * kPanel, kPanel);
  }
}

template <class T, Sort sort>
void planar_backward_slot(const PlanarBackward& p, int64_t slot) {
  using Unit = typename Product<T>::Unit;
  constexpr int64_t elements = Product<T>::elements, length = PlanarBackward::kRow;
  const PiecewiseLinear<f32v> piecewise(p.activation, p.slope);
  float* z = reinterpret_cast<float*>(static_cast<char*>(p.scratch) + slot * p.scratch_bytes());
  T* error = reinterpret_cast<T*>(z + kRowsAtOnce * kTileColumns);
  T* buffer = error + length * p.filters;
  Unit* error_panels = reinterpret_cast<Unit*>(buffer + length * PlanarBackward::kTransposed);
  Unit* input_panels = error_panels + kTileColumns * p.filters / elements;
  float* partial = p.partials ? p.partials + slot * p.filters * p.channels : nullptr;

  const int64_t first = p.tiles.count * slot / p.slots, last = p.tiles.count * (slot + 1) / p.slots;
  if (partial && first == last) std::fill_n(partial, p.filters * p.channels, 0.0f);
  for (int64_t t = first; t < last; ++t) {
    const PlanarTile tile = p.tiles.at(t);
    const int64_t columns = tile.columns();
    for (int64_t o = 0; o < p.filters; ++o) {
      T* row = error + o * length;
      for (int64_t s = 0; s < tile.samples; ++s) {
        planar_error<T, sort>(p, piecewise, tile, tile.sample + s, o, row + s * tile.pixels);
      }
      std::fill_n(row + columns, 16, T{});
      if (p.weight && o % elements == elements - 1) {
        panel_step<kPanel>(row - (elements - 1) * length, row, columns, o / elements, p.filters / elements, error_panels);
      }
    }
    if (p.weight) {
      const int64_t steps = p.filters / elements;
      each_rows(0, p.channels, [&](auto rows, int64_t c) DC_LAMBDA {
        planar_product<T, rows.value>(static_cast<const Unit*>(p.weight) + c * steps, steps, steps, error_panels, columns, z);
        for (int r = 0; r < rows.value; ++r) {
          for (int64_t s = 0; s < tile.samples; ++s) {
            T* to = offset<T>(p.grad_input, ((tile.sample + s) * p.channels + c + r) * p.tiles.pixels + tile.pixel);
            const float* from = z + r * kTileColumns + s * tile.pixels;
            each_vector<f32v>(tile.pixels, [&](int64_t i, auto tail) DC_LAMBDA { store(to + i, load(from + i, tail), tail); });
          }
        }
      });
    }
    if (!partial) continue;
    const int64_t steps = (columns + elements - 1) / elements;
    const int64_t padded = (steps + 15) / 16 * 16;
    panel_transposed<T>(p, tile, padded, buffer, input_panels);
    add_product<T>(
        steps, [&](int64_t o) DC_LAMBDA { return reinterpret_cast<const Unit*>(error + o * length); }, length / elements, 1,
        input_panels, padded, p.filters, p.channels, partial, t == first);
  }
}

void planar_forward(const PlanarForward& p, int64_t begin, int64_t end) {
  for_pointwise(p, [&](auto storage, auto sort) {
    for (int64_t task = begin; task < end; ++task) planar_forward_task<decltype(storage), sort.value>(p, task);
  });
}

void planar_backward(const PlanarBackward& p, int64_t begin, int64_t end) {
  for_pointwise(p, [&](auto storage, auto sort) {
    for (int64_t slot = begin; slot < end; ++slot) planar_backward_slot<decltype(storage), sort.value>(p, slot);
  });
}
