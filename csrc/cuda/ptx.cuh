// The instructions that CUDA C++ has no words for. The host harness of the tests (tests/host_cuda) defines the guard below
// and brings its own version of these functions; nothing else in the kernels knows of it.
#ifndef DEEPCONTROL_PTX
#define DEEPCONTROL_PTX

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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
// The same, or sixteen bytes of zero where nothing is `there`; then `global` is not read, but it must be aligned.
__device__ __forceinline__ void copy_async_16_or_zero(void* shared, const void* global, bool there) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared)), bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
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

// Tensor cores. All lanes of a warp call these together.
//
// Four matrices of 8 rows of 16 bytes from shared memory. Lane i gives the address, aligned, of row i % 8 of matrix i / 8.
// Of matrix m it gets in words[m] the elements 2 (i % 4) and the next of row i / 4, if elements have 16 bits: four bytes
// of a row in any case.
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
// The same of the matrices transposed, of 16-bit elements: in words[m] those of rows 2 (i % 4) and the next, column i / 4.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&words)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// The nearest TF32 number, ties away from zero, in the bits of a float.
__device__ __forceinline__ unsigned round_to_tf32(unsigned bits) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// d += a * b, where d is 16 x 8 floats, a is 16 x K and b K x 8 of T; K is 16, for TF32 in floats 8. With g = lane / 4
// and t = lane % 4 a lane has d (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). A word holds two neighbours along K or
// one float. Of a the words are (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), of b (t, g), (t + 4, g), where t counts
// words along K.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (sizeof(T) == 4) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
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
