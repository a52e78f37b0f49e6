// Runs kernels on the CPU as a GPU might at its most unfriendly; emulator.cpp says how.
#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <source_location>

#include "products.h"

namespace host_cuda {

using Where = std::source_location;

// What the lanes of a warp do together. From load_matrices on they all must come, and to the same place.
enum class Kind {
  warp_barrier,
  ballot,
  any,
  all,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  load_matrices,
  load_matrices_transposed,
  multiply_add_bf16,
  multiply_add_f16,
  multiply_add_tf32,
  products_begin,
  products_commit,
  products_wait,
  group_product,
  set_registers,
  group_barrier,
};

// For the thread that runs.
int lane();
unsigned char* shared_memory();
void block_barrier(Where where);
// The value of lane `source` for a shuffle, for the others the lanes of the mask that gave something other than zero.
uint64_t collective(Kind kind, unsigned mask, uint64_t value, int source, Where where);
// `row` is a lane's address, `words` what it gets.
void load_matrices(Kind kind, unsigned* words, const void* row, Where where);
void multiply_add(Kind kind, float* d, const unsigned* a, const unsigned* b, Where where);
// Where nothing is `there`, zeros.
void copy_async(void* shared, const void* global, bool there, Where where);
void copy_async_commit();
void copy_async_wait(size_t pending);
void cluster_arrive(Where where);
void cluster_wait(Where where);
// Where the cluster's block `rank` has what this block has at `own`.
const void* of_cluster(const void* own, size_t bytes, unsigned rank, Where where,
                       const char* name = "load_from_cluster");

// As csrc/cuda/ptx_sm90.cuh has them. Boxes are of im2col where there are offsets, `ahead`.
unsigned shared_address(const void* shared, Where where);
void init_barrier(void* barrier, unsigned arrivals, Where where);
void fence_barriers(Where where);
void arrive(void* barrier, Where where);
void arrive_and_expect(void* barrier, unsigned bytes, Where where);
// At the barrier of the cluster's block `rank`; what others than its own block brought, only wait_barrier_of_cluster
// sees.
void arrive_in_cluster(void* own, unsigned rank, Where where);
void wait_barrier(void* barrier, unsigned parity, bool of_cluster, Where where);
void fence_async_proxy(Where where);
void prefetch_tensor_map(const void* map, Where where);
void load_box(void* shared, const void* map, void* barrier, std::initializer_list<int> at,
              std::initializer_list<unsigned> ahead, Where where);
void products(Kind kind, int pending, Where where);
void multiply_add_group(Format format, int columns, float* d, uint64_t a, uint64_t b, Where where);
void set_registers(int registers, bool more, Where where);
void sync_group(int number, int threads, Where where);

// Runs all threads of all blocks; each calls run(data).
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(void*), void* data);

// The only one that kernels may be launched on: a launch on the default stream is an error.
cudaStream_t current_stream();

}  // namespace host_cuda
