// Choice of the instruction set, once a process.

#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace deepcontrol::cpu {

namespace avx512_bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace portable {
extern const Kernels table;
}

static const Kernels& choose() {
  std::vector<const Kernels*> supported;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) supported.push_back(&avx512_bf16::table);
    supported.push_back(&avx512::table);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    supported.push_back(&avx2::table);
  }
#endif
  supported.push_back(&portable::table);
  const char* wanted = std::getenv("DEEPCONTROL_ISA");
  if (!wanted || !*wanted) return *supported.front();
  std::string names;
  for (const Kernels* table : supported) {
    if (std::string(wanted) == table->isa) return *table;
    names += std::string(names.empty() ? "" : ", ") + table->isa;
  }
  throw std::runtime_error("DEEPCONTROL_ISA: got '" + std::string(wanted) + "', this processor can run " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* isa_name() { return kernels().isa; }

}  // namespace deepcontrol::cpu
