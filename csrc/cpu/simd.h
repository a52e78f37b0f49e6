// Vectors of one accumulation type, as wide as the instruction set of the including file (DC_AVX512, DC_AVX2 or
// neither), with loads and stores that convert from and to the storage types. Only the kernels_*.cpp include this.

#if defined(DC_AVX512)
#define DC_LANES 16
#else
#define DC_LANES 8
#endif

using f32v = float __attribute__((vector_size(4 * DC_LANES)));
using i32v = int32_t __attribute__((vector_size(4 * DC_LANES)));
using u32v = uint32_t __attribute__((vector_size(4 * DC_LANES)));
using u16v = uint16_t __attribute__((vector_size(2 * DC_LANES)));
using f64v = double __attribute__((vector_size(64)));
using i64v = int64_t __attribute__((vector_size(64)));

#define DC_INLINE inline __attribute__((always_inline))

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class V>
struct Vector;
template <>
struct Vector<f32v> {
  using Scalar = float;
  using Mask = i32v;
  static constexpr int lanes = DC_LANES;
};
template <>
struct Vector<f64v> {
  using Scalar = double;
  using Mask = i64v;
  static constexpr int lanes = 8;
};

template <class T>
struct Storage {
  using V = f32v;
};
template <>
struct Storage<double> {
  using V = f64v;
};

template <class To, class From>
DC_INLINE To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
DC_INLINE V broadcast(typename Vector<V>::Scalar value) {
  return V{} + value;
}

// How many elements a vector holds: all, or the first few at the end of a row.
struct Whole {};
struct Part {
  int count;
};

template <class V, class T>
DC_INLINE V read(const T* from, Whole) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class T>
DC_INLINE V read(const T* from, Part part) {
#if defined(DC_AVX512)
  const uint32_t mask = (1u << part.count) - 1;
  if constexpr (sizeof(T) == 8) return reinterpret<V>(_mm512_maskz_loadu_epi64(__mmask8(mask), from));
  if constexpr (sizeof(T) == 4) return reinterpret<V>(_mm512_maskz_loadu_epi32(__mmask16(mask), from));
  if constexpr (sizeof(T) == 2) return reinterpret<V>(_mm256_maskz_loadu_epi16(__mmask16(mask), from));
#else
  T elements[sizeof(V) / sizeof(T)] = {};
  for (int i = 0; i < part.count; ++i) elements[i] = from[i];
  return reinterpret<V>(elements);
#endif
}
template <class V, class T>
DC_INLINE void write(T* to, const V& v, Whole) {
  __builtin_memcpy(to, &v, sizeof(V));
}
template <class V, class T>
DC_INLINE void write(T* to, const V& v, Part part) {
#if defined(DC_AVX512)
  const uint32_t mask = (1u << part.count) - 1;
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(to, __mmask8(mask), reinterpret<__m512i>(v));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(to, __mmask16(mask), reinterpret<__m512i>(v));
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(to, __mmask16(mask), reinterpret<__m256i>(v));
#else
  T elements[sizeof(V) / sizeof(T)];
  __builtin_memcpy(elements, &v, sizeof(V));
  for (int i = 0; i < part.count; ++i) to[i] = elements[i];
#endif
}

template <class Tail>
DC_INLINE f32v load(const float* from, Tail tail) {
  return read<f32v>(from, tail);
}
template <class Tail>
DC_INLINE f64v load(const double* from, Tail tail) {
  return read<f64v>(from, tail);
}
template <class Tail>
DC_INLINE f32v load(const bfloat16* from, Tail tail) {
  return reinterpret<f32v>(__builtin_convertvector(read<u16v>(from, tail), u32v) << 16);
}
template <class Tail>
DC_INLINE f32v load(const float16* from, Tail tail) {
  u16v halves = read<u16v>(from, tail);
#if defined(DC_AVX512)
  return reinterpret<f32v>(_mm512_maskz_cvtph_ps(__mmask16(-1), reinterpret<__m256i>(halves)));
#elif defined(DC_AVX2)
  return reinterpret<f32v>(_mm256_cvtph_ps(reinterpret<__m128i>(halves)));
#else
  f32v v;
  for (int i = 0; i < DC_LANES; ++i) v[i] = c10::detail::fp16_ieee_to_fp32_value(halves[i]);
  return v;
#endif
}

template <class Tail>
DC_INLINE void store(float* to, const f32v& v, Tail tail) {
  write(to, v, tail);
}
template <class Tail>
DC_INLINE void store(double* to, const f64v& v, Tail tail) {
  write(to, v, tail);
}
template <class Tail>
DC_INLINE void store(bfloat16* to, const f32v& v, Tail tail) {
#if defined(DC_AVX512_BF16)
  write(to, reinterpret<u16v>(_mm512_cvtneps_pbh(reinterpret<__m512>(v))), tail);
#else
  u32v word = reinterpret<u32v>(v);
  u32v rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  u32v quiet = u32v{} + 0x7fc0;  // rounding could turn a NaN into infinity
  write(to, __builtin_convertvector(v == v ? rounded : quiet, u16v), tail);
#endif
}
template <class Tail>
DC_INLINE void store(float16* to, const f32v& v, Tail tail) {
#if defined(DC_AVX512)
  __m256i halves = _mm512_cvtps_ph(reinterpret<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  write(to, reinterpret<u16v>(halves), tail);
#elif defined(DC_AVX2)
  __m128i halves = _mm256_cvtps_ph(reinterpret<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  write(to, reinterpret<u16v>(halves), tail);
#else
  u16v halves;
  for (int i = 0; i < DC_LANES; ++i) halves[i] = c10::detail::fp16_ieee_from_fp32_value(v[i]);
  write(to, halves, tail);
#endif
}

// Bit i of the result is set where lane i of the mask is.
DC_INLINE uint32_t to_bits(const i32v& mask) {
#if defined(DC_AVX512)
  return _mm512_movepi32_mask(reinterpret<__m512i>(mask));
#elif defined(DC_AVX2)
  return _mm256_movemask_ps(reinterpret<__m256>(mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < DC_LANES; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}
DC_INLINE uint32_t to_bits(const i64v& mask) {
#if defined(DC_AVX512)
  return _mm512_movepi64_mask(reinterpret<__m512i>(mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}

template <class Mask>
DC_INLINE Mask from_bits(uint32_t bits) {
  Mask place;
  for (int i = 0; i < int(sizeof(Mask) / sizeof(place[0])); ++i) place[i] = 1 << i;
  return (place & bits) != 0;
}

template <class V>
DC_INLINE uint32_t read_bits(const uint8_t* from, Whole) {
  if constexpr (Vector<V>::lanes == 16) return from[0] | uint32_t(from[1]) << 8;
  return from[0];
}
template <class V>
DC_INLINE uint32_t read_bits(const uint8_t* from, Part part) {
  return part.count > 8 ? from[0] | uint32_t(from[1]) << 8 : from[0];
}
template <class V>
DC_INLINE void write_bits(uint8_t* to, uint32_t bits, Whole) {
  to[0] = uint8_t(bits);
  if constexpr (Vector<V>::lanes == 16) to[1] = uint8_t(bits >> 8);
}
template <class V>
DC_INLINE void write_bits(uint8_t* to, uint32_t bits, Part part) {
  bits &= (1u << part.count) - 1;
  to[0] = uint8_t(bits);
  if (part.count > 8) to[1] = uint8_t(bits >> 8);
}

// Calls body(index, Whole) for each whole vector of a row and body(index, Part) for what is left.
template <class V, class Body>
DC_INLINE void each_vector(int64_t count, Body&& body) {
  constexpr int lanes = Vector<V>::lanes;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, Whole{});
  if (i < count) body(i, Part{int(count - i)});
}

template <class V>
DC_INLINE typename Vector<V>::Scalar horizontal_sum(const V& v) {
  typename Vector<V>::Scalar sum = 0;
  for (int i = 0; i < Vector<V>::lanes; ++i) sum += v[i];
  return sum;
}

template <class F>
DC_INLINE f64v each_lane(const f64v& v, F&& f) {
  f64v result;
  for (int i = 0; i < 8; ++i) result[i] = f(v[i]);
  return result;
}

// e^v, about one unit in the last place; infinite above 88.8, zero below -104, NaN for NaN.
DC_INLINE f32v exp(const f32v& v) {
  f32v x = v > 89.0f ? broadcast<f32v>(89.0f) : v;
  x = x < -104.0f ? broadcast<f32v>(-104.0f) : x;
  f32v half = x < 0.0f ? broadcast<f32v>(-0.5f) : broadcast<f32v>(0.5f);
  i32v n = __builtin_convertvector(x * 1.44269504f + half, i32v);
  f32v turns = __builtin_convertvector(n, f32v);
  f32v r = x - turns * 0.693359375f + turns * 2.12194440e-4f;
  // Chebyshev fit on |r| <= ln(2) / 2, relative error 3e-9.
  f32v p = broadcast<f32v>(0.001394858118f);
  p = p * r + 0.008375128731f;
  p = p * r + 0.041666217148f;
  p = p * r + 0.166664153337f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // Two factors, since 2^n alone may leave the range of normal numbers where the product does not.
  i32v first = n >> 1, second = n - first;
  return p * reinterpret<f32v>((first + 127) << 23) * reinterpret<f32v>((second + 127) << 23);
}
DC_INLINE f64v exp(const f64v& v) {
  return each_lane(v, [](double x) { return std::exp(x); });
}

// The normal distribution function; relative error below 3e-7 on the negative side too.
DC_INLINE f32v normal_cdf(const f32v& v) {
  f32v x = v * 0.70710678f;
  f32v z = x < 0.0f ? -x : x;
  f32v u = z * z;
  // erf(z) / z in u on z <= 1, Chebyshev fit, relative error 2e-9.
  f32v p = broadcast<f32v>(7.8824974e-5f);
  p = p * u - 0.00080188555f;
  p = p * u + 0.0051893122f;
  p = p * u - 0.0268543288f;
  p = p * u + 0.1128359735f;
  p = p * u - 0.3761262596f;
  p = p * u + 1.1283791065f;
  f32v near = 0.5f + 0.5f * x * p;
  // ln(erfc(z) e^(z^2) / t) in t = 1 / (1 + z / 2), Chebyshev fit on 0.14 <= t <= 1, error 1e-8.
  f32v t = 1.0f / (1.0f + 0.5f * z);
  f32v q = broadcast<f32v>(-0.12626875936985016f);
  q = q * t + 0.8788350224494934f;
  q = q * t - 2.545161485671997f;
  q = q * t + 3.8752684593200684f;
  q = q * t - 3.2089521884918213f;
  q = q * t + 1.4532911777496338f;
  q = q * t - 0.6227346062660217f;
  q = q * t + 0.20125462114810944f;
  q = q * t + 0.3587549924850464f;
  q = q * t + 1.0012675523757935f;
  q = q * t - 1.265554666519165f;
  f32v tail = 0.5f * t * exp(q - u);
  f32v far = x > 0.0f ? 1.0f - tail : tail;
  return z > 1.0f ? far : near;
}
DC_INLINE f64v normal_cdf(const f64v& v) {
  return each_lane(v, [](double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); });
}
