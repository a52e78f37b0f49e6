// Barriers in shared memory, the TMA and wgmma, as the PTX ISA describes them and at their slowest: what a load brings
// lands when a phase's end is waited for, operands of products are looked at when they are issued and again when they
// are waited for, and sums appear then. Meanwhile destinations and sums hold NaN.
//
// Two things are not looked for: that fence_async_proxy comes between stores and what the TMA or wgmma do to the same
// memory, and that tensor maps are parameters of the kernel and not a thread's copy of them.

#include <algorithm>
#include <cstring>
#include <utility>

#include "machine.h"

namespace host_cuda {
namespace {

// Shared memory begins behind what the system has of it.
constexpr unsigned kSystemBytes = 1024;
constexpr size_t kMostAnnounced = (1 << 20) - 1;
constexpr int kRegistersOfProcessor = 64 * 1024;
constexpr uint64_t kBarrierBits = 0x5245495252414221u;  // what is in memory where a barrier is
constexpr int kRows = 16, kDepth = 16;                  // of a warp's part of a product

template <class T>
std::string number(T n) {
  return std::to_string(n);
}

void need_sm90(const char* name, const Where& where) {
  if (gpu.capability != 90) fail_here(std::string(name) + " is for capability 9.0 alone", where);
}

// Bits of the address as a GPU has them; the host's have the same lowest ten.
unsigned first_address() {
  const uintptr_t shared = reinterpret_cast<uintptr_t>(current->block->shared);
  return kSystemBytes + static_cast<unsigned>(shared % 1024);
}

bool is_complete(const MemoryBarrier& barrier) { return barrier.awaited == 0 && barrier.announced == barrier.loading; }

std::string missing(const MemoryBarrier& barrier) {
  return number(barrier.awaited) + " arrivals are missing, " + number(barrier.announced) + " bytes are announced, " +
         number(barrier.loading) + " under way";
}

size_t place_of(const void* barrier, const char* name, const Where& where) {
  const ptrdiff_t place = static_cast<const unsigned char*>(barrier) - current->block->shared;
  if (place < 0 || static_cast<size_t>(place) + sizeof(uint64_t) > shared_bytes || place % 8 != 0) {
    fail_here(std::string(name) + ": a barrier at byte " + number(place) + " of " + number(shared_bytes) +
                  " of shared memory",
              where);
  }
  return static_cast<size_t>(place);
}

MemoryBarrier& find_barrier(const void* memory, const char* name, const Where& where) {
  need_sm90(name, where);
  const size_t place = place_of(memory, name, where);
  Block& block = *current->block;
  const auto fail_because = [&](const std::string& why) {
    fail_here(std::string(name) + ": the barrier at byte " + number(place) + why, where);
  };
  const auto found = block.barriers.find(place);
  if (found == block.barriers.end()) fail_because(" was never initialised");
  if (std::memcmp(memory, &kBarrierBits, sizeof(kBarrierBits)) != 0) fail_because(" was overwritten");
  MemoryBarrier& barrier = found->second;
  if (barrier.owner != current && barrier.synced == block.synced) {
    fail_because(" may not be initialised yet: no barrier of the block has come since");
  }
  return barrier;
}

void wake(MemoryBarrier& barrier) {
  for (Thread* thread : barrier.waiting) make_ready(*thread);
  barrier.waiting.clear();
}

void end_phase(MemoryBarrier& barrier) {
  ++barrier.phase;
  barrier.awaited = barrier.arrivals;
  barrier.announced = barrier.loading = 0;
  barrier.loads.clear();
  wake(barrier);
}

void put(const Load& load, bool poison) {
  const unsigned first = first_address() + static_cast<unsigned>(load.to - current->block->shared);
  for (size_t i = 0; i < load.bytes.size(); i += 16) {
    const unsigned address = first + static_cast<unsigned>(i);
    unsigned char* to = load.to + static_cast<ptrdiff_t>(swizzled(address, load.box.map.swizzle)) - first;
    if (poison) {
      std::memset(to, kPoison, 16);
      continue;
    }
    for (int j = 0; j < 16; ++j) {
      if (to[j] != kPoison) fail_here("something else was written where this load goes", load.where);
    }
    std::memcpy(to, load.bytes.data() + i, 16);
  }
}

void land(MemoryBarrier& barrier) {
  std::vector<unsigned char> now;
  for (const Load& load : barrier.loads) {
    now.resize(load.bytes.size());
    load.box.read(now.data());
    if (now != load.bytes) fail_here("the source of this load changed before its end", load.where);
    put(load, false);
  }
  end_phase(barrier);
}

void count_arrival(void* memory, size_t bytes, const char* name, const Where& where) {
  MemoryBarrier& barrier = find_barrier(memory, name, where);
  if (barrier.awaited == 0) {
    fail_here(std::string(name) + " once more than the barrier's " + number(barrier.arrivals) +
                  " arrivals, before the phase has ended",
              where);
  }
  --barrier.awaited;
  barrier.announced += bytes;
  if (barrier.announced > kMostAnnounced) fail_here(number(barrier.announced) + " bytes are too many to expect", where);
  if (barrier.awaited > 0) return;
  if (barrier.loading > barrier.announced) {
    fail_here(std::string(name) + ": " + number(barrier.loading) + " bytes are under way, " +
                  number(barrier.announced) + " were announced",
              where);
  }
  if (!is_complete(barrier)) return;
  if (barrier.loads.empty()) {
    end_phase(barrier);
  } else {
    wake(barrier);
  }
}

Group& group_of(const Warp& warp, const Where& where) {
  const Thread& thread = threads[warp.first_thread];
  const size_t index = thread.number / (kGroupWarps * kLanes);
  Block& block = *thread.block;
  if ((index + 1) * kGroupWarps * kLanes > threads_of_block) {
    fail_here("the last warps of the block are no whole warpgroup", where);
  }
  if (block.groups.size() <= index) block.groups.resize(index + 1);
  return block.groups[index];
}

size_t index_in_group(const Warp& warp) { return threads[warp.first_thread].number / kLanes % kGroupWarps; }

// All warps of a group do these in the same order.
void take_step(const Warp& warp, const Step& step) {
  Group& group = group_of(warp, step.where);
  const size_t turn = group.done[index_in_group(warp)]++;
  if (turn == group.steps.size()) {
    group.steps.push_back(step);
    return;
  }
  const Step& first = group.steps[turn];
  if (first.kind == step.kind && first.a == step.a && first.b == step.b && same(first.where, step.where)) return;
  fail_here("another warp of the warpgroup did something else in its place, with other operands or at " +
                describe(first.where),
            step.where);
}

struct Factors {
  Format format;
  int columns;
  float* d;
  uint64_t a, b;
};

// Rows of 32 bytes from the matrix of a descriptor.
void gather(uint64_t descriptor, int first_row, int rows, uint16_t* to, const Where& where) {
  const auto field = [&](int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3fff) << 4; };
  const unsigned start = field(0), eight_rows = field(32), first = first_address();
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
    fail_here("only matrices with a swizzle of 128 bytes and no base offset are emulated", where);
  }
  if ((start & 0x380) != 0) fail_here("the matrix is not aligned to 1024 bytes of shared memory", where);
  for (int row = first_row; row < first_row + rows; ++row) {
    for (unsigned half = 0; half < 2; ++half, to += 8) {
      const unsigned line = static_cast<unsigned>(row) / 8 * eight_rows + static_cast<unsigned>(row) % 8 * 128;
      const unsigned address = swizzled(start + line + 16 * half, 128);
      if (address < first || address + 16 > first + shared_bytes) {
        fail_here("row " + number(row) + " of the matrix is not in shared memory", where);
      }
      std::memcpy(to, current->block->shared + (address - first), 16);
    }
  }
}

std::vector<uint16_t> gather(const Product& product, const Warp& warp) {
  const int columns = product.sums->columns;
  std::vector<uint16_t> operands(static_cast<size_t>((kRows + columns) * kDepth));
  gather(product.a, static_cast<int>(index_in_group(warp)) * kRows, kRows, operands.data(), product.where);
  gather(product.b, 0, columns, operands.data() + kRows * kDepth, product.where);
  return operands;
}

// Where a lane's i-th sum is in the warp's 16 rows.
size_t place_of_sum(int lane, int i, int columns) {
  return static_cast<size_t>((lane / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2);
}

void check_untouched(const Sums& sums, const Where& where) {
  constexpr unsigned char kPoisons[] = {kPoison, kPoison, kPoison, kPoison};
  for (const float* registers : sums.registers) {
    for (int i = 0; i < sums.columns / 2; ++i) {
      if (std::memcmp(registers + i, kPoisons, 4) != 0) {
        fail_here("the sums of these products were changed before products_wait", where);
      }
    }
  }
}

void carry_out(Product& product, const Warp& warp) {
  Sums& sums = *product.sums;
  if (gather(product, warp) != product.operands) {
    fail_here("the operands of these products changed before products_wait", product.where);
  }
  const uint16_t* a = product.operands.data();
  multiply_add_rows(product.format, sums.columns, sums.values.data(), a, a + kRows * kDepth);
  if (--sums.pending > 0) return;
  check_untouched(sums, product.where);
  for (int lane = 0; lane < kLanes; ++lane) {
    float* registers = sums.registers[static_cast<size_t>(lane)];
    for (int i = 0; i < sums.columns / 2; ++i) registers[i] = sums.values[place_of_sum(lane, i, sums.columns)];
  }
}

}  // namespace

unsigned shared_address(const void* shared, Where where) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(shared) - current->block->shared;
  if (offset < 0 || static_cast<size_t>(offset) > shared_bytes) {
    fail_here("shared_address of what is not in shared memory", where);
  }
  return first_address() + static_cast<unsigned>(offset);
}

void init_barrier(void* memory, unsigned arrivals, Where where) {
  const size_t place = place_of(memory, "init_barrier", where);
  if (arrivals == 0 || arrivals > kMostAnnounced) fail_here("a barrier of " + number(arrivals) + " arrivals", where);
  Block& block = *current->block;
  const bool added =
      block.barriers.try_emplace(place, MemoryBarrier{.arrivals = arrivals, .awaited = arrivals, .owner = current,
                                                      .synced = block.synced}).second;
  if (!added) fail_here("the barrier at byte " + number(place) + " is initialised twice", where);
  std::memcpy(memory, &kBarrierBits, sizeof(kBarrierBits));
}

void fence_barriers(Where where) {
  need_sm90("fence_barriers", where);
  for (auto& [place, barrier] : current->block->barriers) barrier.fenced |= barrier.owner == current;
}

void arrive(void* memory, Where where) { count_arrival(memory, 0, "arrive", where); }

void arrive_and_expect(void* memory, unsigned bytes, Where where) {
  count_arrival(memory, bytes, "arrive_and_expect", where);
}

void arrive_in_cluster(void* own, unsigned rank, Where where) {
  constexpr const char* kName = "arrive_in_cluster";
  void* there = const_cast<void*>(of_cluster(own, sizeof(uint64_t), rank, where, kName));
  Block* const block = std::exchange(current->block, &blocks[rank]);
  find_barrier(there, kName, where).from_cluster |= block != current->block;
  count_arrival(there, 0, kName, where);
  current->block = block;
}

void wait_barrier(void* memory, unsigned parity, bool of_cluster, Where where) {
  MemoryBarrier& barrier = find_barrier(memory, "wait_barrier", where);
  if (barrier.from_cluster && !of_cluster) fail_here("wait_barrier for what other blocks of the cluster did", where);
  if (parity > 1) fail_here("wait_barrier: a parity of " + number(parity), where);
  Thread& self = *current;
  self.barrier = place_of(memory, "wait_barrier", where);
  while ((barrier.phase & 1) == parity) {
    if (!is_complete(barrier)) {
      barrier.waiting.push_back(&self);
      wait_as(State::at_memory_barrier, where);
    } else if (random_number.below(2) == 0) {
      land(barrier);
    } else {
      make_ready(self);
      wait_as(State::ready, where);
    }
  }
}

void fence_async_proxy(Where where) { need_sm90("fence_async_proxy", where); }

void prefetch_tensor_map(const void* map, Where where) {
  need_sm90("prefetch_tensor_map", where);
  TensorMap read;
  if (!read_tensor_map(map, read)) fail_here("prefetch_tensor_map: no tensor map", where);
}

void load_box(void* shared, const void* map, void* barrier_memory, std::initializer_list<int> at,
              std::initializer_list<unsigned> ahead, Where where) {
  const char* name = ahead.size() == 0 ? "load_box" : "load_pixels";
  const auto fail_because = [&](const std::string& why) { fail_here(std::string(name) + " " + why, where); };
  MemoryBarrier& barrier = find_barrier(barrier_memory, name, where);
  if (!barrier.fenced) fail_because("with a barrier that no fence_barriers has made known");
  Load load{{}, static_cast<unsigned char*>(shared), {}, where};
  const bool aligned = reinterpret_cast<uintptr_t>(map) % 64 == 0;
  if (!aligned || !read_tensor_map(map, load.box.map)) fail_because("by no tensor map");
  std::copy(at.begin(), at.end(), load.box.at);
  std::copy(ahead.begin(), ahead.end(), load.box.ahead);
  const std::string why = load.box.why_not(static_cast<int>(at.size()), static_cast<int>(ahead.size()));
  if (!why.empty()) fail_because(why);
  const size_t bytes = load.box.bytes();
  const ptrdiff_t offset = load.to - current->block->shared;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > shared_bytes) {
    fail_because("of " + number(bytes) + " bytes to byte " + number(offset) + " of " +
                 number(shared_bytes) + " of shared memory");
  }
  if (shared_address(shared, where) % 128 != 0) {
    fail_because("to byte " + number(offset) + " of shared memory, whose address is no multiple of 128");
  }
  if (barrier.awaited == 0 && barrier.loading + bytes > barrier.announced) {
    fail_because("brings more bytes than the phase of its barrier expects");
  }
  load.bytes.resize(bytes);
  load.box.read(load.bytes.data());
  put(load, true);
  barrier.loading += bytes;
  barrier.loads.push_back(std::move(load));
  if (is_complete(barrier)) wake(barrier);
}

void products(Kind kind, int pending, Where where) {
  need_sm90("a product of a warpgroup", where);
  collective(kind, ~0u, static_cast<uint64_t>(pending), 0, where);
}

void multiply_add_group(Format format, int columns, float* d, uint64_t a, uint64_t b, Where where) {
  need_sm90("multiply_add_group", where);
  const Factors own{format, columns, d, a, b};
  collective(Kind::group_product, ~0u, reinterpret_cast<uint64_t>(&own), 0, where);
}

void set_registers(int registers, bool more, Where where) {
  need_sm90(more ? "take_registers" : "keep_registers", where);
  collective(Kind::set_registers, ~0u, static_cast<uint64_t>(more ? registers : -registers), 0, where);
}

void sync_group(int number_of_barrier, int count, Where where) {
  if (number_of_barrier < 1 || number_of_barrier > 15) {
    fail_here("sync_group: barrier " + number(number_of_barrier) + "; there are 1 to 15", where);
  }
  if (count <= 0 || count % kLanes != 0 || static_cast<size_t>(count) > threads_of_block) {
    fail_here("sync_group of " + number(count) + " threads in a block of " +
                  number(threads_of_block),
              where);
  }
  collective(Kind::group_barrier, ~0u, static_cast<uint64_t>(number_of_barrier) << 32 | static_cast<unsigned>(count), 0,
             where);
}

void finish_products_step(Kind kind, Thread* lanes, const Where&) {
  Warp& warp = warp_of(lanes[0]);
  switch (kind) {
    case Kind::products_begin: warp.products_begun = true; return;
    case Kind::products_commit: warp.product_groups.push_back(std::exchange(warp.uncommitted, 0)); return;
    default: break;
  }
  size_t done = 0, groups = 0;
  for (; warp.product_groups.size() - groups > lanes[0].value; ++groups) done += warp.product_groups[groups];
  for (size_t i = 0; i < done; ++i) carry_out(warp.products[i], warp);
  warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<ptrdiff_t>(done));
  warp.product_groups.erase(warp.product_groups.begin(), warp.product_groups.begin() + static_cast<ptrdiff_t>(groups));
  // Other instructions may have had the registers since.
  warp.products_begun = false;
}

void finish_group_product(Thread* lanes, const Where& where) {
  Warp& warp = warp_of(lanes[0]);
  const auto factors = [&](int lane) { return reinterpret_cast<const Factors*>(lanes[lane].value); };
  const Factors first = *factors(0);
  std::array<float*, kLanes> registers;
  for (int i = 0; i < kLanes; ++i) {
    registers[static_cast<size_t>(i)] = factors(i)->d;
    if (factors(i)->a != first.a || factors(i)->b != first.b) {
      fail_here("lanes have different descriptors of the operands", where);
    }
  }
  take_step(warp, {Kind::group_product, first.a, first.b, where});
  std::shared_ptr<Sums> sums;
  for (const Product& earlier : warp.products) {
    if (earlier.sums->registers == registers) sums = earlier.sums;
  }
  if (sums) {
    if (sums->columns != first.columns) fail_here("products of different shapes are added to the same sums", where);
    check_untouched(*sums, where);
  } else {
    if (!warp.products_begun) fail_here("multiply_add_group without products_begin", where);
    sums = std::make_shared<Sums>();
    sums->columns = first.columns;
    sums->registers = registers;
    sums->values.resize(static_cast<size_t>(kRows * first.columns));
    for (int lane = 0; lane < kLanes; ++lane) {
      float* own = registers[static_cast<size_t>(lane)];
      for (int i = 0; i < first.columns / 2; ++i) sums->values[place_of_sum(lane, i, first.columns)] = own[i];
      std::memset(own, kPoison, sizeof(float) * static_cast<size_t>(first.columns) / 2);
    }
  }
  ++sums->pending;
  Product product{first.format, sums, first.a, first.b, {}, where};
  product.operands = gather(product, warp);
  warp.products.push_back(std::move(product));
  ++warp.uncommitted;
}

void finish_set_registers(Thread* lanes, const Where& where) {
  const Warp& warp = warp_of(lanes[0]);
  const auto asked = static_cast<int>(static_cast<int64_t>(lanes[0].value));
  const int registers = asked < 0 ? -asked : asked;
  take_step(warp, {Kind::set_registers, lanes[0].value, 0, where});
  Group& group = group_of(warp, where);
  const int before = std::exchange(group.registers, registers);
  if (before > 0 && before != registers && (before < registers) != (asked > 0)) {
    fail_here("a change from " + number(before) + " to " + number(registers) + " registers", where);
  }
  int all = 0;
  for (const Group& other : lanes[0].block->groups) all += other.registers;
  if (all * static_cast<int>(kGroupWarps) * kLanes > kRegistersOfProcessor) {
    fail_here("the warpgroups have more than 65536 registers", where);
  }
}

bool finish_group_barrier(Thread* lanes, const Where& where) {
  Block& block = *lanes[0].block;
  for (int i = 1; i < kLanes; ++i) {
    if (lanes[i].value != lanes[0].value) fail_here("lanes are at different barriers of sync_group", where);
  }
  NamedBarrier& barrier = block.named[lanes[0].value >> 32];
  const size_t count = lanes[0].value & 0xffffffff;
  if (!barrier.warps.empty() && barrier.threads != count) {
    fail_here("sync_group of " + number(count) + " threads, while others wait in one of " +
                  number(barrier.threads),
              where);
  }
  barrier.threads = count;
  if ((barrier.warps.size() + 1) * kLanes < count) {
    barrier.warps.push_back(lanes[0].number / kLanes);
    for (int i = 0; i < kLanes; ++i) lanes[i].state = State::at_group_barrier;
    return false;
  }
  ++block.synced;
  for (const size_t warp : std::exchange(barrier.warps, {})) {
    for (size_t i = 0; i < kLanes; ++i) make_ready(threads[block.first_thread + warp * kLanes + i]);
  }
  return true;
}

void check_exit(const Thread& thread) {
  const Warp& warp = warp_of(thread);
  if (!warp.products.empty()) {
    fail_here(warp.uncommitted > 0 ? "exits before products_commit and products_wait for this product"
                                   : "exits before products_wait for this product",
              warp.products.back().where);
  }
}

std::string why_not_end(const Block& block) {
  for (const auto& [place, barrier] : block.barriers) {
    if (!barrier.loads.empty()) {
      return "ends before it waited for this load (" + describe(barrier.loads.front().where) + ")";
    }
  }
  for (const Group& group : block.groups) {
    for (const size_t done : group.done) {
      if (done != group.steps.size()) {
        return "a warp of a warpgroup has left this out (" + describe(group.steps[done].where) + ")";
      }
    }
  }
  return "";
}

std::string describe_wait(const Thread& thread) {
  return "byte " + number(thread.barrier) + ": " + missing(thread.block->barriers.at(thread.barrier));
}

}  // namespace host_cuda
