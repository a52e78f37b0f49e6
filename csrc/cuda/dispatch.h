// What the ops of this backend share: the device they run on, vectors, and centring forward and backward.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../tensors.h"
#include "params.h"

namespace deepcontrol::cuda {

// What every op holds while it works on `tensor`: its device is the current one, and autograd is out of the way.
class Scope {
 public:
  explicit Scope(const Tensor& tensor) : device_(tensor.device()), guard_(device_) {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor), minor = attribute(cudaDevAttrComputeCapabilityMinor);
    TORCH_CHECK(major >= 8, device_, " has compute capability ", major, ".", minor,
                ", wanted 8.0 or newer; backend='reference' runs on it");
    device.capability = major * 10 + minor;
    device.processors = attribute(cudaDevAttrMultiProcessorCount);
    device.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
#ifdef DEEPCONTROL_SM90A
    device.sm90a = device.capability == 90;
#endif
  }
  void check(const char* name, const OptionalTensor& tensor) const {
    TORCH_CHECK_VALUE(!tensor || !tensor->defined() || tensor->device() == device_, name, ": is on ", tensor->device(),
                      ", wanted the device of the other tensors, ", device_);
  }
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(); }

  Device device;

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_.index()));
    return value;
  }

  at::Device device_;
  c10::cuda::CUDAGuard guard_;
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
};

bool are_aligned(std::initializer_list<const void*> addresses);

struct Vectors {
  Tensor gain, mean_scale, bias;
  double constant;

  bool centred() const { return mean_scale.defined() || constant != 0.0; }
};

Vectors vectors_of(const Scope& scope, const Tensor& like, int64_t channels, const OptionalTensor& gain,
                   const OptionalTensor& mean_scale, double constant, const OptionalTensor& bias);

struct Centred {
  Tensor map_mean, saved, output_mean;
};

// What center and conv_center do with z, which is dense in `format`; `output` may be z.
struct Centring {
  const Vectors& vectors;
  const OptionalTensor& residual;
  Activation activation;
  double slope;
  bool save, mean_of_scaled, output_mean;

  Centred operator()(const Scope& scope, const Tensor& z, const Tensor& output, at::MemoryFormat format) const;
};

struct Wanted {
  bool grad_input, grad_residual, sums, dots;
};

struct Error {
  Tensor grad_input, grad_residual, sums, dots;
};

// From the gradient of the output to that in front of the centring; `format` is the output's, `input` is for the dots.
Error center_error(const Scope& scope, const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                   const Vectors& vectors, const Tensor& saved, Activation activation, double slope,
                   at::MemoryFormat format, const Wanted& wanted);

struct VectorGrads {
  Tensor gain, mean_scale, bias;
};

// Sums over the samples. `scale` is what center multiplied the centred input by, none where the means are of scaled maps.
VectorGrads reduce_samples(const Scope& scope, const Error& error, const Tensor& map_mean, const Tensor& scale,
                           const Vectors& vectors, bool gain, bool mean_scale, bool bias);

// In place on a dense `grad`; returns sum(weight * grad / divisor) if asked, else an undefined tensor.
Tensor finish_weight_grad(const Scope& scope, const Tensor& grad, const Tensor& weight, const Tensor& factor,
                          const Tensor& divisor, double projection, bool dots);

}  // namespace deepcontrol::cuda
