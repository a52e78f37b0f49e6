// The one way to start a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace deepcontrol::cuda {

// Above 48 KiB a kernel must be allowed its shared memory, once on each device. It always gets all that there is: another
// thread that launches it with less must not take the permission back.
template <class... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), int64_t shared) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (shared <= kWithoutAsking) return cudaSuccess;
  struct Allowed {
    const void* kernel;
    int device;
    int64_t bytes;
  };
  thread_local std::vector<Allowed> known;
  int device = 0, most = 0;
  cudaError_t failed = cudaGetDevice(&device);
  if (failed != cudaSuccess) return failed;
  for (const Allowed& a : known) {
    if (a.kernel == reinterpret_cast<const void*>(kernel) && a.device == device && a.bytes >= shared) return cudaSuccess;
  }
  failed = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (failed == cudaSuccess) failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (failed == cudaSuccess) known.push_back({reinterpret_cast<const void*>(kernel), device, most});
  return failed;
}

// A launch of `blocks` blocks with `shared` bytes each, `cluster` consecutive ones in a thread block cluster.
struct Configuration {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  Configuration(int64_t blocks, int threads, int64_t shared, int cluster, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
  }
  Configuration(const Configuration&) = delete;
};

// How many clusters the device keeps at a time, which only the driver knows: its parts differ from die to die.
template <class... Parameters>
cudaError_t resident_clusters(void (*kernel)(Parameters...), int threads, int64_t shared, int cluster, int& clusters) {
  struct Known {
    const void* kernel;
    int device, cluster;
    int64_t shared;
    int clusters;
  };
  thread_local std::vector<Known> known;
  int device = 0;
  cudaError_t failed = cudaGetDevice(&device);
  if (failed != cudaSuccess) return failed;
  const void* of = reinterpret_cast<const void*>(kernel);
  for (const Known& k : known) {
    if (k.kernel == of && k.device == device && k.cluster == cluster && k.shared == shared) {
      clusters = k.clusters;
      return cudaSuccess;
    }
  }
  failed = allow_shared_memory(kernel, shared);
  const Configuration one(cluster, threads, shared, cluster, nullptr);
  if (failed == cudaSuccess) failed = cudaOccupancyMaxActiveClusters(&clusters, of, &one.config);
  if (failed == cudaSuccess) known.push_back({of, device, cluster, shared, clusters});
  return failed;
}

// `shared` is in bytes; `cluster` consecutive blocks form a thread block cluster (sm_90 and up where it is not 1).
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, int cluster,
                   cudaStream_t stream, const std::remove_cv_t<Parameters>&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  const cudaError_t refused = allow_shared_memory(kernel, shared);
  if (refused != cudaSuccess) return refused;
  const Configuration all(blocks, threads, shared, cluster, stream);
  return cudaLaunchKernelEx(&all.config, kernel, arguments...);
}

}  // namespace deepcontrol::cuda
