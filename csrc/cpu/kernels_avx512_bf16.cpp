// The kernels for AVX-512 (F, BW, DQ, VL) with its bfloat16 conversion, which takes a quarter off a bfloat16 pass.

#include "kernels_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define DC_AVX512
#define DC_AVX512_BF16

namespace deepcontrol::cpu::avx512_bf16 {
#include "simd.h"

#include "kernels_impl.h"

#include "product_impl.h"

#include "pointwise_impl.h"

#include "planar_impl.h"

#include "depthwise_impl.h"

extern const Kernels table;
const Kernels table{"avx512_bf16", center_forward, center_backward, window_mean, finish_weight_grad,
                    pointwise_forward, pack_weight, pointwise_mean, pointwise_backward, add_partials,
                    true, planar_forward, planar_backward,
                    depthwise_forward, depthwise_backward, pack_depthwise, depthwise_weight_grad};
}  // namespace deepcontrol::cpu::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
