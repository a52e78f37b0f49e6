// The one way to start a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace deepcontrol::cuda {

// `shared` is in bytes; `cluster` consecutive blocks form a thread block cluster (sm_90 and up where it is not 1).
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, int cluster,
                   cudaStream_t stream, const std::remove_cv_t<Parameters>&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (shared > kWithoutAsking) {
    const cudaError_t refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (refused != cudaSuccess) return refused;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace deepcontrol::cuda
