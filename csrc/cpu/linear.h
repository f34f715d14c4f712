// out = x weight^T + bias for one or several weights, their results side by side. Weights are read as the model
// stores them.
//
// Other GEMMs rearrange the weight, at every call or once into a copy. This one rearranges x, which is
// small: kBlockRows rows at a time, so that a register holds one word (linear_words.h) of Vec::N rows.
// A tile is kTileColumns columns by kBlockRows rows of the result in registers; each word takes
// kTileVecs loads of x, kTileColumns broadcasts from as many rows of the weight, and a multiply-add for
// each pair of these. Included once per ISA (no include guard).

constexpr int kTileVecs = 3, kBlockRows = Vec::N * kTileVecs;
constexpr int kTileColumns = Vec::N > 1 ? Vec::N / 2 : 1;
// Products summed in one register before they are added to the total: rounding grows with their number.
constexpr int64_t kWords = 256;
// Rearranged rows of x that are processed together: they stay in the caches while the weight is read.
constexpr int64_t kPackedFloats = 1024 * 1024;

struct LinearJob {
  const LinearArgs& a;
  float* packed;      // (blocks, words, kBlockRows)
  int64_t row, rows;  // of x that `packed` holds
};

// Rows [0, rows) of x to packed[word][row], zero beyond them.
template <class U>
void pack_rows(const typename U::Element* x, int64_t stride, int64_t rows, int64_t words,
               float* packed) {
  for (int v = 0; v < kTileVecs; ++v) {
    int64_t u = 0;
    for (; u + Vec::N <= words; u += Vec::N) {
      Vec square[Vec::N];
      for (int r = 0; r < Vec::N; ++r) {
        const int64_t row = v * Vec::N + r;
        square[r] = row < rows ? U::load(x + row * stride + u * U::kPerWord) : Vec::zero();
      }
      transpose(square);
      for (int i = 0; i < Vec::N; ++i) square[i].store(packed + (u + i) * kBlockRows + v * Vec::N);
    }
    for (; u < words; ++u) {
      for (int64_t row = v * Vec::N; row < (v + 1) * Vec::N; ++row) {
        packed[u * kBlockRows + row] =
            row < rows ? U::word(x + row * stride + u * U::kPerWord) : 0.f;
      }
    }
  }
}

// sums[m][row] = weight row m . x row, over VECS registers of rows. AHEAD (for maxsim_tile.h): prefetches the next tile
// in memory, a little with each step; all at once would fill the miss queue.
template <class U, int VECS, bool AHEAD = false>
void multiply_tile(const typename U::Element* const weight[kTileColumns], const float* packed,
                   int64_t words, float* sums) {
  const char* ahead = (const char*)weight[0] + kTileColumns * words * sizeof(float);
  for (int64_t begin = 0; begin == 0 || begin < words; begin += kWords) {
    const int64_t end = begin + kWords < words ? begin + kWords : words;
    Vec acc[kTileColumns][VECS];
    for (int m = 0; m < kTileColumns; ++m) {
      for (int v = 0; v < VECS; ++v) acc[m][v] = Vec::zero();
    }
    for (int64_t u = begin; u < end; ++u) {
      Vec x[VECS];
      for (int v = 0; v < VECS; ++v) x[v] = Vec::load(packed + u * kBlockRows + v * Vec::N);
      if (AHEAD) __builtin_prefetch(ahead + u * kTileColumns * sizeof(float));
      for (int m = 0; m < kTileColumns; ++m) {
        const Vec w = Vec::all(U::word(weight[m] + u * U::kPerWord));
        for (int v = 0; v < VECS; ++v) acc[m][v] = U::multiply_add(w, x[v], acc[m][v]);
      }
    }
    for (int m = 0; m < kTileColumns; ++m) {
      for (int v = 0; v < VECS; ++v) {
        float* sum = sums + m * kBlockRows + v * Vec::N;
        (begin ? Vec::load(sum) + acc[m][v] : acc[m][v]).store(sum);
      }
    }
  }
}

// Columns [column, column + columns) of a part's result for `rows` rows, columns <= Vec::N.
template <class U, int VECS>
void linear_block(const LinearArgs& a, const LinearPart& part, const float* packed, int64_t row,
                  int64_t rows, int64_t column, int columns) {
  using T = typename U::Element;
  const int64_t words = a.depth / U::kPerWord;
  alignas(64) float sums[Vec::N * kBlockRows];
  for (int half = 0; half < Vec::N; half += kTileColumns) {
    const T* weight[kTileColumns];  // past the last column, the last one again
    for (int m = 0; m < kTileColumns; ++m) {
      const int c = half + m < columns ? half + m : columns - 1;
      weight[m] = (const T*)part.weight + (column + c) * a.depth;
    }
    multiply_tile<U, VECS>(weight, packed, words, sums + half * kBlockRows);
  }
  float bias[Vec::N];
  for (int c = 0; c < Vec::N; ++c) {
    bias[c] = part.bias && c < columns ? to_float(((const T*)part.bias)[column + c]) : 0.f;
  }
  for (int v = 0; v < VECS; ++v) {
    Vec square[Vec::N];
    for (int c = 0; c < Vec::N; ++c) square[c] = Vec::load(sums + c * kBlockRows + v * Vec::N);
    transpose(square);
    for (int r = 0; r < Vec::N && v * Vec::N + r < rows; ++r) {
      Vec result = square[r] + Vec::load(bias);
      if (a.gelu) result = gelu(result);
      T* out = (T*)a.out + (row + v * Vec::N + r) * a.columns + part.first + column;
      if (columns == Vec::N) {
        result.store(out);
      } else {
        float part[Vec::N];
        result.store(part);
        for (int c = 0; c < columns; ++c) from_float(part[c], out + c);
      }
    }
  }
}

template <class U>
void linear_pack(int64_t begin, int64_t end, void* context) {
  const LinearJob& job = *(const LinearJob*)context;
  const LinearArgs& a = job.a;
  const int64_t words = a.depth / U::kPerWord;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlockRows, left = job.rows - first;
    const auto* x = (const typename U::Element*)a.x + (job.row + first) * a.x_stride;
    pack_rows<U>(x, a.x_stride, left < kBlockRows ? left : kBlockRows, words,
                 job.packed + first * words);
  }
}

// A group is up to Vec::N columns of one part.
inline int64_t groups_of(const LinearPart& part) { return (part.columns + Vec::N - 1) / Vec::N; }

// Groups [begin, end), counted through all parts, against all rows of the job.
template <class U>
void linear_groups(int64_t begin, int64_t end, void* context) {
  const LinearJob& job = *(const LinearJob*)context;
  const LinearArgs& a = job.a;
  const int64_t words = a.depth / U::kPerWord;
  const LinearPart* part = a.parts;
  int64_t first_group = 0;  // of the part
  for (int64_t group = begin; group < end; ++group) {
    while (group - first_group >= groups_of(*part)) first_group += groups_of(*part++);
    const int64_t column = (group - first_group) * Vec::N, left = part->columns - column;
    const int columns = left < Vec::N ? int(left) : Vec::N;
    for (int64_t first = 0; first < job.rows; first += kBlockRows) {
      const int64_t rows = job.rows - first < kBlockRows ? job.rows - first : kBlockRows;
      const float* packed = job.packed + first * words;
      const int64_t row = job.row + first;
      if (rows > 2 * Vec::N) linear_block<U, 3>(a, *part, packed, row, rows, column, columns);
      if (rows > Vec::N && rows <= 2 * Vec::N)
        linear_block<U, 2>(a, *part, packed, row, rows, column, columns);
      if (rows <= Vec::N) linear_block<U, 1>(a, *part, packed, row, rows, column, columns);
    }
  }
}

inline int64_t blocks_at_once(const LinearArgs& a) {
  const int64_t fit = kPackedFloats / (kBlockRows * (a.depth + 1)) + 1;
  const int64_t all = (a.rows + kBlockRows - 1) / kBlockRows;
  return fit < all ? fit : all;
}

// Floats of scratch that `linear` needs.
int64_t linear_scratch(const LinearArgs& a) { return blocks_at_once(a) * kBlockRows * a.depth; }

template <class U>
void linear_with(const LinearArgs& a, float* scratch) {
  const int64_t step = blocks_at_once(a) * kBlockRows;
  for (int64_t row = 0; row < a.rows; row += step) {
    LinearJob job{a, scratch, row, a.rows - row < step ? a.rows - row : step};
    parallel_for(0, (job.rows + kBlockRows - 1) / kBlockRows, 1, linear_pack<U>, &job);
    const int64_t grain = grain_of(job.rows * a.depth);
    int64_t groups = 0;
    for (int64_t p = 0; p < a.n_parts; ++p) groups += groups_of(a.parts[p]);
    parallel_for(0, groups, grain, linear_groups<U>, &job);
  }
}

void linear(const LinearArgs& a, float* scratch) {
#if EMBEDFUSE_ISA == EMBEDFUSE_AVX512_BF16
  if (a.dtype == kBFloat16 && a.depth % 2 == 0) return linear_with<Bf16Pairs>(a, scratch);
#endif
  if (a.dtype == kFloat32) return linear_with<Floats<float>>(a, scratch);
  if (a.dtype == kFloat16) return linear_with<Floats<f16>>(a, scratch);
  linear_with<Floats<bf16>>(a, scratch);
}
