// The module embedfuse._cpu: its functions take addresses and write results there. They check all that could corrupt
// memory.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cpu/cu_seqlens.h"
#include "embedfuse/args.h"

namespace embedfuse {

// Of sparse vectors, scores and losses; in a file of their own, compiled beside the rest.
void add_scores(pybind11::module_& m);

// The class Program, in a file of its own too.
void add_program(pybind11::module_& m);

// parts: for each weight its address, the address of its bias or 0, and its number of columns.
std::vector<LinearPart> linear_parts(const std::vector<int64_t>& parts);

inline void check_cu_seqlens(const std::string& name, const int32_t* cu_seqlens, int64_t batch,
                             int64_t tokens) {
  if (!valid_cu_seqlens(cu_seqlens, batch, tokens)) {
    throw pybind11::value_error(
        name + ": must start at 0, never fall, and end at the number of tokens, " +
        std::to_string(tokens) + "; starts at " + std::to_string(cu_seqlens[0]) + ", ends at " +
        std::to_string(cu_seqlens[batch]));
  }
}

}  // namespace embedfuse
