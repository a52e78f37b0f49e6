#pragma once

#include <c10/util/Exception.h>

#include "../../../emulator.h"
#include "CUDAGuard.h"

namespace c10::cuda {

class CUDAStream {
 public:
  operator cudaStream_t() const { return host_cuda::current_stream(); }
};

// With several GPUs, the stream of another one than the tensors' would do harm.
inline CUDAStream getCurrentCUDAStream() {
  TORCH_CHECK(guards > 0, "the current stream was asked for without a device guard");
  return {};
}

}  // namespace c10::cuda
