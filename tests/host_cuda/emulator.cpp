// Each CUDA thread is a fiber that runs until it must wait for others. Which one runs next is random, and so is whether
// a warp is let run ahead of the others or all keep pace; so a barrier that is missing lets some thread see memory too
// early in some order. Clusters come one after another, their blocks at the same time. Shared memory holds NaN until it
// is written. What a copy to shared memory brings arrives at the last moment that is allowed. What capability 9.0 has
// beyond clusters is in sm90.cpp.
//
// What would hang or be undefined on a GPU ends the launch with a message that says where. Races in global memory are
// not looked for.

#include "emulator.h"

#include <cuda.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "machine.h"
#include "products.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace host_cuda {

Gpu gpu{90, 227 * 1024, 132};
Random random_number;
size_t shared_bytes, threads_of_block;
std::vector<Block> blocks;
std::vector<Thread> threads;
std::vector<Warp> warps;
Thread* current = nullptr;

namespace {

constexpr size_t kWithoutAsking = 48 * 1024;
constexpr size_t kLargestCluster = 8;
// Shared memory is declared to be aligned to 16 bytes, and here it is to no more.
constexpr size_t kAlignment = 1024;
#ifdef HOST_CUDA_SANITIZED
constexpr size_t kGuard = 0;  // the sanitizer watches what is behind
#else
constexpr size_t kGuard = 1024;
#endif

const char* name_of(State state) {
  switch (state) {
    case State::ready: return "are ready";
    case State::at_block_barrier: return "wait in __syncthreads";
    case State::at_cluster_barrier: return "wait in cluster_wait";
    case State::at_collective: return "wait in a collective of their warp";
    case State::at_memory_barrier: return "wait for a barrier";
    case State::at_group_barrier: return "wait in sync_group";
    default: return "have exited";
  }
}

const char* name_of(Kind kind) {
  constexpr const char* kNames[] = {"__syncwarp",
                                    "__ballot_sync",
                                    "__any_sync",
                                    "__all_sync",
                                    "__shfl_sync",
                                    "__shfl_up_sync",
                                    "__shfl_down_sync",
                                    "__shfl_xor_sync",
                                    "load_matrices",
                                    "load_matrices_transposed",
                                    "multiply_add<bf16>",
                                    "multiply_add<f16>",
                                    "multiply_add<f32>",
                                    "products_begin",
                                    "products_commit",
                                    "products_wait",
                                    "multiply_add_group",
                                    "a change of registers",
                                    "sync_group"};
  return kNames[static_cast<int>(kind)];
}

struct Counts {
  int64_t launches, blocks, clusters;
};

// What one may set, and what is counted.
std::mutex mutex;
uint64_t seed = 0, launches = 0;
int device = 0;  // another one for each GPU that is configured
std::map<const void*, size_t> allowed;  // dynamic shared memory that was asked for, of each kernel
std::map<const void*, Counts> counts;
std::string message;
cudaError_t last_error = cudaSuccess;

// The launch in progress.
unsigned pace;  // 0: a warp runs as long as it can; else a new one is chosen once in that many times
size_t warps_of_block;
size_t shared_shift;  // of the blocks' shared memory behind a multiple of 1024
size_t live;  // threads that have not exited
int cluster_phase;
size_t cluster_arrived;
bool failed;
void (*run_kernel)(void*);
void* kernel_data;
std::vector<size_t> ready_warps;
std::vector<std::unique_ptr<Fiber>> fibers;

std::string file_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// Of "void space::(anonymous namespace)::f<int>(int, float)" only "f<int>".
std::string short_name(std::string name) {
  size_t end = name.size();
  int depth = 0;
  while (end > 0) {
    const char c = name[--end];
    depth += (c == ')') - (c == '(');
    if (depth <= 0) break;
  }
  if (end > 0 && name.back() == ')') name.resize(end);
  const std::string unnamed = "(anonymous namespace)::";
  if (const size_t begin = name.find(unnamed); begin != std::string::npos) name.erase(0, begin + unnamed.size());
  return name;
}

// Kernels are seldom exported, so the dynamic linker knows no name for them; the symbol table of the file does.
std::map<uintptr_t, std::string> read_symbols(const char* library) {
  std::map<uintptr_t, std::string> symbols;
  FILE* lines = popen(("nm -l --defined-only '" + std::string(library) + "' 2>/dev/null").c_str(), "r");
  if (!lines) return symbols;
  char line[8192], name[8192], place[8192], type;
  unsigned long address;
  while (std::fgets(line, sizeof(line), lines)) {
    if (std::sscanf(line, "%lx %c %s %[^:]", &address, &type, name, place) != 4) continue;
    int status;
    char* plain = abi::__cxa_demangle(name, nullptr, nullptr, &status);
    symbols[address] = short_name(plain ? plain : name) + " of " + file_name(place);
    std::free(plain);
  }
  pclose(lines);
  return symbols;
}

std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info)) return "kernel";
  static const std::map<uintptr_t, std::string> symbols = read_symbols(info.dli_fname);
  const uintptr_t offset = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  const auto found = symbols.find(offset);
  return found == symbols.end() ? "kernel" : found->second;
}

cudaError_t refuse(cudaError_t error, const void* kernel, const std::string& why) {
  message = name_of(kernel) + ": " + why;
  return last_error = error;
}

// Ends the launch.
void fail(const std::string& why) {
  failed = true;
  message = why;
}

size_t number_of(const Thread& thread) { return static_cast<size_t>(&thread - threads.data()); }
size_t index_of_warp(const Thread& thread) {
  return number_of(thread) / threads_of_block * warps_of_block + thread.number / kLanes;
}

Thread& take_next(size_t& last_warp) {
  const bool stay = warps[last_warp].ready != 0 && (pace == 0 || random_number.below(pace) != 0);
  if (!stay) last_warp = ready_warps[random_number.below(ready_warps.size())];
  Warp& warp = warps[last_warp];
  const unsigned turn = random_number.below(kLanes);
  const unsigned lane = (std::countr_zero(std::rotr(warp.ready, static_cast<int>(turn))) + turn) % kLanes;
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) {
    warps[ready_warps.back()].place = warp.place;
    ready_warps[warp.place] = ready_warps.back();
    ready_warps.pop_back();
  }
  return threads[warp.first_thread + lane];
}

}  // namespace

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string describe(uint3 index) {
  std::string text = std::to_string(index.x);
  if (gridDim.y > 1 || gridDim.z > 1) text += "," + std::to_string(index.y) + "," + std::to_string(index.z);
  return text;
}

std::string describe(const char* file, unsigned line) { return file_name(file) + ":" + std::to_string(line); }
std::string describe(const Where& where) { return describe(where.file_name(), where.line()); }

void fail_here(const std::string& why, const std::string& place) {
  const std::string thread = "thread " + std::to_string(current->number);
  fail("block " + describe(current->block->index) + ", " + thread + ", " + place + ": " + why);
  for (;;) Fiber::suspend();
}
void fail_here(const std::string& why, const Where& where) { fail_here(why, describe(where)); }

Warp& warp_of(const Thread& thread) { return warps[index_of_warp(thread)]; }

void make_ready(Thread& thread) {
  thread.state = State::ready;
  Warp& warp = warp_of(thread);
  if (warp.ready == 0) {
    warp.place = ready_warps.size();
    ready_warps.push_back(index_of_warp(thread));
  }
  warp.ready |= 1u << thread.number % kLanes;
}

void wait_as(State state, const Where& where) {
  current->state = state;
  current->where = where;
  Fiber::suspend();
}

namespace {

// What lanes bring to collectives of tensor cores; it lies on their stacks.
struct MatrixRow {
  const unsigned char* address;
  unsigned* words;
};
struct Factors {
  const unsigned* a;
  const unsigned* b;
  float* d;
};

void finish_loads(bool transposed, const Thread* lanes) {
  const MatrixRow* rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<const MatrixRow*>(lanes[i].value);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(elements[r], rows[8 * matrix + r]->address, sizeof(elements[r]));
    for (int i = 0; i < kLanes; ++i) {
      const int across = i / 4, along = i % 4 * 2;
      const uint16_t low = transposed ? elements[along][across] : elements[across][along];
      const uint16_t high = transposed ? elements[along + 1][across] : elements[across][along + 1];
      rows[i]->words[matrix] = low | unsigned{high} << 16;
    }
  }
}

void finish_products(Format format, const Thread* lanes) {
  unsigned a[kLanes][4], b[kLanes][2];
  float d[kLanes][4];
  const Factors* factors[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    factors[i] = reinterpret_cast<const Factors*>(lanes[i].value);
    std::memcpy(a[i], factors[i]->a, sizeof(a[i]));
    std::memcpy(b[i], factors[i]->b, sizeof(b[i]));
    std::memcpy(d[i], factors[i]->d, sizeof(d[i]));
  }
  multiply_add_warp(format, d, a, b);
  for (int i = 0; i < kLanes; ++i) std::memcpy(factors[i]->d, d[i], sizeof(d[i]));
}

void finish_collective(Kind kind, unsigned mask, Thread* lanes, const Where& where) {
  switch (kind) {
    case Kind::load_matrices: finish_loads(false, lanes); break;
    case Kind::load_matrices_transposed: finish_loads(true, lanes); break;
    case Kind::multiply_add_bf16: finish_products(Format::bf16, lanes); break;
    case Kind::multiply_add_f16: finish_products(Format::f16, lanes); break;
    case Kind::multiply_add_tf32: finish_products(Format::tf32, lanes); break;
    case Kind::products_begin:
    case Kind::products_commit:
    case Kind::products_wait: finish_products_step(kind, lanes, where); break;
    case Kind::group_product: finish_group_product(lanes, where); break;
    case Kind::set_registers: finish_set_registers(lanes, where); break;
    case Kind::group_barrier:
      if (!finish_group_barrier(lanes, where)) return;
      break;
    default: break;
  }
  uint64_t ballot = 0;
  for (int i = 0; i < kLanes; ++i) ballot |= uint64_t{(mask >> i & 1) && lanes[i].value} << i;
  for (int i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    const int source = lanes[i].source;
    const bool defined = source >= 0 && source < kLanes && (mask >> source & 1);
    lanes[i].result = kind < Kind::shuffle ? ballot : defined ? lanes[source].value : ~uint64_t{0};
    make_ready(lanes[i]);
  }
}

void release_block(Block& block) {
  block.arrived = 0;
  ++block.synced;
  for (size_t i = 0; i < threads_of_block; ++i) make_ready(threads[block.first_thread + i]);
}

// All threads in groups of those that are in the same state at the same place.
std::string describe_deadlock() {
  std::ostringstream text;
  text << "deadlock";
  size_t shown = 0;
  for (const Block& block : blocks) {
    if (block.exited == threads_of_block) continue;
    if (++shown > 3) break;
    text << (shown == 1 ? ": " : "; ") << "block " << describe(block.index) << ":";
    const Thread* first = &threads[block.first_thread];
    for (size_t begin = 0, end; begin < threads_of_block; begin = end) {
      const Thread& thread = first[begin];
      const auto alike = [&](const Thread& other) {
        return other.state == thread.state && (thread.state == State::exited || same(other.where, thread.where));
      };
      for (end = begin + 1; end < threads_of_block && alike(first[end]); ++end) {
      }
      text << (begin == 0 ? " " : ", ") << "threads " << begin << " to " << end - 1 << " " << name_of(thread.state);
      if (thread.state == State::exited) continue;
      text << " (" << describe(thread.where);
      if (thread.state == State::at_memory_barrier) text << ", " << describe_wait(thread);
      text << ")";
    }
  }
  return text.str();
}

void exit_thread() {
  Thread& thread = *current;
  Block& block = *thread.block;
  if (!thread.copies.empty()) {
    fail_here("exits before it waited for this asynchronous copy", thread.copies.front().where);
  }
  if (thread.cluster_arrivals != thread.cluster_waits) {
    fail_here("exits between cluster_arrive, this one, and cluster_wait", thread.where);
  }
  check_exit(thread);
  if (block.first_exit < 0 || thread.cluster_waits < block.first_exit) block.first_exit = thread.cluster_waits;
  thread.state = State::exited;
  warp_of(thread).lanes &= ~(1u << thread.number % kLanes);
  --live;
  if (++block.exited < threads_of_block) return;
  for (size_t i = 0; i < kGuard; ++i) {
    if (block.shared[shared_bytes + i] != kPoison) {
      const std::string where = std::to_string(shared_bytes) + " bytes of shared memory, at byte ";
      return fail("block " + describe(block.index) + ": something was written behind its " + where +
                  std::to_string(shared_bytes + i));
    }
  }
  if (const std::string why = why_not_end(block); !why.empty()) {
    return fail("block " + describe(block.index) + ": " + why);
  }
  std::memset(block.shared, kPoison, shared_bytes);
}

void run_thread() {
  run_kernel(kernel_data);
  exit_thread();
}

void run_cluster() {
  size_t warp = random_number.below(warps.size());
  while (live > 0 && !failed) {
    if (ready_warps.empty()) return fail(describe_deadlock());
    Thread& thread = take_next(warp);
    current = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    fibers[number_of(thread)]->resume();
  }
  for (const Block& block : blocks) {
    if (!failed && block.last_read >= block.first_exit) {
      fail("block " + describe(block.index) + ": a block of its cluster reads its shared memory, and no " +
           "cluster_arrive behind that and cluster_wait keep it from ending before");
    }
  }
}

// The cluster whose first block is number `first` in the grid.
void set_up_cluster(size_t first, size_t size) {
  blocks.clear();
  blocks.reserve(size);
  warps.clear();
  ready_warps.clear();
  threads.resize(std::max(threads.size(), size * threads_of_block));
  while (fibers.size() < size * threads_of_block) {
    fibers.push_back(std::make_unique<Fiber>(&run_thread, fibers.size()));
  }
  live = size * threads_of_block;
  cluster_phase = 0;
  cluster_arrived = 0;
  for (size_t b = 0; b < size; ++b) {
    Block& block = blocks.emplace_back();
    const size_t number = first + b;
    block.index = {static_cast<unsigned>(number % gridDim.x), static_cast<unsigned>(number / gridDim.x % gridDim.y),
                   static_cast<unsigned>(number / gridDim.x / gridDim.y)};
    // Exactly as large as asked for, so that the sanitizer sees an access behind it.
    if (posix_memalign(&block.memory, kAlignment, shared_shift + shared_bytes + kGuard) != 0) throw std::bad_alloc();
    block.shared = static_cast<unsigned char*>(block.memory) + shared_shift;
    std::memset(block.shared, kPoison, shared_bytes + kGuard);
    block.first_thread = b * threads_of_block;
    for (size_t w = 0; w < warps_of_block; ++w) {
      const size_t lanes = std::min<size_t>(kLanes, threads_of_block - w * kLanes);
      warps.push_back({block.first_thread + w * kLanes, ~0u >> (kLanes - lanes)});
    }
    for (size_t i = 0; i < threads_of_block; ++i) {
      Thread& thread = threads[block.first_thread + i];
      thread.block = &block;
      thread.number = i;
      thread.index = {static_cast<unsigned>(i % blockDim.x), static_cast<unsigned>(i / blockDim.x % blockDim.y),
                      static_cast<unsigned>(i / blockDim.x / blockDim.y)};
      thread.cluster_arrivals = thread.cluster_waits = 0;
      thread.copies.clear();
      thread.groups.clear();
      thread.uncommitted = 0;
    }
  }
  for (size_t i = 0; i < live; ++i) make_ready(threads[i]);
}

void tear_down_cluster() {
  for (Block& block : blocks) std::free(block.memory);
  if (!failed) return;
  for (size_t i = 0; i < blocks.size() * threads_of_block; ++i) fibers[i]->abandon();
}

}  // namespace

int lane() { return static_cast<int>(current->number % kLanes); }

unsigned char* shared_memory() { return current->block->shared; }

void block_barrier(Where where) {
  Block& block = *current->block;
  if (block.arrived > 0 && !same(block.barrier, where)) {
    fail_here("__syncthreads here, while others of the block wait in the one at " + describe(block.barrier), where);
  }
  block.barrier = where;
  if (++block.arrived == threads_of_block) {
    release_block(block);
    Fiber::suspend();
  } else {
    wait_as(State::at_block_barrier, where);
  }
}

uint64_t collective(Kind kind, unsigned mask, uint64_t value, int source, Where where) {
  Thread& self = *current;
  Warp& warp = warp_of(self);
  const unsigned own = 1u << lane();
  const auto fail_because = [&](const std::string& why) { fail_here(name_of(kind) + why, where); };
  if (!(mask & own)) fail_because(": the mask leaves out the calling lane");
  if (mask & ~warp.lanes) fail_because(": the mask names lanes that have exited or never were");
  self.value = value;
  self.source = source;
  self.state = State::at_collective;
  self.where = where;
  auto found = warp.gatherings.begin();
  while (found != warp.gatherings.end() && !(found->mask & mask)) ++found;
  if (found == warp.gatherings.end()) found = warp.gatherings.insert(found, {kind, mask, 0, where});
  if (found->kind != kind || found->mask != mask) {
    fail_because(std::string(" meets ") + name_of(found->kind) + " of other lanes at " + describe(found->where) +
                 (found->mask != mask ? " with another mask" : ""));
  }
  if (kind >= Kind::load_matrices && !same(found->where, where)) {
    fail_because(", while other lanes wait in the one at " + describe(found->where));
  }
  found->arrived |= own;
  if (found->arrived == mask) {
    warp.gatherings.erase(found);
    finish_collective(kind, mask, &threads[warp.first_thread], where);
  }
  Fiber::suspend();
  return self.result;
}

// Where sixteen bytes of shared memory are for an instruction that is called `name`.
const unsigned char* check_shared(const char* name, const void* shared, const Where& where) {
  const auto* address = static_cast<const unsigned char*>(shared);
  const ptrdiff_t offset = address - current->block->shared;
  if (offset < 0 || static_cast<size_t>(offset) + 16 > shared_bytes) {
    fail_here(std::string(name) + " byte " + std::to_string(offset) + " of " + std::to_string(shared_bytes) +
                  " of shared memory",
              where);
  }
  if (offset % 16 != 0) {
    fail_here(std::string(name) + " byte " + std::to_string(offset) + " of shared memory, no multiple of 16", where);
  }
  return address;
}

void load_matrices(Kind kind, unsigned* words, const void* row, Where where) {
  const MatrixRow own{check_shared("load_matrices from", row, where), words};
  collective(kind, ~0u, reinterpret_cast<uint64_t>(&own), 0, where);
}

void multiply_add(Kind kind, float* d, const unsigned* a, const unsigned* b, Where where) {
  const Factors own{a, b, d};
  collective(kind, ~0u, reinterpret_cast<uint64_t>(&own), 0, where);
}

void copy_async(void* shared, const void* global, bool there, Where where) {
  Thread& thread = *current;
  check_shared("copy_async_16 to", shared, where);
  auto* to = static_cast<unsigned char*>(shared);
  auto* from = static_cast<const unsigned char*>(global);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail_here("copy_async_16 from an address that is no multiple of 16", where);
  }
  Copy& copy = thread.copies.emplace_back(Copy{to, there ? from : nullptr, {}, where});
  if (there) std::memcpy(copy.bytes, from, 16);
  std::memset(to, kPoison, 16);
  ++thread.uncommitted;
}

void copy_async_commit() {
  current->groups.push_back(current->uncommitted);
  current->uncommitted = 0;
}

void copy_async_wait(size_t pending) {
  Thread& thread = *current;
  size_t done = 0, groups = 0;
  for (; thread.groups.size() - groups > pending; ++groups) done += thread.groups[groups];
  for (size_t i = 0; i < done; ++i) {
    const Copy& copy = thread.copies[i];
    if (copy.from && std::memcmp(copy.bytes, copy.from, 16) != 0) {
      fail_here("the source of this asynchronous copy changed before its end", copy.where);
    }
    for (int j = 0; j < 16; ++j) {
      if (copy.to[j] != kPoison) fail_here("something else was written where this asynchronous copy goes", copy.where);
    }
    std::memcpy(copy.to, copy.bytes, 16);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(done));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + static_cast<ptrdiff_t>(groups));
}

// Before 9.0 these are no instructions.
void cluster_arrive(Where where) {
  if (gpu.capability < 90) return;
  Thread& thread = *current;
  if (thread.cluster_arrivals != thread.cluster_waits) fail_here("cluster_arrive twice without cluster_wait", where);
  ++thread.cluster_arrivals;
  thread.where = where;
  if (++cluster_arrived < blocks.size() * threads_of_block) return;
  cluster_arrived = 0;
  ++cluster_phase;
  for (Block& block : blocks) ++block.synced;
  for (size_t i = 0; i < blocks.size() * threads_of_block; ++i) {
    if (threads[i].state == State::at_cluster_barrier) make_ready(threads[i]);
  }
}

void cluster_wait(Where where) {
  if (gpu.capability < 90) return;
  Thread& thread = *current;
  if (thread.cluster_arrivals == thread.cluster_waits) fail_here("cluster_wait without cluster_arrive", where);
  if (++thread.cluster_waits > cluster_phase) {
    wait_as(State::at_cluster_barrier, where);
  } else {
    make_ready(thread);
    Fiber::suspend();
  }
}

const void* of_cluster(const void* own, size_t bytes, unsigned rank, Where where, const char* name) {
  const std::string text = name;
  const Thread& thread = *current;
  const Block& block = *thread.block;
  const ptrdiff_t offset = static_cast<const unsigned char*>(own) - block.shared;
  if (gpu.capability < 90) fail_here(text + " needs capability 9.0", where);
  if (rank >= blocks.size()) {
    fail_here(text + " from block " + std::to_string(rank) + " of a cluster of " +
                  std::to_string(blocks.size()),
              where);
  }
  if (offset < 0 || offset + bytes > shared_bytes || offset % static_cast<ptrdiff_t>(bytes) != 0) {
    fail_here(text + " from byte " + std::to_string(offset) + " of " + std::to_string(shared_bytes) +
                  " of shared memory",
              where);
  }
  Block& other = blocks[rank];
  if (&other != &block) {
    if (thread.cluster_waits == 0) fail_here(text + " before cluster_wait: it may not have started", where);
    if (other.exited == threads_of_block) fail_here(text + " from a block that has ended", where);
    other.last_read = std::max(other.last_read, thread.cluster_arrivals);
  }
  return other.shared + offset;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(void*), void* data) {
  const std::lock_guard lock(mutex);
  const auto refuse_configuration = [&](const std::string& why) {
    return refuse(cudaErrorInvalidConfiguration, kernel, why);
  };
  dim3 cluster(1);
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) return refuse_configuration("unknown attribute");
    const auto& asked = config.attrs[i].val.clusterDim;
    cluster = dim3(asked.x, asked.y, asked.z);
  }
  const dim3 grid = config.gridDim, block = config.blockDim;
  const size_t block_threads = size_t{block.x} * block.y * block.z, all_blocks = size_t{grid.x} * grid.y * grid.z;
  const size_t cluster_size = cluster.x;
  const size_t permitted = std::max(std::min(kWithoutAsking, gpu.shared_memory), allowed[kernel]);
  if (config.stream != current_stream()) return refuse_configuration("launched on another than the current stream");
  if (all_blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return refuse_configuration("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                                std::to_string(grid.z) + " blocks");
  }
  if (block_threads == 0 || block_threads > 1024 || block.z > 64) {
    return refuse_configuration(std::to_string(block_threads) + " threads a block; the limit is 1024");
  }
  if (config.dynamicSmemBytes > gpu.shared_memory) {
    return refuse_configuration(std::to_string(config.dynamicSmemBytes) + " bytes of shared memory; the device has " +
                                std::to_string(gpu.shared_memory) + " a block");
  }
  if (config.dynamicSmemBytes > permitted) {
    return refuse_configuration(std::to_string(config.dynamicSmemBytes) + " bytes of shared memory; " +
                                "cudaFuncSetAttribute allowed " + std::to_string(permitted));
  }
  if (config.numAttrs > 0) {
    const std::string blocks = "a cluster of " + std::to_string(cluster_size) + " blocks";
    if (gpu.capability < 90) return refuse_configuration(blocks + " needs capability 9.0");
    if (cluster.y != 1 || cluster.z != 1) return refuse_configuration("only clusters along x are emulated");
    if (cluster_size == 0 || cluster_size > kLargestCluster) return refuse_configuration(blocks + "; the limit is 8");
    if (grid.x % cluster_size != 0) {
      return refuse_configuration(blocks + " in a grid of " + std::to_string(grid.x));
    }
  }

  ++launches;
  Counts& count = counts[kernel];
  ++count.launches;
  count.blocks += static_cast<int64_t>(all_blocks);
  count.clusters += cluster_size > 1;
  random_number.seed(seed + 0x10001 * launches);
  blockDim = block;
  gridDim = grid;
  shared_bytes = config.dynamicSmemBytes;
  shared_shift = 16 * random_number.below(kAlignment / 16);
  threads_of_block = block_threads;
  warps_of_block = (block_threads + kLanes - 1) / kLanes;
  run_kernel = run;
  kernel_data = data;
  failed = false;
  std::vector<size_t> order(all_blocks / cluster_size);
  for (size_t i = 0; i < order.size(); ++i) {
    const size_t j = random_number.below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  for (const size_t number : order) {
    constexpr unsigned kPaces[] = {0, 1, 8};
    pace = kPaces[random_number.below(3)];
    set_up_cluster(number * cluster_size, cluster_size);
    run_cluster();
    tear_down_cluster();
    if (failed) {
      return refuse(cudaErrorLaunchFailure, kernel,
                    message + " [seed " + std::to_string(seed) + ", launch " + std::to_string(launches) + "]");
    }
  }
  return cudaSuccess;
}

cudaStream_t current_stream() {
  static int stream;
  return reinterpret_cast<cudaStream_t>(&stream);
}

}  // namespace host_cuda

extern "C" {

// The order of things in the launches that follow depends on the seed.
__attribute__((visibility("default"))) void host_cuda_configure(int capability, size_t shared_memory, int processors,
                                                                uint64_t seed) {
  const std::lock_guard lock(host_cuda::mutex);
  host_cuda::gpu = {capability, shared_memory, processors};
  ++host_cuda::device;
  host_cuda::allowed.clear();
  host_cuda::seed = seed;
  host_cuda::launches = 0;
}

// A line for each kernel since the last call: launches, blocks, launches in clusters, name.
__attribute__((visibility("default"))) const char* host_cuda_take_counts() {
  const std::lock_guard lock(host_cuda::mutex);
  static std::string text;
  text.clear();
  for (const auto& [kernel, count] : host_cuda::counts) {
    text += std::to_string(count.launches) + " " + std::to_string(count.blocks) + " " + std::to_string(count.clusters) +
            " " + host_cuda::name_of(kernel) + "\n";
  }
  host_cuda::counts.clear();
  return text.c_str();
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(host_cuda::mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return host_cuda::refuse(cudaErrorInvalidValue, kernel, "cudaFuncSetAttribute: not an attribute that is emulated");
  }
  const size_t limit = host_cuda::gpu.shared_memory;
  if (value < 0 || static_cast<size_t>(value) > limit) {
    const std::string asked = "cudaFuncSetAttribute: " + std::to_string(value) + " bytes of shared memory";
    return host_cuda::refuse(cudaErrorInvalidValue, kernel,
                             asked + "; the device has " + std::to_string(limit) + " a block");
  }
  host_cuda::allowed[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::lock_guard lock(host_cuda::mutex);
  const host_cuda::Gpu& gpu = host_cuda::gpu;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = gpu.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = gpu.capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = gpu.processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(gpu.shared_memory); break;
    default:
      host_cuda::message = "cudaDeviceGetAttribute: not an attribute that is emulated";
      return host_cuda::last_error = cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  const std::lock_guard lock(host_cuda::mutex);
  *device = host_cuda::device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(host_cuda::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : host_cuda::message.c_str();
}

#ifndef HOST_CUDA_SANITIZED
// What the compiler calls for an access that is not aligned to its type, which no GPU allows.
struct Misaligned {
  const char* file;
  unsigned line, column;
  const void* type;
  unsigned char log_alignment;
};

void __ubsan_handle_type_mismatch_v1_abort(const Misaligned* access, uintptr_t address) {
  const unsigned alignment = 1u << access->log_alignment;
  host_cuda::fail_here("an access that must be aligned to " + std::to_string(alignment) + " bytes is " +
                           std::to_string(address % alignment) + " bytes off",
                       host_cuda::describe(access->file, access->line));
}
#endif

// The driver's functions that a kernel's host code asks the runtime for.
// One less than there is room for, as where parts of a GPU lack multiprocessors.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const std::lock_guard lock(host_cuda::mutex);
  const int size = config->numAttrs ? static_cast<int>(config->attrs[0].val.clusterDim.x) : 1;
  *clusters = std::max(host_cuda::gpu.processors / size - 1, 1);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const std::string name = symbol;
  *function = name == "cuTensorMapEncodeTiled"    ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled)
              : name == "cuTensorMapEncodeIm2col" ? reinterpret_cast<void*>(&cuTensorMapEncodeIm2col)
                                                  : nullptr;
  if (version < 12000) *function = nullptr;
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* status) {
  return cudaGetDriverEntryPointByVersion(symbol, function, CUDA_VERSION, flags, status);
}

}  // extern "C"
