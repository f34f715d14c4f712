// The kernels of one instruction set, as a table. Chosen once, when Python loads the module.
#pragma once
#include <string>
#include <vector>

#include "embedfuse/args.h"

namespace embedfuse {

struct CpuKernels {
  void (*pool_normalize)(const PoolNormalizeArgs&, float* scratch);
  void (*skinny_linear)(const SkinnyLinearArgs&);
};

// ISAs that this build has and this processor runs, best first.
std::vector<std::string> supported_isas();
// Throws std::invalid_argument for a name that supported_isas() does not list.
void select_isa(const std::string& name);
// Name of the ISA whose kernels cpu_kernels() gives.
std::string selected_isa();
const CpuKernels& cpu_kernels();

}  // namespace embedfuse
