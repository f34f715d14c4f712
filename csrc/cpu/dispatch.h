// The kernels of one instruction set, as a table. Chosen once, when Python loads the module.
#pragma once
#include <string>
#include <vector>

#include "embedfuse/args.h"

// Linux enables tiles for a process on request. Compilers with this header have an assembler that knows them.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxtileintrin.h>)
  #define EMBEDFUSE_HAS_AMX
#endif

namespace embedfuse {

struct CpuKernels {
#define KERNEL(name, result, ...) result (*name)(__VA_ARGS__);
#include "cpu/kernel_list.h"
#undef KERNEL
};

namespace baseline {
extern const CpuKernels kKernels;
}
namespace avx2 {
extern const CpuKernels kKernels;
}
namespace avx512 {
extern const CpuKernels kKernels;
}
namespace avx512_bf16 {
extern const CpuKernels kKernels;
}
namespace amx {
extern const CpuKernels kKernels;
}

// ISAs that this build and this processor have, best first.
std::vector<std::string> supported_isas();
// Throws std::invalid_argument for a name that supported_isas() does not list.
void select_isa(const std::string& name);
// Name of the ISA whose kernels cpu_kernels() returns.
std::string selected_isa();
const CpuKernels& cpu_kernels();

}  // namespace embedfuse
