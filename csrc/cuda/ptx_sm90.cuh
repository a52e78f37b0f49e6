// The instructions of sm_90a: barriers in shared memory, the tensor memory accelerator (TMA), and matrix products of a
// warpgroup (wgmma). As ptx.cuh this is replaced as a whole by the host harness of the tests. Code for other GPUs, which
// is compiled from the same source but never chosen there, stops the kernel.
#ifndef DEEPCONTROL_PTX_SM90
#define DEEPCONTROL_PTX_SM90

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DEEPCONTROL_ASM(...) asm volatile(__VA_ARGS__)
#else
#define DEEPCONTROL_ASM(...) asm volatile("trap;")
#endif

namespace deepcontrol::cuda {

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// A barrier in shared memory completes a phase when `arrivals` have arrived and all bytes that were announced are there.
// One thread initialises it; then come fence_barriers() and __syncthreads(), or a barrier of the cluster.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the TMA and the cluster.
__device__ __forceinline__ void fence_barriers() {
  DEEPCONTROL_ASM("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces so many bytes of the TMA for this phase.
__device__ __forceinline__ void arrive_and_expect(uint64_t* barrier, unsigned bytes) {
  DEEPCONTROL_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                  : "memory");
}
#define DEEPCONTROL_WAIT(order)                                  \
  DEEPCONTROL_ASM(                                               \
      "{\n"                                                      \
      ".reg .pred done;\n"                                       \
      "again:\n"                                                 \
      "mbarrier.try_wait.parity." order ".b64 done, [%0], %1;\n" \
      "@done bra over;\n"                                        \
      "bra again;\n"                                             \
      "over:\n"                                                  \
      "}" ::"r"(shared_address(barrier)),                        \
      "r"(parity)                                                \
      : "memory")

// Waits until the phase of this parity (0 for the first, then 1, 0, ...) is complete. The phase before the first counts as
// complete, with parity 1.
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, unsigned parity) { DEEPCONTROL_WAIT("shared::cta"); }

// Between blocks of a cluster: arrives at the barrier that block `rank` has where this block has `own`, after all that this
// thread did or saw; and waits at the own one until what other blocks did before they arrived is visible.
__device__ __forceinline__ void arrive_in_cluster(uint64_t* own, unsigned rank) {
  DEEPCONTROL_ASM(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(own)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void wait_barrier_of_cluster(uint64_t* barrier, unsigned parity) {
  DEEPCONTROL_WAIT("acquire.cluster.shared::cta");
}
#undef DEEPCONTROL_WAIT

// What this thread did to shared memory comes before what the TMA does to it afterwards.
__device__ __forceinline__ void fence_async_proxy() { DEEPCONTROL_ASM("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  DEEPCONTROL_ASM("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor of three dimensions, innermost first, to shared memory. One thread calls it. `barrier` completes when
// it and all else is there that was announced.
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
  DEEPCONTROL_ASM(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// Rows of channels, one for each pixel of a convolution's output from a first one on, that one tap sees; `map` was made by
// cuTensorMapEncodeIm2col. The first pixel is given by where the tap at the origin sees the input (so it may be negative),
// the tap by its distance from that. Channels and pixels outside of the tensor are zero.
__device__ __forceinline__ void load_pixels(void* shared, const CUtensorMap* map, uint64_t* barrier, int channel, int w,
                                            int h, int n, unsigned short ahead_w, unsigned short ahead_h) {
  DEEPCONTROL_ASM(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(w), "r"(h), "r"(n), "h"(ahead_w), "h"(ahead_h)
      : "memory");
}
__device__ __forceinline__ void load_pixels(void* shared, const CUtensorMap* map, uint64_t* barrier, int channel, int w,
                                            int h, int d, int n, unsigned short ahead_w, unsigned short ahead_h,
                                            unsigned short ahead_d) {
  DEEPCONTROL_ASM(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(w), "r"(h), "r"(d), "r"(n), "h"(ahead_w), "h"(ahead_h),
      "h"(ahead_d)
      : "memory");
}

// A matrix in shared memory as wgmma is told of it: rows of 128 bytes along K, 8 of them 1024 bytes, which is what they
// are aligned to, 16-byte chunks swizzled as CU_TENSOR_MAP_SWIZZLE_128B does. Steps along K within the 128 bytes are added
// to the address.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return uint64_t((shared_address(shared) & 0x3ffff) >> 4) | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// Around products: before the first, and where registers of the sum were changed by others than products; behind those
// that make a group; and until no more than `pending` groups are under way. Sums and operands stay untouched until then.
__device__ __forceinline__ void products_begin() { DEEPCONTROL_ASM("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { DEEPCONTROL_ASM("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void products_wait() {
  DEEPCONTROL_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// After a wait: keeps the compiler from reading sums ahead of it, since the wait does not name them.
template <int n>
__device__ __forceinline__ void products_done(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d += a * b^T, 64 x columns, of a 64 x 16 and b columns x 16 of T, 16 bits each; all 128 threads of a warpgroup. A thread
// has of row 16 * warp + lane / 4 (+ 8) the columns 8 j + 2 (lane % 4) and the next in d[4 j], d[4 j + 1] (+ 2).
#define DEEPCONTROL_SUMS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define DEEPCONTROL_SUMS_32(i) \
  DEEPCONTROL_SUMS_8(i), DEEPCONTROL_SUMS_8(i + 8), DEEPCONTROL_SUMS_8(i + 16), DEEPCONTROL_SUMS_8(i + 24)
#define DEEPCONTROL_NAMES_32                                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define DEEPCONTROL_NAMES_64                                                                                    \
  DEEPCONTROL_NAMES_32                                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Behind the descriptors: add to d, signs of a and b, neither of which is transposed.
#define DEEPCONTROL_PRODUCT_64(type)                                                                    \
  DEEPCONTROL_ASM("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" DEEPCONTROL_NAMES_32 \
                    "}, %32, %33, 1, 1, 1, 0, 0;"                                                       \
                    : DEEPCONTROL_SUMS_32(0)                                                            \
                    : "l"(a), "l"(b))
#define DEEPCONTROL_PRODUCT_128(type)                                                                    \
  DEEPCONTROL_ASM("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" DEEPCONTROL_NAMES_64 \
                    "}, %64, %65, 1, 1, 1, 0, 0;"                                                        \
                    : DEEPCONTROL_SUMS_32(0), DEEPCONTROL_SUMS_32(32)                                    \
                    : "l"(a), "l"(b))
template <class T, int columns>
__device__ __forceinline__ void multiply_add_group(float (&d)[columns / 2], uint64_t a, uint64_t b) {
  static_assert(columns == 64 || columns == 128);
  constexpr bool half = std::is_same_v<T, __half>;
  if constexpr (columns == 64 && half) {
    DEEPCONTROL_PRODUCT_64("f16");
  } else if constexpr (columns == 64) {
    DEEPCONTROL_PRODUCT_64("bf16");
  } else if constexpr (half) {
    DEEPCONTROL_PRODUCT_128("f16");
  } else {
    DEEPCONTROL_PRODUCT_128("bf16");
  }
}
#undef DEEPCONTROL_SUMS_8
#undef DEEPCONTROL_SUMS_32
#undef DEEPCONTROL_NAMES_32
#undef DEEPCONTROL_NAMES_64
#undef DEEPCONTROL_PRODUCT_64
#undef DEEPCONTROL_PRODUCT_128

// Hands registers of this warpgroup back, or takes more; a multiple of 8, all warps of the group.
template <int registers>
__device__ __forceinline__ void keep_registers() {
  DEEPCONTROL_ASM("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  DEEPCONTROL_ASM("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// A barrier of `threads` threads of the block, whole warps; `number` is 1 to 15.
__device__ __forceinline__ void sync_group(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace deepcontrol::cuda

#undef DEEPCONTROL_ASM

#endif
