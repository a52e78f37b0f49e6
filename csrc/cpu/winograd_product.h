// The float32 matrix product in registers of winograd_impl.h, included after simd.h.

// Accumulators fill the registers: 6 x 4 of 32 with AVX-512, 6 x 2 of 16 with AVX2.
constexpr int kRowsAtOnce = 6;
constexpr int kVectorsAtOnce = DC_LANES == 16 ? 4 : 2;
constexpr int64_t kFiltersAtOnce = kVectorsAtOnce * DC_LANES;

// sums[r][v] += sum over k of a[r * row + k * step] * b[k * stride + v * lanes ...].
template <int rows, int vectors>
DC_INLINE void accumulate(f32v (&sums)[rows][vectors], int64_t steps, const float* a, int64_t row, int64_t step,
                          const float* b, int64_t stride) {
  for (int64_t k = 0; k < steps; ++k) {
    f32v right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = load(b + k * stride + v * DC_LANES, Whole{});
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const float left = a[r * row + k * step];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += left * right[v];
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
