#include "tensor_map.h"

#include "conv_layout_sm90.h"

namespace deepcontrol::cuda {

namespace {

// The types of these functions, without a link to them.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
using EncodePixels = decltype(&cuTensorMapEncodeIm2col);

template <class F>
F function_of_driver(const char* name) {
  constexpr unsigned kSince = 12000;  // the version of CUDA that brought both
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t failed = cudaGetDriverEntryPointByVersion(name, &found, kSince, cudaEnableDefault, &result);
#else
  static_assert(CUDART_VERSION >= kSince, "sm_90a needs CUDA 12");
  const cudaError_t failed = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  return failed == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<F>(found) : nullptr;
}

constexpr int kBytes = 2;  // of an element

CUtensorMapDataType type_of(Dtype dtype) {
  return dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// All that a driver can have against a map is in its arguments.
cudaError_t outcome(CUresult result) { return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue; }

// In maps of small tensors, drivers up to CUDA 13.1 leave a bit that CUTLASS takes out (include/cute/atom/
// copy_traits_sm90_tma.hpp and copy_traits_sm90_im2col.hpp), and so does this.
cudaError_t mend(CUtensorMap& map, cuuint64_t bytes) {
  constexpr int kNewestToMend = 13010, kWord = 1;
  constexpr cuuint64_t kSmall = 128 * 1024, kBit = cuuint64_t{1} << 21;
  int version = 0;
  const cudaError_t failed = cudaDriverGetVersion(&version);
  if (failed == cudaSuccess && version <= kNewestToMend && bytes < kSmall) map.opaque[kWord] &= ~kBit;
  return failed;
}

}  // namespace

cudaError_t map_pixels(CUtensorMap& map, Dtype dtype, const void* input, int64_t samples, int64_t channels,
                       const Windows& windows, int pixels) {
  static const EncodePixels encode = function_of_driver<EncodePixels>("cuTensorMapEncodeIm2col");
  if (!encode) return cudaErrorNotSupported;
  // Dimensions innermost first, corners too. The corners bound where the tap at the origin goes.
  const bool flat = is_flat(windows);
  const int spatial = flat ? 2 : 3, rank = spatial + 2;
  cuuint64_t sizes[5], strides[4];
  cuuint32_t steps[5];
  int lower[3], upper[3];
  sizes[0] = channels;
  steps[0] = 1;
  strides[0] = channels * kBytes;
  for (int i = 0; i < spatial; ++i) {
    const int from = 2 - i;
    sizes[i + 1] = windows.size[from];
    steps[i + 1] = static_cast<cuuint32_t>(windows.stride[from]);
    strides[i + 1] = strides[i] * sizes[i + 1];
    lower[i] = static_cast<int>(-windows.padding[from]);
    upper[i] = static_cast<int>(windows.padding[from] - (windows.kernel[from] - 1) * windows.dilation[from]);
  }
  sizes[rank - 1] = flat ? samples * windows.size[0] : samples;
  steps[rank - 1] = 1;
  const cudaError_t failed =
      outcome(encode(&map, type_of(dtype), rank, const_cast<void*>(input), sizes, strides, lower, upper,
                     LayoutSm90::kStepChannels, pixels, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return failed == cudaSuccess ? mend(map, strides[rank - 2] * sizes[rank - 1]) : failed;
}

cudaError_t map_filters(CUtensorMap& map, Dtype dtype, const void* weight, int64_t filters, int64_t taps,
                        int64_t channels, int count) {
  static const EncodeTiled encode = function_of_driver<EncodeTiled>("cuTensorMapEncodeTiled");
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(taps), cuuint64_t(filters)};
  const cuuint64_t strides[] = {sizes[0] * kBytes, sizes[0] * sizes[1] * kBytes};
  const cuuint32_t box[] = {LayoutSm90::kStepChannels, 1, cuuint32_t(count)}, steps[] = {1, 1, 1};
  const cudaError_t failed =
      outcome(encode(&map, type_of(dtype), 3, const_cast<void*>(weight), sizes, strides, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return failed == cudaSuccess ? mend(map, strides[1] * sizes[2]) : failed;
}

}  // namespace deepcontrol::cuda
