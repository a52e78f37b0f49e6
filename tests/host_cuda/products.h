// The arithmetic of tensor cores.
#pragma once

#include <cstdint>

namespace host_cuda {

enum class Format { bf16, f16, tf32 };

// What mma.sync does with the registers of 32 lanes: m16n8k16 of 16-bit numbers, m16n8k8 of TF32.
void multiply_add_warp(Format format, float (*d)[4], const unsigned (*a)[4], const unsigned (*b)[2]);

// What wgmma does for one warp: d, 16 x columns, += a * b^T, of 16 x 16 and columns x 16 numbers of 16 bits.
void multiply_add_rows(Format format, int columns, float* d, const uint16_t* a, const uint16_t* b);

}  // namespace host_cuda
