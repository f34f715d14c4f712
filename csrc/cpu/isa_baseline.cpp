// The kernels for every processor of the architecture.
#include "cpu/isa.h"

#define EMBEDFUSE_ISA EMBEDFUSE_BASELINE

namespace embedfuse::baseline {
#include "cpu/kernels.h"
}  // namespace embedfuse::baseline
