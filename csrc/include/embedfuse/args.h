// What each op's kernels take: raw pointers, sizes in elements, strides in elements.
#pragma once
#include <cstdint>

namespace embedfuse {

enum class Pooling : int { kCls = 0, kLast = 1, kMean = 2, kWeightedMean = 3 };

// Sequences lie either end to end (cu_seqlens set) or padded to `length` rows each, of which
// attention_mask picks some (null: all).
struct PoolNormalizeArgs {
  const void* hidden_states;
  int dtype;
  int64_t row_stride;
  int64_t batch_stride;           // padded only
  const int32_t* cu_seqlens;      // (batch + 1) or null
  const void* attention_mask;     // (batch, length), nonzero = token, or null
  int mask_bytes;                 // size of a mask element: 1, 4 or 8
  int64_t batch, length, hidden;  // length: padded rows per sequence; packed: all tokens
  Pooling pooling;
  bool normalize;
  void* out;  // (batch, hidden)
  int out_dtype;
  float* norm;  // (batch)
};

// out = hidden_states @ weight^T + bias for few rows; all of one dtype, weight (columns, depth).
struct SkinnyLinearArgs {
  const void* x;
  const void* weight;
  const void* bias;  // or null
  int dtype;
  int64_t rows, columns, depth;
  int64_t x_stride;
  void* out;  // (rows, columns)
};

}  // namespace embedfuse
