// The kernels for any processor.

#include "kernels_headers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Hardly any x86 processor comes here, and optimising vectors wider than its registers takes GCC minutes.
#pragma GCC optimize("O1")
#endif

namespace deepcontrol::cpu::portable {
#include "simd.h"

#include "kernels_impl.h"

extern const Kernels table;
const Kernels table{"portable", center_forward, center_backward, window_mean, finish_weight_grad, nullptr, nullptr, nullptr, nullptr,
                    nullptr, false, nullptr, nullptr, nullptr, nullptr};
}  // namespace deepcontrol::cpu::portable
