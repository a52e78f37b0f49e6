// Memory that lives only inside one call, kept for the next: memory fresh from the system faults in page by page, which
// measured longer than the pass that fills it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <mutex>
#include <utility>

namespace deepcontrol::cpu {

// Two buffers a process are kept, as a backward pass that uses one calls what uses another: the largest asked for yet up to
// kMost. Needs above that, and calls at the same time from other threads, allocate as usual.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= kMost) {
      std::lock_guard lock(mutex());
      auto& [small, large] = kept();
      std::swap(memory_, small.defined() && small.numel() >= bytes ? small : large);
    }
    if (!memory_.defined() || memory_.numel() < bytes) memory_ = at::empty({bytes}, at::kByte);
  }
  ~Workspace() {
    if (memory_.numel() > kMost) return;
    std::lock_guard lock(mutex());
    auto& [small, large] = kept();
    auto size = [](const at::Tensor& buffer) { return buffer.defined() ? buffer.numel() : 0; };
    if (size(memory_) > size(large)) std::swap(memory_, large);
    if (size(memory_) > size(small)) std::swap(memory_, small);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return memory_.mutable_data_ptr(); }

 private:
  static constexpr int64_t kMost = int64_t(1) << 28;
  // Never destroyed: the allocator may be gone first when the process ends.
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
  static std::pair<at::Tensor, at::Tensor>& kept() {
    static auto* kept = new std::pair<at::Tensor, at::Tensor>;
    return *kept;
  }
  at::Tensor memory_;
};

}  // namespace deepcontrol::cpu
