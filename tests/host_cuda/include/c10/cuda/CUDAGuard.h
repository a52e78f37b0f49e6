// Tensors are on the CPU here, so that there is nothing to guard; that there is a guard can be checked.
#pragma once

#include <c10/core/Device.h>

namespace c10::cuda {

inline thread_local int guards = 0;

class CUDAGuard {
 public:
  explicit CUDAGuard(Device) { ++guards; }
  CUDAGuard(const CUDAGuard&) = delete;
  ~CUDAGuard() { --guards; }
};

}  // namespace c10::cuda
