// Products are exact: of 16-bit and TF32 numbers a float holds all bits. Sums are floats, taken in the order of K; the
// order that a GPU takes, and how it rounds, is not documented.

#include "products.h"

#include <bit>
#include <cstring>

namespace host_cuda {
namespace {

constexpr int kRows = 16, kDepth = 16, kColumns = 8;
using Eight [[gnu::vector_size(kColumns * sizeof(float))]] = float;

float from_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

float from_f16(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fff;
  // Infinity and NaN keep the largest exponent; for the rest, also what is subnormal, the product corrects the bias.
  const float number = magnitude >= 0x7c00 ? std::bit_cast<float>(magnitude << 13 | 0x7f800000)
                                           : std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bits & 0x8000 ? -number : number;
}

// Bits that TF32 lacks are ignored, so what was not rounded is truncated.
float from_tf32(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

float widen(Format format, uint32_t word, int which) {
  if (format == Format::tf32) return from_tf32(word);
  const uint32_t bits = which ? word >> 16 : word & 0xffff;
  return format == Format::f16 ? from_f16(bits) : from_bf16(bits);
}

template <class Number>
void widen(Format format, const uint16_t* numbers, int count, Number number) {
  if (format == Format::f16) {
    for (int i = 0; i < count; ++i) number(i) = from_f16(numbers[i]);
  } else {
    for (int i = 0; i < count; ++i) number(i) = from_bf16(numbers[i]);
  }
}

void multiply(const float (&a)[kRows][kDepth], int depth, const Eight* b, float* d, int pitch) {
  for (int row = 0; row < kRows; ++row) {
    Eight sum;
    std::memcpy(&sum, d + row * pitch, sizeof(sum));
    for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k];
    std::memcpy(d + row * pitch, &sum, sizeof(sum));
  }
}

}  // namespace

void multiply_add_warp(Format format, float (*d)[4], const unsigned (*a)[4], const unsigned (*b)[2]) {
  const int per_word = format == Format::tf32 ? 1 : 2;
  float left[kRows][kDepth], sums[kRows][kColumns];
  Eight right[kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, turn = lane % 4;
    for (int i = 0; i < per_word; ++i) {
      for (int word = 0; word < 4; ++word) {
        left[group + word % 2 * 8][(turn + word / 2 * 4) * per_word + i] = widen(format, a[lane][word], i);
      }
      for (int word = 0; word < 2; ++word) {
        right[(turn + word * 4) * per_word + i][group] = widen(format, b[lane][word], i);
      }
    }
    for (int i = 0; i < 4; ++i) sums[group + i / 2 * 8][turn * 2 + i % 2] = d[lane][i];
  }
  multiply(left, 8 * per_word, right, &sums[0][0], kColumns);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) d[lane][i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

void multiply_add_rows(Format format, int columns, float* d, const uint16_t* a, const uint16_t* b) {
  float left[kRows][kDepth];
  widen(format, a, kRows * kDepth, [&](int i) -> float& { return left[i / kDepth][i % kDepth]; });
  for (int first = 0; first < columns; first += kColumns) {
    float right[kDepth][kColumns];
    widen(format, b + first * kDepth, kDepth * kColumns,
          [&](int i) -> float& { return right[i % kDepth][i / kDepth]; });
    Eight vectors[kDepth];
    std::memcpy(vectors, right, sizeof(right));
    multiply(left, kDepth, vectors, d + first, columns);
  }
}

}  // namespace host_cuda
