// out = x weight^T + bias for few rows of x (a query or a few), read straight from the model's weight.
//
// With so few rows the time is that of reading the weight once. Each thread takes consecutive weight rows, four at
// a time, and multiplies them with a few rows of x at a time, so that a loaded register is used several times.
// While it does so for all rows of x, it fetches the weight rows to come: spread over all this arithmetic, so that
// memory is never idle. Included once per ISA (no include guard).

constexpr int kFewColumns = 4;  // as sum4 takes
// Rows of x in a tile: their sums fit into the registers along with the loaded values.
constexpr int kFewTileRows = Vec::N == 8 ? 3 : 6;
// How far ahead weight rows are fetched.
constexpr int kFewRowsAhead = 8;
// Columns whose sums are finished together, and rows of x for which the weight is read once.
constexpr int kFewGroup = 16;
constexpr int64_t kMostFewRows = 32;

// Some columns of a part's result, and their sums (rows, kFewGroup).
template <class T>
struct FewColumns {
  const LinearArgs& a;
  const LinearPart& part;
  int64_t row, rows;  // of x
  int64_t column;
  int columns;  // up to kFewGroup
  float sums[kMostFewRows * kFewGroup];
};

// One tile: ROWS rows of x from `row` on against up to four weight rows from column `c0` of the group on. Fetches
// AHEAD rows of the weight from `ahead` on meanwhile.
template <class U, int ROWS, int AHEAD>
void dot_tile(FewColumns<typename U::Element>& group, int64_t row, int c0,
              const typename U::Element* ahead) {
  using T = typename U::Element;
  constexpr int kStep = Vec::N * U::kPerWord;
  const LinearArgs& a = group.a;
  const T* x = (const T*)a.x + (group.row + row) * a.x_stride;
  const T* w[kFewColumns];  // past the last column, the last one again
  w[0] = (const T*)group.part.weight + (group.column + c0) * a.depth;
  for (int c = 1; c < kFewColumns; ++c) {
    w[c] = w[c - 1] + (c0 + c < group.columns ? a.depth : 0);
  }
  Vec acc[ROWS][kFewColumns];
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < kFewColumns; ++c) acc[r][c] = Vec::zero();
  }
  int64_t k = 0;
  for (; k + kStep <= a.depth; k += kStep) {
    for (int i = 0; i < AHEAD; ++i) __builtin_prefetch(ahead + i * a.depth + k, 0, 2);
    Vec wk[kFewColumns];
    for (int c = 0; c < kFewColumns; ++c) wk[c] = U::load(w[c] + k);
    for (int r = 0; r < ROWS; ++r) {
      const Vec xk = U::load(x + r * a.x_stride + k);
      for (int c = 0; c < kFewColumns; ++c) acc[r][c] = U::multiply_add(xk, wk[c], acc[r][c]);
    }
  }
  float* sums = group.sums + row * kFewGroup + c0;
#pragma GCC unroll 6  // else the compiler keeps the sums in memory
  for (int r = 0; r < ROWS; ++r) sum4(acc[r], sums + r * kFewGroup);
  if (k == a.depth) return;
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < kFewColumns; ++c) {
      float dot = 0.f;
      for (int64_t t = k; t < a.depth; ++t) {
        dot += to_float(x[r * a.x_stride + t]) * to_float(w[c][t]);
      }
      sums[r * kFewGroup + c] += dot;
    }
  }
}

template <class U, int AHEAD>
void dot_rows(FewColumns<typename U::Element>& group, int64_t row, int64_t rows, int c0,
              const typename U::Element* ahead) {
  if (rows == 1) dot_tile<U, 1, AHEAD>(group, row, c0, ahead);
  if (rows == 2) dot_tile<U, 2, AHEAD>(group, row, c0, ahead);
  if (rows == 3) dot_tile<U, 3, AHEAD>(group, row, c0, ahead);
  if constexpr (kFewTileRows == 6) {
    if (rows == 4) dot_tile<U, 4, AHEAD>(group, row, c0, ahead);
    if (rows == 5) dot_tile<U, 5, AHEAD>(group, row, c0, ahead);
    if (rows == 6) dot_tile<U, 6, AHEAD>(group, row, c0, ahead);
  }
}

// The group's sums plus bias, or their GELU, to the result.
template <class T>
void finish_columns(FewColumns<T>& group) {
  const LinearArgs& a = group.a;
  float bias[kFewGroup];
  for (int c = 0; c < kFewGroup; ++c) {
    const bool given = group.part.bias && c < group.columns;
    bias[c] = given ? to_float(((const T*)group.part.bias)[group.column + c]) : 0.f;
  }
  for (int64_t row = 0; row < group.rows; ++row) {
    float* sums = group.sums + row * kFewGroup;
    T* out = (T*)a.out + (group.row + row) * a.columns + group.part.first + group.column;
    for (int c = 0; c < kFewGroup; c += Vec::N) {
      Vec y = Vec::load(sums + c) + Vec::load(bias + c);
      if (a.gelu) y = gelu(y);
      if (c + Vec::N <= group.columns) {
        y.store(out + c);
      } else {
        y.store(sums + c);
        for (int i = c; i < group.columns && i < c + Vec::N; ++i) from_float(sums[i], out + i);
      }
    }
  }
}

// Weight rows [begin, end) of a part against `rows` rows of x, in tiles that fetch AHEAD rows each.
template <class U, int AHEAD>
void dot_part(const LinearArgs& a, const LinearPart& part, int64_t begin, int64_t end, int64_t row,
              int64_t rows, int64_t tiles) {
  using T = typename U::Element;
  FewColumns<T> group{a, part, row, rows, 0, 0};
  for (group.column = begin; group.column < end; group.column += kFewGroup) {
    group.columns = end - group.column < kFewGroup ? int(end - group.column) : kFewGroup;
    for (int c0 = 0; c0 < group.columns; c0 += kFewColumns) {
      const T* block = (const T*)part.weight + (group.column + c0) * a.depth;
      int64_t first = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t count = (rows - first + tiles - tile - 1) / (tiles - tile);
        // All rows of the block that is kFewRowsAhead on are fetched once; then what is there already.
        const int64_t fetched = tile * AHEAD < kFewColumns ? kFewRowsAhead + tile * AHEAD : 0;
        dot_rows<U, AHEAD>(group, first, count, c0, block + fetched * a.depth);
        first += count;
      }
    }
    finish_columns(group);
  }
}

// Columns [begin, end) of the result, whichever parts they belong to.
template <class U>
void dot_columns(int64_t begin, int64_t end, void* context) {
  const LinearArgs& a = *(const LinearArgs*)context;
  for (int64_t row = 0; row < a.rows; row += kMostFewRows) {
    const int64_t rows = a.rows - row < kMostFewRows ? a.rows - row : kMostFewRows;
    const int64_t tiles = (rows + kFewTileRows - 1) / kFewTileRows;
    for (int64_t p = 0; p < a.n_parts; ++p) {
      const LinearPart& part = a.parts[p];
      const int64_t from = begin > part.first ? begin - part.first : 0;
      const int64_t to = end - part.first < part.columns ? end - part.first : part.columns;
      if (from >= to) continue;
      if (tiles == 1) {
        dot_part<U, kFewColumns>(a, part, from, to, row, rows, tiles);
      } else if (tiles < kFewColumns) {
        dot_part<U, kFewColumns / 2>(a, part, from, to, row, rows, tiles);
      } else {
        dot_part<U, 1>(a, part, from, to, row, rows, tiles);
      }
    }
  }
}

void linear_few_rows(const LinearArgs& a) {
  const int64_t grain = grain_of(a.depth);
  void* context = (void*)&a;
#if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
  if (a.dtype == kBFloat16)
    return parallel_for(0, a.columns, grain, dot_columns<Bf16Pairs>, context);
#endif
  if (a.dtype == kFloat32)
    return parallel_for(0, a.columns, grain, dot_columns<Floats<float>>, context);
  if (a.dtype == kFloat16)
    return parallel_for(0, a.columns, grain, dot_columns<Floats<f16>>, context);
  parallel_for(0, a.columns, grain, dot_columns<Floats<bf16>>, context);
}
