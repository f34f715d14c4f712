// The parts of pool_normalize without vector instructions.
#pragma once
#include "embedfuse/args.h"

namespace embedfuse {

inline bool is_token(const PoolNormalizeArgs& a, int64_t b, int64_t t) {
  if (!a.attention_mask) return true;
  const int64_t i = b * a.length + t;
  if (a.mask_bytes == 1) return ((const uint8_t*)a.attention_mask)[i] != 0;
  if (a.mask_bytes == 4) return ((const int32_t*)a.attention_mask)[i] != 0;
  return ((const int64_t*)a.attention_mask)[i] != 0;
}

// Index of the first sequence that starts at or after `row`.
inline int64_t first_sequence_at(const PoolNormalizeArgs& a, int64_t row) {
  if (!a.cu_seqlens) {
    const int64_t length = a.length ? a.length : 1;
    const int64_t sequence = (row + length - 1) / length;
    return sequence < a.batch ? sequence : a.batch;
  }
  int64_t low = 0, high = a.batch;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.cu_seqlens[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace embedfuse
