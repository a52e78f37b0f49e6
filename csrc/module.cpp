// Python module _C: loading it registers the ops; info() tells what was built and what runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "cpu/conv_plan.h"
#include "cpu/kernels.h"
#include "cuda/conv_plan.h"
#include "cuda/plan.h"

namespace py = pybind11;

static deepcontrol::Dtype dtype_named(const std::string& name) {
  using deepcontrol::Dtype;
  if (name != "float64" && name != "bfloat16" && name != "float16" && name != "float32") {
    throw py::value_error("dtype: got '" + name + "', wanted float32, float64, bfloat16 or float16");
  }
  return name == "float64"    ? Dtype::f64
         : name == "bfloat16" ? Dtype::bf16
         : name == "float16"  ? Dtype::f16
                              : Dtype::f32;
}

static py::dict plan_center(int64_t samples, int64_t channels, int64_t pixels, bool channels_innermost,
                            const std::string& dtype, bool backward, bool smooth, int capability, int processors,
                            int64_t shared_memory) {
  using namespace deepcontrol;
  const Dtype of = dtype_named(dtype);
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

using Three = std::array<int64_t, 3>;

static void check(bool right, const std::string& what) {
  if (!right) throw py::value_error(what);
}

static deepcontrol::Windows windows_of(int64_t samples, int64_t channels, int64_t filters, int64_t groups,
                                       const Three& size, const Three& kernel, const Three& stride, const Three& padding,
                                       const Three& dilation) {
  check(samples >= 0 && channels > 0 && filters > 0, "samples, channels, filters: wanted positive integers");
  check(groups > 0 && channels % groups == 0 && filters % groups == 0,
        "groups: got " + std::to_string(groups) + ", wanted a divisor of " + std::to_string(channels) + " channels and " +
            std::to_string(filters) + " filters");
  deepcontrol::Windows windows;
  for (int d = 0; d < 3; ++d) {
    check(kernel[d] > 0 && stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0,
          "kernel, stride, dilation: wanted integers of at least 1, for the padding 0");
    check(size[d] + 2 * padding[d] > dilation[d] * (kernel[d] - 1), "size: the kernel is larger than the padded input");
    windows.size[d] = size[d];
    windows.kernel[d] = kernel[d];
    windows.stride[d] = stride[d];
    windows.padding[d] = padding[d];
    windows.dilation[d] = dilation[d];
    windows.output[d] = (size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  return windows;
}

static deepcontrol::cpu::ConvCase cpu_case(int64_t rank, int64_t samples, int64_t channels, int64_t filters, int64_t groups,
                                           const Three& size, const Three& kernel, const Three& stride,
                                           const Three& padding, const Three& dilation, const std::string& dtype,
                                           bool channels_last, int64_t threads) {
  check(threads > 0, "threads: wanted a positive integer");
  const auto windows = windows_of(samples, channels, filters, groups, size, kernel, stride, padding, dilation);
  return {dtype_named(dtype), rank, samples, channels, filters, groups, windows, channels_last, true, threads};
}

static deepcontrol::cpu::Pass pass_named(const std::string& name) {
  check(name == "forward" || name == "backward", "pass: got '" + name + "', wanted 'forward' or 'backward'");
  return name == "forward" ? deepcontrol::cpu::Pass::forward : deepcontrol::cpu::Pass::backward;
}

static py::dict plan_of(const deepcontrol::cpu::ConvCase& c) {
  using namespace deepcontrol::cpu;
  constexpr std::array sources{"preferred", "timed", "predicted", "rule"};
  py::dict result;
  for (const char* name : {"forward", "backward"}) {
    const Pass pass = pass_named(name);
    py::dict of_pass, obstacles, operations, seconds;
    for (const Algorithm algorithm : kAlgorithms) {
      obstacles[name_of(algorithm)] = why_not(algorithm, pass, c);
      operations[name_of(algorithm)] = operations_of(algorithm, pass, c);
      seconds[name_of(algorithm)] = predicted_seconds(algorithm, pass, c);
    }
    const Choice choice = choose(pass, c);
    of_pass["obstacles"] = obstacles;
    of_pass["seconds"] = seconds;
    of_pass["chosen"] = name_of(choice.algorithm);
    of_pass["source"] = sources[size_t(choice.source)];
    of_pass["operations"] = operations;
    of_pass["bytes"] = bytes_of(pass, c);
    result[name] = of_pass;
  }
  result["kind"] = name_of(kind_of(c));
  return result;
}

using CostRow =
    std::tuple<std::string, std::string, std::string, bool, std::string, int64_t, double, double, double, double>;

static void set_costs_cpu(const std::vector<CostRow>& rows) {
  using namespace deepcontrol::cpu;
  std::vector<Cost> costs;
  for (const auto& [algorithm, pass, dtype, channels_last, kind, threads, fixed, per_operation, per_byte, error] :
       rows) {
    const auto is_named = [name = std::string_view(kind)](Kind one) { return name == name_of(one); };
    const auto found = std::find_if(kKinds.begin(), kKinds.end(), is_named);
    check(found != kKinds.end(), "kind: got '" + kind + "', wanted 1x1, 3x3, depthwise or other");
    check(threads > 0, "threads: wanted a positive integer");
    costs.push_back({parse_algorithm(algorithm), pass_named(pass), dtype_named(dtype), channels_last, *found, threads, fixed,
                     per_operation, per_byte, error});
  }
  set_costs(costs);
}

static py::dict plan_conv(int64_t samples, int64_t channels, int64_t filters, int64_t groups, const Three& size,
                          const Three& kernel, const Three& stride, const Three& padding, const Three& dilation,
                          const std::string& dtype, bool channels_innermost, bool centred, bool tf32, int capability,
                          int processors, int64_t shared_memory, bool sm90a) {
  using namespace deepcontrol;
  check(capability >= 80 && processors > 0 && shared_memory > 0,
        "capability, processors, shared_memory: wanted a GPU of compute capability 8.0 (80) or higher");
  cuda::ConvCase c{};
  c.windows = windows_of(samples, channels, filters, groups, size, kernel, stride, padding, dilation);
  c.dtype = dtype_named(dtype);
  c.samples = samples;
  c.channels = channels;
  c.filters = filters;
  c.groups = groups;
  c.channels_innermost = channels_innermost;
  c.aligned = true;
  c.centred = centred;
  c.tf32 = tf32;
  const cuda::Device device{capability, processors, shared_memory, sm90a};
  py::dict result, ways;
  for (const cuda::Algorithm& algorithm : cuda::algorithms()) {
    if (const auto obstacle = cuda::why_not(algorithm, c, device)) {
      ways[algorithm.name] = *obstacle;
      continue;
    }
    const cuda::ConvPlan plan = cuda::plan_conv(algorithm, c, device);
    py::dict way;
    way["seconds"] = plan.seconds;
    way["held"] = plan.held;
    way["rows"] = plan.rows;
    way["columns"] = plan.columns;
    way["stages"] = plan.stages;
    way["cluster"] = plan.cluster;
    way["samples"] = plan.samples;
    way["used"] = plan.used;
    way["splits"] = plan.splits;
    way["shared_tile"] = plan.shared_tile;
    way["blocks"] = plan.blocks;
    way["shared"] = plan.shared;
    way["workspace"] = plan.workspace;
    ways[algorithm.name] = way;
  }
  result["algorithms"] = ways;
  result["chosen"] = cuda::choose_conv(c, device).algorithm->name;
  result["convolution"] = cuda::library_seconds(c, device);
  result["library_weight_grad"] = cuda::library_weight_grad_seconds(c, device);
  if (const auto obstacle = cuda::why_no_weight_grad(c, device)) {
    result["weight_grad"] = *obstacle;
  } else {
    const cuda::WeightGradPlan plan = cuda::plan_weight_grad(c, device);
    py::dict weight_grad;
    weight_grad["seconds"] = plan.seconds;
    weight_grad["rows"] = plan.rows;
    weight_grad["columns"] = plan.columns;
    weight_grad["stages"] = plan.stages;
    weight_grad["splits"] = plan.splits;
    weight_grad["of_split"] = plan.of_split;
    weight_grad["blocks"] = plan.blocks;
    weight_grad["shared"] = plan.shared;
    weight_grad["workspace"] = plan.workspace;
    result["weight_grad"] = weight_grad;
  }
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
  py::class_<deepcontrol::cpu::ConvCase>(m, "ConvCase", "A convolution on a CPU.")
      .def(py::init(&cpu_case), "rank"_a, "samples"_a, "channels"_a, "filters"_a, "groups"_a, "size"_a, "kernel"_a,
           "stride"_a, "padding"_a, "dilation"_a, "dtype"_a, "channels_last"_a, "threads"_a,
           "`rank` is the number of spatial dimensions; sizes are triples, (1, H, W) in two dimensions.");
  m.def("plan_conv_cpu", plan_of, "case"_a,
        "For each pass of a convolution on this CPU, \"forward\" and \"backward\": under `obstacles` every algorithm with "
        "None or the reason why it does not take the layer, under `operations` what it would compute, under `seconds` what "
        "the table of costs predicts for it, or None; the one that is `chosen` and by which `source`, and the `bytes` that "
        "must be moved; and the `kind` of layer. Raises RuntimeError where the preferred algorithm does not take the layer.");
  m.def("prefer_algorithm_cpu", deepcontrol::cpu::prefer_algorithm, "name"_a, "of_thread"_a = false,
        "One algorithm for every convolution on the CPU, or for those of this thread, \"\" for automatic choice.");
  m.def("set_costs_cpu", set_costs_cpu, "rows"_a,
        "The table of costs: (algorithm, pass, dtype, channels_last, kind, threads, seconds, seconds an operation, seconds a "
        "byte, relative error) for each row.");
  m.def("remember_fastest_cpu",
        [](const deepcontrol::cpu::ConvCase& c, const std::string& pass, const std::string& algorithm) {
          deepcontrol::cpu::remember_fastest(pass_named(pass), c, deepcontrol::cpu::parse_algorithm(algorithm));
        },
        "case"_a, "pass"_a, "algorithm"_a, "The algorithm that a pass of this very layer takes from now on.");
  m.def("forget_fastest_cpu", deepcontrol::cpu::forget_fastest, "Undoes remember_fastest_cpu.");
  m.def("plan_conv", plan_conv, "samples"_a, "channels"_a, "filters"_a, "groups"_a, "size"_a, "kernel"_a, "stride"_a,
        "padding"_a, "dilation"_a, "dtype"_a = "bfloat16", "channels_innermost"_a = true, "centred"_a = true,
        "tf32"_a = true, "capability"_a = 90, "processors"_a = 132, "shared_memory"_a = 232448, "sm90a"_a = true,
        "How each algorithm of the CUDA backend cuts a convolution's forward pass into blocks and the least seconds it is "
        "predicted to take, or why it does not take it; which one is chosen; and the same of the weight gradient. Sizes "
        "are triples, (1, H, W) in two dimensions. `convolution` and `library_weight_grad` are the bounds of the "
        "library's. `sm90a`: the build has code for compute capability 9.0 alone. No GPU is needed.");
}
