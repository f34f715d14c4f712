// The bounds of packed sequences.
#pragma once
#include <cstdint>

namespace embedfuse {

inline bool valid_cu_seqlens(const int32_t* cu_seqlens, int64_t batch, int64_t tokens) {
  if (cu_seqlens[0] != 0 || cu_seqlens[batch] != tokens) return false;
  for (int64_t b = 0; b < batch; ++b) {
    if (cu_seqlens[b] > cu_seqlens[b + 1]) return false;
  }
  return true;
}

}  // namespace embedfuse
