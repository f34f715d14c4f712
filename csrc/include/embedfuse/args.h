// Arguments of the kernels of each op: raw pointers; sizes and strides in elements.
#pragma once
#include <cstdint>

namespace embedfuse {

enum class Pooling : int { kCls = 0, kLast = 1, kMean = 2, kWeightedMean = 3 };

// Sequences are either packed (cu_seqlens set) or padded to `length` rows each, of which attention_mask selects
// some (null: all).
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

// out = x weight^T + bias of each part, side by side; all of one dtype, weight (columns, depth).
struct LinearPart {
  const void* weight;
  const void* bias;  // or null
  int64_t columns;
  int64_t first;  // its first column of the result
};

struct LinearArgs {
  const void* x;
  const LinearPart* parts;
  int64_t n_parts;
  int dtype;
  int64_t rows, columns, depth;  // columns: of all parts together
  int64_t x_stride;
  bool gelu;  // whether out is the GELU of the sums
  void* out;  // (rows, columns)
};

// weights = relu(hidden_states . weight + bias), one per token, fp32.
struct TokenWeightsArgs {
  const void* hidden_states;
  const void* weight;  // (hidden), of the same dtype
  const void* bias;    // one element, or null
  int dtype;
  int64_t tokens, hidden;
  int64_t row_stride;
  float* weights;  // (tokens)
};

constexpr int kMaxExcluded = 8;

// Per sequence and id, the token with the largest weight. Weights that are not positive give no entry; NaN is the
// largest; of equal weights the first counts.
struct SparseScatterArgs {
  const void* token_weights;  // (tokens)
  int dtype;                  // the CPU's kernel takes fp32
  const int64_t* input_ids;   // (tokens)
  const int32_t* cu_seqlens;  // (batch + 1)
  int64_t tokens, batch;
  int64_t excluded[kMaxExcluded];  // ids that give no entry
  int n_excluded;
};

// Rows of sorted token ids with their weights.
struct CsrArgs {
  const float* weights;      // (entries)
  const int64_t* token_ids;  // (entries)
  const int64_t* indptr;     // (rows + 1)
  int64_t rows;
};

// scores[q][d], or scores[q] of row q against row q when `aligned`: sum of w_q w_d over shared ids.
struct LexicalScoresArgs {
  CsrArgs queries, documents;
  bool aligned;
  float* scores;
};

// (tokens, heads, head_dim) with head_dim adjacent in memory.
struct HeadsArg {
  const void* data;
  int64_t token_stride, head_stride;
};

// out = softmax(query key^T scale) value within each sequence; all of one dtype. heads / kv_heads consecutive
// query heads share a head of key and value.
struct VarlenAttentionArgs {
  HeadsArg query, key, value;
  int dtype;
  const int32_t* cu_seqlens_q;  // (batch + 1)
  const int32_t* cu_seqlens_k;  // (batch + 1)
  int64_t batch, heads, kv_heads, head_dim;
  float scale;
  bool causal;     // the last query row of a sequence is at its last key
  int64_t window;  // keys that a row sees, its own included; 0: all. Only if causal
  void* out;       // (tokens_q, heads, head_dim)
};

// Texts as ranges of rows: `depth` adjacent elements each, `stride` elements apart within a text.
struct RowsArg {
  const void* const* texts;  // (count): where each begins
  const int64_t* spans;      // (count, 2): first row, row after the last
  int64_t stride, count;
};

// scores[p] = sum over query rows of the largest product with a document row; the pairs are those listed,
// or all, documents changing fastest.
struct MaxSimArgs {
  RowsArg query, document;
  int dtype;           // of both, unless `scale` is set
  const float* scale;  // of each document row by its number: the rows are int8; or null
  int64_t depth;
  const bool* zero;      // (documents): whether a zero vector counts as one more row; or null
  const int64_t* pairs;  // (pair_count, 2): query, document; or null
  int64_t pair_count;
  bool normalize;   // rows to length 1
  float* scores;    // (pairs)
  int32_t* argmax;  // (pairs, width): row of the document that gave the maximum; -1 none
  int64_t width;
};

// out[r] = sum over k in [indptr[r], indptr[r + 1]) of weights[k] x[index[k]]
struct SegmentSumArgs {
  const void* x;
  int dtype;
  int64_t stride, depth;
  const float* weights;   // (entries)
  const int64_t* index;   // (entries)
  const int64_t* indptr;  // (rows + 1)
  int64_t rows;
  float* out;  // (rows, depth)
};

// sums = words[id] + types[type], places = positions[position] of each token; all of one dtype, rows of `hidden`.
struct EmbedArgs {
  const void *words, *types, *positions;  // the tables
  int dtype;
  int64_t tokens, hidden;
  const int64_t *ids, *type_ids, *position_ids;  // (tokens); type_ids: null for type 0
  void *sums, *places;                           // (tokens, hidden)
};

// out = (x + residual - mean) rstd weight + bias over rows of `hidden`; all of one dtype.
struct AddLayerNormArgs {
  const void* x;
  const void* residual;
  const void* weight;
  const void* bias;  // or null
  int dtype;
  int64_t rows, hidden;
  int64_t x_stride, residual_stride;
  float eps;
  void* out;  // (rows, hidden)
};

// summed = x + residual, normed = summed / rms(summed) weight over rows of `hidden`, of which each
// token has `heads`; all of one dtype.
struct AddRmsNormArgs {
  HeadsArg x, residual;  // residual.data may be null: then summed is x, and not written
  const void* weight;
  int dtype;
  int64_t tokens, heads, hidden;
  float eps;
  void* normed;  // (tokens, heads, hidden)
  void* summed;  // (tokens, heads, hidden) or null
};

// x_d, x_{d + half} of each head rotated by the token's angle d.
struct RopeArgs {
  HeadsArg x;  // in and out
  const void* cos;
  const void* sin;  // (tokens, head_dim / 2), head_dim / 2 adjacent
  int dtype;
  int64_t tokens, heads, head_dim;
  int64_t cos_stride, sin_stride;
};

// out = gate sigmoid(gate) up; all of one dtype.
struct SiluMulArgs {
  const void* gate;
  const void* up;
  int dtype;
  int64_t rows, columns;
  int64_t gate_stride, up_stride;
  void* out;  // (rows, columns)
};

// Largest number of columns of a tile: a row of it is buffered on the stack.
constexpr int64_t kInfoNceColumns = 4096;

// A tile of scores, for some of the columns, and the masks that decide which of them count.
struct InfoNceTile {
  float* scores;  // (rows, columns)
  int64_t rows, columns;
  int64_t first;             // number of the first column
  const int64_t* target;     // (rows): a column that does not count, or -1; or null
  const float* limit;        // (rows): scores above it do not count; or null
  const int64_t* x_keys;     // (rows), and
  const int64_t* y_keys;     // (columns): equal ones do not count; or null
  const float* guide;        // (rows, columns): those above
  const float* guide_limit;  // (rows) do not count; or null
  const float* x_factor;     // (rows), and
  const float* y_factor;     // (columns): factors that `scores` do not contain yet; or null
  float scale, bias;         // logit = scale score + bias
  bool sigmoid;
};

// Statistics of each row over the columns so far; `sum` is relative to `maximum`. If factor is set, the tile
// becomes the weights relative to the new maximum, and factor the correction of the weights of earlier tiles.
struct InfoNceState {
  float *maximum, *sum, *total;  // (rows)
  int64_t* count;                // (rows)
  float* factor;                 // (rows) or null
};

// The tile becomes G, or, if `sum` is set, G score, and G x_factor y_factor is added to `sum`.
struct InfoNceGradient {
  const float *statistic, *g_statistic, *g_total, *g_target;  // (rows)
  float* sum;                                                 // (rows, columns) or null
};

}  // namespace embedfuse
