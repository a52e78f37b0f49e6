// CUDA C++ for a host compiler: build.py includes this ahead of the first line of every .cu file. Types, dim3, vectors
// and qualifiers come from the CUDA toolkit's own headers, which a host compiler reads too; the rest is here.
#pragma once

// The toolkit's own forgets the types of the parameters, which it takes to be known to nvcc's code.
#define cudaLaunchKernelEx cudaLaunchKernelExWithoutTypes
#include <cuda_runtime.h>
#undef cudaLaunchKernelEx
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emulator.h"

#define __launch_bounds__(...)
// A variable of a block would be one of the whole process here.
#undef __shared__
#define __shared__ static_assert(false, "all shared memory of a kernel is dynamic_shared()");

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  host_cuda::block_barrier(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location where = std::source_location::current()) {
  host_cuda::collective(host_cuda::Kind::warp_barrier, mask, 0, 0, where);
}
// Other lanes may be elsewhere whenever one asks.
inline unsigned __activemask() { return 1u << host_cuda::lane(); }

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  return static_cast<unsigned>(host_cuda::collective(host_cuda::Kind::ballot, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return host_cuda::collective(host_cuda::Kind::any, mask, predicate != 0, 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return host_cuda::collective(host_cuda::Kind::all, mask, predicate != 0, 0, where) == mask;
}

namespace host_cuda {

template <class T>
T shuffle(Kind kind, unsigned mask, T value, int source, std::source_location where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "no shuffle of this type is emulated");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(kind, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace host_cuda

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location where = std::source_location::current()) {
  const int first = host_cuda::lane() & -width;
  return host_cuda::shuffle(host_cuda::Kind::shuffle, mask, value, first + (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 std::source_location where = std::source_location::current()) {
  const int lane = host_cuda::lane(), from = lane - static_cast<int>(distance);
  return host_cuda::shuffle(host_cuda::Kind::shuffle_up, mask, value, from < (lane & -width) ? lane : from, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   std::source_location where = std::source_location::current()) {
  const int lane = host_cuda::lane(), from = lane + static_cast<int>(distance);
  return host_cuda::shuffle(host_cuda::Kind::shuffle_down, mask, value, from >= (lane & -width) + width ? lane : from,
                            where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  std::source_location where = std::source_location::current()) {
  const int lane = host_cuda::lane(), from = lane ^ bits;
  return host_cuda::shuffle(host_cuda::Kind::shuffle_xor, mask, value, from >= (lane & -width) + width ? lane : from,
                            where);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

// The parameters of a kernel are copied for each thread, as the kernel's own.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> arguments;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto run = [](void* data) {
    const Call& call = *static_cast<Call*>(data);
    std::apply(call.kernel, call.arguments);
  };
  return host_cuda::launch(*config, reinterpret_cast<const void*>(kernel), run, &call);
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return ::cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// What csrc/cuda/ptx.cuh has, which this guard keeps out.
#define DEEPCONTROL_PTX

namespace deepcontrol::cuda {

inline unsigned char* dynamic_shared() { return host_cuda::shared_memory(); }
inline void store_16(void* global, const uint4& value) { *static_cast<uint4*>(global) = value; }
inline void prefetch_second_level(const void*) {}
inline void copy_async_16(void* shared, const void* global,
                          std::source_location where = std::source_location::current()) {
  host_cuda::copy_async(shared, global, true, where);
}
inline void copy_async_16_or_zero(void* shared, const void* global, bool there,
                                  std::source_location where = std::source_location::current()) {
  host_cuda::copy_async(shared, global, there, where);
}
inline void copy_async_commit() { host_cuda::copy_async_commit(); }
template <int pending>
void copy_async_wait() {
  host_cuda::copy_async_wait(pending);
}
inline void load_matrices(unsigned (&words)[4], const void* row,
                          std::source_location where = std::source_location::current()) {
  host_cuda::load_matrices(host_cuda::Kind::load_matrices, words, row, where);
}
inline void load_matrices_transposed(unsigned (&words)[4], const void* row,
                                     std::source_location where = std::source_location::current()) {
  host_cuda::load_matrices(host_cuda::Kind::load_matrices_transposed, words, row, where);
}
inline unsigned round_to_tf32(unsigned bits) {
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return is_nan ? 0x7fffffff : (bits + 0x1000) & ~0x1fffu;
}
template <class T>
void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                  std::source_location where = std::source_location::current()) {
  using host_cuda::Kind;
  constexpr Kind kHalf = std::is_same_v<T, __half> ? Kind::multiply_add_f16 : Kind::multiply_add_bf16;
  const unsigned b[] = {b0, b1};
  host_cuda::multiply_add(sizeof(T) == 4 ? Kind::multiply_add_tf32 : kHalf, d, a, b, where);
}
inline void cluster_arrive(std::source_location where = std::source_location::current()) {
  host_cuda::cluster_arrive(where);
}
inline void cluster_wait(std::source_location where = std::source_location::current()) {
  host_cuda::cluster_wait(where);
}
inline float load_from_cluster(const float* own, unsigned rank,
                               std::source_location where = std::source_location::current()) {
  return *static_cast<const float*>(host_cuda::of_cluster(own, sizeof(float), rank, where));
}
inline double load_from_cluster(const double* own, unsigned rank,
                                std::source_location where = std::source_location::current()) {
  return *static_cast<const double*>(host_cuda::of_cluster(own, sizeof(double), rank, where));
}

}  // namespace deepcontrol::cuda

#include "language_sm90.h"
