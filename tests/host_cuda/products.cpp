// Products are exact: of 16-bit and TF32 numbers a float holds all bits. Sums are floats, taken in the order of K; which
// order a GPU takes, and how it rounds, is not documented.

#include "products.h"

#include <bit>

namespace host_cuda {
namespace {

constexpr int kRows = 16, kColumns = 8;

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

}  // namespace

void multiply_add_warp(Format format, float (*d)[4], const unsigned (*a)[4], const unsigned (*b)[2]) {
  const int per_word = format == Format::tf32 ? 1 : 2, depth = 8 * per_word;
  float left[kRows][16], right[16][kColumns], sums[kRows][kColumns];
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
  for (int row = 0; row < kRows; ++row) {
    float sum[kColumns];
    for (int j = 0; j < kColumns; ++j) sum[j] = sums[row][j];
    for (int k = 0; k < depth; ++k) {
      for (int j = 0; j < kColumns; ++j) sum[j] += left[row][k] * right[k][j];
    }
    for (int j = 0; j < kColumns; ++j) sums[row][j] = sum[j];
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) d[lane][i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace host_cuda
