// Python module _C: loading it registers the ops; info() tells what was built and what runs.

#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#include "cuda/plan.h"

namespace py = pybind11;

static py::dict plan_center(int64_t samples, int64_t channels, int64_t pixels, bool channels_innermost,
                            const std::string& dtype, bool backward, bool smooth, int capability, int processors,
                            int64_t shared_memory) {
  using namespace deepcontrol;
  const Dtype of = dtype == "float64"    ? Dtype::f64
                   : dtype == "bfloat16" ? Dtype::bf16
                   : dtype == "float16"  ? Dtype::f16
                                         : Dtype::f32;
  const Maps maps{samples, channels, pixels, channels_innermost};
  const cuda::CenterCase c{maps, of, true, true, backward && smooth ? 2 : 1, backward && !smooth, backward ? 2 : 1};
  const cuda::CenterPlan plan = cuda::plan_center(c, {capability, processors, shared_memory});
  py::dict result;
  result["vectorized"] = plan.vectorized;
  result["lanes"] = plan.lanes();
  result["maps"] = plan.maps;
  result["part"] = plan.part;
  result["parts"] = plan.parts;
  result["cluster"] = plan.cluster;
  result["blocks"] = plan.blocks;
  result["shared"] = plan.shared;
  return result;
}

PYBIND11_MODULE(_C, m) {
  m.def(
      "info",
      [] {
        py::dict info;
        info["isa"] = deepcontrol::cpu::isa_name();
        info["compiler"] = __VERSION__;
#ifdef DEEPCONTROL_CUDA
        info["cuda"] = true;
#else
        info["cuda"] = false;
#endif
        return info;
      },
      "What was built (compiler, cuda) and which instruction set the CPU kernels use here (isa).");
  using py::literals::operator""_a;
  m.def("plan_center", plan_center, "samples"_a, "channels"_a, "pixels"_a, "channels_innermost"_a, "dtype"_a = "bfloat16",
        "backward"_a = false, "smooth"_a = false, "capability"_a = 90, "processors"_a = 132, "shared_memory"_a = 232448,
        "How the CUDA kernels cut aligned (samples, channels, pixels) maps into blocks: blocks of `shared` bytes, "
        "`lanes` threads along a row, `part` pixels each, `parts` to a map, as a cluster or in two launches. The GPU "
        "is given by compute capability (90 for 9.0), multiprocessors and bytes of shared memory a block; no GPU is "
        "needed.");
}
