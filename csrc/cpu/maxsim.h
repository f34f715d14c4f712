// score(q, d) = sum over the rows i of q of max over the rows j of d of q_i d_j, and where each maximum is.
//
// The queries are few and small: a thread rearranges a group of them as linear.h does with x, so that
// query rows stand in the lanes of the registers, and every document then passes by once, kTileColumns rows at a time. A
// maximum is thus lane by lane, without a horizontal step. Documents that no instruction multiplies as
// they are become fp32 a chunk at a time; a chunk stays in the caches for all queries of the group.
// Limits: a query pays for whole registers of rows. Included once per ISA (no include guard).

// Rearranged queries of one group: they stay in the L2 cache while documents pass by.
constexpr int64_t kGroupFloats = 256 * 1024;
// Document rows that meet all queries of a group before the next ones do.
constexpr int64_t kChunkBytes = 128 * 1024;
constexpr int64_t kChunkRows = 1024;

struct MaxSimJob {
  const MaxSimArgs& a;
  float* scratch;
  int64_t items;
  int64_t queries_at_once;  // of an item
  int64_t next;             // item that nobody has taken yet
};

// What a thread holds of its group of queries: rows rearranged in blocks of kBlockRows, and for each row the
// largest product so far and its place in the document, an integer's bits.
struct QueryGroup {
  float *packed, *best, *place, *query_norm;
  float* chunk;          // of a document, as fp32
  float* document_norm;  // of the chunk; norms are inverse
  int64_t first = 0, last = 0;
};

inline int64_t span_begin(const RowsArg& x, int64_t i) { return x.spans[2 * i]; }
inline int64_t span_rows(const RowsArg& x, int64_t i) {
  return x.spans[2 * i + 1] - x.spans[2 * i];
}
inline int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

inline int64_t chunk_rows(const MaxSimArgs& a) {
  const int64_t fit = kChunkBytes / (4 * a.depth + 1) / kTileColumns * kTileColumns;
  return fit < kTileColumns ? kTileColumns : fit > kChunkRows ? kChunkRows : fit;
}

inline int64_t longest_query(const MaxSimArgs& a) {  // in blocks
  int64_t longest = 1;
  for (int64_t i = 0; i < a.query.count; ++i) {
    const int64_t blocks = blocks_of(span_rows(a.query, i));
    if (blocks > longest) longest = blocks;
  }
  return longest;
}

// Blocks that a group may have: those of the longest query, or as many as the budget holds.
inline int64_t group_blocks(const MaxSimArgs& a) {
  const int64_t longest = longest_query(a);
  if (a.pairs) return longest;
  const int64_t fit = kGroupFloats / (kBlockRows * (a.depth + 1)) / longest;
  const int64_t queries = fit < 1 ? 1 : fit < a.query.count ? fit : a.query.count;
  return longest * queries;
}

inline int64_t maxsim_threads(const MaxSimArgs& a) {
  int64_t rows = 0;
  if (a.pairs) {
    for (int64_t p = 0; p < a.pair_count; ++p) {
      rows += span_rows(a.query, a.pairs[2 * p]) * span_rows(a.document, a.pairs[2 * p + 1]);
    }
  } else {
    int64_t documents = 0;
    for (int64_t i = 0; i < a.query.count; ++i) rows += span_rows(a.query, i);
    for (int64_t i = 0; i < a.document.count; ++i) documents += span_rows(a.document, i);
    rows *= documents;
  }
  // A further thread for every 2 million multiplications, which take one some 50 us.
  const int64_t wanted = 1 + rows * a.depth / 2000000;
  return wanted < num_threads() ? wanted : num_threads();
}

inline int64_t thread_floats(const MaxSimArgs& a) {
  const int64_t rows = group_blocks(a) * kBlockRows;
  return rows * (a.depth + 3) + (chunk_rows(a) + kTile) * a.depth + kChunkRows;
}

// Floats of scratch that `maxsim` needs.
int64_t maxsim_scratch(const MaxSimArgs& a) { return maxsim_threads(a) * thread_floats(a); }

template <class T>
float inverse_norm(const T* x, int64_t depth) {
  Vec squares = Vec::zero();
  int64_t k = 0;
  for (; k + Vec::N <= depth; k += Vec::N) {
    const Vec v = Vec::load(x + k);
    squares = fma(v, v, squares);
  }
  float total = sum(squares);
  for (; k < depth; ++k) total += to_float(x[k]) * to_float(x[k]);
  const float norm = __builtin_sqrtf(total);
  return 1.f / (norm < 1e-12f ? 1e-12f : norm);
}

// Document rows [0, rows), `place` the first one's number, against one block of query rows.
template <class U, int VECS>
void update_best(const typename U::Element* document, int64_t stride, int64_t rows, int64_t place,
                 const float* inverse_norms, const float* packed, int64_t units, float* best,
                 float* places) {
  Vec top[VECS], at[VECS];
  for (int v = 0; v < VECS; ++v) {
    top[v] = Vec::load(best + v * Vec::N);
    at[v] = Vec::load(places + v * Vec::N);
  }
  for (int64_t r = 0; r < rows; r += kTileColumns) {
    const typename U::Element* tile[kTileColumns];  // past the last row, the last one again
    for (int m = 0; m < kTileColumns; ++m) {
      tile[m] = document + (r + m < rows ? r + m : rows - 1) * stride;
    }
    alignas(64) float products[kTileColumns * kBlockRows];
    multiply_tile<U, VECS, true>(tile, packed, units, products);
    for (int m = 0; m < kTileColumns && r + m < rows; ++m) {
      const Vec row = Vec::all(bits_float(uint32_t(place + r + m)));
      for (int v = 0; v < VECS; ++v) {
        Vec product = Vec::load(products + m * kBlockRows + v * Vec::N);
        if (inverse_norms) product = product * Vec::all(inverse_norms[r + m]);
        keep_larger(top[v], at[v], product, row);
      }
    }
  }
  for (int v = 0; v < VECS; ++v) {
    top[v].store(best + v * Vec::N);
    at[v].store(places + v * Vec::N);
  }
}

// One chunk of a document against all queries of the group.
template <class U>
void meet_queries(const MaxSimArgs& a, const QueryGroup& group, const typename U::Element* document,
                  int64_t stride, int64_t rows, int64_t place) {
  const int64_t units = a.depth / U::kPerUnit;
  const float* norms = a.normalize ? group.document_norm : nullptr;
  int64_t block = 0;
  for (int64_t q = group.first; q < group.last; ++q) {
    for (int64_t left = span_rows(a.query, q); left > 0; left -= kBlockRows, ++block) {
      const float* packed = group.packed + block * kBlockRows * units;
      float *best = group.best + block * kBlockRows, *places = group.place + block * kBlockRows;
      if (left > 2 * Vec::N)
        update_best<U, 3>(document, stride, rows, place, norms, packed, units, best, places);
      if (left > Vec::N && left <= 2 * Vec::N)
        update_best<U, 2>(document, stride, rows, place, norms, packed, units, best, places);
      if (left <= Vec::N)
        update_best<U, 1>(document, stride, rows, place, norms, packed, units, best, places);
    }
  }
}

// In: elements as they lie in memory; U: those that are multiplied, the same where they need no conversion.
template <class In, class U>
void pass_document(const MaxSimArgs& a, const QueryGroup& group, int64_t document) {
  const int64_t step = chunk_rows(a), all = span_rows(a.document, document);
  const int64_t stride = a.document.stride;
  const auto* x = (const typename In::Element*)a.document.data;
  x += span_begin(a.document, document) * stride;
  for (int64_t row = 0; row < all; row += step, x += step * stride) {
    const int64_t rows = all - row < step ? all - row : step;
    for (int64_t r = 0; r < rows && a.normalize; ++r) {
      group.document_norm[r] = inverse_norm(x + r * stride, a.depth);
    }
    if constexpr (sizeof(typename In::Element) == sizeof(typename U::Element)) {
      meet_queries<U>(a, group, x, stride, rows, row);
    } else {
      load_rows(x, stride, rows, a.depth, a.depth, group.chunk);
      meet_queries<U>(a, group, group.chunk, a.depth, rows, row);
    }
  }
}

template <class In>
void pack_group(const MaxSimArgs& a, const QueryGroup& group) {
  const int64_t units = a.depth / In::kPerUnit, stride = a.query.stride;
  int64_t block = 0;
  for (int64_t q = group.first; q < group.last; ++q) {
    const auto* x = (const typename In::Element*)a.query.data + span_begin(a.query, q) * stride;
    for (int64_t left = span_rows(a.query, q); left > 0; left -= kBlockRows, ++block) {
      const int64_t rows = left < kBlockRows ? left : kBlockRows;
      pack_rows<In>(x, stride, rows, units, group.packed + block * kBlockRows * units);
      for (int64_t r = 0; r < rows && a.normalize; ++r, x += stride) {
        group.query_norm[block * kBlockRows + r] = inverse_norm(x, a.depth);
      }
      if (!a.normalize) x += rows * stride;
    }
  }
}

// A document that also holds a zero vector begins with that one's product, at no place.
inline void start_best(const MaxSimArgs& a, const QueryGroup& group, int64_t blocks,
                       int64_t document) {
  const bool zero = a.zero && a.zero[document];
  for (int64_t r = 0; r < blocks * kBlockRows; ++r) {
    group.best[r] = zero ? 0.f : -__builtin_inff();
    group.place[r] = bits_float(zero ? ~0u : 0u);
  }
}

// The group's queries against a document: those of pair `pair`, and of every `step`th pair from there.
inline void store_scores(const MaxSimArgs& a, const QueryGroup& group, int64_t document,
                         int64_t pair, int64_t step) {
  const bool empty = span_rows(a.document, document) == 0;
  int64_t block = 0;
  for (int64_t q = group.first; q < group.last; ++q, pair += step) {
    const int64_t rows = empty ? 0 : span_rows(a.query, q), at = block * kBlockRows;
    float total = 0.f;
    for (int64_t r = at; r < at + rows; ++r) {
      total += a.normalize ? group.best[r] * group.query_norm[r] : group.best[r];
    }
    a.scores[pair] = total;
    for (int64_t r = 0; r < a.width; ++r) {
      a.argmax[pair * a.width + r] = r < rows ? int32_t(float_bits(group.place[at + r])) : -1;
    }
    block += blocks_of(span_rows(a.query, q));
  }
}

// Takes one item after the other until none is left: documents differ too much in length to be dealt
// out beforehand. An item is a pair, or a document with a group of queries; a group's items are neighbours.
template <class In, class U>
void maxsim_items(int64_t slot, int64_t, void* context) {
  MaxSimJob& job = *(MaxSimJob*)context;
  const MaxSimArgs& a = job.a;
  const int64_t rows = group_blocks(a) * kBlockRows;
  QueryGroup group;
  group.packed = job.scratch + slot * thread_floats(a);
  group.best = group.packed + rows * a.depth;
  group.place = group.best + rows;
  group.query_norm = group.place + rows;
  group.chunk = group.query_norm + rows;
  group.document_norm = group.chunk + (chunk_rows(a) + kTile) * a.depth;
  int64_t blocks = 0;
  for (;;) {
    const int64_t item = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (item >= job.items) return;
    const int64_t first =
        a.pairs ? a.pairs[2 * item] : item / a.document.count * job.queries_at_once;
    const int64_t document = a.pairs ? a.pairs[2 * item + 1] : item % a.document.count;
    if (group.last == 0 || first != group.first) {
      group.first = first;
      group.last = first + job.queries_at_once;
      if (group.last > a.query.count) group.last = a.query.count;
      blocks = 0;
      for (int64_t q = first; q < group.last; ++q) blocks += blocks_of(span_rows(a.query, q));
      pack_group<In>(a, group);
    }
    start_best(a, group, blocks, document);
    pass_document<In, U>(a, group, document);
    const int64_t pair = a.pairs ? item : first * a.document.count + document;
    store_scores(a, group, document, pair, a.document.count);
  }
}

void maxsim(const MaxSimArgs& a, float* scratch) {
  const int64_t threads = maxsim_threads(a);
  MaxSimJob job{a, scratch, a.pair_count, 1, 0};
  if (!a.pairs && a.query.count && a.document.count) {
    // Groups as large as the scratch allows, but items enough for all threads.
    const int64_t most = group_blocks(a) / longest_query(a);
    const int64_t fair = a.query.count * a.document.count / (4 * threads) + 1;
    job.queries_at_once = most < fair ? most : fair;
    const int64_t groups = (a.query.count + job.queries_at_once - 1) / job.queries_at_once;
    job.items = groups * a.document.count;
  }
#if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
  if (a.dtype == kBFloat16 && a.depth % 2 == 0)
    return parallel_for(0, threads, 1, maxsim_items<Bf16Pairs, Bf16Pairs>, &job);
#endif
  using Fp32 = Floats<float>;
  if (a.dtype == kFloat32) return parallel_for(0, threads, 1, maxsim_items<Fp32, Fp32>, &job);
  if (a.dtype == kFloat16)
    return parallel_for(0, threads, 1, maxsim_items<Floats<f16>, Fp32>, &job);
  parallel_for(0, threads, 1, maxsim_items<Floats<bf16>, Fp32>, &job);
}
