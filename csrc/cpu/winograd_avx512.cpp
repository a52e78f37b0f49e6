// Winograd's convolution for AVX-512.

#include "kernels_headers.h"
#include "winograd.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define DC_AVX512

namespace deepcontrol::cpu::winograd_avx512 {
#include "simd.h"

#include "product_impl.h"

#include "winograd_impl.h"

extern const WinogradKernels table;
const WinogradKernels table{winograd_transpose, winograd_weights,     winograd_inputs,
                            winograd_forward,   winograd_weight_grad, winograd_weight_grad_finish};
}  // namespace deepcontrol::cpu::winograd_avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
