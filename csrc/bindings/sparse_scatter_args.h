// What the bindings of both modules make of sparse_scatter's arguments.
#pragma once
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "embedfuse/args.h"
#include "embedfuse/dtype.h"

namespace embedfuse {

inline SparseScatterArgs sparse_scatter_args(uintptr_t token_weights, int dtype,
                                             uintptr_t input_ids, uintptr_t cu_seqlens,
                                             int64_t tokens, int64_t batch,
                                             const std::vector<int64_t>& excluded) {
  if (excluded.size() > kMaxExcluded) {
    throw std::invalid_argument("excluded: " + std::to_string(excluded.size()) +
                                " ids; accepted are at most " + std::to_string(kMaxExcluded));
  }
  SparseScatterArgs args{(const void*)token_weights,
                         dtype,
                         (const int64_t*)input_ids,
                         (const int32_t*)cu_seqlens,
                         tokens,
                         batch,
                         {},
                         int(excluded.size())};
  std::copy(excluded.begin(), excluded.end(), args.excluded);
  return args;
}

}  // namespace embedfuse
