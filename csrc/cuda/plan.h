// How the work of center and center_backward is cut into blocks. Plain C++: a plan can be looked at without a GPU.
#pragma once

#include "../types.h"

namespace deepcontrol::cuda {

constexpr int kLogThreads = 8;
constexpr int kThreads = 1 << kLogThreads;
constexpr int kWarps = kThreads / 32;

// Blocks a multiprocessor that plans aim at, so that some load while others store.
constexpr int kPlannedBlocks = 3;

// Loads that are under way together, where a loop cannot leave that to the compiler: it waits for each of a remainder.
constexpr int kBatch = 8;

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that sum_rows needs where each thread holds sums of n channels, those of column threadIdx.x % columns.
constexpr int row_groups(int columns) { return columns <= 32 ? kWarps : kThreads / columns; }
constexpr int scratch_elements(int columns, int n) { return row_groups(columns) * columns * n; }

struct Device {
  int capability;         // 90 for 9.0
  int processors;         // streaming multiprocessors
  int64_t shared_memory;  // bytes that one block can have
  bool sm90a = false;     // there is code for this GPU that has the instructions of 9.0 alone
};

// How center and center_backward are cut into blocks; made by plan_center.
struct CenterPlan {
  bool vectorized;  // 16 bytes an access, else one element
  int log_lanes;    // of the threads side by side: along a row of channels, or along one map
  int tiles;        // of channels, where they are innermost
  int maps;         // of a block, where the pixels are innermost
  int64_t part;     // pixels of a map that one block has
  int parts;        // blocks that share a map
  bool cluster;     // they are a thread block cluster; else, if there are several, sums and apply are two launches
  int64_t blocks;
  int64_t shared;  // bytes a block

  constexpr int lanes() const { return 1 << log_lanes; }
  // Elements of partial sums between two launches, for one kind of sum.
  int64_t workspace(const Maps& of) const { return parts > 1 && !cluster ? of.samples * of.channels * parts : 0; }
};

// What a plan depends on.
struct CenterCase {
  Maps maps;
  Dtype dtype;
  bool aligned;  // every tensor starts at a multiple of 16 bytes
  bool centred;  // sums are needed before anything can be written
  int staged;    // tensors that stay on chip between sums and apply
  bool bits;     // and the bits of the activation with them
  int kinds;     // of sums
};
CenterPlan plan_center(const CenterCase& c, const Device& device);

}  // namespace deepcontrol::cuda
