// The matrix product in registers that the kernels share, included after simd.h.

// Accumulators fill the registers: 6 x 4 of 32 with AVX-512, 6 x 2 of 16 with AVX2.
constexpr int kRowsAtOnce = 6;
constexpr int kVectorsAtOnce = DC_LANES == 16 ? 4 : 2;
constexpr int64_t kColumnsAtOnce = kVectorsAtOnce * DC_LANES;

// What one step of the product consumes: one element, or for bfloat16 a pair.
template <class T>
struct Product {
  static constexpr int64_t elements = 1;
  using Unit = T;
  static DC_INLINE f32v read_vector(const T* b) { return load(b, Whole{}); }
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
  static DC_INLINE f32v read_vector(const BFloat16Pair* b) { return read<f32v>(b, Whole{}); }
  static DC_INLINE f32v multiply_add(const f32v& sum, BFloat16Pair a, const f32v& b) {
    return reinterpret<f32v>(_mm512_dpbf16_ps(reinterpret<__m512>(sum), reinterpret<__m512bh>(_mm512_set1_epi32(a.bits)),
                                              reinterpret<__m512bh>(b)));
  }
};
#endif

// sums[r][v] += sum over k of a[r * row + k * step] * b[k * stride + v * lanes ...], in registers.
template <class T, int rows, int vectors, class Unit>
DC_INLINE void accumulate(f32v (&sums)[rows][vectors], int64_t steps, const Unit* a, int64_t row, int64_t step,
                          const Unit* b, int64_t stride) {
  for (int64_t k = 0; k < steps; ++k) {
    f32v right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = Product<T>::read_vector(b + k * stride + v * DC_LANES);
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

// Calls body(vectors at once as a type): as few as hold `columns`, up to kColumnsAtOnce, of which three are done as four.
template <class Body>
DC_INLINE void with_vectors(int64_t columns, Body&& body) {
  if constexpr (kVectorsAtOnce == 4) {
    if (columns > 2 * DC_LANES) return body(std::integral_constant<int, 4>{});
  }
  if (columns > DC_LANES) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 1>{});
}
