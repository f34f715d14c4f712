// The binding of cpu/program.h.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "embedfuse/args.h"

namespace embedfuse {

// parts: for each weight its address, the address of its bias or 0, and its number of columns.
std::vector<LinearPart> linear_parts(const std::vector<int64_t>& parts);

void bind_program(pybind11::module_& m);

}  // namespace embedfuse
