// The depthwise convolution in two dimensions with everything around it, included after kernels_impl.h.
//
// A task is one sample and one vector of channels. Its maps are brought, as float32 and row by row, into rows that are
// padded with zeros and stay in the first-level cache; there every tap is a plain vector, whatever the stride, the layout
// and the dtype. What is between the sum of a map and what is made with it stays in the second-level cache, as float32.
//
// Bytes, forward: one read of the input, one write of the output and of the activation's bits. Backward: one read of
// grad_output, of the bits and of the input, one write of the input gradient; weight gradients are a partial a sample.

constexpr int64_t kLanes = DC_LANES;

// `taps` neighbours of a row of vectors, `weight_step` floats between their weights.
struct TapRow {
  const float* first;
  const float* weight;
};

struct TapRows {
  TapRow rows[Depthwise::kMostTaps];
  int count;          // rows
  int taps;           // of each
  int64_t weight_step;
};

// Outputs that are accumulated at once: widths of maps are often multiples of seven, and four would hide the latency.
constexpr int kOutputsAtOnce = 7;

// Of `outputs` neighbours, whose taps start `step` vectors apart; `taps` and `step` known to the compiler or zero.
template <int outputs, int known_taps, int known_step>
DC_INLINE void depthwise_tile(const TapRows& rows, int64_t at, int64_t any_step, float* to, int64_t to_step,
                              f32v& total) {
  const int taps = known_taps ? known_taps : rows.taps;
  const int64_t step = (known_step ? known_step : any_step) * kLanes;
  f32v sums[outputs] = {};
  for (int r = 0; r < rows.count; ++r) {
    const float* first = rows.rows[r].first + at;
    const float* weights = rows.rows[r].weight;
    auto add = [&](int tap) DC_LAMBDA {
      const f32v weight = load(weights + tap * rows.weight_step, Whole{});
#pragma GCC unroll 8
      for (int j = 0; j < outputs; ++j) sums[j] += weight * load(first + tap * kLanes + j * step, Whole{});
    };
    if constexpr (known_taps > 0) {
#pragma GCC unroll 8
      for (int tap = 0; tap < known_taps; ++tap) add(tap);
    } else {
      for (int tap = 0; tap < taps; ++tap) add(tap);
    }
  }
  f32v sum = sums[0];
#pragma GCC unroll 8
  for (int j = 0; j < outputs; ++j) {
    store(to + j * to_step, sums[j], Whole{});
    if (j) sum += sums[j];
  }
  total += sum;
}

template <int known_taps, int known_step>
DC_INLINE f32v depthwise_row(const TapRows& rows, int64_t step, int64_t count, float* to, int64_t to_step) {
  f32v total{};
  int64_t j = 0;
  auto tile = [&](auto outputs) DC_LAMBDA {
    depthwise_tile<outputs.value, known_taps, known_step>(rows, j * step * kLanes, step, to + j * to_step, to_step,
                                                          total);
  };
  for (; j + kOutputsAtOnce <= count; j += kOutputsAtOnce) tile(std::integral_constant<int, kOutputsAtOnce>{});
  for (; j + 4 <= count; j += 4) tile(std::integral_constant<int, 4>{});
  for (; j < count; ++j) tile(std::integral_constant<int, 1>{});
  return total;
}

// `count` outputs `to_step` floats apart from taps `step` vectors apart; returns their sum.
__attribute__((noinline)) f32v convolve_row(const TapRows& rows, int64_t step, int64_t count, float* to,
                                            int64_t to_step) {
  if (rows.taps == 3 && step == 1) return depthwise_row<3, 1>(rows, 1, count, to, to_step);
  if (rows.taps == 3 && step == 2) return depthwise_row<3, 2>(rows, 2, count, to, to_step);
  if (rows.taps == 5 && step == 1) return depthwise_row<5, 1>(rows, 1, count, to, to_step);
  return depthwise_row<0, 0>(rows, step, count, to, to_step);
}

// sums[r * taps + tap] += sum over j of errors[r][j] * input[j * step + tap], vectors all.
template <int rows, int taps>
DC_INLINE void correlate(const float* const* errors, const float* input, int64_t step, int64_t count,
                         float* const* sums) {
  constexpr int turns = rows * taps < 4 ? 2 : 1;  // few sums would wait for each other
  f32v parts[turns][rows][taps] = {};
  auto add = [&](int64_t j, int turn) DC_LAMBDA {
    f32v seen[taps];
#pragma GCC unroll 8
    for (int tap = 0; tap < taps; ++tap) seen[tap] = load(input + (j * step + tap) * kLanes, Whole{});
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const f32v error = load(errors[r] + j * kLanes, Whole{});
#pragma GCC unroll 8
      for (int tap = 0; tap < taps; ++tap) parts[turn][r][tap] += error * seen[tap];
    }
  };
  int64_t j = 0;
  for (; j + turns <= count; j += turns) {
#pragma GCC unroll 2
    for (int turn = 0; turn < turns; ++turn) add(j + turn, turn);
  }
  for (; j < count; ++j) add(j, 0);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int tap = 0; tap < taps; ++tap) {
      float* to = sums[r] + tap * kLanes;
      f32v sum = load(to, Whole{}) + parts[0][r][tap];
      if constexpr (turns > 1) sum += parts[1][r][tap];
      store(to, sum, Whole{});
    }
  }
}

__attribute__((noinline)) void correlate_rows(const float* const* errors, int rows, int taps, const float* input,
                                              int64_t step, int64_t count, float* const* sums) {
  if (rows == 3 && taps == 3) return correlate<3, 3>(errors, input, step, count, sums);
  for (int r = 0; r < rows; ++r) {
    switch (taps) {
      case 1: correlate<1, 1>(errors + r, input, step, count, sums + r); break;
      case 2: correlate<1, 2>(errors + r, input, step, count, sums + r); break;
      case 3: correlate<1, 3>(errors + r, input, step, count, sums + r); break;
      case 4: correlate<1, 4>(errors + r, input, step, count, sums + r); break;
      case 5: correlate<1, 5>(errors + r, input, step, count, sums + r); break;
      case 6: correlate<1, 6>(errors + r, input, step, count, sums + r); break;
      case 7: correlate<1, 7>(errors + r, input, step, count, sums + r); break;
    }
  }
}

// A vector of channels at `values`, of which `channels` are there, or the constant where there are none.
DC_INLINE f32v vector_or(const void* values, int64_t first, int64_t channels, float absent) {
  if (!values) return broadcast<f32v>(absent);
  const float* at = static_cast<const float*>(values) + first;
  return channels >= kLanes ? load(at, Whole{}) : load(at, Part{int(channels)});
}
DC_INLINE void store_vector(void* values, int64_t first, int64_t channels, const f32v& v) {
  float* at = static_cast<float*>(values) + first;
  channels >= kLanes ? store(at, v, Whole{}) : store(at, v, Part{int(channels)});
}

// Calls body(Whole or Part): how much of a vector of channels is there.
template <class Body>
DC_INLINE void with_tail(int64_t channels, Body&& body) {
  channels >= kLanes ? body(Whole{}) : body(Part{int(channels)});
}

// Pixels `stride` elements apart to vectors, and back. No processor foresees such strides, so the cache lines of the next
// block of channels, which is the next task, are asked for on the way; where half a line was read, it is at hand already.
template <class T>
void read_pixels(const T* from, int64_t stride, int64_t count, int64_t channels, float* to) {
  with_tail(channels, [&](auto tail) DC_LAMBDA {
    for (int64_t i = 0; i < count; ++i) {
      __builtin_prefetch(from + i * stride + kLanes, 0, 2);
      store(to + i * kLanes, load(from + i * stride, tail), Whole{});
    }
  });
}
template <class T>
void write_pixels(const float* from, int64_t stride, int64_t count, int64_t channels, T* to) {
  with_tail(channels, [&](auto tail) DC_LAMBDA {
    for (int64_t i = 0; i < count; ++i) store(to + i * stride, load(from + i * kLanes, Whole{}), tail);
  });
}

// Asks for pixels that are written to soon.
template <class T>
DC_INLINE void expect_pixels(const T* first, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(first + i * stride, 1, 2);
}

// Exchanges rows and columns of a square: in steps of the distance d, the halves of pairs of vectors d apart.
template <int distance, int... lane>
DC_INLINE void transpose_step(f32v (&square)[kLanes], std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & distance) continue;
    const f32v a = square[i], b = square[i + distance];
    square[i] = __builtin_shufflevector(a, b, (lane & distance ? kLanes + lane - distance : lane)...);
    square[i + distance] = __builtin_shufflevector(a, b, (lane & distance ? kLanes + lane : lane + distance)...);
  }
}
DC_INLINE void transpose(f32v (&square)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  transpose_step<1>(square, lanes);
  transpose_step<2>(square, lanes);
  transpose_step<4>(square, lanes);
  if constexpr (kLanes == 16) transpose_step<8>(square, lanes);
}

// Calls map(c, i, tail) for the vectors of pixels of each channel, and writes what they give as vectors of channels.
template <class Map>
DC_INLINE void flatten(int64_t pixels, int64_t channels, float* flat, Map&& map) {
  each_vector<f32v>(pixels, [&](int64_t i, auto tail) DC_LAMBDA {
    f32v square[kLanes];
    for (int64_t c = 0; c < kLanes; ++c) square[c] = c < channels ? map(c, i, tail) : f32v{};
    transpose(square);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) store(flat + (i + j) * kLanes, square[j], Whole{});
  });
}
// The other way round: map(c, i, vector of pixels, tail) takes them.
template <class Map>
DC_INLINE void unflatten(const float* flat, int64_t pixels, int64_t channels, Map&& map) {
  each_vector<f32v>(pixels, [&](int64_t i, auto tail) DC_LAMBDA {
    f32v square[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) square[j] = load(flat + (i + j) * kLanes, Whole{});
    transpose(square);
    for (int64_t c = 0; c < channels; ++c) map(c, i, square[c], tail);
  });
}

// Where a task's maps are.
struct DepthwiseBlock {
  int64_t sample, first, channels;
  int64_t weight;  // floats of packed weights before this block's

  DepthwiseBlock(const Depthwise& p, int64_t task) {
    const int64_t blocks = (p.channels + kLanes - 1) / kLanes;
    sample = task / blocks;
    first = task % blocks * kLanes;
    channels = std::min(kLanes, p.channels - first);
    weight = first * p.taps();
  }
  // First element.
  int64_t of_input(const Depthwise& p) const { return start(p, p.pixels(), p.input_innermost); }
  int64_t of_output(const Depthwise& p) const { return start(p, p.output_pixels(), p.output_innermost); }
  // Of the sample and channel in a (samples, channels) array.
  int64_t place(const Depthwise& p) const { return sample * p.channels + first; }

 private:
  int64_t start(const Depthwise& p, int64_t pixels, bool channels_innermost) const {
    return channels_innermost ? sample * pixels * p.channels + first : (sample * p.channels + first) * pixels;
  }
};

// Calls f(task) for those of a slot.
template <class F>
DC_INLINE void each_depthwise_task(const Depthwise& p, int64_t slot, F&& f) {
  const int64_t tasks = p.samples * ((p.channels + kLanes - 1) / kLanes);
  for (int64_t task = tasks * slot / p.slots; task < tasks * (slot + 1) / p.slots; ++task) f(task);
}

// Brings row h of the input into its place, behind the padding.
template <class T>
DC_INLINE void read_row(const Depthwise& p, const DepthwiseBlock& block, const void* input, const float* flat, int64_t h,
                        float* to) {
  const int64_t count = std::min(p.size[1], p.seen_columns() - p.padding[1]);
  to += p.padding[1] * kLanes;
  if (p.input_innermost) {
    read_pixels(static_cast<const T*>(input) + block.of_input(p) + h * p.size[1] * p.channels, p.channels, count,
                block.channels, to);
  } else {
    read_pixels(flat + h * p.size[1] * kLanes, kLanes, count, kLanes, to);
  }
}

template <class T>
void flatten_input(const Depthwise& p, const DepthwiseBlock& block, const void* input, float* flat) {
  const T* maps = static_cast<const T*>(input) + block.of_input(p);
  flatten(p.pixels(), block.channels, flat,
          [&](int64_t c, int64_t i, auto tail) DC_LAMBDA { return load(maps + c * p.pixels() + i, tail); });
}

// z of a task, as vectors, and its sum.
template <class T>
f32v depthwise_maps(const DepthwiseForward& p, const DepthwiseBlock& block, float* ring, float* z, float* flat) {
  if (!p.input_innermost) flatten_input<T>(p, block, p.input, flat);
  const int64_t row = p.seen_columns() * kLanes;
  f32v total{};
  int64_t next = 0;  // row of the input
  for (int64_t o = 0; o < p.output[0]; ++o) {
    const int64_t top = o * p.stride[0] - p.padding[0];
    const int64_t last = std::min(top + p.kernel[0], p.size[0]);
    for (next = std::max(next, top); next < last; ++next) {
      read_row<T>(p, block, p.input, flat, next, ring + next % p.kernel[0] * row);
    }
    if (p.output_innermost) {
      expect_pixels(static_cast<const T*>(p.output_memory) + block.of_output(p) +
                        o * p.output[1] * p.channels,
                    p.channels, p.output[1]);
    }
    TapRows taps;
    taps.count = 0, taps.taps = int(p.kernel[1]), taps.weight_step = kLanes;
    for (int64_t h = std::max<int64_t>(top, 0); h < last; ++h) {
      taps.rows[taps.count++] = {ring + h % p.kernel[0] * row,
                                 p.weight + block.weight + (h - top) * p.kernel[1] * kLanes};
    }
    total += convolve_row(taps, p.stride[1], p.output[1], z + o * p.output[1] * kLanes, kLanes);
  }
  return total;
}

// What is done to z behind the convolution.
template <class T, Sort sort, bool channels_innermost>
void finish_depthwise(const DepthwiseForward& p, const DepthwiseBlock& block, const float* z, const f32v& scale,
                      const f32v& shift) {
  const PiecewiseLinear<f32v> piecewise(p.activation, p.slope);
  const int64_t pixels = p.output_pixels(), start = block.of_output(p);
  T* output = offset<T>(p.output_memory, start);
  T* pre_activation = offset<T>(p.pre_activation, start);
  const T* residual = offset<T>(p.residual, start);
  auto finish = [&](f32v pre, int64_t at, int64_t bit, auto tail) DC_LAMBDA {
    if (residual) pre += load(residual + at, tail);
    activate<T, sort>(pre, output + at, offset<T>(pre_activation, at), offset<uint8_t>(p.bits, bit), piecewise,
                      p.activation, tail);
  };
  if constexpr (channels_innermost) {
    const int64_t bits_row = (p.channels + 7) / 8, bits = block.sample * pixels * bits_row + block.first / 8;
    with_tail(block.channels, [&](auto tail) DC_LAMBDA {
      for (int64_t i = 0; i < pixels; ++i) {
        finish(load(z + i * kLanes, Whole{}) * scale + shift, i * p.channels, bits + i * bits_row, tail);
      }
    });
  } else {
    const int64_t bits_row = (pixels + 7) / 8, bits = block.place(p) * bits_row;
    unflatten(z, pixels, block.channels, [&](int64_t c, int64_t i, const f32v& map, auto tail) DC_LAMBDA {
      finish(map * scale[c] + shift[c], c * pixels + i, bits + c * bits_row + i / 8, tail);
    });
  }
}

template <class T, Sort sort>
void depthwise_forward_slot(const DepthwiseForward& p, int64_t slot) {
  float* ring = p.scratch + slot * p.scratch_floats();
  float* z = ring + p.kernel[0] * p.seen_columns() * kLanes;
  float* flat = z + p.flat_output() * kLanes;
  std::fill_n(ring, p.kernel[0] * p.seen_columns() * kLanes, 0.0f);
  each_depthwise_task(p, slot, [&](int64_t task) {
    const DepthwiseBlock block(p, task);
    const f32v mean = depthwise_maps<T>(p, block, ring, z, flat) / float(p.output_pixels());
    const f32v gain = vector_or(p.gain, block.first, block.channels, 1);
    f32v shift = vector_or(p.bias, block.first, block.channels, 0);
    if (p.centred) {
      const f32v mean_scale = vector_or(p.mean_scale, block.first, block.channels, float(p.constant));
      shift -= gain * mean_scale * mean;
      store_vector(p.map_mean, block.place(p), block.channels, gain * mean);
    }
    if (p.output_innermost) {
      finish_depthwise<T, sort, true>(p, block, z, gain, shift);
    } else {
      finish_depthwise<T, sort, false>(p, block, z, gain, shift);
    }
  });
}

// e as vectors of channels.
template <class T, Sort sort, bool channels_innermost>
void read_error(const DepthwiseBackward& p, const DepthwiseBlock& block, float* flat) {
  const PiecewiseLinear<f32v> piecewise(p.activation, p.slope);
  const int64_t pixels = p.output_pixels(), start = block.of_output(p);
  const T* grad = offset<T>(p.grad_output, start);
  const T* pre_activation = offset<T>(p.pre_activation, start);
  T* residual = offset<T>(p.grad_residual, start);
  auto error = [&](int64_t at, int64_t bit, auto tail) DC_LAMBDA {
    if (channels_innermost) __builtin_prefetch(grad + at + kLanes, 0, 2);
    const f32v e = error_at<T, sort>(grad + at, offset<T>(pre_activation, at), offset<uint8_t>(p.bits, bit), piecewise,
                                     p.activation, tail);
    if (residual) store(residual + at, e, tail);
    return e;
  };
  if constexpr (channels_innermost) {
    const int64_t bits_row = (p.channels + 7) / 8, bits = block.sample * pixels * bits_row + block.first / 8;
    with_tail(block.channels, [&](auto tail) DC_LAMBDA {
      for (int64_t i = 0; i < pixels; ++i) {
        store(flat + i * kLanes, error(i * p.channels, bits + i * bits_row, tail), Whole{});
      }
    });
  } else {
    const int64_t bits_row = (pixels + 7) / 8, bits = block.place(p) * bits_row;
    flatten(pixels, block.channels, flat, [&](int64_t c, int64_t i, auto tail) DC_LAMBDA {
      return error(c * pixels + i, bits + c * bits_row + i / 8, tail);
    });
  }
}

__attribute__((noinline)) f32v sum_flat(const float* flat, int64_t count) {
  f32v total{};
  for (int64_t start = 0; start < count; start += kGroup) {
    const int64_t end = std::min(start + kGroup, count);
    f32v parts[4] = {};
    int64_t i = start;
    for (; i + 4 <= end; i += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) parts[k] += load(flat + (i + k) * kLanes, Whole{});
    }
    for (; i < end; ++i) parts[0] += load(flat + i * kLanes, Whole{});
    total += (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
  return total;
}

// The rows of dz' that meet row h of the input.
struct MeetingRows {
  int count = 0;
  const float* errors[Depthwise::kMostTaps];
  int64_t tap[Depthwise::kMostTaps];  // row of the kernel

  MeetingRows(const Depthwise& p, int64_t h, const float* ring, int64_t row) {
    for (int64_t r = 0; r < p.kernel[0]; ++r) {
      const int64_t at = h + p.padding[0] - r;
      if (at < 0 || at % p.stride[0] || at / p.stride[0] >= p.output[0]) continue;
      tap[count] = r;
      errors[count++] = ring + at / p.stride[0] % p.kernel[0] * row;
    }
  }
};

// Row h of the input gradient, as vectors. At a stride, columns of equal remainder meet the same taps.
inline void grad_input_row(const DepthwiseBackward& p, const DepthwiseBlock& block, const MeetingRows& meeting,
                           float* to) {
  const int64_t stride = p.stride[1];
  for (int64_t column = 0; column < std::min(stride, p.size[1]); ++column) {
    // The leftmost of dz' meets the last tap.
    int64_t last = p.kernel[1] - 1;
    while (last >= 0 && (column + p.padding[1] - last) % stride) --last;
    TapRows taps;
    taps.count = last < 0 ? 0 : meeting.count;
    taps.taps = int(last / stride + 1);
    taps.weight_step = -stride * kLanes;
    for (int r = 0; r < taps.count; ++r) {
      taps.rows[r] = {meeting.errors[r] + (p.left_columns() + (column + p.padding[1] - last) / stride) * kLanes,
                      p.weight + block.weight + (meeting.tap[r] * p.kernel[1] + last) * kLanes};
    }
    convolve_row(taps, 1, (p.size[1] - column + stride - 1) / stride, to + column * kLanes, stride * kLanes);
  }
}

template <class T, Sort sort>
void depthwise_backward_slot(const DepthwiseBackward& p, int64_t slot) {
  float* ring = p.scratch + slot * p.scratch_floats();
  const int64_t error_row = p.error_columns() * kLanes;
  float* seen = ring + p.kernel[0] * error_row;
  float* grad_row = seen + p.seen_columns() * kLanes;
  float* errors = grad_row + p.size[1] * kLanes;
  float* flat = errors + p.flat_output() * kLanes;
  std::fill_n(ring, p.kernel[0] * error_row + p.seen_columns() * kLanes, 0.0f);
  each_depthwise_task(p, slot, [&](int64_t task) {
    const DepthwiseBlock block(p, task);
    p.output_innermost ? read_error<T, sort, true>(p, block, errors) : read_error<T, sort, false>(p, block, errors);
    f32v removed{};
    if (p.centred || p.sums) {
      const f32v sum = sum_flat(errors, p.output_pixels());
      if (p.sums) store_vector(p.sums, block.place(p), block.channels, sum);
      if (p.centred) {
        removed = sum / float(p.output_pixels()) *
                  vector_or(p.mean_scale, block.first, block.channels, float(p.constant));
      }
    }
    if (!p.grad_input && !p.input) return;
    if (!p.input_innermost && p.input) flatten_input<T>(p, block, p.input, flat);
    alignas(64) float sums[Depthwise::kMostTaps * Depthwise::kMostTaps * kLanes];
    std::fill_n(sums, p.taps() * kLanes, 0.0f);
    int64_t next = 0;  // row of dz'
    for (int64_t h = 0; h < p.size[0]; ++h) {
      for (; next < p.output[0] && next * p.stride[0] <= h + p.padding[0]; ++next) {
        const float* from = errors + next * p.output[1] * kLanes;
        float* to = ring + next % p.kernel[0] * error_row + p.left_columns() * kLanes;
        for (int64_t i = 0; i < p.output[1]; ++i) {
          store(to + i * kLanes, load(from + i * kLanes, Whole{}) - removed, Whole{});
        }
      }
      const MeetingRows meeting(p, h, ring, error_row);
      if (p.input && meeting.count) {
        read_row<T>(p, block, p.input, flat, h, seen);
        const float* first[Depthwise::kMostTaps];
        float* to[Depthwise::kMostTaps];
        for (int r = 0; r < meeting.count; ++r) {
          first[r] = meeting.errors[r] + p.left_columns() * kLanes;
          to[r] = sums + meeting.tap[r] * p.kernel[1] * kLanes;
        }
        correlate_rows(first, meeting.count, int(p.kernel[1]), seen, p.stride[1], p.output[1], to);
      }
      if (!p.grad_input) continue;
      // Rows of the input that are used up make room for those of its gradient.
      float* row = p.input_innermost ? grad_row : flat + h * p.size[1] * kLanes;
      T* pixels = nullptr;
      if (p.input_innermost) {
        pixels = offset<T>(p.grad_input, block.of_input(p) + h * p.size[1] * p.channels);
        expect_pixels(pixels, p.channels, p.size[1]);
      }
      grad_input_row(p, block, meeting, row);
      if (pixels) write_pixels(row, p.channels, p.size[1], block.channels, pixels);
    }
    if (p.grad_input && !p.input_innermost) {
      T* maps = offset<T>(p.grad_input, block.of_input(p));
      unflatten(flat, p.pixels(), block.channels, [&](int64_t c, int64_t i, const f32v& map, auto tail) DC_LAMBDA {
        store(maps + c * p.pixels() + i, map, tail);
      });
    }
    if (!p.input) return;
    std::copy_n(sums, p.taps() * kLanes,
                p.partials + block.sample * p.taps() * p.padded_channels() + block.weight);
  });
}

template <class F>
DC_INLINE void for_narrow_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32) return f(float{});
  if (dtype == Dtype::bf16) return f(bfloat16{});
  f(float16{});
}

// Calls f(storage type, sort of activation), both as types.
template <class F>
DC_INLINE void for_depthwise(const Depthwise& p, F&& f) {
  for_narrow_dtype(p.dtype, [&](auto storage) {
    switch (sort_of(p.activation)) {
      case Sort::identity: return f(storage, std::integral_constant<Sort, Sort::identity>{});
      case Sort::relu: return f(storage, std::integral_constant<Sort, Sort::relu>{});
      case Sort::piecewise: return f(storage, std::integral_constant<Sort, Sort::piecewise>{});
      case Sort::smooth: return f(storage, std::integral_constant<Sort, Sort::smooth>{});
    }
  });
}

void depthwise_forward(const DepthwiseForward& p, int64_t begin, int64_t end) {
  for_depthwise(p, [&](auto storage, auto sort) {
    for (int64_t slot = begin; slot < end; ++slot) depthwise_forward_slot<decltype(storage), sort.value>(p, slot);
  });
}

void depthwise_backward(const DepthwiseBackward& p, int64_t begin, int64_t end) {
  for_depthwise(p, [&](auto storage, auto sort) {
    for (int64_t slot = begin; slot < end; ++slot) depthwise_backward_slot<decltype(storage), sort.value>(p, slot);
  });
}

template <class T>
DC_INLINE float element(const T* from) {
  return load(from, Part{1})[0];
}

void pack_depthwise(const PackDepthwise& p) {
  for_narrow_dtype(p.weight_dtype, [&](auto storage) {
    const auto* weight = static_cast<const decltype(storage)*>(p.weight);
    float* to = p.packed;
    for (int64_t first = 0; first < p.channels; first += kLanes) {
      const f32v gain = vector_or(p.gain, first, std::min(kLanes, p.channels - first), 1);
      for (int64_t tap = 0; tap < p.taps; ++tap, to += kLanes) {
        f32v values{};
        const int64_t last = std::min(first + kLanes, p.channels);
        for (int64_t c = first; c < last; ++c) values[c - first] = element(weight + c * p.taps + tap);
        for_narrow_dtype(p.dtype, [&](auto rounded) {
          decltype(rounded) narrow[kLanes];
          store(narrow, values, Whole{});
          store(to, load(narrow, Whole{}) * gain, Whole{});
        });
      }
    }
  });
}

void depthwise_weight_grad(const DepthwiseWeightGrad& p, int64_t begin, int64_t end) {
  for_narrow_dtype(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    const int64_t last = std::min(end * Depthwise::kMostLanes, p.channels);
    for (int64_t first = begin * Depthwise::kMostLanes; first < last; first += kLanes) {
      const int64_t channels = std::min(kLanes, p.channels - first);
      alignas(64) float sums[Depthwise::kMostTaps * Depthwise::kMostTaps * kLanes];
      f32v dots{}, total{};
      for (int64_t tap = 0; tap < p.taps; ++tap) {
        f32v sum{};
        for (int64_t n = 0; n < p.samples; ++n) {
          sum += load(p.partials + n * p.padded() + first * p.taps + tap * kLanes, Whole{});
        }
        store(sums + tap * kLanes, sum, Whole{});
        total += sum;
        if (!p.dots) continue;
        f32v weight{};
        for (int64_t c = 0; c < channels; ++c) weight[c] = element(offset<T>(p.weight, (first + c) * p.taps + tap));
        dots += weight * sum;
      }
      if (p.dots) store_vector(p.dots, first, channels, dots);
      if (!p.grad) continue;
      const f32v gain = vector_or(p.gain, first, channels, 1);
      const f32v removed = p.taps > 1 ? total * float(p.projection / double(p.taps)) : f32v{};
      for (int64_t tap = 0; tap < p.taps; ++tap) {
        const f32v value = (load(sums + tap * kLanes, Whole{}) - removed) * gain;
        for (int64_t c = 0; c < channels; ++c) {
          store(offset<T>(p.grad, (first + c) * p.taps + tap), broadcast<f32v>(value[c]), Part{1});
        }
      }
    }
  });
}
