// What csrc/cuda/ptx_sm90.cuh has, which this guard keeps out; language.h includes it.
#pragma once

#define DEEPCONTROL_PTX_SM90

#include <cuda.h>

namespace deepcontrol::cuda {

using SourcePlace = std::source_location;

inline unsigned shared_address(const void* shared, SourcePlace where = SourcePlace::current()) {
  return host_cuda::shared_address(shared, where);
}

inline void init_barrier(uint64_t* barrier, unsigned arrivals, SourcePlace where = SourcePlace::current()) {
  host_cuda::init_barrier(barrier, arrivals, where);
}
inline void fence_barriers(SourcePlace where = SourcePlace::current()) { host_cuda::fence_barriers(where); }
inline void arrive(uint64_t* barrier, SourcePlace where = SourcePlace::current()) {
  host_cuda::arrive(barrier, where);
}
inline void arrive_and_expect(uint64_t* barrier, unsigned bytes, SourcePlace where = SourcePlace::current()) {
  host_cuda::arrive_and_expect(barrier, bytes, where);
}
inline void wait_barrier(uint64_t* barrier, unsigned parity, SourcePlace where = SourcePlace::current()) {
  host_cuda::wait_barrier(barrier, parity, false, where);
}
inline void arrive_in_cluster(uint64_t* own, unsigned rank, SourcePlace where = SourcePlace::current()) {
  host_cuda::arrive_in_cluster(own, rank, where);
}
inline void wait_barrier_of_cluster(uint64_t* barrier, unsigned parity, SourcePlace where = SourcePlace::current()) {
  host_cuda::wait_barrier(barrier, parity, true, where);
}
inline void fence_async_proxy(SourcePlace where = SourcePlace::current()) { host_cuda::fence_async_proxy(where); }

inline void prefetch_tensor_map(const CUtensorMap* map, SourcePlace where = SourcePlace::current()) {
  host_cuda::prefetch_tensor_map(map, where);
}
inline void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z,
                     SourcePlace where = SourcePlace::current()) {
  host_cuda::load_box(shared, map, barrier, {x, y, z}, {}, where);
}
inline void load_pixels(void* shared, const CUtensorMap* map, uint64_t* barrier, int channel, int w, int h, int n,
                        unsigned short ahead_w, unsigned short ahead_h, SourcePlace where = SourcePlace::current()) {
  host_cuda::load_box(shared, map, barrier, {channel, w, h, n}, {ahead_w, ahead_h}, where);
}
inline void load_pixels(void* shared, const CUtensorMap* map, uint64_t* barrier, int channel, int w, int h, int d,
                        int n, unsigned short ahead_w, unsigned short ahead_h, unsigned short ahead_d,
                        SourcePlace where = SourcePlace::current()) {
  host_cuda::load_box(shared, map, barrier, {channel, w, h, d, n}, {ahead_w, ahead_h, ahead_d}, where);
}

inline uint64_t matrix_descriptor(const void* shared, SourcePlace where = SourcePlace::current()) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return uint64_t((shared_address(shared, where) & 0x3ffff) >> 4) | uint64_t{1} << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}

inline void products_begin(SourcePlace where = SourcePlace::current()) {
  host_cuda::products(host_cuda::Kind::products_begin, 0, where);
}
inline void products_commit(SourcePlace where = SourcePlace::current()) {
  host_cuda::products(host_cuda::Kind::products_commit, 0, where);
}
template <int pending>
void products_wait(SourcePlace where = SourcePlace::current()) {
  host_cuda::products(host_cuda::Kind::products_wait, pending, where);
}
// Of the compiler alone.
template <int n>
void products_done(float (&)[n]) {}
template <class T, int columns>
void multiply_add_group(float (&d)[columns / 2], uint64_t a, uint64_t b, SourcePlace where = SourcePlace::current()) {
  static_assert(sizeof(T) == 2 && columns % 8 == 0 && columns >= 8 && columns <= 256);
  using host_cuda::Format;
  host_cuda::multiply_add_group(std::is_same_v<T, __half> ? Format::f16 : Format::bf16, columns, d, a, b, where);
}

template <int registers>
void keep_registers(SourcePlace where = SourcePlace::current()) {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0);
  host_cuda::set_registers(registers, false, where);
}
template <int registers>
void take_registers(SourcePlace where = SourcePlace::current()) {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0);
  host_cuda::set_registers(registers, true, where);
}

inline void sync_group(int number, int threads, SourcePlace where = SourcePlace::current()) {
  host_cuda::sync_group(number, threads, where);
}

}  // namespace deepcontrol::cuda
