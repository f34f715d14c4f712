// maxsim over int8 documents where the processor multiplies bytes (VNNI): products of the documents with
// queries rounded to int8 show which rows may hold a maximum, and only these are multiplied with the queries in fp32.
// Included once per ISA (no include guard).
//
// q = c Q + e with Q whole numbers up to 127. For a document row with values D and factor f
//     | f q D - c f Q D |  <=  |e| |f D|  <=  |e| B,   B the largest |f D| of the chunk,
// so a row whose f Q D is more than 2 (|e| / c) B below the largest cannot hold the maximum. The others are the
// candidates (one or two rows for each query row); their products in fp32 give the exact maximum.
// If more than an eighth are candidates, or numbers are not finite, all rows of the chunk are multiplied in fp32.
// `Bytes` multiplies bytes: VnniBytes (maxsim_bytes.h) or ByteTiles (maxsim_amx.h).

constexpr int64_t kScreenBytes = 384 * 1024;
// Sums of more products could pass 2^31.
constexpr int64_t kScreenDepth = 32768;

// How many products of `live` query rows with `rows` document rows may be candidates.
inline int64_t max_candidates(int64_t live, int64_t rows) { return live + live * rows / 8; }

struct ScreenShape {
  int64_t stride;  // of a document's row in the chunk, in bytes
  int64_t rows;    // of a chunk at most
  int64_t quads;   // of a packed query row
};

template <class Bytes>
ScreenShape screen_shape(const MaxSimArgs& a) {
  const int64_t stride = (a.depth + 63) / 64 * 64, step = Bytes::kRows;
  const int64_t fit = kScreenBytes / (stride + 1) / step * step;
  const int64_t quads = ((a.depth + 3) / 4 + Bytes::kQuads - 1) / Bytes::kQuads * Bytes::kQuads;
  return {stride, fit < step ? step : fit > kChunkRows ? kChunkRows : fit, quads};
}

// Buffers of a thread. Those with one value per query row of the group come first.
struct Screen {
  ScreenShape shape;
  float *packed, *start;   // int8 (quad, kBlockRows, 4) per block; int32
  float *inverse, *slack;  // 1 / c, and |e| / c with what fp32 may round
  float *chunk, *squares, *products, *tops, *candidates;  // of a document

  Screen(const ScreenShape& shape, int64_t query_rows, float* scratch) : shape(shape) {
    packed = scratch;
    start = packed + query_rows * shape.quads;
    inverse = start + query_rows;
    slack = inverse + query_rows;
    chunk = slack + query_rows;
    squares = chunk + shape.rows * shape.stride / 4;
    products = squares + shape.rows + Vec::N;
    tops = products + shape.rows * kBlockRows;
    candidates = tops + shape.rows * kBlockRows / kTileColumns;
  }
};

inline int64_t screen_floats(const ScreenShape& shape, int64_t query_rows) {
  return query_rows * (shape.quads + 3) + shape.rows * (shape.stride / 4 + 1 + kBlockRows) +
         shape.rows * kBlockRows / kTileColumns + Vec::N + max_candidates(kBlockRows, shape.rows);
}

// Rounds query row number `row` of the group to int8. A row that is not finite, or too small for c, gets an
// infinite slack: every product is a candidate.
template <class T>
void screen_query(const T* x, int64_t depth, int64_t row, const Screen& screen) {
  const int64_t quads = screen.shape.quads;
  float largest = 0.f, poison = 0.f;
  for (int64_t k = 0; k < depth; ++k) {
    const float size = __builtin_fabsf(to_float(x[k]));
    largest = size > largest ? size : largest;
    poison += 0.f * size;
  }
  const bool usable = poison == 0.f && largest > 1e-30f && largest < 1e30f;
  const float step = usable ? largest / 127.f : 1.f;
  int8_t* packed = (int8_t*)(screen.packed + row / kBlockRows * kBlockRows * quads);
  packed += row % kBlockRows * 4;
  float squares = 0.f;
  int32_t total = 0;
  for (int64_t k = 0; k < 4 * quads; ++k) {
    const float value = usable && k < depth ? to_float(x[k]) : 0.f;
    // Adding 1.5 * 2^23 rounds to the nearest whole number.
    const float whole = (value / step + 0x1.8p+23f) - 0x1.8p+23f;
    const float error = value / step - whole;  // in steps: the square of a small e would be 0
    squares += error * error;
    total += int32_t(whole);
    packed[k / 4 * kBlockRows * 4 + k % 4] = int8_t(whole);
  }
  screen.start[row] = bits_float(uint32_t(-128 * total));
  screen.inverse[row] = 1.f / step;
  // Rounding of products to fp32: they are at most 127 sqrt(depth) B.
  const float rounding = 0x1p-20f * 127.f * __builtin_sqrtf(float(depth));
  screen.slack[row] = usable ? 1.01f * __builtin_sqrtf(squares) + rounding : __builtin_inff();
}

template <class Query>
void screen_queries(const MaxSimArgs& a, const QueryGroup& group, const Screen& screen) {
  const int64_t quads = screen.shape.quads;
  int64_t row = 0;
  for (int64_t q = group.first; q < group.last; ++q) {
    const auto* x = (const typename Query::Element*)a.query.texts[q];
    for (int64_t r = 0; r < span_rows(a.query, q); ++r, x += a.query.stride, ++row) {
      screen_query(x, a.depth, row, screen);
    }
    for (; row % kBlockRows; ++row) {  // lanes without a row have no candidates
      screen.start[row] = screen.inverse[row] = 0.f;
      screen.slack[row] = -__builtin_inff();
      int32_t* packed = (int32_t*)screen.packed + row / kBlockRows * kBlockRows * quads;
      for (int64_t u = 0; u < quads; ++u) packed[u * kBlockRows + row % kBlockRows] = 0;
    }
  }
}

// The largest |f D| of the chunk, rounded up; -1 if it cannot be used as a bound.
inline float screen_bound(const float* squares, const float* factors, int64_t rows) {
  __m512 most = _mm512_setzero_ps(), total = most;
  for (int64_t r = 0; r < rows; r += Vec::N) {
    const __mmask16 inside = rows - r < Vec::N ? (1u << (rows - r)) - 1 : 0xffff;
    const __m512 norm = _mm512_sqrt_ps(_mm512_maskz_loadu_ps(inside, squares + r));
    const __m512 factor = _mm512_abs_ps(_mm512_maskz_loadu_ps(inside, factors + r));
    const __m512 size = _mm512_mul_ps(norm, factor);
    most = _mm512_max_ps(most, size);
    total = _mm512_add_ps(total, size);
  }
  const float bound = 1.0001f * (128.f / 127.f) * _mm512_reduce_max_ps(most);
  const bool usable = _mm512_reduce_add_ps(total) < 1e30f && bound > 1e-25f;
  return usable ? bound : -1.f;
}

// Lanes in which x >= floor, or floor is NaN (inf - inf, if a query without a bound has an infinite maximum).
inline uint32_t reached(Vec x, Vec floor) { return _mm512_cmp_ps_mask(x.v, floor.v, _CMP_NLT_UQ); }

// Finds the products that reach `floor`, as row * VECS * N + lane, in tiles whose tops reach it. Returns their
// number; -1 if there are more than `limit`.
template <int VECS>
int64_t find_candidates(const float* products, const float* tops, int64_t rows,
                        const Vec floor[VECS], int64_t limit, uint32_t* candidates) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; r += kTileColumns, tops += VECS * Vec::N) {
    for (int v = 0; v < VECS; ++v) {
      if (!reached(Vec::load(tops + v * Vec::N), floor[v])) continue;
      for (int64_t m = r; m < rows && m < r + kTileColumns; ++m) {
        const int64_t at = (m * VECS + v) * Vec::N;
        for (uint32_t lanes = reached(Vec::load(products + at), floor[v]); lanes;
             lanes &= lanes - 1) {
          if (count == limit) return -1;
          candidates[count++] = uint32_t(at + __builtin_ctz(lanes));
        }
      }
    }
  }
  return count;
}

template <class T>
float dot(const T* query, const int8_t* document, int64_t depth) {
  Vec even = Vec::zero(), odd = Vec::zero();
  int64_t k = 0;
  for (; k + 2 * Vec::N <= depth; k += 2 * Vec::N) {
    even = fma(Vec::load(query + k), Vec::load(document + k), even);
    odd = fma(Vec::load(query + k + Vec::N), Vec::load(document + k + Vec::N), odd);
  }
  float total = sum(even + odd);
  for (; k < depth; ++k) total += to_float(query[k]) * to_float(document[k]);
  return total;
}

struct ScreenChunk {
  const int8_t* rows;
  int64_t count, place;  // of its rows; number of the first one
  const float* factors;
};

// Copies rows [row, row + Bytes::kRows) of the document's chunk, as far as it has them, to screen.chunk.
template <class Bytes>
void screen_rows(const MaxSimArgs& a, const Screen& screen, const ScreenChunk& chunk, int64_t row) {
  for (int64_t r = row; r < row + Bytes::kRows && r < chunk.count; r += kTileColumns) {
    const int8_t* rows[kTileColumns];  // past the last row, the last one again
    for (int m = 0; m < kTileColumns; ++m) {
      rows[m] = chunk.rows + (r + m < chunk.count ? r + m : chunk.count - 1) * a.document.stride;
    }
    uint8_t* copy = (uint8_t*)screen.chunk + r * screen.shape.stride;
    screen_copy(rows, a.depth, screen.shape.stride, copy, screen.squares + r);
  }
}

// Products of the whole chunk with block `block` of the group, to screen.products and screen.tops. The first
// block also copies the chunk. The rows that the step after next begins with are prefetched.
template <class Bytes, int VECS>
void screen_multiply(const MaxSimArgs& a, const Screen& screen, int64_t block,
                     const ScreenChunk& chunk) {
  constexpr int64_t kLanes = VECS * Vec::N, kRows = Bytes::kRows;
  const ScreenShape& shape = screen.shape;
  const float* packed = screen.packed + block * kBlockRows * shape.quads;
  for (int64_t r = 0; r < chunk.count; r += kRows) {
    float factors[kRows];
    for (int64_t m = 0; m < kRows; ++m) {
      factors[m] = chunk.factors[r + m < chunk.count ? r + m : chunk.count - 1];
    }
    if (block == 0) screen_rows<Bytes>(a, screen, chunk, r);
    const int8_t* ahead = chunk.rows + r * a.document.stride + 2 * kRows * a.depth;
    Bytes::template multiply<VECS>((uint8_t*)screen.chunk + r * shape.stride, shape.stride,
                                   chunk.count - r, packed, screen.start + block * kBlockRows,
                                   shape.quads, factors, ahead, screen.products + r * kLanes,
                                   screen.tops + r / kTileColumns * kLanes);
  }
}

// A chunk against block `block` of the group, whose `live` rows begin at `query`. False if there are too many
// candidates.
template <class T, class Bytes, int VECS>
bool screen_block(const MaxSimArgs& a, const QueryGroup& group, const Screen& screen, int64_t block,
                  int64_t live, const T* query, const ScreenChunk& chunk) {
  constexpr int64_t kLanes = VECS * Vec::N;
  const int64_t base = block * kBlockRows;
  screen_multiply<Bytes, VECS>(a, screen, block, chunk);
  const float bound = screen_bound(screen.squares, chunk.factors, chunk.count);
  if (bound < 0.f) return false;
  float *best = group.best + base, *place = group.place + base;
  const float* end = screen.tops + (chunk.count + kTileColumns - 1) / kTileColumns * kLanes;
  Vec floor[VECS];
  for (int v = 0; v < VECS; ++v) {
    Vec top = Vec::load(screen.tops + v * Vec::N);
    for (const float* other = screen.tops + v * Vec::N; other < end; other += kLanes) {
      top = max(top, Vec::load(other));
    }
    const Vec slack = Vec::load(screen.slack + base + v * Vec::N) * Vec::all(bound);
    const Vec so_far = Vec::load(best + v * Vec::N) * Vec::load(screen.inverse + base + v * Vec::N);
    floor[v] = max(so_far, top - slack) - slack;
  }
  uint32_t* candidates = (uint32_t*)screen.candidates;
  const int64_t limit = max_candidates(live < kBlockRows ? live : kBlockRows, chunk.count);
  const int64_t count =
      find_candidates<VECS>(screen.products, screen.tops, chunk.count, floor, limit, candidates);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = candidates[i] / kLanes, lane = candidates[i] % kLanes;
    const float product = chunk.factors[row] * dot(query + lane * a.query.stride,
                                                   chunk.rows + row * a.document.stride, a.depth);
    if (best[lane] != best[lane] || product <= best[lane]) continue;
    best[lane] = product;
    place[lane] = bits_float(uint32_t(chunk.place + row));
  }
  return count >= 0;
}

template <class T, class Bytes>
void screen_chunk(const MaxSimArgs& a, const QueryGroup& group, const Screen& screen,
                  const ScreenChunk& chunk) {
  int64_t block = 0;
  for (int64_t q = group.first; q < group.last; ++q) {
    const T* x = (const T*)a.query.texts[q];
    for (int64_t live = span_rows(a.query, q); live > 0; live -= kBlockRows, ++block) {
      const bool done =
          live > 2 * Vec::N ? screen_block<T, Bytes, 3>(a, group, screen, block, live, x, chunk)
          : live > Vec::N   ? screen_block<T, Bytes, 2>(a, group, screen, block, live, x, chunk)
                            : screen_block<T, Bytes, 1>(a, group, screen, block, live, x, chunk);
      const int64_t step = chunk_rows(a, kTileColumns);
      for (int64_t r = 0; r < chunk.count && !done; r += step) {
        const int64_t rows = chunk.count - r < step ? chunk.count - r : step;
        load_rows(chunk.rows + r * a.document.stride, a.document.stride, rows, a.depth, a.depth,
                  group.chunk);
        update_block<Registers<Floats<float>>>(a, group, block, live, group.chunk, a.depth, rows,
                                               chunk.place + r, chunk.factors + r);
      }
      x += kBlockRows * a.query.stride;
    }
  }
}

template <class Query, class Bytes>
void screen_document(const MaxSimArgs& a, const QueryGroup& group, const Screen& screen,
                     int64_t document) {
  const int64_t step = screen.shape.rows, all = span_rows(a.document, document);
  const auto* x = (const int8_t*)a.document.texts[document];
  const float* scale = a.scale + a.document.spans[2 * document];
  for (int64_t row = 0; row < all; row += step, x += step * a.document.stride) {
    const int64_t rows = all - row < step ? all - row : step;
    const float* factors = row_factors(a, x, rows, scale + row, group.factor);
    screen_chunk<typename Query::Element, Bytes>(a, group, screen, {x, rows, row, factors});
  }
}
