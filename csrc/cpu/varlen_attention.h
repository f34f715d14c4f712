// out_i = sum_j p_ij v_j / sum_j p_ij,  p_ij = exp(q_i k_j scale - max_j),  j over the keys of i's sequence
// that i sees: all, or those up to its own (causal) and no farther back than the window.
//
// A block of query rows is multiplied with 64 keys at a time, with a running maximum (online softmax, arXiv
// 1805.02867), all in fp32. The query rows are in the lanes of the registers: queries are transposed once per
// block, results back once, and everything between (maximum, exp, sums, rescaling) is lane by lane, without a
// horizontal step. Keys and values are copied to dense fp32 first: their rows in a fused QKV result are a
// multiple of 4 KiB apart and would evict one another from the L1 cache.
// Keys that no row of the block sees are not read. If only some rows see a key, the scores of the others are
// set to -inf.
// Limits: a sequence of one query row costs as much as a full register of them; heads that share keys each copy
// them.
// Included once per ISA (no include guard).

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kKeyBlock = 64;
// Registers of query rows per block, and keys or columns multiplied with them at a time. Their product is the
// number of accumulators.
constexpr int kQueryVecs = Vec::N == 16 ? 4 : 2;
constexpr int kTile = 4;

struct AttentionScratch {
  alignas(64) float query[kMaxHeadDim * kQueryVecs * Vec::N];  // (head_dim, rows)
  alignas(64) float out[kMaxHeadDim * kQueryVecs * Vec::N];    // (head_dim, rows)
  alignas(64) float scores[kKeyBlock * kQueryVecs * Vec::N];   // (keys, rows), then probabilities
  alignas(64) float rows[kKeyBlock * kMaxHeadDim];  // (keys, head_dim): keys, then values
};

// A (rows, head_dim) matrix of the model with its rows in the lanes: out (head_dim, V * N), times
// scale; zeros past the last row.
template <class T>
void load_transposed(const T* x, int64_t stride, int64_t rows, int64_t head_dim, int64_t lanes,
                     float scale, float* out) {
  const Vec scales = Vec::all(scale);
  const int64_t whole = head_dim - head_dim % Vec::N;
  for (int64_t i = 0; i < lanes; i += Vec::N) {
    for (int64_t d = 0; d < whole; d += Vec::N) {
      Vec block[Vec::N];
      for (int64_t r = 0; r < Vec::N; ++r) {
        block[r] = i + r < rows ? Vec::load(x + (i + r) * stride + d) * scales : Vec::zero();
      }
      transpose(block);
      for (int64_t c = 0; c < Vec::N; ++c) block[c].store(out + (d + c) * lanes + i);
    }
  }
  for (int64_t d = whole; d < head_dim; ++d) {
    for (int64_t i = 0; i < lanes; ++i) {
      out[d * lanes + i] = i < rows ? to_float(x[i * stride + d]) * scale : 0.f;
    }
  }
}

// The way back: x (head_dim, V * N), each lane times its scale, to (rows, head_dim).
template <class T>
void store_transposed(const float* x, int64_t lanes, const float* scale, int64_t rows,
                      int64_t head_dim, int64_t stride, T* out) {
  const int64_t whole = head_dim - head_dim % Vec::N;
  for (int64_t i = 0; i < rows; i += Vec::N) {
    const Vec scales = Vec::load(scale + i);
    for (int64_t d = 0; d < whole; d += Vec::N) {
      Vec block[Vec::N];
      for (int64_t c = 0; c < Vec::N; ++c) block[c] = Vec::load(x + (d + c) * lanes + i) * scales;
      transpose(block);
      for (int64_t r = 0; r < Vec::N && i + r < rows; ++r) {
        block[r].store(out + (i + r) * stride + d);
      }
    }
  }
  for (int64_t d = whole; d < head_dim; ++d) {
    for (int64_t i = 0; i < rows; ++i)
      from_float(x[d * lanes + i] * scale[i], out + i * stride + d);
  }
}

// Rows of keys or values as dense fp32 (rows, width), both filled up to whole tiles with zeros.
template <class T>
void load_rows(const T* x, int64_t stride, int64_t rows, int64_t head_dim, int64_t width,
               float* out) {
  const int64_t whole = head_dim - head_dim % Vec::N;
  for (int64_t r = 0; r < rows; ++r, x += stride, out += width) {
    for (int64_t d = 0; d < whole; d += Vec::N) Vec::load(x + d).store(out + d);
    for (int64_t d = whole; d < width; ++d) out[d] = d < head_dim ? to_float(x[d]) : 0.f;
  }
  for (int64_t r = rows; r % kTile; ++r, out += width) {
    for (int64_t d = 0; d < width; ++d) out[d] = 0.f;
  }
}

// scores (keys, rows) = key query^T
template <int V>
void multiply_keys(const float* query, const float* key, int64_t keys, int64_t head_dim,
                   int64_t width, float* scores) {
  constexpr int64_t lanes = V * Vec::N;
  for (int64_t j = 0; j < keys; j += kTile) {
    Vec acc[kTile][V];
    for (int r = 0; r < kTile; ++r) {
      for (int v = 0; v < V; ++v) acc[r][v] = Vec::zero();
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      Vec q[V];
      for (int v = 0; v < V; ++v) q[v] = Vec::load(query + d * lanes + v * Vec::N);
      for (int r = 0; r < kTile; ++r) {
        const Vec k = Vec::all(key[(j + r) * width + d]);
        for (int v = 0; v < V; ++v) acc[r][v] = fma(q[v], k, acc[r][v]);
      }
    }
    for (int r = 0; r < kTile; ++r) {
      for (int v = 0; v < V; ++v) acc[r][v].store(scores + (j + r) * lanes + v * Vec::N);
    }
  }
}

// Running maximum and sum of each query row over all keys so far.
template <int V>
struct SoftmaxState {
  Vec max[V], total[V];
};

// Replaces scores by exp(score - maximum). rescale: factors for the earlier sums.
template <int V>
void exponentiate(float* scores, int64_t keys, SoftmaxState<V>& state, Vec rescale[V]) {
  constexpr int64_t lanes = V * Vec::N;
  for (int v = 0; v < V; ++v) {
    float* s = scores + v * Vec::N;
    Vec largest = state.max[v];
    for (int64_t j = 0; j < keys; ++j) largest = max(largest, Vec::load(s + j * lanes));
    rescale[v] = exp(state.max[v] - largest);
    Vec total = Vec::zero();
    for (int64_t j = 0; j < keys; ++j) {
      const Vec p = exp(Vec::load(s + j * lanes) - largest);
      p.store(s + j * lanes);
      total = total + p;
    }
    state.max[v] = largest;
    state.total[v] = fma(state.total[v], rescale[v], total);
  }
}

// out (head_dim, rows) = out rescale + value^T scores
template <int V>
void add_values(const float* scores, const float* value, int64_t keys, int64_t width,
                const Vec rescale[V], float* out) {
  constexpr int64_t lanes = V * Vec::N;
  for (int64_t d = 0; d < width; d += kTile) {
    Vec acc[kTile][V];
    for (int r = 0; r < kTile; ++r) {
      for (int v = 0; v < V; ++v) {
        acc[r][v] = Vec::load(out + (d + r) * lanes + v * Vec::N) * rescale[v];
      }
    }
    for (int64_t j = 0; j < keys; ++j) {
      Vec p[V];
      for (int v = 0; v < V; ++v) p[v] = Vec::load(scores + j * lanes + v * Vec::N);
      for (int r = 0; r < kTile; ++r) {
        const Vec x = Vec::all(value[j * width + d + r]);
        for (int v = 0; v < V; ++v) acc[r][v] = fma(p[v], x, acc[r][v]);
      }
    }
    for (int r = 0; r < kTile; ++r) {
      for (int v = 0; v < V; ++v) acc[r][v].store(out + (d + r) * lanes + v * Vec::N);
    }
  }
}

// The keys [first, last) that row 0 of a block of query rows sees; each further row sees one more, and
// with a window one less of the first. Negative where causal rows stand before the first key.
struct Visible {
  int64_t first, last;
};

// Sets the scores of the keys from `key` on that a row does not see to -inf.
inline void hide(const Visible& row0, bool window, int64_t key, int64_t keys, int64_t lanes,
                 float* scores) {
  for (int64_t j = 0; j < keys; ++j, scores += lanes) {
    // Row i sees the key if row0.first + i <= key + j < row0.last + i.
    const int64_t before = key + j - row0.last + 1, behind = key + j - row0.first + 1;
    for (int64_t i = 0; i < lanes && i < before; ++i) scores[i] = -__builtin_inff();
    if (!window) continue;
    for (int64_t i = behind < 0 ? 0 : behind; i < lanes; ++i) scores[i] = -__builtin_inff();
  }
}

// Query rows [first, last) of one head, at most V registers of them, over keys [first_key, last_key) of
// the sequence. row0: what the first row sees of them.
template <class T, int V>
void attend(const VarlenAttentionArgs& a, int64_t head, int64_t first, int64_t last,
            int64_t first_key, int64_t last_key, const Visible& row0) {
  constexpr int64_t lanes = V * Vec::N;
  AttentionScratch scratch;
  const int64_t rows = last - first, kv_head = head / (a.heads / a.kv_heads);
  const int64_t width = (a.head_dim + kTile - 1) / kTile * kTile;
  const T* query =
      (const T*)a.query.data + first * a.query.token_stride + head * a.query.head_stride;
  const T* key = (const T*)a.key.data + kv_head * a.key.head_stride;
  const T* value = (const T*)a.value.data + kv_head * a.value.head_stride;
  load_transposed(query, a.query.token_stride, rows, a.head_dim, lanes, a.scale, scratch.query);
  for (int64_t i = 0; i < width * lanes; ++i) scratch.out[i] = 0.f;

  SoftmaxState<V> state;
  for (int v = 0; v < V; ++v) {
    // Not -inf: its difference to a score of -inf would be NaN.
    state.max[v] = Vec::all(-0x1.fffffep127f);
    // Rows without keys are zero, not 0 / 0.
    state.total[v] = Vec::all(first_key < last_key ? 0.f : 1.f);
  }
  if (a.causal && row0.last <= first_key) {  // the same for some of the rows
    float total[lanes];
    for (int64_t i = 0; i < lanes; ++i) total[i] = row0.last + i <= first_key ? 1.f : 0.f;
    for (int v = 0; v < V; ++v) state.total[v] = Vec::load(total + v * Vec::N);
  }
  for (int64_t j = first_key; j < last_key; j += kKeyBlock) {
    const int64_t keys = last_key - j < kKeyBlock ? last_key - j : kKeyBlock;
    Vec rescale[V];
    load_rows(key + j * a.key.token_stride, a.key.token_stride, keys, a.head_dim, width,
              scratch.rows);
    multiply_keys<V>(scratch.query, scratch.rows, keys, a.head_dim, width, scratch.scores);
    const bool all_seen = j + keys <= row0.last && (!a.window || j >= row0.first + rows - 1);
    if (a.causal && !all_seen) hide(row0, a.window, j, keys, lanes, scratch.scores);
    exponentiate<V>(scratch.scores, keys, state, rescale);
    load_rows(value + j * a.value.token_stride, a.value.token_stride, keys, a.head_dim, width,
              scratch.rows);
    add_values<V>(scratch.scores, scratch.rows, keys, width, rescale, scratch.out);
  }

  float scale[lanes];
  for (int v = 0; v < V; ++v) (Vec::all(1.f) / state.total[v]).store(scale + v * Vec::N);
  T* out = (T*)a.out + (first * a.heads + head) * a.head_dim;
  store_transposed(scratch.out, lanes, scale, rows, a.head_dim, a.heads * a.head_dim, out);
}

struct AttentionJob {
  const VarlenAttentionArgs& a;
  int64_t next;  // the next item to take
};

// Takes one item (sequence, head, block of query rows) after another until none is left, because they differ too
// much in size to be assigned in advance.
template <class T>
void attend_items(int64_t, int64_t, void* context) {
  AttentionJob& job = *(AttentionJob*)context;
  const VarlenAttentionArgs& a = job.a;
  int64_t sequence = 0, first_item = 0;
  for (;;) {
    const int64_t item = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    int64_t begin, rows, vecs, blocks;
    for (;; ++sequence, first_item += blocks * a.heads) {
      if (sequence == a.batch) return;
      begin = a.cu_seqlens_q[sequence];
      rows = a.cu_seqlens_q[sequence + 1] - begin;
      vecs = (rows + Vec::N - 1) / Vec::N;
      blocks = (vecs + kQueryVecs - 1) / kQueryVecs;
      if (item < first_item + blocks * a.heads) break;
    }
    const int64_t head = (item - first_item) / blocks, block = (item - first_item) % blocks;
    const int64_t first_vec = vecs * block / blocks, last_vec = vecs * (block + 1) / blocks;
    const int64_t first = begin + first_vec * Vec::N;
    const int64_t last = begin + (last_vec < vecs ? last_vec * Vec::N : rows);
    int64_t first_key = a.cu_seqlens_k[sequence], last_key = a.cu_seqlens_k[sequence + 1];
    Visible row0{first_key, last_key};
    if (a.causal) {
      row0.last = last_key - (begin + rows - first) + 1;
      row0.first = row0.last - a.window;
      if (a.window && row0.first > first_key) first_key = row0.first;
      const int64_t seen = row0.last + (last - first) - 1;
      if (seen < last_key) last_key = seen;
    }
    const int64_t used = last_vec - first_vec;
    if (used == 1) attend<T, 1>(a, head, first, last, first_key, last_key, row0);
    if (used == 2) attend<T, 2>(a, head, first, last, first_key, last_key, row0);
    if constexpr (kQueryVecs == 4) {
      if (used == 3) attend<T, 3>(a, head, first, last, first_key, last_key, row0);
      if (used == 4) attend<T, 4>(a, head, first, last, first_key, last_key, row0);
    }
  }
}

void varlen_attention(const VarlenAttentionArgs& a) {
  int64_t pairs = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t rows = a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b];
    pairs += (rows + Vec::N) * (a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b] + 16);
  }
  const int64_t wanted = 1 + pairs * a.heads * a.head_dim / (4 * kThreadWork);
  const int64_t threads = wanted < num_threads() ? wanted : num_threads();
  AttentionJob job{a, 0};
  if (a.dtype == kFloat32) return parallel_for(0, threads, 1, attend_items<float>, &job);
  if (a.dtype == kFloat16) return parallel_for(0, threads, 1, attend_items<f16>, &job);
  parallel_for(0, threads, 1, attend_items<bf16>, &job);
}
