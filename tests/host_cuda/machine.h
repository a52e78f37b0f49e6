// The launch in progress, for the parts of the emulator: emulator.cpp and sm90.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "products.h"
#include "tma.h"

namespace host_cuda {

constexpr int kLanes = 32;
constexpr size_t kGroupWarps = 4;        // of a warpgroup
constexpr unsigned char kPoison = 0xff;  // NaN in every type of float

enum class State {
  ready,
  at_block_barrier,
  at_cluster_barrier,
  at_collective,
  at_memory_barrier,
  at_group_barrier,
  exited,
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
  unsigned char bytes[16];
  Where where;
};

// A box on its way to shared memory, which holds poison until it lands.
struct Load {
  Box box;
  unsigned char* to;
  std::vector<unsigned char> bytes;  // that it found
  Where where;
};

struct Thread;

// In shared memory. A phase ends when none is awaited and `announced` bytes of loads have landed; these land together.
struct MemoryBarrier {
  unsigned arrivals, awaited;
  uint64_t phase = 0;
  size_t announced = 0, loading = 0;
  std::vector<Load> loads = {};
  std::vector<Thread*> waiting = {};
  // Who has initialised it, and when in the block's count of barriers that all have passed.
  const Thread* owner;
  size_t synced;
  bool fenced = false;
  bool from_cluster = false;  // others than the own block have arrived
};

struct NamedBarrier {
  size_t threads = 0;
  std::vector<size_t> warps;  // that wait
};

// What the warps of a warpgroup must do alike: products and changes of registers.
struct Step {
  Kind kind;
  uint64_t a, b;
  Where where;
};
struct Group {
  std::vector<Step> steps;
  std::array<size_t, kGroupWarps> done{};  // by each warp
  int registers = 0;                       // of a thread; 0: as launched
};

struct Block {
  uint3 index;
  void* memory;  // where `shared` lies in
  unsigned char* shared;
  size_t first_thread;
  size_t arrived = 0;  // at the barrier
  size_t exited = 0;
  Where barrier;
  // In phases of the cluster's barrier: the last in which another block read from this one, the first in which one of
  // this block's threads left. -1: none.
  int last_read = -1;
  int first_exit = -1;
  size_t synced = 0;                            // barriers of the block, or of threads of it, that were passed
  std::map<size_t, MemoryBarrier> barriers{};  // by their place in shared memory
  std::array<NamedBarrier, 16> named{};
  std::vector<Group> groups{};
};

struct Thread {
  Block* block;
  size_t number;  // in the block
  uint3 index;
  State state;
  Where where;
  int cluster_arrivals, cluster_waits;
  std::vector<Copy> copies;    // in flight, in the order of issue
  std::vector<size_t> groups;  // for each that is committed, how many copies it holds
  size_t uncommitted;
  // What it brought to a collective and what it takes away.
  uint64_t value, result;
  int source;
  size_t barrier;  // the place of the one in shared memory that it waits for
};

// Lanes that wait for the rest of their mask.
struct Gathering {
  Kind kind;
  unsigned mask, arrived;
  Where where;  // of the first
};

// Sums of a warp that products are under way to. Its registers hold poison meanwhile.
struct Sums {
  int columns;
  std::array<float*, kLanes> registers;
  std::vector<float> values;  // 16 x columns
  size_t pending = 0;         // products
};

struct Product {
  Format format;
  std::shared_ptr<Sums> sums;
  uint64_t a, b;                     // descriptors
  std::vector<uint16_t> operands{};  // as they were at first
  Where where;
};

struct Warp {
  size_t first_thread;
  unsigned lanes;  // that have not exited
  unsigned ready = 0;
  size_t place = 0;  // in the list of warps that can run
  std::vector<Gathering> gatherings = {};  // of separate lanes
  bool products_begun = false;
  std::vector<Product> products = {};       // under way, in the order of issue
  std::vector<size_t> product_groups = {};  // for each that is committed, how many products it holds
  size_t uncommitted = 0;
};

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du; }
  unsigned below(size_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<unsigned>((state_ >> 32) * n >> 32);
  }

 private:
  uint64_t state_ = 1;
};

struct Gpu {
  int capability;        // 90 for 9.0
  size_t shared_memory;  // bytes that a block can have
  int processors;
};

extern Gpu gpu;
extern Random random_number;
extern size_t shared_bytes, threads_of_block;
extern std::vector<Block> blocks;
extern std::vector<Thread> threads;
extern std::vector<Warp> warps;
extern Thread* current;

bool same(const Where& a, const Where& b);
std::string describe(uint3 index);
std::string describe(const char* file, unsigned line);
std::string describe(const Where& where);
// End the launch.
[[noreturn]] void fail_here(const std::string& why, const std::string& place);
[[noreturn]] void fail_here(const std::string& why, const Where& where);
Warp& warp_of(const Thread& thread);
void make_ready(Thread& thread);
// Suspends the current thread.
void wait_as(State state, const Where& where);

// In sm90.cpp: what the last lane does when all of a warp have come. Of sync_group: whether they go on.
void finish_group_product(Thread* lanes, const Where& where);
void finish_products_step(Kind kind, Thread* lanes, const Where& where);
void finish_set_registers(Thread* lanes, const Where& where);
bool finish_group_barrier(Thread* lanes, const Where& where);
// At the end of a thread, and of its block: what is still under way.
void check_exit(const Thread& thread);
std::string why_not_end(const Block& block);
// What a thread that waits for a barrier in shared memory waits for.
std::string describe_wait(const Thread& thread);

}  // namespace host_cuda
