// out = x weight^T + bias for few rows of x (a query or a few), read straight from the model's weight.
//
// With so few rows the time is that of reading the weight once. Each thread takes consecutive weight rows and
// multiplies a few of them with a few rows of x at a time, so that a loaded register is used several times.
// Included once per ISA (no include guard).

// Columns of a tile: 24 sums fit into the registers along with the loaded values.
constexpr int few_columns(int64_t rows) { return rows <= 6 ? 4 : int(24 / rows); }

template <class U, int ROWS>
void dot_tile(const LinearArgs& a, const LinearPart& part, int64_t row, int64_t column,
              int columns) {
  using T = typename U::Element;
  constexpr int COLUMNS = few_columns(ROWS), kStep = Vec::N * U::kPerWord;
  const T* x = (const T*)a.x + row * a.x_stride;
  const T* w[COLUMNS];  // past the last column, the last one again
  for (int c = 0; c < COLUMNS; ++c) {
    w[c] = (const T*)part.weight + (column + (c < columns ? c : columns - 1)) * a.depth;
  }
  Vec acc[ROWS][4];
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < 4; ++c) acc[r][c] = Vec::zero();  // sum4 takes four
  }
  int64_t k = 0;
  for (; k + kStep <= a.depth; k += kStep) {
    Vec wk[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      wk[c] = U::load(w[c] + k);
      // Sixteen rows ahead, to L2: the processor's own prefetcher starts anew at each row.
      if (row == 0) __builtin_prefetch(w[c] + 16 * a.depth + k, 0, 2);
    }
    for (int r = 0; r < ROWS; ++r) {
      const Vec xk = U::load(x + r * a.x_stride + k);
      for (int c = 0; c < COLUMNS; ++c) acc[r][c] = U::multiply_add(xk, wk[c], acc[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float dot[4];
    sum4(acc[r], dot);
    T* out = (T*)a.out + (row + r) * a.columns + part.first + column;
    for (int c = 0; c < columns; ++c) {
      for (int64_t t = k; t < a.depth; ++t)
        dot[c] += to_float(x[r * a.x_stride + t]) * to_float(w[c][t]);
      if (part.bias) dot[c] += to_float(((const T*)part.bias)[column + c]);
      from_float(dot[c], out + c);
    }
  }
}

// Weight rows [begin, end) of a part against all rows of x: up to 8 in one tile, more in tiles of at most 6.
template <class U>
void dot_part(const LinearArgs& a, const LinearPart& part, int64_t begin, int64_t end) {
  const int64_t tiles = a.rows <= 8 ? 1 : (a.rows + 5) / 6;
  const int step = tiles == 1 ? few_columns(a.rows) : 4;
  for (int64_t column = begin; column < end; column += step) {
    const int columns = end - column < step ? int(end - column) : step;
    int64_t row = 0;
    for (int64_t left = tiles; left > 0; --left) {
      const int64_t rows = (a.rows - row + left - 1) / left;
      if (rows == 1) dot_tile<U, 1>(a, part, row, column, columns);
      if (rows == 2) dot_tile<U, 2>(a, part, row, column, columns);
      if (rows == 3) dot_tile<U, 3>(a, part, row, column, columns);
      if (rows == 4) dot_tile<U, 4>(a, part, row, column, columns);
      if (rows == 5) dot_tile<U, 5>(a, part, row, column, columns);
      if (rows == 6) dot_tile<U, 6>(a, part, row, column, columns);
      if (rows == 7) dot_tile<U, 7>(a, part, row, column, columns);
      if (rows == 8) dot_tile<U, 8>(a, part, row, column, columns);
      row += rows;
    }
  }
}

// Columns [begin, end) of the result, whichever parts they belong to.
template <class U>
void dot_columns(int64_t begin, int64_t end, void* context) {
  const LinearArgs& a = *(const LinearArgs*)context;
  for (int64_t p = 0; p < a.n_parts; ++p) {
    const LinearPart& part = a.parts[p];
    const int64_t from = begin > part.first ? begin - part.first : 0;
    const int64_t to = end - part.first < part.columns ? end - part.first : part.columns;
    if (from < to) dot_part<U>(a, part, from, to);
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
