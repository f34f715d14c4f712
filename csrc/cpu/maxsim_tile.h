// Used by all versions of maxsim: a thread's queries, and their products with rows of a document.
// Included once per ISA (no include guard).

// Rearranged queries of one group: they stay in the L2 cache while the documents are read.
constexpr int64_t kGroupFloats = 256 * 1024;
// Document rows that are multiplied with all queries of a group before the next rows are read.
constexpr int64_t kChunkBytes = 128 * 1024;
constexpr int64_t kChunkRows = 1024;

// A thread's group of queries: rows rearranged in blocks of kBlockRows, and for each row the largest product so
// far and its place in the document (the bits of an integer).
struct QueryGroup {
  float *packed, *best, *place, *query_norm;  // norms are inverse
  float* chunk;                               // of a document, as fp32
  float* factor;  // of each row of the chunk: what its products are multiplied by
  int64_t first = 0, last = 0;
};

inline int64_t span_rows(const RowsArg& x, int64_t i) {
  return x.spans[2 * i + 1] - x.spans[2 * i];
}
inline int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// Document rows of a chunk: a multiple of `step`, those that are multiplied at a time.
inline int64_t chunk_rows(const MaxSimArgs& a, int64_t step) {
  const int64_t fit = kChunkBytes / (4 * a.depth + 1) / step * step;
  return fit < step ? step : fit > kChunkRows ? kChunkRows : fit;
}

// scale / |scale x|, or the scale over 1e-12 where that is larger than the norm.
template <class T>
float normalizer(const T* x, int64_t depth, float scale) {
  Vec squares = Vec::zero();
  int64_t k = 0;
  for (; k + Vec::N <= depth; k += Vec::N) {
    const Vec v = Vec::load(x + k);
    squares = fma(v, v, squares);
  }
  float total = sum(squares);
  for (; k < depth; ++k) total += to_float(x[k]) * to_float(x[k]);
  const float norm = __builtin_sqrtf(total) * __builtin_fabsf(scale);
  return scale / (norm < 1e-12f ? 1e-12f : norm);
}

// Factors of the products with rows [0, rows) of a document's chunk; null if there are none.
template <class T>
const float* row_factors(const MaxSimArgs& a, const T* x, int64_t rows, const float* scale,
                         float* factors) {
  if (!a.normalize) return scale;
  for (int64_t r = 0; r < rows; ++r) {
    factors[r] = normalizer(x + r * a.document.stride, a.depth, scale ? scale[r] : 1.f);
  }
  return factors;
}

// Multiplies document rows with query rows in registers, in the arithmetic of U.
template <class U>
struct Registers {
  using Element = typename U::Element;
  static constexpr int64_t kRows = kTileColumns;                       // of a document, at a time
  static int64_t words(int64_t depth) { return depth / U::kPerWord; }  // of a packed row
  // products[m][row] of document rows m < rows.
  template <int VECS>
  static void multiply(const Element* document, int64_t stride, int64_t rows, int64_t depth,
                       const float* packed, float* products) {
    const Element* tile[kTileColumns];  // past the last row, the last one again
    for (int m = 0; m < kTileColumns; ++m) tile[m] = document + (m < rows ? m : rows - 1) * stride;
    multiply_tile<U, VECS, true>(tile, packed, words(depth), products);
  }
};

// Updates the maxima of one block of query rows with document rows [0, rows); `place`: number of the first.
template <class M, int VECS>
void update_best(const typename M::Element* document, int64_t stride, int64_t rows, int64_t place,
                 const float* factors, const float* packed, int64_t depth, float* best,
                 float* places) {
  Vec top[VECS], at[VECS];
  for (int v = 0; v < VECS; ++v) {
    top[v] = Vec::load(best + v * Vec::N);
    at[v] = Vec::load(places + v * Vec::N);
  }
  for (int64_t r = 0; r < rows; r += M::kRows) {
    alignas(64) float products[M::kRows * kBlockRows];
    M::template multiply<VECS>(document + r * stride, stride, rows - r, depth, packed, products);
    for (int m = 0; m < M::kRows && r + m < rows; ++m) {
      const Vec row = Vec::all(bits_float(uint32_t(place + r + m)));
      for (int v = 0; v < VECS; ++v) {
        Vec product = Vec::load(products + m * kBlockRows + v * Vec::N);
        if (factors) product = product * Vec::all(factors[r + m]);
        keep_larger(top[v], at[v], product, row);
      }
    }
  }
  for (int v = 0; v < VECS; ++v) {
    top[v].store(best + v * Vec::N);
    at[v].store(places + v * Vec::N);
  }
}

// The same for block `block` of the group, of which `live` rows belong to the query.
template <class M>
void update_block(const MaxSimArgs& a, const QueryGroup& group, int64_t block, int64_t live,
                  const typename M::Element* document, int64_t stride, int64_t rows, int64_t place,
                  const float* factors) {
  const int64_t depth = a.depth;
  const float* packed = group.packed + block * kBlockRows * M::words(depth);
  float *best = group.best + block * kBlockRows, *places = group.place + block * kBlockRows;
  if (live > 2 * Vec::N)
    return update_best<M, 3>(document, stride, rows, place, factors, packed, depth, best, places);
  if (live > Vec::N)
    return update_best<M, 2>(document, stride, rows, place, factors, packed, depth, best, places);
  update_best<M, 1>(document, stride, rows, place, factors, packed, depth, best, places);
}
