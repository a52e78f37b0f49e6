// The kernels for any processor.

#include "kernels_headers.h"

namespace deepcontrol::cpu::portable {
#include "simd.h"

#include "kernels_impl.h"

extern const Kernels table;
const Kernels table{"portable", center_forward, center_backward, window_mean, finish_weight_grad, nullptr, nullptr, nullptr, nullptr,
                    nullptr, false};
}  // namespace deepcontrol::cpu::portable
