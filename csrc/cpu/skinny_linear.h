// out = x weight^T + bias for few rows of x (a query or a few), read straight from the model's weight.
//
// With so few rows the time is that of reading the weight once. Each thread takes a run of weight
// rows; four of them meet up to six rows of x at a time, so that a loaded register is used several times.
// Included once per ISA (no include guard).

template <class T, int ROWS>
void dot_tile(const SkinnyLinearArgs& a, int64_t row, int64_t column, int columns) {
  const T* x = (const T*)a.x + row * a.x_stride;
  const T* w[4];  // past the last column, the last one again
  for (int c = 0; c < 4; ++c) {
    w[c] = (const T*)a.weight + (column + (c < columns ? c : columns - 1)) * a.depth;
  }
  Vec acc[ROWS][4];
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < 4; ++c) acc[r][c] = Vec::zero();
  }
  int64_t k = 0;
  for (; k + Vec::N <= a.depth; k += Vec::N) {
    Vec wk[4];
    for (int c = 0; c < 4; ++c) {
      wk[c] = Vec::load(w[c] + k);
      // Sixteen rows ahead, to L2: the processor's own prefetcher starts anew at each row.
      if (row == 0) __builtin_prefetch(w[c] + 16 * a.depth + k, 0, 2);
    }
    for (int r = 0; r < ROWS; ++r) {
      const Vec xk = Vec::load(x + r * a.x_stride + k);
      for (int c = 0; c < 4; ++c) acc[r][c] = fma(xk, wk[c], acc[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float dot[4];
    sum4(acc[r], dot);
    T* out = (T*)a.out + (row + r) * a.columns + column;
    for (int c = 0; c < columns; ++c) {
      for (int64_t t = k; t < a.depth; ++t)
        dot[c] += to_float(x[r * a.x_stride + t]) * to_float(w[c][t]);
      if (a.bias) dot[c] += to_float(((const T*)a.bias)[column + c]);
      from_float(dot[c], out + c);
    }
  }
}

// Weight rows [begin, end) against all rows of x, in tiles of at most 6 rows (24 accumulators).
template <class T>
void dot_columns(int64_t begin, int64_t end, void* context) {
  const SkinnyLinearArgs& a = *(const SkinnyLinearArgs*)context;
  for (int64_t column = begin; column < end; column += 4) {
    const int columns = end - column < 4 ? int(end - column) : 4;
    int64_t row = 0;
    for (int64_t tiles = (a.rows + 5) / 6; tiles > 0; --tiles) {
      const int64_t rows = (a.rows - row + tiles - 1) / tiles;
      if (rows == 6) dot_tile<T, 6>(a, row, column, columns);
      if (rows == 5) dot_tile<T, 5>(a, row, column, columns);
      if (rows == 4) dot_tile<T, 4>(a, row, column, columns);
      if (rows == 3) dot_tile<T, 3>(a, row, column, columns);
      if (rows == 2) dot_tile<T, 2>(a, row, column, columns);
      if (rows == 1) dot_tile<T, 1>(a, row, column, columns);
      row += rows;
    }
  }
}

void skinny_linear(const SkinnyLinearArgs& a) {
  const int64_t grain = 65536 / (a.depth + 1) + 1;
  void* context = (void*)&a;
  if (a.dtype == kFloat32) return parallel_for(0, a.columns, grain, dot_columns<float>, context);
  if (a.dtype == kFloat16) return parallel_for(0, a.columns, grain, dot_columns<f16>, context);
  parallel_for(0, a.columns, grain, dot_columns<bf16>, context);
}
