// The kernels for the instructions that every processor of its kind has.
#include "cpu/isa.h"

#define EMBEDFUSE_ISA EMBEDFUSE_BASELINE

namespace embedfuse::baseline {
#include "cpu/kernels.h"
}  // namespace embedfuse::baseline
