// Every CPU kernel body; dispatch.cpp includes this once per ISA (no include guard).
#include "embedfuse/vec.h"

#include "cpu/pool_normalize.h"
#include "cpu/skinny_linear.h"

// A constant: a function compiled for this ISA must not run before the processor was asked.
constexpr CpuKernels kKernels{pool_normalize, skinny_linear};
