// Tensor maps: how the TMA of sm_90 is told of a tensor in memory and of the boxes that kernels load from it. Plain C++;
// the driver writes them, and it is asked for its functions at run time, so that nothing links with it.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../types.h"

namespace deepcontrol::cuda {

// The input of a convolution, (N, D, H, W, C) of 16 bits, or (N D, H, W, C) if it is flat: a box is what one tap sees of
// `pixels` consecutive pixels of the output, a step of channels.
cudaError_t map_pixels(CUtensorMap& map, Dtype dtype, const void* input, int64_t samples, int64_t channels,
                       const Windows& windows, int pixels);
// A weight, (filters, taps, channels) of 16 bits: a box has one tap of `count` filters.
cudaError_t map_filters(CUtensorMap& map, Dtype dtype, const void* weight, int64_t filters, int64_t taps,
                        int64_t channels, int count);

}  // namespace deepcontrol::cuda
