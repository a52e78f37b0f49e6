// Runs kernels on the CPU as a GPU might at its most unfriendly; emulator.cpp says how.
#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <source_location>

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
const void* of_cluster(const void* own, size_t bytes, unsigned rank, Where where);

// Runs all threads of all blocks; each calls run(data).
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(void*), void* data);

// The only one that kernels may be launched on: a launch on the default stream is an error.
cudaStream_t current_stream();

}  // namespace host_cuda
