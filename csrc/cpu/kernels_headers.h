// Everything from outside that the kernels use, included before a target is set (kernels_impl.h says why).
#pragma once

#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define DC_LAMBDA __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
// Vectors wider than the target's registers pass between inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC 12 sees its own header's "undefined" operands of masked intrinsics as a mistake (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
