// The instructions that CUDA C++ has no words for. The host harness of the tests (tests/host_cuda) defines the guard below
// and brings its own version of these functions; nothing else in the kernels knows of it.
#ifndef DEEPCONTROL_PTX
#define DEEPCONTROL_PTX

#include <cstdint>

namespace deepcontrol::cuda {

// All shared memory of a kernel is this, 16-byte aligned, of the size given at launch.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char deepcontrol_shared_memory[];
  return deepcontrol_shared_memory;
}

// One store of sixteen bytes to global memory. A plain one is now and then split into four by the compiler. It is not
// told that memory changes: nothing here reads back what it has written.
__device__ __forceinline__ void store_16(void* global, const uint4& value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w));
}

// Sixteen bytes from global to shared memory, past the registers and the first-level cache. Both addresses are
// aligned. Visible to this thread after a wait, to the others after a barrier behind it.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
// Makes one group of this thread's copies since the last commit.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until no more than `pending` of this thread's groups are under way.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ void prefetch_second_level(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Thread block clusters, sm_90 and up; below, where PTX for an older GPU may end up on a newer one, they stop the kernel
// instead of letting it go on with no sums. All threads of all blocks of a cluster arrive, then wait; what they wrote to
// shared memory before arriving is visible in the whole cluster after the wait.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  asm volatile("trap;");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  asm volatile("trap;");
#endif
}

// The value at `own`, an address in this block's shared memory, in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ float load_from_cluster(const float* own, unsigned rank) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(own));
  unsigned remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
#endif
  return value;
}
__device__ __forceinline__ double load_from_cluster(const double* own, unsigned rank) {
  double value = 0;
#if __CUDA_ARCH__ >= 900
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(own));
  unsigned remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(remote) : "memory");
#endif
  return value;
}

}  // namespace deepcontrol::cuda

#endif
