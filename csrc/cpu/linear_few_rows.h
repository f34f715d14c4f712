// out = x weight^T + bias for few rows of x (a query or a few), read straight from the model's weight.
//
// With so few rows the time is that of reading the weight once. Each thread takes consecutive weight rows, four at
// a time, and multiplies them with a few rows of x at a time, so that a loaded register is used several times.
// While it does so for all rows of x, it fetches the weight rows to come: spread over all this arithmetic, so that
// memory is never idle. Included once per ISA (no include guard).

constexpr int kFewColumns = 4;  // as sum4 takes
// Rows of x in a tile: their sums fit into the registers along with the loaded values.
constexpr int kFewTileRows = Vec::N == 8 ? 3 : 6;
// How far ahead weights are fetched, in blocks of kFewColumns weight rows.
constexpr int kFewBlocksAhead = 2;

// One tile: ROWS rows of x against up to four weight rows. Fetches LINES lines from `ahead` on with each step.
template <class U, int ROWS, int LINES>
void dot_tile(const LinearArgs& a, const LinearPart& part, int64_t row, int64_t column, int columns,
              const char* ahead) {
  using T = typename U::Element;
  constexpr int kStep = Vec::N * U::kPerWord;
  const T* x = (const T*)a.x + row * a.x_stride;
  const T* w[kFewColumns];  // past the last column, the last one again
  for (int c = 0; c < kFewColumns; ++c) {
    w[c] = (const T*)part.weight + (column + (c < columns ? c : columns - 1)) * a.depth;
  }
  Vec acc[ROWS][kFewColumns];
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < kFewColumns; ++c) acc[r][c] = Vec::zero();
  }
  int64_t k = 0;
  for (; k + kStep <= a.depth; k += kStep) {
    for (int l = 0; l < LINES; ++l) __builtin_prefetch(ahead + 64 * l, 0, 2);
    ahead += 64 * LINES;
    Vec wk[kFewColumns];
    for (int c = 0; c < kFewColumns; ++c) wk[c] = U::load(w[c] + k);
    for (int r = 0; r < ROWS; ++r) {
      const Vec xk = U::load(x + r * a.x_stride + k);
      for (int c = 0; c < kFewColumns; ++c) acc[r][c] = U::multiply_add(xk, wk[c], acc[r][c]);
    }
  }
  float sums[ROWS * kFewColumns + Vec::N];  // gelu takes whole registers
  for (int r = 0; r < ROWS; ++r) {
    float* dot = sums + r * kFewColumns;
    sum4(acc[r], dot);
    for (int c = 0; c < columns; ++c) {
      for (int64_t t = k; t < a.depth; ++t)
        dot[c] += to_float(x[r * a.x_stride + t]) * to_float(w[c][t]);
      if (part.bias) dot[c] += to_float(((const T*)part.bias)[column + c]);
    }
  }
  for (int i = 0; a.gelu && i < ROWS * kFewColumns; i += Vec::N) {
    gelu(Vec::load(sums + i)).store(sums + i);
  }
  for (int r = 0; r < ROWS; ++r) {
    T* out = (T*)a.out + (row + r) * a.columns + part.first + column;
    for (int c = 0; c < columns; ++c) from_float(sums[r * kFewColumns + c], out + c);
  }
}

template <class U, int LINES>
void dot_rows(const LinearArgs& a, const LinearPart& part, int64_t row, int64_t rows,
              int64_t column, int columns, const char* ahead) {
  if (rows == 1) dot_tile<U, 1, LINES>(a, part, row, column, columns, ahead);
  if (rows == 2) dot_tile<U, 2, LINES>(a, part, row, column, columns, ahead);
  if (rows == 3) dot_tile<U, 3, LINES>(a, part, row, column, columns, ahead);
  if constexpr (kFewTileRows == 6) {
    if (rows == 4) dot_tile<U, 4, LINES>(a, part, row, column, columns, ahead);
    if (rows == 5) dot_tile<U, 5, LINES>(a, part, row, column, columns, ahead);
    if (rows == 6) dot_tile<U, 6, LINES>(a, part, row, column, columns, ahead);
  }
}

// Weight rows [begin, end) of a part against all rows of x.
template <class U, int LINES>
void dot_part(const LinearArgs& a, const LinearPart& part, int64_t begin, int64_t end,
              int64_t tiles) {
  const int64_t weight_row = a.depth * sizeof(typename U::Element);
  for (int64_t column = begin; column < end; column += kFewColumns) {
    const int columns = end - column < kFewColumns ? int(end - column) : kFewColumns;
    const char* ahead =
        (const char*)part.weight + (column + kFewBlocksAhead * kFewColumns) * weight_row;
    int64_t row = 0;
    for (int64_t left = tiles; left > 0; --left) {
      const int64_t rows = (a.rows - row + left - 1) / left;
      dot_rows<U, LINES>(a, part, row, rows, column, columns, ahead);
      row += rows;
      ahead += kFewColumns * weight_row / tiles;
    }
  }
}

// Columns [begin, end) of the result, whichever parts they belong to.
template <class U>
void dot_columns(int64_t begin, int64_t end, void* context) {
  const LinearArgs& a = *(const LinearArgs*)context;
  const int64_t tiles = (a.rows + kFewTileRows - 1) / kFewTileRows;
  // A step of all tiles has to fetch what it reads: kFewColumns registers of weights.
  const int64_t bytes = kFewColumns * Vec::N * U::kPerWord * sizeof(typename U::Element);
  for (int64_t p = 0; p < a.n_parts; ++p) {
    const LinearPart& part = a.parts[p];
    const int64_t from = begin > part.first ? begin - part.first : 0;
    const int64_t to = end - part.first < part.columns ? end - part.first : part.columns;
    if (from >= to) continue;
    if (bytes > 2 * 64 * tiles) {
      dot_part<U, 4>(a, part, from, to, tiles);
    } else if (bytes > 64 * tiles) {
      dot_part<U, 2>(a, part, from, to, tiles);
    } else {
      dot_part<U, 1>(a, part, from, to, tiles);
    }
  }
}

void linear_few_rows(const LinearArgs& a) {
  const int64_t grain = 65536 / (a.depth + 1) + 1;
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
