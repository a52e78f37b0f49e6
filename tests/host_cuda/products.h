// The arithmetic of tensor cores.
#pragma once

#include <cstdint>

namespace host_cuda {

enum class Format { bf16, f16, tf32 };

// What mma.sync does with the registers of 32 lanes, m16n8k16 of 16-bit numbers and m16n8k8 of TF32.
void multiply_add_warp(Format format, float (*d)[4], const unsigned (*a)[4], const unsigned (*b)[2]);

}  // namespace host_cuda
