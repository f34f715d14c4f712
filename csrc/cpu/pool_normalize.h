// pooled_b = sum_t w_bt h_bt / sum_t w_bt ;  out_b = pooled_b / max(|pooled_b|, 1e-12)
//
// Reads every used row once and accumulates in fp32. The sequences are divided among the threads so that each
// has about equally many tokens; with fewer sequences than threads the columns are divided instead.
// Included once per ISA (no include guard).

// acc += sum_r w_r x_r over four rows: one pass over acc for four rows, which are summed among themselves first.
// That halves the rounding error of long sequences.
template <class T>
void add_rows(float* acc, const T* const x[4], const float w[4], int64_t n, int64_t row_stride) {
  const Vec w0 = Vec::all(w[0]), w1 = Vec::all(w[1]), w2 = Vec::all(w[2]), w3 = Vec::all(w[3]);
  int64_t j = 0;
  for (; j + Vec::N <= n; j += Vec::N) {
    // Sixteen rows ahead, to L2: the processor's own prefetcher starts anew at each row.
    for (int r = 0; r < 4; ++r) __builtin_prefetch(x[r] + 16 * row_stride + j, 0, 2);
    const Vec a = fma(w1, Vec::load(x[1] + j), w0 * Vec::load(x[0] + j));
    const Vec b = fma(w3, Vec::load(x[3] + j), w2 * Vec::load(x[2] + j));
    (Vec::load(acc + j) + (a + b)).store(acc + j);
  }
  // Rounded as above, so that the result does not depend on how the columns are divided.
  for (; j < n; ++j) {
    const float a = __builtin_fmaf(w[1], to_float(x[1][j]), w[0] * to_float(x[0][j]));
    const float b = __builtin_fmaf(w[3], to_float(x[3][j]), w[2] * to_float(x[2][j]));
    acc[j] += a + b;
  }
}

template <class T>
void add_row(float* acc, const T* x, float w, int64_t n) {
  const Vec wv = Vec::all(w);
  int64_t j = 0;
  for (; j + Vec::N <= n; j += Vec::N) fma(wv, Vec::load(x + j), Vec::load(acc + j)).store(acc + j);
  for (; j < n; ++j) acc[j] = __builtin_fmaf(w, to_float(x[j]), acc[j]);
}

// Columns [begin, end) of sequence b's pooled vector, written to acc.
template <class T>
void pool_sequence(const PoolNormalizeArgs& a, int64_t b, int64_t begin, int64_t end, float* acc) {
  const int64_t first_row = a.cu_seqlens ? a.cu_seqlens[b] : 0;
  const int64_t rows = a.cu_seqlens ? a.cu_seqlens[b + 1] - first_row : a.length;
  const T* x = (const T*)a.hidden_states + begin;
  x += a.cu_seqlens ? first_row * a.row_stride : b * a.batch_stride;
  const int64_t n = end - begin;
  for (int64_t j = 0; j < n; ++j) acc[j] = 0.f;

  int64_t first = 0, last = rows - 1;
  while (first < rows && !is_token(a, b, first)) ++first;
  while (last >= first && !is_token(a, b, last)) --last;
  if (last < first) return;  // a sequence without tokens pools to zero
  if (a.pooling == Pooling::kCls) return add_row(acc, x + first * a.row_stride, 1.f, n);
  if (a.pooling == Pooling::kLast) return add_row(acc, x + last * a.row_stride, 1.f, n);

  const T* block[4];
  float w[4];
  double total = 0;  // 1 + 2 + ... + n is not exact in fp32 from n = 5,793 on
  int filled = 0;
  for (int64_t t = first; t <= last; ++t) {
    if (!is_token(a, b, t)) continue;
    block[filled] = x + t * a.row_stride;
    w[filled] = a.pooling == Pooling::kMean ? 1.f : float(t - first + 1);
    total += w[filled];
    if (++filled == 4) {
      add_rows(acc, block, w, n, a.row_stride);
      filled = 0;
    }
  }
  for (int r = 0; r < filled; ++r) add_row(acc, block[r], w[r], n);
  const float scale = float(1 / total);
  for (int64_t j = 0; j < n; ++j) acc[j] *= scale;
}

// |factor x|
inline float scaled_norm(const float* x, int64_t n, float factor) {
  const Vec factors = Vec::all(factor);
  Vec squares = Vec::zero();
  float square = 0.f;
  int64_t j = 0;
  for (; j + Vec::N <= n; j += Vec::N) {
    const Vec v = Vec::load(x + j) * factors;
    squares = fma(v, v, squares);
  }
  for (; j < n; ++j) square += x[j] * factor * (x[j] * factor);
  return __builtin_sqrtf(sum(squares) + square);
}

template <class Out>
void normalize_and_store(const PoolNormalizeArgs& a, int64_t b, const float* pooled) {
  float factor = 1.f, norm = scaled_norm(pooled, a.hidden, factor);
  // Squares from 2^128 on overflow fp32.
  if (norm == __builtin_inff()) norm = scaled_norm(pooled, a.hidden, factor = 0x1p-96f);
  a.norm[b] = norm / factor;
  // Written so that a NaN norm stays NaN.
  const float scale = a.normalize ? factor / (norm < 1e-12f ? 1e-12f : norm) : 1.f;
  Out* out = (Out*)a.out + b * a.hidden;
  for (int64_t j = 0; j < a.hidden; ++j) from_float(pooled[j] * scale, out + j);
}

inline void store(const PoolNormalizeArgs& a, int64_t b, const float* pooled) {
  if (a.out_dtype == kFloat32) return normalize_and_store<float>(a, b, pooled);
  if (a.out_dtype == kFloat16) return normalize_and_store<f16>(a, b, pooled);
  return normalize_and_store<bf16>(a, b, pooled);
}

inline void pool(const PoolNormalizeArgs& a, int64_t b, int64_t begin, int64_t end, float* acc) {
  if (a.dtype == kFloat32) return pool_sequence<float>(a, b, begin, end, acc);
  if (a.dtype == kFloat16) return pool_sequence<f16>(a, b, begin, end, acc);
  return pool_sequence<bf16>(a, b, begin, end, acc);
}

struct PoolJob {
  const PoolNormalizeArgs& a;
  float* pooled;
};

// Sequences whose first row is in [begin, end); dividing by rows balances batches of unequal lengths.
inline void pool_rows(int64_t begin, int64_t end, void* context) {
  const PoolJob& job = *(const PoolJob*)context;
  for (int64_t b = first_sequence_at(job.a, begin); b < first_sequence_at(job.a, end); ++b) {
    float* pooled = job.pooled + b * job.a.hidden;
    pool(job.a, b, 0, job.a.hidden, pooled);
    store(job.a, b, pooled);
  }
}

inline void pool_columns(int64_t begin, int64_t end, void* context) {
  const PoolJob& job = *(const PoolJob*)context;
  for (int64_t b = 0; b < job.a.batch; ++b) {
    pool(job.a, b, begin, end, job.pooled + b * job.a.hidden + begin);
  }
}

// scratch: (batch, hidden) fp32; may be the output itself.
void pool_normalize(const PoolNormalizeArgs& a, float* scratch) {
  PoolJob job{a, scratch};
  const int64_t rows = a.cu_seqlens ? a.length : a.batch * (a.length ? a.length : 1);
  if (a.batch >= num_threads() || rows * a.hidden * 4 < 2 * kThreadWork) {
    // One more than the rows, so that empty sequences at the end are included.
    return parallel_for(0, rows + 1, grain_of(4 * a.hidden), pool_rows, &job);
  }
  parallel_for(0, a.hidden, 64, pool_columns, &job);
  for (int64_t b = 0; b < a.batch; ++b) store(a, b, scratch + b * a.hidden);
}
