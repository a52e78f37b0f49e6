// Python module _C: loading it registers the ops; info() tells what was built and what runs.

#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace py = pybind11;

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
}
